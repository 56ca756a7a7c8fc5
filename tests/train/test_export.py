"""Exported LoRA files through the programs that load them: diffusers' own pipelines give what our switch gives."""

import functools
import json
import os
import stat

import pytest
import torch
from diffusers import WanPipeline, WanTransformer3DModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from train import checkpoint, export
from train.backbones import load_backbone
from train.backbones.base import BackboneConfig
from train.backbones.tiny import write_tiny_pipeline
from train.backbones.wan_layers import ORIGINAL_NAMES
from train.lora_switch import LoraConfig, LoraSwitch
from train.optimizer import OptimConfig, build_optimizer

EVERY_LAYER = list(ORIGINAL_NAMES)


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory):
    return functools.cache(lambda family: write_tiny_pipeline(family, tmp_path_factory.mktemp(family) / "pipeline"))


class Trained:
    """Adapters as large as trained ones on one expert of a tiny pipeline, and the file they are saved in."""

    def __init__(self, pipeline, folder, family="wan21", *, expert="high_noise", alpha=10.0, targets=EVERY_LAYER):
        self.pipeline, self.file = pipeline, folder / LoraSwitch.file
        config = BackboneConfig(family=family, path=str(pipeline), dtype="float32", expert=expert)
        self.backbone = load_backbone(config, "cpu", parts=("expert",))
        self.network = self.backbone.transformer
        self.switch = LoraSwitch(self.network, LoraConfig(rank=4, alpha=alpha, targets=list(targets)))
        generator = torch.Generator().manual_seed(5)
        with torch.no_grad():
            for weight in self.switch.parameters():
                weight.normal_(std=0.05, generator=generator)
        (self.expert,) = self.backbone.experts
        fingerprint = self.backbone.fingerprint
        self.metadata = checkpoint.weights_metadata(self.switch, fingerprint=fingerprint, expert=self.expert)
        save_file(self.switch.state_dict(), self.file, metadata=self.metadata)

    def outputs(self):
        policy = velocity(self.network)
        with self.switch.reference():
            reference = velocity(self.network)
        assert (policy - reference).abs().max() > 0.05  # far beyond the tolerances below
        return policy, reference


@pytest.fixture
def trained(folder_of, tmp_path):
    return Trained(folder_of("wan21"), tmp_path)


@torch.no_grad()
def velocity(network):
    generator = torch.Generator().manual_seed(3)
    latents, text = torch.randn(1, 16, 2, 4, 4, generator=generator), torch.randn(1, 8, 64, generator=generator)
    return network(
        hidden_states=latents, timestep=torch.tensor([400.0]), encoder_hidden_states=text, return_dict=False
    )[0]


def assert_same(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("targets", [EVERY_LAYER, LoraConfig().targets], ids=["every layer", "self-attention"])
def test_diffusers_loads_the_file_and_equals_the_policy(folder_of, tmp_path, targets):
    trained = Trained(folder_of("wan21"), tmp_path, targets=targets)
    policy, reference = trained.outputs()
    written = export.to_diffusers(trained.file, tmp_path / "out" / export.DIFFUSERS_FILE)
    pipeline = WanPipeline.from_pretrained(trained.pipeline)
    pipeline.load_lora_weights(written.parent)  # a folder, as the README says
    assert_same(velocity(pipeline.transformer), policy)
    pipeline.disable_lora()
    assert_same(velocity(pipeline.transformer), reference)
    pipeline.unload_lora_weights()
    assert_same(velocity(pipeline.transformer), reference)
    assert [path.name for path in written.parent.iterdir()] == [written.name]  # nothing written aside is left


def test_without_its_metadata_the_file_would_act_at_another_scale(trained, tmp_path):
    """Shows that alpha != rank is tested above: peft's default for a file that does not say is alpha = rank."""
    written = export.to_diffusers(trained.file, tmp_path / "lora.safetensors")
    with safe_open(written, framework="pt") as file:
        adapter = json.loads(file.metadata()["lora_adapter_metadata"])
    assert adapter["transformer.r"] == 4 and adapter["transformer.lora_alpha"] == 10.0
    assert adapter["transformer.target_modules"] == EVERY_LAYER
    bare = tmp_path / "bare.safetensors"
    save_file(load_file(written), bare, metadata={"format": "pt"})
    pipeline = WanPipeline.from_pretrained(trained.pipeline)
    pipeline.load_lora_weights(str(bare))
    assert (velocity(pipeline.transformer) - trained.outputs()[0]).abs().max() > 0.01


def test_exported_again_the_bytes_are_the_same_and_all_may_read_them(trained, tmp_path):
    """safetensors orders metadata at random, and gives its files to their owner alone."""
    umask = os.umask(0)
    os.umask(umask)
    for write in (export.to_diffusers, export.to_comfyui):
        first, *others = (write(trained.file, tmp_path / str(number) / "lora.safetensors") for number in range(6))
        assert all(first.read_bytes() == other.read_bytes() for other in others)
        assert stat.S_IMODE(first.stat().st_mode) == 0o666 & ~umask
    merged = export.to_merged(trained.file, tmp_path / "merged", base=str(trained.pipeline))
    assert {stat.S_IMODE(path.stat().st_mode) for path in merged.iterdir()} == {0o666 & ~umask}


@pytest.mark.parametrize("expert", ["high_noise", "low_noise"])
def test_an_exported_file_says_which_expert_it_is_for(folder_of, tmp_path, expert, capsys):
    trained = Trained(folder_of("wan22_t2v"), tmp_path, "wan22_t2v", expert=expert)
    for write in (export.to_diffusers, export.to_comfyui):
        with safe_open(write(trained.file, tmp_path / "out.safetensors"), framework="pt") as file:
            assert file.metadata()["expert"] == expert
            assert file.metadata()["fingerprint"] == trained.backbone.fingerprint
    export.main([str(trained.file), str(tmp_path / "out")])
    assert capsys.readouterr().out == f"wrote {tmp_path / 'out' / export.DIFFUSERS_FILE}, for the {expert} expert\n"


def test_diffusers_and_the_switch_load_the_same_numbers(trained, tmp_path):
    written = export.to_diffusers(trained.file, tmp_path / "lora.safetensors")
    tensors, ours = load_file(written), trained.switch.state_dict()
    assert sorted(tensors) == sorted(f"transformer.{name}" for name in ours)
    assert all(torch.equal(tensors[f"transformer.{name}"], weight) for name, weight in ours.items())


@pytest.mark.parametrize("alpha", [10.0, 4.0])
def test_comfyui_names_hold_the_same_adapters(folder_of, tmp_path, alpha):
    trained = Trained(folder_of("wan21"), tmp_path, alpha=alpha)
    written = export.to_comfyui(trained.file, tmp_path / "out" / "comfy.safetensors")
    tensors = load_file(written)
    inner = ["self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o", "ffn.0", "ffn.2"]
    inner += [name.replace("self", "cross") for name in inner[:4]]
    assert set(tensors) == {
        f"diffusion_model.blocks.{block}.{name}.{part}"
        for block in range(3)
        for name in inner
        for part in ("lora_down.weight", "lora_up.weight", "alpha")
    }
    assert tensors["diffusion_model.blocks.2.ffn.0.alpha"] == alpha
    assert torch.equal(
        tensors["diffusion_model.blocks.1.cross_attn.o.lora_up.weight"],
        trained.switch.weights["blocks.1.attn2.to_out.0.lora_B.weight"],
    )
    pipeline = WanPipeline.from_pretrained(trained.pipeline)
    pipeline.load_lora_weights(str(written))  # diffusers converts such names itself
    assert_same(velocity(pipeline.transformer), trained.outputs()[0])


def test_comfyui_refuses_a_layer_without_a_name_there(trained, tmp_path):
    name = "blocks.0.attn2.add_k_proj"
    tensors = {f"{name}.lora_A.weight": torch.zeros(4, 8), f"{name}.lora_B.weight": torch.zeros(8, 4)}
    save_file(tensors, tmp_path / "odd.safetensors", metadata=trained.metadata)
    with pytest.raises(ValueError, match="layer blocks.0.attn2.add_k_proj has no ComfyUI name"):
        export.to_comfyui(tmp_path / "odd.safetensors", tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()


def test_comfyui_refuses_a_layer_outside_the_blocks(folder_of, tmp_path):
    trained = Trained(folder_of("wan21"), tmp_path, targets=["condition_embedder.time_proj"])
    with pytest.raises(ValueError, match="layer condition_embedder.time_proj has no ComfyUI name"):
        export.to_comfyui(trained.file, tmp_path / "out.safetensors")


def test_merged_weights_equal_the_policy_and_leave_the_base_alone(trained, tmp_path):
    policy, reference = trained.outputs()
    merged = export.to_merged(trained.file, tmp_path / "merged", base=str(trained.pipeline), dtype=torch.float32)
    assert_same(velocity(WanTransformer3DModel.from_pretrained(merged)), policy)
    assert {path.name for path in merged.iterdir()} == {"config.json", "diffusion_pytorch_model.safetensors"}
    base = WanTransformer3DModel.from_pretrained(trained.pipeline / "transformer")
    assert torch.equal(velocity(base), reference)


def test_the_low_noise_expert_goes_to_the_second_transformer(folder_of, tmp_path):
    trained = Trained(folder_of("wan22_t2v"), tmp_path, "wan22_t2v", expert="low_noise")
    assert trained.expert == trained.metadata["expert"] == "low_noise"
    policy, reference = trained.outputs()
    written = export.to_diffusers(trained.file, tmp_path / "out" / "low.safetensors")
    pipeline = WanPipeline.from_pretrained(trained.pipeline)
    high = velocity(pipeline.transformer)
    pipeline.load_lora_weights(str(written), load_into_transformer_2=True)
    assert_same(velocity(pipeline.transformer_2), policy)
    assert torch.equal(velocity(pipeline.transformer), high)
    assert not torch.allclose(high, reference, atol=1e-2)  # merging into the wrong expert would show
    merged = export.to_merged(trained.file, tmp_path / "merged", base=str(trained.pipeline), dtype=torch.float32)
    assert_same(velocity(WanTransformer3DModel.from_pretrained(merged)), policy)


# The command line


def save_checkpoints(trained, folder, steps=(1, 2)):
    """A training folder as the loop leaves it; each checkpoint's adapters differ."""
    optimizer = build_optimizer(OptimConfig(lr=0.01), trained.switch.parameters())
    for step in steps:
        for weight in trained.switch.parameters():
            weight.grad = torch.ones_like(weight)
        optimizer.step()
        checkpoint.save(
            folder / "checkpoints",
            step,
            switch=trained.switch,
            optimizer=optimizer,
            state={"samples_seen": step, "skipped": 0, "seed": 0},
            metadata=trained.metadata,
            keep=3,
        )


def test_main_exports_the_newest_checkpoint_of_a_training_folder(trained, tmp_path, capsys):
    run, out = tmp_path / "run", tmp_path / "out"
    save_checkpoints(trained, run)
    policy, reference = trained.outputs()

    export.main([str(run), str(out)])
    assert capsys.readouterr().out == f"wrote {out / export.DIFFUSERS_FILE}\n"
    export.main([str(run), str(out / "comfy.safetensors"), "--to", "comfyui"])
    pipeline = WanPipeline.from_pretrained(trained.pipeline)
    for name in (export.DIFFUSERS_FILE, "comfy.safetensors"):
        pipeline.load_lora_weights(str(out / name))
        assert_same(velocity(pipeline.transformer), policy)
        pipeline.unload_lora_weights()

    export.main([str(run), str(tmp_path / "full"), "--to", "merged", "--base", str(trained.pipeline)])
    merged = WanTransformer3DModel.from_pretrained(tmp_path / "full", torch_dtype=torch.float32)
    assert merged.blocks[0].attn1.to_q.weight.dtype == torch.float32
    found = velocity(merged)  # the weights were rounded to bfloat16
    assert (found - policy).abs().mean() < 0.1 * (found - reference).abs().mean()


def test_main_merges_in_float32_where_asked_to(trained, tmp_path):
    policy, _ = trained.outputs()
    arguments = [str(trained.file), str(tmp_path), "--to", "merged", "--base", str(trained.pipeline)]
    export.main([*arguments, "--dtype", "float32"])
    assert_same(velocity(WanTransformer3DModel.from_pretrained(tmp_path)), policy)


def test_main_takes_an_older_checkpoint_and_a_lora_file(trained, tmp_path):
    save_checkpoints(trained, tmp_path / "run")
    older = tmp_path / "run" / "checkpoints" / "step_00000001"
    export.main([str(older), str(tmp_path / "older.safetensors")])
    export.main([str(older / LoraSwitch.file), str(tmp_path / "file.safetensors")])
    expected = load_file(older / LoraSwitch.file)
    for name in ("older", "file"):
        found = load_file(tmp_path / f"{name}.safetensors")
        assert all(torch.equal(found[f"transformer.{key}"], weight) for key, weight in expected.items())


def test_main_needs_a_base_to_merge(trained, tmp_path, capsys):
    with pytest.raises(SystemExit):
        export.main([str(trained.file), str(tmp_path / "out"), "--to", "merged"])
    assert "--to merged needs --base" in capsys.readouterr().err


# Files that cannot be exported

EXPORTS = {
    "diffusers": export.to_diffusers,
    "comfyui": export.to_comfyui,
    "merged": functools.partial(export.to_merged, base="unread"),
}


@pytest.mark.parametrize("to", EXPORTS)
def test_a_missing_file_or_checkpoint_is_named(tmp_path, to):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"LoRA .*nothing\.safetensors does not exist: give a LoRA file"):
        EXPORTS[to](tmp_path / "nothing.safetensors", tmp_path / "out")
    with pytest.raises(ValueError, match=r"no checkpoint in .*empty: give a LoRA file"):
        EXPORTS[to](tmp_path / "empty", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("to", EXPORTS)
def test_a_damaged_file_is_named(trained, tmp_path, to):
    damaged = tmp_path / "damaged.safetensors"
    damaged.write_bytes(trained.file.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"LoRA .*damaged\.safetensors cannot be read .*damaged or not safetensors"):
        EXPORTS[to](damaged, tmp_path / "out")


@pytest.mark.parametrize("to", EXPORTS)
def test_a_foreign_file_is_refused(trained, tmp_path, to):
    """An exported file is one: it names its layers otherwise, so exporting it again would nest prefixes."""
    foreign = export.to_diffusers(trained.file, tmp_path / "foreign.safetensors")
    with pytest.raises(ValueError, match=r"LoRA .*foreign\.safetensors carries no physalign metadata"):
        EXPORTS[to](foreign, tmp_path / "out")


@pytest.mark.parametrize("to", EXPORTS)
def test_a_file_that_says_another_rank_than_it_has_is_refused(trained, tmp_path, to):
    trained.metadata["rank"] = "2000000000"
    save_file(trained.switch.state_dict(), trained.file, metadata=trained.metadata)
    with pytest.raises(ValueError, match=r"LoRA .* is damaged: its metadata say rank 2000000000, but .* has shape \("):
        EXPORTS[to](trained.file, tmp_path / "out")


def test_merging_adapters_of_layers_that_are_not_there_is_refused(trained, tmp_path):
    name = "blocks.7.attn1.to_q"
    tensors = {f"{name}.lora_A.weight": torch.zeros(4, 8), f"{name}.lora_B.weight": torch.zeros(8, 4)}
    save_file(tensors, trained.file, metadata=trained.metadata)
    with pytest.raises(ValueError, match=r"does not fit this network in 1 of 1 entries: blocks\.7\.attn1\.to_q, which"):
        export.to_merged(trained.file, tmp_path / "merged", base=str(trained.pipeline))
    assert not (tmp_path / "merged").exists()


def test_merging_into_another_backbone_is_refused_naming_both(folder_of, trained, tmp_path):
    other = write_tiny_pipeline("wan21", tmp_path / "other", seed=1)
    with pytest.raises(ValueError, match=rf"{trained.backbone.fingerprint}.*wan21-[0-9a-f]{{12}}"):
        export.to_merged(trained.file, tmp_path / "merged", base=str(other))
    with pytest.raises(ValueError, match=rf"{trained.backbone.fingerprint}.*wan21-[0-9a-f]{{12}}"):
        export.to_merged(trained.file, tmp_path / "merged", base=str(folder_of("wan22_t2v")))
    assert not (tmp_path / "merged").exists()
