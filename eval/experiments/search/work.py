"""The work of a search experiment: candidates of each prompt, what scorers and the judge say, and strategies' clips.

    refined   the first of a prompt's candidates (a pick by lot: no search) and the best by `chosen_by`, each from its
              own noise, which Proprio's score refines
    guided    the first candidates once more, from the same noise, steered by the world model's surprise

Refined and guided clips of several prompts are made together: the sandbox's networks are small.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from eval.experiments.search.store import read_record, read_tensors, write_record, write_tensors
from eval.judges import Judging
from eval.judges.sandbox.judge import SandboxJudgeConfig
from eval.judges.sandbox.judge import build as build_judge
from eval.loras import attach, read_lora
from eval.search import racing
from eval.search.candidates import Candidates, choose
from eval.search.pruning import promising
from eval.search.scorers.baselines import motion_energy
from eval.search.searcher import RACING, Searcher, batches, prune_settings, scorer_settings
from train.backbones import load_backbone
from train.backbones.base import Backbone, Conditioning
from train.clips import write_clip
from train.files import digest
from train.sampling import sampling_passes

SHOWN = 24  # prompts on the page, the first ones
Made = tuple[dict[str, Tensor], dict[str, Any]]  # a prompt's tensors, "latents" (n, C, F, H, W) among them, and facts


@dataclass(frozen=True)
class Job:
    """One prompt with its candidates' seeds."""

    number: int
    key: str
    prompt: str
    seeds: list[int]


@dataclass(frozen=True)
class Strategy:
    """How clips of several prompts are made at once, from the noise of some of each prompt's candidates."""

    name: str  # refined | guided
    clips: Callable[[Conditioning, list[int]], tuple]  # -> latents (B, C, F, H, W), scores if refined, cost
    at_once: int  # prompts
    best: int | None  # refined: so many candidates and the first; None: guided
    count: int  # guided: so many candidates, the first
    settings: Any

    def chosen(self, values: Tensor) -> list[int]:
        """Numbers of the candidates whose noise is taken, by the values (N,) of all."""
        return list(range(self.count)) if self.best is None else sorted({0, *promising(values, self.best)})

    def depends_on(self, values: Tensor) -> Any:
        return self.settings if self.best is None else [self.settings, self.chosen(values)]

    def make(self, jobs: Sequence[Job], told: Sequence[Conditioning], values: Sequence[Tensor]) -> list[Made]:
        """Clips of each prompt, and facts with the prompt's share of the cost. told: of one clip each."""
        chosen = [self.chosen(found) for found in values]
        sizes = [len(indices) for indices in chosen]
        seeds = [job.seeds[index] for job, indices in zip(jobs, chosen, strict=True) for index in indices]
        together = Conditioning.cat([one.expand(size) for one, size in zip(told, sizes, strict=True)])
        latents, *traces, spent = self.clips(together, seeds)
        made: list[Made] = []
        for number, clips in enumerate(latents.split(sizes)):
            facts: dict[str, Any] = {"of": chosen[number]}
            if traces:
                trace = traces[0].split(sizes)[number]
                facts |= {"best": promising(values[number], self.best)}
                facts |= {"scores": trace.tolist()}
            share = len(clips) / len(seeds)
            facts |= {"passes": round(spent.passes * share), "backward": round(spent.backward * share)}
            made.append(({"latents": clips}, facts | {"seconds": round(spent.seconds * share, 4)}))
        return made


class Work:
    """One rank's share: network, scorers and files."""

    def __init__(self, config: Any, device: torch.device):
        self.config, self.search, self.experiment = config, config.search, config.search_experiment
        self.folder, self.judging = Path(self.experiment.folder), Judging.of(config)
        self.backbone: Backbone = load_backbone(config.backbone, device)
        self.lora = ""
        if lora := read_lora(self.experiment.lora, self.backbone, key="search_experiment.lora"):
            attach(lora, self.backbone)
            self.lora = lora.sha256
        negative = None
        if sampling_passes(self.backbone, config.sampler) > config.sampler.steps:  # some step is guided
            negative = self.backbone.encode_texts([config.sampler.negative_prompt])
        self.searcher = Searcher(self.search, self.backbone, config.video, config.sampler, negative, self.judging)
        for name in self.experiment.scorers:
            self.searcher.scorer(name)  # refuses what cannot work
        self.judge = build_judge(SandboxJudgeConfig(fps=config.video.fps), "cpu")
        self.strategies = list(self._strategies())

    def _strategies(self) -> Iterator[Strategy]:
        refine, guidance, searcher = self.search.refine, self.search.guidance, self.searcher
        batch = self.search.batch_size
        if refine.best:
            at_once = max(1, batch // (refine.best + 1))
            yield Strategy("refined", searcher.refined, at_once, refine.best, 0, refine.settings())
        if count := guidance.candidates:
            settings = [guidance.settings(), self.search.surprise.settings()]
            yield Strategy("guided", searcher.guided, max(1, batch // count), None, count, settings)

    # What files depend on

    def candidates_digest(self, job: Job) -> str:
        config = self.config
        settings = [config.sampler.settings(), asdict(config.video), self.backbone.fingerprint, config.backbone.dtype]
        return digest([*settings, self.lora, job.prompt, job.seeds, self.search.prune.steps])

    def settings(self, name: str) -> dict[str, Any]:
        """What a scorer's values depend on, beside the candidates."""
        return {"scorer": name} | scorer_settings(name, self.search, self.judging)

    def path(self, job: Job) -> Path:
        return self.folder / "prompts" / f"{job.key}.json"

    def record(self, job: Job) -> dict[str, Any]:
        """What is known of the prompt with these candidates, without what was asked for in another run only."""
        record, wanted = read_record(self.path(job), self.candidates_digest(job)), self._parts(job)
        strategies = {strategy.name for strategy in self.strategies}
        for name in {"race", "prune", "refined", "guided"} - strategies - wanted.keys():
            record.pop(name, None)
            record.get("parts", {}).pop(name, None)
        return record

    # The work

    def do(self, job: Job) -> None:
        """Whatever is missing of one prompt. The record is written after each part."""
        record, parts, made = self.record(job), self._parts(job), self.candidates_digest(job)
        todo = [name for name in parts if record.get("parts", {}).get(name) != parts[name]]
        if not todo:
            return
        candidates, tensors, facts = self.candidates(job, made)
        record = record or {"candidates": made, "key": job.key, "prompt": job.prompt, "seeds": job.seeds, "parts": {}}
        record |= {"generation": facts, "motion": motion_energy(candidates.latents).tolist()}
        makers = {
            "truth": self.truth,
            "clips": partial(self.clips, job=job),
            "race": self.race,
            "prune": partial(self.prune, tensors=tensors),
        }
        for name in todo:
            make = makers.get(name) or partial(self.score, name=name.removeprefix("scorer "))
            make(candidates, record)
            record["parts"][name] = parts[name]
            write_record(self.path(job), record)

    def _parts(self, job: Job) -> dict[str, str]:
        """Parts of the record, in the order of the work, and the digests of their settings."""
        search = self.search
        parts = {"truth": digest("sandbox judge")}
        parts |= {f"scorer {name}": digest(self.settings(name)) for name in self.experiment.scorers}
        chosen = self.settings(search.chosen_by)
        if search.chosen_by in RACING:
            parts["race"] = digest([chosen, racing.SETTINGS])
        if search.prune.steps:
            looks = [self.settings(name) for name in search.prune.scorers]
            parts["prune"] = digest([chosen, looks, prune_settings(search)])
        if job.number < SHOWN:
            parts["clips"] = digest("clips")
        return parts

    @torch.no_grad()
    def candidates(self, job: Job, made: str) -> tuple[Candidates, dict[str, Tensor], dict[str, Any]]:
        """The prompt's candidates, its file's tensors and facts; generated where there is no file of them."""
        path = self.folder / "candidates" / f"{job.key}.safetensors"
        if (stored := read_tensors(path, made)) is None:
            stored = self.generate(job)
            write_tensors(path, stored[0], made, stored[1])
        tensors, facts = stored
        conditioning = Conditioning.of(tensors)
        return self.searcher.candidates(job.key, job.prompt, conditioning, tensors["latents"]), tensors, facts

    def generate(self, job: Job) -> Made:
        sampler, started = self.config.sampler, time.perf_counter()
        conditioning, looks = self.backbone.condition([job.prompt]), sorted(self.search.prune.steps)
        found = self.searcher.sample(conditioning, job.seeds, [*looks, sampler.steps])
        tensors = {f"clean-{step}": found[step].clean for step in looks}
        tensors |= {"latents": found[sampler.steps].latents.cpu(), **conditioning.to("cpu").named()}
        passes = len(job.seeds) * sampling_passes(self.backbone, sampler)
        return tensors, {"passes": passes, "seconds": round(time.perf_counter() - started, 4)}

    def truth(self, candidates: Candidates, record: dict) -> None:
        scores = self.judge(candidates.clips, [candidates.prompt] * len(candidates))
        record["truth"] = {"physical": scores.physical.tolist(), "semantic": scores.semantic.tolist()}

    def score(self, candidates: Candidates, record: dict, *, name: str) -> None:
        values, cost = candidates.measure(self.searcher.scorer(name))
        found = {"values": values.tolist(), "chosen": choose(values)} | asdict(cost)
        record.setdefault("scorers", {})[name] = found

    def race(self, candidates: Candidates, record: dict) -> None:
        result, _ = self.searcher.race(candidates)
        record["race"] = {"chosen": result.winner, "rounds": result.rounds, "passes": result.passes}

    def prune(self, candidates: Candidates, record: dict, *, tensors: dict[str, Tensor]) -> None:
        """For each step and early scorer: who would have been finished, who chosen among them, and for what."""
        search, sampler, count = self.search, self.config.sampler, len(candidates)
        final = record["scorers"][search.chosen_by]
        keep = max(1, round(search.prune.keep * count))
        record["prune"] = []
        for step in search.prune.steps:
            told = (candidates.key, candidates.prompt, candidates.conditioning)
            early = self.searcher.candidates(*told, tensors[f"clean-{step}"])
            for name in search.prune.scorers:
                values, cost = early.measure(self.searcher.scorer(name, early=True))
                kept = promising(values, keep)
                chosen = min(kept, key=lambda index: final["values"][index])
                passes = count * sampling_passes(self.backbone, sampler, 0, step) + cost.passes
                passes += keep * sampling_passes(self.backbone, sampler, step) + round(final["passes"] * keep / count)
                found = {"step": step, "scorer": name, "kept": kept, "chosen": chosen, "passes": passes}
                record["prune"].append(found)

    def clips(self, candidates: Candidates, record: dict, *, job: Job) -> None:
        names = [f"{job.key}-{record['candidates'][:8]}-{index}.mp4" for index in range(len(candidates))]
        for name, frames in zip(names, candidates.clips, strict=True):
            write_clip(self.folder / "clips" / name, frames, self.config.video.fps)
        record["clips"] = names

    # Strategies

    def extend(self, jobs: Sequence[Job], strategy: Strategy, *, progress: bool) -> None:
        """Whatever is missing of a strategy's clips and scores, of several prompts at once; after `do`."""
        # The scorers that choose among a strategy's clips.
        judges = [name for name in self.experiment.scorers if name in (self.search.chosen_by, "surprise")]
        settings = [self.settings(name) for name in judges]
        values, made, parts = {}, {}, {}
        for job in jobs:
            record = self.record(job)
            values[job.key] = torch.tensor(record["scorers"][self.search.chosen_by]["values"])
            depends = [self.candidates_digest(job), strategy.depends_on(values[job.key])]
            if record["parts"].get(strategy.name) != digest([*depends, settings]):
                parts[job.key] = digest([*depends, settings])
            made[job.key] = digest(depends)
        bar = tqdm(total=len(parts), desc=strategy.name, unit="prompt", disable=not progress)
        for some in batches(jobs, strategy.at_once):
            if parts.keys().isdisjoint(job.key for job in some):
                continue
            told = [self.candidates(job, self.candidates_digest(job))[0].conditioning for job in some]
            # All are made together where any is in no file yet, as clips that are made together change each other by
            # rounding; those that are in a file stay.
            paths = [self.folder / "candidates" / f"{job.key}-{strategy.name}.safetensors" for job in some]
            stored = [read_tensors(path, made[job.key]) for path, job in zip(paths, some, strict=True)]
            fresh = strategy.make(some, told, [values[job.key] for job in some]) if None in stored else stored
            for number, job in enumerate(some):
                if stored[number] is None:
                    write_tensors(paths[number], fresh[number][0], made[job.key], fresh[number][1])
                if job.key not in parts:
                    continue
                (tensors, facts), record = stored[number] or fresh[number], self.record(job)
                clips = self.searcher.candidates(job.key, job.prompt, told[number], tensors["latents"])
                record[strategy.name] = found = facts | {"motion": motion_energy(clips.latents).tolist()}
                self.truth(clips, found)
                for name in judges:
                    self.score(clips, found, name=name)
                record["parts"][strategy.name] = parts[job.key]
                write_record(self.path(job), record)
                bar.update()
