"""The fused block against diffusers' own, on tiny networks: values, gradients at every level, one graph for all."""

import pytest
import torch
from diffusers import WanTransformer3DModel
from torch._dynamo.utils import counters

from train.backbones.fused import float8
from train.backbones.fused.fused_block import LEVELS, fuse_blocks, kernel_name, unfit
from train.backbones.loading import random_transformer
from train.backbones.quantize import quantize
from train.backbones.wan import wan_architecture
from train.full_parameters import FullParameters
from train.lora_switch import LoraConfig, LoraSwitch

SELF_ATTENTION = ["attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0"]
EVERY_LAYER = [
    *SELF_ATTENTION,
    "attn2.to_q",
    "attn2.to_k",
    "attn2.to_v",
    "attn2.to_out.0",
    "ffn.net.0.proj",
    "ffn.net.2",
]


def make(targets=SELF_ATTENTION, layers=3, dtype=torch.float32) -> tuple[WanTransformer3DModel, LoraSwitch]:
    """A seeded network whose adapters are so large that policy and reference differ visibly."""
    architecture = wan_architecture(heads=2, head_dim=16, ffn=48, layers=layers, z_dim=4, text_dim=16)
    network = random_transformer(architecture, device="cpu", dtype=dtype, seed=0)
    switch = LoraSwitch(network, LoraConfig(4, 8.0, list(targets)))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in switch.parameters():
            weight.normal_(std=0.1, generator=generator)
        for weight in network.parameters():  # what random_transformer leaves at zero or one
            if weight.dim() == 1:
                weight.add_(0.1 * torch.randn(weight.shape, generator=generator))
    return network, switch


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def velocity(network, latents, *, per_token=False):
    timestep = torch.tensor([300.0, 700.0])
    if per_token:
        timestep = timestep[:, None] * torch.linspace(0, 1, 8)  # 2 x 2 x 2 tokens
    text = draw(2, 6, 16, seed=9)
    inputs = {"hidden_states": latents.to(network.dtype), "encoder_hidden_states": text.to(network.dtype)}
    return network(**inputs, timestep=timestep, return_dict=False)[0].float()


def through_both(network, switch, **options):
    """Outputs of policy and reference, and gradients of a loss that goes through the policy and then the reference."""
    latents = draw(2, 4, 2, 4, 4).requires_grad_()
    policy = velocity(network, latents, **options)
    with switch.reference():
        loss = velocity(network, latents - 0.5 * policy, **options).square().mean()
        with torch.no_grad():
            reference = velocity(network, latents, **options)
    return [policy.detach(), reference, *torch.autograd.grad(loss, [latents, *switch.parameters()])]


def assert_same(found, expected, tolerance):
    for value, other in zip(found, expected, strict=True):
        assert (value - other).norm() <= tolerance * other.norm() and other.norm() > 0


@pytest.mark.parametrize("level", range(len(LEVELS)))
@pytest.mark.parametrize("targets", [SELF_ATTENTION, EVERY_LAYER])
def test_every_level_equals_diffusers_block_in_float32(level, targets):
    expected = through_both(*make(targets))
    network, switch = make(targets)
    fuse_blocks(network, switch, lambda *_: [level, 1, level], compiled=False)
    assert_same(through_both(network, switch), expected, 1e-5)


def test_a_timestep_for_every_token():
    expected = through_both(*make(), per_token=True)
    network, switch = make()
    fuse_blocks(network, switch, lambda *_: [0, 1, 3], compiled=False)
    assert_same(through_both(network, switch, per_token=True), expected, 1e-5)


def test_in_bfloat16_it_is_as_near_to_float32_as_diffusers_block():
    exact = through_both(*make())
    diffusers = through_both(*make(dtype=torch.bfloat16))
    network, switch = make(dtype=torch.bfloat16)
    fuse_blocks(network, switch, lambda *_: [1, 1, 1], compiled=False)

    def error(found):
        return sum(((a - b).norm() / b.norm()).item() for a, b in zip(found, exact, strict=True))

    assert error(through_both(network, switch)) < 1.1 * error(diffusers)


def test_an_untrained_policy_is_its_reference_bit_for_bit():
    network, switch = make()
    with torch.no_grad():
        for name, weight in switch.weights.items():
            weight.mul_("lora_A" in name)
    fuse_blocks(network, switch, lambda *_: [1] * 3, compiled=False)
    policy, reference, *_ = through_both(network, switch)
    assert torch.equal(policy, reference)


def test_the_reference_builds_no_graph_and_keeps_nothing():
    network, switch = make()
    fuse_blocks(network, switch, lambda *_: [3] * 3, compiled=False)
    with switch.frozen_reference():
        assert not velocity(network, draw(2, 4, 2, 4, 4).requires_grad_()).requires_grad


@pytest.mark.slow
def test_compiled_blocks_share_a_graph_a_pass_and_never_compile_again(monkeypatch):
    expected = through_both(*make(layers=4))
    network, switch = make(layers=4)
    torch._dynamo.reset()
    counters.clear()
    compile_with = torch.compile
    monkeypatch.setattr(torch, "compile", lambda *args, **kwargs: compile_with(*args, backend="aot_eager", **kwargs))
    fuse_blocks(network, switch, lambda *_: [1, 1, 1, 2])
    assert_same(through_both(network, switch), expected, 1e-5)
    assert counters["stats"]["unique_graphs"] == 4  # forward and backward of two levels, for policy and reference
    seen = []
    network.blocks[2].register_forward_hook(lambda *_: seen.append(switch.state.active))  # stays outside the graphs
    assert_same(through_both(network, switch), expected, 1e-5)
    assert seen == [True, False, False]
    assert counters["stats"]["unique_graphs"] == 4
    torch._dynamo.reset()


def test_what_cannot_be_fused_says_why():
    network, switch = make()
    assert unfit(network, switch) == "" and kernel_name(network) == "cpu"
    network.blocks[0].attn1.processor._attention_backend = "flex"
    assert "logsumexp" in unfit(network, switch)
    network, switch = make(["condition_embedder.time_proj"])
    assert "outside" in unfit(network, switch)
    network, _ = make()
    assert "all weights" in unfit(network, FullParameters(network))


def test_float8_products_are_off_by_a_few_percent_and_feed_gradients_too():
    x, weight = draw(64, 256), draw(128, 256, seed=1)
    exact = x @ weight.t()
    assert 0.01 < (float8.linear(x, weight) - exact).norm() / exact.norm() < 0.05
    expected = through_both(*make())
    network, switch = make()
    fuse_blocks(network, switch, lambda *_: [1] * 3, float8=True, compiled=False)
    found = through_both(network, switch)
    assert_same(found, expected, 0.2)
    assert (found[0] - expected[0]).norm() > 1e-3 * expected[0].norm()


def test_float8_scales_rows_apart():
    x = torch.tensor([[1.0, -2.0], [1e-4, 3e-4], [0.0, 0.0]])
    quantized, scale = quantize(x)
    torch.testing.assert_close(quantized.float() * scale, x, rtol=2**-4, atol=0)
    assert quantized.float().abs().amax(-1).tolist() == [448, 448, 0]
