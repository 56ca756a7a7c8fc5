"""The sandbox's clips as endless, numbered streams that share no random numbers: `train`, `heldout` and `pool`.

A prompt is for training or for evaluation for good, whatever the seed: one in HELD_OUT_SHARE is held out, chosen by
its hash, and no other stream shows it. `pool` is footage as one finds it, what a generator is pre-trained on: every
other block of it breaks a law of physics, and the prompts do not say so. The other streams obey them.

Clips are simulated in blocks of BLOCK, each from a generator of its own, so that the n-th clip does not depend on how
many are asked for or in what order.
"""

import hashlib
import math
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from eval.sandbox.clips import SCENES, Clips, simulate
from eval.sandbox.world import VIOLATIONS
from train.clips import VideoConfig
from train.files import seed_of

SPLITS = ("train", "heldout", "pool")
BLOCK = 250  # clips
HELD_OUT_SHARE = 8  # one prompt in so many is held out
LEAST_SEVERITY = 0.3  # of a violation in the pool; the greatest is 1


@dataclass(frozen=True)
class Simulated:
    """One clip of a stream: where it is, and what it shows."""

    scene: str  # "mixed", or that of every clip
    split: str
    seed: int
    block: int
    index: int  # in the block
    shown: str  # the scene that this clip shows
    prompt: str


def is_held_out(prompt: str) -> bool:
    """Whether a prompt is for evaluation only; capitals and outer blanks do not count."""
    digest = hashlib.sha256(prompt.strip().lower().encode("utf-8")).digest()
    return int.from_bytes(digest[:8], "big") % HELD_OUT_SHARE == 0  # `seed_of` lacks the last bit


def smallest(video: VideoConfig) -> VideoConfig:
    """The smallest frames that show the same: what happens in a clip depends on the frame's aspect, not on its size."""
    shrink = math.gcd(video.height, video.width)
    return replace(video, height=video.height // shrink, width=video.width // shrink)


def list_clips(scene: str, split: str, seed: int, count: int, video: VideoConfig) -> list[Simulated]:
    """The first `count` clips of a stream, without their frames. Raises ValueError for an unknown split, and as
    `simulate` does."""
    if split not in SPLITS:
        raise ValueError(f"split {split!r} is unknown; choose one of {', '.join(SPLITS)}")
    found: list[Simulated] = []
    block = 0
    while len(found) < count:
        clips = simulate_block(scene, split, seed, block, smallest(video))
        for index, (shown, prompt) in enumerate(zip(clips.scenes, clips.prompts, strict=True)):
            if is_held_out(prompt) == (split == "heldout"):
                found.append(Simulated(scene, split, seed, block, index, shown, prompt))
        block += 1
    return found[:count]


def simulate_block(
    scene: str, split: str, seed: int, block: int, video: VideoConfig, *, device: torch.device | str = "cpu"
) -> Clips:
    """All BLOCK clips of a block, also those whose prompts the split does not show. In the pool the odd blocks have
    planted violations, one kind and severity per block."""
    generator = torch.Generator().manual_seed(seed_of("sandbox", scene, split, seed, block))
    options: dict[str, Any] = asdict(video)
    if split == "pool" and block % 2:
        known = [kind for kind in VIOLATIONS if scene == "mixed" or kind in SCENES[scene].violations]
        options["violation"] = known[block // 2 % len(known)]
        options["severity"] = LEAST_SEVERITY + (1 - LEAST_SEVERITY) * float(torch.rand((), generator=generator))
    return simulate(scene, BLOCK, generator, **options, device=device)
