"""The generate stage: the model's own clips for each prompt, the losers of a preference group (own_clips.py).

Rows whose clip cannot be used are dropped here, before anything is generated for them, as far as its container tells.
"""

from concurrent.futures import ThreadPoolExecutor

import pyarrow as pa

from data_pipeline.config import Setup
from data_pipeline.contract import Stage
from data_pipeline.frames import clip_identity
from data_pipeline.own_clips import ClipMaker
from data_pipeline.tables import Advance, Made, Table, Unit, add_columns, drop
from train.files import digest

OPEN_FILES = 16  # clips looked at together: over a network each takes milliseconds


class Generate(Stage):
    name = "generate"

    def __init__(self, setup: Setup):
        super().__init__(setup)
        self.store = setup.losers
        losers = setup.pipeline.losers
        self.maker = ClipMaker(setup, self.store, losers.count, setup.loser_sampler, start_time=losers.start_time)

    def plan(self, before: Table) -> list[Unit]:
        units = []
        with ThreadPoolExecutor(OPEN_FILES) as pool:
            for first in range(0, len(before), self.setup.pipeline.unit_size):
                records = before.rows(first, self.setup.pipeline.unit_size).to_pylist()
                identities = list(pool.map(clip_identity, records))
                depends_on = digest([records, identities, self.store.settings])
                units.append(Unit(len(units), depends_on, first, len(records)))
        return units

    def build(self, unit: Unit, rows: pa.Table, advance: Advance) -> Made:
        """Generate what is missing; rows whose clip cannot be read are dropped."""
        records = [row | {"identity": clip_identity(row)} for row in rows.to_pylist()]
        bad = self.maker.make(records, advance)
        columns = {"seeds": list(map(self.maker.seeds, records)), "identity": [row["identity"] for row in records]}
        return drop(add_columns(rows, self.name, columns), bad)

    def conclude(self, table: Table) -> None:
        records = (record for number in range(len(table.markers)) for record in table.unit(number).to_pylist())
        if unused := self.store.unused(set(map(self.store.digest, records))):
            print(f"{unused / 1e9:.3f} GB of {self.store.folder} are of earlier settings: delete them when you like")
