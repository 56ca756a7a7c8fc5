"""Early pruning (ours): look at the predicted clean latents part-way through sampling and finish the promising ones.

After step k of a sampler the line of the last velocity points at clean latents (`train.sampling.Stepper.clean`), for no
further pass. A scorer ranks these predictions, the best `keep` go on, the others stop.

    partial = begin(backbone, conditioning, seeds, video, sampler, stop=4)
    chosen = promising(scorer(candidates of partial.clean), keep=4)
    latents = finish(backbone, conditioning, partial.select(chosen), sampler)

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


@torch.no_grad()
def begin(
    backbone: Backbone,
    conditioning: Conditioning,
    seeds: Sequence[int],
    video: VideoConfig,
    sampler: SamplerConfig,
    *,
    stop: int,
    negative: Conditioning | None = None,
) -> Partial:
    """The first `stop` steps of one clip per seed, sampled together. conditioning: of one clip, or one per seed."""
    if not 0 < stop <= sampler.steps:
        raise ValueError(f"stop={stop}: sampling has {sampler.steps} steps; stop after 1 to {sampler.steps} of them")
    conditioning = conditioning.expand(len(seeds))
    start = Stepper(backbone, conditioning, sampler, negative).start(initial_noise(backbone, video, seeds))
    return advance(backbone, conditioning, Partial(0, start, start), sampler, stop=stop, negative=negative)


@torch.no_grad()
def finish(
    backbone: Backbone,
    conditioning: Conditioning,
    partial: Partial,
    sampler: SamplerConfig,
    *,
    negative: Conditioning | None = None,
) -> Tensor:
    """The remaining steps: latents (N, C, F, H, W) float32."""
    return advance(backbone, conditioning, partial, sampler, stop=sampler.steps, negative=negative).latents


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
    """From wherever the clips are to the end of step `stop`."""
    stepper = Stepper(backbone, conditioning.expand(len(partial.latents)), sampler, negative)
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
