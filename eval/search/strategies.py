"""Strategies beside the choice among N candidates: clips that are refined or guided, of several prompts at once.

    refined   the first of a prompt's candidates (a pick by lot: no search) and the best by `chosen_by`, each from its
              own noise, which Proprio's score refines; see `eval.search.noise_refinement`
    guided    the first candidates once more, from the same noise, steered by the world model's surprise; see
              `eval.search.guidance`

A strategy makes latents and facts about each of a batch of prompts; `eval.experiments.search.run` keeps both and has
the clips judged and scored as the candidates are. The sandbox's networks are small: batches mix prompts.
"""

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from eval.search.candidates import Cost
from eval.search.config import GuideConfig, RefineConfig
from eval.search.guidance import sample_guided
from eval.search.noise_refinement import refine
from eval.search.pruning import promising, sampling_passes
from eval.search.scorers.surprise import SurpriseConfig
from eval.search.world_model import WorldModel
from train.backbones.base import Backbone, Conditioning
from train.clips import VideoConfig
from train.sampling import SamplerConfig, initial_noise, sample

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
        sizes = [len(indices) for indices in chosen]
        seeds = [item.seeds[index] for item, indices in zip(items, chosen, strict=True) for index in indices]
        latents, traces, spent = self.clips(joined(items, sizes), seeds)
        made: list[Made] = []
        for item, indices, clips, trace in zip(items, chosen, latents.split(sizes), traces.split(sizes), strict=True):
            facts = {"of": indices, "best": promising(item.values, self.config.best)}
            facts |= {"score_before": trace[:, 0].tolist(), "score": trace[:, 1].tolist()}
            made.append(({"latents": clips}, facts | part_of(spent, len(indices) / len(seeds))))
        return made

    def clips(self, conditioning: Conditioning, seeds: Sequence[int]) -> tuple[Tensor, Tensor, Cost]:
        """One refined clip a seed: latents (B, C, F, H, W), Proprio's score before and after, (B, 2), and the cost."""
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
    name: ClassVar[str] = "guided"

    @property
    def prompts_at_once(self) -> int:
        return max(1, self.config.batch_size // self.config.candidates)

    def depends_on(self, item: Item) -> Any:
        settings = asdict(self.config)
        settings.pop("batch_size")
        return [settings, asdict(self.surprise)]

    def make(self, items: Sequence[Item]) -> list[Made]:
        count = self.config.candidates
        seeds = [seed for item in items for seed in item.seeds[:count]]
        latents, spent = self.clips(joined(items, [count] * len(items)), seeds)
        facts = {"of": list(range(count))} | part_of(spent, count / len(seeds))
        return [({"latents": clips}, dict(facts)) for clips in latents.split(count)]

    def clips(self, conditioning: Conditioning, seeds: Sequence[int]) -> tuple[Tensor, Cost]:
        """One guided clip a seed: latents (B, C, F, H, W), and the cost."""
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


def joined(items: Sequence[Item], counts: Sequence[int]) -> Conditioning:
    """The conditionings, each as often as its count."""
    return Conditioning.cat([item.conditioning.expand(count) for item, count in zip(items, counts, strict=True)])


def part_of(spent: Cost, share: float) -> dict[str, float]:
    """A prompt's share of what a batch cost."""
    passes, backward = round(spent.passes * share), round(spent.backward * share)
    return {"passes": passes, "backward": backward, "seconds": round(spent.seconds * share, 4)}
