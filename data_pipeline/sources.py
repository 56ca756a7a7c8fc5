"""The manifest of raw clips: a CSV or JSONL file in, checked rows out.

Columns: `clip` (path, absolute or relative to the manifest's folder) and `prompt`; optional `key`, `start` (seconds
into the clip), `action`, `physics_richness`, `semantic` and `physical` (one pair of judge scores in [0, 1] for all
losers of the row); in JSONL also `scores` ([[semantic, physical], ...], one pair a loser).

A bad column stops everything before any work, with a ValueError. A bad row stops nothing: it comes out as a
`Quarantined`, at its place, with its reason.

Instead of a file there can be `sandbox:<scene>:<count>[:<split>]`, the split train, heldout or pool: clips that are
simulated when they are needed, see eval/sandbox/splits.py.
"""

import csv
import difflib
import hashlib
import io
import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from eval.sandbox.clips import SCENES, Clips
from eval.sandbox.splits import SPLITS, Simulated, list_clips, simulate_block
from train.clips import VideoConfig, read_clip

REQUIRED = ("clip", "prompt")
OPTIONAL = ("key", "start", "action", "physics_richness", "semantic", "physical", "scores")
SCORES = ("semantic", "physical")
MAX_KEY = 64  # characters; a key becomes the name of a tar member


@dataclass(frozen=True)
class Row:
    number: int  # in the manifest, from 1, the header not counted
    key: str  # letters, digits, _ and -; unique in the manifest
    clip: str  # as the manifest writes it
    path: Path  # of the clip
    prompt: str
    start: float  # seconds into the clip
    action: str
    physics_richness: float | None
    scores: tuple[tuple[float, float], ...]  # (semantic, physical): one a loser, one for all, or none
    simulated: Simulated | None = None  # where the clip comes from if it is no file


@dataclass(frozen=True)
class Quarantined:
    row: int  # as Row.number
    key: str  # empty where the row did not get that far
    clip: str
    reason: str  # one of a few fixed words, for counting
    detail: str


@dataclass(frozen=True)
class Manifest:
    path: Path
    rows: list[Row | Quarantined]  # in the file's order
    unused_columns: list[str]


class FrameReader:
    """The frames of rows, from files or from the simulator; the last simulated block is kept, for rows follow it.

    device: where simulated clips are drawn.
    """

    def __init__(self, video: VideoConfig, device: torch.device | str):
        self.video, self.device = video, device
        self._block: tuple[object, Clips | None] = (None, None)

    def read(self, row: Row) -> Tensor:
        """(T, H, W, 3) uint8. Raises ClipError where the clip cannot be used."""
        place = row.simulated
        if place is None:
            return read_clip(row.path, self.video, start=row.start)
        name = (place.scene, place.split, place.seed, place.block)
        if self._block[0] != name:
            self._block = name, simulate_block(*name, self.video, device=self.device)
        return self._block[1].frames[place.index]


class _BadRow(Exception):
    def __init__(self, reason: str, detail: str):
        super().__init__(detail)
        self.reason, self.detail = reason, detail


def is_simulated(manifest: str) -> bool:
    return manifest.startswith("sandbox:")


def simulated_manifest(manifest: str, video: VideoConfig, *, seed: int) -> Manifest:
    """The rows of `sandbox:<scene>:<count>[:<split>]`: keys like projectile-000123, the action is the scene.

    Raises ValueError for another form, an unknown scene or split, and a video in which the scenes do not fit.
    """
    _, scene, count, split = (*manifest.split(":"), "train")[:4] if manifest.count(":") >= 2 else ("",) * 4
    if scene not in ("mixed", *SCENES) or not count.isdecimal() or int(count) < 1 or manifest.count(":") > 3:
        raise ValueError(
            f"pipeline.manifest={manifest}: use sandbox:<scene>:<count>[:<split>] with a scene out of mixed, "
            f"{', '.join(SCENES)} and a split out of {', '.join(SPLITS)}"
        )
    rows: list[Row | Quarantined] = []
    for number, clip in enumerate(list_clips(scene, split, seed, int(count), video)):
        name = f"sandbox:{scene}:{split}:{clip.block}:{clip.index}"
        row = Row(
            number=number + 1,
            key=f"{clip.shown}-{number:06d}",
            clip=name,
            path=Path(name),
            prompt=clip.prompt,
            start=0.0,
            action=clip.shown,
            physics_richness=None,
            scores=(),
            simulated=clip,
        )
        rows.append(row)
    return Manifest(Path(manifest), rows, [])


def read_manifest(path: str | Path, *, num_losers: int) -> Manifest:
    """Read and check a manifest; `num_losers` is the number of pairs that a row's `scores` must have.

    Raises ValueError for a missing file, another suffix than .csv or .jsonl, a missing or doubled column, broken
    quoting, and a file without rows.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"pipeline.manifest={path}: no such file; give a .csv or .jsonl with columns clip and prompt")
    # Bytes that are not UTF-8 become surrogates, so that they spoil their own row only.
    text = path.read_bytes().decode("utf-8-sig", errors="surrogateescape")
    readers = {".csv": _csv_records, ".jsonl": _jsonl_records}
    if path.suffix.lower() not in readers:
        raise ValueError(f"pipeline.manifest={path}: unknown format {path.suffix!r}; use a .csv or a .jsonl file")
    columns, records = readers[path.suffix.lower()](path, text)
    missing = [name for name in REQUIRED if name not in columns]
    if missing and columns:
        hints = [f"did you mean {near[0]!r}?" for name in missing if (near := difflib.get_close_matches(name, columns))]
        raise ValueError(
            f"{path} has no column {' and no column '.join(map(repr, missing))}; found: {', '.join(columns) or 'none'};"
            f" required: {', '.join(REQUIRED)}{'; ' if hints else ''}{' '.join(hints)}"
        )
    if not records:
        raise ValueError(f"{path} has no rows; it needs the columns {', '.join(REQUIRED)} and a row for each clip")
    rows: list[Row | Quarantined] = []
    first_with_key: dict[str, int] = {}
    for number, record in enumerate(records, start=1):
        try:
            row = _parse_row(number, record, path.parent, num_losers)
            if row.key in first_with_key:
                raise _BadRow("duplicate key", f"key {row.key!r} is that of row {first_with_key[row.key]} already")
            first_with_key[row.key] = number
            rows.append(row)
        except _BadRow as bad:
            key, clip = (_printable(record.get(name)) if isinstance(record, dict) else "" for name in ("key", "clip"))
            rows.append(Quarantined(number, key, clip, bad.reason, bad.detail))
    return Manifest(path, rows, [name for name in columns if name not in (*REQUIRED, *OPTIONAL)])


def safe_key(text: str) -> str:
    """`text` as a key of letters, digits, _ and -, at most 64 long; a changed one ends in a digest of the original."""
    safe = re.sub(r"[^A-Za-z0-9_-]+", "-", text)
    if safe == text and 0 < len(text) <= MAX_KEY:
        return text
    digest = hashlib.sha256(text.encode("utf-8")).hexdigest()[:12]
    stem = safe[: MAX_KEY - 13].strip("-")
    return f"{stem}-{digest}" if stem else digest


def _csv_records(path: Path, text: str) -> tuple[list[str], list[Any]]:
    """(column names, one dict a row, or a _BadRow for a row of another number of fields than the header)."""
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        columns = [_printable(name).strip() for name in next(reader, [])]
        lines = [line for line in reader if line]  # a blank line is no row
    except csv.Error as error:
        raise ValueError(f"{path} is not valid CSV near line {reader.line_num}: {error}; check the quotes") from error
    if doubled := {name for name in columns if columns.count(name) > 1}:
        raise ValueError(f"{path} has the column {' and '.join(sorted(doubled))} twice; remove one")
    records: list[Any] = []
    for line in lines:
        if len(line) == len(columns):
            records.append(dict(zip(columns, line, strict=True)))
        else:
            detail = f"{len(line)} fields for {len(columns)} columns; quote fields that hold a comma"
            records.append(_BadRow("malformed row", detail))
    return columns, records


def _jsonl_records(path: Path, text: str) -> tuple[list[str], list[Any]]:
    """(all names that occur, one dict a line, or a _BadRow for a line that is no JSON object)."""
    columns: dict[str, None] = {}
    records: list[Any] = []
    for line in filter(str.strip, text.split("\n")):
        try:
            record = json.loads(line)
            if not isinstance(record, dict):
                raise ValueError(f"a JSON object is needed, not {type(record).__name__}")
        except (ValueError, RecursionError) as error:
            record = _BadRow("malformed row", f"not a JSON object: {error}")
        else:
            columns |= dict.fromkeys(map(_printable, record))
        records.append(record)
    return list(columns), records


def _parse_row(number: int, record: dict[str, Any] | _BadRow, folder: Path, num_losers: int) -> Row:
    if isinstance(record, _BadRow):
        raise record
    texts = {name: _text(record, name) for name in ("clip", "prompt", "key", "action")}
    if not texts["prompt"]:
        raise _BadRow("empty prompt", "every clip needs a prompt that describes it")
    if not texts["clip"]:
        raise _BadRow("missing", "the row names no clip")
    start = _number(record, "start")
    start = 0.0 if start is None else start
    if start < 0:
        raise _BadRow("bad number", f"start={start} lies before the clip; use seconds, 0 or more")
    identity = json.dumps([texts["clip"], texts["prompt"], start], ensure_ascii=False)
    return Row(
        number=number,
        key=safe_key(texts["key"]) if texts["key"] else hashlib.sha256(identity.encode("utf-8")).hexdigest()[:16],
        clip=texts["clip"],
        path=folder / texts["clip"],
        prompt=texts["prompt"],
        start=start,
        action=texts["action"],
        physics_richness=_number(record, "physics_richness"),
        scores=tuple(_scores(record, num_losers)),
    )


def _text(record: dict[str, Any], name: str) -> str:
    value = record.get(name)
    if value is None:
        return ""
    if isinstance(value, (dict, list)):
        raise _BadRow("malformed row", f"{name} must be text, not {value!r}")
    try:
        str(value).encode("utf-8")
    except UnicodeEncodeError:
        raise _BadRow("not UTF-8", f"{name} reads {_printable(value)!r}; save the manifest as UTF-8") from None
    return str(value).strip()


def _number(record: dict[str, Any], name: str) -> float | None:
    """A finite number, or None where the column is absent or empty."""
    value = record.get(name)
    if value is None or isinstance(value, str) and not value.strip():
        return None
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        raise _BadRow("bad number", f"{name}={_printable(value)!r} is not a number") from None
    if not math.isfinite(number):
        raise _BadRow("bad score" if name in SCORES else "bad number", f"{name}={number} is not a finite number")
    return number


def _scores(record: dict[str, Any], num_losers: int) -> Iterator[tuple[float, float]]:
    pairs = record.get("scores")
    if pairs is None or isinstance(pairs, str) and not pairs.strip():
        single = [_number(record, name) for name in SCORES]
        pairs = [] if single == [None, None] else [single]
    elif not isinstance(pairs, list) or len(pairs) != num_losers:
        found = f"{len(pairs)} entries" if isinstance(pairs, list) else repr(pairs)
        raise _BadRow("bad score", f"scores must be {num_losers} pairs [semantic, physical], not {found}")
    for pair in pairs:
        try:
            yield check_scores(*pair)
        except (TypeError, ValueError):
            raise _BadRow("bad score", f"{pair!r} is no pair of scores, semantic and physical, in [0, 1]") from None


def check_scores(semantic: Any, physical: Any) -> tuple[float, float]:
    """Both as floats; ValueError or TypeError unless they are numbers in [0, 1]."""
    values = float(semantic), float(physical)
    if not all(0 <= value <= 1 for value in values):  # false for NaN too
        raise ValueError(f"semantic={semantic}, physical={physical}: scores lie in [0, 1]")
    return values


def _printable(value: Any) -> str:
    return "" if value is None else str(value).encode("utf-8", errors="backslashreplace").decode("utf-8")
