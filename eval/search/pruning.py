"""Early pruning (ours): look at the predicted clean latents part-way through sampling and finish the promising ones.

After step k of a sampler the line of the last velocity points at clean latents (`train.sampling.Stepper.clean`), for no
further pass. A scorer ranks these predictions, the best `keep` go on, the others stop.

    partial = advance(backbone, conditioning, begin(backbone, video, seeds), sampler, stop=4)
    chosen = promising(scorer(candidates of partial.clean), keep=4)
    latents = advance(backbone, conditioning, partial.select(chosen), sampler, stop=sampler.steps).latents

A clip that is finished is the clip that `train.sampling.sample_clips` makes from its seed.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from train.backbones.base import Backbone, Conditioning
from train.clips import VideoConfig
from train.sampling import SamplerConfig, Stepper, initial_noise, sigma_grid


@dataclass(frozen=True)
class Partial:
    """Clips after the first `step` steps: latents (N, C, F, H, W) then, and the clean ones that they point at."""

    step: int
    latents: Tensor
    clean: Tensor

    def select(self, chosen: Sequence[int]) -> "Partial":
        return Partial(self.step, self.latents[list(chosen)], self.clean[list(chosen)])


def begin(backbone: Backbone, video: VideoConfig, seeds: Sequence[int]) -> Partial:
    """One clip per seed before the first step: its noise."""
    noise = initial_noise(backbone, video, seeds)
    return Partial(0, noise, noise)


@torch.no_grad()
def advance(
    backbone: Backbone,
    conditioning: Conditioning,
    partial: Partial,
    sampler: SamplerConfig,
    *,
    stop: int,
    negative: Conditioning | None = None,
) -> Partial:
    """From wherever the clips are to the end of step `stop`. conditioning: of one clip, or one for each."""
    stepper = Stepper(backbone, conditioning.expand(len(partial.latents)), sampler, negative)
    latents, clean = stepper.start(partial.latents) if partial.step == 0 else partial.latents, partial.clean
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
