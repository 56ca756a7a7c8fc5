"""Early pruning (ours): look at the predicted clean latents part-way through sampling and finish the promising ones.

After step k of a sampler the line of the last velocity points at clean latents (`train.sampling.Stepper.clean`), for no
further pass. A scorer ranks these predictions, the best `keep` go on, the others stop.

    partial = advance(stepper, begin(stepper, noise), stop=4)
    chosen = promising(scorer(candidates of partial.clean), keep=4)
    latents = advance(a stepper of the chosen, partial.select(chosen), stop=sampler.steps).latents

A clip that is finished is the clip that `train.sampling.sample_clips` makes from its seed.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from train.backbones.base import Backbone
from train.sampling import SamplerConfig, Stepper, sigma_grid


@dataclass(frozen=True)
class Partial:
    """Clips after the first `step` steps: latents (N, C, F, H, W) then, and the clean ones that they point at."""

    step: int
    latents: Tensor
    clean: Tensor

    def select(self, chosen: Sequence[int]) -> "Partial":
        return Partial(self.step, self.latents[list(chosen)], self.clean[list(chosen)])


def begin(stepper: Stepper, noise: Tensor) -> Partial:
    """The clips of that noise (N, C, F, H, W) before the first step."""
    start = stepper.start(noise)
    return Partial(0, start, start)


@torch.no_grad()
def advance(stepper: Stepper, partial: Partial, stop: int) -> Partial:
    """From wherever the clips are to the end of step `stop`."""
    latents, clean = partial.latents, partial.clean
    for step in range(partial.step, stop):
        velocity = stepper.velocity(latents, step)
        clean = stepper.clean(latents, velocity, step)
        latents = stepper.after(latents, velocity, step)
    return Partial(stop, latents, clean)


def promising(values: Tensor, keep: int) -> list[int]:
    """Numbers of the `keep` lowest values (N,), ascending."""
    return sorted(values.argsort(stable=True)[:keep].tolist())


def sampling_passes(backbone: Backbone, sampler: SamplerConfig, first: int = 0, stop: int | None = None) -> int:
    """Network passes of one clip's steps `first` to `stop` (None: to the end): two where guidance is not 1."""
    sigmas = sigma_grid(sampler.steps, sampler.shift)[first : sampler.steps if stop is None else stop]
    scales = [backbone.guidance_at(t, sampler.guidance, sampler.guidance_low) for t in sigmas]
    return sum(1 if scale == 1 else 2 for scale in scales)
