"""Samplers of step-distilled students against what their authors publish, written out here once more in float64."""

import math

import pytest
import torch

from tests.tiny_backbones import load
from train.backbones.base import Conditioning
from train.backbones.tiny import write_tiny_pipeline
from train.clips import VideoConfig
from train.sampling import RCM, SamplerConfig, Stepper, grid, initial_noise, rcm_grid, sample, sample_clips

VIDEO = VideoConfig(32, 32, 5, 8.0)
SEEDS = [7, 8]
EULER = SamplerConfig("euler", steps=4, guidance=1.0, shift=5.0)
STUDENT = SamplerConfig("rcm", steps=4, guidance=1.0)


@pytest.fixture(scope="module")
def backbone(tiny_pipeline):
    return load("wan21", tiny_pipeline)


@pytest.fixture(scope="module")
def image_backbone(tmp_path_factory):
    return load("wan22_ti2v", write_tiny_pipeline("wan22_ti2v", tmp_path_factory.mktemp("ti2v")))


@pytest.fixture(scope="module")
def experts(tmp_path_factory):
    return load("wan22_t2v", write_tiny_pipeline("wan22_t2v", tmp_path_factory.mktemp("t2v")))


def conditioning_of(backbone, image=False):
    first = torch.rand((2, 3, 32, 32), generator=torch.Generator().manual_seed(3)) * 2 - 1 if image else None
    return backbone.condition(["a ball falls", "a cup breaks"], first, num_frames=5)


def clips(backbone, conditioning, sampler, seeds=SEEDS):
    return sample_clips(backbone, conditioning, seeds, VIDEO, sampler, progress=False)


def test_euler_makes_the_clips_of_lightx2vs_students(backbone):
    """Its scheduler: s u / (1 + (s - 1) u) of the steps 1000, 750, 500, 250 of 1000, each told as it is, and
    x - s v + s' v; without guidance."""
    assert grid(EULER)[0].tolist() == pytest.approx([1, 0.9375, 5 / 6, 0.625, 0])
    assert torch.equal(*grid(EULER))
    conditioning, noise = conditioning_of(backbone), initial_noise(backbone, VIDEO, SEEDS)
    shifted = [5 * u / (1 + 4 * u) for u in torch.linspace(1, 0, 1001, dtype=torch.float64)[[0, 250, 500, 750]]]
    latents = noise.double()
    for number, level in enumerate(shifted):
        velocity = backbone.velocity(latents.float(), level.float().expand(2), conditioning).double()
        latents = latents - level * velocity
        if number < 3:
            latents = latents + shifted[number + 1] * velocity
    torch.testing.assert_close(clips(backbone, conditioning, EULER), latents.float(), rtol=1e-4, atol=1e-4)


def theirs(backbone, conditioning, noises, *, steps, sigma_max, ode):
    """TurboDiffusion's loop as its inference scripts have it: noises[0] begins, each of the others follows a step."""
    angles = [math.atan(sigma_max), *[1.5, 1.4, 1.0][: steps - 1], 0]
    times = [math.sin(angle) / (math.cos(angle) + math.sin(angle)) for angle in angles]
    latents = noises[0].double() * times[0]
    for number, (now, then) in enumerate(zip(times[:-1], times[1:], strict=True)):
        told = torch.tensor(1000 * now, dtype=torch.float32).bfloat16().float() / 1000
        velocity = backbone.velocity_at(latents.float(), told, conditioning).double()
        if ode:
            latents = latents - (now - then) * velocity
        else:
            latents = (1 - then) * (latents - now * velocity) + then * noises[number + 1].double()
    return latents.float()


@pytest.mark.parametrize(("steps", "sigma_max"), [(4, 80.0), (2, 200.0), (1, 80.0)])
@pytest.mark.parametrize("solver", RCM)
def test_rcm_makes_the_clips_of_its_authors_loop(backbone, solver, steps, sigma_max):
    conditioning = conditioning_of(backbone)
    sampler = SamplerConfig(solver, steps=steps, guidance=1.0, sigma_max=sigma_max)
    ours = clips(backbone, conditioning, sampler)
    stepper = Stepper(backbone, conditioning, sampler, seeds=SEEDS)
    noise = initial_noise(backbone, VIDEO, SEEDS)
    noises = [noise, *[stepper.drawn(noise, step) for step in range(steps)]]
    expected = theirs(backbone, conditioning, noises, steps=steps, sigma_max=sigma_max, ode=solver == "rcm_ode")
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)


def test_rcms_times_by_hand():
    """t = tan / (1 + tan): tan 1.5 = 14.1014, tan 1.4 = 5.79788, tan 1 = 1.55741."""
    expected = [80 / 81, 14.1014 / 15.1014, 5.79788 / 6.79788, 1.55741 / 2.55741, 0]
    assert rcm_grid(4, 80.0).tolist() == pytest.approx(expected, abs=1e-6)
    assert rcm_grid(2, 200.0).tolist() == pytest.approx([200 / 201, expected[1], 0], abs=1e-6)
    assert (1000 * grid(STUDENT)[1]).tolist() == pytest.approx([988, 932, 852, 608, 0])  # as bfloat16 has them


def test_each_expert_serves_its_steps(experts):
    """Boundary .875: t = .988 and .932, then .852 and .608."""
    calls = []
    for name, expert in experts.experts.items():
        expert.register_forward_hook(lambda *given, name=name: calls.append(name))
    clips(experts, conditioning_of(experts), STUDENT)
    assert calls == ["high_noise"] * 2 + ["low_noise"] * 2


def test_the_noise_between_steps_is_each_clips_own(backbone):
    conditioning = conditioning_of(backbone)
    both, alone = clips(backbone, conditioning, STUDENT), clips(backbone, conditioning[1:], STUDENT, SEEDS[1:])
    torch.testing.assert_close(both[1:], alone, rtol=1e-4, atol=1e-4)
    assert torch.equal(both, clips(backbone, conditioning, STUDENT))
    stepper = Stepper(backbone, conditioning, STUDENT, seeds=SEEDS)
    drawn = [stepper.drawn(both, step) for step in range(2)]
    assert torch.equal(drawn[0][1:], Stepper(backbone, conditioning[1:], STUDENT, seeds=[8]).drawn(both[1:], 0))
    every = [initial_noise(backbone, VIDEO, SEEDS), *drawn]
    for first in range(3):  # noise of its own at the start, after each step, and of each clip
        for second in range(first + 1, 3):
            assert (every[first] - every[second]).flatten(1).std(dim=1).min() > 1
    assert abs(torch.stack(drawn).std().item() - 1) < 0.05


def test_an_image_stays(image_backbone):
    conditioning = conditioning_of(image_backbone, image=True)
    found = clips(image_backbone, conditioning, STUDENT)
    assert torch.equal(found[:, :, :1], conditioning.image)
    assert not torch.equal(found, clips(image_backbone, Conditioning(conditioning.text), STUDENT))


def test_without_seeds_there_is_no_noise_to_draw(backbone):
    conditioning, noise = conditioning_of(backbone), initial_noise(backbone, VIDEO, SEEDS)
    with pytest.raises(ValueError, match="sampler.solver=rcm draws noise by each clip's seed: no seeds for 2 clips"):
        sample(backbone, conditioning, noise, STUDENT, progress=False)


def test_settings_are_what_clips_depend_on():
    assert "sigma_max" not in EULER.settings() and EULER.settings()["shift"] == 5.0  # as before there was one
    assert SamplerConfig(sigma_max=9.0).settings() == SamplerConfig().settings()
    found = STUDENT.settings()
    assert found["solver"] == "rcm" and found["sigma_max"] == 80.0 and "shift" not in found
