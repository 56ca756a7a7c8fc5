"""Manifests: a CSV, JSONL or Parquet file in, checked rows out, one at a time.

Columns: `clip` (path, absolute or relative to the manifest's folder) and `prompt`; optional `key`, `start` (seconds
into the clip), `action`, `physics_richness`, `semantic` and `physical` (one pair of judge scores in [0, 1] for all
losers of the row); in JSONL and Parquet also `scores` ([[semantic, physical], ...], one pair per loser). A path may
begin with ~. Texts must be text: NaN, true and numbers are refused; a key or an action may be a whole number.

A bad column stops everything before any work, with a ValueError. A bad row stops nothing: it comes out as a `Dropped`,
at its place, with its reason. Nothing here opens a clip.
"""

import itertools
import json
import math
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from data_pipeline.tables import Dropped, Row
from eval import records
from eval.records import BadRow, Record, not_local, printable, read_text
from recipes import redacted
from train.files import sha256

REQUIRED = ("clip", "prompt")
OPTIONAL = ("key", "start", "action", "physics_richness", "semantic", "physical", "scores")
SCORES = ("semantic", "physical")
TEXTS = ("clip", "prompt", "key", "action")
MAX_KEY = 64  # characters; a key becomes the name of a tar member
MAX_TEXT = 10_000  # characters of a prompt or name; Wan's text encoder reads 512 tokens
LOOK = 10_000  # JSON lines among which every required column must occur


def read_manifest(path: str | Path, *, num_losers: int) -> Iterator[Row | Dropped]:
    """The rows of a manifest, in the file's order; `num_losers` is the number of pairs that `scores` must have.

    Raises ValueError for another suffix than .csv, .jsonl or .parquet, a file of another form (see eval/records.py), a
    missing or doubled column, and a file without rows. Columns that are not read are named on the standard output.
    """
    path = Path(path)
    readers = {".csv": records.csv_records, ".jsonl": records.jsonl_records, ".parquet": _parquet_records}
    if path.suffix.lower() not in readers:
        formats = f"one of {', '.join(readers)}, a folder of clips, or .tar shards"
        raise ValueError(f"pipeline.manifest={path}: {records.unknown_format(path, formats)}")
    columns: dict[str, None] = {}  # grows while JSON lines are read
    found = readers[path.suffix.lower()](path, (*REQUIRED, *OPTIONAL), columns)
    first = list(itertools.islice(found, LOOK))
    if columns:
        records.require(path, REQUIRED, columns)
    if not first:
        raise ValueError(f"{path} has no rows; it needs the columns {', '.join(REQUIRED)} and a row for each clip")
    folder = path.absolute().parent
    for number, record in enumerate(itertools.chain(first, found), start=1):
        yield checked(record, folder, num_losers, "manifest", {"file": printable(path), "row": number})
    if unused := [name for name in columns if name not in (*REQUIRED, *OPTIONAL)]:
        print(f"warning: columns of {path} that are not read: {', '.join(unused)}")


def checked(record: Record, folder: Path, num_losers: int, source: str, place: dict[str, Any]) -> Row | Dropped:
    """The row that `record` describes, or why it is none. folder: that `clip` is relative to."""
    where = json.dumps(place, ensure_ascii=False)
    try:
        return _parse_row(record, folder, num_losers, source, where)
    except BadRow as bad:
        found = record if isinstance(record, dict) else {"clip": record.clip}
        key, clip = (redacted(printable(found.get(name))[:MAX_TEXT]) for name in ("key", "clip"))
        return Dropped(key, clip, where, bad.reason, redacted(bad.detail))


def safe_key(text: str) -> str:
    """`text` as a key of letters, digits, _ and -, at most 64 long; a changed one ends in a digest of the original."""
    safe = re.sub(r"[^A-Za-z0-9_-]+", "-", text)
    if safe == text and 0 < len(text) <= MAX_KEY:
        return text
    digest = sha256(text.encode("utf-8"))[:12]
    stem = safe[: MAX_KEY - 13].strip("-")
    return f"{stem}-{digest}" if stem else digest


def _parquet_records(path: Path, known: tuple[str, ...], columns: dict[str, None]) -> Iterator[Record]:
    try:
        with pq.ParquetFile(path) as file:
            names = {name: records.fold(name, known) for name in file.schema_arrow.names}
            records.add_columns(path, [records.fold(name, known) for name in file.schema_arrow.names], columns)
            read = [name for name, folded in names.items() if folded in known]
            for batch in file.iter_batches(batch_size=LOOK, columns=read):
                yield from batch.rename_columns([names[name] for name in batch.schema.names]).to_pylist()
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not a readable Parquet file: {error}") from error


# ---- one row ---------------------------------------------------------------------------------------------------------


def _parse_row(record: Record, folder: Path, num_losers: int, source: str, place: str) -> Row:
    if isinstance(record, BadRow):
        raise record
    texts = {name: read_text(record, name, number_too=name in ("key", "action")) for name in TEXTS}
    for name, text in texts.items():
        if len(text) > MAX_TEXT:
            raise BadRow("too long", f"{name} has {len(text)} characters; at most {MAX_TEXT} are taken")
    if not texts["prompt"]:
        raise BadRow("empty prompt", "every clip needs a prompt that describes it")
    if not texts["clip"]:
        raise BadRow("missing", "the row names no clip")
    path = texts["clip"]
    if source == "manifest":  # elsewhere it is the name of a file that was found
        if why := not_local(path):
            raise BadRow("not supported", f"{path[:200]} {why}")
        path = os.path.expanduser(path)
    start = _number(record, "start")
    start = 0.0 if start is None else start
    if start < 0:
        raise BadRow("bad number", f"start={start} lies before the clip; use seconds, 0 or more")
    identity = json.dumps([texts["clip"], texts["prompt"], start], ensure_ascii=False)
    return Row(
        key=safe_key(texts["key"]) if texts["key"] else sha256(identity.encode("utf-8"))[:16],
        clip=texts["clip"],
        path=str(folder / path),
        prompt=texts["prompt"],
        start=start,
        action=texts["action"],
        physics_richness=_number(record, "physics_richness"),
        scores=list(map(list, _scores(record, num_losers))) or None,
        source=source,
        place=place,
    )


def _number(record: dict[str, Any], name: str) -> float | None:
    """A finite number, or None where the column is absent or empty."""
    value = record.get(name)
    if value is None or isinstance(value, str) and not value.strip():
        return None
    try:
        number = _float(value)
    except (TypeError, ValueError, OverflowError):
        raise BadRow("bad number", f"{name}={printable(value)[:100]!r} is not a number") from None
    if not math.isfinite(number):
        raise BadRow("bad score" if name in SCORES else "bad number", f"{name}={number} is not a finite number")
    return number


def _scores(record: dict[str, Any], num_losers: int) -> Iterator[tuple[float, float]]:
    pairs = record.get("scores")
    if pairs is None or isinstance(pairs, str) and not pairs.strip():
        single = [_number(record, name) for name in SCORES]
        pairs = [] if single == [None, None] else [single]
    elif not isinstance(pairs, list) or len(pairs) != num_losers:
        found = f"{len(pairs)} entries" if isinstance(pairs, list) else printable(pairs)[:100]
        raise BadRow("bad score", f"scores must be {num_losers} pairs [semantic, physical], not {found}")
    for pair in pairs:
        try:
            if not isinstance(pair, list):
                raise TypeError
            yield check_scores(*pair)
        except (TypeError, ValueError, OverflowError):
            found = printable(pair)[:100]
            raise BadRow("bad score", f"{found} is no pair of scores, semantic and physical, in [0, 1]") from None


def check_scores(semantic: Any, physical: Any) -> tuple[float, float]:
    """Both as floats; ValueError or TypeError unless they are numbers in [0, 1]."""
    values = _float(semantic), _float(physical)
    if not all(0 <= value <= 1 for value in values):  # false for NaN too
        raise ValueError(f"semantic={semantic}, physical={physical}: scores lie in [0, 1]")
    return values


def _float(value: Any) -> float:
    """A number or what a table writes for one; true and false are none."""
    if isinstance(value, bool):
        raise TypeError(f"{value} is no number")
    return float(value)
