"""The physics targets of a winning clip: those of `train/teachers/targets.py`, and of simulated clips also the truth
behind the pixels.

maker = TargetMaker(config, video, device)
extra = maker.make(frames)                                  frames (T,H,W,3) uint8
extra = maker.make(frames, simulated=clips[i : i + 1])      of the sandbox: `simulator` for tracks and depth
"""

from torch import Tensor

from data_pipeline.simulated_tracks import simulated_disparity, simulated_tracks
from eval.sandbox.clips import Clips
from train.teachers import DEPTHS, TRACKERS, targets
from train.teachers.targets import TargetsConfig

__all__ = ["TargetMaker", "TargetsConfig"]
SIMULATOR = "simulator"


class TargetMaker(targets.TargetMaker):
    """`train.teachers.targets.TargetMaker`, for which `tracks` and `depth` may also be "simulator"."""

    others = (SIMULATOR,)
    _simulated: Clips | None = None

    def make(self, frames: Tensor, simulated: Clips | None = None) -> dict[str, Tensor]:
        """The targets of one clip, on the CPU; empty without `tracks`. simulated: the sandbox's clip, of length 1.

        Raises ValueError where the simulator is to give something of a clip that is not its own.
        """
        assert simulated is None or len(simulated) == 1, len(simulated)
        asked = [name for name in ("tracks", "depth") if getattr(self.config, name) == SIMULATOR]
        if asked and simulated is None:
            others = " or ".join(TRACKERS if asked[0] == "tracks" else DEPTHS)
            raise ValueError(
                f"targets.{asked[0]}=simulator, but this clip is no simulated one: use {others}, or sandbox clips only"
            )
        self._simulated = simulated
        return super().make(frames)

    def _tracks(self, frames: Tensor, queries: Tensor) -> tuple[Tensor, Tensor]:
        if self.config.tracks == SIMULATOR:
            return simulated_tracks(self._simulated, queries)
        return super()._tracks(frames, queries)

    def _nearness(self, frames: Tensor) -> Tensor:
        return simulated_disparity(self._simulated) if self.config.depth == SIMULATOR else super()._nearness(frames)
