"""The ablations: the objectives of the papers' comparisons, measured on simulated physics.

    python -m eval.experiments.ablation.run --folder runs/ablation --jobs 6   # run or continue all, then the table
    python -m eval.experiments.ablation.run --folder runs/ablation --rows base,sft,gdpo --seeds 0 --set optim.steps=100
    python -m eval.experiments.ablation.run --suite physics --folder runs/physics --jobs 6        # the physics terms
    python -m eval.experiments.ablation.run --suite robots --folder runs/robots_suite --jobs 4 --minutes 9 \
        --set backbone.path=runs/robots_base/model           # the same on the robots; again until it is done
    python -m eval.experiments.ablation.run --show eval/experiments/ablation/ablation.json   # an earlier run's table

Every step is one of the project's own commands with the suite's recipe, sandbox or robots, as a user would run it:

    <folder>/world_model/                      of the robots: their own V-JEPA 2 (`eval.experiments.world_model`)
    <folder>/groups-<seed>/, ...               data_pipeline.build: the sets of rows.GROUPS that rows need
    <folder>/<row>-<seed>/train/               train.gdpo or train.sft
    <folder>/<row>-<seed>/eval/                eval.run on prompts that no training set holds, other ones for each seed
    <folder>/<row>-<seed>/log.txt              what these printed
    <folder>/<row>-<seed>/result.json          written last: scores of every clip, seconds, digest of all settings
    <folder>/ablation.json, ablation.png       the table's numbers, and the figure

A run with a result of the same settings, model and groups is not repeated, one that was stopped continues from its
checkpoint, and one whose training would differ is moved to <folder>/replaced and starts anew. A failed run is reported
and does not stop the others. --jobs runs several side by side: the model is small, so one GPU serves several. When
--minutes are over, or by SIGTERM, what runs is asked to stop, and the same command continues. Exit status: 0 all is
done, 1 a run failed, 75 none failed but the minutes were over before.

Intervals are 95% bootstrap intervals over the clips of all seeds; each seed has prompts of its own, so every clip is
one observation. A planner's episodes are the same for every seed: there a mean over the seeds is one. Gains over the
base model and differences to another row are paired: same prompt, same initial noise, same episode. They say how sure
the mean over prompts is for these trained models; how much another training seed changes it is seen in the seeds' own
means, in ablation.json.
"""

import argparse
import json
import platform
import shlex
import signal
import sys
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from eval.experiments.ablation.plan import Plan, check_overrides, make_suite, read_recipe
from eval.experiments.ablation.report import draw, draw_passes, table
from eval.experiments.ablation.rows import SUITES, paper_figures
from eval.experiments.ablation.runner import OutOfTime, Processes, Run, run_all
from eval.experiments.ablation.suite import Column, Row, World
from eval.experiments.processes import add_minutes, deadline, unfinished
from eval.experiments.search.report import estimate
from train import entry
from train.files import write_text


def collect(plan: Plan, command: str) -> dict[str, Any]:
    """Means and intervals of every finished row, by today's settings."""
    suite, world = plan.content, plan.world
    runs = {
        name: {seed: found for seed in plan.seeds if (found := plan.result(row, seed))}
        for name, row in suite.rows.items()
    }
    finished = [result for by_seed in runs.values() for result in by_seed.values()]
    missing = {f"{result['row']}-{result['seed']}": count_missing(result) for result in finished}
    more = {"episodes": plan.episodes, "missing": {name: count for name, count in missing.items() if count}}
    return {
        "command": command,
        "recipe": world.recipe,
        "overrides": list(plan.overrides),
        "suite": plan.suite,
        "defaults": suite.defaults,
        "middle": suite.middle,
        "seeds": list(plan.seeds),
        "clips": plan.clips,
        **(more if world.may_fail else {}),
        "torch": sorted({result["torch"] for result in finished}),
        "device": sorted({result["device"] for result in finished}),
        "rows": [summarize(suite.rows[name], runs, world) for name, by_seed in runs.items() if by_seed],
    }


def own_scores(result: dict[str, Any]) -> dict[str, Any]:
    """Of a row itself, by column."""
    return result["scores"].get("tuned", result["scores"]["base"])


def count_missing(result: dict[str, Any]) -> dict[str, int]:
    """Clips or episodes without a score, by column, where there are some."""
    keyed = {name: values for name, values in own_scores(result).items() if isinstance(values, dict)}
    counts = {name: sum(value is None for value in values.values()) for name, values in keyed.items()}
    return {name: count for name, count in counts.items() if count}


def observe(scores: dict[str, Any], name: str, column: Column, seed: int) -> dict[Any, float]:
    """A column's scores by what is observed: an episode that all seeds have, or a clip of this seed."""
    values = scores.get(name, {})
    pairs = values.items() if isinstance(values, dict) else enumerate(values)
    return {key if column.repeated else (seed, key): value for key, value in pairs if value is not None}


def pooled(parts: Iterable[dict[Any, float]]) -> np.ndarray:
    """One number for each observation of all seeds: the mean over the seeds that have it."""
    found: dict[Any, list[float]] = {}
    for part in parts:
        for key, value in part.items():
            found.setdefault(key, []).append(value)
    return np.array([np.mean(values) for values in found.values()])


def summarize(row: Row, results: dict[str, dict[int, dict[str, Any]]], world: World) -> dict[str, Any]:
    """One row of the table from all results by row and seed; gains and differences are None where there is nothing to
    pair."""
    runs = results[row.name]

    def own(name: str, seed: int) -> dict[Any, float]:
        return observe(own_scores(runs[seed]), name, world.columns[name], seed)

    def less(others: dict[int, dict[str, Any]]) -> dict[str, Any]:
        """Differences to these scores by seed."""
        found = {}
        for name, column in world.columns.items():
            pairs = [(own(name, seed), observe(others[seed], name, column, seed)) for seed in runs if seed in others]
            found[name] = estimate(pooled({key: a[key] - b[key] for key in a if key in b} for a, b in pairs))
        return found

    def over(other: str) -> dict[str, Any]:
        others = results.get(other, {}) if other != row.name else {}
        return less({seed: own_scores(found) for seed, found in others.items()})

    base = {seed: found["scores"]["base"] for seed, found in results.get("base", {}).items()}
    bases = {seed: base.get(seed, found["scores"]["base"]) for seed, found in runs.items()}

    def means(seed: int) -> dict[str, float | None]:
        values = {name: list(own(name, seed).values()) for name in world.columns}
        return {name: float(np.mean(found)) if found else None for name, found in values.items()}

    return {
        "name": row.name,
        "label": row.label,
        "trainer": row.trainer,
        "overrides": list(row.overrides),
        "passes": row.passes,
        "sweep": dict(zip(("key", "value"), row.sweep, strict=True)) if row.sweep else None,
        "seeds": {str(seed): means(seed) | {"seconds": found["seconds"]} for seed, found in runs.items()},
        **{name: estimate(pooled(own(name, seed) for seed in runs)) for name in world.columns},
        "gain": less(bases if row.model != "base" else {}),
        "against": {"row": row.against, **over(row.against)},
        "against_sft": over("sft") if row.trainer else None,
        "paper": paper_figures(row),
    }


def make_plan(options: argparse.Namespace) -> Plan:
    import torch

    from train.backbones.loading import fingerprint

    world = make_suite(options.suite, ()).world
    check_overrides(options.set, world)
    clips = world.clips if options.clips is None else options.clips
    if min(clips, options.jobs, options.episodes) < 1 or not options.seeds:
        counts = f"--clips {clips} --jobs {options.jobs} --episodes {options.episodes} --seeds"
        raise ValueError(f"{counts}: each must be 1 or more")
    backbone = read_recipe(options.set, world)["backbone"]
    if not Path(backbone["path"]).expanduser().is_dir():
        remedy = "give --set backbone.path=..., a pipeline's folder"
        raise ValueError(f"backbone.path={backbone['path']} is no folder: {remedy} (eval/{world.recipe}/README.md)")
    on_gpu = torch.cuda.is_available()
    return Plan(
        folder=options.folder,
        seeds=tuple(dict.fromkeys(options.seeds)),
        suite=options.suite,
        clips=clips,
        episodes=options.episodes,
        overrides=tuple(options.set),
        model=fingerprint(backbone["family"], Path(backbone["path"])),
        torch=torch.__version__,
        device=torch.cuda.get_device_name() if on_gpu else f"CPU {platform.machine()}",
        on_gpu=on_gpu,
    )


def show(results: dict[str, Any], place: Path) -> None:
    """Print the table, and draw the pictures beside the file `place`."""
    print(table(results))
    if any(row["gain"]["physical"] for row in results["rows"]):
        draw(results, place.with_suffix(".png"))
        print(f"results  {place}\nfigure   {place.with_suffix('.png')}")
        if any(row.get("passes") for row in results["rows"]):
            cost = place.with_name(f"{place.stem}_passes.png")
            draw_passes(results, cost)
            print(f"figure   {cost}")


def main(argv: list[str] | None = None, run: Run | None = None) -> int:
    """The command line; returns the exit status. `run` stands in for the subprocesses."""
    began = time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="of all runs; one that was begun is continued")
    parser.add_argument("--suite", choices=SUITES, default="preference", help="which rows")
    parser.add_argument("--jobs", type=int, default=1, help="runs side by side")
    parser.add_argument("--rows", type=lambda text: text.split(","), default=[], help="a,b,...; default: all")
    parser.add_argument("--seeds", type=lambda text: [*map(int, text.split(","))], default=[0, 1, 2], help="a,b,...")
    parser.add_argument("--clips", type=int, help="held-out prompts per seed; default: 512 scenes, or 128 of robots")
    parser.add_argument("--episodes", type=int, default=20, help="of each task, where there is a planner")
    add_minutes(parser)
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="in every run")
    parser.add_argument("--show", type=Path, help="only print and draw this ablation.json")
    arguments = sys.argv[1:] if argv is None else argv
    options = parser.parse_args(arguments)
    until, stopped = deadline(began, options.minutes), False
    if options.show:
        results, failed = json.loads(options.show.read_text(encoding="utf-8")), {}
        place = options.show
    elif options.folder:
        plan = make_plan(options)
        processes = Processes(options.jobs)
        rows = plan.content.rows
        if unknown := [name for name in options.rows if name not in rows]:
            raise ValueError(f"--rows {','.join(unknown)}: not known; known: {', '.join(rows)}")
        chosen = [row for name, row in rows.items() if not options.rows or name in options.rows]
        for row in (row for row in chosen if row.start and rows[row.start] not in chosen):
            if missing := [seed for seed in plan.seeds if plan.result(rows[row.start], seed) is None]:
                raise ValueError(
                    f"--rows {row.name} needs {row.start}, unfinished for seed {missing[0]}: name it as well"
                )
        seconds = min(until - time.monotonic(), threading.TIMEOUT_MAX)
        try:
            failed = run_all(plan, chosen, run or processes.run, processes.stop, options.jobs, seconds)
        except KeyboardInterrupt:
            print("stopped; run the same command to continue", file=sys.stderr)
            return 130
        except OutOfTime as over:
            failed, stopped = over.failed, True
        results = collect(plan, f"python -m eval.experiments.ablation.run {shlex.join(arguments)}")
        place = plan.folder / "ablation.json"
        write_text(place, json.dumps(results, indent=1) + "\n")
    else:
        raise ValueError("give --folder to run the ablation, or --show with an ablation.json")
    if results["rows"] or not stopped:
        show(results, place)
    for name, why in failed.items():
        print(f"FAILED   {name}: {why.splitlines()[0]}", file=sys.stderr)
    status = unfinished(began) if stopped else 0
    return 1 if failed else status


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a scheduler's stop: trainers save their step
    entry.run(lambda: sys.exit(main()))
