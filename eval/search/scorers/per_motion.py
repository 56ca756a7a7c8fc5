"""The residual for each unit of motion (ours): how much of what moves the generator can explain.

    S = mean residual / motion energy

Proprio's score is low for a clip in which nothing happens, because there is nothing to explain; the motion mask turns
that round only in part, for a slow clip stays easier than a fast one. Divided by the clip's motion energy (the mean
absolute change of its latents from frame to frame) the score no longer prefers either. Levels and draws count alike:
the score is a mean over network passes, so it can race (`eval.search.racing`).

A clip that stands still scores infinity: nothing in it could be right.
"""

import torch
from torch import Tensor

from eval.search.candidates import Candidates
from eval.search.scorers.baselines import motion_energy
from eval.search.scorers.proprio import Proprio


class PerMotion(Proprio):
    """A Proprio score, with uniform weighting, over the motion energy."""

    def __call__(self, candidates: Candidates) -> Tensor:
        return divided(super().__call__(candidates), candidates.latents)

    def round_values(self, candidates: Candidates, number: int, chosen: list[int]) -> Tensor:
        return divided(super().round_values(candidates, number, chosen), candidates.latents[chosen])


def divided(values: Tensor, latents: Tensor) -> Tensor:
    """values (N,) over the motion energy of latents (N, C, F, H, W); infinity where nothing moves."""
    energy = motion_energy(latents)
    return torch.where(energy > 0, values / energy.clamp(min=torch.finfo(torch.float32).tiny), torch.inf)
