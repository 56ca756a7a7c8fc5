"""The targets stage: tracks and other references of the winners, for the physics losses of training.

They are made by `train.teachers.targets`, and of simulated clips also from the truth behind the pixels. They are kept
by the digest of what they depend on, like losers: new scores make no clip tracked again.
"""

from functools import cached_property
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor

from data_pipeline.config import Setup
from data_pipeline.contract import Stage
from data_pipeline.frames import FrameReader
from data_pipeline.simulated_tracks import simulated_disparity, simulated_tracks
from data_pipeline.tables import Advance, Made, Table, TableRow, Unit, add_columns, drop
from eval.robots.demonstrations import Demonstration
from eval.sandbox.clips import Clips
from train.teachers import DEPTHS, TRACKERS, targets

SIMULATOR = "simulator"


class Targets(Stage):
    name = "targets"

    def __init__(self, setup: Setup):
        super().__init__(setup)
        self.store = setup.targets
        self.reader = FrameReader(setup.video, setup.device)

    def check(self) -> None:
        TargetMaker(self.setup.config.targets, self.setup.video, self.setup.device)

    @cached_property
    def maker(self) -> "TargetMaker":
        return TargetMaker(self.setup.config.targets, self.setup.video, self.setup.device)

    def plan(self, before: Table) -> list[Unit]:
        return before.units(lambda number: self.store.settings)

    def build(self, unit: Unit, rows: pa.Table, advance: Advance) -> Made:
        """Make what is missing; clips that cannot be read any more are dropped."""
        records = rows.to_pylist()
        bad = self.store.make_missing(records, self._read, self._make, together=1, advance=advance)
        return drop(add_columns(rows, self.name), bad)

    def _read(self, record: TableRow) -> tuple[Tensor, Clips | Demonstration | None]:
        """A clip's frames, and what its simulator knows of it."""
        if record["source"] == "robots":
            demonstration = self.reader.demonstration(record, drawn="truth")
            return torch.from_numpy(demonstration.frames), demonstration
        if record["source"] == "sandbox":
            clips, index = self.reader.simulated(record)
            return clips.frames[index], clips[index : index + 1]
        return self.reader.read(record), None

    @torch.no_grad()
    def _make(self, records: list[TableRow], read: list[tuple[Tensor, Any]]) -> list[dict[str, Tensor]]:
        return [self.maker.make(frames, simulated=simulated) for frames, simulated in read]


class TargetMaker(targets.TargetMaker):
    """`train.teachers.targets.TargetMaker`, for which `tracks` and `depth` may also be "simulator".

    maker = TargetMaker(config, video, device)
    extra = maker.make(frames)                                  frames (T,H,W,3) uint8
    extra = maker.make(frames, simulated=clips[i : i + 1])      of the sandbox: `simulator` for tracks and depth
    extra = maker.make(frames, simulated=demonstration)         of a robot, with its truth
    """

    others = (SIMULATOR,)
    _simulated: Clips | Demonstration | None = None

    def make(self, frames: Tensor, simulated: Clips | Demonstration | None = None) -> dict[str, Tensor]:
        """The targets of one clip, on the CPU; empty without `tracks`. simulated: the sandbox's clip, of length 1, or a
        robot's.

        Raises ValueError where the simulator is to give something of a clip that is not its own.
        """
        assert not isinstance(simulated, Clips) or len(simulated) == 1, len(simulated)
        asked = [name for name in ("tracks", "depth") if getattr(self.config, name) == SIMULATOR]
        if asked and simulated is None:
            others = " or ".join(TRACKERS if asked[0] == "tracks" else DEPTHS)
            raise ValueError(
                f"targets.{asked[0]}=simulator, but this clip is no simulated one: use {others}, or other clips"
            )
        self._simulated = simulated
        return super().make(frames)

    def _tracks(self, frames: Tensor, queries: Tensor) -> tuple[Tensor, Tensor]:
        if self.config.tracks == SIMULATOR:
            return simulated_tracks(self._simulated, queries)
        return super()._tracks(frames, queries)

    def _nearness(self, frames: Tensor) -> Tensor:
        return simulated_disparity(self._simulated) if self.config.depth == SIMULATOR else super()._nearness(frames)
