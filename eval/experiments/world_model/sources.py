"""Where a small V-JEPA 2 learns: the clips of a simulated world, and a network and windows of their size.

SOURCES = {"sandbox": ..., "robots": ...}, the option --world of `eval.experiments.world_model.training`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from eval.robots.demonstrations import list_demonstrations
from eval.robots.recordings import record
from eval.robots.tasks import TASKS
from eval.sandbox.splits import is_held_out, simulate_block
from eval.small_wan.training import Settings
from train.clips import VideoConfig

Device = torch.device | str
Kind = tuple[int, int]  # frames of the window, frames of its context; 0 hides blocks instead of the future


@dataclass(frozen=True)
class Source:
    video: VideoConfig
    architecture: dict[str, Any]  # of VJEPA2Config
    kinds: tuple[Kind, ...]  # what a step shows
    defaults: Settings
    symmetric: bool  # mirrored clips, and those in other colours, could be clips of this world
    # `settings.pool` clips (N, T, H, W, 3) uint8 on the device; the last argument: folder of recorded clips
    make_pool: Callable[[int, int, Device, Path], Tensor]


def architecture(side: int, frames: int) -> dict[str, Any]:
    """Of clips of `side` x `side` pixels, of which the encoder is made for `frames` frames."""
    return {
        "crop_size": side,
        "patch_size": 8,
        "frames_per_clip": frames,
        "tubelet_size": 2,
        "hidden_size": 96,
        "num_attention_heads": 4,
        "num_hidden_layers": 5,
        "pred_hidden_size": 96,
        "pred_num_attention_heads": 4,
        "pred_num_hidden_layers": 5,
        "pred_num_mask_tokens": 2,
        "initializer_range": 0.05,
    }


def sandbox_pool(count: int, seed: int, device: Device, folder: Path) -> Tensor:
    """The first `count` clips of the stream `train`, none with a held-out prompt. They are simulated, not recorded."""
    blocks: list[Tensor] = []
    while sum(map(len, blocks)) < count:
        clips = simulate_block("mixed", "train", seed, len(blocks), SANDBOX.video, device=device)
        blocks.append(clips.frames[[index for index, prompt in enumerate(clips.prompts) if not is_held_out(prompt)]])
    return torch.cat(blocks)[:count]


def robots_pool(count: int, seed: int, device: Device, folder: Path) -> Tensor:
    """The first `count` demonstrations of `anytime`, the base model's stream, but for those that cannot be made; read
    from the folder where they were recorded there, and else recorded."""
    listed = list_demonstrations(list(TASKS), "anytime", seed, range(count))
    recorded = record(folder, listed, ROBOTS.video)
    return torch.from_numpy(recorded.frames(range(len(recorded.listed)))).to(device)


SANDBOX = Source(
    VideoConfig(height=64, width=64, num_frames=17, fps=8.0),
    architecture(64, 16),
    ((16, 0), (12, 0), (16, 2), (16, 4), (16, 8), (12, 4), (12, 6), (8, 2), (8, 4), (8, 6)),
    Settings(steps=12_000, batch=64, pool=10_000, learning_rate=1.5e-3),
    True,
    sandbox_pool,
)
ROBOTS = Source(
    VideoConfig(height=96, width=96, num_frames=33, fps=20.0),
    architecture(96, 32),  # all of a clip, as its relations are read
    ((32, 0), (16, 0), (32, 4), (32, 8), (32, 16), (16, 2), (16, 4), (16, 8)),
    Settings(steps=5000, batch=32, pool=3000, learning_rate=1.5e-3),
    False,  # one camera, and the colours say what is what
    robots_pool,
)
SOURCES = {"sandbox": SANDBOX, "robots": ROBOTS}
