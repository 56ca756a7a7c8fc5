"""The pool stage: all rows of all sources (sources.py), each key and each clip once."""

import json
import os
from collections.abc import Iterator, Sequence

import pyarrow as pa

from data_pipeline import tables
from data_pipeline.contract import WholeStage
from data_pipeline.manifests import Row
from data_pipeline.sources import Source
from data_pipeline.tables import POOL, Dropped, Made, Table, Unit, dropped_table
from train.files import digest


class Pool(WholeStage):
    """Sources are read from their beginning: by one process, and anew when one changed."""

    name = "pool"

    def plan(self, before: Table | None) -> list[Unit]:
        identities = [source.identity() for source in self.setup.sources()]
        return [Unit(0, digest([identities, self.setup.pipeline.num_losers, tables.TABLE_ROWS]), 0, 0)]

    def parts(self, before: Table | None) -> Iterator[Made]:
        return read_pool(self.setup.sources(), tables.TABLE_ROWS)


def read_pool(sources: Sequence[Source], table_rows: int) -> Iterator[Made]:
    """The rows of all sources in pieces of `table_rows`. A key that came before is dropped, and so is a clip that came
    before with the same prompt and start, however its path is spelt.

    Raises ValueError as `read_manifest` does.
    """
    place_of: dict[str, int] = {}  # by key, and by what tells a clip from another
    kept: list[Row] = []
    dropped: list[Dropped] = []
    position = 0
    for source in sources:
        first = position
        for row in source.rows():
            position += 1
            if isinstance(row, Row):
                names = [("duplicate clip", _same_clip(row)), ("duplicate key", row.key)]
                reason, name = next(((reason, name) for reason, name in names if name in place_of), ("", ""))
                if reason:
                    same = "same clip, prompt and start as" if name != row.key else f"key {row.key!r} is that of"
                    detail = f"{same} row {place_of[name]}"
                    if place_of[name] <= first:
                        detail += " (counted over all sources)"
                    row = Dropped(row.key, row.clip, row.place, reason, detail)
                else:
                    place_of |= {name: position for _, name in names}
            (kept if isinstance(row, Row) else dropped).append(row)
            if len(kept) + len(dropped) == table_rows:
                yield pa.Table.from_pylist(list(map(vars, kept)), POOL), dropped_table(dropped)
                kept, dropped = [], []
    if kept or dropped:
        yield pa.Table.from_pylist(list(map(vars, kept)), POOL), dropped_table(dropped)


def _same_clip(row: Row) -> str:
    """Equal for rows of one clip with one prompt and start, and like no key; nothing is opened."""
    offset = json.loads(row.place).get("offset")  # in a shard
    return "clip " + digest([os.path.normpath(row.path), offset, row.prompt, row.start])[:32]
