"""What a gain costs: refinement of the noise beside search and guidance, by network passes.

    python -m eval.experiments.search.frontier recipe=sandbox                                  # all rows, three seeds
    python -m eval.experiments.search.frontier recipe=sandbox search_experiment.clips=16 search.num_candidates=8
    python -m eval.experiments.search.frontier recipe=sandbox search_experiment.share=2/8      # then one without share

    <folder>/frontier/<row>-<seed>-<number>.json   what a row's clips of `search.batch_size` prompts score and cost
    <folder>/frontier.json, frontier.png           means with 95% intervals, and the picture: the gain by its cost

Every row makes one clip for each of `search_experiment.clips` held-out prompts and each of SEEDS, with prompts and
noise of their own: every clip is one observation. Gains are paired with the clip of the same noise as it is. What is
there with the same settings is not made again; table and picture are of what is there, written after each row, so a run
that is stopped loses the prompts in hand alone. The paper's settings, the dearest, come last.

A cost is that of one clip, in forward passes of the generator's network: a pass that is followed by a backward one
counts three, for activations are computed again (`eval.search.noise_refinement`; but an update's last pass counts so,
too). A scorer's passes count, the VAE's and the world model's do not.
"""

import json
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from tqdm import tqdm

import recipes
from eval.experiments.search.config import Config, check, list_jobs, share_of
from eval.experiments.search.frontier_report import FIELDS, PLAIN, draw, summary, table
from eval.experiments.search.work import Job, Work
from eval.search.candidates import Cost, choose
from eval.search.config import PruneConfig, SearchConfig
from eval.search.noise_refinement import RefineConfig
from eval.search.scorers.baselines import motion_energy
from eval.search.searcher import Method, Searcher, batches, prune_settings, scorer_settings
from train import entry
from train.backbones.base import Conditioning
from train.clips import to_pixels
from train.files import digest, lock, write_text
from train.parallel import any_rank
from train.sampling import sample_clips, sampling_passes

SEEDS = (0, 1, 2)  # added to search_experiment.seed, of the prompts, and to seed, of the noise
HOW = ("", ", by one pass")  # search chooses: by the recipe's score, by one of one level and draw
PRUNED = ", by one pass before the end"  # and finishes one alone
REFINEMENTS: dict[str, dict[str, Any]] = {  # over the recipe's search.refine
    "4 updates": {"updates": 4},
    "4 updates, last 2 steps": {"updates": 4, "gradient": "last_2"},
    "4 updates, last step": {"updates": 4, "gradient": "last_1"},
    "4 updates, score alone": {"updates": 4, "gradient": "score"},
    "8 updates, forward only": {"updates": 8, "gradient": "spsa"},
    "1 update": {"updates": 1},
    "2 updates": {"updates": 2},
    "2 updates, last 2 steps": {"updates": 2, "gradient": "last_2"},
    "1 update of 2 steps": {"updates": 1, "steps": 2},
    "2 updates of 2 steps": {"updates": 2, "steps": 2},
    "4 updates of 2 steps": {"updates": 4, "steps": 2},
    "4 updates at 0.02": {"updates": 4, "learning_rate": 0.02},
    "4 updates, fixed draw": {"updates": 4, "gradient": "proprio"},
    "4 updates, 4 draws": {"updates": 4, "draws": 4},
    "8 updates": {"updates": 8},
    "as printed": recipes.read_yaml(recipes.PRESETS / "proprio.yaml", recipes.CONTENT)["search"]["refine"],
}

Made = dict[str, tuple[Tensor, Cost]]  # by row: latents (prompts, C, F, H, W), and what all of them cost


@dataclass(frozen=True)
class Part:
    """Rows that are made together."""

    name: str  # of the files
    rows: tuple[str, ...]
    make: Callable[[Sequence[Job]], Made]
    settings: Any  # that clips depend on beside prompts, seeds, network and sampler


@dataclass(frozen=True)
class Unit:
    """A part's clips of some prompts: what a file holds."""

    path: Path
    depends: str  # digest of what the clips depend on
    jobs: Sequence[Job]

    def read(self) -> dict[str, Any] | None:
        """The file's content; None where there is none of these settings."""
        try:
            found = json.loads(self.path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return found if found.get("depends") == self.depends else None


def best_of(count: int, how: str) -> str:
    return f"best of {count}{how}"


def main(argv: list[str] | None = None) -> dict[str, Any] | None:
    config = recipes.load(Config, argv)
    refine, guidance = replace(config.search.refine, best=0), replace(config.search.guidance, candidates=0)
    config.search = replace(config.search, refine=refine, guidance=guidance)  # the rows say what is made
    check(config)
    with entry.launched("search") as accelerator:
        experiment = config.search_experiment
        if not config.dry_run:
            task = "frontier" + experiment.share.replace("/", "-of-")
            with lock(experiment.folder, task=task) if accelerator.is_main_process else nullcontext():
                return Frontier(config, accelerator).run()
        if accelerator.is_main_process:
            print(f"{len(SEEDS)} seeds of {experiment.clips} prompts, rows: {PLAIN}, search, guidance,")
            print(", ".join(REFINEMENTS))
    return None


class Frontier:
    """One rank's share of the rows, and on the main process the table."""

    def __init__(self, config: Config, accelerator: Accelerator):
        self.config, self.accelerator = config, accelerator
        self.folder = Path(config.search_experiment.folder)
        self.work = Work(config, accelerator.device)
        self.jobs = {}
        for seed in SEEDS:
            experiment = replace(config.search_experiment, seed=config.search_experiment.seed + seed)
            self.jobs[seed] = list_jobs(replace(config, search_experiment=experiment, seed=config.seed + seed))

    def run(self) -> dict[str, Any] | None:
        rank, experiment = self.accelerator.process_index, self.config.search_experiment
        results = None
        for part in self.parts:
            units = [unit for seed in SEEDS for unit in self.units(part, seed)]
            mine = share_of(units, experiment.share)[rank :: self.accelerator.num_processes]
            todo = [unit for unit in mine if unit.read() is None]
            for unit in tqdm(todo, desc=part.name, unit="unit", disable=rank > 0):
                self.make(part, unit)
            if not rank and not experiment.share:
                results = self.collect()
        any_rank(False, self.accelerator.device)  # an all-reduce, so all are done
        if not rank and not experiment.share:
            results = self.collect()
            print(f"{table(results)}\n\nresults {self.folder / 'frontier.json'}")
        return results

    # Rows

    @cached_property
    def parts(self) -> list[Part]:
        search = self.config.search
        refinements = {name: replace(search.refine, **changes) for name, changes in REFINEMENTS.items()}
        parts = [
            Part(name, (name,), partial(self.refined, name, refine), refine.settings())
            for name, refine in refinements.items()
        ]
        scored = [scorer_settings(search.chosen_by, each, self.work.judging) for each in self.scorings]
        rows = tuple(best_of(count, how) for count in self.counts for how in HOW)
        others = [Part(PLAIN, (PLAIN,), self.plain, None)]
        others.append(Part("search", rows, self.searched, [rows, search.chosen_by, scored]))
        if search.surprise.path:
            guided = [search.guidance.settings(), search.surprise.settings()]
            others.append(Part("guidance", ("guidance",), self.guided, guided))
        for count in self.counts:
            name, one = best_of(count, PRUNED), self.pruning(count)
            settings = [count, search.chosen_by, scored[1], prune_settings(one)]
            others.append(Part(name, (name,), partial(self.pruned, name, one, count), settings))
        return [*others, *parts]

    @property
    def counts(self) -> list[int]:
        """Candidates of a prompt: 2, 4, 8 ... up to search.num_candidates."""
        return [2**power for power in range(1, 14) if 2**power <= self.config.search.num_candidates]

    @property
    def scorings(self) -> list[SearchConfig]:
        """Search settings with the recipe's score, and with a score of one pass, as HOW names them."""
        search = self.config.search
        return [search, replace(search, residuals=replace(search.residuals, levels=1, draws=1))]

    def pruning(self, count: int) -> SearchConfig:
        """Search settings by which one of `count` is finished, chosen by one pass after three quarters of the steps."""
        steps, one = [3 * self.config.sampler.steps // 4], self.scorings[1]
        return replace(one, num_candidates=count, prune=PruneConfig(steps, keep=1 / count, scorers=[one.chosen_by]))

    def searcher(self, search: SearchConfig | None = None) -> Searcher:
        known = self.work.searcher
        if search is None:
            return known
        return Searcher(search, known.backbone, known.video, known.sampler, known.negative, known.judging)

    def told(self, jobs: Sequence[Job]) -> Conditioning:
        return Conditioning.cat([self.work.backbone.condition([job.prompt]) for job in jobs])

    def plain(self, jobs: Sequence[Job]) -> Made:
        known, started = self.work.searcher, time.perf_counter()
        given, seeds = {"negative": known.negative, "progress": False}, [job.seeds[0] for job in jobs]
        latents = sample_clips(known.backbone, self.told(jobs), seeds, known.video, known.sampler, **given)
        passes = len(jobs) * sampling_passes(known.backbone, known.sampler)
        return {PLAIN: (latents, Cost(passes, time.perf_counter() - started))}

    def refined(self, name: str, refine: RefineConfig, jobs: Sequence[Job]) -> Made:
        searcher = self.searcher(replace(self.config.search, refine=refine))
        latents, _, cost = searcher.refined(self.told(jobs), [job.seeds[0] for job in jobs])
        return {name: (latents, cost)}

    def guided(self, jobs: Sequence[Job]) -> Made:
        return {"guidance": self.work.searcher.guided(self.told(jobs), [job.seeds[0] for job in jobs])}

    def searched(self, jobs: Sequence[Job]) -> Made:
        """All counts and scores from the same candidates; a row costs what it would have cost alone."""
        sampler, chosen_by = self.config.sampler, self.config.search.chosen_by
        scorers = [self.searcher(search).scorer(chosen_by) for search in self.scorings]
        clips: dict[str, list[Tensor]] = {}
        costs: dict[str, Cost] = {}
        for job in jobs:
            conditioning, started = self.work.backbone.condition([job.prompt]), time.perf_counter()
            latents = self.work.searcher.sample(conditioning, job.seeds, [sampler.steps])[sampler.steps].latents
            seconds = time.perf_counter() - started
            made = Cost(len(job.seeds) * sampling_passes(self.work.backbone, sampler), seconds)
            candidates = self.work.searcher.candidates(job.key, job.prompt, conditioning, latents)
            for how, scorer in zip(HOW, scorers, strict=True):
                values, scoring = candidates.measure(scorer)
                for count in self.counts:
                    name, spent, share = best_of(count, how), made + scoring, count / len(job.seeds)
                    best = choose(values[:count])
                    clips.setdefault(name, []).append(candidates.latents[best : best + 1])
                    one = Cost(round(spent.passes * share), spent.seconds * share)
                    costs[name] = costs.get(name, Cost()) + one
        return {name: (torch.cat(found), costs[name]) for name, found in clips.items()}

    def pruned(self, name: str, search: SearchConfig, count: int, jobs: Sequence[Job]) -> Made:
        searcher, clips, spent = self.searcher(search), [], Cost()
        for job in jobs:
            conditioning = self.work.backbone.condition([job.prompt])
            named = partial(searcher.candidates, job.key, job.prompt, conditioning)
            _, latents, _, cost = searcher.best(Method("prune", ""), named, conditioning, job.seeds[:count])
            clips.append(latents)
            spent = spent + cost
        return {name: (torch.cat(clips), spent)}

    # Files

    def units(self, part: Part, seed: int) -> list[Unit]:
        """Of the seed's prompts, as many as are refined together at a time."""
        found = []
        for number, jobs in enumerate(batches(self.jobs[seed], self.config.search.batch_size)):
            name = f"{part.name}-{seed}-{number}".replace(",", "").replace(" ", "-")
            depends = digest([part.settings, [self.work.candidates_digest(job) for job in jobs]])
            found.append(Unit(self.folder / "frontier" / f"{name}.json", depends, jobs))
        return found

    def make(self, part: Part, unit: Unit) -> None:
        rows: dict[str, Any] = {}
        for name, (latents, cost) in part.make(unit.jobs).items():
            clips = to_pixels(self.work.backbone.decode_latents(latents, batch_size=len(latents))).cpu()
            scores = self.work.judge(clips, [job.prompt for job in unit.jobs])
            found = (scores.physical, scores.semantic, motion_energy(latents))
            rows[name] = {key: values.tolist() for key, values in zip(FIELDS, found, strict=True)} | asdict(cost)
        write_text(unit.path, json.dumps({"depends": unit.depends, "rows": rows}, indent=1) + "\n")

    def collect(self) -> dict[str, Any]:
        """Table and picture of what is there."""
        found: dict[str, dict[int, list[dict[str, Any]]]] = {}
        for part in self.parts:
            for seed in SEEDS:
                units = [unit.read() for unit in self.units(part, seed)]
                if None not in units:
                    for name in part.rows:
                        found.setdefault(name, {})[seed] = [unit["rows"][name] for unit in units]
        rows = {name: summary(by_seed, found[PLAIN]) for name, by_seed in found.items()}
        results = {"rows": rows, "prompts": self.config.search_experiment.clips, "seeds": list(SEEDS)}
        results |= {"torch": torch.__version__, "device": str(self.accelerator.device)}
        results |= {"settings": recipes.redacted(asdict(self.config))}
        write_text(self.folder / "frontier.json", json.dumps(results, indent=1) + "\n")
        draw(results, self.folder / "frontier.png")
        return results


if __name__ == "__main__":
    entry.run(main)
