"""Fused blocks in evaluation: the same velocities, gradients, masks and switch as diffusers' own blocks."""

import pytest
import torch
from safetensors.torch import save_file

from eval.loras import attach, read_lora
from eval.search.candidates import Candidates
from eval.search.masks import mask_of
from eval.search.residuals import ResidualConfig, Residuals
from train.backbones import load_backbone
from train.backbones.base import BackboneConfig, Conditioning
from train.backbones.fused.inference import fuse
from train.backbones.streaming import StreamedBlocks
from train.clips import VideoConfig
from train.lora_switch import LoraConfig, LoraSwitch
from train.sampling import SamplerConfig, sample_clips


def load(family="wan21", **options):
    made = {"architecture": "tiny", "random_weights": True, "dtype": "float32", "text_length": 8}
    config = BackboneConfig(family=family, **made, **options)
    return load_backbone(config, "cpu", parts=("transformer",))


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def inputs(backbone, num_frames=5, given=0):
    latents = draw(2, *backbone.latent_shape(32, 32, num_frames))
    width = backbone.architecture["transformer"]["text_dim"]
    stacked = backbone.input_channels(backbone.architecture) > latents.shape[1]
    image = draw(*latents.shape, seed=2)[:, :, : given or None] if stacked or given else None
    return latents, Conditioning(draw(2, 8, width, seed=1), image)


@pytest.mark.parametrize(
    ("family", "more"),
    [("wan21", {}), ("wan22_ti2v", {}), ("wan22_ti2v", {"num_frames": 9, "given": 2}), ("wan22_i2v", {})],
)
def test_velocity_and_gradient_are_those_of_plain_blocks(family, more):
    """given: latent frames at t = 0, beside others at t."""
    backbone, found = load(family), []
    latents, conditioning = inputs(backbone, **more)
    for times in range(2):
        if times:
            assert fuse(backbone, compiled=False) == ""
        for t in (0.95, 0.3):  # one of each expert
            x = latents.clone().requires_grad_()
            velocity = backbone.velocity_at(x, t, conditioning)
            (gradient,) = torch.autograd.grad(velocity.square().sum(), x)
            found.append((velocity.detach(), gradient))
    for plain, fused in zip(found[:2], found[2:], strict=True):
        torch.testing.assert_close(plain, fused, rtol=1e-4, atol=1e-4)


def test_loras_of_both_experts_and_full_differences_stay_in_fused_blocks(tmp_path):
    backbone, tensors = load("wan22_t2v"), {}
    latents, conditioning = inputs(backbone)
    for network in ("transformer", "transformer_2"):
        tensors[f"{network}.blocks.0.attn1.to_q.lora_A.weight"] = draw(2, 64) / 4
        tensors[f"{network}.blocks.0.attn1.to_q.lora_B.weight"] = draw(64, 2, seed=1) / 4
        tensors[f"{network}.blocks.1.norm2.diff"] = draw(64, seed=2) / 4
        tensors[f"{network}.blocks.1.attn2.to_v.diff_b"] = draw(64, seed=3) / 4
    save_file(tensors, tmp_path / "lora.safetensors")
    attached = attach(read_lora(str(tmp_path / "lora.safetensors"), backbone, key="x"), backbone)
    found = []
    with torch.no_grad():
        for times in range(2):
            if times:
                assert fuse(backbone, attached, compiled=False) == ""
            for t in (0.95, 0.3):
                found.append(backbone.velocity_at(latents, t, conditioning))
                with attached.reference():
                    found.append(backbone.velocity_at(latents, t, conditioning))
    for plain, fused in zip(found[:4], found[4:], strict=True):
        torch.testing.assert_close(plain, fused, rtol=1e-4, atol=1e-4)
    for tuned, base in zip(found[::2], found[1::2], strict=True):
        assert (tuned - base).abs().max() > 1e-2


def test_the_switch_turns_fused_blocks_as_well():
    backbone = load()
    latents, conditioning = inputs(backbone)
    switch = LoraSwitch(backbone.transformer, LoraConfig(rank=2, alpha=2))
    for number, weight in enumerate(switch.parameters()):
        weight.data = draw(*weight.shape, seed=number) / 10
    with torch.no_grad():
        plain = backbone.velocity_at(latents, 0.5, conditioning)
        assert fuse(backbone, switch, compiled=False) == ""
        fused = backbone.velocity_at(latents, 0.5, conditioning)
        with switch.reference():
            base = backbone.velocity_at(latents, 0.5, conditioning)
    torch.testing.assert_close(plain, fused, rtol=1e-4, atol=1e-4)
    assert (base - fused).abs().max() > 1e-2


@pytest.mark.parametrize("stream", [False, True])
def test_masks_still_see_the_attention(stream):
    """Which takes diffusers' own forward: it finds the weights of streamed blocks, too."""
    backbone = load()
    latents, conditioning = inputs(backbone)
    found = []
    for times in range(2):
        if times:
            backbone = load(stream=stream)
            fuse(backbone, compiled=False)
        candidates = Candidates("a", "a ball", latents, conditioning[:1], None, 8.0)
        residuals = Residuals(backbone, ResidualConfig(levels=1, draws=1))
        found.append(mask_of("attention", candidates, residuals))
    torch.testing.assert_close(found[0], found[1])
    assert "forward" in backbone.blocks[0].__dict__ and "forward" in backbone.blocks[-1].__dict__


def test_what_cannot_be_fused_is_said():
    backbone = load()
    switch = LoraSwitch(backbone.transformer, LoraConfig(rank=2, alpha=2, targets=["proj_out"]))
    assert "outside" in fuse(backbone, switch)


def test_blocks_that_a_residual_cache_leaves_out_are_not_fetched(monkeypatch):
    video, fetch, fetched = VideoConfig(32, 32, 5), StreamedBlocks.fetch, []
    monkeypatch.setattr(StreamedBlocks, "fetch", lambda self, index: fetched.append(index) or fetch(self, index))
    clips = {}
    for stream in (False, True):
        backbone = load(stream=stream)
        fuse(backbone, compiled=False)
        conditioning = inputs(backbone)[1]
        for cache in (0.0, 0.5):
            sampler = SamplerConfig(steps=6, guidance=2.0, cache=cache)
            made = sample_clips(backbone, conditioning[:1], [0], video, sampler, negative=conditioning[1:])
            clips[stream, cache] = made
    assert all(torch.equal(clips[True, cache], clips[False, cache]) for cache in (0.0, 0.5))
    blocks, passes = len(backbone.blocks), 12
    assert fetched[: passes * blocks] == [*range(blocks)] * passes
    assert passes < len(fetched) - passes * blocks < passes * blocks
