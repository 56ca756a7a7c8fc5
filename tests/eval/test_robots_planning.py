"""Episodes in processes of their own, and the planners' loop. Stand-ins answer, not Meta-World."""

import shutil
import sys
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest

from eval.robots import planning, recordings
from eval.robots.demonstrations import Listed
from eval.robots.episodes import EpisodeProcess
from eval.robots.inverse_dynamics import InverseDynamics, Settings
from eval.robots.planning import EXPERT, Film, Look, Plan, Planner, imagining, initial_states, play
from eval.robots.simulators import SimulatorError
from eval.robots.world import World, load
from train.clips import VideoConfig
from train.files import sha256

VIDEO = VideoConfig(height=8, width=8, num_frames=33, fps=20)  # 4 control steps a frame, 32 a look
# A slider that each control step moves by the action's first part. The frame's brightness is its place; the task is its
# name, or the place to be reached. `crash` and `hang` do so in the second look's actions, `refuse` is never opened.
STAND_IN = """
import io, json, os, struct, sys, time
import numpy as np
for line in sys.stdin:
    job = json.loads(line)
    command, made = job.pop("command"), {}
    if command == "open":
        task, place, acted = job["task"], 0.0, 0
        made = {"error": np.array("no such task")} if task == "refuse" else {}
    elif command == "act":
        acted, frames = acted + 1, []
        if acted == 2 and task == "crash":
            os._exit(7)
        if acted == 2 and task == "hang":
            time.sleep(60)
        for number, action in enumerate(job["actions"], start=1):
            place += action[0]
            success = task.isdigit() and place >= int(task)
            if "every" in job and (success or number % job["every"] == 0):
                frames.append(np.full((8, 8, 3), place, dtype=np.uint8))
            if success:
                break
        made = {"success": np.array(success)} | ({"frames": np.stack(frames)} if frames else {})
    else:
        future = int(place) + np.arange(job.get("count", 0) + 1)  # a brightness more a frame
        made = {"frames": np.broadcast_to(future[:, None, None, None], (len(future), 8, 8, 3)).astype(np.uint8)}
        if command == "future":
            made["actions"] = np.full((job["count"] * job["skip"], 4), 0.25)
    message = io.BytesIO()
    np.savez(message, **made)
    sys.stdout.buffer.write(struct.pack("<Q", message.tell()) + message.getvalue())
    sys.stdout.buffer.flush()
"""


class StubInverseDynamics:
    def decode(self, frames):
        """The slider's speed in brightness a control step."""
        actions = np.zeros((len(frames) - 1, 4))
        actions[:, 0] = np.diff(frames[:, 0, 0, 0].astype(float)) / 4
        return actions


@pytest.fixture
def simulators():
    made = [EpisodeProcess((sys.executable, "-c", STAND_IN), timeout=3.0) for _ in range(3)]
    yield made
    for one in made:
        one.close()


def episodes(*tasks):
    return [Listed(task, "planner", 0, 0, "red", f"to {task}") for task in tasks]


def test_right_actions_solve_the_task_within_the_episode(simulators):
    """By hand: a brightness a frame is 0.25 a control step, 8 a look, 50 in the 200 control steps of an episode."""
    seen: list[list[Look]] = []

    def imagine(looks):
        seen.append(list(looks))
        return [look.frames + np.arange(9, dtype=np.uint8)[:, None, None, None] for look in looks]

    planner = imagining(imagine, StubInverseDynamics(), 4)
    assert play(episodes("20", "50", "51"), planner, VIDEO, simulators) == [True, True, False]
    assert [[look.listed.task for look in looks] for looks in seen] == [["20", "50", "51"]] * 3 + [["50", "51"]] * 4
    assert [looks[-1].step for looks in seen] == [0, 32, 64, 96, 128, 160, 192]
    assert [int(looks[-1].frames[0, 0, 0, 0]) for looks in seen] == [0, 8, 16, 24, 32, 40, 48]  # it looks again
    assert seen[0][0].frames.shape == (1, 8, 8, 3) and seen[0][0].actions is None

    frozen = imagining(lambda looks: [look.frames.repeat(9, axis=0) for look in looks], StubInverseDynamics(), 4)
    assert play(episodes("20"), frozen, VIDEO, simulators) == [False]
    futures = imagining(lambda looks: [look.frames for look in looks], StubInverseDynamics(), 4, future=True)
    for planner in (futures, EXPERT):
        assert play(episodes("50", "51"), planner, VIDEO, simulators) == [True, False]


def test_films_hold_the_same_moments_and_change_nothing(simulators):
    """The model imagines 3 a frame, of which 1.5 happen; 13 are reached in 35 control steps: 8 frames and 3 steps."""

    def imagine(looks):
        return [look.frames + np.arange(0, 30, 3, dtype=np.uint8)[:, None, None, None] for look in looks]

    class Half(StubInverseDynamics):
        def decode(self, frames):
            return super().decode(frames) / 2

    played = shown, _, unsolved = episodes("13", "20", "255")
    films, planner = {shown: Film(), unsolved: Film()}, imagining(imagine, Half(), 4)
    assert play(played, planner, VIDEO, simulators, films) == [True, True, False]
    assert play(played, planner, VIDEO, simulators) == [True, True, False]
    imagined, executed = ([int(frame[0, 0, 0]) for frame in part] for part in vars(films[shown]).values())
    assert imagined == [0, 3, 6, 9, 12, 15, 18, 21, 24, 12 + 3]
    assert executed == [0, 1, 3, 4, 6, 7, 9, 10, 12, 13]
    imagined, executed = vars(films[unsolved]).values()
    assert len(imagined) == len(executed) == 1 + 200 // 4
    assert imagined[-1].base.nbytes == 2 * 8 * 8 * 3  # of the last look's frames no more is kept than is shown


@pytest.mark.slow
def test_a_crash_a_hang_and_a_refusal_cost_one_episode_each(simulators):
    crash, hang, solved = play(episodes("crash", "hang", "20"), EXPERT, VIDEO, simulators)
    assert isinstance(crash, SimulatorError) and "status 7" in str(crash)
    assert isinstance(hang, SimulatorError) and "not done after 3 s" in str(hang)
    assert solved is True
    refused, *others = play(episodes("refuse", "20", "51"), EXPERT, VIDEO, simulators)
    assert str(refused) == "no such task" and others == [True, False]
    assert play(episodes("20"), EXPERT, VIDEO, simulators) == [True]
    failed = play(episodes("refuse"), EXPERT, VIDEO, simulators)  # nothing is left to plan for
    assert [str(error) for error in failed] == ["no such task"]


def test_a_process_that_ended_between_two_commands_is_replaced(simulators):
    simulator, *_ = simulators
    simulator.begin("open", task="20")
    assert simulator.result() == {}
    (process,) = simulator._simulators._processes
    process.process.kill()
    process.process.wait()
    simulator.begin("frame")
    with pytest.raises(SimulatorError, match="its process ended with status -9"):
        simulator.result()
    simulator.begin("open", task="20")
    assert simulator.result() == {}


def test_initial_states_do_not_depend_on_their_number():
    few, many = initial_states(["push", "reach"], 2), initial_states(["push", "reach"], 5)
    assert many[:4] == few and [one.task for one in few] == ["push", "reach"] * 2


def test_the_inverse_dynamics_model_is_trained_once_for_all_that_are_compared(tmp_path, monkeypatch, capsys):
    class StandIn:
        asked, failing = 0, {1}

        def get(self, listed, video, *, then):
            StandIn.asked += 1
            if listed.index in self.failing:
                raise SimulatorError("status 7")
            random = np.random.default_rng(listed.index)
            frames = random.integers(0, 256, (5, 32, 32, 3), dtype=np.uint8)
            return SimpleNamespace(frames=frames, actions=random.uniform(-1, 1, (16, 4)).astype(np.float32))

        def close(self):
            pass

    monkeypatch.setattr(recordings, "shared", StandIn)
    video = VideoConfig(height=32, width=32, num_frames=5, fps=20)

    def get(steps=2, tasks=("push",), folder=tmp_path):
        settings = Settings(steps=steps, batch=4)
        return planning.inverse_dynamics(folder, tasks, 3, settings, video, seed=0, device="cpu")

    model, made_from = get()
    assert StandIn.asked == 3 and "left out robots:push:pool:0:1: status 7" in capsys.readouterr().out
    again, same = get()
    frames = np.random.default_rng(5).integers(0, 256, (9, 32, 32, 3), dtype=np.uint8)
    assert StandIn.asked == 3 and same == made_from and model.decode(frames).shape == (8, 4)
    assert (again.decode(frames) == model.decode(frames)).all()
    assert get(steps=3)[1] != made_from and StandIn.asked == 4  # the other two are recorded
    (trained,) = tmp_path.glob(f"*{made_from}*")
    shutil.copy(trained, tmp_path / planning.GIVEN)  # goes before one that would be trained, but serves its tasks alone
    assert get(steps=4)[1] == sha256(trained)[:16] and StandIn.asked == 4
    StandIn.failing = {0, 1, 2}
    with pytest.raises(ValueError, match="none of the first 3 demonstrations could be made.*status 7"):
        get(steps=4, tasks=("reach",))


def test_the_frame_after_the_last_action_is_that_frame_again():
    model = InverseDynamics(32, 32).eval()
    frames = np.random.default_rng(5).integers(0, 256, (4, 32, 32, 3), dtype=np.uint8)
    longer = np.concatenate([frames, frames[-1:]])
    np.testing.assert_allclose(model.decode(frames), model.decode(longer)[:3], atol=1e-6)
    shorter = model.decode(frames[:3])
    np.testing.assert_allclose(model.decode(frames)[0], shorter[0], atol=1e-6)
    assert np.abs(model.decode(frames)[1] - shorter[1]).max() > 1e-4


@pytest.mark.slow
def test_what_is_imagined_has_not_happened():
    try:
        load()
    except ValueError as reason:
        pytest.skip(str(reason))
    worlds = [World("push", 3, "red") for _ in range(2)]
    for world in worlds:
        for _ in range(20):
            world.step(world.expert())
    with worlds[0].imagined():
        for _ in range(30):
            worlds[0].step(np.ones(4))
    for _ in range(30):
        for world in worlds:
            world.step(world.expert())
    assert np.allclose(worlds[0].observation, worlds[1].observation, atol=1e-9)


@pytest.mark.slow
def test_the_expert_in_a_process_of_its_own():
    pytest.importorskip("metaworld")
    simulator, video = EpisodeProcess(), VideoConfig(height=32, width=32, num_frames=33, fps=20)
    try:
        still = Planner(lambda looks: [Plan(np.zeros((32, 4))) for _ in looks])
        (state,) = initial_states(["reach"], 1)
        film = Film()
        assert play([state], EXPERT, video, [simulator], {state: film}) == [True]
        assert play([state], still, video, [simulator]) == [False]
        changes = [np.abs(b.astype(int) - a).mean() for a, b in pairwise(film.executed)]
        assert film.imagined == [] and len(film.executed) > 5 and min(changes[:5]) > 0
    finally:
        simulator.close()
