"""Guidance by a reward on tiny pipelines: nothing at scale 0, the reward goes up, and only where and when asked."""

import pytest
import torch

from eval.search.guidance import GuideConfig, normalised_move, reward_gradient, sample_guided
from tests.tiny_backbones import load
from train.backbones.tiny import write_tiny_pipeline
from train.sampling import SamplerConfig, sample

SAMPLER = SamplerConfig("euler", steps=4, guidance=1.0)


@pytest.fixture(scope="module")
def backbone(tiny_pipeline):
    return load("wan21", tiny_pipeline)


@pytest.fixture(scope="module")
def image_backbone(tmp_path_factory):
    return load("wan22_ti2v", write_tiny_pipeline("wan22_ti2v", tmp_path_factory.mktemp("ti2v")))


def noise_for(backbone, batch=2):
    shape = backbone.latent_shape(32, 32, 5)
    return torch.randn((batch, *shape), generator=torch.Generator().manual_seed(7))


def conditioning_of(backbone, image=False):
    first = torch.rand((2, 3, 32, 32), generator=torch.Generator().manual_seed(3)) * 2 - 1 if image else None
    return backbone.condition(["a ball falls", "a cup breaks"], first, num_frames=5)


def plain(backbone, conditioning, noise, sampler=SAMPLER, **more):
    return sample(backbone, conditioning, noise, sampler, progress=False, **more)


def darkness(frames):
    """Higher where the clip is darker."""
    return -frames.mean(dim=(1, 2, 3, 4))


def stillness(frames):
    return -frames.diff(dim=2).square().mean(dim=(1, 2, 3, 4))


@pytest.mark.parametrize(("image", "solver"), [(False, "euler"), (True, "euler"), (False, "unipc"), (False, "dpm++")])
def test_scale_0_is_plain_sampling_bit_for_bit(backbone, image_backbone, image, solver):
    network = image_backbone if image else backbone
    conditioning, noise, negative = conditioning_of(network, image), noise_for(network), network.condition([""])
    sampler, config = SamplerConfig(solver, steps=3, guidance=2.0), GuideConfig(scale=0.0)
    latents, backward = sample_guided(network, conditioning, noise, sampler, darkness, config, negative=negative)
    assert torch.equal(latents, plain(network, conditioning, noise, sampler, negative=negative)) and backward == 0


@pytest.mark.parametrize(
    ("image", "reward"),
    [(False, darkness), (False, stillness), (True, stillness)],
)
def test_the_reward_of_every_clip_goes_up(backbone, image_backbone, image, reward):
    network = image_backbone if image else backbone
    conditioning, noise = conditioning_of(network, image), noise_for(network)
    before = reward(network.decode_latents(plain(network, conditioning, noise)))
    after = []
    for scale in (0.01, 0.03):
        config = GuideConfig(scale=scale, every=1)
        latents, backward = sample_guided(network, conditioning, noise, SAMPLER, reward, config)
        after.append(reward(network.decode_latents(latents)))
        assert backward == 4
        if image:
            assert torch.equal(latents[:, :, :1], conditioning.image)
    assert (after[0] > before).all() and (after[1] > after[0]).all()


def test_a_guided_step_moves_a_clip_by_the_share_that_was_asked_for(backbone):
    """One step: the velocity is that of the noise, so the clip differs from the plain one by the move alone."""
    conditioning, noise = conditioning_of(backbone), noise_for(backbone)
    sampler = SamplerConfig("euler", steps=1, guidance=1.0)
    config, seen = GuideConfig(scale=0.02, every=1), []

    def watched(frames):
        seen.append(darkness(frames))
        return seen[-1]

    latents, _ = sample_guided(backbone, conditioning, noise, sampler, watched, config)
    without = plain(backbone, conditioning, noise, sampler)
    move = (latents - without).flatten(1)
    torch.testing.assert_close(move.norm(dim=1), 0.02 * noise.flatten(1).norm(dim=1))

    latents = noise.clone().requires_grad_()
    clean = latents - backbone.velocity(latents, torch.ones(2), conditioning)
    (gradient,) = torch.autograd.grad(darkness(backbone.decode_latents(clean)).sum(), latents)
    cosine = torch.cosine_similarity(move, gradient.flatten(1), dim=1)
    torch.testing.assert_close(cosine, torch.ones(2), atol=1e-4, rtol=0)
    torch.testing.assert_close(torch.cat(seen), darkness(backbone.decode_latents(without)))
    assert not noise.requires_grad


def test_the_decoders_gradient_is_that_of_finite_differences(backbone):
    clean = 0.3 * noise_for(backbone)
    gradient = reward_gradient(backbone, clean, stillness)
    direction = torch.randn(clean.shape, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        ahead, behind = (stillness(backbone.decode_latents(clean + way * 1e-2 * direction)) for way in (1, -1))
    slope = (gradient * direction).flatten(1).sum(dim=1)
    torch.testing.assert_close((ahead - behind) / 2e-2, slope, rtol=0.02, atol=1e-6)


@pytest.mark.parametrize(("every", "guided"), [(1, 4), (2, 2), (3, 2), (5, 1)])
def test_every_so_many_steps_are_guided_the_first_included(backbone, every, guided):
    seen = []

    def watched(frames):
        seen.append(len(frames))
        return darkness(frames)

    conditioning, noise = conditioning_of(backbone), noise_for(backbone)
    config = GuideConfig(every=every)
    _, backward = sample_guided(backbone, conditioning, noise, SAMPLER, watched, config)
    assert backward == guided and seen == [2] * guided


def test_the_move_by_hand():
    latents = torch.tensor([3.0, 4.0]).view(1, 1, 2, 1, 1)
    gradient = torch.tensor([0.0, 2.0]).view(1, 1, 2, 1, 1)
    assert normalised_move(latents, gradient, 0).flatten().tolist() == [0, 5]
    assert normalised_move(latents, gradient, 1).flatten().tolist() == [0, 4]
    assert normalised_move(latents, torch.zeros_like(gradient), 0).flatten().tolist() == [0, 0]


def test_a_reward_without_slope_leaves_plain_sampling(backbone):
    conditioning, noise = conditioning_of(backbone), noise_for(backbone)
    config = GuideConfig(scale=0.5, every=1)
    latents, _ = sample_guided(backbone, conditioning, noise, SAMPLER, lambda frames: 0 * darkness(frames), config)
    assert torch.equal(latents, plain(backbone, conditioning, noise))


def test_what_does_not_fit_is_named(backbone):
    conditioning, noise = conditioning_of(backbone), noise_for(backbone)
    with pytest.raises(ValueError, match="the reward gave .*nan"):
        sample_guided(
            backbone, conditioning, noise, SAMPLER, lambda frames: torch.nan * darkness(frames), GuideConfig()
        )
    with pytest.raises(ValueError, match="the reward gave"):
        sample_guided(backbone, conditioning, noise, SAMPLER, lambda frames: frames.mean(), GuideConfig())
    for bad in ({"scale": -0.1}, {"every": 0}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            GuideConfig(**bad)
