"""The backbone contract against diffusers' own Wan pipelines, on tiny random pipelines of every family."""

import functools
import math

import pytest
import torch
from diffusers import (
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
    WanImageToVideoPipeline,
)

from train.backbones import ARCHITECTURES, BACKBONES, load_backbone
from train.backbones.architecture import latent_shape, num_tokens
from train.backbones.base import BackboneConfig, Conditioning
from train.backbones.fused.inference import fuse
from train.backbones.tiny import write_tiny_pipeline
from train.clips import VideoConfig
from train.residual_cache import residual_cache
from train.sampling import (
    SOLVERS,
    SamplerConfig,
    Stepper,
    grid,
    sample,
    sample_clips,
    sampling_passes,
    sigma_grid,
)

WANS = [family for family in BACKBONES if family.startswith("wan")]  # the others have test files of their own
LENGTH = 24  # text tokens
PROMPTS = ["a red ball falls", "a cube &amp; a  ramp\n (fünf 球)"]
SIZE = {"height": 64, "width": 96, "num_frames": 9}
VIDEO = VideoConfig(**SIZE, fps=8.0)
TWO_EXPERTS = ("wan22_t2v", "wan22_i2v")


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory):
    return functools.cache(lambda family: write_tiny_pipeline(family, tmp_path_factory.mktemp(family)))


@pytest.fixture(scope="module")
def backbone_of(folder_of):
    def load(family, **changes):
        config = BackboneConfig(family=family, path=str(folder_of(family)), text_length=LENGTH)
        return load_backbone(BackboneConfig(**{**vars(config), "dtype": "float32", **changes}), "cpu")

    return functools.cache(load)


def random_inputs(backbone, batch=2, seed=0, image=False):
    """latents (B,C,F,H,W), t (B,) and a conditioning with an image where the family or the caller wants one."""
    generator = torch.Generator().manual_seed(seed)
    shape = backbone.latent_shape(**SIZE)
    latents = torch.randn(batch, *shape, generator=generator)
    text = torch.randn(batch, LENGTH, 64, generator=generator)
    frames = 1 if image == "first" else shape[1]
    picture = torch.randn(batch, shape[0], frames, *shape[2:], generator=generator) if image else None
    return latents, torch.linspace(0.3, 0.9, batch), Conditioning(text, picture)


class UnshiftedGrid(FlowMatchEulerDiscreteScheduler):
    """diffusers' scheduler on the intended grid: its shift, applied to linspace(1, 0)."""

    def set_timesteps(self, num_inference_steps, device=None):
        sigmas = torch.linspace(1, 0, num_inference_steps + 1)[:-1].tolist()
        super().set_timesteps(sigmas=sigmas, device=device)


FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}  # Wan's scheduler_config.json
SCHEDULERS = {
    "euler": lambda: UnshiftedGrid(shift=3.0),
    "unipc": lambda: UniPCMultistepScheduler(**FLOW),
    "dpm++": lambda: DPMSolverMultistepScheduler(**FLOW),
}


def diffusers_pipeline(folder, pipeline_class=DiffusionPipeline, solver="euler"):
    pipeline = pipeline_class.from_pretrained(folder)
    pipeline.scheduler = SCHEDULERS[solver]()
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


CLIPS = [("wan21", False), ("wan22_ti2v", False), ("wan22_ti2v", True), ("wan22_t2v", False), ("wan22_i2v", True)]
OFTEN = [
    *((*clip, "unipc") for clip in CLIPS),
    *(("wan21", False, solver) for solver in SCHEDULERS if solver != "unipc"),
]
SELDOM = [(*clip, solver) for clip in CLIPS for solver in SCHEDULERS if (*clip, solver) not in OFTEN]


@pytest.mark.parametrize(
    ("family", "with_image", "solver"), [*OFTEN, *(pytest.param(*one, marks=pytest.mark.slow) for one in SELDOM)]
)
def test_sample_and_decode_equal_diffusers(folder_of, backbone_of, family, with_image, solver):
    backbone = backbone_of(family)
    image_class = WanImageToVideoPipeline if with_image else DiffusionPipeline
    pipeline = diffusers_pipeline(folder_of(family), image_class, solver)
    noise = torch.randn(2, *backbone.latent_shape(**SIZE), generator=torch.Generator().manual_seed(3))
    picture = torch.rand(1, 3, SIZE["height"], SIZE["width"], generator=torch.Generator().manual_seed(4))
    low = 2.0 if family in TWO_EXPERTS else None

    first_frame = picture.expand(2, -1, -1, -1) * 2 - 1 if with_image else None
    conditioning = backbone.condition(PROMPTS, first_frame, num_frames=SIZE["num_frames"])
    # t = 1, .9, .75, .5: both experts, and with wan22_i2v the boundary itself
    sampler = SamplerConfig(solver, steps=4, shift=3.0, guidance=4.0, guidance_low=low, negative_prompt="blurry")
    ours = sample(backbone, conditioning, noise, sampler, progress=False)
    call = functools.partial(
        pipeline,
        prompt=PROMPTS,
        negative_prompt=["blurry", "blurry"],
        **SIZE,
        num_inference_steps=4,
        guidance_scale=4.0,
        guidance_scale_2=low,
        latents=noise,
        max_sequence_length=LENGTH,
        **({"image": picture} if with_image else {}),
    )
    theirs = call(output_type="latent").frames
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, theirs, atol=3e-5, rtol=0)  # latents are of order 5: float32 rounding
    assert (ours - noise).abs().mean() > 0.1  # it went somewhere

    video = call(output_type="pt").frames.transpose(1, 2) * 2 - 1  # (B,3,T,H,W)
    torch.testing.assert_close(backbone.decode_latents(ours), video, atol=1e-3, rtol=0)


@pytest.mark.parametrize("family", ["wan21", "wan22_ti2v"])
def test_encode_text_equals_diffusers(folder_of, backbone_of, family):
    pipeline = diffusers_pipeline(folder_of(family))
    prompts = [*PROMPTS, "", "   ", "a very long prompt about a ball " * 20]
    expected, _ = pipeline.encode_prompt(prompts, do_classifier_free_guidance=False, max_sequence_length=LENGTH)
    text = backbone_of(family).encode_text(prompts)
    torch.testing.assert_close(text, expected)
    assert text.shape == (5, LENGTH, 64)
    assert text[0, 5:].count_nonzero() == 0 and text[0, :5].abs().sum(-1).min() > 0  # four words and the end token
    assert text[2, 1:].count_nonzero() == 0 and torch.equal(text[2], text[3])  # an empty prompt is its end token
    with pytest.raises(ValueError, match="give a list"):
        backbone_of(family).encode_text("a ball")


@pytest.mark.parametrize("family", WANS)
def test_encode_video_is_the_normalised_mode(backbone_of, family):
    backbone = backbone_of(family)
    frames = torch.rand(2, 3, 9, 64, 96, generator=torch.Generator().manual_seed(0)) * 2 - 1
    latents = backbone.encode_video(frames)
    assert latents.shape == (2, *backbone.latent_shape(64, 96, 9)) and latents.dtype == torch.float32
    config = backbone.vae.config
    mode = backbone.vae.encode(frames[1:]).latent_dist.mode()
    for channel in range(config.z_dim):
        expected = (mode[0, channel] - config.latents_mean[channel]) / config.latents_std[channel]
        torch.testing.assert_close(latents[1, channel], expected, atol=1e-4, rtol=1e-4)
    decoded = backbone.decode_latents(latents.bfloat16())
    assert decoded.shape == frames.shape and decoded.dtype == torch.float32 and decoded.abs().max() <= 1
    with pytest.raises(ValueError, match="num_frames=8 .* use 9"):
        backbone.encode_video(frames[:, :, :8])


def test_gradients_reach_latents_through_the_decoder(backbone_of):
    backbone = backbone_of("wan21")
    latents = torch.randn(1, 16, 2, 4, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
    (0.1 * backbone.decode_latents(latents)).sum().backward()
    assert latents.grad.abs().sum(dim=(0, 1, 3, 4)).min() > 0  # every latent frame
    assert not backbone.decode_latents(latents.detach()).requires_grad


def test_first_frame_latents(backbone_of):
    picture = torch.rand(2, 3, 64, 96, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with pytest.raises(ValueError, match="generates from text alone"):
        backbone_of("wan21").encode_first_frame(picture, 9)
    ti2v, i2v = backbone_of("wan22_ti2v"), backbone_of("wan22_i2v")
    torch.testing.assert_close(ti2v.encode_first_frame(picture, 9), ti2v.encode_video(picture[:, :, None]))
    padded = torch.cat([picture[:, :, None], torch.zeros(2, 3, 8, 64, 96)], dim=2)
    torch.testing.assert_close(i2v.encode_first_frame(picture, 9), i2v.encode_video(padded))

    conditioning = i2v.condition(PROMPTS, picture, num_frames=9)
    assert len(conditioning) == 2 and conditioning.image.shape == (2, *i2v.latent_shape(**SIZE))
    with pytest.raises(ValueError, match="generates from text alone"):
        backbone_of("wan21").condition(PROMPTS, picture, num_frames=9)
    with pytest.raises(ValueError, match="2 first frames for 1 prompts"):
        i2v.condition(PROMPTS[:1], picture, num_frames=9)
    with pytest.raises(ValueError, match="needs num_frames"):
        i2v.condition(PROMPTS, picture)


@pytest.mark.parametrize("family", WANS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_velocity_feeds_the_network(backbone_of, family, dtype):
    backbone = backbone_of(family, dtype=dtype)
    latents, t, conditioning = random_inputs(backbone, image=family == "wan22_i2v")
    latents.requires_grad_()
    seen = {}
    handle = backbone.transformer.register_forward_pre_hook(lambda m, a, kw: seen.update(kw), with_kwargs=True)
    velocity = backbone.velocity(latents, t, conditioning)
    handle.remove()
    assert velocity.shape == latents.shape and velocity.dtype == torch.float32
    assert 0.1 < velocity.std() < 10
    assert seen["timestep"].dtype == torch.float32
    torch.testing.assert_close(seen["timestep"], torch.tensor([300.0, 900.0]))
    assert seen["hidden_states"].dtype == getattr(torch, dtype)
    velocity.sum().backward()
    assert latents.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in backbone.transformer.parameters())


def test_velocity_refuses_what_does_not_fit(backbone_of):
    backbone = backbone_of("wan21")
    latents, t, conditioning = random_inputs(backbone)
    with pytest.raises(ValueError, match=f"23 tokens but backbone.text_length={LENGTH}"):
        backbone.velocity(latents, t, Conditioning(conditioning.text[:, 1:]))
    with pytest.raises(ValueError, match="2 latents with t of shape"):
        backbone.velocity(latents, t[:1], conditioning)
    with pytest.raises(ValueError, match="2 latents .* 1 conditionings"):
        backbone.velocity(latents, t, conditioning[:1])
    i2v = backbone_of("wan22_i2v")
    with pytest.raises(ValueError, match="needs image latents"):
        i2v.velocity(*random_inputs(i2v))


def test_ti2v_holds_the_first_frame(backbone_of):
    backbone = backbone_of("wan22_ti2v")
    latents, t, conditioning = random_inputs(backbone, image="first")
    seen = {}
    handle = backbone.transformer.register_forward_pre_hook(lambda m, a, kw: seen.update(kw), with_kwargs=True)
    velocity = backbone.velocity(latents, t, conditioning)
    handle.remove()
    tokens_a_frame = backbone.num_tokens(64, 96, 1)
    assert seen["timestep"].shape == (2, backbone.num_tokens(**SIZE))
    assert seen["timestep"][:, :tokens_a_frame].count_nonzero() == 0
    torch.testing.assert_close(seen["timestep"][:, tokens_a_frame:].unique(dim=1), 1000 * t[:, None])
    torch.testing.assert_close(seen["hidden_states"][:, :, :1], conditioning.image)
    assert velocity[:, :, 0].count_nonzero() == 0 and velocity[:, :, 1:].abs().mean() > 0.1
    other = torch.cat([latents[:, :, :1] + 1, latents[:, :, 1:]], dim=2)
    torch.testing.assert_close(
        backbone.velocity(other, t, conditioning), velocity
    )  # the caller's first frame is ignored

    clip = sample_clips(
        backbone, conditioning, [0, 1], VIDEO, SamplerConfig("euler", steps=2, guidance=1), progress=False
    )
    torch.testing.assert_close(clip[:, :, :1], conditioning.image)


def test_ti2v_without_image_is_the_per_token_function(backbone_of):
    backbone = backbone_of("wan22_ti2v")
    latents, t, conditioning = random_inputs(backbone)
    per_token = (1000 * t)[:, None].expand(-1, backbone.num_tokens(**SIZE))
    expected = backbone.transformer(latents, per_token, conditioning.text, return_dict=False)[0]
    torch.testing.assert_close(backbone.velocity(latents, t, conditioning), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("family", ["wan21", "wan22_ti2v"])
def test_features_come_from_the_same_pass(backbone_of, family):
    backbone = backbone_of(family)
    latents, t, conditioning = random_inputs(backbone)
    outputs = []
    handle = backbone.blocks[1].register_forward_hook(lambda block, inputs, output: outputs.append(output))
    plain = backbone.velocity(latents, t, conditioning)
    handle.remove()

    gradients = []
    for checkpointing in (False, True):
        backbone.transformer.enable_gradient_checkpointing() if checkpointing else None
        moving = latents.clone().requires_grad_()
        velocity, features = backbone.velocity(moving, t, conditioning, features_at=1)
        assert not backbone.blocks[1]._forward_hooks  # gone before backward runs the block again
        torch.testing.assert_close(velocity, plain)
        _, _, frames, rows, columns = latents.shape
        assert features.shape == (2, 128, frames, rows // 2, columns // 2)
        token = (1 * (rows // 2) + 1) * (columns // 2) + 2  # frame 1, row 1, column 2
        torch.testing.assert_close(features[:, :, 1, 1, 2], outputs[0][:, token])
        (velocity.square().mean() + features.square().mean()).backward()
        gradients.append(moving.grad)
    backbone.transformer.disable_gradient_checkpointing()
    torch.testing.assert_close(gradients[0], gradients[1])

    with pytest.raises(ValueError, match="features_at=3 .* 0 to 2"):
        backbone.velocity(latents, t, conditioning, features_at=3)
    with pytest.raises(ValueError, match="tokens but"):
        backbone.velocity(latents, t, Conditioning(conditioning.text[:, 1:]), features_at=1)
    assert not any(block._forward_hooks for block in backbone.blocks)


def test_features_of_compiled_blocks(folder_of):
    config = BackboneConfig(path=str(folder_of("wan21")), dtype="float32", text_length=LENGTH)
    backbone = load_backbone(config, "cpu", parts=("transformer",))
    latents, t, conditioning = random_inputs(backbone)
    expected = backbone.velocity(latents, t, conditioning, features_at=1)
    for block in backbone.blocks:
        block.compile(backend="eager")
    backbone.velocity(latents, t, conditioning)  # compiled without a hook
    for shift in (0.0, 0.1):
        velocity, features = backbone.velocity(latents + shift, t, conditioning, features_at=1)
        assert torch.allclose(features, expected[1], atol=1e-4) == (
            shift == 0
        )  # this call's features, not an old one's
    torch.testing.assert_close(backbone.velocity(latents, t, conditioning), expected[0])


@pytest.mark.parametrize("family", TWO_EXPERTS)
def test_two_experts_switch_at_the_boundary(backbone_of, monkeypatch, family):
    backbone = backbone_of(family)
    _, _, conditioning = random_inputs(backbone, image=family == "wan22_i2v")
    calls = []
    network = type(backbone)._network

    def spy(self, expert, latents, t, conditioning):
        calls.append((next(name for name, module in self.experts.items() if module is expert), round(t[0].item(), 4)))
        return network(self, expert, latents, t, conditioning)

    monkeypatch.setattr(type(backbone), "_network", spy)
    sampler = SamplerConfig("euler", steps=4, shift=3.0, guidance=1.0, guidance_low=3.0)
    sample_clips(backbone, conditioning, [0, 1], VIDEO, sampler, negative=conditioning[:1], progress=False)
    names = [name for name, _ in calls]
    # t = .9 is the image family's boundary and belongs to high_noise; only low_noise has a negative pass here.
    assert names == ["high_noise"] * 2 + ["low_noise"] * 4
    assert [t for _, t in calls] == [1.0, 0.9, 0.75, 0.75, 0.5, 0.5]


def test_one_expert_alone(folder_of):
    config = BackboneConfig("wan22_t2v", str(folder_of("wan22_t2v")), text_length=LENGTH, expert="low_noise")
    backbone = load_backbone(config, "cpu", parts=("expert",))
    assert list(backbone.experts) == ["low_noise"] and backbone.transformer is backbone.experts["low_noise"]
    assert backbone.vae is None and backbone.text_encoder is None and backbone.tokenizer is None
    latents, t, conditioning = random_inputs(backbone)
    both = load_backbone(config, "cpu", parts=("transformer",))
    torch.testing.assert_close(backbone.velocity(latents, t, conditioning), both.velocity(latents, t, conditioning))
    assert not torch.equal(both.experts["high_noise"].proj_out.weight, both.experts["low_noise"].proj_out.weight)
    with pytest.raises(ValueError, match="t=1.000 needs the high_noise expert"):
        sample_clips(
            backbone, conditioning, [0, 1], VIDEO, SamplerConfig("euler", steps=2, guidance=1.0), progress=False
        )


def test_sample_noise_belongs_to_each_clip(backbone_of):
    backbone = backbone_of("wan21")
    _, _, conditioning = random_inputs(backbone)
    sampler = SamplerConfig("euler", steps=2, guidance=1.0)

    def clips_of(conditioning, seeds):
        return sample_clips(backbone, conditioning, seeds, VIDEO, sampler, progress=False)

    clips, alone = clips_of(conditioning, [5, 6]), clips_of(conditioning[1:], [6])
    torch.testing.assert_close(clips[1:], alone, atol=1e-5, rtol=1e-4)
    noise = torch.randn((1, *backbone.latent_shape(**SIZE)), generator=torch.Generator().manual_seed(6))
    assert torch.equal(alone, sample(backbone, conditioning[1:], noise, sampler, progress=False))
    assert not torch.equal(alone, clips_of(conditioning[1:], [7]))
    with pytest.raises(ValueError, match="a conditioning of 2 clips cannot serve 1"):
        clips_of(conditioning, [5])
    with pytest.raises(ValueError, match=r"noise of shape \(1, .* with 2 conditionings"):
        sample(backbone, conditioning, noise, sampler)


def test_sample_needs_no_text_encoder_for_conditionings(folder_of):
    config = BackboneConfig(path=str(folder_of("wan21")), dtype="float32", text_length=LENGTH)
    backbone = load_backbone(config, "cpu", parts=("transformer",))
    _, _, conditioning = random_inputs(backbone)

    def clips_of(guidance=3.0, **more):
        # One expert has no use for guidance_low.
        sampler = SamplerConfig("euler", steps=2, guidance=guidance, guidance_low=3.0)
        return sample_clips(backbone, conditioning, [0, 1], VIDEO, sampler, progress=False, **more)

    clips = clips_of(negative=Conditioning(torch.zeros(1, LENGTH, 64)))
    assert clips.isfinite().all()
    with pytest.raises(ValueError, match="text encoder is not loaded"):
        clips_of()
    clips_of(guidance=1.0)
    with pytest.raises(ValueError, match="a conditioning of 3 clips cannot serve 2"):
        clips_of(negative=Conditioning(torch.zeros(3, LENGTH, 64)))
    with pytest.raises(ValueError, match="the VAE is not loaded"):
        backbone.decode_latents(clips)


def test_sigma_grid_is_shifted_once():
    torch.testing.assert_close(sigma_grid(4, 3.0), torch.tensor([1, 0.9, 0.75, 0.5, 0]))
    torch.testing.assert_close(sigma_grid(2, 1.0), torch.tensor([1, 0.5, 0]))
    with pytest.raises(ValueError, match="steps=0"):
        sigma_grid(0, 3.0)


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_start_time_scales_the_grid(backbone_of, solver):
    whole, part = (grid(SamplerConfig(solver, steps=4, shift=3.0, guidance=1.0), start)[0] for start in (1.0, 0.5))
    torch.testing.assert_close(part, 0.5 * whole)
    backbone = backbone_of("wan21")
    latents, _, conditioning = random_inputs(backbone)
    sampler = SamplerConfig(solver, steps=1, shift=3.0, guidance=1.0)
    stepper = Stepper(backbone, conditioning, sampler, start=0.5, seeds=[0, 1])
    velocity = backbone.velocity(latents, stepper.times[:1].expand(2), conditioning)
    expected = latents - stepper.sigmas[0] * velocity  # one step of any solver goes along the line
    torch.testing.assert_close(stepper.after(latents, stepper.velocity(latents, 0), 0), expected, rtol=1e-4, atol=1e-4)


def test_guidance_is_applied_within_its_times(backbone_of):
    backbone, calls = backbone_of("wan21"), []
    _, _, conditioning = random_inputs(backbone)
    handle = backbone.transformer.register_forward_hook(lambda *given: calls.append(given[2]))
    sampler = SamplerConfig("euler", steps=4, shift=3.0, guided=[0.7, 0.95])  # t = 1, .9, .75, .5
    sample_clips(backbone, conditioning, [0, 1], VIDEO, sampler, negative=conditioning[:1], progress=False)
    handle.remove()
    assert len(calls) == 6


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"solver": "heun"}, "sampler.solver='heun': must be one of euler, unipc, dpm"),
        ({"guided": [0.9, 0.1]}, r"sampler.guided=\[0.9, 0.1\]: give two times in \[0, 1\], the lower first"),
        ({"steps": 0}, "steps=0"),
        ({"cache": -0.1}, "sampler.cache=-0.1: give 0"),
        ({"guidance_low": math.nan}, "sampler.guidance_low=nan: give a finite number"),
        ({"shift": math.inf}, "sampler.shift=inf: give a finite number"),
        ({"solver": "rcm", "guidance": 1.0}, "sampler.steps=50: rcm has a time grid for 1 to 4 steps"),
        ({"solver": "rcm", "steps": 4}, "sampler.guidance=5: rcm's students hold guidance themselves; set 1"),
        ({"solver": "rcm_ode", "steps": 4, "guidance": 1.0, "guidance_low": 3.0}, "sampler.guidance_low=3: rcm_ode"),
        ({"solver": "rcm", "steps": 2, "guidance": 1.0, "sigma_max": 1.0}, "sampler.sigma_max=1: give a number above"),
    ],
)
def test_a_sampler_that_cannot_work_is_named(wrong, said):
    with pytest.raises(ValueError, match=said):
        SamplerConfig(**wrong).check()


def test_latent_shape_names_the_nearest_legal_value(backbone_of):
    wan21, ti2v = ARCHITECTURES["wan21"]["14B"], ARCHITECTURES["wan22_ti2v"]["5B"]
    assert latent_shape(wan21, 480, 832, 81) == (16, 21, 60, 104) and num_tokens(wan21, 480, 832, 81) == 32760
    assert latent_shape(ti2v, 704, 1280, 121) == (48, 31, 44, 80) and num_tokens(ti2v, 704, 1280, 121) == 27280
    assert backbone_of("wan22_ti2v").latent_shape(64, 96, 9) == (12, 3, 4, 6)
    with pytest.raises(ValueError, match="height=470 is no multiple of 16 .* use 464"):
        latent_shape(wan21, 470, 832, 81)
    with pytest.raises(ValueError, match="width=1270 is no multiple of 32 .* use 1280"):
        latent_shape(ti2v, 704, 1270, 121)
    with pytest.raises(ValueError, match="height=3 .* use 16"):
        latent_shape(wan21, 3, 832, 81)
    with pytest.raises(ValueError, match="num_frames=80 .* use 81"):
        num_tokens(wan21, 480, 832, 80)
    with pytest.raises(ValueError, match="num_frames=0 .* use 1"):
        latent_shape(wan21, 480, 832, 0)


def test_conditioning_is_sliced_joined_and_moved():
    text, image = torch.randn(3, 4, 5), torch.randn(3, 2, 1, 2, 2)
    whole = Conditioning(text, image)
    parts = Conditioning.cat([whole[:1], whole[1:]])
    assert len(parts) == 3 and torch.equal(parts.text, text) and torch.equal(parts.image, image)
    half = whole.to(dtype=torch.bfloat16)
    assert half.text.dtype == half.image.dtype == torch.bfloat16 and whole.text.dtype == torch.float32
    assert Conditioning.cat([Conditioning(text)] * 2).image is None
    with pytest.raises(ValueError, match="1 of 2 conditionings have an image"):
        Conditioning.cat([whole, Conditioning(text)])


@pytest.mark.parametrize(("family", "fused"), [("wan21", False), ("wan21", True), ("wan22_t2v", False)])
def test_a_residual_cache_ends_passes_after_the_first_block(folder_of, family, fused):
    config = BackboneConfig(family=family, path=str(folder_of(family)), dtype="float32", text_length=LENGTH)
    backbone = load_backbone(config, "cpu", parts=("transformer",))
    if fused:
        assert fuse(backbone, compiled=False) == ""
    _, _, conditioning = random_inputs(backbone)
    runs = []
    for expert in backbone.experts.values():
        for place in (1, -1):
            forward = expert.blocks[place].forward
            expert.blocks[place].forward = lambda *given, forward=forward, place=place, **more: (
                runs.append(place),
                forward(*given, **more),
            )[1]

    def clips(cache):
        runs.clear()
        sampler = SamplerConfig("euler", 8, 2.0, shift=3.0, cache=cache)
        return sample_clips(
            backbone, conditioning, [0, 1], VIDEO, sampler, negative=conditioning[:1], progress=False
        ), len(runs)

    whole, every = clips(0.0)
    same, as_many = clips(1e-9)
    torch.testing.assert_close(same, whole, rtol=1e-4, atol=1e-4)  # clip by clip instead of both at once
    assert every == 2 * 2 * 8 and as_many == 2 * every
    near, fewer = clips(0.9)
    assert fewer < every and 0 < (near - whole).norm() < whole.norm()
    again, _ = clips(0.9)  # nothing is left of the clips before
    assert torch.equal(again, near) and torch.equal(clips(0.0)[0], whole)


def test_a_network_without_a_residual_cache_is_named(backbone_of, monkeypatch):
    backbone = backbone_of("wan21")
    monkeypatch.setattr(backbone, "experts", {"transformer": torch.nn.Identity()})
    with pytest.raises(ValueError, match="cache=0.1: the transformer network has no residual cache"):
        with residual_cache(backbone, 0.1):
            pass


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_clip_begins_from_a_noised_one(backbone_of, solver):
    backbone = backbone_of("wan21")
    clean, _, conditioning = random_inputs(backbone)
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(1))
    sampler = SamplerConfig(solver, 1, 1.0, shift=3.0)
    made = sample(backbone, conditioning, noise, sampler, clean=clean, start=0.8, seeds=[0, 1], progress=False)
    # Whole thousandths below, and 790.1 in bfloat16.
    told = {"euler": 0.8, "unipc": 0.799, "dpm++": 0.799, "unipc_karras": 0.8 * 80 / 81}.get(solver, 0.792)
    # 3 u / (1 + 2 u) of u = 0.999, and a signal of 1 in 81.
    level = {"euler": 0.8, "unipc": 0.8, "dpm++": 0.8 * 0.999666}.get(solver, 0.8 * 80 / 81)
    x = (1 - level) * clean + level * noise
    expected = x - level * backbone.velocity(x, torch.full((2,), told), conditioning)
    torch.testing.assert_close(made, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("solver", ["euler", "unipc"])
@pytest.mark.parametrize(("guided", "steps"), [([0.9, 1.0], 2), ([0.5, 0.9], 3)])
def test_the_ends_of_the_guided_interval_belong_to_it(backbone_of, solver, guided, steps):
    """t = 1 (or 0.999), .9, .75, .5: in float32 .9 lies below .9."""
    sampler = SamplerConfig(solver, steps=4, shift=3.0, guidance=2.0, guided=guided)
    assert sampling_passes(backbone_of("wan21"), sampler) == 4 + steps


def test_a_cached_clip_does_not_depend_on_its_neighbours(backbone_of):
    backbone = backbone_of("wan21")
    _, _, conditioning = random_inputs(backbone)
    sampler = SamplerConfig("euler", 8, 2.0, shift=3.0, cache=0.9)
    given = {"negative": conditioning[:1], "progress": False}
    both = sample_clips(backbone, conditioning, [0, 1], VIDEO, sampler, **given)
    alone = sample_clips(backbone, conditioning[1:], [1], VIDEO, sampler, **given)
    assert torch.equal(both[1:], alone)
