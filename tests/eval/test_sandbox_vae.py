"""Training of the sandbox's VAE in miniature: it learns, repeats itself, and writes what a pipeline needs."""

import json
import os
import signal

import pytest
import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

from eval.sandbox.clips import simulate
from eval.sandbox.vae import ARCHITECTURE, draw_from_pool, main, moving
from eval.sandbox.world import BACKDROP, FIRST_OBJECT, GROUND, PANEL, ROD
from eval.small_wan.training import Checkpoint, Settings
from eval.small_wan.vae import (
    OBJECT_WEIGHT,
    SQUARE_WEIGHT,
    decode_whole,
    encode_whole,
    measure,
    new_vae,
    pixel_weights,
    train_vae,
    vae_loss,
    whole_clips,
)


def test_weights_cover_objects_rods_and_their_border():
    layers = torch.full((1, 1, 16, 16), BACKDROP, dtype=torch.uint8)
    layers[0, 0, 12:] = GROUND
    layers[0, 0, :2, 12:] = PANEL
    layers[0, 0, 5, 5], layers[0, 0, 5, 10] = FIRST_OBJECT, ROD
    weights = pixel_weights(moving(layers))
    assert weights.shape == (1, 1, 1, 16, 16)
    expected = torch.ones(16, 16)
    expected[3:8, 3:13] = OBJECT_WEIGHT
    assert torch.equal(weights[0, 0, 0], expected)


def test_loss_by_hand():
    frames = torch.zeros(1, 3, 1, 2, 2)
    decoded = frames.clone()
    decoded[..., 0, 0] = 0.4
    weights = torch.ones(1, 1, 1, 2, 2)
    posterior = DiagonalGaussianDistribution(torch.tensor([2.0, 0.0]).view(1, 2, 1, 1, 1))  # mean 2, variance 1
    # One of four pixels is off by 0.4.
    for weight, share in ((1.0, 1 / 4), (3.0, 3 / 6)):
        weights[..., 0, 0] = weight
        expected = share * (0.4 + SQUARE_WEIGHT * 0.16) + 0.1 * 0.5 * 4 / 1
        assert vae_loss(decoded, frames, weights, posterior, kl_weight=0.1).item() == pytest.approx(expected, rel=1e-5)


def test_a_clip_in_one_pass_is_a_clip_in_chunks():
    vae = new_vae(ARCHITECTURE, 0).eval()
    frames = torch.rand(2, 3, 9, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1
    with torch.no_grad():
        posterior = vae.encode(frames).latent_dist
        decoded = vae.decode(posterior.mean).sample
        with whole_clips(vae):
            whole = encode_whole(vae, frames)
            torch.testing.assert_close(whole.mean, posterior.mean, atol=1e-5, rtol=1e-4)
            torch.testing.assert_close(whole.logvar, posterior.logvar, atol=1e-5, rtol=1e-4)
            again = decode_whole(vae, posterior.mean)
        torch.testing.assert_close(again.clamp(-1, 1), decoded, atol=1e-5, rtol=1e-4)
        assert torch.equal(vae.decode(posterior.mean).sample, decoded)  # outside it is diffusers' own VAE again


@pytest.fixture
def thin(monkeypatch):
    monkeypatch.setitem(ARCHITECTURE, "base_dim", 8)


def train(settings, checkpoint=None):
    return train_vae(settings, ARCHITECTURE, draw_from_pool(settings, "cpu"), "cpu", checkpoint)


@pytest.mark.slow
def test_training_that_was_stopped_continues(thin, tmp_path, capsys):
    settings, path = Settings(4, 2, 4, 2e-3, 5), tmp_path / "state.safetensors"
    whole = train(settings)
    handler = signal.getsignal(signal.SIGTERM)
    try:
        stopped = Checkpoint(path, settings)
        os.kill(os.getpid(), signal.SIGTERM)  # before the first step, which is made nevertheless
        assert train(settings, stopped) is None and "stopped after step 1;" in capsys.readouterr().out
        continued = train(settings, Checkpoint(path, settings))
        assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), continued.parameters(), strict=True))
        with pytest.raises(ValueError, match='"steps": 4'):
            train(other := Settings(5, 2, 4, 2e-3, 5), Checkpoint(path, other))
    finally:
        signal.signal(signal.SIGTERM, handler)


@pytest.mark.slow
def test_training_lowers_the_error_and_repeats_itself(thin):
    clips = simulate("mixed", 4, torch.Generator().manual_seed(9))
    state = torch.random.get_rng_state()
    one, again, longer = (train(Settings(n, 2, 4, 2e-3, 5)) for n in (2, 2, 8))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), again.parameters(), strict=True))
    before, after = (measure(vae, clips.frames, clips.masks > 0)[0] for vae in (one, longer))
    assert after["psnr"] > before["psnr"] + 1
    with pytest.raises(ValueError, match="--pool is 0"):
        main(["--folder", "unused", "--pool", "0"])


def test_the_folder_holds_a_component_with_its_statistics(thin, tmp_path, capsys):
    main(["--folder", str(tmp_path / "vae"), "--steps", "1", "--batch", "1", "--pool", "2", "--device", "cpu"])
    assert "PSNR" in capsys.readouterr().out
    vae = AutoencoderKLWan.from_pretrained(tmp_path / "vae")
    figures = json.loads((tmp_path / "vae" / "training.json").read_text(encoding="utf-8"))
    assert figures["settings"]["steps"] == 1 and figures["parameters"] == sum(p.numel() for p in vae.parameters())
    assert (tmp_path / "vae" / "reconstructions.png").stat().st_size > 0
    weights = tmp_path / "vae" / "diffusion_pytorch_model.safetensors"
    assert weights.stat().st_size < 2.1 * figures["parameters"]  # 16 bits
    clips = simulate("mixed", 2, torch.Generator().manual_seed(1))  # the held-out clips
    again, decoded = measure(vae, clips.frames, clips.masks > 0)
    assert again["latents_std"] == pytest.approx(vae.config.latents_std, rel=1e-4)
    assert again["latents_mean"] == pytest.approx(vae.config.latents_mean, rel=1e-3, abs=1e-4)
    assert decoded.shape == clips.frames.shape and decoded.dtype == torch.uint8
