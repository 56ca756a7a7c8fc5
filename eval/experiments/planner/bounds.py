"""What a planner can reach in the simulator, without a world model: success of

    expert      the scripted expert without faults
    futures     the inverse dynamics model on true futures: the expert's, drawn from the state that was reached
    frozen      the same model on a picture that stands still
    random      actions drawn evenly from [-1, 1]

each from the same initial states, by the environment's own flag within an episode (`eval.robots.planning`).

    python -m eval.experiments.planner.bounds --folder runs/planner --tasks push,drawer-open --episodes 20

Every episode is a line of episodes.jsonl below the folder; a run that was stopped continues (with other tasks, clips,
steps or seed, or another inverse_dynamics.safetensors in the folder, it begins anew beside the old lines). An episode
that fails in the simulator is listed with its error and counts as none.
"""

import argparse
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from eval.report.intervals import wilson
from eval.robots.demonstrations import check_video
from eval.robots.episodes import processes
from eval.robots.inverse_dynamics import InverseDynamics, Settings
from eval.robots.planning import (
    DECODED,
    EXPERT,
    HORIZON,
    Plan,
    Planner,
    imagining,
    initial_states,
    inverse_dynamics,
    play,
)
from eval.robots.tasks import TASKS
from train import entry
from train.clips import VideoConfig
from train.files import lock, seed_of, write_text

VIDEO = VideoConfig(height=96, width=96, num_frames=33, fps=20.0)


def build_planners(model: InverseDynamics, skip: int) -> dict[str, Planner]:
    def random(looks):
        seeds = (seed_of("robots", "random", look.listed.name, look.step) for look in looks)
        return [Plan(np.random.default_rng(seed).uniform(-1, 1, (HORIZON * skip, 4))) for seed in seeds]

    return {
        "expert": EXPERT,
        "futures": imagining(lambda looks: [look.frames for look in looks], model, skip, future=True),
        "frozen": imagining(lambda looks: [look.frames.repeat(DECODED, axis=0) for look in looks], model, skip),
        "random": Planner(random),
    }


def table(rows: list[dict[str, Any]], tasks: list[str]) -> str:
    planners = list(dict.fromkeys(row["planner"] for row in rows))
    lines = [f"{'task':<16}" + "".join(f"{planner:>24}" for planner in planners)]
    for task in [*tasks, "all"]:
        cells = []
        for planner in planners:
            own = [row["success"] for row in rows if row["planner"] == planner and task in (row["task"], "all")]
            known = [success for success in own if success is not None]
            cells.append(f"{str(wilson(sum(known), len(known))) if known else 'none':>24}")
        lines.append(f"{task:<16}" + "".join(cells))
    failed = [row for row in rows if row["success"] is None]
    lines += [f"failed: {row['task']} {row['index']} {row['planner']}: {row['error']}" for row in failed]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="of all episodes; one that was begun is continued")
    parser.add_argument("--tasks", default=",".join(TASKS), help="a,b,...; default: all")
    parser.add_argument("--episodes", type=int, default=20, help="of each task and planner")
    parser.add_argument("--clips", type=int, default=1000, help="demonstrations that the inverse dynamics model sees")
    parser.add_argument("--steps", type=int, default=Settings.steps, help="of its training")
    parser.add_argument("--seed", type=int, default=0, help="of initial states and training")
    given = parser.parse_args(argv)
    tasks, size, settings = given.tasks.split(","), os.cpu_count() or 1, Settings(steps=given.steps)
    if unknown := set(tasks) - TASKS.keys():
        raise ValueError(f"--tasks {', '.join(sorted(unknown))}: choose out of {', '.join(TASKS)}")
    torch.set_num_threads(1)
    with lock(given.folder), processes(size) as simulators:
        model, made_from = inverse_dynamics(
            given.folder, tasks, given.clips, settings, VIDEO, seed=given.seed, device="cpu"
        )
        path = given.folder / "episodes.jsonl"
        rows = list(map(json.loads, path.read_text(encoding="utf-8").splitlines())) if path.exists() else []
        known = {(row["planner"], row["name"]) for row in rows if row.get("made_from") == made_from}
        states = initial_states(tasks, given.episodes, given.seed)
        for name, planner in build_planners(model, check_video(VIDEO)).items():
            todo = [one for one in states if (name, one.name) not in known]
            for start in tqdm(range(0, len(todo), size), desc=name, unit=f"{size} episodes"):
                part = todo[start : start + size]
                for one, outcome in zip(part, play(part, planner, VIDEO, simulators), strict=True):
                    row = {"task": one.task, "index": one.index, "planner": name, "name": one.name}
                    row |= {"made_from": made_from, "success": outcome if isinstance(outcome, bool) else None}
                    rows.append(row | ({} if isinstance(outcome, bool) else {"error": str(outcome)}))
                write_text(path, "".join(json.dumps(row) + "\n" for row in rows))
    print(table([row for row in rows if row.get("made_from") == made_from], tasks))


if __name__ == "__main__":
    entry.run(main)
