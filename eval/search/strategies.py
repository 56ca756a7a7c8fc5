"""Strategies beside the choice among N candidates: clips that are refined or guided, of several prompts at once.

Refinement   from noise that Proprio's score refines; see `eval.search.noise_refinement`
Guidance     from the same noise, steered by the world model's surprise; see `eval.search.guidance`
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from eval.search.candidates import Cost
from eval.search.config import GuideConfig, RefineConfig
from eval.search.guidance import sample_guided
from eval.search.noise_refinement import refine
from eval.search.scorers.surprise import SurpriseConfig
from eval.search.world_model import WorldModel
from train.backbones.base import Backbone, Conditioning
from train.clips import VideoConfig
from train.sampling import SamplerConfig, initial_noise, sample, sampling_passes


@dataclass(frozen=True)
class Refinement:
    config: RefineConfig
    backbone: Backbone
    video: VideoConfig
    sampler: SamplerConfig
    negative: Conditioning | None = None

    def clips(self, conditioning: Conditioning, seeds: Sequence[int]) -> tuple[Tensor, Tensor, Cost]:
        """One refined clip per seed: latents (B, C, F, H, W), Proprio's score before and after (B, 2), the cost."""
        few = replace(self.sampler, steps=self.config.steps)
        latents, traces, spent = [], [], Cost()
        for start in range(0, len(seeds), self.config.batch_size):
            part, started = slice(start, start + self.config.batch_size), time.perf_counter()
            noise = initial_noise(self.backbone, self.video, seeds[part])
            found = refine(self.backbone, conditioning[part], noise, few, self.config, negative=self.negative)
            latents.append(self.sampled(found.noise, conditioning[part], found.latents).cpu())
            traces.append(torch.stack([found.trace[0], found.score], dim=1).cpu())
            again = 0 if self.config.steps == self.sampler.steps else sampling_passes(self.backbone, self.sampler)
            passes, backward = (found.passes + again) * len(noise), found.backward * len(noise)
            spent += Cost(passes, time.perf_counter() - started, backward)
        return torch.cat(latents), torch.cat(traces), spent

    def sampled(self, noise: Tensor, conditioning: Conditioning, latents: Tensor) -> Tensor:
        """The clips of refined noise, all (B, C, F, H, W): those of the few steps, where these are the sampler's."""
        if self.config.steps == self.sampler.steps:
            return latents
        return sample(self.backbone, conditioning, noise, self.sampler, negative=self.negative, progress=False)


@dataclass(frozen=True)
class Guidance:
    config: GuideConfig
    surprise: SurpriseConfig
    world_model: WorldModel
    backbone: Backbone
    video: VideoConfig
    sampler: SamplerConfig
    negative: Conditioning | None = None

    def clips(self, conditioning: Conditioning, seeds: Sequence[int]) -> tuple[Tensor, Cost]:
        """One guided clip per seed: latents (B, C, F, H, W), and the cost."""
        latents, spent, size = [], Cost(), self.config.batch_size
        for start in range(0, len(seeds), size):
            part, started = slice(start, start + size), time.perf_counter()
            found = sample_guided(
                self.backbone, conditioning[part], initial_noise(self.backbone, self.video, seeds[part]), self.sampler,
                self.reward, self.config, negative=self.negative, batch_size=size,
            )  # fmt: skip
            latents.append(found.latents.cpu())
            passes, backward = found.passes * len(found.latents), found.backward * len(found.latents)
            spent += Cost(passes, time.perf_counter() - started, backward)
        return torch.cat(latents), spent

    def reward(self, frames: Tensor) -> Tensor:
        settings = self.surprise
        return -self.world_model.surprise_with_gradient(
            frames, frames=settings.frames, window=settings.window, context=settings.context,
            stride=settings.stride, axis=settings.axis,
        )  # fmt: skip
