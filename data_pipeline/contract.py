"""What a stage is: a table in, a table out, unit by unit.

A stage is a class in data_pipeline/stages/ with a line in its `STAGES`. It is made from a `Setup`, plans its units from
the table before, and builds them one by one, on any process. Weights are loaded when it first needs them.
"""

from collections.abc import Iterator
from typing import Any, ClassVar, Protocol

import pyarrow as pa

from data_pipeline.config import Setup
from data_pipeline.store import Store
from data_pipeline.tables import Advance, Made, Marker, Table, Unit, add_columns, dropped_table, read_marker, read_rows


class Stage(Protocol):
    """A stage with `whole` looks at all rows at once: its plan is a single unit, and `parts` gives its table in pieces,
    instead of `build`."""

    name: ClassVar[str]  # of its folder below <output>/pipeline
    whole: ClassVar[bool] = False
    shown: ClassVar[bool] = True  # in progress bars and summaries

    store: Store | None = None  # of the tensors that belong to the rows of its table

    def __init__(self, setup: Setup):
        self.setup, self.folder = setup, setup.folder / self.name

    @classmethod
    def make(cls, setup: Setup) -> "Stage":
        """The stage as the configuration has it; a `PassThrough` where that leaves it out."""
        return cls(setup)

    def check(self) -> None:
        """ValueError for what would stop this stage, before any work."""

    def plan(self, before: Table) -> list[Unit]:
        """The units of this stage, done or not."""
        ...

    def build(self, unit: Unit, rows: pa.Table, advance: Advance) -> Made:
        """What becomes of a unit's rows."""
        ...

    def parts(self, before: Table) -> Iterator[Made]:
        """What becomes of all rows."""
        ...

    def notes(self, unit: Unit) -> dict[str, Any]:
        """More for the marker of the unit that was just built."""
        return {}

    def is_done(self, unit: Unit) -> bool:
        marker = read_marker(self.folder, unit.number)
        return marker is not None and marker["digest"] == unit.digest and self.is_intact(unit, marker)

    def is_intact(self, unit: Unit, marker: Marker) -> bool:
        """Whether what a finished unit has beside its table is there too."""
        lost = self.store.lost() if self.store else ()
        records = read_rows(self.folder, unit.number).to_pylist() if lost else []
        return all(self.store.digest(record) not in lost for record in records)

    def is_worth_a_retry(self, marker: Marker) -> bool:
        """Whether a finished unit dropped rows for a reason that may have passed."""
        return False

    def conclude(self, table: Table) -> None:
        """On one process, when all units are done."""


class PassThrough(Stage):
    """A stage that is not configured: its columns are null."""

    shown = False

    def __init__(self, setup: Setup, name: str):
        self.name = name
        super().__init__(setup)

    def plan(self, before: Table) -> list[Unit]:
        return before.units(lambda number: None)

    def build(self, unit: Unit, rows: pa.Table, advance: Advance) -> Made:
        return add_columns(rows, self.name), dropped_table()
