"""Best of N: generate from a list of seeds, score, keep the best; with pruning and racing where they are asked for."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from eval.search.candidates import Candidates, Cost, Scorer, choose
from eval.search.config import RaceConfig
from eval.search.pruning import begin, finish, promising, sampling_passes
from eval.search.racing import Race, race
from eval.search.scorers import SCORERS
from train.backbones.base import Backbone, Conditioning
from train.clips import VideoConfig, to_pixels
from train.sampling import SamplerConfig

# Scorers that are means over network passes with equal weights, which can race.
RACING = frozenset(name for name in SCORERS if name.endswith(("-uniform", "residual_per_motion")))


@dataclass(frozen=True)
class Choice:
    """What a search ends with."""

    index: int  # of the chosen one among the seeds
    latents: Tensor  # (1, C, F, H, W) float32, CPU
    values: Tensor  # (N,) the scorer's values; infinity for candidates that were not finished
    generation: Cost
    scoring: Cost


def best_of_n(
    backbone: Backbone,
    prompt: str,
    conditioning: Conditioning,
    seeds: Sequence[int],
    video: VideoConfig,
    sampler: SamplerConfig,
    scorer: Scorer,
    *,
    key: str,
    batch_size: int = 1,
    negative: Conditioning | None = None,
    prune_step: int = 0,
    keep: float = 0.5,
    early_scorer: Scorer | None = None,
    race_config: RaceConfig | None = None,
    sample: Callable[[Conditioning, Sequence[int]], tuple[Tensor, Cost]] | None = None,
) -> Choice:
    """The best candidate of one prompt.

    Args: conditioning, of one clip; key, which names the prompt's noise draws; batch_size, clips sampled together.
    prune_step: sampling step after which `early_scorer` (None: `scorer`) keeps the share `keep`; 0 finishes all.
    race_config: race instead of full scoring; the scorer must have `round_values`.
    sample: makes the clips of these seeds in place of plain sampling (guidance), without pruning.
    """
    decode = decoder(backbone, batch_size)
    if sample is None:
        kept, latents, generation, early = _generate(
            backbone, prompt, conditioning, seeds, video, sampler, early_scorer or scorer, decode, key=key,
            batch_size=batch_size, negative=negative, prune_step=prune_step, keep=keep,
        )  # fmt: skip
    else:
        kept, early = list(range(len(seeds))), Cost()
        latents, generation = sample(conditioning.expand(len(seeds)), seeds)
    candidates = Candidates(key, prompt, latents.cpu(), conditioning, decode, video.fps)
    if race_config is None:
        found, scoring = candidates.measure(scorer)
        winner = choose(found)
    else:
        started = time.perf_counter()
        result = run_race(candidates, scorer, race_config)
        winner, found = result.winner, result.scores
        scoring = Cost(result.passes, time.perf_counter() - started)
    values = torch.full((len(seeds),), torch.inf)
    values[kept] = found
    return Choice(kept[winner], candidates.latents[winner : winner + 1], values, generation, early + scoring)


def _generate(
    backbone: Backbone,
    prompt: str,
    conditioning: Conditioning,
    seeds: Sequence[int],
    video: VideoConfig,
    sampler: SamplerConfig,
    early_scorer: Scorer,
    decode: Callable[[Tensor], Tensor],
    *,
    key: str,
    batch_size: int,
    negative: Conditioning | None,
    prune_step: int,
    keep: float,
) -> tuple[list[int], Tensor, Cost, Cost]:
    """Numbers of the seeds whose clips were finished, their latents, the cost of making and of looking early."""
    started = time.perf_counter()
    partials = [
        begin(backbone, conditioning, part, video, sampler, stop=prune_step or sampler.steps, negative=negative)
        for part in batches(seeds, batch_size)
    ]
    passes = len(seeds) * sampling_passes(backbone, sampler, 0, prune_step or sampler.steps)
    kept, early = list(range(len(seeds))), Cost()
    latents = torch.cat([partial.latents for partial in partials])
    if prune_step:
        clean = torch.cat([partial.clean for partial in partials]).cpu()
        seen = Candidates(key, prompt, clean, conditioning, decode, video.fps)
        values, early = seen.measure(early_scorer)
        kept = promising(values, keep=max(1, math.ceil(keep * len(seeds))))
        merged = replace(partials[0], latents=latents, clean=clean)
        parts = [merged.select(part) for part in batches(kept, batch_size)]
        latents = torch.cat([finish(backbone, conditioning, part, sampler, negative=negative) for part in parts])
        passes += len(kept) * sampling_passes(backbone, sampler, prune_step)
    return kept, latents, Cost(passes, time.perf_counter() - started - early.seconds), early


def run_race(candidates: Candidates, scorer: Scorer, config: RaceConfig) -> Race:
    """Race the candidates under a scorer that is a mean over rounds; ValueError for another."""
    if not hasattr(scorer, "round_values"):
        raise ValueError(f"{scorer} is no mean over network passes, so it cannot race: use a uniform Proprio score")
    residuals = scorer.residuals
    return race(
        lambda number, chosen: scorer.round_values(candidates, number, chosen),
        len(candidates),
        residuals.num_rounds,
        confidence=config.confidence,
        first=config.first,
        every=config.every,
    )


def decoder(backbone: Backbone, batch_size: int) -> Callable[[Tensor], Tensor]:
    """Latents (N, C, F, H, W) -> pixels (N, T, H, W, 3) uint8 on the CPU, `batch_size` clips at a time."""

    def decode(latents: Tensor) -> Tensor:
        with torch.no_grad():
            parts = [
                to_pixels(backbone.decode_latents(part, batch_size=batch_size)) for part in latents.split(batch_size)
            ]
        return torch.cat([part.cpu() for part in parts])

    return decode


def batches(items: Sequence, size: int) -> list[Sequence]:
    return [items[start : start + size] for start in range(0, len(items), size)]
