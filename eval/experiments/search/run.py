"""Search by experiment: which scorer finds the candidate that a judge prefers, and for how much compute?

    accelerate launch --module eval.experiments.search.run recipe=sandbox
    python -m eval.experiments.search.run recipe=sandbox search_experiment.clips=48 search.num_candidates=8 [--dry-run]
    python -m eval.experiments.search.run recipe=sandbox search_experiment.share=2/8   # then one without share

    <folder>/candidates/, prompts/    latents, and what each scorer said; see `eval.experiments.search.store`
                                      also latents of clips that were refined or guided; see `work`
    <folder>/clips/                   the clips of the first prompts
    <folder>/results.json, table.txt  means with 95% bootstrap intervals, settings, compute
    <folder>/index.html               candidates side by side, their scores, the chosen one marked; for any browser

N candidates for each held-out prompt of the sandbox, made once and shared by all scorers, each scored by every scorer,
all held against the sandbox judge. Every rank takes a share of the prompts. What is there with the same settings is not
made again: a run that was stopped continues, and a scorer that is added to the list is all that is computed. A small
model leaves a GPU waiting for Python: processes with a `search_experiment.share` each work side by side on it.
"""

import json
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from tqdm import tqdm

import recipes
from eval.config import ClipsConfig
from eval.experiments.search import report, strategy_report
from eval.experiments.search.work import Job, Work
from eval.prompts import make_key
from eval.sandbox.splits import list_clips
from eval.search.searcher import check_batches, check_scorers, check_whole_passes
from train import entry
from train.files import lock, render, write_text
from train.parallel import any_rank

PAGE = Path(__file__).with_name("page.html")  # candidates side by side; for any browser, without a server
SEEDS_A_PROMPT = 10_000  # so that more candidates add to fewer


@dataclass
class ExperimentConfig:
    folder: str = "${output}/search"  # everything goes here
    share: str = ""  # "2/8": only the second of eight shares of the prompts, without a table, beside other processes
    clips: int = 256  # held-out prompts, of all scenes
    seed: int = 0  # of the held-out scenes
    lora: str = ""  # search with this LoRA or full weights attached; empty: the base model
    scorers: list[str] = field(  # keys of eval.search.scorers.SCORERS
        default_factory=lambda: ["random", "most_motion", "proprio_hybrid", "residual_per_motion"]
    )
    shown: int = 24  # prompts on the page


@dataclass
class Config(ClipsConfig):
    seed: int = 0  # of the candidates' noise
    search_experiment: ExperimentConfig = field(default_factory=ExperimentConfig)


def main(argv: list[str] | None = None) -> dict[str, Any] | None:
    config = recipes.load(Config, argv)
    check(config)
    search, experiment = config.search, config.search_experiment
    config.sampler.check()
    check_whole_passes(config.sampler)
    with entry.launched("search") as accelerator:
        jobs, results = list_jobs(config), None
        if not config.dry_run:
            task = experiment.share.replace("/", "-of-")  # shares of the prompts share the folder
            with lock(experiment.folder, task=task) if accelerator.is_main_process else nullcontext():
                results = run(config, jobs, accelerator)
        elif accelerator.is_main_process:
            clips = len(jobs) * search.num_candidates
            print(f"{clips} candidates of {len(jobs)} prompts, {config.sampler.steps} steps each")
            print(f"scorers: {', '.join(experiment.scorers)}")
            refined = (search.refine.best + 1) * (search.refine.best > 0)
            print(f"refined: at most {refined} clips per prompt, guided: {search.guidance.candidates}")
    return results


def run(config: Config, jobs: Sequence[Job], accelerator: Accelerator) -> dict[str, Any] | None:
    """Make on all ranks what is missing; results, table and page on the main process."""
    rank, world = accelerator.process_index, accelerator.num_processes
    work, experiment, chosen_by = Work(config, accelerator.device), config.search_experiment, config.search.chosen_by
    mine = share_of(jobs, experiment.share)[rank::world]
    for job in tqdm(mine, desc="prompts", unit="prompt", disable=rank > 0):
        work.do(job)
    for strategy in work.strategies:
        work.extend(mine, strategy, progress=rank == 0)
    any_rank(False, accelerator.device)  # an all-reduce, so all are done
    if rank or experiment.share:
        return None
    folder = Path(experiment.folder)
    records = [work.record(job) for job in jobs]
    results = report.results(records, experiment.scorers, chosen_by)
    results |= {"strategies": strategy_report.rows(records, chosen_by)}
    results |= {"settings": recipes.redacted(asdict(config))}
    table = f"{report.table(results)}\n\n{strategy_report.table(results['strategies'])}".rstrip()
    write_text(folder / "results.json", json.dumps(results, indent=1) + "\n")
    write_text(folder / "table.txt", table + "\n")
    shown = {"records": records[: experiment.shown], "results": results, "video": config.video}
    write_text(folder / "index.html", render(PAGE, **shown, order=report.order, show=report.show))
    print(f"{table}\n\nresults {folder / 'results.json'}\npage    {folder / 'index.html'}")
    return results


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
    count, first = config.search.num_candidates, config.seed * 10**9
    return [
        Job(
            number,
            make_key(number, clip.prompt),
            clip.prompt,
            [first + number * SEEDS_A_PROMPT + i for i in range(count)],
        )
        for number, clip in enumerate(listed)
    ]


def check(config: Config) -> None:
    """Refuse settings that cannot work, naming key, value and remedy."""
    search, experiment = config.search, config.search_experiment
    check_scorers({"scorers": experiment.scorers}, config.sampler, "search_experiment")
    check_scorers({"chosen_by": [search.chosen_by], "prune.scorers": search.prune.scorers}, config.sampler)
    check_batches(search)
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


if __name__ == "__main__":
    entry.run(main)
