"""The baselines that a self-score must beat: the clip that moves most, and a random choice, without any network."""

import torch
from torch import Tensor

from eval.search.candidates import Candidates
from train.files import seed_of


def motion_energy(latents: Tensor) -> Tensor:
    """Mean absolute change of latents (N, C, F, H, W) from frame to frame: (N,) float32, 0 for one frame."""
    if latents.shape[2] == 1:
        return latents.new_zeros(len(latents))
    return latents.float().diff(dim=2).abs().flatten(1).mean(dim=1)


def most_motion(candidates: Candidates) -> Tensor:
    return -motion_energy(candidates.latents)


def random_choice(candidates: Candidates) -> Tensor:
    """Uniform values, from the prompt's key alone: the same in every run."""
    return torch.rand(len(candidates), generator=torch.Generator("cpu").manual_seed(seed_of(candidates.key)))
