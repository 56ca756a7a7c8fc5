"""HunyuanVideo 1.5 against diffusers' own pipeline, and through training, export and the commands."""

import json
import math
import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from diffusers import HunyuanVideo15Pipeline, HunyuanVideo15Transformer3DModel
from torch import nn

import recipes
from data_pipeline import build
from eval import generate
from eval.search.masks import attention_masks
from train import export, gdpo
from train.backbones import find_architecture, load_backbone
from train.backbones.architecture import forward_flops, parameter_count
from train.backbones.base import BackboneConfig, BaseLora
from train.backbones.conditioning import Conditioning, pad_texts, unpad_texts
from train.backbones.hunyuan15 import CUT, flops, shape
from train.backbones.tiny import write_tiny_pipeline
from train.clips import VideoConfig
from train.data import Sample
from train.fused.fused_block import unfit
from train.groups import Group, GroupSet, Loser, ShardWriter, told, write_index
from train.lora_switch import LoraConfig, LoraSwitch
from train.plan import plan
from train.policy import Policy
from train.sampling import SamplerConfig, initial_noise, sample
from train.weight_files import write_tensors

PROMPTS = ["a red ball falls", 'a box with "Hello" on it and “you”']
VIDEO = VideoConfig(32, 48, 9, 8.0)
LENGTH = 24
TARGETS = ["attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tiny_pipeline("hunyuan15", tmp_path_factory.mktemp("hunyuan15"))


@pytest.fixture(scope="module")
def config(folder):
    return BackboneConfig(
        family="hunyuan15", path=str(folder), dtype="float32", text_length=LENGTH, architecture="tiny"
    )


@pytest.fixture
def backbone(config):
    return load_backbone(config, "cpu")


@pytest.fixture(scope="module")
def pipeline(folder):
    pipeline = HunyuanVideo15Pipeline.from_pretrained(folder)
    pipeline.tokenizer_max_length = LENGTH
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def noise(*size, seed=0):
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed))


def test_both_texts_equal_diffusers_and_zeros_are_the_mask(backbone, pipeline):
    texts = backbone.encode_texts(PROMPTS).texts()
    with torch.no_grad():  # with gradients another attention kernel runs
        found = pipeline.encode_prompt(PROMPTS, batch_size=2)
    for text, embeddings, mask in zip(texts.values(), found[::2], found[1::2], strict=True):
        assert torch.equal(text, embeddings.masked_fill(mask.unsqueeze(-1) == 0, 0))
        assert torch.equal(text.ne(0).any(dim=-1), mask.bool())
    assert not texts["text_2"][0].any() and texts["text_2"][1].any()  # no quotation marks, no letters
    assert {name: tuple(text.shape[1:]) for name, text in texts.items()} == backbone.text_shapes()


def test_a_prompt_is_counted_without_its_instruction(backbone):
    text = backbone.encode_texts(["ball", "ball ball"]).text
    assert text.ne(0).any(dim=-1).sum(dim=1).tolist() == backbone.count_tokens(["ball", "ball ball"]) == [1, 2]
    long = " ".join(["ball"] * (LENGTH + 1))
    assert f"longer than the {LENGTH} tokens" in backbone.cut_prompts({"first": "ball", "second": long})
    assert not backbone.cut_prompts({"first": "ball"}) and CUT == 108


@pytest.mark.parametrize("guidance", [1.0, 6.0])
def test_sampling_equals_diffusers(backbone, pipeline, guidance):
    """In 4 steps, whose times are the same to the bit: diffusers rounds its grid twice, and a last bit of 1000 t moves
    a random network's clip by 1e-4."""
    start, steps = initial_noise(backbone, VIDEO, [1, 2]), 4
    pipeline.guider.guidance_scale = guidance
    size = {"height": VIDEO.height, "width": VIDEO.width, "num_frames": VIDEO.num_frames}
    made = pipeline(prompt=PROMPTS, **size, num_inference_steps=steps, latents=start, output_type="latent").frames
    sampler = SamplerConfig(solver="euler", steps=steps, guidance=guidance, shift=5.0, negative_prompt="")
    conditioning = backbone.encode_texts(PROMPTS)
    latents = sample(backbone, conditioning, start, sampler, progress=False)
    torch.testing.assert_close(latents, made, rtol=0, atol=1e-5)
    other = sample(backbone, conditioning[1:].expand(2), start, sampler, progress=False)
    assert (other[0] - made[0]).abs().max() > 1e-3  # the prompts count
    clip = pipeline.vae.decode(made[:1] / pipeline.vae.config.scaling_factor).sample.clamp(-1, 1)
    torch.testing.assert_close(backbone.decode_latents(latents)[:1], clip, rtol=0, atol=1e-5)


def test_latents_are_scaled_and_encoded_one_by_one(backbone):
    frames = torch.rand(2, 3, 9, 32, 48, generator=torch.Generator().manual_seed(0)) * 2 - 1
    latents = backbone.encode_video(frames, batch_size=2)
    mode = backbone.vae.encode(frames[1:]).latent_dist.mode() * backbone.vae.config.scaling_factor
    assert latents.shape == (2, *backbone.latent_shape(32, 48, 9)) == (2, 4, 3, 4, 6)
    torch.testing.assert_close(latents[1:], mode)


def test_features_are_the_videos_and_image_tokens_of_zeros_change_nothing(backbone):
    latents, t, told_ = noise(2, 4, 3, 4, 6), torch.tensor([0.3, 0.8]), backbone.encode_texts(PROMPTS)
    velocity, features = backbone.velocity(latents, t, told_, features_at=1)
    assert features.shape == (2, 64, 3, 4, 6)
    arguments = backbone.network_arguments(latents, 1000 * t, told_, torch.float32)
    arguments["image_embeds"] = torch.zeros(2, 7, 32)
    torch.testing.assert_close(velocity, backbone.transformer(**arguments, return_dict=False)[0])
    torch.testing.assert_close(velocity[:1], backbone.velocity(latents[:1], t[:1], told_[:1]))


def group_of(backbone, number=0):
    shape_, prompt = backbone.latent_shape(VIDEO.height, VIDEO.width, VIDEO.num_frames), PROMPTS[number % 2]
    named = {name: tensor[0].bfloat16() for name, tensor in backbone.encode_texts([prompt]).named().items()}
    found = Conditioning.of(unpad_texts(named, ("text", "text_2")))
    return Group(
        key=f"g{number}",
        prompt=prompt,
        action="fall",
        physics_richness=0.5,
        source="made up",
        losers_info=[Loser(seed, 0.4, 0.6) for seed in range(2)],
        fingerprint=backbone.encoders,
        winner=noise(*shape_, seed=number).bfloat16(),
        losers=noise(2, *shape_, seed=9 + number).bfloat16(),
        text=found.text,
        conditioning=found.more,
    )


def test_groups_hold_both_texts(backbone, tmp_path):
    groups = [group_of(backbone, number) for number in range(2)]
    with ShardWriter(tmp_path, "shard") as writer:
        for group in groups:
            writer.write(group)
    write_index(tmp_path, fingerprint=backbone.encoders, video=VIDEO)
    read = GroupSet(tmp_path, fingerprint=backbone.group_fingerprints)
    for number, group in enumerate(groups):
        found = told(read[number])
        assert found.keys() == {"text", "conditioning.text_2"}
        assert all(torch.equal(found[name], tensor) for name, tensor in told(group).items())
    assert len(read[0].conditioning["text_2"]) == 0 < len(read[1].conditioning["text_2"]) < 256
    padded = Conditioning.of(pad_texts(told(read[1]), backbone.text_lengths(LENGTH)))
    expected = backbone.encode_texts([PROMPTS[1]]).to(dtype=torch.bfloat16)
    assert torch.equal(padded.text, expected.text[0]) and torch.equal(padded.more["text_2"], expected.more["text_2"][0])


def settings(config, **sections):
    arguments = ["recipe=tiny", f"backbone.path={config.path}", "lora.targets=[" + ",".join(TARGETS) + "]"]
    return replace(recipes.load(gdpo.Config, arguments), backbone=config, **sections)


@pytest.mark.parametrize("loss", ["bound", "plackett_luce"])
def test_a_step_with_every_term_and_its_checkpointed_twin(config, loss):
    chosen = settings(config)
    chosen.objective.loss, chosen.objective.w_fm, chosen.self_score.strength = loss, 0.5, 1.0
    chosen.self_score.every = 1
    found = []
    for checkpointed in (False, True):
        backbone = load_backbone(config, "cpu")
        switch = LoraSwitch(backbone.transformer, LoraConfig(rank=4, alpha=4, targets=TARGETS), seed=1)
        for name, weight in switch.weights.items():
            if "lora_B" in name:
                nn.init.normal_(weight, std=0.02, generator=torch.Generator().manual_seed(len(name)))
        if checkpointed:
            backbone.transformer.enable_gradient_checkpointing(gradient_checkpointing_func=switch.checkpoint)
        tensors = gdpo.prepare(chosen, Sample(0, group_of(backbone, 1), 0))
        batch = {name: tensor[None] for name, tensor in tensors.items()}
        gradients, metrics = gdpo.step(chosen, Policy(backbone, switch), batch)
        found.append(gradients)
        assert metrics["self_score"] > 0 and all(gradient.isfinite().all() for gradient in gradients)
        assert sum(gradient.abs().sum() for gradient in gradients) > 0
    for plain, again in zip(*found, strict=True):
        torch.testing.assert_close(plain, again)


def test_the_reference_is_the_network_alone(backbone):
    latents, t, told_ = noise(1, 4, 3, 4, 6), torch.tensor([0.5]), backbone.encode_texts(PROMPTS[:1])
    before = backbone.velocity(latents, t, told_)
    switch = LoraSwitch(backbone.transformer, LoraConfig(rank=4, alpha=4, targets=TARGETS))
    assert torch.equal(backbone.velocity(latents, t, told_), before)
    for weight in switch.weights.values():
        nn.init.normal_(weight, generator=torch.Generator().manual_seed(0))
    assert not torch.allclose(backbone.velocity(latents, t, told_), before)
    with switch.reference():
        assert torch.equal(backbone.velocity(latents, t, told_), before)


@pytest.fixture
def trained(backbone, tmp_path):
    """A LoRA of ours as a file, and its policy's velocity."""
    switch = LoraSwitch(backbone.transformer, LoraConfig(rank=4, alpha=8, targets=TARGETS))
    for name, weight in switch.weights.items():
        nn.init.normal_(weight, std=0.1, generator=torch.Generator().manual_seed(len(name)))
    metadata = switch.describe() | {"fingerprint": backbone.fingerprint, "expert": "transformer"}
    write_tensors(switch.state_dict(), tmp_path / "lora.safetensors", metadata)
    return tmp_path / "lora.safetensors", backbone.velocity(*given(backbone))


def given(backbone):
    return noise(1, 4, 3, 4, 6), torch.tensor([0.5]), backbone.encode_texts(PROMPTS[:1])


def test_diffusers_loads_the_export(config, trained, folder, tmp_path):
    file, expected = trained
    export.to_diffusers(file, tmp_path / "out" / "lora.safetensors")
    backbone = load_backbone(config, "cpu")
    network = HunyuanVideo15Transformer3DModel.from_pretrained(folder / "transformer")
    network.load_lora_adapter(tmp_path / "out" / "lora.safetensors", prefix="transformer", use_safetensors=True)
    backbone.experts = {"transformer": network}
    torch.testing.assert_close(backbone.velocity(*given(backbone)), expected, rtol=0, atol=1e-5)


def test_it_becomes_part_of_the_base_and_is_merged(config, trained, folder, tmp_path):
    file, expected = trained
    export.to_diffusers(file, tmp_path / "out" / "lora.safetensors")
    base = replace(config, loras=[BaseLora(str(tmp_path / "out" / "lora.safetensors"))])
    merged = load_backbone(base, "cpu")
    torch.testing.assert_close(merged.velocity(*given(merged)), expected, rtol=0, atol=1e-5)
    export.to_merged(file, tmp_path / "merged", base=str(folder), dtype=torch.float32)
    whole = load_backbone(config, "cpu")
    whole.experts = {"transformer": HunyuanVideo15Transformer3DModel.from_pretrained(tmp_path / "merged")}
    torch.testing.assert_close(whole.velocity(*given(whole)), expected, rtol=0, atol=1e-5)


def test_what_there_is_not_is_refused_by_name(config, backbone, trained, tmp_path, folder):
    with pytest.raises(ValueError, match="no ComfyUI name: none of HunyuanVideo15Transformer3DModel is known"):
        export.to_comfyui(trained[0], tmp_path / "comfy.safetensors")
    sampler = SamplerConfig(solver="euler", steps=2, guidance=1.0, cache=0.1)
    with pytest.raises(ValueError, match="no residual cache"):
        sample(backbone, backbone.encode_texts(PROMPTS[:1]), noise(1, 4, 3, 4, 6), sampler, progress=False)
    with pytest.raises(ValueError, match="shows no attention to text alone: use the mask motion"):
        attention_masks(None, SimpleNamespace(backbone=backbone, times=[0.5]))
    assert unfit(backbone.transformer) == "there are no fused blocks for HunyuanVideo15Transformer3DModel"
    with pytest.raises(ValueError, match="backbone.family=wan21 does not fit .* it is a HunyuanVideo15Pipeline; set"):
        load_backbone(replace(config, family="wan21"), "cpu", parts=())
    with pytest.raises(ValueError, match="generates from text alone"):
        backbone.condition(PROMPTS[:1], torch.zeros(1, 3, 32, 48), num_frames=9)
    with pytest.raises(ValueError, match="reads texts of .* tokens"):
        backbone.velocity(noise(1, 4, 3, 4, 6), torch.tensor([0.5]), Conditioning(torch.zeros(1, LENGTH, 64)))


@pytest.mark.parametrize("stream", [False, True])
def test_random_weights_stream_and_give_features(stream):
    config = BackboneConfig("hunyuan15", architecture="tiny", random_weights=True, dtype="float32", text_length=LENGTH)
    backbone = load_backbone(replace(config, stream=stream), "cpu")
    velocity, features = backbone.velocity(*given(backbone), features_at=2)
    assert velocity.isfinite().all() and 0.1 < velocity.std() < 10 and features.shape == (1, 64, 3, 4, 6)
    whole = load_backbone(config, "cpu")
    assert torch.equal(velocity, whole.velocity(*given(whole)))


def test_sizes_without_weights():
    architecture = find_architecture(BackboneConfig("hunyuan15", architecture="8.3B"))
    assert parameter_count(architecture) / 1e9 == pytest.approx(8.3, abs=0.1)
    own = shape(architecture["transformer"])
    assert own == (54, 16, 2048, 8192, (1, 1, 1))
    assert flops(own._replace(width=3, ffn=4, layers=1), 2, 1) == (360.0, 108.0)
    assert forward_flops(architecture, 2, 1)[1] == 4 * 9 * 2048 * 54


def test_the_recipe_plans(capsys):
    config = recipes.load(gdpo.Config, ["recipe=hunyuan15"])
    lines = "\n".join(plan(config, world=1, sharded=False))
    assert "hunyuan15 8.3B: 8,3" in lines and "54 blocks of width 2048" in lines
    assert re.search(r"latents \(32, \d+, \d+, \d+\)", lines)


@pytest.mark.slow
def test_from_clips_to_videos(folder, tmp_path):
    """Build, train, generate, with the tiny recipe's settings: 40 seconds."""
    arguments = ["recipe=tiny", f"output={tmp_path}", "backbone.family=hunyuan15", f"backbone.path={folder}"]
    arguments += ["backbone.text_length=32", "video.height=32", "video.width=32"]  # 17 frames
    arguments += ["lora.targets=[" + ",".join(TARGETS) + "]", "sampler.steps=2", "sampler.shift=5"]
    arguments += ["optim.steps=2", "train.checkpoint_every=2", "validation.every=2", "self_score.strength=1"]
    arguments += ["train.num_workers=0"]
    build.main([*arguments, "pipeline.manifest=sandbox:ramp:4"])
    gdpo.main(arguments)
    generate.main([*arguments, f"generate.lora={tmp_path / 'train'}"])
    losses = [json.loads(line)["loss"] for line in (tmp_path / "train" / "metrics.jsonl").read_text().splitlines()]
    assert len(losses) == 2 and all(map(math.isfinite, losses))
    assert len(list((tmp_path / "clips" / "tuned").glob("*.mp4"))) == 4
    assert sorted(path.name for path in (tmp_path / "train" / "lora").iterdir())
