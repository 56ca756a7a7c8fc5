"""Strategies beside the choice among N candidates: clips that are refined or guided, of several prompts at once.

    refined   the first of a prompt's candidates (a pick by lot: no search) and the best by `chosen_by`, each from its
              own noise, which Proprio's score refines; see `eval.refine.proprio`
    guided    the first candidates once more, from the same noise, steered by the world model's surprise; see
              `eval.refine.guidance`

A strategy makes, for a batch of prompts, latents and facts about each; `eval.search.run` keeps both and has the clips
judged and scored as the candidates are. The networks of the sandbox are small, so a batch holds clips of many prompts.
"""

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from eval.refine.guidance import sample_guided
from eval.refine.proprio import refine
from eval.search.config import GuideConfig, RefineConfig
from eval.search.pruning import promising, sampling_passes
from eval.search.scorers.surprise import SurpriseConfig
from eval.search.world_model import WorldModel
from train.backbones.base import Backbone, Conditioning
from train.clips import VideoConfig
from train.sampling import SamplerConfig

Made = tuple[dict[str, Tensor], dict[str, Any]]  # a prompt's tensors, "latents" (n, C, F, H, W) among them, and facts


@dataclass(frozen=True)
class Item:
    """What a strategy needs to know of one prompt."""

    conditioning: Conditioning  # of one clip
    seeds: Sequence[int]  # of the candidates' noise
    values: Tensor  # (N,) of the candidates, by the scorer that chooses


@dataclass(frozen=True)
class Refinement:
    config: RefineConfig
    backbone: Backbone
    video: VideoConfig
    sampler: SamplerConfig
    negative: Conditioning | None = None
    name: ClassVar[str] = "refined"

    @property
    def prompts_at_once(self) -> int:
        return max(1, self.config.batch_size // (self.config.best + 1))

    def depends_on(self, item: Item) -> Any:
        settings = asdict(self.config)
        settings.pop("batch_size")
        return [settings, self.chosen(item)]

    def chosen(self, item: Item) -> list[int]:
        """Numbers of the candidates that are refined: the first, and the best."""
        return sorted({0, *promising(item.values, self.config.best)})

    def make(self, items: Sequence[Item]) -> list[Made]:
        chosen = [self.chosen(item) for item in items]
        seeds = [item.seeds[index] for item, indices in zip(items, chosen, strict=True) for index in indices]
        conditioning = joined(items, [len(indices) for indices in chosen])
        few = replace(self.sampler, steps=self.config.steps)
        made: list[Made] = []
        latents, traces = [], []
        passes = backward = 0
        started = time.perf_counter()
        for start in range(0, len(seeds), self.config.batch_size):
            part = slice(start, start + self.config.batch_size)
            noise = noise_of(self.backbone, self.video, seeds[part])
            found = refine(self.backbone, conditioning[part], noise, few, self.config, negative=self.negative)
            passes, backward = found.passes, found.backward
            latents.append(self.sampled(found.noise, conditioning[part], found.latents).cpu())
            traces.append(torch.stack([found.trace[0], found.score], dim=1).cpu())
        passes += 0 if self.config.steps == self.sampler.steps else sampling_passes(self.backbone, self.sampler)
        each = (time.perf_counter() - started) / len(seeds)
        sizes = [len(indices) for indices in chosen]
        best_few = [promising(item.values, self.config.best) for item in items]
        for indices, best, clips, trace in zip(
            chosen, best_few, torch.cat(latents).split(sizes), torch.cat(traces).split(sizes), strict=True
        ):
            facts = {"of": indices, "best": best, "score_before": trace[:, 0].tolist(), "score": trace[:, 1].tolist()}
            made.append(({"latents": clips}, facts | cost(len(indices), passes, backward, each)))
        return made

    @torch.no_grad()
    def sampled(self, noise: Tensor, conditioning: Conditioning, latents: Tensor) -> Tensor:
        """The clips of refined noise, all (B, C, F, H, W): those of the few steps, where these are the sampler's."""
        if self.config.steps == self.sampler.steps:
            return latents
        sampler = self.sampler
        return self.backbone.sample(
            conditioning, None, height=self.video.height, width=self.video.width, num_frames=self.video.num_frames,
            steps=sampler.steps, guidance=sampler.guidance, guidance_low=sampler.guidance_low, shift=sampler.shift,
            negative=self.negative or "", latents=noise, progress=False,
        )  # fmt: skip


@dataclass(frozen=True)
class Guidance:
    config: GuideConfig
    surprise: SurpriseConfig
    world_model: WorldModel
    backbone: Backbone
    video: VideoConfig
    sampler: SamplerConfig
    negative: Conditioning | None = None
    name: ClassVar[str] = "guided"

    @property
    def prompts_at_once(self) -> int:
        return max(1, self.config.batch_size // self.config.candidates)

    def depends_on(self, item: Item) -> Any:
        settings = asdict(self.config)
        settings.pop("batch_size")
        return [settings, asdict(self.surprise)]

    def make(self, items: Sequence[Item]) -> list[Made]:
        count, size = self.config.candidates, self.config.batch_size
        seeds = [seed for item in items for seed in item.seeds[:count]]
        conditioning = joined(items, [count] * len(items))
        latents = []
        passes = backward = 0
        started = time.perf_counter()
        for start in range(0, len(seeds), size):
            part = slice(start, start + size)
            found = sample_guided(
                self.backbone, conditioning[part], noise_of(self.backbone, self.video, seeds[part]), self.sampler,
                self.reward, self.config, negative=self.negative, batch_size=size,
            )  # fmt: skip
            latents.append(found.latents.cpu())
            passes, backward = found.passes, found.backward
        each = (time.perf_counter() - started) / len(seeds)
        facts = {"of": list(range(count))} | cost(count, passes, backward, each)
        return [({"latents": clips}, dict(facts)) for clips in torch.cat(latents).split(count)]

    def reward(self, frames: Tensor) -> Tensor:
        settings = self.surprise
        return -self.world_model.surprise_with_gradient(
            frames, window=settings.window, context=settings.context, stride=settings.stride, axis=settings.axis
        )


def joined(items: Sequence[Item], counts: Sequence[int]) -> Conditioning:
    """The conditionings, each as often as its count."""
    return Conditioning.cat([item.conditioning.expand(count) for item, count in zip(items, counts, strict=True)])


def noise_of(backbone: Backbone, video: VideoConfig, seeds: Sequence[int]) -> Tensor:
    """The initial noise of these seeds, (B, C, F, H, W): the same that `eval.search.pruning.begin` starts from."""
    shape = backbone.latent_shape(video.height, video.width, video.num_frames)
    return torch.stack([torch.randn(shape, generator=torch.Generator("cpu").manual_seed(seed)) for seed in seeds])


def cost(count: int, passes: int, backward: int, seconds: float) -> dict[str, float]:
    """Of `count` clips, from those of one."""
    return {"passes": count * passes, "backward": count * backward, "seconds": round(count * seconds, 4)}
