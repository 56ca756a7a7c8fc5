"""The targets stage: tracks and other references of the winners, for the physics losses of training (targets.py).

They are kept by the digest of what they depend on, like losers: new scores make no clip tracked again.
"""

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor

from data_pipeline.sources import FrameReader, record_digest, row_of
from data_pipeline.store import Store
from data_pipeline.tables import Advance, Made, Marker, Stage, Table, Unit, add_columns, drop, read_rows
from data_pipeline.targets import TargetMaker, TargetsConfig
from train.clips import ClipError, VideoConfig


class Targets(Stage):
    """See the module. settings: plain values that the targets depend on."""

    name = "targets"

    def __init__(
        self,
        folder: Path,
        config: TargetsConfig,
        settings: Mapping[str, Any],
        video: VideoConfig,
        device: torch.device,
    ):
        super().__init__(folder)
        self.config, self.settings, self.video, self.device = config, settings, video, device
        self.store = Store(folder / "tensors")
        self.reader = FrameReader(video, device)

    @cached_property
    def maker(self) -> TargetMaker:
        return TargetMaker(self.config, self.video, self.device)

    def plan(self, before: Table) -> list[Unit]:
        return before.units(lambda number: self.settings)

    def build(self, unit: Unit, rows: pa.Table, advance: Advance) -> Made:
        """Make what is missing; clips that cannot be read any more are dropped."""
        bad: dict[int, tuple[str, str]] = {}
        for place, record in enumerate(rows.to_pylist()):
            digest = record_digest(self.settings, record)
            if self.store.missing([digest]):
                try:
                    self.store.save({digest: self._make(record)})
                except ClipError as error:
                    bad[place] = (error.reason, str(error))
            advance(1)
        return drop(add_columns(rows, self.name), bad)

    def is_intact(self, unit: Unit, marker: Marker) -> bool:
        lost = self.store.lost()
        records = read_rows(self.folder, unit.number).to_pylist() if lost else []
        return lost.isdisjoint(record_digest(self.settings, record) for record in records)

    @torch.no_grad()
    def _make(self, record: Mapping[str, Any]) -> dict[str, Tensor]:
        row = row_of(record)
        frames, simulated = self.reader.read(row), None
        if row.source == "sandbox":
            clips, index = self.reader.simulated(row)
            simulated = clips[index : index + 1]
        return self.maker.make(frames, simulated=simulated)

    def load(self, record: Mapping[str, Any]) -> dict[str, Tensor]:
        """The targets of a row of this stage's table."""
        return self.store.load(record_digest(self.settings, record))
