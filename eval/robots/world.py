"""The simulator: Meta-World's Sawyer tasks under MuJoCo, redrawn in flat colours and seen by one fixed camera.

    world = World("push", seed, colour="red")
    rollout = world.roll_out(Behaviour(), seed, steps=300)      the scripted expert, with seeded faults
    world.step(action)                                          or one control step by hand: observation, success

A world is made anew for each rollout, so that nothing of an earlier one is left in it. Needs the extra `robots`.
"""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np

from eval.robots.tasks import ARM, GOAL, HAND, TASKS
from eval.sandbox.world import COLOURS

INSTALL = "install physalign[robots] (metaworld and mujoco), and see eval/robots/README.md for headless rendering"
CONTROL_RATE = 80  # control steps per second of simulated time
HIDDEN = ("controller_box", "pedestal_feet", "torso", "pedestal", "head", "screen", "RetainingWall")  # out of sight
FLOOR_GREY, TABLE_GREY, FIXTURE_GREY = 0.25, 0.6, 0.35
CORRELATION = 0.9  # of the noise between two control steps: white noise would only shake the hand


@dataclass(frozen=True)
class Behaviour:
    """How an expert acts. Without faults it succeeds nearly always."""

    noise: float = 0.0  # standard deviation of the noise on each action in [-1, 1], a random walk that returns to 0
    aim: float = 0.0  # metres, standard deviation of where it takes the object to be, in x and y


@dataclass
class Rollout:
    """S control steps of one episode, and what was to be seen at each of the S + 1 moments, of G geoms."""

    actions: np.ndarray  # (S, 4) float32 in [-1, 1]: the hand's x, y, z, and the grip
    observations: np.ndarray  # (S + 1, 39) float32, Meta-World's own
    places: np.ndarray  # (S + 1, G, 3) float32 m
    turns: np.ndarray  # (S + 1, G, 3, 3) float32
    success_at: int | None  # the first moment at which the environment said so


def load() -> tuple[ModuleType, ModuleType, ModuleType]:
    """mujoco, metaworld, metaworld.policies. ValueError says what to install."""
    if sys.platform == "linux":
        os.environ["MUJOCO_GL"] = os.environ.get("MUJOCO_GL", "").strip() or "egl"  # read at mujoco's first import
    try:
        import metaworld
        import mujoco
        from metaworld import policies
    except ImportError as error:
        raise ValueError(f"robots need Meta-World, which cannot be loaded ({error}): {INSTALL}") from error
    except (AttributeError, RuntimeError) as error:  # MuJoCo found no library to draw with
        kind = os.environ.get("MUJOCO_GL", "")
        raise ValueError(
            f"robots are drawn without a display, and MUJOCO_GL={kind} finds no library for it ({error}): apt-get"
            " install libegl1 libgl1-mesa-dri, or libosmesa6 and set MUJOCO_GL=osmesa"
        ) from error
    return mujoco, metaworld, policies


class World:
    """One task with drawn initial positions. seed: of these; colour: the object's."""

    def __init__(self, task: str, seed: int, colour: str):
        self.mujoco, metaworld, policies = load()
        self.task = TASKS[task]
        self.policy = getattr(policies, f"Sawyer{task.title().replace('-', '')}V3Policy")()
        env = self.env = metaworld.ALL_V3_ENVIRONMENTS[f"{task}-v3"]()
        env._freeze_rand_vec, env._set_task_called, env._partially_observable = False, True, False
        env.__dict__.pop("sawyer_observation_space", None)  # it clips goals to 0 while they are hidden
        env.seeded_rand_vec = True  # else positions come from the global generator
        env.seed(seed % 2**31)
        self.observation, _ = env.reset()
        self.mujoco.mj_forward(env.model, env.data)  # a reset moves bodies and leaves their geoms where they were
        self.object_geoms = self._geoms_below(self.task.body)
        self.robot_geoms, self.hand_geoms = self._geoms_below("base"), self._geoms_below("right_hand")
        self.goal = np.array(env._target_pos) if self.task.shows_goal else None  # where the mark is
        self._paint(colour)

    @property
    def model(self) -> Any:
        return self.env.model

    def step(self, action: np.ndarray) -> tuple[np.ndarray, bool]:
        """One control step of 1 / CONTROL_RATE s: the observation and whether the task is solved."""
        self.observation, _, _, _, info = self.env.step(np.clip(action, -1, 1).astype(np.float32))
        return self.observation, bool(info["success"])

    def expert(self, aim: np.ndarray | float = 0.0) -> np.ndarray:
        """The expert's action (4,), were the object displaced by `aim` (2,) m."""
        seen = self.observation.copy()
        seen[4:6] += aim
        return np.clip(self.policy.get_action(seen), -1, 1)

    @contextmanager
    def imagined(self) -> Iterator[None]:
        """What is done inside has not happened afterwards."""
        mujoco, env = self.mujoco, self.env
        kind = mujoco.mjtState.mjSTATE_INTEGRATION
        state = np.empty(mujoco.mj_stateSize(env.model, kind))
        mujoco.mj_getState(env.model, env.data, state, kind)
        own, observation = dict(vars(env)), self.observation  # an environment replaces its attributes, it changes none
        try:
            yield
        finally:
            mujoco.mj_setState(env.model, env.data, state, kind)
            mujoco.mj_forward(env.model, env.data)
            vars(env).update(own)
            self.observation = observation

    def roll_out(self, behaviour: Behaviour, seed: int, steps: int) -> Rollout:
        random = np.random.default_rng(seed)
        aim = behaviour.aim * random.standard_normal(2)
        noise = np.zeros(4)
        moments = [(self.observation, *self.pose())]
        actions, success_at = [], None
        for number in range(steps):
            noise = CORRELATION * noise + (1 - CORRELATION**2) ** 0.5 * random.standard_normal(4)
            actions.append(np.clip(self.expert(aim) + behaviour.noise * noise, -1, 1))
            observation, success = self.step(actions[-1])
            moments.append((observation, *self.pose()))
            if success and success_at is None:
                success_at = number + 1
        observations, places, turns = (np.stack(part).astype(np.float32) for part in zip(*moments, strict=True))
        return Rollout(np.stack(actions).astype(np.float32), observations, places, turns, success_at)

    def pose(self) -> tuple[np.ndarray, np.ndarray]:
        """Places (G, 3) and turns (G, 3, 3) of all geoms now."""
        data = self.env.data
        return data.geom_xpos.copy(), data.geom_xmat.reshape(-1, 3, 3).copy()

    def _geoms_below(self, body: str) -> np.ndarray:
        """Numbers of the geoms of a body and of all bodies that hang on it."""
        model = self.model
        below = {model.body(body).id}
        for number in range(model.nbody):  # parents come before their children
            if model.body_parentid[number] in below:
                below.add(number)
        return np.flatnonzero(np.isin(model.geom_bodyid, list(below)))

    def _paint(self, colour: str) -> None:
        """Flat colours without textures and gloss; grey for everything but robot, object and goal."""
        model = self.model
        model.mat_texid[:] = -1
        model.mat_specular[:], model.mat_reflectance[:], model.mat_emission[:] = 0, 0, 0
        model.geom_matid[:] = 0
        grey = np.full(model.ngeom, FIXTURE_GREY)
        grey[self._geoms_below("tablelink")] = TABLE_GREY
        grey[model.geom("floor").id] = FLOOR_GREY
        model.geom_rgba[:, :3] = grey[:, None]
        shown = model.geom_rgba[:, 3] > 0
        for geoms, name in ((self.robot_geoms, ARM), (self.hand_geoms, HAND), (self.object_geoms, colour)):
            model.geom_rgba[geoms, :3] = COLOURS[name]
        hidden = [model.body(number).name in HIDDEN for number in model.geom_bodyid]
        model.geom_rgba[:, 3] = shown & ~np.array(hidden)
        model.site_rgba[:, 3] = 0
        if self.task.shows_goal:
            goal = model.site("goal").id
            model.site_rgba[goal] = (*COLOURS[GOAL], 1)
            model.site_matid[goal] = -1
        headlight = model.vis.headlight
        headlight.ambient[:], headlight.diffuse[:], headlight.specular[:] = 0.45, 0.3, 0
        model.light_diffuse[:], model.light_specular[:] = 0.15, 0
