"""Demonstrations of Meta-World's experts: the same again, and true to the pixels they are drawn in."""

import numpy as np
import pytest

from eval.robots import render, violations
from eval.robots.demonstrations import demonstrate, list_demonstrations
from eval.robots.tasks import TASKS
from eval.robots.world import Behaviour, World, load
from train.clips import VideoConfig

try:
    load()  # first, for it says where MuJoCo is to draw
except ValueError as reason:
    pytest.skip(str(reason), allow_module_level=True)

VIDEO = VideoConfig(height=96, width=96, num_frames=9, fps=10)


@pytest.fixture(scope="module")
def drawer():
    (listed,) = list_demonstrations(["drawer-close"], "train", 0, [0])
    return listed, demonstrate(listed, VIDEO, drawn="truth")


def test_a_demonstration_is_the_same_again(drawer):
    listed, first = drawer
    again = demonstrate(listed, VIDEO)
    assert (again.frames == first.frames).all() and (again.actions == first.actions).all()
    only = demonstrate(listed, VIDEO, drawn="first")
    assert (only.frames == first.frames[:1]).all()
    assert first.success and first.actions.shape == (64, 4) and np.abs(first.actions).max() <= 1


def test_points_stay_on_what_they_belong_to(drawer):
    _, clip = drawer
    y, x = np.nonzero(clip.layers[0] == render.OBJECT)
    queries = np.stack([x + 0.5, y + 0.5], axis=-1) / 96
    tracks, visible = clip.follow(queries)
    assert np.abs(tracks[0] - queries).max() < 1e-4 and visible[0].mean() > 0.95
    assert np.abs(tracks[-1] - tracks[0]).max() > 0.05  # the drawer has moved
    for frame in range(9):
        seen = render.look_up(clip.layers[frame], tracks[frame][visible[frame]])
        assert (seen == render.OBJECT).all()
    hidden = render.look_up(clip.layers[-1], tracks[-1][~visible[-1]])
    assert (~visible[-1]).any() and (hidden == render.OBJECT).mean() < 0.75  # behind the case, the hand or itself
    still, _ = clip.follow(np.array([[0.9, 0.95]]))  # the table
    assert np.ptp(still, axis=0).max() == 0


def test_project_and_unproject_are_inverse():
    points = np.random.default_rng(0).uniform([-0.2, 0.4, 0], [0.2, 0.9, 0.3], (20, 3))
    for aspect in (1.0, 1.6):
        assert np.allclose(render.unproject(*render.project(points, aspect), aspect), points)


@pytest.mark.slow
def test_violations_change_what_is_drawn_and_not_what_was_done(drawer):
    listed, true = drawer
    for kind in ("vanish", "ignore"):
        clip = demonstrate(listed, VIDEO, drawn="truth", violation=kind)
        assert (clip.actions == true.actions).all() and (clip.frames[0] == true.frames[0]).all()
        area = (clip.layers == render.OBJECT).sum(axis=(1, 2))
        if kind == "vanish":
            assert area[-1] == 0 < area[0]
        else:
            assert np.ptp(clip.tracks[:, 1], axis=0).max() < 1e-6 < np.ptp(true.tracks[:, 1], axis=0).max()
    with pytest.raises(ValueError, match="unknown"):
        violations.plant("melt", 1.0, true.places, true.turns, World("push", 0, "red"), np.random.default_rng(0))


@pytest.mark.slow
def test_experts_succeed_and_bad_aim_fails():
    good = [World(task, seed, "red").roll_out(Behaviour(), seed, 200).success_at for task in TASKS for seed in (0, 1)]
    assert sum(at is not None for at in good) >= 19
    bad = [World("pick-place", seed, "red").roll_out(Behaviour(aim=0.1), seed, 200).success_at for seed in range(6)]
    assert sum(at is None for at in bad) >= 3
