"""Demonstrations on disk, and the base model's chain in miniature."""

import json
import os
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from data_pipeline.frames import FrameReader
from data_pipeline.sources import _demonstrated
from eval.experiments import processes
from eval.experiments.robots_model import run
from eval.robots import recordings
from eval.robots.demonstrations import demonstrate, list_demonstrations
from eval.robots.model import NETWORK, SMALL, WORDS, coloured
from eval.robots.tasks import OBJECT_COLOURS, TASKS, write_prompt
from eval.robots.world import load
from eval.small_wan.pipeline import new_transformer, small_tokenizer
from train.clips import VideoConfig

VIDEO = VideoConfig(height=32, width=32, num_frames=5, fps=20)


@pytest.fixture
def asked(monkeypatch):
    """Names of the demonstrations that were simulated, by a stand-in."""
    names = []

    class StandIn:
        def get(self, listed, video, *, then=(), **options):
            names.append(listed.name)
            random = np.random.default_rng(len(names))
            frames = random.integers(0, 256, (5, 32, 32, 3), dtype=np.uint8)
            return SimpleNamespace(frames=frames, actions=random.uniform(-1, 1, (16, 4)).astype(np.float32))

        def close(self):
            pass

    monkeypatch.setattr(recordings, "shared", StandIn)
    return names


def test_a_demonstration_is_recorded_once_and_a_build_reads_it(asked, tmp_path, capsys):
    listed = list_demonstrations(["push", "reach"], "anytime", 0, range(4))
    recordings.record(tmp_path, listed[:2], VIDEO)
    recorded = recordings.record(tmp_path, listed, VIDEO)
    assert asked == [one.name for one in listed] and "2 demonstrations in" in capsys.readouterr().out
    frames, actions = recorded.load(3)
    assert frames.shape == (5, 32, 32, 3) and actions.shape == (16, 4) and actions.dtype == np.float32
    assert (recorded.frames([0, 3])[1] == frames).all()
    rows = [vars(row) for row in _demonstrated(["push", "reach"], 4, "anytime", 0)]
    read = FrameReader(VIDEO, "cpu", tmp_path).read(rows[3])
    assert torch.equal(read, torch.from_numpy(frames)) and len(asked) == 4
    other = VideoConfig(height=32, width=32, num_frames=5, fps=10)
    assert recordings.read(tmp_path, listed[0], other) is None


def test_robot_object_and_mark_are_coloured():
    pixels = torch.tensor([[200, 40, 30], [128, 128, 128], [90, 84, 80], [0, 160, 170]], dtype=torch.uint8)
    assert coloured(pixels).tolist() == [True, False, False, True]


def test_every_word_of_the_instructions_is_one_token_and_the_dit_is_small():
    tokenizer = small_tokenizer(WORDS)
    assert {word for word in WORDS.split() if len(tokenizer(word).input_ids) != 2} == set()
    prompts = [write_prompt(task, colour, n) for task in TASKS for colour in OBJECT_COLOURS for n in range(3)]
    assert max(len(tokenizer(prompt).input_ids) for prompt in prompts) <= 32
    parameters = sum(weight.numel() for weight in new_transformer(NETWORK, seed=0).parameters())
    assert 2 * parameters < 10e6


def test_a_step_that_dies_by_a_signal_ends_the_run_and_one_that_is_stopped_does_not(tmp_path, monkeypatch):
    (tmp_path / "dies.py").write_text("import os; os.kill(os.getpid(), 9)", encoding="utf-8")
    (tmp_path / "stays.py").write_text("import time; time.sleep(60)", encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    step, other = (run.Step(name, (name,), "nothing") for name in ("dies", "stays"))
    with pytest.raises(ValueError, match="dies ended with status -9"):
        run.Runner(tmp_path, time.monotonic() + 60).run([step, other])
    assert not run.Runner(tmp_path, time.monotonic() + 0.5).run([other])


def test_an_evaluation_in_which_a_benchmark_failed_is_not_done(tmp_path, monkeypatch, capsys):
    found = {"robots": {"problem": ""}, "planner": {"problem": "no display"}}
    started, log = [], tmp_path / "log"
    log.mkdir()

    def start(self, step):
        started.append(step.name)
        (log / f"{step.name}.txt").touch()
        (tmp_path / step.product).write_text(json.dumps({"benchmarks": found}), encoding="utf-8")
        seconds = 60 if step.name == "bounds" else 0
        return subprocess.Popen([sys.executable, "-c", f"import time; time.sleep({seconds})"])

    monkeypatch.setattr(run.Runner, "_start", start)
    steps = [run.Step("evaluate", ("eval.run",), "results.json"), run.Step("bounds", ("bounds",), "episodes.jsonl")]
    with pytest.raises(ValueError, match="benchmark planner: no display; mend it and run the same command again"):
        run.Runner(tmp_path, time.monotonic() + 0.5).run(steps)  # the other one is stopped
    assert "done" not in capsys.readouterr().out and not run.Runner(tmp_path, 0).is_done(steps[0])
    found["planner"]["problem"] = ""
    assert run.Runner(tmp_path, time.monotonic() + 60).run(steps[:1]) and started == ["evaluate", "bounds", "evaluate"]
    assert "evaluate done" in capsys.readouterr().out


def test_the_status_says_whether_to_run_the_same_command_again(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(processes, "GRACE", 60.2)  # of 60.6 seconds
    (tmp_path / "stays.py").write_text("import time; time.sleep(60)", encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(run, "build_steps", lambda *_, **__: [[run.Step("stays", ("stays",), "nothing")]])
    assert run.main(["--folder", str(tmp_path), "--minutes", "1.01"]) == 75
    assert "not finished: run the same command again" in capsys.readouterr().out


def test_a_simulator_that_makes_nothing_is_found_out_early(tmp_path, monkeypatch):
    tried = []

    class Broken:
        def get(self, listed, video, **options):
            tried.append(listed.name)
            raise recordings.SimulatorError("no display")

        def close(self):
            pass

    monkeypatch.setattr(recordings, "shared", Broken)
    with pytest.raises(ValueError, match="none of the first .* demonstrations could be made .no display."):
        recordings.record(tmp_path, list_demonstrations(["push"], "anytime", 0, range(1000)), VIDEO)
    assert len(tried) == 2 * (os.cpu_count() or 1)


@pytest.mark.slow
def test_clips_begin_at_any_moment():
    try:
        load()
    except ValueError:
        pytest.skip("the extra `robots` is not installed")
    listed = list_demonstrations(["drawer-open"], "anytime", 0, range(8))
    made = [demonstrate(one, VIDEO, drawn="first") for one in listed]
    starts = [int(one.start) for one in made]
    assert min(starts) == 0 and len(set(starts)) > 4 and max(starts) > 40
    assert all(one.actions.shape == (16, 4) for one in made)


@pytest.mark.slow
def test_the_base_model_in_miniature(tmp_path, capsys):
    try:
        load()
    except ValueError:
        pytest.skip("the extra `robots` is not installed")
    assert run.main(["--folder", str(tmp_path), "--small"]) == 0
    figures = json.loads((tmp_path / "results.json").read_text("utf-8"))
    assert 1.5 < figures["flow"]["mean"] < 2.5  # a fresh network predicts 0, and noise minus clips has the square 2
    assert figures["vae"]["settings"]["steps"] == SMALL.vae.steps and set(figures["inverse_dynamics"]) > {"grip"}
    assert figures["benchmarks"]["benchmarks"].keys() == {"robots", "planner"}
    assert len(list((tmp_path / "demonstrations").rglob("*.npz"))) == 4 + 2 + 2
    capsys.readouterr()
    assert run.main(["--folder", str(tmp_path), "--small", "--minutes", "1.1"]) == 0  # nothing is left to do
    assert " done, " not in capsys.readouterr().out
    with pytest.raises(ValueError, match="--minutes=1: give more than 1"):
        run.main(["--folder", str(tmp_path), "--minutes", "1"])
