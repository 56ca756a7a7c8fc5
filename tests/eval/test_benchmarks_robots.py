"""The robots benchmark with stand-ins for the simulator: tasks, true clips, distances from them, what is missing."""

import os
import sys

import numpy as np
import pytest
import torch

from eval.benchmarks.base import Sample
from eval.benchmarks.robots import Robots, RobotsConfig
from eval.robots import simulators, world
from eval.sandbox.world import COLOURS
from train.clips import VideoConfig, read_clip, write_clip

VIDEO = VideoConfig(height=64, width=64, num_frames=9, fps=10)


def picture(colour, shift=0):
    """(9, 64, 64, 3) uint8: an object that stands still and a hand that comes nearer."""
    clip = np.full((9, 64, 64, 3), 0.5)
    clip[:, 40:48, 40 + shift : 48 + shift] = COLOURS[colour]
    for frame in range(9):
        clip[frame, 4:16, 4 + frame : 10 + frame] = COLOURS["blue"]
    return (clip * 255).round().astype(np.uint8)


@pytest.fixture
def benchmark(monkeypatch, tmp_path):
    class Made:
        def __init__(self, frames):
            self.frames = frames

    class StandIn:
        def get(self, listed, video, *, then=(), drawn="frames"):
            if listed.index == 1:
                raise simulators.SimulatorError("its process ended with status 7")
            return Made(picture(listed.colour)[: 1 if drawn == "first" else None])

    monkeypatch.setattr(simulators, "shared", StandIn)
    return Robots(RobotsConfig(clips=4, tasks=["drawer-open", "reach"]), VIDEO, folder=tmp_path)


def test_a_model_is_shown_the_first_frame_and_measured_against_the_future(benchmark, tmp_path, capsys, monkeypatch):
    tasks = benchmark.prompts()
    assert [task.category for task in tasks] == ["drawer-open", "reach"] * 2 and len({task.key for task in tasks}) == 4
    assert benchmark.shown(tasks[0]).shape == (1, 64, 64, 3)
    with pytest.raises(ValueError, match=r"robots:drawer-open:heldout:0:1: the simulator failed: .*status 7"):
        benchmark.shown(tasks[2])

    truths = benchmark.references(tmp_path / "references")
    assert "status 7" in capsys.readouterr().out
    true = {row.key: row for row in benchmark.score(truths, tmp_path / "scoring")}
    assert true[tasks[0].key].values["object_error"] == 0 and true[tasks[0].key].values["physical"] > 0.9
    assert "status 7" in true[tasks[2].key].error and not true[tasks[2].key].values
    assert set(true[tasks[1].key].values) == set(benchmark.columns)

    colour = next(name for name in COLOURS if name in tasks[0].text)
    made = Sample(tasks[0], 0, tmp_path / "made.mp4")
    write_clip(made.path, torch.from_numpy(picture(colour, shift=8)), 10.0, lossless=True)
    (row,) = benchmark.score([made], tmp_path / "scoring")
    assert row.values["object_error"] == pytest.approx(8 / 64) and row.values["gripper_error"] == 0
    assert torch.equal(read_clip(truths[0].path, VIDEO), torch.from_numpy(picture(colour)))
    monkeypatch.setattr(simulators, "shared", lambda: pytest.fail("simulated again"))
    assert (benchmark.shown(tasks[0]) == picture(colour)[:1]).all()  # of the true clip
    (row,) = benchmark.score([Sample(tasks[0], 1, tmp_path / "none.mp4")], tmp_path / "scoring")
    assert "missing" in row.error


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere MuJoCo draws with what the system has")
@pytest.mark.parametrize(("given", "used"), [(None, "egl"), ("", "egl"), (" ", "egl"), ("osmesa", "osmesa")])
def test_an_empty_mujoco_gl_counts_as_unset(given, used, monkeypatch):
    monkeypatch.setenv("MUJOCO_GL", given or "")
    if given is None:
        monkeypatch.delenv("MUJOCO_GL")
    monkeypatch.setitem(sys.modules, "metaworld", None)  # nothing is loaded
    with pytest.raises(ValueError, match="cannot be loaded"):
        world.load()
    assert os.environ["MUJOCO_GL"] == used


def test_a_machine_without_a_library_to_draw_with_is_told_what_to_install(tmp_path, monkeypatch):
    (tmp_path / "metaworld.py").write_text("None.eglQueryString")  # as MuJoCo's import ends without libEGL
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "metaworld", raising=False)
    monkeypatch.setenv("MUJOCO_GL", "egl")
    with pytest.raises(ValueError, match=r"MUJOCO_GL=egl finds no library for it .*: apt-get install libegl1"):
        world.load()


def test_it_says_what_to_install_and_refuses_bad_settings(benchmark, monkeypatch):
    monkeypatch.setitem(sys.modules, "metaworld", None)
    (needed,) = benchmark.requirements()
    assert not needed.found and "install physalign[robots]" in needed.remedy
    with pytest.raises(ValueError, match="run.robots"):
        RobotsConfig(tasks=["bowling"])
    with pytest.raises(ValueError, match="does not divide"):
        Robots(RobotsConfig(), VideoConfig(64, 64, 9, 24)).prompts()
