"""Planning in the simulator, WorldArena's action planner: look, imagine what comes, decode the actions between the
imagined frames, execute them, begin again, until success or EPISODE control steps.

    planner = imagining(imagine, inverse_dynamics(folder, tasks, ...), skip)
    with processes(8) as simulators:
        outcomes = play(initial_states(["push", "reach"], 8), planner, video, simulators)

All planners are compared from the same initial states; success is the environment's own flag.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from eval.robots.demonstrations import EPISODE, Listed, check_video, list_demonstrations
from eval.robots.episodes import EpisodeProcess
from eval.robots.inverse_dynamics import MOMENTS, InverseDynamics, Settings, read, train, write
from eval.robots.recordings import load_all, record
from eval.robots.simulators import SimulatorError
from train.clips import VideoConfig
from train.files import digest, seed_of, sha256

HORIZON = 8  # frames that are imagined and executed before the next look
GIVEN = "inverse_dynamics.safetensors"  # an inverse dynamics model that somebody put there
SHIPPED = Path(__file__).parent / "model" / GIVEN  # trained with the base model
DECODED = HORIZON + 2  # frames from which their actions are decoded: the current one, and one behind the last


@dataclass(frozen=True)
class Look:
    """What a planner knows of an episode when it plans."""

    listed: Listed  # task, instruction, and what tells the episode from others
    step: int  # control steps that were executed
    frames: np.ndarray  # (1, H, W, 3) uint8: what the camera sees; with the future behind it, where that was asked for
    actions: np.ndarray | None = None  # (n, 4) of that future: the expert's


@dataclass(frozen=True)
class Plan:
    """What follows from a look."""

    actions: np.ndarray  # (n, 4) in [-1, 1]
    imagined: np.ndarray | None = None  # (m + 1, H, W, 3) uint8, the current frame first, of planners that imagine


Imagine = Callable[[Sequence[Look]], Iterable[np.ndarray]]


@dataclass(frozen=True)
class Planner:
    """plan: of looks at several episodes the plan of each."""

    plan: Callable[[Sequence[Look]], Sequence[Plan]]
    future: bool = False  # whether looks hold the expert's true future


EXPERT = Planner(lambda looks: [Plan(look.actions) for look in looks], future=True)


@dataclass
class Film:
    """An episode to be watched: frames (H, W, 3) uint8 of what was imagined and of what its actions led to, of the same
    moments. The first is the initial state; at success the last executed one is of that control step."""

    imagined: list[np.ndarray] = field(default_factory=list)  # empty where the planner does not imagine
    executed: list[np.ndarray] = field(default_factory=list)

    def add(self, look: Look, plan: Plan, frames: np.ndarray) -> None:
        """frames (n, H, W, 3): what the simulator showed after this look."""
        if plan.imagined is not None:
            own = plan.imagined[1 if self.imagined else 0 : len(frames) + 1]
            self.imagined.extend(own.copy())  # else all that was imagined at this look would stay in memory
        self.executed.extend(frames if self.executed else [look.frames[0], *frames])


def imagining(imagine: Imagine, model: InverseDynamics, skip: int, *, future: bool = False) -> Planner:
    """imagine: of looks the frames (n + 1, H, W, 3) uint8 of each, the current one first; DECODED of them are of use.
    skip: control steps between two frames."""

    def plan(looks: Sequence[Look]) -> list[Plan]:
        return [Plan(model.decode(frames).repeat(skip, axis=0), frames) for frames in imagine(looks)]

    return Planner(plan, future)


def initial_states(tasks: Sequence[str], count: int, seed: int = 0) -> list[Listed]:
    """`count` episodes of each task, the tasks in turn, in a stream apart from all demonstrations."""
    return list_demonstrations(tasks, "planner", seed, range(count * len(tasks)))


def play(
    episodes: Sequence[Listed],
    planner: Planner,
    video: VideoConfig,
    simulators: Sequence[EpisodeProcess],
    films: Mapping[Listed, Film] | None = None,
) -> list[bool | SimulatorError]:
    """Whether each was solved at any moment, or how its simulator failed, which costs that episode alone.

    They are played side by side, each in one of `simulators`; planned at once for all that are not over. films: take in
    the frames of some of the episodes; what happens in these is the same without.
    """
    skip, horizon, films = check_video(video), horizon_of(video), films or {}
    outcomes: list[bool | SimulatorError] = [False] * len(episodes)

    def ask(command: str, given: Mapping[int, Mapping[str, Any]]) -> dict[int, dict[str, np.ndarray]]:
        """The answers by episode, of those whose simulators did not fail."""
        answers = {}
        for number, arguments in given.items():
            simulators[number].begin(command, **arguments)
        for number in given:
            try:
                answers[number] = simulators[number].result()
            except SimulatorError as error:
                outcomes[number] = error
        return answers

    worlds = {}
    for number, one in enumerate(episodes):
        seed = seed_of("robots", one.split, one.task, one.seed, one.index)
        worlds[number] = {"task": one.task, "seed": seed, "colour": one.colour}
        worlds[number] |= {"height": video.height, "width": video.width}
    playing = list(ask("open", worlds))
    for step in range(0, EPISODE, horizon * skip):
        asked = ("future", {"count": horizon + 1, "skip": skip}) if planner.future else ("frame", {})
        seen = ask(asked[0], dict.fromkeys(playing, asked[1]))
        looks = [Look(episodes[number], step, **arrays) for number, arrays in seen.items()]
        plans = planner.plan(looks) if looks else []
        planned = {number: (look, plan) for number, look, plan in zip(seen, looks, plans, strict=True)}
        chosen = {}
        for number, (look, plan) in planned.items():
            chosen[number] = {"actions": plan.actions[: min(horizon * skip, EPISODE - step)].tolist()}
            chosen[number] |= {"every": skip} if look.listed in films else {}
        for number, answer in (done := ask("act", chosen)).items():
            outcomes[number] = bool(answer["success"])
            if film := films.get(episodes[number]):
                film.add(*planned[number], answer["frames"])
        playing = [number for number in done if not outcomes[number]]
    return outcomes


def horizon_of(video: VideoConfig) -> int:
    """Frames that are imagined and executed at a look; of a shorter clip all."""
    return min(HORIZON, video.num_frames - 1)


def inverse_dynamics(
    folder: Path, tasks: Sequence[str], clips: int, settings: Settings, video: VideoConfig, *, seed: int, device: str
) -> tuple[InverseDynamics, str]:
    """The inverse dynamics model, and a digest of where it comes from: GIVEN in `folder`, or the SHIPPED one, where it
    suits tasks and video; else one trained on demonstrations of the pool, which `folder` keeps. Of several processes
    the first that is done gives it to all."""
    for path in (folder / GIVEN, SHIPPED):
        if (found := read(path, video, tasks)) is not None:
            return found.to(device), sha256(path)[:16]
    made_from = digest([list(tasks), clips, asdict(settings), asdict(video), seed, MOMENTS])[:16]
    path = folder / f"inverse_dynamics-{made_from}.safetensors"
    if not path.exists():
        recorded = record(folder / "demonstrations", list_demonstrations(tasks, "pool", seed, range(clips)), video)
        frames, actions = load_all([recorded])
        trained = train(frames, actions, settings, seed=seed, device=device)
        if not path.exists():
            write(path, trained, video, tasks)
    found = read(path, video, tasks)
    assert found is not None, path
    return found.to(device), made_from
