"""Cosmos-Predict 2.5 against diffusers' own pipeline, and through training, export and the commands."""

import inspect
import json
import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from diffusers import Cosmos2_5_PredictBasePipeline
from diffusers.pipelines.cosmos.pipeline_cosmos2_5_predict import DEFAULT_NEGATIVE_PROMPT
from torch import nn

import recipes
from eval.search.masks import attention_masks
from tests import tiny_families
from tests.tiny_families import LENGTH, VIDEO, noise
from train import export, gdpo
from train.backbones import find_architecture, load_backbone
from train.backbones.architecture import forward_flops, parameter_count
from train.backbones.base import BackboneConfig
from train.backbones.conditioning import Conditioning, pad_texts
from train.backbones.cosmos25 import HELD_TIME, INSTRUCTION, Cosmos25, shape
from train.backbones.fused.fused_block import unfit
from train.backbones.tiny import write_tiny_pipeline
from train.groups import GroupSet, told
from train.lora_switch import LoraConfig
from train.plan import plan
from train.sampling import SamplerConfig, grid, initial_noise, sample

PROMPTS = ["a red ball falls", "a box on the ramp slides"]
LORA = LoraConfig(rank=4, alpha=4)
SIGMA_MAX = 200.0
# Of latents up to 9: guidance multiplies float32's rounding, which differs as much between one clip and two at once.
CLOSE = {1.0: {"rtol": 0, "atol": 1e-5}, 3.0: {"rtol": 1e-5, "atol": 1e-5}}
OWN = {"solver": "unipc_karras", "sigma_max": SIGMA_MAX, "negative_prompt": ""}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tiny_pipeline("cosmos25", tmp_path_factory.mktemp("cosmos25"))


@pytest.fixture(scope="module")
def config(folder):
    return tiny_families.config_of("cosmos25", folder)


@pytest.fixture
def backbone(config):
    return load_backbone(config, "cpu")


class NoGuardrail:
    """In the place of NVIDIA's, which is a package and models of its own."""

    def to(self, device):
        return self

    def check_text_safety(self, prompt):
        return True


@pytest.fixture(scope="module")
def pipeline(folder):
    pipeline = Cosmos2_5_PredictBasePipeline.from_pretrained(folder, safety_checker=NoGuardrail())
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def images(count=2):
    return torch.rand(count, 3, 32, 48, generator=torch.Generator().manual_seed(3)) * 2 - 1


def prefixes():
    return torch.rand(2, 3, 5, 32, 48, generator=torch.Generator().manual_seed(4)) * 2 - 1


def theirs(pipeline, start, *, steps, guidance, first=None):
    """Latents of diffusers' pipeline, clip by clip. It makes an image of a video's last frame, which needs no
    torchvision."""
    made = []
    for number, prompt in enumerate(PROMPTS):
        given = {}
        if first is not None:
            video = first[number][None] if first.dim() == 5 else first[number][None, :, None]
            given = {"video": video, "num_latent_conditional_frames": (video.shape[2] - 1) // 4 + 1}
        size = {"height": VIDEO.height, "width": VIDEO.width, "num_frames": VIDEO.num_frames}
        own = {"num_inference_steps": steps, "guidance_scale": guidance, "max_sequence_length": LENGTH}
        latents = {"latents": start[number : number + 1], "output_type": "latent"}
        made.append(pipeline(prompt=[prompt], negative_prompt=[""], **given, **size, **own, **latents).frames)
    return torch.cat(made)


def test_texts_equal_diffusers_with_their_padding(backbone, pipeline):
    text = backbone.encode_texts(PROMPTS).text
    assert torch.equal(text, pipeline._get_prompt_embeds(PROMPTS, max_sequence_length=LENGTH))
    assert text.ne(0).any(dim=-1).all() and not torch.equal(text[0], text[1])
    assert tuple(text.shape[1:]) == backbone.text_shapes()["text"] == (LENGTH, 3 * 64)
    assert torch.equal(text[1:], backbone.encode_texts(PROMPTS[1:]).text)


def test_a_prompt_is_counted_with_its_instruction(backbone, monkeypatch):
    assert f'"{INSTRUCTION}"' in inspect.getsource(Cosmos2_5_PredictBasePipeline._get_prompt_embeds)
    assert backbone.count_tokens(["ball", "ball ball"]) == [1, 2]
    long = " ".join(["ball"] * (LENGTH + 1))
    assert f"longer than the {LENGTH} tokens" in backbone.cut_prompts({"first": "ball", "second": long})
    assert not backbone.cut_prompts({"first": "ball"})
    whole = "{% for one in messages %}{{ one['content'][0]['text'] }}{% endfor %}"
    monkeypatch.setattr(backbone.tokenizer, "chat_template", whole)
    ids = []
    monkeypatch.setattr(backbone.text_encoder, "forward", lambda ids_, **_: ids.append(ids_))
    backbone.text_length = 200
    with pytest.raises(AttributeError):  # of the states that no encoder gave
        backbone.encode_texts(["ball"])
    assert backbone.count_tokens(["ball"]) == [int((ids[0] != 0).sum())]


@pytest.mark.parametrize("guidance", CLOSE)
def test_sampling_equals_diffusers(backbone, pipeline, guidance):
    """With the checkpoints' own scheduler. diffusers counts guidance without the negative's own share."""
    start, steps = initial_noise(backbone, VIDEO, [1, 2]), 5
    made = theirs(pipeline, start, steps=steps, guidance=guidance)
    sampler = SamplerConfig(**OWN, steps=steps, guidance=guidance + 1 if guidance > 1 else 1.0)
    conditioning = backbone.encode_texts(PROMPTS)
    latents = sample(backbone, conditioning, start, sampler, progress=False)
    torch.testing.assert_close(latents, made, **CLOSE[guidance])
    other = sample(backbone, conditioning[1:].expand(2), start, sampler, progress=False)
    assert (other[0] - made[0]).abs().max() > 1e-3  # the prompts count
    config = pipeline.vae.config
    mean, std = (torch.tensor(one).view(1, -1, 1, 1, 1) for one in (config.latents_mean, config.latents_std))
    clip = pipeline.vae.decode(made[:1] * std + mean).sample.clamp(-1, 1)
    torch.testing.assert_close(backbone.decode_latents(made)[:1], clip, rtol=0, atol=1e-5)


@pytest.mark.parametrize("given", [1, 2], ids=["image", "prefix"])
@pytest.mark.parametrize("guidance", CLOSE)
def test_a_first_frame_is_diffusers_but_for_the_noise_that_it_keeps(backbone, pipeline, guidance, given):
    """diffusers' given latent frames keep 1 / 201 of their noise, for its clips begin below t = 1; ours are the image's
    or the prefix's. The network reads neither: it is given those."""
    start, steps, first = initial_noise(backbone, VIDEO, [1, 2]), 5, images() if given == 1 else prefixes()
    made = theirs(pipeline, start, steps=steps, guidance=guidance, first=first)
    sampler = SamplerConfig(**OWN, steps=steps, guidance=guidance + 1 if guidance > 1 else 1.0)
    conditioning = backbone.condition(PROMPTS, first, num_frames=VIDEO.num_frames)
    latents = sample(backbone, conditioning, start, sampler, progress=False)
    torch.testing.assert_close(latents[:, :, given:], made[:, :, given:], **CLOSE[guidance])
    kept = 1 / (1 + SIGMA_MAX)
    image, noise_ = latents[:, :, :given], start[:, :, :given]
    torch.testing.assert_close(image, conditioning.image)
    torch.testing.assert_close((1 - kept) * image + kept * noise_, made[:, :, :given], rtol=0, atol=1e-5)
    alone = sample(backbone, backbone.encode_texts(PROMPTS), start, sampler, progress=False)
    assert (alone[:, :, given:] - latents[:, :, given:]).abs().max() > 1e-2  # they count


def test_the_grid_is_karras():
    """Eq. 5 of arXiv 2206.00364 with rho = 7, by hand: of three levels from 200 to .01 the middle one is 8.0686."""
    sigmas, times = grid(SamplerConfig(**OWN, steps=3))
    middle = ((200 ** (1 / 7) + 0.01 ** (1 / 7)) / 2) ** 7
    expected = torch.tensor([200 / 201, middle / (1 + middle), 0.01 / 1.01, 0])
    torch.testing.assert_close(sigmas, expected, rtol=1e-6, atol=0)
    assert torch.equal(sigmas, times)
    half = grid(SamplerConfig(**OWN, steps=3), 0.5)[0]
    torch.testing.assert_close(half, sigmas / 2)
    found = SamplerConfig(**OWN).settings()
    assert found["sigma_max"] == SIGMA_MAX and "shift" not in found
    with pytest.raises(ValueError, match="sampler.sigma_max=0.01: give a number above 0.01"):
        SamplerConfig(**OWN | {"sigma_max": 0.01}).check()


def test_latents_are_normalised(backbone):
    frames = torch.rand(2, 3, 9, 32, 48, generator=torch.Generator().manual_seed(0)) * 2 - 1
    latents = backbone.encode_video(frames)
    mean, std = backbone.latent_moments()
    mode = backbone.vae.encode(frames[1:]).latent_dist.mode()
    assert latents.shape == (2, *backbone.latent_shape(32, 48, 9)) == (2, 4, 3, 4, 6)
    torch.testing.assert_close(latents[1:], (mode - mean) / std)
    first = backbone.encode_first_frame(frames[:, :, 0], 9)
    torch.testing.assert_close(first, latents[:, :, :1])  # the VAE is causal


def test_one_time_per_clip_is_the_function_of_one_per_frame(backbone):
    latents, t, told_ = noise(2, 4, 3, 4, 6), torch.tensor([0.3, 0.8]), backbone.encode_texts(PROMPTS)
    velocity, features = backbone.velocity(latents, t, told_, features_at=1)
    assert features.shape == (2, 64, 3, 2, 3)
    arguments = backbone.network_arguments(latents, t, told_, torch.float32)
    arguments["timestep"] = t.view(2, 1, 1, 1, 1).expand(2, 1, 3, 1, 1)
    torch.testing.assert_close(velocity, backbone.transformer(**arguments, return_dict=False)[0])
    torch.testing.assert_close(velocity[:1], backbone.velocity(latents[:1], t[:1], told_[:1]))


def test_the_first_frame_is_held(backbone):
    latents, t = noise(2, 4, 3, 4, 6), torch.tensor([0.3, 0.8])
    told_ = backbone.condition(PROMPTS, images(), num_frames=9)
    velocity = backbone.velocity(latents, t, told_)
    assert not velocity[:, :, 0].any() and velocity[:, :, 1:].any()
    moved = torch.cat([latents[:, :, :1] + 1, latents[:, :, 1:]], dim=2)
    assert torch.equal(velocity, backbone.velocity(moved, t, told_))  # the network is given the image there
    assert told_.held_frames(3) == 1 and told_.generated(velocity).shape[2] == 2
    arguments = backbone.network_arguments(latents, t, told_, torch.float32)
    torch.testing.assert_close(arguments["timestep"][:, 0, :, 0, 0], torch.tensor([[1e-4, 0.3, 0.3], [1e-4, 0.8, 0.8]]))
    assert arguments["condition_mask"][:, :, 0].all() and not arguments["condition_mask"][:, :, 1:].any()


def group(backbone, number=0, *, image=False):
    prompt, first = PROMPTS[number % 2], {"first_frame": images(1), "num_frames": VIDEO.num_frames} if image else {}
    return tiny_families.group_of(backbone, number, prompt, backbone.condition([prompt], **first))


@pytest.mark.parametrize("image", [False, True])
def test_groups_hold_the_text_with_its_padding(backbone, tmp_path, image):
    groups = [group(backbone, number, image=image) for number in range(2)]
    tiny_families.write_shard(tmp_path, backbone, groups)
    read = GroupSet(tmp_path, fingerprint=backbone.group_fingerprints)
    for number, one in enumerate(groups):
        found = told(read[number])
        assert found.keys() == ({"text", "condition"} if image else {"text"})
        assert all(torch.equal(found[name], tensor) for name, tensor in told(one).items())
        assert len(found["text"]) == LENGTH
    padded = Conditioning.of(pad_texts(told(read[1]), backbone.text_lengths(LENGTH)))
    assert torch.equal(padded.text, backbone.encode_texts([PROMPTS[1]]).text[0].bfloat16())


@pytest.mark.parametrize("image", [False, True])
@pytest.mark.parametrize("loss", ["bound", "plackett_luce"])
def test_a_step_with_every_term_and_its_checkpointed_twin(config, backbone, loss, image):
    one = group(backbone, 1, image=image)
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


def test_diffusers_pipeline_loads_the_export(config, trained, folder, tmp_path):
    file, expected = trained
    export.to_diffusers(file, tmp_path / "out" / "pytorch_lora_weights.safetensors")
    pipeline = Cosmos2_5_PredictBasePipeline.from_pretrained(folder, safety_checker=NoGuardrail())
    pipeline.load_lora_weights(tmp_path / "out", adapter_name="physics")
    backbone = load_backbone(config, "cpu")
    plain = backbone.velocity(*given(backbone))
    backbone.experts = {"transformer": pipeline.transformer}
    torch.testing.assert_close(backbone.velocity(*given(backbone)), expected, rtol=0, atol=1e-5)
    pipeline.set_adapters("physics", 0.0)
    torch.testing.assert_close(backbone.velocity(*given(backbone)), plain, rtol=0, atol=1e-5)
    assert (plain - expected).abs().max() > 1e-3


def test_it_becomes_part_of_the_base_and_is_merged(config, trained, tmp_path):
    tiny_families.check_merged(config, trained[0], given, trained[1], tmp_path)


def test_what_there_is_not_is_refused_by_name(config, backbone, trained, tmp_path, folder):
    with pytest.raises(ValueError, match="no ComfyUI name: none of CosmosTransformer3DModel is known"):
        export.to_comfyui(trained[0], tmp_path / "comfy.safetensors")
    sampler = SamplerConfig(solver="euler", steps=2, guidance=1.0, cache=0.1)
    with pytest.raises(ValueError, match="no residual cache"):
        sample(backbone, backbone.encode_texts(PROMPTS[:1]), noise(1, 4, 3, 4, 6), sampler, progress=False)
    with pytest.raises(ValueError, match="shows no attention to text alone: use the mask motion"):
        attention_masks(None, SimpleNamespace(backbone=backbone, times=[0.5]))
    assert unfit(backbone.transformer) == "there are no fused blocks for CosmosTransformer3DModel"
    with pytest.raises(ValueError, match="does not fit .* it is a Cosmos2_5_PredictBasePipeline; set .*=cosmos25"):
        load_backbone(replace(config, family="wan21"), "cpu", parts=())
    with pytest.raises(ValueError, match=f"the text has 7 tokens but backbone.text_length={LENGTH}"):
        backbone.velocity(noise(1, 4, 3, 4, 6), torch.tensor([0.5]), Conditioning(torch.zeros(1, 7, 192)))
    short = nn.functional.pad(backbone.encode_texts(PROMPTS[:1]).text[:, :-1], (0, 0, 0, 1))
    with pytest.raises(ValueError, match="the text ends in rows of zeros, .* with the backbone.text_length that"):
        backbone.velocity(noise(1, 4, 3, 4, 6), torch.tensor([0.5]), Conditioning(short))
    file = folder / "transformer" / "config.json"
    said = file.read_text(encoding="utf-8")
    try:
        file.write_text(json.dumps(json.loads(said) | {"crossattn_proj_in_channels": 96}), encoding="utf-8")
        with pytest.raises(ValueError, match="3 layers of width 64, but the transformer reads 96 numbers a token"):
            load_backbone(config, "cpu", parts=("text",))
    finally:
        file.write_text(said, encoding="utf-8")


@pytest.mark.parametrize("stream", [False, True])
def test_random_weights_stream_and_give_features(stream):
    tiny_families.check_random("cosmos25", given, (1, 64, 3, 2, 3), stream=stream)


@pytest.mark.parametrize(("name", "billions", "layers", "width"), [("2B", 2.06, 28, 2048), ("14B", 14.4, 36, 5120)])
def test_sizes_without_weights(name, billions, layers, width):
    architecture = find_architecture(BackboneConfig("cosmos25", architecture=name))
    assert parameter_count(architecture) / 1e9 == pytest.approx(billions, abs=0.05)
    assert shape(architecture["transformer"]) == (layers, width // 128, width, 4 * width, (1, 2, 2))
    assert forward_flops(architecture, 2, 1) == (2.0 * 2 * layers * 14 * width**2, 4.0 * 2 * 3 * width * layers)
    assert Cosmos25.text_width(architecture) == 100_352


def test_the_recipe_plans_and_samples_as_the_checkpoint():
    config = recipes.load(gdpo.Config, ["recipe=cosmos25"])
    lines = "\n".join(plan(config, world=1, sharded=False))
    assert "cosmos25 2B: 2,0" in lines and "28 blocks of width 2048" in lines
    assert re.search(r"latents \(16, 24, 88, 160\)", lines)
    defaults = inspect.signature(Cosmos2_5_PredictBasePipeline.__call__).parameters
    sampler, video = config.sampler, config.video
    assert sampler.negative_prompt == DEFAULT_NEGATIVE_PROMPT
    assert sampler.guidance - 1 == defaults["guidance_scale"].default
    assert sampler.steps == defaults["num_inference_steps"].default
    assert config.backbone.text_length == defaults["max_sequence_length"].default
    assert HELD_TIME == defaults["conditional_frame_timestep"].default
    size = (video.height, video.width, video.num_frames)
    assert size == tuple(defaults[name].default for name in ("height", "width", "num_frames"))


@pytest.mark.slow
@pytest.mark.parametrize("image", [False, True])
def test_from_clips_to_videos(folder, tmp_path, image):
    """Build, train, generate, with the tiny recipe's settings."""
    arguments = tiny_families.chain_of("cosmos25", folder, tmp_path)
    arguments += ["sampler.solver=unipc_karras", "sampler.sigma_max=200", f"pipeline.first_frame={image}".lower()]
    tiny_families.check_chain(arguments, tmp_path)
