"""The baseline that a self-score must beat: prefer the clip that moves most, without any network."""

from torch import Tensor

from eval.search.candidates import Candidates


def motion_energy(latents: Tensor) -> Tensor:
    """Mean absolute change of latents (N, C, F, H, W) from frame to frame: (N,) float32, 0 for one frame."""
    if latents.shape[2] == 1:
        return latents.new_zeros(len(latents))
    return latents.float().diff(dim=2).abs().flatten(1).mean(dim=1)


def most_motion(candidates: Candidates) -> Tensor:
    return -motion_energy(candidates.latents)
