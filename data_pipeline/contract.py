"""What a stage is: a table in, a table out, unit by unit.

A stage is a class in data_pipeline/stages/ with a line in its `STAGES`. It is made from a `Setup`, plans its units from
the table before, and builds them one by one, on any process. Weights are loaded when it first needs them.
"""

import time
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, Protocol

import pyarrow as pa
from tqdm import tqdm

from data_pipeline import tables
from data_pipeline.config import Setup
from data_pipeline.store import Store
from data_pipeline.tables import Advance, Made, Marker, Table, Unit, read_marker, read_summary
from train.files import digest


class Stage(Protocol):
    name: ClassVar[str]  # of its folder below <output>/pipeline
    shown: ClassVar[bool] = True  # in progress bars and summaries
    store: Store | None = None  # of the tensors that belong to the rows of its table

    def __init__(self, setup: Setup):
        self.setup, self.folder = setup, setup.folder / self.name

    def check(self) -> None:
        """ValueError for what would stop this stage, before any work."""

    def plan(self, before: Table) -> list[Unit]:
        """The units of this stage, done or not."""
        ...

    def build(self, unit: Unit, rows: pa.Table, advance: Advance) -> Made:
        """What becomes of a unit's rows."""
        ...

    def work(self, unit: Unit, before: Table | None, bar: tqdm) -> None:
        """Build a unit and write it."""
        started, shown = time.monotonic(), bar.n
        made = self.build(unit, before.rows(unit.first, unit.count), bar.update)
        tables.write_unit(self.folder, unit.number, unit.digest, made, time.monotonic() - started, self.notes(unit))
        bar.update(unit.count - (bar.n - shown))

    def notes(self, unit: Unit) -> dict[str, Any]:
        """More for the marker of the unit that was just built."""
        return {}

    def is_done(self, unit: Unit) -> bool:
        marker = read_marker(self.folder, unit.number)
        return marker is not None and marker["digest"] == unit.digest and self.is_intact(unit, marker)

    def is_intact(self, unit: Unit, marker: Marker) -> bool:
        """Whether what a finished unit has beside its table is there too."""
        lost = self.store.lost() if self.store else ()
        records = tables.read_rows(self.folder, unit.number).to_pylist() if lost else []
        return all(self.store.digest(record) not in lost for record in records)

    def is_worth_a_retry(self, marker: Marker) -> bool:
        """Whether a finished unit dropped rows for a reason that may have passed."""
        return False

    def table(self, units: Sequence[Unit]) -> Table:
        """When all units are done."""
        return Table(self.folder, len(units))

    def digest_of(self, units: Sequence[Unit]) -> str:
        """Of everything that the table depends on."""
        return digest([unit.digest for unit in units])

    def conclude(self, table: Table) -> None:
        """On one process, when all units are done."""


class WholeStage(Stage):
    """A stage that looks at all rows at once: its plan is a single unit, and `parts` gives its table in pieces, instead
    of `build`."""

    def parts(self, before: Table | None) -> Iterator[Made]:
        """What becomes of all rows."""
        ...

    def work(self, unit: Unit, before: Table | None, bar: tqdm) -> None:
        (self.folder / tables.SUMMARY).unlink(missing_ok=True)  # first: it says how many units there are
        number, started = -1, time.monotonic()
        for number, made in enumerate(self.parts(before)):
            tables.write_unit(self.folder, number, unit.digest, made, time.monotonic() - started)
            bar.update(sum(map(len, made)))
            started = time.monotonic()
        tables.write_summary(Table(self.folder, number + 1), unit.digest)

    def table(self, units: Sequence[Unit]) -> Table:
        return Table(self.folder, read_summary(self.folder)["units"])

    def digest_of(self, units: Sequence[Unit]) -> str:
        return units[0].digest

    def is_done(self, unit: Unit) -> bool:
        """Whether all units of the table are there and of one plan."""
        summary, kept = read_summary(self.folder), 0
        if summary is None or summary["digest"] != unit.digest:
            return False
        for number in range(summary["units"]):
            marker = read_marker(self.folder, number)
            if marker is None or marker["digest"] != unit.digest:
                return False
            kept += marker["rows"]
        return kept == summary["kept"]


class PassThrough(Stage):
    """A stage that is not configured: its columns are null."""

    shown = False

    def __init__(self, setup: Setup, name: str):
        self.name = name
        super().__init__(setup)

    def plan(self, before: Table) -> list[Unit]:
        return before.units(lambda number: None)

    def build(self, unit: Unit, rows: pa.Table, advance: Advance) -> Made:
        return tables.add_columns(rows, self.name), tables.dropped_table()
