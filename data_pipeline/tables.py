"""Tables between the stages: Parquet files with a marker each, that appear whole or not at all.

A stage's table is a folder

    unit-00000.parquet           the rows that the stage keeps, with all columns of the stages before and its own
    unit-00000.dropped.parquet   the rows that it drops, with the reason; absent where there is none
    unit-00000.json              the marker, written last: counts, and the digest of everything the unit depends on
    summary.json                 written when all units are done: rows in, kept, dropped by reason, seconds

pandas, Polars and DuckDB read it. A unit without a valid marker does not exist. Equal rows give equal bytes, so a unit
that is built again with the same result changes nothing downstream: what follows depends on the content alone.
"""

import csv
import io
import json
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NotRequired

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from typing_extensions import TypedDict  # pydantic needs it before Python 3.12

from train.files import digest, read_json, sha256, write_bytes, write_text

SUMMARY = "summary.json"
TABLE_ROWS = 10_000  # rows per unit of the stages before generate; unfinished units are what an interruption costs


@dataclass(frozen=True)
class Row:
    """A clip with its prompt: what the pool's table holds of it."""

    key: str  # letters, digits, _ and -; unique in the pool
    clip: str  # as the source names it
    path: str  # of the file that holds it
    prompt: str
    start: float  # seconds into the clip
    action: str
    physics_richness: float | None
    scores: list[list[float]] | None  # [semantic, physical]: one per loser, or one for all
    source: str  # manifest | folder | webdataset | sandbox | robots
    place: str  # JSON: where in the source


@dataclass(frozen=True)
class Dropped:
    """A row that a stage does not keep."""

    key: str  # empty where the row did not get that far
    clip: str
    place: str  # JSON
    reason: str  # one of a few fixed words, for counting
    detail: str


TYPES = {
    str: pa.string(),
    float: pa.float64(),
    float | None: pa.float64(),
    list[list[float]] | None: pa.list_(pa.list_(pa.float64())),
}
POOL, DROPPED = (pa.schema([(field.name, TYPES[field.type]) for field in fields(kind)]) for kind in (Row, Dropped))
ADDED = {  # columns that each stage adds; filter replaces physics_richness too, cluster replaces action
    "filter": [
        ("parse", pa.string()),
        ("reason", pa.string()),
        ("physics_label", pa.bool_()),
        ("extended", pa.string()),
    ],
    "cluster": [("category", pa.string()), ("action_score", pa.float64())],
    "difficulty": [("trial", pa.float64())],  # score of the model's own clip, where it was tried on this row
    "resample": [("difficulty", pa.float64())],
    "generate": [("seeds", pa.list_(pa.int64())), ("identity", pa.string())],  # of the losers; of the clip's file
    "judge": [("semantic", pa.list_(pa.float64())), ("physical", pa.list_(pa.float64()))],  # one per loser
    "targets": [],
    "encode": [],
}


class Marker(TypedDict):
    """What unit-00000.json says."""

    digest: str  # of everything that the unit depends on
    content: str  # SHA-256 of the table
    dropped_content: str  # and of the dropped rows' table; empty where there is none
    rows: int
    dropped: dict[str, int]  # by reason
    seconds: float
    shard: NotRequired[str]  # SHA-256 of the shard, of the encode stage


Summary = TypedDict(
    "Summary",
    {"in": int, "kept": int, "dropped": dict[str, int], "seconds": float, "units": int, "digest": str},
)


@dataclass(frozen=True)
class Unit:
    """A piece of a stage's work: `count` rows of the table before, from row `first` on."""

    number: int
    digest: str  # of everything that the result depends on
    first: int
    count: int
    places: tuple[int, ...] = ()  # rows of the unit that the stage works on, where those are not all


TableRow = Mapping[str, Any]  # a row of a table, by column
Bad = dict[int, tuple[str, str]]  # by place: the reason and the detail of a row that cannot be used
Made = tuple[pa.Table, pa.Table]  # the rows kept and the rows dropped
Advance = Callable[[int], None]  # tells the progress bar that so many more rows are done


class Table:
    """The rows of a finished stage, in order. Raises ValueError where a unit is missing."""

    def __init__(self, folder: Path, num_units: int):
        self.folder = folder
        self.markers = [read_marker(folder, number) for number in range(num_units)]
        for number, marker in enumerate(self.markers):
            if marker is None:
                raise ValueError(f"{folder / unit_name(number)}.parquet is missing or damaged: run this stage again")
        self.firsts = [0]  # row that each unit begins with, and the number of all rows
        for marker in self.markers:
            self.firsts.append(self.firsts[-1] + marker["rows"])
        self._last: tuple[int, pa.Table] | None = None

    def __len__(self) -> int:
        return self.firsts[-1]

    def unit(self, number: int, columns: Sequence[str] | None = None) -> pa.Table:
        return read_rows(self.folder, number, columns)

    def rows(self, first: int, count: int) -> pa.Table:
        """Rows first ... first + count - 1, whichever units they are in."""
        parts, start = [], bisect_right(self.firsts, first, hi=len(self.markers)) - 1
        for number in range(start, max(start + 1, bisect_left(self.firsts, first + count, hi=len(self.markers)))):
            if self._last is None or self._last[0] != number:  # most often the next rows are asked for next
                self._last = number, self.unit(number)
            parts.append(self._last[1])
        return pa.concat_tables(parts).slice(first - self.firsts[start], count)

    def columns(self, names: Sequence[str]) -> pa.Table:
        """Some columns of all rows."""
        return pa.concat_tables([self.unit(number, names) for number in range(len(self.markers))])

    def units(self, depends_on: Callable[[int], Any]) -> list[Unit]:
        """A unit of the next stage for each one here; its digest covers the rows and `depends_on(number)`."""
        return [
            Unit(number, digest([marker["content"], depends_on(number)]), self.firsts[number], marker["rows"])
            for number, marker in enumerate(self.markers)
        ]


def unit_name(number: int) -> str:
    return f"unit-{number:05d}"


def unit_files(folder: Path, number: int) -> tuple[Path, Path, Path]:
    """The paths of a unit's rows, of its dropped rows, and of its marker."""
    return tuple(folder / f"{unit_name(number)}{end}" for end in (".parquet", ".dropped.parquet", ".json"))


# ---- rows ------------------------------------------------------------------------------------------------------------


def add_columns(rows: pa.Table, stage: str, values: Mapping[str, Any] | None = None) -> pa.Table:
    """`rows` with the columns of `stage`, null where `values` has none; values of earlier columns replace them."""
    values = dict(values or {})
    types = dict(ADDED[stage]) | {name: rows.schema.field(name).type for name in values if name in rows.schema.names}
    for name, kind in types.items():
        given = values.pop(name, None)
        column = pa.nulls(len(rows), kind) if given is None else pa.array(given, kind)
        if name in rows.schema.names:
            rows = rows.set_column(rows.schema.get_field_index(name), name, column)
        else:
            rows = rows.append_column(name, column)
    assert not values, values
    return rows


def dropped_table(rows: Sequence[Dropped] = ()) -> pa.Table:
    return pa.Table.from_pylist(list(map(vars, rows)), DROPPED)


def drop(rows: pa.Table, reasons: Mapping[int, tuple[str, str]]) -> Made:
    """Split off the rows at the given places, each with a reason and a detail."""
    columns = {"key": rows["key"], "clip": rows["clip"], "place": rows["place"]}
    for part, name in enumerate(("reason", "detail")):
        columns[name] = pa.array([reasons.get(place, ("", ""))[part] for place in range(len(rows))], pa.string())
    keep = pa.array([place not in reasons for place in range(len(rows))], pa.bool_())
    return rows.filter(keep), pa.table(columns, DROPPED).filter(pc.invert(keep))


# ---- files -----------------------------------------------------------------------------------------------------------


def write_unit(
    folder: Path, number: int, depends_on: str, made: Made, seconds: float, notes: Mapping[str, Any] | None = None
) -> None:
    """Write a unit's rows, then its marker. depends_on: the unit's digest. notes: more for the marker."""
    kept, dropped = made
    rows, drops, marker = unit_files(folder, number)
    marker.unlink(missing_ok=True)  # first, so that it never describes another table
    if not len(dropped):
        drops.unlink(missing_ok=True)
    record: Marker = {
        "digest": depends_on,
        "content": _write_parquet(rows, kept),
        "dropped_content": _write_parquet(drops, dropped) if len(dropped) else "",
        "rows": len(kept),
        "dropped": dict(sorted(Counter(dropped["reason"].to_pylist()).items())),
        "seconds": round(seconds, 3),
        **(notes or {}),
    }
    write_text(marker, json.dumps(record))


def _write_parquet(path: Path, rows: pa.Table) -> str:
    """Returns the file's digest."""
    sink = pa.BufferOutputStream()
    pq.write_table(rows.combine_chunks(), sink, compression="zstd")
    data = sink.getvalue()
    write_bytes(path, data)
    return sha256(data)


def write_csv(path: Path, rows: Iterable[Sequence[Any]]) -> None:
    """For people and other programs: the rows, the first of them the columns' names, atomically."""
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator="\n").writerows(rows)
    write_text(path, text.getvalue())


def read_marker(folder: Path, number: int) -> Marker | None:
    """The marker of a unit, None where it or a table that it describes is missing or damaged."""
    rows, drops, marker = unit_files(folder, number)
    try:
        record = read_json(marker, Marker, remedy="build again")
        whole = sha256(rows) == record["content"] and pq.read_metadata(rows).num_rows == record["rows"]
        whole &= (sha256(drops) if drops.exists() else "") == record["dropped_content"]
        return record if whole else None
    except (OSError, ValueError, pa.ArrowException):
        return None


def remove_units(folder: Path, beyond: int) -> None:
    """Delete the units of earlier runs with the numbers from `beyond` on."""
    for path in folder.glob("unit-*.json"):
        number = path.stem.removeprefix("unit-")
        if number.isdecimal() and int(number) >= beyond:
            for file in unit_files(folder, int(number)):
                file.unlink(missing_ok=True)


def read_rows(folder: Path, number: int, columns: Sequence[str] | None = None) -> pa.Table:
    """The rows of one unit, or some of their columns."""
    return pq.read_table(unit_files(folder, number)[0], columns=columns and list(columns))


def read_dropped(folder: Path, number: int) -> pa.Table:
    path = unit_files(folder, number)[1]
    return pq.read_table(path) if path.exists() else dropped_table()


def write_summary(table: Table, depends_on: str) -> Summary:
    """Write a finished stage's summary.json and return it. depends_on: the digest of all its units."""
    reasons: Counter[str] = Counter()
    for marker in table.markers:
        reasons.update(marker["dropped"])
    summary: Summary = {
        "in": len(table) + reasons.total(),
        "kept": len(table),
        "dropped": dict(reasons.most_common()),
        "seconds": round(sum(marker["seconds"] for marker in table.markers), 1),
        "units": len(table.markers),
        "digest": depends_on,
    }
    write_text(table.folder / SUMMARY, json.dumps(summary, indent=2) + "\n")
    return summary


def read_summary(folder: Path) -> Summary | None:
    """The summary of a stage, None where it is missing or damaged."""
    try:
        return read_json(folder / SUMMARY, Summary, remedy="build again")
    except ValueError:
        return None
