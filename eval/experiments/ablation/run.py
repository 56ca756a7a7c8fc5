"""The ablations on the sandbox: the objectives of the papers' comparisons, measured on simulated physics.

    python -m eval.experiments.ablation.run --folder runs/ablation --jobs 6   # run or continue all, then the table
    python -m eval.experiments.ablation.run --folder runs/ablation --rows base,sft,gdpo --seeds 0 --set optim.steps=100
    python -m eval.experiments.ablation.run --suite physics --folder runs/physics --jobs 6        # the physics terms
    python -m eval.experiments.ablation.run --show eval/experiments/ablation/ablation.json   # an earlier run's table

Every step is one of the project's own commands with recipe=sandbox, as a user would run it:

    <folder>/groups-<seed>/, ...               data_pipeline.build: the sets of rows.GROUPS that rows need
    <folder>/<row>-<seed>/train/               train.gdpo or train.sft
    <folder>/<row>-<seed>/eval/                eval.run on prompts that no training set holds, other ones for each seed
    <folder>/<row>-<seed>/log.txt              what these printed
    <folder>/<row>-<seed>/result.json          written last: scores of every clip, seconds, digest of all settings
    <folder>/ablation.json, ablation.png       the table's numbers, and the figure

A run with a result of the same settings, model and groups is not repeated, one that was stopped continues from its
checkpoint, and one whose training would differ is moved to <folder>/replaced and starts anew. A failed run is reported
and does not stop the others. --jobs runs several side by side: the model is small, so one GPU serves several.

Intervals are 95% bootstrap intervals over the clips of all seeds; each seed has prompts of its own, so every clip is
one observation. Gains over the base model and differences to another row are paired: same prompt, same initial noise.
They say how sure the mean over prompts is for these trained models; how much another training seed changes it is seen
in the seeds' own means, in ablation.json.
"""

import argparse
import json
import platform
import shlex
import signal
import sys
from pathlib import Path
from typing import Any

import numpy as np

from eval.experiments.ablation.plan import RECIPE, SCORES, Plan, check_overrides, read_recipe
from eval.experiments.ablation.report import draw, draw_passes, table
from eval.experiments.ablation.rows import SUITES, Row, paper_figures
from eval.experiments.ablation.runner import Processes, Run, run_all
from eval.experiments.search.report import estimate
from train import entry
from train.files import write_text


def collect(plan: Plan, command: str) -> dict[str, Any]:
    """Means and intervals of every finished row, by today's settings."""
    suite = plan.make_suite()
    runs = {
        name: {seed: found for seed in plan.seeds if (found := plan.result(row, seed))}
        for name, row in suite.rows.items()
    }
    finished = [result for by_seed in runs.values() for result in by_seed.values()]
    return {
        "command": command,
        "recipe": RECIPE,
        "overrides": list(plan.overrides),
        "suite": plan.suite,
        "defaults": suite.defaults,
        "middle": suite.middle,
        "seeds": list(plan.seeds),
        "clips": plan.clips,
        "torch": sorted({result["torch"] for result in finished}),
        "device": sorted({result["device"] for result in finished}),
        "rows": [summarize(suite.rows[name], runs) for name, by_seed in runs.items() if by_seed],
    }


def summarize(row: Row, results: dict[str, dict[int, dict[str, Any]]]) -> dict[str, Any]:
    """One row of the table from all results by row and seed; gains and differences are None where there is nothing to
    pair."""
    runs = results[row.name]

    def own(result: dict[str, Any], name: str) -> np.ndarray:  # (clips,)
        return np.array(result["scores"].get("tuned", result["scores"]["base"])[name])

    def over(other: str) -> dict[str, Any]:
        others = results.get(other, {}) if other != row.name else {}
        shared = [seed for seed in runs if seed in others]
        return {
            name: estimate(np.concatenate([[], *(own(runs[seed], name) - own(others[seed], name) for seed in shared)]))
            for name in SCORES
        }

    base = {seed: found["scores"]["base"] for seed, found in results.get("base", {}).items()}
    gains = {
        name: [own(r, name) - base.get(seed, r["scores"]["base"])[name] for seed, r in runs.items() if row.trainer]
        for name in SCORES
    }
    return {
        "name": row.name,
        "label": row.label,
        "trainer": row.trainer,
        "overrides": list(row.overrides),
        "passes": row.passes,
        "sweep": dict(zip(("key", "value"), row.sweep, strict=True)) if row.sweep else None,
        "seeds": {
            str(seed): {name: float(own(r, name).mean()) for name in SCORES} | {"seconds": r["seconds"]}
            for seed, r in runs.items()
        },
        **{name: estimate(np.concatenate([own(r, name) for r in runs.values()])) for name in SCORES},
        "gain": {name: estimate(np.concatenate([[], *found])) for name, found in gains.items()},
        "against": {"row": row.against, **over(row.against)},
        "against_sft": over("sft") if row.trainer else None,
        "paper": paper_figures(row),
    }


def make_plan(options: argparse.Namespace) -> Plan:
    import torch

    from train.backbones.loading import fingerprint

    check_overrides(options.set)
    if options.clips < 1 or options.jobs < 1 or not options.seeds:
        raise ValueError(f"--clips {options.clips} --jobs {options.jobs} --seeds: each must be 1 or more")
    backbone = read_recipe(options.set)["backbone"]
    on_gpu = torch.cuda.is_available()
    return Plan(
        folder=options.folder,
        seeds=tuple(dict.fromkeys(options.seeds)),
        suite=options.suite,
        clips=options.clips,
        overrides=tuple(options.set),
        model=fingerprint(backbone["family"], Path(backbone["path"])),
        torch=torch.__version__,
        device=torch.cuda.get_device_name() if on_gpu else f"CPU {platform.machine()}",
        on_gpu=on_gpu,
    )


def main(argv: list[str] | None = None, run: Run | None = None) -> int:
    """The command line; returns the exit status. `run` stands in for the subprocesses."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="of all runs; one that was begun is continued")
    parser.add_argument("--suite", choices=SUITES, default="preference", help="which rows")
    parser.add_argument("--jobs", type=int, default=1, help="runs side by side")
    parser.add_argument("--rows", type=lambda text: text.split(","), default=[], help="a,b,...; default: all")
    parser.add_argument("--seeds", type=lambda text: [int(part) for part in text.split(",")], default=[0, 1, 2])
    parser.add_argument("--clips", type=int, default=512, help="held-out prompts per seed")
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="in every run")
    parser.add_argument("--show", type=Path, help="only print and draw this ablation.json")
    arguments = sys.argv[1:] if argv is None else argv
    options = parser.parse_args(arguments)
    if options.show:
        results, failed = json.loads(options.show.read_text(encoding="utf-8")), {}
        place = options.show
    elif options.folder:
        plan = make_plan(options)
        processes = Processes(options.jobs)
        rows = plan.make_suite().rows
        if unknown := [name for name in options.rows if name not in rows]:
            raise ValueError(f"--rows {','.join(unknown)}: not known; known: {', '.join(rows)}")
        chosen = [row for name, row in rows.items() if not options.rows or name in options.rows]
        try:
            failed = run_all(plan, chosen, run or processes.run, processes.stop, options.jobs)
        except KeyboardInterrupt:
            print("stopped; run the same command to continue", file=sys.stderr)
            return 130
        results = collect(plan, f"python -m eval.experiments.ablation.run {shlex.join(arguments)}")
        place = plan.folder / "ablation.json"
        write_text(place, json.dumps(results, indent=1) + "\n")
    else:
        raise ValueError("give --folder to run the ablation, or --show with an ablation.json")
    print(table(results))
    if any(row["trainer"] for row in results["rows"]):
        draw(results, place.with_suffix(".png"))
        print(f"results  {place}\nfigure   {place.with_suffix('.png')}")
        if any(row.get("passes") for row in results["rows"]):
            cost = place.with_name(f"{place.stem}_passes.png")
            draw_passes(results, cost)
            print(f"figure   {cost}")
    for name, why in failed.items():
        print(f"FAILED   {name}: {why.splitlines()[0]}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a scheduler's stop: trainers save their step
    entry.run(lambda: sys.exit(main()))
