"""The generate stage: the model's own clips for each prompt, the losers of a preference group (own_clips.py).

Rows whose clip cannot be used are dropped here, before anything is generated for them, as far as its container tells.
"""

from concurrent.futures import ThreadPoolExecutor

import pyarrow as pa

from data_pipeline.config import Setup
from data_pipeline.contract import Stage
from data_pipeline.frames import clip_identity
from data_pipeline.own_clips import ClipMaker
from data_pipeline.tables import Advance, Made, Marker, Table, Unit, add_columns, drop, read_rows
from train.files import digest

OPEN_FILES = 16  # clips looked at together: over a network each takes milliseconds


class Generate(Stage):
    name = "generate"

    def __init__(self, setup: Setup):
        super().__init__(setup)
        self.maker = ClipMaker(setup, setup.losers, setup.pipeline.num_losers)

    def plan(self, before: Table) -> list[Unit]:
        units = []
        with ThreadPoolExecutor(OPEN_FILES) as pool:
            for first in range(0, len(before), self.setup.pipeline.unit_size):
                records = before.rows(first, self.setup.pipeline.unit_size).to_pylist()
                identities = list(pool.map(clip_identity, records))
                depends_on = digest([records, identities, self.maker.settings])
                units.append(Unit(len(units), depends_on, first, len(records)))
        return units

    def build(self, unit: Unit, rows: pa.Table, advance: Advance) -> Made:
        """Generate what is missing; rows whose clip cannot be read are dropped."""
        records = rows.to_pylist()
        identities = list(map(clip_identity, records))
        bad = self.maker.make(records, identities, advance)
        columns = {"seeds": list(map(self.maker.seeds, records)), "identity": identities}
        return drop(add_columns(rows, self.name, columns), bad)

    def is_intact(self, unit: Unit, marker: Marker) -> bool:
        lost = self.maker.store.lost()
        records = read_rows(self.folder, unit.number).to_pylist() if lost else []
        return lost.isdisjoint(map(self.maker.digest, records))

    def conclude(self, table: Table) -> None:
        records = (record for number in range(len(table.markers)) for record in table.unit(number).to_pylist())
        if unused := self.maker.store.unused(set(map(self.maker.digest, records))):
            folder = self.maker.store.folder
            print(f"{unused / 1e9:.3f} GB of {folder} are of earlier settings: delete them when you like")
