"""Clips from a backbone: one sampler setting for validation, preference losers and evaluation."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from train.backbones.base import NEGATIVE_PROMPT, Backbone, Conditioning
from train.clips import VideoConfig


@dataclass
class SamplerConfig:
    """The defaults are Wan2.1's own for text to video, at 480p too. Wan2.2's own are in its recipes."""

    steps: int = 50  # Euler steps
    guidance: float = 5.0  # classifier-free guidance scale; 1 leaves the negative pass out
    guidance_low: float | None = None  # of the low-noise expert of two-expert families; null: `guidance`
    shift: float = 5.0  # of the time grid, applied once
    negative_prompt: str = NEGATIVE_PROMPT  # what guidance steers away from; Wan's own, in Chinese


def sample_clips(
    backbone: Backbone,
    conditioning: Conditioning,
    seeds: Sequence[int],
    video: VideoConfig,
    sampler: SamplerConfig,
    *,
    negative: Conditioning | None = None,
    progress: bool = True,
) -> Tensor:
    """One clip a seed, generated together: latents (B, C, F, H, W) float32, B = len(seeds).

    conditioning: of B clips, or of one for all. negative: `sampler.negative_prompt` already encoded; without it the
    text encoder must be loaded. Each clip's noise comes from a CPU generator of its own, so it depends on its seed
    alone, not on the device or on the clips beside it.
    """
    generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
    return backbone.sample(
        conditioning.expand(len(seeds)),
        generators,
        height=video.height,
        width=video.width,
        num_frames=video.num_frames,
        steps=sampler.steps,
        guidance=sampler.guidance,
        guidance_low=sampler.guidance_low,
        shift=sampler.shift,
        negative=sampler.negative_prompt if negative is None else negative,
        progress=progress,
    )
