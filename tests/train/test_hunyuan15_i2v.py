"""HunyuanVideo 1.5 from a first frame: against diffusers' own pipeline, and through training and the commands."""

import json
from dataclasses import replace

import pytest
import torch
from diffusers import HunyuanVideo15ImageToVideoPipeline
from PIL import Image

import recipes
from data_pipeline import build
from eval import generate, run
from eval.benchmarks.physics_iq import PhysicsIQ
from tests import tiny_families
from tests.eval.test_physics_iq import write_data
from tests.tiny_families import LENGTH, VIDEO, noise
from train import gdpo
from train.backbones import BACKBONES, load_backbone, loading, text_tokens
from train.backbones.base import BackboneConfig
from train.backbones.hunyuan15_i2v import vision_config
from train.backbones.tiny import write_tiny_pipeline
from train.clips import VideoConfig, from_pixels
from train.cost import Bill, Job, read_rates
from train.groups import GroupSet, told
from train.lora_switch import LoraConfig
from train.plan import plan
from train.sampling import SamplerConfig, initial_noise, sample

PROMPT = 'a box with "Hello" on it'
LORA = LoraConfig(rank=4, alpha=4, targets=["attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"])
NAMES = {"text", "conditioning.text_2", "conditioning.image_latents", "conditioning.image"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tiny_pipeline("hunyuan15_i2v", tmp_path_factory.mktemp("hunyuan15_i2v"))


@pytest.fixture(scope="module")
def config(folder):
    return tiny_families.config_of("hunyuan15_i2v", folder)


@pytest.fixture
def backbone(config):
    return load_backbone(config, "cpu")


@pytest.fixture(scope="module")
def pipeline(folder):
    pipeline = HunyuanVideo15ImageToVideoPipeline.from_pretrained(folder)
    pipeline.tokenizer_max_length = LENGTH
    pipeline.target_size = 40  # of whose sizes 32 x 48 is one
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def picture(seed=0):
    """(H, W, 3) uint8."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (VIDEO.height, VIDEO.width, 3), dtype=torch.uint8, generator=generator)


def first_frame(*seeds):
    """(B, 3, H, W) in [-1, 1]."""
    return torch.stack([from_pixels(picture(seed)[None])[:, 0] for seed in seeds])


def condition(backbone, *seeds):
    return backbone.condition([PROMPT] * len(seeds), first_frame(*seeds), num_frames=VIDEO.num_frames)


@pytest.mark.parametrize("guidance", [1.0, 6.0])
def test_sampling_equals_diffusers(backbone, pipeline, guidance):
    """In 4 steps, as tests/train/test_hunyuan15.py says."""
    start, steps = initial_noise(backbone, VIDEO, [1]), 4
    pipeline.guider.guidance_scale = guidance
    more = {"num_frames": VIDEO.num_frames, "num_inference_steps": steps, "latents": start, "output_type": "latent"}
    made = pipeline(image=Image.fromarray(picture().numpy()), prompt=PROMPT, **more).frames
    sampler = SamplerConfig(solver="euler", steps=steps, guidance=guidance, shift=5.0, negative_prompt="")
    latents = sample(backbone, condition(backbone, 0), start, sampler, progress=False)
    torch.testing.assert_close(latents, made, rtol=0, atol=1e-5)
    other = sample(backbone, condition(backbone, 1), start, sampler, progress=False)
    assert (other - made).abs().max() > 1e-3  # the picture counts


def test_each_part_of_the_condition_equals_diffusers_and_counts(backbone, pipeline):
    told_, image = condition(backbone, 0, 1), Image.fromarray(picture(1).numpy())
    assert told_.named().keys() == NAMES and told_.image is None and told_.held_frames(3) == 0
    clips = backbone.condition([PROMPT] * 2, first_frame(0, 1).unsqueeze(2), num_frames=VIDEO.num_frames)
    assert all(torch.equal(told_.named()[name], tensor) for name, tensor in clips.named().items())
    with torch.no_grad():
        embeds = pipeline.encode_image(image, 1, "cpu", torch.float32)
        latents, mask = pipeline.prepare_cond_latents_and_mask(
            noise(1, 4, 3, 4, 6), image, 1, VIDEO.height, VIDEO.width, torch.float32, "cpu"
        )
    torch.testing.assert_close(told_.more["image"][1:], embeds)
    arguments = backbone.network_arguments(noise(2, 4, 3, 4, 6), torch.full((2,), 300.0), told_, torch.float32)
    torch.testing.assert_close(arguments["hidden_states"][1:, 4:], torch.cat([latents, mask], dim=1))
    clean, t = noise(2, 4, 3, 4, 6), torch.tensor([0.3, 0.3])
    velocity = backbone.velocity(clean, t, told_)
    for name in ("image", "image_latents"):
        other = replace(told_, more=told_.more | {name: told_.more[name].flip(0)})
        assert (backbone.velocity(clean, t, other) - velocity).abs().max() > 1e-4, name
    torch.testing.assert_close(velocity[1:], backbone.velocity(clean[1:], t[1:], told_[1:]))


def test_a_negative_prompt_stands_beside_the_same_picture(backbone):
    told_ = condition(backbone, 0)
    without = told_.with_texts_of(backbone.condition([""]))
    assert torch.equal(without.more["image"], told_.more["image"]) and not torch.equal(without.text, told_.text)


def test_a_preference_step_from_a_shard(config, backbone, tmp_path):
    group = tiny_families.group_of(backbone, 0, PROMPT, condition(backbone, 0), texts=(), losers=1)
    tiny_families.write_shard(tmp_path, backbone, [group])
    read = GroupSet(tmp_path, fingerprint=backbone.group_fingerprints)[0]
    assert told(read).keys() == NAMES
    assert all(torch.equal(told(read)[name], tensor) for name, tensor in told(group).items())
    tiny_families.step_of(config, read, LORA)


def test_random_weights_have_an_image_encoder(config):
    random = load_backbone(replace(config, path="", random_weights=True), "cpu")
    told_ = condition(random, 0, 1)
    assert told_.more["image"].shape == (2, 4, 32) and told_.more["image"].std() > 0.1
    shapes = {name: tuple(tensor.shape[1:]) for name, tensor in told_.named().items() if "image" in name}
    assert shapes == random.first_frame_shapes(random.architecture, random.latent_shape(32, 48, 9))
    assert not random.image_encoder.training


def test_sizes_without_weights():
    """By hand: 32 x 30 x 53 latents and 729 tokens of 1152, two bytes each; the clip has 31 latent frames."""
    job = Job(backbone=BackboneConfig("hunyuan15_i2v", architecture="8.3B", text_length=1000))
    job.video = VideoConfig(480, 848, 121, 24.0)
    architecture = BACKBONES["hunyuan15_i2v"].architectures["8.3B"]
    found = Bill(job, read_rates("nowhere")[0], architecture)
    assert found.image_bytes == 2 * (32 * 30 * 53 + 729 * 1152) and not found.stacked
    assert text_tokens(job.backbone) == 1000 + 256 + 729
    config = vision_config(1152)
    assert (config.image_size // config.patch_size) ** 2 == 729


def test_what_it_lacks_is_refused_by_name(config, backbone, folder, tmp_path):
    with pytest.raises(ValueError, match="hunyuan15_i2v needs a first frame"):
        backbone.velocity(noise(1, 4, 3, 4, 6), torch.tensor([0.5]), backbone.condition([PROMPT]))
    with pytest.raises(ValueError, match="image encoder is not loaded"):
        load_backbone(config, "cpu", parts=("vae",)).embed(first_frame(0))
    with pytest.raises(
        ValueError, match="it is a HunyuanVideo15ImageToVideoPipeline; set backbone.family=hunyuan15_i2v"
    ):
        load_backbone(replace(config, family="hunyuan15"), "cpu", parts=())
    lacking = tmp_path / "lacking"
    lacking.mkdir()
    for part in folder.iterdir():
        if part.name != "feature_extractor":
            (lacking / part.name).symlink_to(part)
    with pytest.raises(ValueError, match="the component feature_extractor cannot be loaded"):
        load_backbone(replace(config, path=str(lacking)), "cpu", parts=("text",))


def test_the_image_encoder_counts_in_the_fingerprint_of_what_groups_depend_on(folder, tmp_path):
    before = loading.fingerprint("x", folder, loading.ENCODERS)
    assert before != loading.fingerprint("x", folder, loading.ENCODERS[:-1])


def test_the_recipe_plans():
    config = recipes.load(gdpo.Config, ["recipe=hunyuan15_i2v"])
    lines = "\n".join(plan(config, world=1, sharded=False))
    assert "hunyuan15_i2v 8.3B: 8,3" in lines


@pytest.mark.slow
def test_from_clips_to_scores(folder, tmp_path, monkeypatch):
    """Build, train with validation, generate, evaluate and search, with the tiny recipe's settings: 60 seconds."""
    for number in range(2):
        Image.fromarray(picture(number).numpy()).save(tmp_path / f"{number}.png")
    images = [str(tmp_path / f"{number}.png") for number in range(2)]
    arguments = [
        *tiny_families.chain_of("hunyuan15_i2v", folder, tmp_path),
        tiny_families.targeted(LORA),
        "sampler.shift=5",
    ]
    with pytest.raises(ValueError, match="pipeline.first_frame=false: this backbone.family begins every clip"):
        build.main([*arguments, "pipeline.manifest=sandbox:ramp:4", "pipeline.first_frame=false"])
    build.main([*arguments, "pipeline.manifest=sandbox:ramp:4"])
    with pytest.raises(ValueError, match="name a clip or picture for each in validation.images"):
        gdpo.main(arguments)
    gdpo.main([*arguments, f"validation.images=[{images[0]}]"])
    with pytest.raises(ValueError, match="backbone.family=hunyuan15_i2v needs an image for each prompt"):
        generate.main(arguments)
    more = [f"generate.images=[{','.join(images)}]", "generate.seeds=[0]"]
    generate.main([*arguments, f"generate.lora={tmp_path / 'train'}", *more])
    more += ["generate.search=best_of_n", "search.num_candidates=2", "search.residuals.levels=1"]
    generate.main([*arguments, *more])
    write_data(tmp_path / "physics-iq")
    monkeypatch.setattr(PhysicsIQ, "workers", 1)
    more = ["benchmarks=[physics_iq]", f"run.physics_iq.folder={tmp_path / 'physics-iq'}"]
    run.main([*arguments, *more, f"run.lora={tmp_path / 'train'}"])
    rows = (tmp_path / "eval" / "physics_iq" / "rows-tuned.jsonl").read_text().splitlines()
    assert len(rows) == 6 and not any(json.loads(row).get("error") for row in rows)
    tiny_families.check_losses(tmp_path)
    assert len(list((tmp_path / "clips" / "tuned").glob("*.mp4"))) == 2
