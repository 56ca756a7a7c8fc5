"""The filter stage: which rows of a table are kept. What it asks of prompts and frames is in cot_filter.py."""

import json
from collections.abc import Mapping
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import pyarrow as pa

from data_pipeline.cot_filter import CotFilter, FilterConfig, Item, Refused
from data_pipeline.manifests import Row
from data_pipeline.sources import FrameReader, row_of
from data_pipeline.tables import Advance, Made, Stage, Table, Unit, add_columns, drop
from eval.vlm import jpeg_frames

NO_PHYSICS = "no physics"  # reason of the rows that the filter does not choose


class Filter(Stage):
    """Keeps the physics-rich rows. settings: plain values that an answer depends on."""

    name = "filter"

    def __init__(self, folder: Path, config: FilterConfig, settings: Mapping[str, Any], reader: FrameReader):
        super().__init__(folder)
        self.config, self.settings, self.reader = config, settings, reader

    @cached_property
    def filter(self) -> CotFilter:
        return CotFilter(self.config)

    def plan(self, before: Table) -> list[Unit]:
        return before.units(lambda number: self.settings)

    def build(self, unit: Unit, rows: pa.Table, advance: Advance) -> Made:
        found = [row_of(record) for record in rows.to_pylist()]
        items = [Item(row.key, row.prompt, partial(self._frames, row)) for row in found]
        answers = self.filter.run(items, advance)
        bad = {}
        for place, answer in enumerate(answers):
            if isinstance(answer, Refused):
                bad[place] = (answer.reason, answer.detail)
            elif not answer.physics_label:
                bad[place] = (NO_PHYSICS, f"physics_richness={answer.physics_richness:g}")
        columns = {
            name: [None if isinstance(answer, Refused) else getattr(answer, name) for answer in answers]
            for name in ("reason", "physics_richness", "physics_label", "extended")
        }
        columns["parse"] = [
            None if isinstance(answer, Refused) else json.dumps(answer.parse, ensure_ascii=False) for answer in answers
        ]
        return drop(add_columns(rows, self.name, columns), bad)

    def _frames(self, row: Row) -> list[bytes]:
        return jpeg_frames(self.reader.read(row), self.config.vlm.frames, self.config.vlm.frame_height)

    def is_worth_a_retry(self, marker: Mapping[str, Any]) -> bool:
        return "server" in marker["dropped"]
