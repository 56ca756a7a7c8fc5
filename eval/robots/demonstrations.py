"""Demonstrations: clips of the scripted experts with all that is known of them, as endless numbered streams.

    train, heldout    the expert with a little noise, tried again with other positions until it succeeds
    anytime           as train, but a clip begins at any moment until success, every fourth at the first: what a planner
                      sees when it looks again
    pool              what one finds: half of it noisy and badly aimed, and failures that no instruction mentions

A clip depends on its task, stream, seed and number alone, so streams share no random numbers, and the n-th clip does
not depend on how many are asked for. Frames are taken at the simulator's own time: `video.fps` divides its 80 control
steps a second. A clip ends a moment after success where the episode is longer than the clip, so contact is in it.
"""

from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass

import numpy as np

from eval.robots import render, violations
from eval.robots.tasks import OBJECT_COLOURS, write_prompt
from eval.robots.world import CONTROL_RATE, Behaviour, Rollout, World
from train.clips import VideoConfig
from train.files import seed_of

SPLITS = ("train", "heldout", "anytime", "pool")
EPISODE = 200  # control steps in which an expert has to succeed
LONGEST = 500  # control steps that Meta-World lets an episode last
AFTER = 12  # control steps that a clip goes on after success, where the episode is longer than the clip
ATTEMPTS = 5  # of an expert that fails, outside of the pool


@dataclass(frozen=True)
class Listed:
    """One demonstration, without its frames."""

    task: str
    split: str
    seed: int
    index: int  # of the task in its stream
    colour: str
    prompt: str

    @property
    def name(self) -> str:
        """Of its clip: what tells it from all others."""
        return f"robots:{self.task}:{self.split}:{self.seed}:{self.index}"


@dataclass
class Demonstration:
    """T frames of H x W pixels, taken every `skip` control steps. Depth, layers and geoms are empty unless the truth is
    drawn."""

    frames: np.ndarray  # (T, H, W, 3) uint8
    actions: np.ndarray  # ((T - 1) * skip, 4) float32 in [-1, 1]
    observations: np.ndarray  # (T, 39) float32, the environment's state vector
    tracks: np.ndarray  # (T, 2, 2) float32: x and y in [0, 1] of the hand's and the object's middle
    success: np.ndarray  # () bool: the environment's own flag, until the last frame
    start: np.ndarray  # () int64: control step of the first frame
    depth: np.ndarray  # (T, H, W) float32 m along the camera's axis
    layers: np.ndarray  # (T, H, W) uint8 of render.BACKGROUND ... OBJECT
    geoms: np.ndarray  # (H, W) int16, of frame 0: which geom a pixel shows
    places: np.ndarray  # (T, G, 3) float32 m, of the geoms
    turns: np.ndarray  # (T, G, 3, 3) float32

    def follow(self, queries: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Tracks (T, N, 2) and visibility (T, N) of points (N, 2) given in frame 0; see `render.follow`."""
        return render.follow(queries, self.geoms, self.depth, self.layers, self.places, self.turns)


def check_video(video: VideoConfig) -> int:
    """Control steps between two frames. ValueError for a rate or length that demonstrations cannot have."""
    skip = round(CONTROL_RATE / video.fps)
    if skip < 1 or skip * video.fps != CONTROL_RATE:
        raise ValueError(f"video.fps={video.fps:g} does not divide the robots' 80 steps a second: use 40, 20, 16 or 10")
    if video.num_frames < 2:
        raise ValueError(f"video.num_frames={video.num_frames}: a robot's clip needs 2 frames or more")
    if (video.num_frames - 1) * skip + AFTER > LONGEST:
        most = 1 + (LONGEST - AFTER) // skip
        raise ValueError(f"video.num_frames={video.num_frames}: at {video.fps:g} fps a robot's clip has {most} at most")
    return skip


def list_demonstrations(tasks: Sequence[str], split: str, seed: int, numbers: Iterable[int]) -> list[Listed]:
    """Those of a stream with these numbers; the tasks take turns. Nothing is simulated."""
    found = []
    for number in numbers:
        task, index = tasks[number % len(tasks)], number // len(tasks)
        random = np.random.default_rng(seed_of("robots", "look", task, split, seed, index))
        colour, wording = OBJECT_COLOURS[random.integers(len(OBJECT_COLOURS))], int(random.integers(1 << 16))
        found.append(Listed(task, split, seed, index, colour, write_prompt(task, colour, wording)))
    return found


def demonstrate(
    listed: Listed, video: VideoConfig, *, drawn: str = "frames", violation: str | None = None, severity: float = 1.0
) -> Demonstration:
    """Simulate one demonstration and draw it. drawn: the "first" frame alone, all "frames", or the "truth" as well,
    depth and layers, at three times the cost.

    violation: a key of `violations.VIOLATIONS`, planted into what is drawn; actions and observations stay true.
    """
    skip = check_video(video)
    last = (video.num_frames - 1) * skip
    world, rollout = _roll_out(listed, last)
    start = _first_step(listed, rollout, last)
    moments = start + skip * np.arange(video.num_frames)
    places, turns = rollout.places[moments], rollout.turns[moments]
    if violation is not None:
        random = np.random.default_rng(seed_of("robots", "violation", *astuple(listed)))
        places, turns = violations.plant(violation, severity, places, turns, world, random)
    made: list[tuple[np.ndarray, ...]] = []
    with render.camera(world, video.height, video.width) as camera:
        for moment in zip(places[: 1 if drawn == "first" else None], turns, strict=False):
            frame = camera.frame(*moment)
            made.append((frame, *camera.truth()) if drawn == "truth" else (frame,) + (np.zeros(0),) * 3)
    frames, depth, layers, geoms = (np.stack(part) for part in zip(*made, strict=True))
    middles = np.stack([places[:, world.hand_geoms].mean(axis=1), places[:, world.object_geoms].mean(axis=1)], axis=1)
    return Demonstration(
        frames=frames,
        actions=rollout.actions[start : start + last],
        observations=rollout.observations[moments],
        tracks=render.project(middles, video.width / video.height)[0].astype(np.float32),
        success=np.array(rollout.success_at is not None and rollout.success_at <= start + last),
        start=np.array(start),
        depth=depth,
        layers=layers,
        geoms=geoms[0],
        places=places,
        turns=turns,
    )


def _first_step(listed: Listed, rollout: Rollout, last: int) -> int:
    """The control step at which a clip of `last` steps begins."""
    solved = rollout.success_at or 0
    if listed.split != "anytime":
        return max(0, solved + AFTER - last)
    random = np.random.default_rng(seed_of("robots", "begin", *astuple(listed)))
    return min(max(0, int(random.integers(-solved // 3, solved + 1))), len(rollout.actions) - last)


def _roll_out(listed: Listed, last: int) -> tuple[World, Rollout]:
    """An episode that holds a clip of `last` control steps, in a world of its own."""
    for attempt in range(1 if listed.split == "pool" else ATTEMPTS):
        seed = seed_of("robots", listed.task, listed.split, listed.seed, listed.index, attempt)
        random = np.random.default_rng(seed)
        behaviour = Behaviour(noise=random.uniform(0, 0.3))
        if listed.split == "pool" and random.random() < 0.5:
            behaviour = Behaviour(noise=random.uniform(0, 1.5), aim=random.uniform(0, 0.06))
        world = World(listed.task, seed, listed.colour)
        steps = max(EPISODE, last)
        rollout = world.roll_out(behaviour, seed, steps + AFTER + (last // 2 if listed.split == "anytime" else 0))
        if rollout.success_at is not None and rollout.success_at <= steps:
            break
        rollout.success_at = None
    return world, rollout
