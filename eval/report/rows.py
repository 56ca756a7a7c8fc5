"""Rows of a benchmark on disk: one JSON line each, kept as they come, so that nothing that was scored is scored again.

A row belongs to an `identity`: the digest of the clip and of the settings that can change a score. Rows of other
clips or settings stay in the file and are not seen. A line that was cut by a kill or damaged is dropped, and what it
was about is scored again.
"""

import json
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NotRequired

from pydantic import FiniteFloat
from typing_extensions import TypedDict

import recipes
from eval.benchmarks.base import Row
from train.files import digest, parse_json, write_text

# Settings that say where something lies or how fast it goes: other values give the same scores.
PLACE_AND_SPEED = ("folder", "checkout", "python", "batch_size", "clips_a_call", "workers")
SYNC_EVERY = 1.0  # seconds; a killed process loses nothing, a machine that loses power this much


def scoring_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """`settings`, at any depth, without those that cannot change a score."""
    return recipes.without(settings, PLACE_AND_SPEED)


def identity(clip: Any, settings: Mapping[str, Any]) -> str:
    """Of the row of `clip`, its digest or whatever tells it from others, under a benchmark's settings."""
    return digest([clip, scoring_settings(settings)])


class Stored(TypedDict):
    """A line of the file."""

    key: str
    seed: int
    identity: str
    values: dict[str, FiniteFloat]  # by column
    error: str
    motion: FiniteFloat | None
    seconds: FiniteFloat  # that scoring took
    cluster: NotRequired[str]  # of rows without a clip


class RowFile:
    """A file of rows, open for appending; one process at a time."""

    def __init__(self, path: Path):
        self.path = path
        self._rows: dict[tuple[str, str, int], Stored] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        text = path.read_bytes() if path.exists() else b""
        whole = 0
        for line in text.splitlines():
            try:
                record = parse_json(line, Stored, name=str(path), remedy="the row is scored again")
            except ValueError:  # torn or damaged
                continue
            self._rows[record["identity"], record["key"], record["seed"]] = record
            whole += 1
        clean = whole == len(self._rows) == text.count(b"\n") and (not text or text.endswith(b"\n"))
        if not clean:
            self._compact()
        self._superseded = False
        self._file = path.open("a", encoding="utf-8", newline="")
        self._synced = time.monotonic()

    def _compact(self) -> None:
        """Write the file anew with one row of a clip: an error's goes when the clip is scored after all."""
        lines = (json.dumps(record, ensure_ascii=False) + "\n" for record in self._rows.values())
        write_text(self.path, "".join(lines))

    def find(self, name: str, key: str, seed: int) -> Stored | None:
        """The row with this identity, as it stands in the file."""
        return self._rows.get((name, key, seed))

    def every(self, name: str) -> list[Stored]:
        """All rows with this identity, in the order in which they came."""
        return [record for (own, _, _), record in self._rows.items() if own == name]

    def append(self, name: str, row: Row, facts: Mapping[str, Any]) -> None:
        """Keep a row with further facts. A value that is no finite number makes it an error's row."""
        error, values = row.error, {column: float(value) for column, value in row.values.items()}
        if wrong := [column for column, value in values.items() if not math.isfinite(value)]:
            error, values = f"{', '.join(wrong)} of {row.key}-{row.seed} is no finite number", {}
        record = {"key": row.key, "seed": row.seed, "identity": name, "values": values, "error": error, **facts}
        self._superseded |= (name, row.key, row.seed) in self._rows
        self._rows[name, row.key, row.seed] = record
        self._file.write(json.dumps(record, ensure_ascii=False) + "\n")
        self._file.flush()
        if time.monotonic() - self._synced > SYNC_EVERY:
            self._sync()

    def _sync(self) -> None:
        os.fsync(self._file.fileno())
        self._synced = time.monotonic()

    def __enter__(self) -> "RowFile":
        return self

    def __exit__(self, *error) -> None:
        self._sync()
        self._file.close()
        if self._superseded:
            self._compact()
