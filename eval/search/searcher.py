"""From a prompt and a seed to the clip that a search ends with: what generation and benchmarks call.

    search    best_of_n: score every candidate; race: drop those that cannot win; prune: look after the sampling step
              `search.prune.steps[0]`, finish the promising ones; "": one candidate, no scoring
    refine    proprio: refine the noise of the best `search.refine.best` (at least one) and choose again among them;
              guidance: steer every candidate by the world model's surprise; "": neither

The first candidate has the seed itself: without a search it would be the clip.
"""

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from eval.judges import Judging, judge_settings
from eval.maker import Model, Request
from eval.search import racing
from eval.search.candidates import Candidates, Cost, Scorer, choose
from eval.search.config import SearchConfig
from eval.search.guidance import sample_guided
from eval.search.noise_refinement import refine
from eval.search.pruning import Partial, advance, begin, promising
from eval.search.scorers import PROPRIO, SCORERS, SETTINGS
from eval.search.scorers.proprio import MIXING
from train.backbones.base import Backbone, Conditioning
from train.clips import VideoConfig, to_pixels
from train.sampling import RCM, SamplerConfig, Stepper, initial_noise, sample, sampling_passes

SEARCHES = ("", "best_of_n", "race", "prune")
REFINEMENTS = ("", "proprio", "guidance")
# Scorers that are means over network passes with equal weights, which can race.
RACING = frozenset(name for name in SCORERS if name.endswith(("-uniform", "residual_per_motion")))
EARLY_DRAWS = 1  # of noise for looks before the last step: an early look should be cheap
STRIDE = 1_000_003  # from one candidate's seed to the next; a prime, so that small seeds share no candidates


@dataclass(frozen=True)
class Method:
    """How a clip is found."""

    search: str = ""  # of SEARCHES
    refine: str = ""  # of REFINEMENTS

    def __bool__(self) -> bool:
        return bool(self.search or self.refine)

    @property
    def suffix(self) -> str:
        """Of names of folders and files: what a method makes lies beside what another one makes."""
        return "".join(f"-{part}" for part in (self.search, self.refine) if part)


def check(method: Method, config: SearchConfig, sampler: SamplerConfig, section: str) -> None:
    """ValueError, naming key, value and remedy, for what cannot work. section: of the keys search and refine."""
    for key, known in (("search", SEARCHES), ("refine", REFINEMENTS)):
        if (value := getattr(method, key)) not in known:
            raise ValueError(f"{section}.{key}={value!r} is unknown: leave it empty or use {', '.join(known[1:])}")
    check_whole_passes(sampler)
    check_scorers({"chosen_by": [config.chosen_by], "prune.scorers": config.prune.scorers[:1] or [""]}, sampler)
    if method.search and config.num_candidates < 2:
        raise ValueError(f"search.num_candidates={config.num_candidates}: a search needs 2 or more")
    if method.search == "race" and config.chosen_by not in RACING:
        raise ValueError(f"search.chosen_by={config.chosen_by} cannot race: use one of {', '.join(sorted(RACING))}")
    if method.search == "prune":
        if not config.prune.steps or not 0 < config.prune.steps[0] < sampler.steps:
            raise ValueError(
                f"search.prune.steps={config.prune.steps}: name a step from 1 to {sampler.steps - 1} first"
            )
        if method.refine == "guidance":
            raise ValueError(f"{section}.search=prune looks at clips before they are guided: use best_of_n or race")
    if method.refine == "proprio":
        replace(sampler, steps=config.refine.steps).check("search.refine")
    if method.refine == "guidance" and not config.surprise.path:
        raise ValueError(f"{section}.refine=guidance needs a world model: name it in search.surprise.path")
    check_batch(config)


def check_scorers(chosen: dict[str, Sequence[str]], sampler: SamplerConfig, section: str = "search") -> None:
    """ValueError for a name that is no scorer, or is none for the sampler's students, by the section's key that names
    it."""
    for key, names in chosen.items():
        for name in names:
            if name not in SCORERS:
                raise ValueError(f"{section}.{key} names {name!r}, which is no scorer: use {', '.join(SCORERS)}")
            if sampler.solver in RCM and name in PROPRIO and not name.endswith("-uniform"):
                raise ValueError(
                    f"{section}.{key} names {name}, which weighs levels by their variance: with sampler.solver="
                    f"{sampler.solver}, of distilled generators, use {name}-uniform (Proprio, appendix A.4)"
                )


def check_whole_passes(sampler: SamplerConfig) -> None:
    if sampler.cache:
        raise ValueError(f"sampler.cache={sampler.cache:g}: search and refinement need every pass whole; set it to 0")


def check_batch(config: SearchConfig) -> None:
    if config.batch_size < 1:
        raise ValueError(f"search.batch_size={config.batch_size}: use 1 or more")


def scorer_settings(name: str, config: SearchConfig, judging: Judging | None = None) -> dict[str, Any]:
    """All that a scorer's values depend on beside clips and network, as plain JSON values."""
    every = {"residuals": config.residuals.settings(), "mixing": MIXING, "surprise": config.surprise.settings()}
    every |= {"judge": judge_settings(judging or Judging()), "judge_aspect": "physical"}
    return {key: every[key] for key in SETTINGS.get(name, ())}


def prune_settings(config: SearchConfig) -> dict[str, Any]:
    return asdict(config.prune) | {"draws": EARLY_DRAWS}


def settings(method: Method, config: SearchConfig, judging: Judging | None = None) -> dict[str, Any]:
    """All that a method's clip depends on beside prompt, seed, network and sampler, as plain JSON values."""
    found: dict[str, Any] = asdict(method)
    names = [config.chosen_by] if method.search or config.refine.best > 1 and method.refine == "proprio" else []
    if method.search:
        found["num_candidates"] = config.num_candidates
    if method.search == "race":
        found["race"] = racing.SETTINGS
    if method.search == "prune":
        names.append(config.prune.scorers[0])
        found["prune"] = prune_settings(config)
    if method.refine == "proprio":
        found["refined"] = config.refine.settings()
    if method.refine == "guidance":
        found |= {"refined": config.guidance.settings(), "surprise": config.surprise.settings()}
    return found | {"scorers": {name: scorer_settings(name, config, judging) for name in names}}


def describe(method: Method, config: SearchConfig) -> str:
    """The line of a dry run."""
    if not method:
        return "none"
    parts = []
    if method.search:
        parts.append(f"{method.search} of {config.num_candidates} by {config.chosen_by}: so many times these passes")
    if method.refine == "proprio":
        refine, count = config.refine, max(1, config.refine.best) if method.search else 1
        rounds, passes = refine.updates + (not refine.fresh), refine.levels * refine.draws
        parts.append(f"{count} refined in {rounds} rounds of {refine.steps} steps and {passes} passes")
    if method.refine == "guidance":
        parts.append(f"guided every {config.guidance.every} steps")
    return "; ".join(parts)


def searching(model: Model, method: Method, config: SearchConfig, judging: Judging | None = None) -> Model:
    """The model with a search behind it, under a name of its own; as it is where there is none."""
    if not method:
        return model
    found = settings(method, config, judging)
    searched = Searching(method, config, judging)
    return replace(model, name=model.name + method.suffix, strategy=searched, settings=found)


class Searching:
    """The search as a Strategy of `eval.maker`: one clip per request, one after the other."""

    def __init__(self, method: Method, config: SearchConfig, judging: Judging | None):
        self.method, self.config, self.judging, self._searcher = method, config, judging, None

    def __call__(
        self,
        backbone: Backbone,
        conditioning: Conditioning,
        requests: Sequence[Request],
        sampler: SamplerConfig,
        negative: Conditioning,
    ) -> tuple[Tensor, list[dict[str, Any]]]:
        video = requests[0].video
        if self._searcher is None or self._searcher.video != video:
            self._searcher = Searcher(self.config, backbone, video, sampler, negative, self.judging)
        latents, facts = [], []
        for number, request in enumerate(requests):
            one, prompt = conditioning[number : number + 1], request.prompt
            clip, found = self._searcher.find(self.method, prompt.key, prompt.text, one, request.seed)
            latents.append(clip)
            facts.append({"search": found})
        return torch.cat(latents), facts


class Searcher:
    """Candidates of one network, their scores, and what is made of them."""

    def __init__(
        self,
        config: SearchConfig,
        backbone: Backbone,
        video: VideoConfig,
        sampler: SamplerConfig,
        negative: Conditioning | None = None,
        judging: Judging | None = None,  # of the scorer "judge"
    ):
        self.config, self.backbone, self.judging = config, backbone, judging or Judging()
        self.video, self.sampler, self.negative = video, sampler, negative
        self._scorers: dict[tuple[str, bool], Scorer] = {}

    def scorer(self, name: str, *, early: bool = False) -> Scorer:
        """A scorer by name. early: with as few draws as a look before the last step takes."""
        if (name, early) not in self._scorers:
            config = self.config
            if early:
                config = replace(config, residuals=replace(config.residuals, draws=EARLY_DRAWS))
            self._scorers[name, early] = SCORERS[name](config, self.backbone, self.video.fps, self.judging)
        return self._scorers[name, early]

    def candidates(self, key: str, prompt: str, conditioning: Conditioning, latents: Tensor) -> Candidates:
        """Clips of one prompt from latents (N, C, F, H, W); conditioning of one clip, key names its noise draws."""
        decode = decoder(self.backbone, self.config.batch_size)
        return Candidates(key, prompt, latents.cpu(), conditioning, decode, self.video.fps)

    def _stepper(self, conditioning: Conditioning, seeds: Sequence[int]) -> Stepper:
        """Of the clips of one prompt from these seeds."""
        return Stepper(self.backbone, conditioning.expand(len(seeds)), self.sampler, self.negative, seeds=seeds)

    def sample(self, conditioning: Conditioning, seeds: Sequence[int], stops: Sequence[int]) -> dict[int, Partial]:
        """The clips of these seeds as they are after each of the sampling steps `stops`, ascending."""
        found: dict[int, list[Partial]] = {stop: [] for stop in stops}
        for some in batches(seeds, self.config.batch_size):
            stepper = self._stepper(conditioning, some)
            part = begin(stepper, initial_noise(self.backbone, self.video, some))
            for stop in stops:
                part = advance(stepper, part, stop)
                found[stop].append(part)
        return {stop: Partial.cat(parts) for stop, parts in found.items()}

    def _noise(self, conditioning: Conditioning, seeds: Sequence[int]) -> Iterator[tuple]:
        """Conditioning, initial noise and what else samplers take, of a batch of clips at a time."""
        for start in range(0, len(seeds), self.config.batch_size):
            part = slice(start, start + self.config.batch_size)
            given = {"negative": self.negative, "seeds": seeds[part]}
            yield conditioning[part], initial_noise(self.backbone, self.video, seeds[part]), given

    def refined(self, conditioning: Conditioning, seeds: Sequence[int]) -> tuple[Tensor, Tensor, Cost]:
        """One clip per seed, from noise that Proprio's score refines: latents (B, C, F, H, W), the scores seen on
        the way (B, iterates), the cost. conditioning: of B clips."""
        config, sampler, started = self.config.refine, self.sampler, time.perf_counter()
        few, latents, traces = replace(sampler, steps=config.steps), [], []
        for told, noise, given in self._noise(conditioning, seeds):
            found = refine(self.backbone, told, noise, few, config, **given)
            clips, passes = found.latents, found.passes
            if clips is None or few != sampler:
                clips = sample(self.backbone, told, found.noise, sampler, progress=False, **given)
                passes += sampling_passes(self.backbone, sampler)
            latents.append(clips.cpu())
            traces.append(found.trace.T.cpu())
        cost = Cost(passes * len(seeds), time.perf_counter() - started, found.backward * len(seeds))
        return torch.cat(latents), torch.cat(traces), cost

    def guided(self, conditioning: Conditioning, seeds: Sequence[int]) -> tuple[Tensor, Cost]:
        """One clip per seed, steered by the world model's surprise: latents (B, C, F, H, W), and the cost.
        conditioning: of B clips."""
        config, surprise, started = self.config.guidance, self.scorer("surprise"), time.perf_counter()

        def reward(frames: Tensor) -> Tensor:  # (B, 3, T, height, width) in [-1, 1]
            return -surprise.of(((frames + 1) * 127.5).permute(0, 2, 3, 4, 1))

        latents = []
        for told, noise, given in self._noise(conditioning, seeds):
            clips, backward = sample_guided(self.backbone, told, noise, self.sampler, reward, config, **given)
            latents.append(clips.cpu())
        passes = sampling_passes(self.backbone, self.sampler)
        cost = Cost(passes * len(seeds), time.perf_counter() - started, backward * len(seeds))
        return torch.cat(latents), cost

    def race(self, candidates: Candidates) -> tuple[racing.Race, Cost]:
        """Race the candidates under `chosen_by`, which is to be one of RACING."""
        scorer, started = self.scorer(self.config.chosen_by), time.perf_counter()
        observe = partial(scorer.round_values, candidates)
        found = racing.race(observe, len(candidates), scorer.residuals.num_rounds)
        return found, Cost(found.passes, time.perf_counter() - started)

    def find(
        self, method: Method, key: str, prompt: str, conditioning: Conditioning, seed: int
    ) -> tuple[Tensor, dict[str, Any]]:
        """The clip, latents (1, C, F, H, W), and facts: candidates' seeds and scores, the chosen one, the cost.

        conditioning, of one clip. key names the prompt's noise draws.
        """
        config, named = self.config, partial(self.candidates, key, prompt, conditioning)
        count = config.num_candidates if method.search else 1
        seeds = [seed + number * STRIDE for number in range(count)]
        facts: dict[str, Any] = asdict(method) | {"seeds": seeds, "chosen": 0}
        few, spent = [0], Cost()
        if method.search:
            facts["chosen"], latents, values, spent = self.best(method, named, conditioning, seeds)
            shown = [value if math.isfinite(value) else None for value in values.tolist()]
            facts |= {"chosen_by": config.chosen_by, "values": shown}
            few = promising(values, max(1, config.refine.best))
        elif method.refine == "guidance":
            latents, spent = self.guided(conditioning, seeds)
        if method.refine == "proprio":
            some = [seeds[index] for index in few]
            latents, traces, cost = self.refined(conditioning.expand(len(few)), some)
            facts["refined"] = {"of": few, "scores": traces.tolist()}
            if len(few) > 1:  # the best of them by the same scorer
                values, scoring = named(latents).measure(self.scorer(config.chosen_by))
                best, cost = choose(values), cost + scoring
                latents = latents[best : best + 1]
                facts["refined"] |= {"values": values.tolist(), "chosen": best}
            spent = spent + cost
        return latents, facts | asdict(spent)

    def best(
        self, method: Method, named: partial, conditioning: Conditioning, seeds: Sequence[int]
    ) -> tuple[int, Tensor, Tensor, Cost]:
        """Number of the best candidate, its latents (1, C, F, H, W), all values (N,), infinity where a clip was not
        finished, and the cost."""
        kept = list(range(len(seeds)))
        if method.refine == "guidance":
            latents, spent = self.guided(conditioning.expand(len(seeds)), seeds)
        else:
            started, early, last = time.perf_counter(), Cost(), self.sampler.steps
            stop = self.config.prune.steps[0] if method.search == "prune" else last
            part = self.sample(conditioning, seeds, [stop])[stop]
            latents, passes = part.latents, len(seeds) * sampling_passes(self.backbone, self.sampler, 0, stop)
            if method.search == "prune":
                looking = self.scorer(self.config.prune.scorers[0], early=True)
                values, early = named(part.clean).measure(looking)
                kept = promising(values, max(1, math.ceil(self.config.prune.keep * len(seeds))))
                going = batches(kept, self.config.batch_size)
                rest = [part.select(some) for some in going]
                steppers = [self._stepper(conditioning, [seeds[index] for index in some]) for some in going]
                latents = torch.cat([advance(*pair, last).latents for pair in zip(steppers, rest, strict=True)])
                passes += len(kept) * sampling_passes(self.backbone, self.sampler, stop)
            spent = Cost(passes, time.perf_counter() - started - early.seconds) + early
        candidates = named(latents)
        if method.search == "race":
            raced, cost = self.race(candidates)
            winner, found = raced.winner, raced.scores
        else:
            found, cost = candidates.measure(self.scorer(self.config.chosen_by))
            winner = choose(found)
        values = torch.full((len(seeds),), torch.inf)
        values[kept] = found
        return kept[winner], candidates.latents[winner : winner + 1], values, spent + cost


def decoder(backbone: Backbone, batch_size: int):
    """Latents (N, C, F, H, W) -> pixels (N, T, H, W, 3) uint8 on the CPU, `batch_size` clips at a time."""

    @torch.no_grad()
    def decode(latents: Tensor) -> Tensor:
        parts = [to_pixels(backbone.decode_latents(part, batch_size=batch_size)) for part in latents.split(batch_size)]
        return torch.cat([part.cpu() for part in parts])

    return decode


def batches(items: Sequence, size: int) -> list[Sequence]:
    return [items[start : start + size] for start in range(0, len(items), size)]
