"""Search by experiment: which scorer finds the candidate that a judge prefers, and for how much compute?

    accelerate launch --module eval.experiments.search.run recipe=sandbox
    python -m eval.experiments.search.run recipe=sandbox search.sandbox.clips=48 search.num_candidates=8 [--dry-run]
    python -m eval.experiments.search.run recipe=sandbox search.share=2/8   # one of eight; then one without share

    <folder>/candidates/, prompts/    latents, and what each scorer said; see `eval.experiments.search.store`
                                      also latents of clips that were refined or guided; see `eval.search.strategies`
    <folder>/clips/                   the clips of the first prompts
    <folder>/results.json, table.txt  means with 95% bootstrap intervals, settings, compute
    <folder>/index.html               candidates side by side, their scores, the chosen one marked; for any browser

N candidates for each held-out prompt of the sandbox, made once and shared by all scorers, each scored by every scorer,
all held against the sandbox judge. Every rank takes a share of the prompts. What is there with the same settings is not
made again: a run that was stopped continues, and a scorer that is added to the list is all that is computed. A small
model leaves a GPU waiting for Python: processes with a `search.share` each work side by side on it.
"""

import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from tqdm import tqdm

import recipes
from eval.benchmarks import sandbox
from eval.experiments.search import page, report, strategy_report
from eval.experiments.search.store import read_record, read_tensors, write_record, write_tensors
from eval.prompts import make_key
from eval.search.best_of_n import RACING, batches, decoder, run_race
from eval.search.candidates import Candidates, Scorer, choose
from eval.search.config import SearchConfig
from eval.search.pruning import advance, begin, finish, promising, sampling_passes
from eval.search.scorers import SCORERS, SETTINGS
from eval.search.scorers.most_motion import motion_energy
from eval.search.strategies import Guidance, Item, Made, Refinement
from eval.search.world_model import WorldModel
from train import entry
from train.backbones import load_backbone
from train.backbones.base import Backbone, BackboneConfig, Conditioning
from train.checkpoint import attach_trained, weights_path
from train.clips import VideoConfig, write_clip
from train.files import digest, lock, sha256
from train.parallel import any_rank
from train.sampling import SamplerConfig

SEEDS_A_PROMPT = 10_000  # so that more candidates add to fewer


@dataclass
class Config:
    recipe: str = ""  # name or path of a recipe
    output: str = "runs/default"  # everything goes below this folder
    seed: int = 0  # of the candidates' noise
    dry_run: bool = False  # print what would be made and stop
    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    video: VideoConfig = field(default_factory=VideoConfig)
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    search: SearchConfig = field(default_factory=SearchConfig)


@dataclass(frozen=True)
class Job:
    """One prompt with its candidates' seeds."""

    number: int
    key: str
    prompt: str
    seeds: list[int]


def main(argv: list[str] | None = None) -> dict[str, Any] | None:
    config = recipes.load(Config, argv)
    check(config)
    with entry.launched("search") as accelerator:
        jobs, results = list_jobs(config), None
        if not config.dry_run:
            task = config.search.share.replace("/", "-of-")  # shares of the prompts share the folder
            with lock(config.search.folder, task=task) if accelerator.is_main_process else nullcontext():
                results = search(config, jobs, accelerator)
        elif accelerator.is_main_process:
            clips = len(jobs) * config.search.num_candidates
            print(f"{clips} candidates of {len(jobs)} prompts, {config.sampler.steps} steps each")
            print(f"scorers: {', '.join(config.search.scorers)}")
            refined = (config.search.refine.best + 1) * (config.search.refine.best > 0)
            print(f"refined: at most {refined} clips a prompt, guided: {config.search.guidance.candidates}")
    return results


def search(config: Config, jobs: Sequence[Job], accelerator: Accelerator) -> dict[str, Any] | None:
    """Make on all ranks what is missing; results, table and page on the main process."""
    rank, world = accelerator.process_index, accelerator.num_processes
    work = Work(config, accelerator.device)
    mine = share_of(jobs, config.search.share)[rank::world]
    for job in tqdm(mine, desc="prompts", unit="prompt", disable=rank > 0):
        work.do(job)
    for strategy in work.strategies:
        work.extend(mine, strategy, progress=rank == 0)
    any_rank(False, accelerator.device)  # an all-reduce, so all are done
    if rank or config.search.share:
        return None
    folder = Path(config.search.folder)
    records = [work.record(job) for job in jobs]
    results = report.results(records, config.search.scorers, config.search.chosen_by)
    results |= {"strategies": strategy_report.rows(records, config.search.chosen_by)}
    results |= {"settings": recipes.redacted(asdict(config))}
    table = f"{report.table(results)}\n\n{strategy_report.table(results['strategies'])}".rstrip()
    report.write(folder, results, table)
    page.write(folder, records[: config.search.shown], results, config.video)
    print(f"{table}\n\nresults {folder / 'results.json'}\npage    {folder / 'index.html'}")
    return results


class Work:
    """One rank's share: network, scorers and files."""

    def __init__(self, config: Config, device: torch.device):
        self.config, self.folder = config, Path(config.search.folder)
        self.backbone: Backbone = load_backbone(config.backbone, device)
        self.lora = ""
        if config.search.lora:
            attach_trained(config.search.lora, self.backbone.experts, fingerprint=self.backbone.fingerprint)
            self.lora = sha256(weights_path(config.search.lora))
        self.scorers = self._build(config.search, config.search.scorers)
        early = replace(config.search.residuals, draws=config.search.prune.draws)
        self.early_scorers = self._build(replace(config.search, residuals=early), config.search.prune.scorers)
        self.decode = decoder(self.backbone, config.search.batch_size)
        self.negative = None
        if sampling_passes(self.backbone, config.sampler) > config.sampler.steps:  # some step is guided
            self.negative = Conditioning(self.backbone.encode_text([config.sampler.negative_prompt]))
        self.strategies = self._strategies(config.search)

    def _strategies(self, search: SearchConfig) -> list[Refinement | Guidance]:
        shared = (self.backbone, self.config.video, self.config.sampler, self.negative)
        found: list[Refinement | Guidance] = []
        if search.refine.best:
            found.append(Refinement(search.refine, *shared))
        if search.guidance.candidates:
            model = WorldModel(search.surprise.path, self.backbone.device)
            found.append(Guidance(search.guidance, search.surprise, model, *shared))
        return found

    def _build(self, config: SearchConfig, names: Sequence[str]) -> dict[str, Scorer]:
        return {name: SCORERS[name](config, self.backbone, self.config.video.fps) for name in names}

    # What files depend on

    def candidates_digest(self, job: Job) -> str:
        config = self.config
        settings = [asdict(config.sampler), asdict(config.video), self.backbone.fingerprint, config.backbone.dtype]
        return digest([*settings, self.lora, job.prompt, job.seeds, config.search.prune.steps])

    def settings(self, name: str) -> dict[str, Any]:
        """What a scorer's values depend on, beside the candidates."""
        found = asdict(self.config.search)
        found["residuals"].pop("batch_size")
        return {"scorer": name} | {key: found[key] for key in SETTINGS.get(name, ())}

    def path(self, job: Job) -> Path:
        return self.folder / "prompts" / f"{job.key}.json"

    def record(self, job: Job) -> dict[str, Any]:
        """What is known of the prompt with these candidates, without what was asked for in another run only."""
        record, wanted = read_record(self.path(job), self.candidates_digest(job)), self._parts(job)
        kept = {*wanted, *[strategy.name for strategy in self.strategies]}
        for name in {"race", "prune", Refinement.name, Guidance.name} - kept:
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
        makers = {"truth": self.truth, "clips": self.clips, "race": self.race, "prune": self.prune}
        for name in todo:
            make = makers.get(name) or partial(self.score, name=name.removeprefix("scorer "))
            make(candidates, record, tensors=tensors, job=job)
            record["parts"][name] = parts[name]
            write_record(self.path(job), record)

    def _parts(self, job: Job) -> dict[str, str]:
        """Parts of the record, in the order of the work, and the digests of their settings."""
        search = self.config.search
        parts = {"truth": digest("sandbox judge")}
        parts |= {f"scorer {name}": digest(self.settings(name)) for name in self.scorers}
        chosen = self.settings(search.chosen_by)
        if search.chosen_by in RACING:
            parts["race"] = digest([chosen, asdict(search.race)])
        if search.prune.steps:
            looks = [self.settings(name) for name in search.prune.scorers]
            parts["prune"] = digest([chosen, looks, asdict(search.prune)])
        if job.number < search.shown:
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
        conditioning = Conditioning(tensors["text"])
        candidates = Candidates(
            job.key, job.prompt, tensors["latents"], conditioning, self.decode, self.config.video.fps
        )
        return candidates, tensors, facts

    def generate(self, job: Job) -> tuple[dict[str, Tensor], dict[str, Any]]:
        config, backbone, started = self.config, self.backbone, time.perf_counter()
        conditioning = self.backbone.condition([job.prompt])
        found: dict[str, list[Tensor]] = {}
        guided = {"negative": self.negative}
        for seeds in batches(job.seeds, config.search.batch_size):
            part = begin(backbone, conditioning, seeds, config.video, config.sampler, stop=1, **guided)
            for step in sorted(config.search.prune.steps):
                part = advance(backbone, conditioning, part, config.sampler, stop=step, **guided)
                found.setdefault(f"clean-{step}", []).append(part.clean.cpu())
            latents = finish(backbone, conditioning, part, config.sampler, **guided)
            found.setdefault("latents", []).append(latents.cpu())
        tensors = {name: torch.cat(parts) for name, parts in found.items()} | {"text": conditioning.text.cpu()}
        passes = len(job.seeds) * sampling_passes(backbone, config.sampler)
        return tensors, {"passes": passes, "seconds": round(time.perf_counter() - started, 4)}

    def truth(self, candidates: Candidates, record: dict, **_: Any) -> None:
        scores = sandbox.score(candidates.clips, [candidates.prompt] * len(candidates), self.config.video)
        record["truth"] = {"physical": scores.physical.tolist(), "semantic": scores.semantic.tolist()}

    def score(self, candidates: Candidates, record: dict, *, name: str, **_: Any) -> None:
        values, cost = candidates.measure(self.scorers[name])
        found = {"values": values.tolist(), "chosen": choose(values)} | asdict(cost)
        record.setdefault("scorers", {})[name] = found

    def race(self, candidates: Candidates, record: dict, **_: Any) -> None:
        result = run_race(candidates, self.scorers[self.config.search.chosen_by], self.config.search.race)
        record["race"] = {"chosen": result.winner, "rounds": result.rounds, "passes": result.passes}

    def prune(self, candidates: Candidates, record: dict, *, tensors: dict[str, Tensor], **_: Any) -> None:
        """For each step and early scorer: who would have been finished, who chosen among them, and for what."""
        search, sampler, count = self.config.search, self.config.sampler, len(candidates)
        final = record["scorers"][search.chosen_by]
        keep = max(1, round(search.prune.keep * count))
        record["prune"] = []
        for step in search.prune.steps:
            early = Candidates(
                candidates.key, candidates.prompt, tensors[f"clean-{step}"], candidates.conditioning, self.decode,
                candidates.fps,
            )  # fmt: skip
            for name in search.prune.scorers:
                values, cost = early.measure(self.early_scorers[name])
                kept = promising(values, keep)
                chosen = min(kept, key=lambda index: final["values"][index])
                passes = count * sampling_passes(self.backbone, sampler, 0, step) + cost.passes
                passes += keep * sampling_passes(self.backbone, sampler, step) + round(final["passes"] * keep / count)
                found = {"step": step, "scorer": name, "kept": kept, "chosen": chosen, "passes": passes}
                record["prune"].append(found)

    def clips(self, candidates: Candidates, record: dict, *, job: Job, **_: Any) -> None:
        names = [f"{job.key}-{record['candidates'][:8]}-{index}.mp4" for index in range(len(candidates))]
        for name, frames in zip(names, candidates.clips, strict=True):
            write_clip(self.folder / "clips" / name, frames, self.config.video.fps)
        record["clips"] = names

    # Strategies

    def extend(self, jobs: Sequence[Job], strategy: Refinement | Guidance, *, progress: bool) -> None:
        """Whatever is missing of a strategy's clips and scores, of several prompts at once; after `do`."""
        items = {job.key: self._item(job) for job in jobs}
        parts = {job.key: self._part(job, strategy, items[job.key]) for job in jobs}
        todo = {job.key for job in jobs if self.record(job)["parts"].get(strategy.name) != parts[job.key]}
        bar = tqdm(total=len(todo), desc=strategy.name, unit="prompt", disable=not progress)
        for some in batches(jobs, strategy.prompts_at_once):
            if todo.isdisjoint(job.key for job in some):
                continue
            for job, (tensors, facts) in zip(some, self._made(some, strategy, items), strict=True):
                if job.key not in todo:
                    continue
                record = self.record(job)
                record[strategy.name] = facts | self._judged(job, tensors["latents"], items[job.key])
                record["parts"][strategy.name] = parts[job.key]
                write_record(self.path(job), record)
                bar.update()

    def _item(self, job: Job) -> Item:
        candidates, _, _ = self.candidates(job, self.candidates_digest(job))
        values = torch.tensor(self.record(job)["scorers"][self.config.search.chosen_by]["values"])
        return Item(candidates.conditioning, job.seeds, values)

    def _part(self, job: Job, strategy: Refinement | Guidance, item: Item) -> str:
        settings = [self.settings(name) for name in self._judges()]
        return digest([self.candidates_digest(job), strategy.depends_on(item), settings])

    def _judges(self) -> list[str]:
        """The scorers that choose among a strategy's clips."""
        return [name for name in self.scorers if name in (self.config.search.chosen_by, "surprise")]

    def _made(self, jobs: Sequence[Job], strategy: Refinement | Guidance, items: dict[str, Item]) -> list[Made]:
        """The strategy's clips of these prompts: all are made together where any is in no file yet, as clips that are
        made together change each other by rounding; those that are in a file stay."""
        folder, found = self.folder / "candidates", {}
        made = {job.key: digest([self.candidates_digest(job), strategy.depends_on(items[job.key])]) for job in jobs}
        for job in jobs:
            if stored := read_tensors(folder / f"{job.key}-{strategy.name}.safetensors", made[job.key]):
                found[job.key] = stored
        if len(found) < len(jobs):
            for job, one in zip(jobs, strategy.make([items[job.key] for job in jobs]), strict=True):
                if job.key not in found:
                    tensors, facts = found[job.key] = one
                    write_tensors(folder / f"{job.key}-{strategy.name}.safetensors", tensors, made[job.key], facts)
        return [found[job.key] for job in jobs]

    def _judged(self, job: Job, latents: Tensor, item: Item) -> dict[str, Any]:
        """What the judge and the choosing scorers say of a strategy's clips of one prompt."""
        clips = Candidates(job.key, job.prompt, latents, item.conditioning, self.decode, self.config.video.fps)
        found: dict[str, Any] = {"motion": motion_energy(latents).tolist()}
        self.truth(clips, found)
        for name in self._judges():
            self.score(clips, found, name=name)
        return found


def share_of(jobs: Sequence[Job], share: str) -> list[Job]:
    """The prompts of a share "i/n", i from 1; all of them for "". Raises ValueError for anything else."""
    if not share:
        return list(jobs)
    number, _, count = share.partition("/")
    if not (number.isdecimal() and count.isdecimal() and 1 <= int(number) <= int(count)):
        raise ValueError(f"search.share={share!r} is no share: use i/n with i from 1 to n, 2/8 for the second of eight")
    return list(jobs[int(number) - 1 :: int(count)])


def list_jobs(config: Config) -> list[Job]:
    texts = sandbox.texts(config.search.sandbox, config.video)
    count, first = config.search.num_candidates, config.seed * 10**9
    return [
        Job(number, make_key(number, text), text, [first + number * SEEDS_A_PROMPT + index for index in range(count)])
        for number, text in enumerate(texts)
    ]


def check(config: Config) -> None:
    """Refuse settings that cannot work, naming key, value and remedy."""
    search = config.search
    for key, names in (
        ("scorers", search.scorers),
        ("chosen_by", [search.chosen_by]),
        ("prune.scorers", search.prune.scorers),
        ("combined", search.combined),
    ):
        for name in names:
            if name not in SCORERS:
                raise ValueError(f"search.{key} names {name!r}, which is no scorer: use some of {', '.join(SCORERS)}")
    if "rank_sum" in search.combined:
        raise ValueError("search.combined names rank_sum itself: name others")
    if search.chosen_by not in search.scorers:
        raise ValueError(f"search.chosen_by={search.chosen_by!r} is not among search.scorers: add it there")
    if not 2 <= search.num_candidates <= SEEDS_A_PROMPT:
        raise ValueError(f"search.num_candidates={search.num_candidates}: use 2 to {SEEDS_A_PROMPT}")
    for key, size in (("", search), ("refine.", search.refine), ("guidance.", search.guidance)):
        if size.batch_size < 1:
            raise ValueError(f"search.{key}batch_size={size.batch_size}: use 1 or more")
    share_of([], search.share)
    if not 0 <= search.refine.best <= search.num_candidates or search.refine.steps < 1:
        raise ValueError(
            f"search.refine.best={search.refine.best}, search.refine.steps={search.refine.steps}: use 0 to"
            f" {search.num_candidates} candidates and 1 step or more"
        )
    if not 0 <= search.guidance.candidates <= search.num_candidates:
        raise ValueError(f"search.guidance.candidates={search.guidance.candidates}: use 0 to {search.num_candidates}")
    if search.guidance.candidates and not search.surprise.path:
        count = search.guidance.candidates
        raise ValueError(f"search.guidance.candidates={count} needs a world model: name it in search.surprise.path")
    if bad := [step for step in search.prune.steps if not 0 < step < config.sampler.steps]:
        raise ValueError(f"search.prune.steps has {bad[0]}, but sampling has {config.sampler.steps} steps")
    if not 0 < search.prune.keep <= 1:
        raise ValueError(f"search.prune.keep={search.prune.keep} must lie in (0, 1]")


if __name__ == "__main__":
    entry.run(main)
