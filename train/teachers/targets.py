"""The physics targets of a winning clip, for PhysisForcing's losses: `Group.extra` of train/groups.py.

    maker = TargetMaker(config, video, device)
    extra = maker.make(frames)            frames (T,H,W,3) uint8, the pixels that become the winner's latent

What is stored, for N = grid^2 points that start in the centres of grid x grid cells of frame 0:

    tracks            (T,N,2) uint16   x and y in fixed point, `train.teachers.points.unpack` gives [0, 1]
    visible           (T,N)   bool
    disparity         (N,)    float16  nearness of the points in frame 0, in [0, 1]; with `depth` only
    keep              (N,)    bool     the physics-informative points, eqs. 1-3
    relation_tokens   (K,D)   bfloat16 the video encoder's tokens that kept points visit, at most max_tokens of them
    relation_indices  (K,)    int32    their places in the flattened grid
    relation_grid     (3,)    int32    its frames, rows, columns; these three with `relation` only

All T frames of the clip are stored. Training takes the frames that its latents have, 0 and every 4th, resamples the
student's features to relation_grid, and compares at relation_indices. K is 0 in a clip in which nothing is kept.

The shard builder's own maker (`data_pipeline/stages/targets.py`) knows the simulator as well.
"""

import math
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any, ClassVar

import torch
from torch import Tensor

from losses.regions import RULES, motion_magnitude, select_tracks
from train.clips import VideoConfig
from train.teachers import DEPTHS, ENCODERS, TRACKERS
from train.teachers.cotracker3 import CoTrackerConfig
from train.teachers.depth_anything import DepthAnythingConfig
from train.teachers.lucas_kanade import LucasKanadeConfig
from train.teachers.points import choose_tokens, look_up, pack, query_grid, token_mask, unpack
from train.teachers.vjepa2 import VJepa2Config


@dataclass
class TargetsConfig:
    tracks: str = ""  # lucas_kanade | cotracker, in a build also simulator; empty: no targets
    grid: int = 25  # points per side, on frame 0
    depth: str = ""  # depth_anything, in a build also simulator; empty: all points count as equally near
    relation: str = ""  # vjepa2; empty: no tokens of a video encoder
    rule: str = "mean"  # which points are kept: mean (section 3.1) | top_k (appendix A) | all (no region focus)
    top_k: int = 100  # points kept by rule top_k; the paper's number is not published
    max_tokens: int = 512  # tokens of the video encoder a clip, at most
    lucas_kanade: LucasKanadeConfig = field(default_factory=LucasKanadeConfig)
    cotracker: CoTrackerConfig = field(default_factory=CoTrackerConfig)
    depth_anything: DepthAnythingConfig = field(default_factory=DepthAnythingConfig)
    vjepa2: VJepa2Config = field(default_factory=VJepa2Config)


class TargetMaker:
    """See the module. Weights are loaded when the first clip comes.

    Raises ValueError, before any work, for settings that cannot work: an unknown name, a depth or relation without
    tracks, a package or checkpoint that is not there.
    """

    others: ClassVar[tuple[str, ...]] = ()  # what else a subclass takes for `tracks` and `depth`

    def __init__(self, config: TargetsConfig, video: VideoConfig, device: torch.device | str):
        self.config, self.video, self.device = config, video, device
        self._built: dict[str, Any] = {}
        for name in ("grid", "top_k", "max_tokens"):
            if getattr(config, name) < 1:
                raise ValueError(f"targets.{name}={getattr(config, name)}: use 1 or more")
        if config.rule not in RULES:
            raise ValueError(f"targets.rule={config.rule!r} is unknown: choose one of {', '.join(RULES)}")
        if not config.tracks and (config.depth or config.relation):
            used = f"depth={config.depth}" if config.depth else f"relation={config.relation}"
            names = " or ".join([*self.others, *TRACKERS])
            raise ValueError(f"targets.{used} needs tracks as well: set targets.tracks to {names}")
        self._check("tracks", TRACKERS)
        self._check("depth", DEPTHS)
        self._check("relation", ENCODERS)

    def _check(self, name: str, teachers: dict[str, ModuleType]) -> None:
        chosen = getattr(self.config, name)
        known = [*teachers] if name == "relation" else [*self.others, *teachers]
        if chosen not in ("", *known):
            raise ValueError(f"targets.{name}={chosen!r} is unknown: choose {' or '.join(known)}, or leave it empty")
        if chosen in teachers:
            try:
                teachers[chosen].check(getattr(self.config, chosen))
            except ValueError as error:
                raise ValueError(f"targets.{name}={chosen}: {error}") from error

    def _teacher(self, teachers: dict[str, ModuleType], name: str) -> Any:
        """The model of that name, built when the first clip needs it."""
        if name not in self._built:
            self._built[name] = teachers[name].build(getattr(self.config, name), self.device)
        return self._built[name]

    def make(self, frames: Tensor) -> dict[str, Tensor]:
        """The targets of one clip, on the CPU; empty without `tracks`."""
        config, video = self.config, self.video
        assert frames.shape == (video.num_frames, video.height, video.width, 3), frames.shape
        if not config.tracks:
            return {}
        queries = query_grid(config.grid)  # (N,2)
        tracks, visible = self._tracks(frames, queries)
        if not tracks.isfinite().all():
            raise ValueError(f"targets.tracks={config.tracks} gave positions that are not finite: check its weights")
        stored = pack(tracks)
        tracks = unpack(stored)  # so that what is kept follows from what is stored
        made = {"tracks": stored, "visible": visible}
        foreground = torch.ones(len(queries))
        if config.depth:
            made["disparity"] = look_up(self._nearness(frames), queries).half()
            foreground = made["disparity"].float()
        motion = motion_magnitude(tracks[None], aspect=video.width / video.height)  # (1,N)
        keep = made["keep"] = select_tracks(motion, foreground[None], rule=config.rule, top_k=config.top_k)[0]
        if config.relation:
            tokens = self._teacher(ENCODERS, config.relation)(frames)
            mask = token_mask(tracks, visible, keep, tokens.frames.cpu(), tokens.grid[1:])  # (F,H,W)
            chosen = choose_tokens(mask, config.max_tokens)
            made["relation_tokens"] = tokens.values[chosen.to(tokens.values.device)].to("cpu", torch.bfloat16)
            made["relation_indices"] = chosen.int()
            made["relation_grid"] = torch.tensor(tokens.grid, dtype=torch.int32)
        return made

    def _tracks(self, frames: Tensor, queries: Tensor) -> tuple[Tensor, Tensor]:
        """Tracks (T,N,2) and visibility (T,N) of the clip, on the CPU."""
        tracks, visible = self._teacher(TRACKERS, self.config.tracks)(frames, queries)
        return tracks.cpu(), visible.cpu()

    def _nearness(self, frames: Tensor) -> Tensor:
        """Disparity (H,W) of the first frame, on the CPU."""
        return self._teacher(DEPTHS, self.config.depth)(frames[0]).cpu()

    def describe(self) -> str:
        """A line for each tensor of a group, with its bytes, and their sum. Reads no weights, but an encoder's config.

        The numbers are the most there can be: K may be smaller. A config that cannot be read, such as a hub's without a
        network, is said and not counted.
        """
        if not self.config.tracks:
            return "targets: none"
        points, frames = self.config.grid**2, self.video.num_frames
        shapes: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
            "tracks": ((frames, points, 2), torch.uint16),
            "visible": ((frames, points), torch.bool),
        }
        if self.config.depth:
            shapes["disparity"] = (points,), torch.float16
        shapes["keep"] = (points,), torch.bool
        unread = []
        if self.config.relation:
            try:
                grid, width = ENCODERS[self.config.relation].shape(getattr(self.config, self.config.relation))
            except ValueError as error:
                unread = [f"relation tokens come on top: {error}"]
            else:
                tokens = min(self.config.max_tokens, math.prod(grid))
                shapes["relation_tokens"] = (tokens, width), torch.bfloat16
                shapes["relation_indices"] = (tokens,), torch.int32
                shapes["relation_grid"] = (3,), torch.int32
        lines, total = [], 0
        for name, (shape, dtype) in shapes.items():
            size = torch.empty(shape, dtype=dtype, device="meta").nbytes
            total += size
            lines.append(f"{name:<18}{str(shape):<16}{str(dtype).removeprefix('torch.'):<10}{size:>9} bytes")
        return "\n".join([*lines, *unread, f"targets: at most {total} bytes per group"])
