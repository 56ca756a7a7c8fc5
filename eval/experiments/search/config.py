"""What the search's experiments read of a recipe, what is checked of it, and the prompts that it asks for."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from eval.config import ClipsConfig
from eval.experiments.search.work import Job
from eval.prompts import make_key
from eval.sandbox.splits import list_clips
from eval.search.searcher import check_batch, check_scorers, check_whole_passes

SEEDS_A_PROMPT = 10_000  # so that more candidates add to fewer


@dataclass
class ExperimentConfig:
    folder: str = "${output}/search"  # everything goes here
    share: str = ""  # "2/8": only the second of eight shares of the prompts, without a table, beside other processes
    clips: int = 256  # held-out prompts, of all scenes
    seed: int = 0  # of the held-out scenes
    lora: Any = ""  # search with this LoRA or full weights attached, as generate.lora; empty: the base model
    scorers: list[str] = field(  # keys of eval.search.scorers.SCORERS
        default_factory=lambda: ["random", "most_motion", "proprio_hybrid", "residual_per_motion"]
    )


@dataclass
class Config(ClipsConfig):
    seed: int = 0  # of the candidates' noise
    search_experiment: ExperimentConfig = field(default_factory=ExperimentConfig)


def share_of(jobs: Sequence[Job], share: str) -> list[Job]:
    """The prompts of a share "i/n", i from 1; all of them for "". Raises ValueError for anything else."""
    if not share:
        return list(jobs)
    number, _, count = share.partition("/")
    if not (number.isdecimal() and count.isdecimal() and 1 <= int(number) <= int(count)):
        raise ValueError(
            f"search_experiment.share={share!r} is no share: use i/n with i from 1 to n, 2/8 for the second of eight"
        )
    return list(jobs[int(number) - 1 :: int(count)])


def list_jobs(config: Config) -> list[Job]:
    listed = list_clips("mixed", "heldout", config.search_experiment.seed, config.search_experiment.clips, config.video)
    jobs = []
    for number, clip in enumerate(listed):
        first = config.seed * 10**9 + number * SEEDS_A_PROMPT
        seeds = list(range(first, first + config.search.num_candidates))
        jobs.append(Job(number, make_key(number, clip.prompt), clip.prompt, seeds))
    return jobs


def check(config: Config) -> None:
    """Refuse settings that cannot work, naming key, value and remedy."""
    search, experiment = config.search, config.search_experiment
    config.sampler.check()
    check_whole_passes(config.sampler)
    check_scorers({"scorers": experiment.scorers}, config.sampler, "search_experiment")
    check_scorers({"chosen_by": [search.chosen_by], "prune.scorers": search.prune.scorers}, config.sampler)
    check_batch(search)
    share_of([], experiment.share)
    if search.chosen_by not in experiment.scorers:
        raise ValueError(f"search.chosen_by={search.chosen_by!r} is not among search_experiment.scorers: add it there")
    if not 2 <= search.num_candidates <= SEEDS_A_PROMPT:
        raise ValueError(f"search.num_candidates={search.num_candidates}: use 2 to {SEEDS_A_PROMPT}")
    for key, value in (("refine.best", search.refine.best), ("guidance.candidates", search.guidance.candidates)):
        if not 0 <= value <= search.num_candidates:
            raise ValueError(f"search.{key}={value}: use 0 to {search.num_candidates} (search.num_candidates)")
    if search.refine.steps < 1:
        raise ValueError(f"search.refine.steps={search.refine.steps}: use 1 or more")
    if search.guidance.candidates and not search.surprise.path:
        count = search.guidance.candidates
        raise ValueError(f"search.guidance.candidates={count} needs a world model: name it in search.surprise.path")
    if bad := [step for step in search.prune.steps if not 0 < step < config.sampler.steps]:
        raise ValueError(f"search.prune.steps has {bad[0]}, but sampling has {config.sampler.steps} steps")
    if not 0 < search.prune.keep <= 1:
        raise ValueError(f"search.prune.keep={search.prune.keep} must lie in (0, 1]")
