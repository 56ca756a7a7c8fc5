"""From a prompt and a seed to the clip that a search ends with: what generation and benchmarks call.

    search    best_of_n: score every candidate; race: drop those that cannot win; prune: look after the sampling step
              `search.prune.steps[0]`, finish the promising ones; "": one candidate, no scoring
    refine    proprio: refine the noise of the best `search.refine.best` (at least one) and choose again among them;
              guidance: steer every candidate by the world model's surprise; "": neither

The first candidate has the seed itself: without a search it would be the clip.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from eval.judges import Judging, judge_settings
from eval.maker import Model, Request
from eval.search.best_of_n import RACING, Choice, best_of_n, decoder
from eval.search.candidates import Candidates, Cost, choose
from eval.search.config import SearchConfig
from eval.search.pruning import promising
from eval.search.scorers import SCORERS, SETTINGS
from eval.search.strategies import Guidance, Refinement
from eval.search.world_model import WorldModel
from train.backbones.base import Backbone, Conditioning
from train.clips import VideoConfig
from train.sampling import SamplerConfig

SEARCHES = ("", "best_of_n", "race", "prune")
REFINEMENTS = ("", "proprio", "guidance")
STRIDE = 1_000_003  # from one candidate's seed to the next; a prime, so that small seeds share no candidates


@dataclass(frozen=True)
class Strategy:
    search: str = ""  # of SEARCHES
    refine: str = ""  # of REFINEMENTS

    def __bool__(self) -> bool:
        return bool(self.search or self.refine)

    @property
    def suffix(self) -> str:
        """Of names of folders and files: what a strategy makes lies beside what another one makes."""
        return "".join(f"-{part}" for part in (self.search, self.refine) if part)


def check(strategy: Strategy, config: SearchConfig, sampler: SamplerConfig, section: str) -> None:
    """ValueError, naming key, value and remedy, for what cannot work. section: of the keys search and refine."""
    for key, known in (("search", SEARCHES), ("refine", REFINEMENTS)):
        if getattr(strategy, key) not in known:
            value = getattr(strategy, key)
            raise ValueError(f"{section}.{key}={value!r} is unknown: leave it empty or use {', '.join(known[1:])}")
    early = config.prune.scorers[0] if config.prune.scorers else ""
    for key, name in (("chosen_by", config.chosen_by), ("prune.scorers", early)):
        if name not in SCORERS:
            raise ValueError(f"search.{key} names {name!r}, which is no scorer: use one of {', '.join(SCORERS)}")
    if strategy.search and config.num_candidates < 2:
        raise ValueError(f"search.num_candidates={config.num_candidates}: a search needs 2 or more")
    if strategy.search == "race" and config.chosen_by not in RACING:
        raise ValueError(f"search.chosen_by={config.chosen_by} cannot race: use one of {', '.join(sorted(RACING))}")
    if strategy.search == "prune":
        if not config.prune.steps or not 0 < config.prune.steps[0] < sampler.steps:
            raise ValueError(
                f"search.prune.steps={config.prune.steps}: name a step from 1 to {sampler.steps - 1} first"
            )
        if strategy.refine == "guidance":
            raise ValueError(f"{section}.search=prune looks at clips before they are guided: use best_of_n or race")
    if strategy.refine == "guidance" and not config.surprise.path:
        raise ValueError(f"{section}.refine=guidance needs a world model: name it in search.surprise.path")
    if config.batch_size < 1 or config.refine.batch_size < 1 or config.guidance.batch_size < 1:
        raise ValueError("search.batch_size, search.refine.batch_size and search.guidance.batch_size must be 1 or more")


def settings(strategy: Strategy, config: SearchConfig, judging: Judging) -> dict[str, Any]:
    """All that a strategy's clip depends on beside prompt, seed, network and sampler, as plain JSON values."""
    found: dict[str, Any] = asdict(strategy)
    every = asdict(config) | {"judge": judge_settings(judging), "vlm": judge_settings(judging)["vlm"]}
    for name in ("residuals", "refine", "guidance"):
        every[name].pop("batch_size")
    names = [config.chosen_by] if strategy.search or config.refine.best > 1 and strategy.refine == "proprio" else []
    if strategy.search:
        found["num_candidates"] = config.num_candidates
    if strategy.search == "race":
        found["race"] = every["race"]
    if strategy.search == "prune":
        names.append(config.prune.scorers[0])
        found["prune"] = every["prune"]
    if strategy.refine:
        found["refined"] = every["refine" if strategy.refine == "proprio" else "guidance"]
        found |= {"surprise": every["surprise"]} if strategy.refine == "guidance" else {}
    return found | {"scorers": {name: {key: every[key] for key in SETTINGS.get(name, ())} for name in names}}


def describe(strategy: Strategy, config: SearchConfig) -> str:
    """The line of a dry run."""
    if not strategy:
        return "none"
    parts = []
    if strategy.search:
        parts.append(f"{strategy.search} of {config.num_candidates} by {config.chosen_by}: so many times these passes")
    if strategy.refine == "proprio":
        updates, steps, passes = config.refine.updates, config.refine.steps, config.refine.levels * config.refine.draws
        count = max(1, config.refine.best) if strategy.search else 1
        parts.append(f"{count} refined in {updates + 1} rounds of {steps} steps and {passes} passes")
    if strategy.refine == "guidance":
        parts.append(f"guided every {config.guidance.every} steps")
    return "; ".join(parts)


class Searching:
    """The search as a strategy of `eval.maker`: a clip a request, one after the other."""

    def __init__(self, strategy: Strategy, config: SearchConfig, judging: Judging):
        self.strategy, self.config, self.judging, self._searcher = strategy, config, judging, None

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
            self._searcher = Searcher(
                self.strategy, self.config, backbone, video, sampler, negative, judging=self.judging
            )
        latents, facts = [], []
        for number, request in enumerate(requests):
            one, prompt = conditioning[number : number + 1], request.prompt
            clip, found = self._searcher.find(prompt.key, prompt.text, one, request.seed)
            latents.append(clip)
            facts.append({"search": found})
        return torch.cat(latents), facts


def searching(model: Model, strategy: Strategy, config: SearchConfig, judging: Judging) -> Model:
    """The model with a search behind it, under a name of its own; as it is where there is none."""
    if not strategy:
        return model
    found, name = settings(strategy, config, judging), model.name + strategy.suffix
    return replace(model, name=name, strategy=Searching(strategy, config, judging), settings=found)


class Searcher:
    """One strategy with one network."""

    def __init__(
        self,
        strategy: Strategy,
        config: SearchConfig,
        backbone: Backbone,
        video: VideoConfig,
        sampler: SamplerConfig,
        negative: Conditioning | None = None,
        *,
        judging: Judging,
    ):
        self.judging = judging
        self.strategy, self.config, self.backbone = strategy, config, backbone
        self.video, self.sampler, self.negative = video, sampler, negative
        self.scorer = SCORERS[config.chosen_by](config, backbone, video.fps, judging)
        shared = (backbone, video, sampler, negative)
        self.refinement = self.guidance = None
        if strategy.refine == "proprio":
            self.refinement = Refinement(config.refine, *shared)
        elif strategy.refine == "guidance":
            model = WorldModel(config.surprise.path, backbone.device)
            self.guidance = Guidance(config.guidance, config.surprise, model, *shared)

    def find(self, key: str, prompt: str, conditioning: Conditioning, seed: int) -> tuple[Tensor, dict[str, Any]]:
        """The clip, latents (1, C, F, H, W), and facts: candidates' seeds and scores, the chosen one, the cost.

        conditioning, of one clip. key names the prompt's noise draws.
        """
        count = self.config.num_candidates if self.strategy.search else 1
        seeds = [seed + number * STRIDE for number in range(count)]
        choice = self._choice(key, prompt, conditioning, seeds)
        latents, spent = choice.latents, choice.generation + choice.scoring
        facts: dict[str, Any] = asdict(self.strategy) | {"seeds": seeds, "chosen": choice.index}
        if self.strategy.search:
            values = [value if math.isfinite(value) else None for value in choice.values.tolist()]
            facts |= {"chosen_by": self.config.chosen_by, "values": values}
        if self.refinement is not None:
            latents, refined, cost = self._refined(key, prompt, conditioning, seeds, choice)
            facts |= {"refined": refined}
            spent = spent + cost if self.strategy.search else cost
        return latents, facts | asdict(spent)

    def _choice(self, key: str, prompt: str, conditioning: Conditioning, seeds: list[int]) -> Choice:
        config, strategy = self.config, self.strategy
        sample = self.guidance.clips if self.guidance is not None else None
        if not strategy.search and self.refinement is not None:
            return Choice(0, torch.empty(0), torch.zeros(1), Cost(), Cost())  # its noise is all that is needed
        if not strategy.search:
            latents, cost = sample(conditioning, seeds)
            return Choice(0, latents, torch.zeros(1), cost, Cost())
        more: dict[str, Any] = {}
        if strategy.search == "prune":
            looking = replace(config, residuals=replace(config.residuals, draws=config.prune.draws))
            early = SCORERS[config.prune.scorers[0]](looking, self.backbone, self.video.fps, self.judging)
            more = {"prune_step": config.prune.steps[0], "keep": config.prune.keep, "early_scorer": early}
        if strategy.search == "race":
            more = {"race_config": config.race}
        return best_of_n(
            self.backbone, prompt, conditioning, seeds, self.video, self.sampler, self.scorer, key=key,
            batch_size=config.batch_size, negative=self.negative, sample=sample, **more,
        )  # fmt: skip

    def _refined(
        self, key: str, prompt: str, conditioning: Conditioning, seeds: list[int], choice: Choice
    ) -> tuple[Tensor, dict[str, Any], Cost]:
        """The best few from refined noise, and the best of these by the same scorer."""
        few = promising(choice.values, max(1, self.config.refine.best))
        latents, traces, cost = self.refinement.clips(conditioning.expand(len(few)), [seeds[index] for index in few])
        facts: dict[str, Any] = {"of": few, "score_before": traces[:, 0].tolist(), "score": traces[:, 1].tolist()}
        if len(few) == 1:
            return latents, facts, cost
        decode = decoder(self.backbone, self.config.batch_size)
        values, scoring = Candidates(key, prompt, latents, conditioning, decode, self.video.fps).measure(self.scorer)
        best = choose(values)
        return latents[best : best + 1], facts | {"values": values.tolist(), "chosen": best}, cost + scoring
