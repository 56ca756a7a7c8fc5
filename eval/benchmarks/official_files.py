"""Files of other projects: read with a clear word where they are not what they should be, and clips put under names."""

import csv
import json
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from eval.benchmarks.base import Sample
from train.files import atomic, temporary


def read_table(path: Path, columns: Sequence[str], remedy: str) -> list[dict[str, str]]:
    """Rows of a CSV with a header, in UTF-8. ValueError for a file that is not there, is no CSV or lacks a column."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, strict=True)
            header = list(reader.fieldnames or [])
            rows = list(reader)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path} cannot be read as a table ({error}): {remedy}") from error
    if missing := [name for name in columns if name not in header]:
        raise ValueError(f"{path} has no column {missing[0]!r}, found {', '.join(header) or 'nothing'}: {remedy}")
    for number, row in enumerate(rows, start=1):
        if None in row or None in row.values():
            raise ValueError(f"{path}, row {number}, has not {len(header)} fields as the header has: {remedy}")
    return rows


def read_records(path: Path, keys: Sequence[str], remedy: str) -> list[dict[str, Any]]:
    """Objects of a JSON list, or of a .jsonl, in UTF-8, each with `keys`. ValueError as for `read_table`."""
    try:
        text = path.read_text(encoding="utf-8-sig")
        if path.suffix == ".jsonl":
            records = [json.loads(line) for line in text.splitlines() if line.strip()]
        else:
            records = json.loads(text)
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read as JSON ({error}): {remedy}") from error
    if not isinstance(records, list) or not all(isinstance(record, dict) for record in records):
        raise ValueError(f"{path} is no list of objects: {remedy}")
    for number, record in enumerate(records, start=1):
        if missing := [key for key in keys if key not in record]:
            raise ValueError(f"{path}, record {number}, has no {missing[0]!r}: {remedy}")
    return records


def place_all(samples: Sequence[Sample], folder: Path, name: Callable[[Sample], str]) -> Path:
    """The clips that are there, below `folder` under the official code's name of each; returns `folder`."""
    for sample in samples:
        if sample.path.is_file():
            place(sample.path, folder / name(sample))
    return folder


def place(source: Path, target: Path) -> None:
    """The file `source` as `target` too: a hard link, or a copy where there can be none. Replaces what was there."""
    target.parent.mkdir(parents=True, exist_ok=True)
    aside = temporary(target)
    try:
        os.link(source, aside)
        os.replace(aside, target)
    except OSError:
        with atomic(target) as copy:
            shutil.copyfile(source, copy)
    finally:
        aside.unlink(missing_ok=True)  # replacing a link by another of the same file does nothing
