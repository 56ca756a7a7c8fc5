"""Prompts to generate from: a list in the recipe, or a text, CSV or JSONL file; checked, with keys that name files."""

import re
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from eval import records
from eval.records import BadRow, Record, not_local, read_text

COLUMNS = ("prompt", "image", "key")  # of a prompts file
MAX_KEY = 40  # characters


@dataclass(frozen=True)
class Prompt:
    key: str  # of [a-z0-9-]: names files
    text: str
    image: Path | None
    frames: int = 1  # of the image that the clip begins with: 1, or those of a prefix


@dataclass
class PromptsConfig:
    """Keys of the sections that take prompts."""

    prompts: list[str] = field(default_factory=list)  # what is to be seen
    prompts_file: str = ""  # instead of prompts: .txt, one per line; .csv or .jsonl, columns prompt [image] [key]
    # Image-to-video: a clip or picture per prompt, of which the first backbone.prefix_frames are used.
    images: list[str] = field(default_factory=list)


def read_prompts(settings: PromptsConfig, section: str, frames: int = 1) -> list[Prompt]:
    """The prompts of a section's keys `prompts` or `prompts_file`, with their keys and images, of which clips begin
    with `frames`.

    Raises ValueError where there are none, for an unreadable file, a missing column, a prompt that is empty or no text,
    doubled keys, images for some prompts only, and for `frames` above 1 without images. Images in a file are relative
    to its folder; ~ is expanded.
    """
    source, folder, images = f"{section}.prompts", Path(), settings.images
    found: list[Record] = [{"prompt": text} for text in settings.prompts]
    if settings.prompts_file:
        if found:
            print(f"{section}.prompts_file is given: the {len(found)} prompts of {section}.prompts are not used")
        path = Path(settings.prompts_file).expanduser()
        source, folder, found = str(path), path.parent, _read_records(path, section)
    rows = [_read_row(record, f"{source}, prompt {number}") for number, record in enumerate(found, start=1)]
    if not rows:
        raise ValueError(f"{source} holds no prompts: list some in {section}.prompts, or name a {section}.prompts_file")
    if images:
        if any(row["image"] for row in rows):
            raise ValueError(f"{section}.images is given and {source} has an image column: use one of the two")
        if len(images) != len(rows):
            raise ValueError(f"{section}.images names {len(images)} files for {len(rows)} prompts: give one a prompt")
        folder = Path()
        rows = [row | {"image": image} for row, image in zip(rows, images, strict=True)]
    keyed: dict[str, Prompt] = {}
    for index, row in enumerate(rows):
        place, text, own_key = f"{source}, prompt {index + 1}", row["prompt"], row["key"]
        key = slug(own_key)[:MAX_KEY].strip("-") if own_key else make_key(index, text)
        if not key:
            raise ValueError(
                f"{place}: key {own_key!r} has no letter a-z and no digit: give one that has, or leave it out"
            )
        if key in keyed:
            first = list(keyed).index(key) + 1
            raise ValueError(
                f"{place}: key {own_key or key!r} is that of prompt {first} already, both as {key!r}: give keys that"
                f" differ in the letters a-z and digits of their first {MAX_KEY} characters"
            )
        if why := not_local(row["image"]):
            raise ValueError(f"{place}: image {row['image']} {why}")
        image = folder / Path(row["image"]).expanduser() if row["image"] else None
        keyed[key] = Prompt(key, text, image, frames if image else 1)
    without = [prompt.key for prompt in keyed.values() if prompt.image is None]
    if 0 < len(without) < len(keyed):
        raise ValueError(f"{source}: {len(without)} prompts have no image, the first is {without[0]}: give all or none")
    if without and frames > 1:
        raise ValueError(
            f"backbone.prefix_frames={frames}: no prompt has a clip to continue; name clips in {section}.images or in"
            f" the column image of {section}.prompts_file, or set it to 1"
        )
    return list(keyed.values())


def make_key(index: int, prompt: str) -> str:
    """A prompt's name in file names: its index and its first words, of [a-z0-9-], at most 40 characters."""
    return f"{index:03d}-{slug(prompt)}"[:MAX_KEY].strip("-")


def slug(text: str) -> str:
    """`text` in a-z, 0-9 and single hyphens; accents are dropped, as are letters of other scripts."""
    plain = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode("ascii").lower()
    return re.sub(r"[^a-z0-9]+", "-", plain).strip("-")


def _read_records(path: Path, section: str) -> list[Record]:
    """The rows of a prompts file; ValueError where it cannot be read or has no column prompt."""
    formats = "a .txt with a prompt a line, or a .csv or .jsonl with the columns prompt [image] [key]"
    readers = {".txt": _lines, ".csv": records.csv_records, ".jsonl": records.jsonl_records}
    key, columns = f"{section}.prompts_file={path}", dict[str, None]()
    if path.suffix.lower() not in readers:
        raise ValueError(f"{key}: {records.unknown_format(path, formats)}")
    try:
        found = list(readers[path.suffix.lower()](path, COLUMNS, columns))
    except OSError as error:
        raise ValueError(f"{key} cannot be read ({error.strerror}): give {formats}") from error
    if columns:
        records.require(path, COLUMNS[:1], columns)
    if unused := [name for name in columns if name not in COLUMNS]:
        print(f"warning: columns of {path} that are not read: {', '.join(unused)}")
    return found


def _lines(path: Path, known: Sequence[str], columns: dict[str, None]) -> Iterator[Record]:
    """A prompt a line; blank lines and comments, which begin with #, are none."""
    records.check_encoding(path)
    comments = 0
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="\n") as file:
        for line in filter(str.strip, file):
            if line.startswith("#"):
                comments += 1
            else:
                yield {"prompt": line}
    if comments:
        print(f"{path}: {comments} lines that begin with # are comments, not prompts")


def _read_row(record: Record, place: str) -> dict[str, str]:
    """Prompt, image and key of a row, the last two empty where there are none. Raises ValueError."""
    try:
        if isinstance(record, BadRow):
            raise record
        row = {column: read_text(record, column, number_too=column == "key") for column in COLUMNS}
    except BadRow as bad:
        raise ValueError(f"{place}: {bad.detail}") from bad
    if not row["prompt"]:
        raise ValueError(f"{place} is empty: describe the clip, or remove it")
    return row
