"""The planner benchmark with stand-ins for the simulator: rows, resuming, what the model is shown, what is refused."""

import sys
from contextlib import contextmanager

import numpy as np
import pytest
import torch

import recipes
from eval import run
from eval.benchmarks import planner
from eval.benchmarks.planner import Planner, PlannerConfig
from eval.report.results import summarise
from eval.robots.planning import Look, initial_states
from eval.robots.simulators import SimulatorError
from eval.scoring import Plan, Probe, probe, score, unprobed
from tests.tiny_backbones import load
from train.backbones import load_backbone
from train.backbones.base import BackboneConfig
from train.backbones.tiny import write_tiny_pipeline
from train.clips import VideoConfig
from train.sampling import SamplerConfig

VIDEO = VideoConfig(height=32, width=32, num_frames=9, fps=20)
SAMPLER = SamplerConfig(solver="euler", steps=2, guidance=1.0)


class Flat:
    """Stands in for a backbone that `play` does not ask."""

    device = torch.device("cpu")

    def condition(self, prompts):
        return None


@pytest.fixture
def played(monkeypatch):
    """Batches that were played, in turn. Episodes of push succeed, the first of reach has a simulator that crashes."""
    batches, crashing = [], {"reach-0000"}

    def play(batch, imagines, video, simulators):
        batches.append([planner.key_of(one) for one in batch])
        return [
            SimulatorError("its process ended with status 7") if key in crashing else key.startswith("push")
            for key in batches[-1]
        ]

    @contextmanager
    def processes(count):
        yield [None] * count

    monkeypatch.setattr(planner, "play", play)
    monkeypatch.setattr(planner, "processes", processes)
    monkeypatch.setattr(planner, "inverse_dynamics", lambda *given, **more: (None, "digest"))
    monkeypatch.setattr(Planner, "together", 4)
    return batches, crashing


def benchmark(episodes=3, tasks=("push", "reach"), sampler=SAMPLER):
    return Planner(PlannerConfig(episodes=episodes, tasks=list(tasks)), VIDEO, None, None, sampler)


def test_rows_are_kept_and_only_what_failed_is_played_again(played, tmp_path):
    batches, crashing = played
    models = [run.Model("base")]
    plan = Plan(benchmark(), tmp_path, identities={"base": "own"})
    probe(plan.benchmark, Flat(), Probe("planner", models[0], "own"), tmp_path)
    assert batches == [["push-0000", "reach-0000", "push-0001", "reach-0001"], ["push-0002", "reach-0002"]]
    lines = list(score(plan))
    values = {line["key"]: line["values"] for line in lines}
    assert values["push-0001"] == {"success": 1, "push": 1} and values["reach-0001"] == {"success": 0, "reach": 0}
    (error,) = [line["error"] for line in lines if line["error"]]
    assert error == "robots:reach:planner:0:0: the simulator failed: its process ended with status 7"
    found = summarise(plan.benchmark, lines, "base")["models"]["base"]
    assert found["missing"] == 1 and found["figures"]["success"]["mean"] == pytest.approx(3 / 5)
    assert found["figures"]["push"]["mean"] == 1 and found["figures"]["reach"]["clips"] == 2

    crashing.clear()  # the next run plays the batch with the failure again, and no other
    (again,) = unprobed(plan, models)
    probe(plan.benchmark, Flat(), again, tmp_path)
    assert batches[2:] == [batches[0]] and not list(unprobed(plan, models))
    assert {line["key"]: line["error"] for line in score(plan)} == dict.fromkeys(values, "")


def test_a_run_that_was_stopped_continues(played, tmp_path, monkeypatch):
    batches, crashing = played
    crashing.clear()
    play = planner.play

    def stopped(batch, *given):
        if len(batches) == 1:
            raise RuntimeError("killed")
        return play(batch, *given)

    asked = Probe("planner", run.Model("base"), "own")
    monkeypatch.setattr(planner, "play", stopped)
    plan = Plan(benchmark(), tmp_path, identities={"base": "own"})
    probe(plan.benchmark, Flat(), asked, tmp_path)
    list(score(plan))
    assert "not asked to the end" in plan.problem and len(list(unprobed(plan, [asked.model]))) == 1
    monkeypatch.setattr(planner, "play", play)
    probe(plan.benchmark, Flat(), asked, tmp_path)
    assert [len(batch) for batch in batches] == [4, 2] and not list(unprobed(plan, [asked.model]))


def test_the_model_is_shown_what_the_camera_sees_and_gets_the_same_noise_again(tmp_path):
    backbone = load("wan22_ti2v", write_tiny_pipeline("wan22_ti2v", tmp_path / "model"))
    own, (push, reach) = benchmark(), initial_states(["push", "reach"], 1)
    grey, white = (np.full((1, 32, 32, 3), value, np.uint8) for value in (128, 255))
    own.check(backbone)
    clips = own.imagine(backbone, None, [Look(push, 0, grey), Look(push, 32, grey), Look(push, 0, white)])
    assert clips.shape == (3, 9, 32, 32, 3) and clips.dtype == np.uint8
    again = own.imagine(backbone, None, [Look(push, 0, grey), Look(reach, 0, grey)])
    off = [np.abs(again[0].astype(float) - clip).mean() for clip in clips]
    assert off[0] < 0.1 < min(off[1:]) and np.abs(again[0].astype(float) - again[1]).mean() > 0.1


def test_what_is_not_there_or_cannot_work_is_refused_in_one_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "metaworld", None)
    listed = run.listing(recipes.load(run.Config, ["recipe=tiny"])).splitlines()
    at = listed.index("planner")
    assert "[missing] Meta-World" in listed[at + 1] and "install physalign[robots]" in listed[at + 3]
    shells = {
        family: load_backbone(BackboneConfig(family=family, random_weights=True, architecture="tiny"), "cpu", parts=())
        for family in ("wan21", "wan22_ti2v")
    }
    with pytest.raises(
        ValueError, match="Wan21 generates from text alone.*wan22_ti2v, wan22_i2v, cosmos25 or hunyuan15_i2v"
    ):
        benchmark().check(shells["wan21"])
    benchmark().check(shells["wan22_ti2v"])
    with pytest.raises(ValueError, match="does not divide"):
        Planner(PlannerConfig(), VideoConfig(32, 32, 9, 24)).check(shells["wan22_ti2v"])
    with pytest.raises(ValueError, match="run.planner: give episodes"):
        PlannerConfig(tasks=["bowling"])
    assert benchmark().recorded != benchmark(sampler=SamplerConfig(steps=3)).recorded
