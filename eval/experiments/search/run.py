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
from dataclasses import asdict
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from tqdm import tqdm

import recipes
from eval.experiments.search import report, strategy_report
from eval.experiments.search.config import Config, check, list_jobs, share_of
from eval.experiments.search.work import Job, Work
from train import entry
from train.files import lock, render, write_text
from train.parallel import any_rank

PAGE = Path(__file__).with_name("page.html")  # candidates side by side; for any browser, without a server


def main(argv: list[str] | None = None) -> dict[str, Any] | None:
    config = recipes.load(Config, argv)
    check(config)
    search, experiment = config.search, config.search_experiment
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
    shown = {"records": [record for record in records if "clips" in record], "results": results, "video": config.video}
    write_text(folder / "index.html", render(PAGE, **shown, order=report.order, show=report.show))
    print(f"{table}\n\nresults {folder / 'results.json'}\npage    {folder / 'index.html'}")
    return results


if __name__ == "__main__":
    entry.run(main)
