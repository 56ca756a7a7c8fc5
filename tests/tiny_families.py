"""What every family's tests do to a tiny pipeline: a group, a step, a LoRA and its ways out, a chain of commands."""

import json
import math
from dataclasses import replace

import torch
from torch import nn

import recipes
from data_pipeline import build
from eval import generate
from train import export, gdpo
from train.backbones import load_backbone
from train.backbones.base import BackboneConfig, BaseLora
from train.backbones.conditioning import Conditioning, unpad_texts
from train.clips import VideoConfig
from train.data import Sample
from train.groups import Group, Loser, ShardWriter, write_index
from train.lora_switch import LoraSwitch
from train.policy import Policy
from train.weight_files import write_tensors

VIDEO = VideoConfig(32, 48, 9, 8.0)
LENGTH = 24


def config_of(family, folder):
    return BackboneConfig(family=family, path=str(folder), dtype="float32", text_length=LENGTH, architecture="tiny")


def noise(*size, seed=0):
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed))


def targeted(lora):
    """The arguments of a recipe for the layers of `lora`."""
    return f"lora.targets=[{','.join(lora.targets)}]"


def group_of(backbone, number, prompt, conditioning, *, texts=("text",), losers=2):
    """A group of noise with the conditioning of one clip, of which `texts` are stored without their padding."""
    shape = backbone.latent_shape(VIDEO.height, VIDEO.width, VIDEO.num_frames)
    named = {name: tensor[0].bfloat16() for name, tensor in conditioning.named().items()}
    found = Conditioning.of(unpad_texts(named, texts))
    return Group(
        key=f"g{number}",
        prompt=prompt,
        action="fall",
        physics_richness=0.5,
        source="made up",
        losers_info=[Loser(seed, 0.4, 0.6) for seed in range(losers)],
        fingerprint=backbone.encoders,
        winner=noise(*shape, seed=number).bfloat16(),
        losers=noise(losers, *shape, seed=9 + number).bfloat16(),
        text=found.text,
        condition=found.image,
        conditioning=found.more,
    )


def write_shard(folder, backbone, groups):
    with ShardWriter(folder, "shard") as writer:
        for group in groups:
            writer.write(group)
    write_index(folder, fingerprint=backbone.encoders, video=VIDEO)


def step_of(config, group, lora, *, loss="bound", checkpointed=False):
    """Gradients of a preference step with the anchor and the self-score, by a policy away from its reference."""
    arguments = ["recipe=tiny", f"backbone.path={config.path}", targeted(lora)]
    chosen = replace(recipes.load(gdpo.Config, arguments), backbone=config)
    chosen.objective.loss, chosen.objective.anchor = loss, 0.5
    chosen.self_score.strength, chosen.self_score.every = 1.0, 1
    backbone = load_backbone(config, "cpu")
    switch = LoraSwitch(backbone.transformer, lora, seed=1)
    for name, weight in switch.weights.items():
        if "lora_B" in name:
            nn.init.normal_(weight, std=0.02, generator=torch.Generator().manual_seed(len(name)))
    if checkpointed:
        backbone.transformer.enable_gradient_checkpointing(gradient_checkpointing_func=switch.checkpoint)
    batch = {name: tensor[None] for name, tensor in gdpo.prepare(chosen, Sample(0, group, 0)).items()}
    gradients, metrics = gdpo.step(chosen, Policy(backbone, switch), batch)
    assert metrics["self_score"] > 0 and all(gradient.isfinite().all() for gradient in gradients)
    assert sum(gradient.abs().sum() for gradient in gradients) > 0
    return gradients


def check_reference(backbone, given, lora):
    """The switched-off policy is the network alone; given: of a pass."""
    before = backbone.velocity(*given)
    switch = LoraSwitch(backbone.transformer, lora)
    assert torch.equal(backbone.velocity(*given), before)
    for weight in switch.weights.values():
        nn.init.normal_(weight, generator=torch.Generator().manual_seed(0))
    assert not torch.allclose(backbone.velocity(*given), before)
    with switch.reference():
        assert torch.equal(backbone.velocity(*given), before)


def write_lora(file, backbone, lora):
    """A LoRA of ours as a file, which the backbone has from here on."""
    switch = LoraSwitch(backbone.transformer, replace(lora, alpha=8.0))
    for name, weight in switch.weights.items():
        nn.init.normal_(weight, std=0.1, generator=torch.Generator().manual_seed(len(name)))
    metadata = switch.describe() | {"fingerprint": backbone.fingerprint, "expert": "transformer"}
    write_tensors(switch.state_dict(), file, metadata)
    return file


def check_merged(config, file, given, expected, folder):
    """As part of the base and merged by the export, the LoRA `file` gives the policy's velocity; given: of a pass, for
    a backbone."""
    exported = export.to_diffusers(file, folder / "out" / "lora.safetensors")
    merged = load_backbone(replace(config, loras=[BaseLora(str(exported))]), "cpu")
    torch.testing.assert_close(merged.velocity(*given(merged)), expected, rtol=0, atol=1e-5)
    export.to_merged(file, folder / "merged", base=config.path, dtype=torch.float32)
    whole = load_backbone(config, "cpu")
    whole.experts = {"transformer": whole.kind.model.from_pretrained(folder / "merged")}
    torch.testing.assert_close(whole.velocity(*given(whole)), expected, rtol=0, atol=1e-5)


def check_random(family, given, features, *, stream):
    """Random weights give a velocity of order one and features, streamed as well as not, to the bit."""
    config = BackboneConfig(family, architecture="tiny", random_weights=True, dtype="float32", text_length=LENGTH)
    backbone = load_backbone(replace(config, stream=stream), "cpu")
    velocity, found = backbone.velocity(*given(backbone), features_at=2)
    assert velocity.isfinite().all() and 0.1 < velocity.std() < 10 and found.shape == features
    whole = load_backbone(config, "cpu")
    assert torch.equal(velocity, whole.velocity(*given(whole)))


def chain_of(family, model, output):
    """Arguments of the tiny recipe for two steps of 17 frames of 32 x 32 and two of sampling."""
    arguments = ["recipe=tiny", f"output={output}", f"backbone.family={family}", f"backbone.path={model}"]
    arguments += ["backbone.text_length=32", "video.height=32", "video.width=32", "sampler.steps=2"]
    arguments += ["optim.steps=2", "train.checkpoint_every=2", "validation.every=2", "self_score.strength=1"]
    return [*arguments, "train.num_workers=0"]


def check_losses(output):
    losses = [json.loads(line)["loss"] for line in (output / "train" / "metrics.jsonl").read_text().splitlines()]
    assert len(losses) == 2 and all(map(math.isfinite, losses))


def check_chain(arguments, output):
    """Build, train, generate."""
    build.main([*arguments, "pipeline.manifest=sandbox:ramp:4"])
    gdpo.main(arguments)
    generate.main([*arguments, f"generate.lora={output / 'train'}"])
    check_losses(output)
    assert len(list((output / "clips" / "tuned").glob("*.mp4"))) == 4
    assert sorted(path.name for path in (output / "train" / "lora").iterdir())
