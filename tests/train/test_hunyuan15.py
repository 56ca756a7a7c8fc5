"""HunyuanVideo 1.5 against diffusers' own pipeline, and through training, export and the commands."""

import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from diffusers import HunyuanVideo15Pipeline, HunyuanVideo15Transformer3DModel

import recipes
from eval.search.masks import attention_masks
from tests import tiny_families
from tests.tiny_families import LENGTH, VIDEO, noise
from train import export, gdpo
from train.backbones import find_architecture, load_backbone
from train.backbones.architecture import forward_flops, parameter_count
from train.backbones.base import BackboneConfig
from train.backbones.conditioning import Conditioning, pad_texts
from train.backbones.fused.fused_block import unfit
from train.backbones.hunyuan15 import CUT, JointAttention, flops, shape
from train.backbones.tiny import write_tiny_pipeline
from train.groups import GroupSet, told
from train.lora_switch import LoraConfig
from train.plan import plan
from train.sampling import SamplerConfig, initial_noise, sample

PROMPTS = ["a red ball falls", 'a box with "Hello" on it and “you”']
LORA = LoraConfig(rank=4, alpha=4, targets=["attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tiny_pipeline("hunyuan15", tmp_path_factory.mktemp("hunyuan15"))


@pytest.fixture(scope="module")
def config(folder):
    return tiny_families.config_of("hunyuan15", folder)


@pytest.fixture
def backbone(config):
    return load_backbone(config, "cpu")


@pytest.fixture(scope="module")
def pipeline(folder):
    pipeline = HunyuanVideo15Pipeline.from_pretrained(folder)
    pipeline.tokenizer_max_length = LENGTH
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


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
    fits, cut = (f'a ball with "{"x" * count}" on it' for count in (246, 247))  # 10 more: Text "". , spaces, the end
    told = backbone.cut_prompts({"first": fits, "second": cut})
    assert "1 prompts have more letters between quotation marks than the 256" in told and told.endswith("is second")


@pytest.mark.parametrize("guidance", [pytest.param(1.0, marks=pytest.mark.slow), 6.0])
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


def test_attention_without_padding_is_diffusers_with_its_mask(backbone, config):
    """Prompts of different lengths in one batch, to the latents' gradient."""
    theirs = load_backbone(replace(config, attention="native"), "cpu")
    assert not any(isinstance(block.attn.processor, JointAttention) for block in theirs.blocks)
    assert all(isinstance(block.attn.processor, JointAttention) for block in backbone.blocks)
    found = []
    for one in (backbone, theirs):
        latents = noise(2, 4, 3, 4, 6).requires_grad_()
        velocity = one.velocity(latents, torch.tensor([0.3, 0.8]), one.encode_texts(PROMPTS))
        velocity.square().sum().backward()
        found.append((velocity, latents.grad))
    torch.testing.assert_close(*found)


def group(backbone, number=0):
    prompt = PROMPTS[number % 2]
    return tiny_families.group_of(backbone, number, prompt, backbone.encode_texts([prompt]), texts=("text", "text_2"))


def test_groups_hold_both_texts(backbone, tmp_path):
    groups = [group(backbone, number) for number in range(2)]
    tiny_families.write_shard(tmp_path, backbone, groups)
    read = GroupSet(tmp_path, fingerprint=backbone.group_fingerprints)
    for number, one in enumerate(groups):
        found = told(read[number])
        assert found.keys() == {"text", "conditioning.text_2"}
        assert all(torch.equal(found[name], tensor) for name, tensor in told(one).items())
    assert len(read[0].conditioning["text_2"]) == 0 < len(read[1].conditioning["text_2"]) < 256
    padded = Conditioning.of(pad_texts(told(read[1]), backbone.text_lengths(LENGTH)))
    expected = backbone.encode_texts([PROMPTS[1]]).to(dtype=torch.bfloat16)
    assert torch.equal(padded.text, expected.text[0]) and torch.equal(padded.more["text_2"], expected.more["text_2"][0])


@pytest.mark.parametrize("loss", ["bound", "plackett_luce"])
def test_a_step_with_every_term_and_its_checkpointed_twin(config, backbone, loss):
    one = group(backbone, 1)
    plain, again = (tiny_families.step_of(config, one, LORA, loss=loss, checkpointed=twin) for twin in (False, True))
    torch.testing.assert_close(plain, again)


def test_the_reference_is_the_network_alone(backbone):
    tiny_families.check_reference(backbone, given(backbone), LORA)


@pytest.fixture
def trained(backbone, tmp_path):
    """A LoRA of ours as a file, and its policy's velocity."""
    return tiny_families.write_lora(tmp_path / "lora.safetensors", backbone, LORA), backbone.velocity(*given(backbone))


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


def test_it_becomes_part_of_the_base_and_is_merged(config, trained, tmp_path):
    tiny_families.check_merged(config, trained[0], given, trained[1], tmp_path)


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
    tiny_families.check_random("hunyuan15", given, (1, 64, 3, 4, 6), stream=stream)


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
    arguments = [*tiny_families.chain_of("hunyuan15", folder, tmp_path), "sampler.shift=5"]
    tiny_families.check_chain([*arguments, tiny_families.targeted(LORA)], tmp_path)
