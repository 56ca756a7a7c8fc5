"""Clips that begin with a given prefix: several latent frames of wan22_ti2v that are held, count nowhere and stay.

Sampling with cosmos25: tests/train/test_cosmos25.py.
"""

import json
import math
from dataclasses import replace

import pytest
import torch
from diffusers import WanImageToVideoPipeline

import recipes
from data_pipeline import build
from data_pipeline.config import Config, Setup
from eval import generate, run
from eval.maker import BASE, Model, build_request, image_problem
from eval.prompt_refinement import run as refinement
from eval.prompts import Prompt
from eval.search.config import SearchConfig
from eval.search.guidance import GuideConfig, sample_guided
from eval.search.noise_refinement import RefineConfig, refine
from eval.search.residuals import ResidualConfig
from eval.search.searcher import Method, Searcher
from tests.tiny_backbones import load
from tests.train.test_backbones import SCHEDULERS
from train import gdpo
from train.backbones import load_backbone
from train.backbones.base import BackboneConfig
from train.backbones.conditioning import Conditioning
from train.backbones.tiny import write_tiny_pipeline
from train.clips import VideoConfig, read_clip, write_clip
from train.cost import Bill, Job, read_rates
from train.groups import GroupSet
from train.sampling import SamplerConfig, sample, sample_clips
from train.terms.physics import without_given

VIDEO = VideoConfig(64, 96, 13, 8.0)  # 4 latent frames
SIZE = {"height": 64, "width": 96, "num_frames": 13}
GIVEN, HELD = 5, 2  # video frames, and the latent frames that they are
PROMPTS = ["a red ball falls", "a cup breaks"]
EULER = SamplerConfig("euler", steps=2, guidance=1.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tiny_pipeline("wan22_ti2v", tmp_path_factory.mktemp("ti2v"))


@pytest.fixture(scope="module")
def backbone(folder):
    return load("wan22_ti2v", folder)


@pytest.fixture(scope="module")
def frames():
    """(2, 3, T, H, W) in [-1, 1]."""
    shape = (2, 3, VIDEO.num_frames, VIDEO.height, VIDEO.width)
    return torch.rand(shape, generator=torch.Generator().manual_seed(4)) * 2 - 1


@pytest.fixture(scope="module")
def conditioning(backbone, frames):
    return backbone.condition(PROMPTS, frames[:, :, :GIVEN], num_frames=VIDEO.num_frames)


def noise_for(backbone, batch=2):
    return torch.randn(batch, *backbone.latent_shape(**SIZE), generator=torch.Generator().manual_seed(7))


def test_its_latents_are_the_whole_clips_and_of_one_frame_todays(backbone, frames, conditioning):
    whole = backbone.encode_video(frames)
    assert conditioning.image.shape[2] == HELD == conditioning.held_frames(4)
    torch.testing.assert_close(conditioning.image, whole[:, :, :HELD])
    single = backbone.condition(PROMPTS, frames[:, :, :1], num_frames=VIDEO.num_frames)
    today = backbone.condition(PROMPTS, frames[:, :, 0], num_frames=VIDEO.num_frames)
    assert torch.equal(single.image, today.image) and torch.equal(today.image, backbone.encode_video(frames[:, :, :1]))


@pytest.mark.parametrize("held", [1, 2, 3])
def test_the_network_sees_it_clean_at_t_0_and_gives_it_no_velocity(backbone, held):
    """By hand: what a direct call of diffusers' network says of the frames that follow."""
    noisy, t = noise_for(backbone), torch.tensor([0.3, 0.9])
    image = torch.randn(2, noisy.shape[1], held, *noisy.shape[3:], generator=torch.Generator().manual_seed(1))
    told = Conditioning(backbone.encode_texts(PROMPTS).text, image)
    mixed = torch.cat([image, noisy[:, :, held:]], dim=2)
    tokens = backbone.num_tokens(64, 96, 1)
    times = torch.cat([torch.zeros(2, held * tokens), (1000 * t)[:, None].expand(-1, (4 - held) * tokens)], dim=1)
    expected = backbone.transformer(mixed, times, told.text, return_dict=False)[0]
    expected[:, :, :held] = 0
    assert torch.equal(backbone.velocity(noisy, t, told), expected)
    other = torch.cat([noisy[:, :, :held] + 1, noisy[:, :, held:]], dim=2)
    assert torch.equal(backbone.velocity(other, t, told), expected)
    assert torch.equal(told.generated(noisy), noisy[:, :, held:])


class Continuing(WanImageToVideoPipeline):
    """diffusers' own loop with more than one frame in its mask."""

    def prepare_latents(self, *args, **kwargs):
        latents, _, mask = super().prepare_latents(*args, **kwargs)
        mask[:, :, :HELD] = 0
        condition = torch.zeros_like(latents)
        condition[:, :, :HELD] = self.given
        return latents, condition, mask


@pytest.mark.parametrize("solver", SCHEDULERS)
def test_sampling_equals_diffusers_loop_with_as_many_frames_masked(folder, backbone, conditioning, frames, solver):
    pipeline = Continuing.from_pretrained(folder)
    pipeline.scheduler, pipeline.given = SCHEDULERS[solver](), conditioning.image
    pipeline.set_progress_bar_config(disable=True)
    sampler = SamplerConfig(solver, steps=4, shift=3.0, guidance=4.0, negative_prompt="blurry")
    ours = sample(backbone, conditioning, noise_for(backbone), sampler, progress=False)
    theirs = pipeline(
        image=(frames[:1, :, 0] + 1) / 2,
        prompt=PROMPTS,
        negative_prompt=["blurry"] * 2,
        **SIZE,
        num_inference_steps=4,
        guidance_scale=4.0,
        latents=noise_for(backbone),
        max_sequence_length=16,
        output_type="latent",
    ).frames
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


@pytest.mark.parametrize("solver", ["euler", "unipc", "dpm++", "rcm"])
def test_samples_begin_with_it_untouched(backbone, conditioning, solver):
    """To the bit, where the solver does not multiply and divide a frame whose velocity is 0."""
    clips = sample_clips(backbone, conditioning, [0, 1], VIDEO, replace(EULER, solver=solver), progress=False)
    rounding = 0 if solver in ("euler", "rcm") else 1e-6
    torch.testing.assert_close(clips[:, :, :HELD], conditioning.image, atol=rounding, rtol=rounding)
    single = replace(conditioning, image=conditioning.image[:, :, :1])
    other = sample_clips(backbone, single, [0, 1], VIDEO, replace(EULER, solver=solver), progress=False)
    assert (clips[:, :, HELD:] - other[:, :, HELD:]).abs().max() > 1e-3  # its second latent frame counts


def test_search_refinement_and_guidance_leave_it_as_it_is(backbone, conditioning):
    one, noise = conditioning[:1], noise_for(backbone, 1)
    settings = SearchConfig(num_candidates=2, residuals=ResidualConfig(levels=1), refine=RefineConfig(updates=1))
    latents, _ = Searcher(settings, backbone, VIDEO, EULER).find(Method("race", "proprio"), "a", "a ball", one, 7)
    assert torch.equal(latents[:, :, :HELD], one.image)
    found = refine(backbone, one, noise, EULER, RefineConfig(updates=1, levels=1, draws=1, gradient="proprio"))
    assert torch.equal(found.latents[:, :, :HELD], one.image)
    reward = lambda clip: -clip.diff(dim=2).square().mean(dim=(1, 2, 3, 4))  # noqa: E731
    guided, _ = sample_guided(backbone, one, noise, EULER, reward, GuideConfig(scale=0.05, every=1))
    assert torch.equal(guided[:, :, :HELD], one.image)
    assert not torch.equal(guided, sample(backbone, one, noise, EULER, progress=False))


def test_physics_terms_learn_nothing_of_it():
    """By hand, of 4 latent frames: a teacher's 8 are read at (i + 1/2) / 2 - 1/2 = -.25, .25, .75, 1.25, ...: of two
    given frames, 0 and 1, the first three alone are read from there."""
    batch = {"text": torch.zeros(1, 2, 8), "condition": torch.zeros(1, 4, 2, 4, 4)}
    batch |= {"visible": torch.ones(1, 4, 3, dtype=torch.bool), "relation_grid": torch.tensor([[8, 2, 2]])}
    batch |= {"relation_indices": 4 * torch.arange(8)[None] + 3, "relation_valid": torch.ones(1, 8, dtype=torch.bool)}
    batch["relation_valid"][:, 7] = False
    found = without_given(batch, 4)
    assert found["visible"][0].all(dim=1).tolist() == [False, False, True, True]
    assert found["relation_valid"][0].tolist() == [False, False, False, True, True, True, True, False]
    assert batch["visible"].all() and batch["relation_valid"].sum() == 7
    for image in (batch["condition"][:, :, :1], batch["condition"].expand(1, 4, 2, 4, 4).repeat(1, 1, 2, 1, 1)):
        same = without_given(batch | {"condition": image}, 4)
        assert same["visible"].all() and same["relation_valid"].sum() == 7


@pytest.mark.parametrize(
    ("family", "frames", "message"),
    [
        ("wan21", 5, "backbone.prefix_frames=5: Wan21 takes one frame at most; set it to 1"),
        ("wan22_i2v", 5, "Wan22I2V takes one frame at most"),
        ("hunyuan15_i2v", 5, "Hunyuan15I2V takes one frame at most"),
        ("wan22_ti2v", 4, "backbone.prefix_frames=4: latent frames stand for 1, then 4 each; use 1 or 5"),
        ("wan22_ti2v", 0, "backbone.prefix_frames=0: .*; use 1 or 5"),
    ],
)
def test_what_a_family_cannot_begin_with_is_refused(family, frames, message):
    config = BackboneConfig(family, architecture="tiny", random_weights=True, prefix_frames=frames)
    with pytest.raises(ValueError, match=message):
        load_backbone(config, "cpu", parts=())


def test_a_prefix_that_is_the_whole_clip_or_of_no_group_is_refused(backbone, frames):
    with pytest.raises(ValueError, match="first frames=13 leaves nothing to generate of 13 frames"):
        backbone.condition(PROMPTS, frames, num_frames=13)
    arguments = ["recipe=tiny", "backbone.family=wan22_ti2v", "backbone.prefix_frames=5"]
    with pytest.raises(ValueError, match="backbone.prefix_frames=5: set pipeline.first_frame=true"):
        build.check(recipes.load(Config, arguments))
    build.check(recipes.load(Config, [*arguments, "pipeline.first_frame=true"]))
    whole = [*arguments[:2], "backbone.prefix_frames=17", "pipeline.first_frame=true"]
    with pytest.raises(ValueError, match="backbone.prefix_frames=17 leaves nothing to generate of 17 frames"):
        build.check(recipes.load(Config, whole))
    with pytest.raises(ValueError, match="backbone.prefix_frames=17 leaves nothing"):
        gdpo.check(recipes.load(gdpo.Config, [*whole[:3], "validation.images=[a.mp4]"]))
    with pytest.raises(ValueError, match="backbone.prefix_frames=5: no clip of validation.prompts begins with one"):
        gdpo.check(recipes.load(gdpo.Config, arguments))
    with pytest.raises(ValueError, match="backbone.prefix_frames=5: Wan21 takes one frame at most"):
        gdpo.check(recipes.load(gdpo.Config, ["recipe=tiny", "backbone.prefix_frames=5"]))
    with pytest.raises(ValueError, match="backbone.prefix_frames=5: no prompt has a clip to continue"):
        generate.main([*arguments, "dry_run=true"])
    with pytest.raises(ValueError, match="no prompt has a clip to continue; name clips in refine_prompts.images"):
        refinement.main([*arguments, "refine_prompts.prompts=[a]", "dry_run=true"])
    with pytest.raises(ValueError, match="backbone.prefix_frames=5: Wan21 takes one frame at most"):
        build.check(recipes.load(Config, ["recipe=tiny", "backbone.prefix_frames=5"]))
    several = [Prompt("key", "a ball", folder, 5)]
    problem = (
        "key begins with 5 frames, but backbone.family=wan22_i2v takes no more than one: use wan22_ti2v or cosmos25"
    )
    assert image_problem(BackboneConfig("wan22_i2v"), several) == problem


def test_settings_without_a_prefix_are_those_of_before(folder, tmp_path):
    arguments = ["recipe=tiny", "backbone.family=wan22_ti2v", f"backbone.path={folder}", "pipeline.first_frame=true"]
    before = Setup(recipes.load(Config, arguments), "cpu").winner_settings
    assert before.keys() == {"fingerprint", "dtype", "text_length", "video", "first_frame"}
    after = Setup(recipes.load(Config, [*arguments, "backbone.prefix_frames=5"]), "cpu").winner_settings
    assert after == before | {"prefix_frames": 5}
    config, image = recipes.load(generate.Config, arguments[:3]), tmp_path / "a.png"
    image.write_bytes(b"a picture")
    asked = [
        build_request(config, "x", Model(BASE), tmp_path, Prompt("a", "b", image, count), 0, VIDEO).clip.settings
        for count in (1, 5)
    ]
    assert "prefix_frames" not in asked[0] and asked[1] == asked[0] | {"prefix_frames": 5}


def test_the_bill_counts_its_latents():
    job = Job(backbone=BackboneConfig("wan22_ti2v", architecture="5B"), video=VideoConfig(704, 1280, 121, 24.0))
    job.pipeline.first_frame = True
    sizes = []
    for count in (1, 9):
        job.backbone.prefix_frames = count
        architecture = load_backbone(replace(job.backbone, random_weights=True), "cpu", parts=()).architecture
        sizes.append(Bill(job, read_rates("nowhere")[0], architecture).image_bytes)
    assert sizes == [2 * 48 * 44 * 80, 3 * 2 * 48 * 44 * 80]


@pytest.mark.slow
def test_from_clips_to_scores(folder, tmp_path, monkeypatch):
    """Build, train with every term, validate, generate, search and Physics-IQ's video-to-video: a minute."""
    physics_iq = pytest.importorskip("eval.benchmarks.physics_iq")
    pytest.importorskip("cv2", reason="OpenCV is optional")
    from tests.eval.test_physics_iq import write_data

    arguments = ["recipe=tiny", f"output={tmp_path}", "backbone.family=wan22_ti2v", f"backbone.path={folder}"]
    arguments += ["backbone.prefix_frames=9", "sampler.steps=2", "optim.steps=2", "train.checkpoint_every=2"]
    arguments += ["validation.every=2", "self_score.strength=1", "physics.trajectory=1", "targets.grid=4"]
    arguments += ["train.num_workers=0", "targets.tracks=simulator"]  # 17 frames: 5 latent ones, of which 3 are given
    build.main([*arguments, "pipeline.manifest=sandbox:ramp:4", "pipeline.first_frame=true"])
    group = GroupSet(tmp_path / "groups")[0]
    assert group.condition.shape[1] == 3
    assert all(torch.equal(loser[:, :3], group.condition) for loser in group.losers)
    assert not torch.equal(group.losers[0, :, 3:], group.losers[1, :, 3:])
    torch.testing.assert_close(group.winner[:, :3], group.condition, atol=0.05, rtol=0)
    clip = torch.randint(0, 256, (17, 64, 64, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    write_clip(tmp_path / "clip.mp4", clip, 8, lossless=True)
    for more in ([], ["--dry-run"]):
        with pytest.raises(ValueError, match="begin with 9 given frames, the recipe says backbone.prefix_frames=1"):
            gdpo.main([*arguments, "backbone.prefix_frames=1", f"validation.images=[{tmp_path / 'clip.mp4'}]", *more])
    gdpo.main([*arguments, f"validation.images=[{tmp_path / 'clip.mp4'}]"])
    losses = [json.loads(line)["loss"] for line in (tmp_path / "train" / "metrics.jsonl").read_text().splitlines()]
    assert len(losses) == 2 and all(map(math.isfinite, losses))
    more = [f"generate.images=[{tmp_path / 'clip.mp4'}]", "generate.prompts=[a ball]", "generate.seeds=[0]"]
    more += ["generate.search=best_of_n", "search.num_candidates=2", "search.residuals.levels=1"]
    generate.main([*arguments, *more, f"generate.lora={tmp_path / 'train'}"])
    assert len(list((tmp_path / "clips" / "tuned-best_of_n").glob("*.mp4"))) == 1
    write_data(tmp_path / "physics-iq")
    monkeypatch.setattr(physics_iq.PhysicsIQ, "workers", 1)
    more = ["benchmarks=[physics_iq]", f"run.physics_iq.folder={tmp_path / 'physics-iq'}"]
    more += ["run.physics_iq.input=multiframe", "run.batch_size=2"]
    run.main([*arguments, *more, f"run.lora={tmp_path / 'train'}"])
    for model in ("true", "tuned"):
        rows = (tmp_path / "eval" / "physics_iq" / f"rows-{model}.jsonl").read_text().splitlines()
        assert len(rows) == 6 and not any(json.loads(row).get("error") for row in rows)
    (made, *_) = sorted((tmp_path / "eval" / "physics_iq" / "clips" / "tuned").glob("*.mp4"))
    assert len(read_clip(made, VideoConfig(64, 64, 61, 8.0))) == 61  # 21 of the 3 s, and 40
