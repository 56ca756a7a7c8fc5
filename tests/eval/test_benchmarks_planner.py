"""The planner benchmark with stand-ins for the simulator: rows, clips and their page, resuming, what the model is
shown, what is refused."""

import json
import re
import sys
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from PIL import Image

import recipes
from eval import run
from eval.benchmarks import planner
from eval.benchmarks.planner import Planner, PlannerConfig
from eval.report.results import summarise
from eval.robots.planning import EXPERT, GIVEN, Look, initial_states
from eval.robots.simulators import SimulatorError
from eval.scoring import Plan, Probe, probe, rows_clips, score, unprobed
from tests.chromium import Chromium, is_installed
from tests.tiny_backbones import load
from train.backbones import load_backbone
from train.backbones.base import BackboneConfig
from train.backbones.tiny import write_tiny_pipeline
from train.clips import VideoConfig, read_clip
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
    """Batches that were played, in turn. Episodes of push succeed at the second look, the first of reach has a
    simulator that crashes; the expert needs 5 frames."""
    batches, crashing = [], {"reach-0000"}

    def play(batch, imagines, video, simulators, films):
        expert = imagines is EXPERT
        for one, film in films.items():
            count = 1 + (5 if expert else 11 if one.task == "push" else 50)
            film.executed = list(np.linspace(0, 255, count * 32 * 32 * 3).astype(np.uint8).reshape(count, 32, 32, 3))
            film.imagined = [] if expert else [255 - frame for frame in film.executed]
        if expert:
            return [True] * len(batch)
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

    def stopped(batch, imagines, *given):
        if len(batches) == 1 and imagines is not EXPERT:
            raise RuntimeError("killed")
        return play(batch, imagines, *given)

    asked = Probe("planner", run.Model("base"), "own")
    monkeypatch.setattr(planner, "play", stopped)
    plan = Plan(benchmark(), tmp_path, identities={"base": "own"})
    probe(plan.benchmark, Flat(), asked, tmp_path)
    list(score(plan))
    assert "not asked to the end" in plan.problem and len(list(unprobed(plan, [asked.model]))) == 1
    monkeypatch.setattr(planner, "play", play)
    probe(plan.benchmark, Flat(), asked, tmp_path)
    assert [len(batch) for batch in batches] == [4, 2] and not list(unprobed(plan, [asked.model]))


def test_another_inverse_dynamics_model_means_other_rows(played, tmp_path, monkeypatch):
    monkeypatch.setattr(Planner, "requirements", lambda self: [])
    backbone = ["backbone.family=wan22_ti2v", "backbone.random_weights=true", "backbone.architecture=tiny"]
    video = ["video.height=32", "video.width=32", "video.num_frames=9", "video.fps=20"]
    own = [f"run.folder={tmp_path}", "run.planner.tasks=[push]", "run.planner.episodes=1"]
    config = recipes.load(run.Config, [*backbone, *video, *own])
    shell = load_backbone(config.backbone, "cpu", parts=())

    def asked():
        """The models that were asked anew."""
        plan = Plan(run.build(config, "planner"), tmp_path / "planner")
        run.fill(config, plan, None, shell, "")
        todo = list(unprobed(plan, [run.Model("base")]))
        for one in todo:
            probe(plan.benchmark, Flat(), one, plan.folder)
        return [one.model.name for one in todo]

    assert asked() == ["base"] and asked() == []
    path = tmp_path / "planner" / "scoring" / GIVEN
    for content in (b"laid there later", b"and changed"):
        path.write_bytes(content)
        assert asked() == ["base"] and asked() == []
    path.unlink()
    assert asked() == []  # the first rows are there still


def sources(page):
    """The clips that a page names."""
    return re.findall(r'data-clip="([^"]+)"', page.read_text(encoding="utf-8"))


def asked(folder, identities=("first", "second")):
    """The page after both models were asked, or one."""
    plan = Plan(benchmark(), folder, identities=dict(zip(("base", "tuned"), identities, strict=False)))
    for one in unprobed(plan, list(map(run.Model, plan.identities))):
        probe(plan.benchmark, Flat(), one, folder)
    return plan.page(list(score(plan)))


def test_clips_of_the_first_episodes_are_on_a_page(played, tmp_path):
    page = asked(tmp_path)
    assert page == tmp_path / "episodes.html"
    named = sources(page)
    assert len(named) == len(set(named)) == 4 * 2 + 2 * 2 + 3  # of push both, of reach the one without a crash; true
    for name in named:
        key, kind = name.removesuffix(".mp4").split("/")[-1].rsplit("-", 1)
        length = 6 if kind == "true" else 12 if key.startswith("push") else 51
        clip = read_clip(tmp_path / name, VideoConfig(32, 32, length, 20))  # raises unless it is all there
        with pytest.raises(ValueError, match="too short"):
            read_clip(tmp_path / name, VideoConfig(32, 32, length + 2, 20))  # the last is held for one
        assert (clip[0].float().mean() > 128) == (kind == "imagined")
    assert len(list((tmp_path / "clips").rglob("*.mp4"))) == len(named) + 3  # each model has the expert's
    text = page.read_text(encoding="utf-8")
    prompts = [one.prompt for one in initial_states(["push", "reach"], 2)]
    assert re.findall("<bdi>(.*)</bdi>", text) == prompts and text.count("<article") == 4
    assert text.count("<b>solved, 2 looks</b>") == 4 and text.count("<b>not solved, 7 looks</b>") == 2
    assert text.count("<b>robots:reach:planner:0:0: the simulator failed: its process ended with status 7</b>") == 2
    assert "base: 3 of 5 episodes solved" in text and "http" not in text.replace("http-equiv", "")
    assert '<a href="../report.html">' in text
    with Image.open(tmp_path / "sheet.png") as sheet:  # a label and six frames of each clip
        assert sheet.size == (6 * 32, (18 + 32) * len(named))


def test_clips_stay_with_their_rows(played, tmp_path):
    batches, crashing = played
    asked(tmp_path, ["first"])
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "clips").rglob("*.*")}
    crashing.clear()
    page = asked(tmp_path, ["first"])  # plays the first batch again, for the episode that had failed
    assert {path: path.stat().st_mtime_ns for path in before} == before and len(batches) == 3
    assert len(sources(page)) == 3 * 4 and len(list((tmp_path / "clips").rglob("*.mp4"))) == 3 * 4
    assert json.loads((rows_clips(tmp_path, "base", "first") / "reach-0000.json").read_text())["executed"] == 51

    other = asked(tmp_path, ["second"])  # other weights
    assert len(sources(other)) == 3 * 4 and not [name for name in sources(other) if "clips/base-first/" in name]
    assert sources(asked(tmp_path, ["first"])) == [name.replace("-second/", "-first/") for name in sources(other)]
    for name in ("push-0000.json", "push-0001-imagined.mp4"):  # as of rows that an earlier version wrote
        (rows_clips(tmp_path, "base", "first") / name).unlink()
    page = asked(tmp_path, ["first"])
    assert len(sources(page)) == 3 * 3 - 1 and page.read_text().count("<b>solved; no clips were kept</b>") == 1


def test_without_rows_there_is_no_page_and_the_report_names_it(played, tmp_path, monkeypatch):
    page = asked(tmp_path / "planner")
    plan = Plan(benchmark(), tmp_path / "planner", identities={"base": "first", "tuned": "second"})
    config = recipes.load(run.Config, ["recipe=tiny", f"run.folder={tmp_path}"])
    found = run.of_benchmark(config, plan, list(score(plan)))
    assert found["page"] == "planner/episodes.html" and page == tmp_path / found["page"]
    page.unlink()
    left_out = Plan(benchmark(), tmp_path / "planner", problem="nothing is installed")
    assert "page" not in run.of_benchmark(config, left_out, []) and not page.exists()


@pytest.mark.slow
def test_clips_play_in_step_in_a_browser(played, tmp_path):
    if not is_installed():
        pytest.skip("needs chromium and chromedriver")
    page, browser = asked(tmp_path), Chromium(tmp_path / "browser")
    try:
        browser.open(page.as_uri())
        script = "return [...document.querySelectorAll('article:nth-of-type(4) video')].map((clip) => "
        script += "[clip.currentTime, clip.ended, clip.error ? 1 : 0])"
        browser.run("document.querySelector('article:nth-of-type(4)').scrollIntoView()")

        def clips():
            found = browser.run(script)
            assert not any(error for _, _, error in found)
            return found

        def under_way(start, end):
            """All clips, once the longest are between these times."""
            found = clips()
            return found if start < found[0][0] < end else None

        for _ in range(2):  # and again, after the end
            for start, end in ((0.05, 0.9), (1.2, 2.4)):
                found = browser.wait(lambda start=start, end=end: under_way(start, end))
                times = [time for time, over, _ in found if not over]
                assert max(times) - min(times) < 0.05  # a frame
            assert [over for _, over, _ in found] == [False] * 4 + [True]  # the expert needs 0.3 s
        browser.run("document.getElementById('play').click()")
        stopped = clips()
        assert browser.run("return document.getElementById('play').textContent") == "Play" and clips() == stopped
    finally:
        browser.close()


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
