"""The model's own clips for a prompt: the losers of a preference group."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from train.backbones.base import Backbone, Conditioning
from train.clips import VideoConfig, to_pixels, write_clip
from train.sampling import SamplerConfig, sample_clips


def loser_seed(seed: int, key: str, loser: int) -> int:
    """63-bit noise seed of a group's loser: a function of the recipe's seed and the group, not of order or ranks."""
    digest = hashlib.sha256(f"{seed}\0{key}\0{loser}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def generate_losers(
    backbone: Backbone,
    conditioning: Conditioning,
    negative: Conditioning,
    seeds: Sequence[Sequence[int]],
    video: VideoConfig,
    sampler: SamplerConfig,
    *,
    batch_size: int,
) -> Tensor:
    """Latents (B, M, C, F, H, W) bfloat16 on the CPU for B prompts with M seeds each, `batch_size` clips at a time."""
    clips = [(prompt, seed) for prompt, of_prompt in enumerate(seeds) for seed in of_prompt]
    latents = []
    for first in range(0, len(clips), batch_size):
        batch = clips[first : first + batch_size]
        prompts = Conditioning.cat([conditioning[prompt : prompt + 1] for prompt, _ in batch])
        made = sample_clips(
            backbone, prompts, [seed for _, seed in batch], video, sampler, negative=negative, progress=False
        )
        latents.append(made.cpu())
    return torch.cat(latents).to(torch.bfloat16).unflatten(0, (len(seeds), -1))


def loser_path(folder: str | Path, key: str, loser: int) -> Path:
    return Path(folder) / f"{key}-{loser}.mp4"


@torch.no_grad()
def save_losers(backbone: Backbone, losers: Tensor, paths: Sequence[Path], fps: float) -> None:
    """Decode losers (M, C, F, H, W) and write each as an mp4."""
    for latents, path in zip(losers, paths, strict=True):
        write_clip(path, to_pixels(backbone.decode_latents(latents[None].float()))[0], fps)
