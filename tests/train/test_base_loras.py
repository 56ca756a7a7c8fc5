"""LoRAs under the base (`backbone.loras`) and above it (`lora.start`): from supervised to preference training."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.synthetic_groups import write_synthetic_groups
from train import checkpoint, export, lora_start, sft
from train.backbones import load_backbone
from train.backbones.loading import ENCODERS, fingerprint
from train.groups import GroupSet
from train.lora_switch import LoraSwitch
from train.weight_files import read_header

STEPS = ("optim.steps=3", "train.checkpoint_every=1", "optim.lr=0.01", "optim.lr_end=0.01")


@pytest.fixture(scope="module")
def supervised(tiny, tmp_path_factory):
    """A supervised run's training folder."""
    folder = tmp_path_factory.mktemp("sft")
    tiny.train(folder, *STEPS, entry=sft)
    return folder / "train"


def lora_of(folder):
    return load_file(checkpoint.find_lora(folder)[0])


def test_a_supervised_lora_becomes_the_base_of_preferences(tiny, tmp_path, supervised, capsys):
    loras = f"backbone.loras=[{{path: {supervised}}}]"
    checkpoints = tiny.train(tmp_path, *STEPS, loras)
    name = read_header(checkpoint.find_lora(checkpoints)[0])[0]["fingerprint"]
    backbone = load_backbone(tiny.config(tmp_path, loras).backbone, "cpu", parts=("expert",))
    assert name == backbone.fingerprint and name.startswith(f"{tiny.fingerprint}+")
    # the losers of the old base, which said nothing else, are named as such
    assert f"the losers were made by {tiny.fingerprint}, the reference is {name}\n" in capsys.readouterr().out

    plain = load_backbone(tiny.config(tmp_path).backbone, "cpu", parts=("expert",))
    switch = checkpoint.attach_trained(supervised, plain.experts, fingerprint=tiny.fingerprint)
    scale = switch.config.alpha / switch.config.rank
    for layer, module in plain.transformer.named_modules():
        if f"{layer}.lora_A.weight" in switch.weights:
            up, down = module.lora_up, module.lora_down
            torch.testing.assert_close(
                dict(backbone.transformer.named_parameters())[f"{layer}.weight"],
                module.weight.detach() + scale * (up @ down).detach(),
                rtol=0,
                atol=1e-6,
            )
    with pytest.raises(
        ValueError, match=rf"was trained on backbone {tiny.fingerprint}\+\w+, this backbone is wan21-\w+\."
    ):
        tiny.train(tmp_path, *STEPS, "optim.steps=4")


def test_a_policy_starts_from_a_lora_and_resumes_without_it(tiny, tmp_path, supervised, capsys):
    """Resume reads the checkpoint alone, and is bit for bit the run that was not stopped."""
    own = tmp_path / "start"
    shutil.copytree(supervised, own)
    start = f"lora.start={own}"
    tiny.train(tmp_path / "whole", *STEPS, start)
    said = capsys.readouterr().out
    file = checkpoint.find_lora(own)[0]
    assert f"the policy starts from {file}, the reference is {tiny.fingerprint} without it\n" in said
    tiny.train(tmp_path / "halves", *STEPS, start, "optim.steps=2")
    shutil.rmtree(own)
    capsys.readouterr()
    checkpoints = tiny.train(tmp_path / "halves", *STEPS, start)
    assert "starts from" not in capsys.readouterr().out
    last = "step_00000003"
    whole = tiny.weights(tmp_path / "whole" / "train" / "checkpoints" / last)
    found = tiny.weights(checkpoints / last)
    assert whole.keys() == found.keys() and all(torch.equal(whole[name], found[name]) for name in whole)
    assert tiny.metrics(tmp_path / "halves") == tiny.metrics(tmp_path / "whole")
    # The policy is the start's: its distance to the base is there at the first step.
    tiny.train(tmp_path / "zero", *STEPS)
    first = [tiny.metrics(tmp_path / name)[0] for name in ("zero", "whole")]
    assert first[0]["margin"] == 0 and first[1]["margin"] != 0


@pytest.mark.parametrize("alpha", [None, 3.0])
def test_the_policy_is_the_files_at_any_alpha(tiny, tmp_path, supervised, alpha):
    """Also from an export that other tools read."""
    file = export.to_comfyui(supervised, tmp_path / "lora.safetensors")
    more = [f"lora.start={file}"] + ([f"lora.alpha={alpha}"] if alpha else [])
    config = tiny.config(tmp_path, *more)
    backbone = load_backbone(config.backbone, "cpu", parts=("expert",))
    switch = LoraSwitch(backbone.transformer, config.lora)
    lora_start.start_from(config, backbone, switch)
    given, scale = lora_of(supervised), tiny.config(tmp_path).lora.alpha / config.lora.rank
    for name, down in given.items():
        if ".lora_A." in name:
            up = name.replace("lora_A", "lora_B")
            found = config.lora.alpha / config.lora.rank * (switch.weights[up] @ switch.weights[name])
            torch.testing.assert_close(found.detach(), scale * (given[up] @ down), rtol=0, atol=1e-6)
        if alpha is None:
            assert torch.equal(switch.weights[name], down)


def test_what_a_policy_cannot_start_from_is_one_line(tiny, tmp_path, supervised):
    file, other = export.to_comfyui(supervised, tmp_path / "comfy.safetensors"), tmp_path / "other.safetensors"
    rank = tiny.config(tmp_path).lora.rank

    def refused(message, *arguments):
        with pytest.raises(ValueError, match=message):
            tiny.train(tmp_path / "run", *STEPS, *arguments)
        assert not (tmp_path / "run" / "train" / "checkpoints").exists()

    refused(rf"lora.start={file} has rank {rank} at .*, the recipe says lora.rank=3: set lora.rank={rank}, or merge it",
            f"lora.start={file}", "lora.rank=3")  # fmt: skip
    refused("lora.start=/nowhere: LoRA /nowhere does not exist", "lora.start=/nowhere")
    refused("lora.start=/nowhere: LoRA /nowhere does not exist", "lora.start=/nowhere", "dry_run=true")
    refused("backbone.loras=/nowhere: LoRA /nowhere", "backbone.loras=[{path: /nowhere}]", "dry_run=true")
    refused(r"holds adapters for other layers.*Set lora.targets", f"lora.start={file}", "lora.targets=[attn1.to_q]")
    refused("needs train.parameters=lora: merge it with backbone.loras",
            f"lora.start={file}", "train.parameters=full", "backbone.dtype=float32")  # fmt: skip
    save_file(load_file(file) | {"diffusion_model.blocks.0.norm3.diff": torch.ones(128)}, other)
    refused(r"holds 1 full differences, which adapters cannot start from: merge it", f"lora.start={other}")
    save_file(load_file(file), other, metadata={"fingerprint": "wan21-0123456789ab"})
    refused("was trained on backbone wan21-0123456789ab, this one is", f"lora.start={other}")
    refused("backbone.loras=.* is given for the network 'low_noise', this backbone has: transformer",
            f"backbone.loras=[{{path: {file}, expert: low_noise}}]")  # fmt: skip


# Groups of a base


def test_groups_suit_every_network_beside_their_encoders(tiny, tmp_path, supervised, capsys):
    """A merged export as another pipeline: its transformer is another one, latents and texts are the same."""
    merged = tmp_path / "merged"
    shutil.copytree(tiny.model, merged)
    shutil.rmtree(merged / "transformer")
    arguments = [str(supervised), str(merged / "transformer"), "--to", "merged", "--base", str(tiny.model)]
    export.main([*arguments, "--dtype", "float32"])
    encoders = fingerprint("wan21", tiny.model, ENCODERS)
    assert fingerprint("wan21", merged, ENCODERS) == encoders
    assert fingerprint("wan21", merged) != tiny.fingerprint
    shapes = {"latent_shape": (16, 5, 8, 8), "text_shape": (12, 64)}
    write_synthetic_groups(tmp_path / "groups", num_groups=4, num_losers=2, **shapes, fingerprint=encoders)
    new, old = f"train.groups={tmp_path / 'groups'}", f"backbone.path={merged}"
    tiny.train(tmp_path / "run", *STEPS, new, old)
    tiny.train(tmp_path / "other", *STEPS, new)
    with pytest.raises(ValueError, match=f"built with backbone {tiny.fingerprint}, but training uses wan21-"):
        tiny.train(tmp_path / "refused", *STEPS, old)  # groups of earlier versions say the whole pipeline
    assert GroupSet(tmp_path / "groups").network == encoders


def test_a_cache_of_the_reference_knows_its_loras(tiny, tmp_path, supervised):
    cache = f"train.reference_cache={tmp_path / 'cache'}"
    tiny.train(tmp_path / "plain", *STEPS, cache)
    assert json.loads((tmp_path / "cache" / "settings.json").read_text())["backbone"] == tiny.fingerprint
    with pytest.raises(ValueError, match=rf"backbone={tiny.fingerprint} \(here {tiny.fingerprint}\+"):
        tiny.train(tmp_path / "merged", *STEPS, cache, f"backbone.loras=[{{path: {supervised}}}]")
