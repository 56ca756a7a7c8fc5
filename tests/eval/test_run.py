"""`eval/run.py`: base and tuned on the sandbox benchmark, end to end with a tiny random pipeline."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from eval import run
from eval.benchmarks import sandbox
from train import checkpoint
from train.backbones import load_backbone
from train.backbones.base import BackboneConfig
from train.backbones.tiny import write_tiny_pipeline
from train.clips import VideoConfig, read_clip
from train.full_parameters import FullParameters
from train.lora_switch import LoraConfig, LoraSwitch

VIDEO = VideoConfig(64, 64, 17, 8.0)
COMMON = ["recipe=tiny", "run.sandbox.clips=5", "run.batch_size=2", "sampler.steps=2", "sampler.guidance=1.0"]


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    write_tiny_pipeline("wan21", folder / "model")
    config = BackboneConfig(path=str(folder / "model"), dtype="float32", text_length=64)
    backbone = load_backbone(config, "cpu", parts=("transformer",))
    switch = LoraSwitch(backbone.transformer, LoraConfig(rank=2, alpha=4.0))
    generator = torch.Generator().manual_seed(0)
    state = {name: torch.randn(weight.shape, generator=generator) * 0.3 for name, weight in switch.weights.items()}
    metadata = checkpoint.weights_metadata(switch, fingerprint=backbone.fingerprint, expert=backbone.expert)
    save_file(state, folder / "lora.safetensors", metadata=metadata)
    results = run.main([*COMMON, f"output={folder}", f"run.lora={folder / 'lora.safetensors'}"])
    return folder, results


def test_results_say_what_the_rows_say(tuned):
    folder, results = tuned
    rows = [json.loads(line) for line in (folder / "eval" / "scores.jsonl").read_text(encoding="utf-8").splitlines()]
    assert json.loads((folder / "eval" / "results.json").read_text(encoding="utf-8")) == results
    assert {row["model"] for row in rows} == {"true", "base", "tuned"} and len(rows) == 15
    for model in ("true", "base", "tuned"):
        values = [row["physical"] for row in rows if row["model"] == model]
        assert results["models"][model]["physical"]["mean"] == pytest.approx(sum(values) / 5)
    gain = [
        t["physical"] - b["physical"]
        for t, b in zip(
            [row for row in rows if row["model"] == "tuned"],
            [row for row in rows if row["model"] == "base"],
            strict=True,
        )
    ]
    assert results["gain"]["physical"]["mean"] == pytest.approx(sum(gain) / 5)
    assert results["models"]["true"]["physical"]["mean"] > 0.9  # the judge knows true clips


def test_pictures_and_clips(tuned):
    folder, _ = tuned
    base, changed = (load_file(folder / "eval" / f"clips-{m}-0of1.safetensors")["clips"] for m in ("base", "tuned"))
    assert base.shape == (5, 17, 64, 64, 3) and not torch.equal(base, changed)
    assert (folder / "eval" / "sheet.png").stat().st_size > 1000
    read_clip(
        folder / "eval" / "comparison.mp4", VideoConfig(64, 192, 5 * 17, 8.0)
    )  # raises unless all frames are there


def test_full_weights_are_compared_with_their_base(tuned, tmp_path):
    folder, results = tuned
    config = BackboneConfig(path=str(folder / "model"), dtype="float32", text_length=64)
    backbone = load_backbone(config, "cpu", parts=("transformer",))
    switch = FullParameters(backbone.transformer)
    metadata = checkpoint.weights_metadata(switch, fingerprint=backbone.fingerprint, expert=backbone.expert)
    generator = torch.Generator().manual_seed(0)
    state = {name: w + 0.05 * torch.randn(w.shape, generator=generator) for name, w in switch.state_dict().items()}
    save_file(state, tmp_path / "transformer.safetensors", metadata=metadata)
    model = f"backbone.path={folder / 'model'}"
    full = run.main([*COMMON, model, f"output={tmp_path}", f"run.lora={tmp_path}"])
    assert full["models"]["base"] == results["models"]["base"]
    clips = [load_file(tmp_path / "eval" / f"clips-{m}-0of1.safetensors")["clips"] for m in ("base", "tuned")]
    assert not torch.equal(*clips)


def test_a_second_run_samples_nothing(tuned, monkeypatch):
    folder, results = tuned
    monkeypatch.setattr(run, "sample_clips", lambda *_, **__: pytest.fail("sampled again"))
    again = run.main([*COMMON, f"output={folder}", f"run.lora={folder / 'lora.safetensors'}"])
    assert again == results


def test_another_sampler_is_sampled_anew(tuned, monkeypatch):
    folder, _ = tuned
    monkeypatch.setattr(run, "sample_clips", lambda *_, **__: (_ for _ in ()).throw(RuntimeError("sampled")))
    with pytest.raises(RuntimeError, match="sampled"):
        run.main([*COMMON, f"output={folder}", "sampler.steps=3"])


def test_held_out_scenes_differ_from_those_of_other_seeds():
    first, frames = sandbox.prompts(sandbox.SandboxConfig(clips=5, seed=0), VIDEO)
    again, same = sandbox.prompts(sandbox.SandboxConfig(clips=5, seed=0), VIDEO)
    other, others = sandbox.prompts(sandbox.SandboxConfig(clips=5, seed=1), VIDEO)
    assert first == again and torch.equal(frames, same)
    assert not torch.equal(frames, others)
    seeds = [sandbox.noise_seeds(sandbox.SandboxConfig(clips=100, seed=s)) for s in range(3)]
    assert len({seed for group in seeds for seed in group}) == 300
