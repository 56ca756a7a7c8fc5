"""What a planner can reach in the simulator, without a world model: success of

    expert      the scripted expert without faults
    futures     the inverse dynamics model on true futures: the expert's, drawn from the state that was reached
    frozen      the same model on a picture that stands still
    random      actions drawn evenly from [-1, 1]

each from the same initial states, by the environment's own flag within an episode.

    python -m eval.experiments.planner.bounds --folder runs/planner --tasks push,drawer-open --episodes 20

WorldArena's protocol: imagine HORIZON frames, decode their actions, execute them, begin again. Every episode is a line
of episodes.jsonl below the folder; a run that was stopped continues. An episode that fails in the simulator is listed
with its error and counts as none.
"""

import argparse
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from eval.report.intervals import wilson
from eval.robots.demonstrations import EPISODE, check_video, list_demonstrations
from eval.robots.inverse_dynamics import InverseDynamics, Settings, train
from eval.robots.render import Camera, camera
from eval.robots.simulators import SimulatorError, shared
from eval.robots.tasks import TASKS
from eval.robots.world import World
from train import entry
from train.clips import VideoConfig
from train.files import atomic, lock, seed_of, write_text

PLANNERS = ("expert", "futures", "frozen", "random")
HORIZON = 8  # frames that are imagined and executed before the next look


@contextmanager
def imagined(world: World) -> Iterator[None]:
    """What is done inside has not happened afterwards."""
    mujoco, env = world.mujoco, world.env
    kind = mujoco.mjtState.mjSTATE_INTEGRATION
    state = np.empty(mujoco.mj_stateSize(env.model, kind))
    mujoco.mj_getState(env.model, env.data, state, kind)
    own, observation = dict(vars(env)), world.observation  # an environment replaces its attributes, it changes none
    try:
        yield
    finally:
        mujoco.mj_setState(env.model, env.data, state, kind)
        mujoco.mj_forward(env.model, env.data)
        vars(env).update(own)
        world.observation = observation


def plan(planner: str, world: World, view: Camera, model: InverseDynamics, skip: int, random: Any) -> np.ndarray:
    """The actions (n, 4) of the next control steps."""
    steps = HORIZON * skip
    if planner == "random":
        return random.uniform(-1, 1, (steps, 4))
    frames = [view.frame(*world.pose())]
    with imagined(world):
        actions = []
        for step in range(steps):
            actions.append(world.expert())
            world.step(actions[-1])
            if planner == "futures" and (step + 1) % skip == 0:
                frames.append(view.frame(*world.pose()))
    if planner == "expert":
        return np.stack(actions)
    frames = frames if planner == "futures" else frames * (HORIZON + 1)
    return model.decode(np.stack(frames)).repeat(skip, axis=0)


def run_episode(planner: str, task: str, index: int, model: InverseDynamics, video: VideoConfig, seed: int) -> bool:
    """Whether the task was solved at any moment of an episode."""
    own = seed_of("robots", "planner", task, seed, index)
    world, random = World(task, own, "red"), np.random.default_rng(own)
    with camera(world, video.height, video.width) as view:
        done = 0
        while done < EPISODE:
            for action in plan(planner, world, view, model, check_video(video), random):
                done += 1
                if world.step(action)[1]:
                    return True
    return False


def prepare(folder: Path, tasks: list[str], count: int, settings: Settings, video: VideoConfig, seed: int):
    """The trained inverse dynamics model, made from `count` demonstrations of the pool where it is not there yet."""
    path, model = folder / "inverse_dynamics.safetensors", InverseDynamics(video.height, video.width)
    if not path.exists():
        listed, frames, actions = list_demonstrations(tasks, "pool", seed, range(count)), [], []
        for number, one in enumerate(tqdm(listed, desc="demonstrations", unit="clip")):
            try:
                made = shared().get(one, video, then=listed[number + 1 : number + 4])
            except SimulatorError as error:
                print(f"left out {one.name}: {error}")
                continue
            frames.append(torch.from_numpy(made.frames))
            actions.append(torch.from_numpy(made.actions))
        trained = train(torch.stack(frames), torch.stack(actions), settings, seed=seed)
        with atomic(path) as aside:
            save_file(trained.state_dict(), aside)
    model.load_state_dict(load_file(path))
    return model.eval()


def table(rows: list[dict[str, Any]], tasks: list[str]) -> str:
    lines = [f"{'task':<16}" + "".join(f"{planner:>24}" for planner in PLANNERS)]
    for task in [*tasks, "all"]:
        cells = []
        for planner in PLANNERS:
            own = [row["success"] for row in rows if row["planner"] == planner and task in (row["task"], "all")]
            known = [success for success in own if success is not None]
            cells.append(f"{str(wilson(sum(known), len(known))) if known else 'none':>24}")
        lines.append(f"{task:<16}" + "".join(cells))
    failed = [row for row in rows if row["success"] is None]
    lines += [f"failed: {row['task']} {row['index']} {row['planner']}: {row['error']}" for row in failed]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--tasks", default=",".join(TASKS))
    parser.add_argument("--episodes", type=int, default=20, help="of each task and planner")
    parser.add_argument("--clips", type=int, default=300, help="demonstrations that the inverse dynamics model sees")
    parser.add_argument("--steps", type=int, default=Settings.steps, help="of its training")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(argv)
    tasks, video = given.tasks.split(","), VideoConfig(height=96, width=96, num_frames=33, fps=20.0)
    if unknown := set(tasks) - TASKS.keys():
        raise ValueError(f"--tasks {', '.join(sorted(unknown))}: choose out of {', '.join(TASKS)}")
    torch.set_num_threads(1)
    with lock(given.folder):
        model = prepare(given.folder, tasks, given.clips, Settings(steps=given.steps), video, given.seed)
        path = given.folder / "episodes.jsonl"
        rows = list(map(json.loads, path.read_text(encoding="utf-8").splitlines())) if path.exists() else []
        known = {(row["task"], row["index"], row["planner"]) for row in rows}
        work = [(task, index, one) for index in range(given.episodes) for task in tasks for one in PLANNERS]
        for task, index, planner in tqdm([one for one in work if one not in known], unit="episode"):
            row = {"task": task, "index": index, "planner": planner, "success": None}
            try:
                row["success"] = run_episode(planner, task, index, model, video, given.seed)
            except Exception as error:  # of the simulator, whatever it is
                row["error"] = f"{type(error).__name__}: {error}"
            rows.append(row)
            write_text(path, "".join(json.dumps(row) + "\n" for row in rows))
    print(table(rows, tasks))


if __name__ == "__main__":
    entry.run(main)
