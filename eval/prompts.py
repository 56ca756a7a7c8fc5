"""Prompts to generate from: a list in the recipe, or a text, CSV or JSONL file; checked, with keys that name files."""

import csv
import difflib
import io
import json
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

COLUMNS = ("prompt", "image", "key")  # of a prompts file
MAX_KEY = 40  # characters


@dataclass(frozen=True)
class Prompt:
    key: str  # of [a-z0-9-]: names files
    text: str
    image: Path | None


def read_prompts(
    prompts: Sequence[str], images: Sequence[str], file: str, *, section: str = "generate"
) -> list[Prompt]:
    """The prompts of a section's keys `prompts` or `prompts_file`, with their keys and images.

    Raises ValueError where there are none, for an unreadable file, a missing column, an empty prompt, doubled keys, and
    images for some prompts only. Images in a file are relative to its folder.
    """
    source, folder = f"{section}.prompts", Path()
    records: list[dict[str, Any]] = [{"prompt": text} for text in prompts]
    if file:
        if records:
            print(f"{section}.prompts_file is given: the {len(records)} prompts of {section}.prompts are not used")
        path = Path(file)
        source, folder, records = str(path), path.parent, _read_records(path, section)
    if not records:
        raise ValueError(f"{source} holds no prompts: list some in {section}.prompts, or name a {section}.prompts_file")
    if images:
        if any(record.get("image") for record in records):
            raise ValueError(f"{section}.images is given and {source} has an image column: use one of the two")
        if len(images) != len(records):
            raise ValueError(
                f"{section}.images names {len(images)} files for {len(records)} prompts: give one a prompt"
            )
        folder = Path()
        records = [record | {"image": image} for record, image in zip(records, images, strict=True)]
    found: dict[str, Prompt] = {}
    for index, record in enumerate(records):
        place = f"{source}, prompt {index + 1}"
        text, image, own_key = (_read_text(record, column, place) for column in COLUMNS)
        if not text:
            raise ValueError(f"{place} is empty: describe the clip, or remove it")
        key = slug(own_key)[:MAX_KEY].strip("-") if own_key else make_key(index, text)
        if not key or key in found:
            raise ValueError(
                f"{place}: key {own_key or key!r} has no letter or digit or, as {key!r}, is there twice: give keys that"
                f" differ in the letters a-z and digits of their first {MAX_KEY} characters"
            )
        found[key] = Prompt(key, text, folder / image if image else None)
    without = [prompt.key for prompt in found.values() if prompt.image is None]
    if 0 < len(without) < len(found):
        raise ValueError(f"{source}: {len(without)} prompts have no image, the first is {without[0]}: give all or none")
    return list(found.values())


def make_key(index: int, prompt: str) -> str:
    """A prompt's name in file names: its index and its first words, of [a-z0-9-], at most 40 characters."""
    return f"{index:03d}-{slug(prompt)}"[:MAX_KEY].strip("-")


def slug(text: str) -> str:
    """`text` in a-z, 0-9 and single hyphens; accents are dropped, as are letters of other scripts."""
    plain = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode("ascii").lower()
    return re.sub(r"[^a-z0-9]+", "-", plain).strip("-")


def _read_records(path: Path, section: str) -> list[dict[str, Any]]:
    """The rows of a prompts file as dicts; ValueError where it cannot be read or has no column prompt."""
    remedy = "give a UTF-8 .txt with a prompt a line, or a .csv or .jsonl with the columns prompt [image] [key]"
    if path.suffix.lower() not in (".txt", ".csv", ".jsonl"):
        raise ValueError(f"{section}.prompts_file={path} has an unknown format {path.suffix!r}: {remedy}")
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except (OSError, ValueError) as error:
        raise ValueError(f"{section}.prompts_file={path} cannot be read ({error}): {remedy}") from error
    lines = [(number, line) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]
    if path.suffix.lower() == ".txt":
        return [{"prompt": line} for _, line in lines]
    columns: dict[str, None] = {}
    records: list[dict[str, Any]] = []
    if path.suffix.lower() == ".csv":
        reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
        try:
            columns = dict.fromkeys(reader.fieldnames or [])
            for record in reader:
                if None in record:
                    raise csv.Error("more fields than columns, quote those that hold a comma")
                records.append(record)
        except csv.Error as error:
            raise ValueError(f"{path} is not valid CSV near line {reader.line_num} ({error}): {remedy}") from error
    else:
        for number, line in lines:
            try:
                record = json.loads(line)
                columns |= dict.fromkeys(record.keys())
            except (ValueError, AttributeError, RecursionError) as error:
                raise ValueError(f"{path}, line {number}, is no JSON object ({error}): {remedy}") from error
            records.append(record)
    if columns and "prompt" not in columns:
        near = difflib.get_close_matches("prompt", list(columns), n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"{path} has no column 'prompt', found: {', '.join(columns)}{hint}")
    if unused := [name for name in columns if name not in COLUMNS]:
        print(f"warning: columns of {path} that are not read: {', '.join(unused)}")
    return records


def _read_text(record: dict[str, Any], column: str, place: str) -> str:
    value = record.get(column)
    if not isinstance(value, (str, int, type(None))):
        raise ValueError(f"{place}: {column} must be text, not {value!r}")
    text = "" if value is None else str(value).strip()
    if re.search(r"[\0\ud800-\udfff]", text):
        raise ValueError(f"{place}: {column} {text!r} is not valid UTF-8 text: correct it")
    return text
