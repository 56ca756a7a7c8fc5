"""Counted operations against hand and against the measured limits; metrics.jsonl through a run, a stop and a resume."""

import importlib.util
import json
import math
import time

import pytest
import torch
from accelerate import Accelerator
from diffusers import WanTransformer3DModel
from torch.utils.flop_counter import FlopCounterMode

import recipes
from train import gdpo
from train.backbones.wan import transformer_flops
from train.tracking import Tracker, check_trackers, device_peak_tflops, peak_memory_gib

TOKENS = 32_760  # 480 x 832, 81 frames
# One H200: TFLOP/s of a matrix product, of attention forward and of attention backward.
MATRIX, FORWARD, BACKWARD = 807e12, 578e12, 543e12


def test_flops_by_hand():
    assert transformer_flops(2, 1, 3, 4, 1) == (312.0, 72.0)
    assert transformer_flops(2, 1, 3, 4, 5) == (5 * 312.0, 5 * 72.0)
    # One token, no text, width 1, no feed-forward: six products of two operations, and attention to itself.
    assert transformer_flops(1, 0, 1, 0, 1) == (12.0, 4.0)


@pytest.mark.parametrize(
    ("width", "ffn", "layers", "seconds"), [(5120, 13_824, 40, 20.2), (1536, 8960, 30, 3.86)], ids=["14B", "1.3B"]
)
def test_arithmetic_limit_of_a_pair(width, ffn, layers, seconds):
    """Two reference forwards, two policy forwards and two backwards at the measured rates."""
    matrix, attention = transformer_flops(TOKENS, 512, width, ffn, layers)
    forward = matrix / MATRIX + attention / FORWARD
    backward = matrix / MATRIX + 2.5 * attention / BACKWARD
    assert 2 * (2 * forward + backward) == pytest.approx(seconds, rel=0.005)


def test_flops_match_those_that_torch_counts_in_a_transformer():
    """A real forward pass on the meta device; what the formula leaves out (text, time and patch layers) is under 3%."""
    width, ffn, layers, text = 128, 512, 2, 8
    with torch.device("meta"):
        network = WanTransformer3DModel(
            num_attention_heads=4,
            attention_head_dim=32,
            in_channels=4,
            out_channels=4,
            text_dim=16,
            freq_dim=16,
            ffn_dim=ffn,
            num_layers=layers,
        )
        latents, words = torch.zeros(1, 4, 4, 32, 32), torch.zeros(1, text, 16)
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        network(
            hidden_states=latents,
            timestep=torch.zeros(1),
            encoder_hidden_states=words,
            return_dict=False,
        )
    expected = sum(transformer_flops(4 * 16 * 16, text, width, ffn, layers))
    assert expected == pytest.approx(counter.get_total_flops(), rel=0.03)


def test_devices_without_a_known_peak():
    assert device_peak_tflops(torch.device("cpu")) is None
    assert 0.01 < peak_memory_gib(torch.device("cpu")) < 1000


# metrics.jsonl


def test_a_step_says_how_long_it_waited_for_its_groups(tiny, tmp_path, monkeypatch):
    prepare = gdpo.prepare

    def slow(*arguments):
        time.sleep(0.1)
        return prepare(*arguments)

    tiny.train(tmp_path / "quick", "optim.steps=2")
    monkeypatch.setattr(gdpo, "prepare", slow)
    tiny.train(tmp_path / "slow", "optim.steps=2")  # two groups a step, read in this process
    for quick, waited in zip(lines(tmp_path / "quick/train"), lines(tmp_path / "slow/train"), strict=True):
        assert 0 < quick["data_seconds"] < quick["seconds"]
        assert 0.2 <= waited["data_seconds"] < waited["seconds"]


def make_tracker(folder, *, start=0, trackers=()):
    accelerator = Accelerator(cpu=True, log_with=list(trackers) or None, project_dir=str(folder))
    config = recipes.load(gdpo.Config, [f"train.folder={folder}", "optim.steps=10"])
    return Tracker(accelerator, config, start=start)


def lines(folder):
    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    text = (folder / "metrics.jsonl").read_text(encoding="utf-8")
    assert text == "" or text.endswith("\n")
    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


def write(folder, steps, **metrics):
    tracker = make_tracker(folder, start=steps[0])
    for step in steps:
        tracker.log(step, {"loss": 0.5, "seconds": 2.0, **metrics}, shown=("loss", "absent"))
    tracker.close()


def test_a_line_a_step_with_the_time_that_is_left(tmp_path):
    write(tmp_path / "run", range(3), lr=1e-5)
    assert lines(tmp_path / "run") == [
        {"step": 0, "loss": 0.5, "seconds": 2.0, "lr": 1e-5, "eta_seconds": 18.0},
        {"step": 1, "loss": 0.5, "seconds": 2.0, "lr": 1e-5, "eta_seconds": 16.0},
        {"step": 2, "loss": 0.5, "seconds": 2.0, "lr": 1e-5, "eta_seconds": 14.0},
    ]


def test_a_line_stands_in_the_file_as_soon_as_it_is_logged(tmp_path):
    tracker = make_tracker(tmp_path)
    tracker.log(0, {"loss": 1.0, "seconds": 1.0}, shown=())
    assert [line["step"] for line in lines(tmp_path)] == [0]  # a killed run keeps it
    tracker.close()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_numbers_that_are_not_finite_become_null(tmp_path, value):
    write(tmp_path, range(1), grad_norm=value)
    assert lines(tmp_path)[0]["grad_norm"] is None
    assert lines(tmp_path)[0]["loss"] == 0.5


def test_resume_keeps_earlier_lines_and_drops_those_that_are_trained_again(tmp_path):
    write(tmp_path, range(6), run=1)
    write(tmp_path, range(4, 8), run=2)  # the newest checkpoint was that of step 4
    assert [(line["step"], line["run"]) for line in lines(tmp_path)] == [(i, 1 if i < 4 else 2) for i in range(8)]


def test_resume_drops_a_half_written_line(tmp_path):
    write(tmp_path, range(5))
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:-20])
    write(tmp_path, range(5, 6))
    assert [line["step"] for line in lines(tmp_path)] == [0, 1, 2, 3, 5]


@pytest.mark.parametrize(
    "torn", [b"\0\0\0\0", b"\xff\xfe{", b'{"step": 1, "lo', b"\n", b"3\n", b"[]\n", b"{}\n", b'{"step": "1"}\n']
)
def test_resume_drops_what_is_no_line_of_ours(tmp_path, torn):
    """A file system that lost its power may leave zeros or another file's bytes."""
    write(tmp_path, range(2))
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(torn)
    write(tmp_path, range(2, 3))
    assert [line["step"] for line in lines(tmp_path)] == [0, 1, 2]


def test_starting_anew_empties_the_file(tmp_path):
    write(tmp_path, range(3))
    make_tracker(tmp_path).close()
    assert lines(tmp_path) == []


def test_the_progress_bar_starts_at_the_resumed_step_and_shows_metrics(tmp_path, capsys):
    tracker = make_tracker(tmp_path, start=6)
    assert (tracker.bar.n, tracker.bar.total) == (6, 10)
    tracker.log(6, {"loss": 0.123456, "seconds": 1.0}, shown=("loss", "absent"))
    assert tracker.bar.n == 7 and tracker.bar.postfix == "loss=0.1235"
    tracker.close()


def test_accelerates_trackers_get_the_same_numbers(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    tracker = make_tracker(tmp_path, trackers=["tensorboard"])
    for step, loss in enumerate([0.5, math.nan]):
        tracker.log(step, {"loss": loss, "seconds": 1.0}, shown=("loss",))
    tracker.close()
    (events,) = (tmp_path / "physalign").glob("events.*")
    accumulator = EventAccumulator(str(events)).Reload()
    assert {"loss", "seconds", "eta_seconds"} <= set(accumulator.Tags()["scalars"])
    first, second = accumulator.Scalars("loss")
    assert (first.step, first.value, second.step) == (0, 0.5, 1) and math.isnan(second.value)


@pytest.mark.parametrize("names", [["aim"], ["tensorboard", "aim"]])
def test_a_tracker_that_is_not_installed_stops_the_run_before_anything_is_loaded(tiny, tmp_path, names):
    """accelerate would leave it out; of two without a word."""
    assert importlib.util.find_spec("aim") is None
    with pytest.raises(ValueError, match=r"train.trackers: aim is not installed: run pip install -e '.\[logging\]'"):
        tiny.train(tmp_path, f"train.trackers=[{','.join(names)}]", "backbone.path=/nowhere")
    assert not (tmp_path / "train").exists()


@pytest.mark.parametrize(("name", "said"), [("wanbd", "did you mean 'wandb'"), ("xyz", "known: .*tensorboard")])
def test_a_tracker_that_nobody_knows_is_refused_with_a_suggestion(name, said):
    with pytest.raises(ValueError, match=f"train.trackers: '{name}' is no tracker; {said}"):
        check_trackers([name])


def test_trackers_that_are_installed_are_let_through():
    pytest.importorskip("tensorboard")
    check_trackers(["tensorboard"])
    check_trackers([])
