import json
import os
import random
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import VJEPA2Model

from eval.experiments.world_model import report as world_model_report
from eval.experiments.world_model import training
from eval.experiments.world_model.sources import ROBOTS, SANDBOX, robots_pool
from eval.experiments.world_model.training import (
    CHECKPOINT,
    block_mask,
    draw_step,
    encode,
    new_model,
    patchify,
    predict,
)
from eval.robots import recordings
from eval.robots.demonstrations import list_demonstrations
from eval.robots.tasks import TASKS
from eval.sandbox.clips import simulate
from eval.sandbox.splits import is_held_out, simulate_block
from eval.search.world_model import SurpriseConfig, WorldModel
from eval.small_wan.training import Checkpoint
from train.teachers import ENCODERS
from train.teachers.vjepa2 import VJepa2Config

SHIPPED = Path(training.__file__).parents[2] / "sandbox" / "world_model"


@torch.no_grad()
def test_tokens_equal_those_of_the_model_s_own_forward():
    model = new_model(0, SANDBOX).eval()
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(2, 8, 3, 64, 64, generator=generator)
    patches, ids = patchify(pixels, 2, 8), torch.arange(256)
    whole = model.encoder(pixel_values_videos=pixels).last_hidden_state
    assert torch.allclose(encode(model.encoder, patches, ids), whole, atol=1e-4)
    context = encode(model.encoder, patches[:, ids[:128]], ids[:128])
    assert torch.allclose(context, model.encoder(pixel_values_videos=pixels[:, :4]).last_hidden_state, atol=1e-4)

    seen, hidden = torch.randperm(256, generator=generator).split([100, 156])
    expected = model.predictor(
        encoder_hidden_states=whole,
        context_mask=[seen.expand(2, -1)],
        target_mask=[hidden.expand(2, -1)],
    ).last_hidden_state
    assert torch.allclose(predict(model.predictor, whole[:, seen], seen, hidden), expected, atol=1e-4)


@pytest.mark.parametrize("kind", SANDBOX.kinds)
def test_a_step_s_inputs(kind):
    pool = torch.randint(256, (3, 17, 64, 64, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)

    def draw():
        return draw_step(pool, 4, kind, random.Random(1), torch.Generator().manual_seed(2), SANDBOX)

    pixels, seen, hidden = draw()
    tokens = kind[0] // 2 * 64
    assert pixels.shape == (4, kind[0], 3, 64, 64)
    assert len(set(seen.tolist()) | set(hidden.tolist())) == len(seen) + len(hidden) <= tokens
    if kind[1]:  # the future is hidden, all of it
        assert seen.tolist() == list(range(kind[1] // 2 * 64)) and hidden[-1] == tokens - 1
        assert len(seen) + len(hidden) == tokens
    assert all(torch.equal(a, b) for a, b in zip((pixels, seen, hidden), draw(), strict=True))


def test_a_robot_is_neither_mirrored_nor_dyed():
    pool = torch.randint(256, (2, 33, 96, 96, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    for number in range(4):
        drawn = draw_step(pool, 1, (32, 8), random.Random(number), torch.Generator().manual_seed(number), ROBOTS)
        pixels, seen, hidden = drawn
        assert pixels.shape == (1, 32, 3, 96, 96) and len(seen) == 4 * 144 and len(hidden) == 12 * 144
        mean, std = (torch.tensor(part)[:, None, None] for part in (training.MEAN, training.STD))
        frames = ((pixels[0] * std + mean) * 255).round().byte().permute(0, 2, 3, 1)
        assert any(torch.equal(frames, clip[start : start + 32]) for clip in pool for start in (0, 1))
    mask = block_mask((16, 12, 12), random.Random(0), "cpu")
    assert 4 <= mask.any(dim=0).any(dim=0).sum() <= 12 and not mask.all()


def test_the_robots_pool_is_read_where_it_was_recorded(tmp_path, monkeypatch):
    clips = torch.randint(256, (3, 33, 96, 96, 3), dtype=torch.uint8)
    for one, frames in zip(list_demonstrations(list(TASKS), "anytime", 5, range(3)), clips, strict=True):
        made = {"frames": frames.numpy(), "actions": frames.numpy()[:1]}
        recordings._write(recordings.path_of(tmp_path, one, ROBOTS.video), made)
    assert torch.equal(robots_pool(3, 5, "cpu", tmp_path), clips)


def test_a_training_that_was_stopped_continues(tmp_path, monkeypatch, capsys):
    clips = torch.randint(256, (3, 17, 32, 32, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    small = {**SANDBOX.architecture, "crop_size": 32, "num_hidden_layers": 1, "pred_num_hidden_layers": 1}
    source = replace(SANDBOX, architecture=small, kinds=((8, 0), (8, 4)), make_pool=lambda *_: clips)
    monkeypatch.setitem(training.SOURCES, "robots", source)
    handler = signal.getsignal(signal.SIGTERM)

    def train(name, stop=False):
        settings = ["--steps", "4", "--batch", "2", "--pool", "3", "--device", "cpu"]
        draw, asked = training.draw_step, []

        def draw_and_stop(*given):
            asked.append(given)
            if stop and len(asked) == len(source.kinds) + 2:  # in the second step
                os.kill(os.getpid(), signal.SIGTERM)
            return draw(*given)

        with monkeypatch.context() as patched:
            patched.setattr(training, "draw_step", draw_and_stop)
            training.main(["--world", "robots", "--output", str(tmp_path / name), *settings])
        return tmp_path / name

    try:
        whole, stopped = train("whole") / "model.safetensors", train("stopped", stop=True)
        assert "stopped after step 2;" in capsys.readouterr().out
        assert [path.name for path in stopped.iterdir()] == [CHECKPOINT]
        train("stopped")
        assert (stopped / "model.safetensors").read_bytes() == whole.read_bytes()
        assert not (stopped / CHECKPOINT).exists()
    finally:
        signal.signal(signal.SIGTERM, handler)


def test_a_checkpoint_fills_moments_where_they_are(tmp_path):
    """A captured graph goes on writing to them."""
    layer, handler = torch.nn.Linear(2, 2), signal.getsignal(signal.SIGTERM)
    optimizer, draws, choices = torch.optim.AdamW(layer.parameters()), torch.Generator(), random.Random(0)

    def step():
        layer(torch.ones(1, 2)).square().sum().backward()
        optimizer.step()

    try:
        checkpoint = Checkpoint(tmp_path / "state.safetensors", SANDBOX.defaults)
        step()
        checkpoint.save(1, layer, optimizer, draws, choices)
        moments, drawn = optimizer.state[layer.weight]["exp_avg"], choices.random()
        before, weight = moments.clone(), layer.weight.detach().clone()
        step()
        assert not torch.equal(moments, before)
        assert checkpoint.load(layer, optimizer, draws, choices) == 1 and choices.random() == drawn
        assert optimizer.state[layer.weight]["exp_avg"] is moments and torch.equal(moments, before)
        assert torch.equal(layer.weight, weight) and optimizer.state[layer.weight]["step"] == 1
    finally:
        signal.signal(signal.SIGTERM, handler)


def test_blocks_span_time():
    mask = block_mask((8, 8, 8), random.Random(0), "cpu")
    assert mask.any() and not mask.all()
    columns = mask.any(dim=0)
    assert (mask.sum(dim=0)[columns] >= 4).all()


def test_the_pool_holds_no_held_out_prompt():
    clips = simulate_block("mixed", "train", 0, 0, SANDBOX.video)
    kept = [index for index, prompt in enumerate(clips.prompts) if not is_held_out(prompt)]
    assert len(kept) < len(clips)
    assert torch.equal(SANDBOX.make_pool(9, 0, "cpu", Path()), clips.frames[kept[:9]])


@pytest.mark.slow
def test_train_write_load_and_report(tmp_path, capsys, monkeypatch):
    pool = simulate("mixed", 4, torch.Generator().manual_seed(0)).frames
    short = replace(SANDBOX, kinds=((8, 0), (8, 4)), make_pool=lambda count, seed, device, folder: pool[:count])
    monkeypatch.setitem(training.SOURCES, "sandbox", short)
    monkeypatch.setattr(world_model_report, "VIOLATIONS", ("gravity", "momentum"))
    arguments = ["--steps", "3", "--batch", "2", "--pool", "4", "--device", "cpu"]
    for name in ("first", "second"):
        training.main(["--output", str(tmp_path / name), *arguments])
    assert sorted(path.name for path in (tmp_path / "first").iterdir()) == [
        "config.json",
        "model.safetensors",
        "training.json",
    ]
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("first", "second")]
    assert weights[0] == weights[1] and len(weights[0]) < 2_500_000
    report = json.loads((tmp_path / "first" / "training.json").read_text(encoding="utf-8"))
    assert report["settings"]["steps"] == 3 and report["feature_std"] > 0

    tokens = ENCODERS["vjepa2"].build(VJepa2Config(str(tmp_path / "first")), "cpu")(torch.zeros(17, 64, 64, 3).byte())
    assert tokens.grid == (8, 8, 8) and tokens.values.shape == (512, 96)
    capsys.readouterr()
    sizes = ["--window", "4", "--context", "2", "--stride", "8"]
    world_model_report.main(["--model", str(tmp_path / "first"), "--pairs", "1", "--device", "cpu", *sizes])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 + 2 and lines[2].startswith("| gravity | 3 |")


def test_numbers_below_one_and_one_clip_a_step_are_refused(tmp_path):
    with pytest.raises(ValueError, match="--steps is 0"):
        training.main(["--output", str(tmp_path), "--steps", "0", "--device", "cpu"])
    with pytest.raises(ValueError, match="--batch is 1: the features' spread .* use 2 or more"):
        training.main(["--output", str(tmp_path), "--batch", "1", "--device", "cpu"])


def test_the_help_has_every_option_with_the_world_s_own_defaults(capsys):
    for arguments, steps in ((["--help"], 12_000), (["--world", "robots", "--help"], 5000)):
        with pytest.raises(SystemExit):
            training.main(arguments)
        text = capsys.readouterr().out
        assert f"of the training (default: {steps})" in text and "folder of recorded clips" in text


def test_auc_and_pairs_by_hand():
    low, high = torch.tensor([1.0, 2.0]), torch.tensor([2.0, 1.5])
    assert world_model_report.auc(low, high) == pytest.approx((1 + 1 + 0.5 + 0) / 4)
    assert world_model_report.paired(low, high) == 0.5
    ((true, violated),) = world_model_report.make_pairs("momentum", 3, 1.0, 1)
    assert true.shape == violated.shape == (3, 17, 64, 64, 3)
    assert torch.equal(true[:, 0], violated[:, 0]) and not torch.equal(true, violated)


needs_weights = pytest.mark.skipif(not (SHIPPED / "model.safetensors").exists(), reason="no weights are shipped")


@needs_weights
def test_the_shipped_model_loads_whole_and_is_small():
    _, report = VJEPA2Model.from_pretrained(SHIPPED, dtype=torch.float32, output_loading_info=True)
    assert not any(report.values())
    assert sum(path.stat().st_size for path in SHIPPED.iterdir()) < 2_500_000


@pytest.mark.slow
@needs_weights
@pytest.mark.parametrize("kind", ["teleport", "momentum"])
def test_the_shipped_model_knows_physics(kind):
    model = WorldModel(str(SHIPPED), "cpu")
    for true, violated in world_model_report.make_pairs(kind, 10, 1.0, 2):
        scores = [model.surprise(clips, SurpriseConfig(context=4, stride=1)) for clips in (true, violated)]
        assert world_model_report.paired(*scores) >= 0.9
