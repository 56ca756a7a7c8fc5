"""The LoRA switch on real tiny Wan transformers: equality, gradients under recompute, loading, and peft beside it."""

import copy
import functools

import pytest
import torch
from diffusers import WanTransformer3DModel
from peft import LoraConfig as PeftConfig
from peft import set_peft_model_state_dict
from torch import nn
from torch._dynamo.utils import counters
from torch.utils.checkpoint import CheckpointError, checkpoint

from train.backbones.loading import random_transformer
from train.backbones.wan import wan_architecture
from train.lora_switch import LoraConfig, LoraSwitch, SwitchedLinear

SELF_ATTENTION = ["attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0"]
PLAIN = functools.partial(checkpoint, use_reentrant=False)


def make_network(layers=3, dtype=torch.float32) -> WanTransformer3DModel:
    architecture = wan_architecture(heads=2, head_dim=16, ffn=48, layers=layers, z_dim=4, text_dim=16)
    return random_transformer(architecture, device="cpu", dtype=dtype, seed=0)


def make_switch(network, *, zero=False, rank=4, alpha=8.0, targets=SELF_ATTENTION, seed=0) -> LoraSwitch:
    """A switch whose adapters, unless `zero`, are so large that policy and reference differ visibly."""
    switch = LoraSwitch(network, LoraConfig(rank, alpha, list(targets)), seed=seed)
    if not zero:
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for weight in switch.parameters():
                weight.normal_(std=0.1, generator=generator)
    return switch


def make_latents(seed=0):
    return torch.randn(2, 4, 2, 4, 4, generator=torch.Generator().manual_seed(seed))  # (B,C,F,H,W)


def velocity(network, latents):
    text = torch.randn(2, 6, 16, generator=torch.Generator().manual_seed(9))
    return network(
        hidden_states=latents.to(network.dtype),
        timestep=torch.tensor([300.0, 700.0]),
        encoder_hidden_states=text.to(network.dtype),
        return_dict=False,
    )[0].float()


def equal(first, second):
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


# Policy and reference


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fresh_adapters_leave_the_network_as_it_was_bit_for_bit(dtype):
    network = make_network(dtype=dtype)
    with torch.no_grad():
        plain = velocity(network, make_latents())
        switch = make_switch(network, zero=True)
        policy = velocity(network, make_latents())
        with switch.reference():
            reference = velocity(network, make_latents())
    assert torch.equal(policy, reference) and torch.equal(reference, plain)


def test_reference_never_moves_while_the_policy_trains():
    network = make_network()
    with torch.no_grad():
        plain = velocity(network, make_latents())
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    switch = make_switch(network, zero=True)
    optimizer = torch.optim.AdamW(switch.parameters(), lr=1e-2)
    target, losses = make_latents(seed=1), []
    for _ in range(4):
        optimizer.zero_grad()
        loss = (velocity(network, make_latents()) - target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        with torch.no_grad(), switch.reference():
            assert torch.equal(velocity(network, make_latents()), plain)
    with torch.no_grad():
        assert (velocity(network, make_latents()) - plain).abs().max() > 0.01
    assert losses[-1] < losses[0]
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
    assert all(parameter.grad is None for parameter in network.parameters())


def test_reference_nests_and_survives_exceptions():
    network = make_network(layers=1)
    switch = make_switch(network)
    with torch.no_grad():
        policy = velocity(network, make_latents())
        with switch.reference():
            reference = velocity(network, make_latents())
            with switch.reference():
                assert torch.equal(velocity(network, make_latents()), reference)
            assert torch.equal(velocity(network, make_latents()), reference)  # still off
            with pytest.raises(KeyError, match="inner"), switch.reference():
                raise KeyError("inner")
            assert torch.equal(velocity(network, make_latents()), reference)
        with pytest.raises(RuntimeError, match="outer"), switch.reference():
            raise RuntimeError("outer")
        assert torch.equal(velocity(network, make_latents()), policy)
    assert not torch.allclose(policy, reference, atol=1e-3)


def test_an_exception_in_a_checkpointed_block_restores_the_switch():
    network = make_network(layers=1)
    switch = make_switch(network)

    def fail(_):
        raise RuntimeError("block")

    with pytest.raises(RuntimeError, match="block"):
        switch.checkpoint(fail, torch.ones(1, requires_grad=True))
    assert switch.state.active


def test_the_networks_keys_and_parameters_stay_those_of_the_plain_network():
    plain, network = make_network(), make_network()
    switch = make_switch(network)
    assert list(network.state_dict()) == list(plain.state_dict())
    assert [name for name, _ in network.named_parameters()] == [name for name, _ in plain.named_parameters()]
    assert [name for name, _ in network.named_modules()] == [name for name, _ in plain.named_modules()]
    assert not any(parameter.requires_grad for parameter in network.parameters())
    own = {id(parameter) for parameter in network.parameters()}
    assert all(weight.requires_grad and id(weight) not in own for weight in switch.parameters())
    network.load_state_dict(plain.state_dict())  # strict: nothing missing, nothing unexpected


def test_eq_14_by_hand_in_float64_with_alpha_unlike_rank():
    class Single(nn.Module):
        def __init__(self):
            super().__init__()
            self.project = nn.Linear(3, 2, dtype=torch.float64)

        def forward(self, x):
            return self.project(x)

    network = Single()
    network.project.weight.data = torch.tensor([[1.0, 0.0, 2.0], [0.0, 1.0, -1.0]], dtype=torch.float64)
    network.project.bias.data = torch.tensor([0.5, -0.5], dtype=torch.float64)
    switch = LoraSwitch(network, LoraConfig(rank=2, alpha=6.0, targets=["project"]))
    down = torch.tensor([[1.0, 2.0, 0.0], [0.0, -1.0, 1.0]])
    up = torch.tensor([[1.0, 0.0], [2.0, 1.0]])
    switch.load_state_dict({"project.lora_A.weight": down, "project.lora_B.weight": up})
    x = torch.tensor([[1.0, 2.0, 3.0]], dtype=torch.float64)
    # W x + b = (7.5, -1.5); A x = (5, 1); B A x = (5, 11); scale 6/2 = 3.
    assert torch.equal(network(x), torch.tensor([[22.5, 31.5]], dtype=torch.float64))
    with switch.reference():
        assert torch.equal(network(x), torch.tensor([[7.5, -1.5]], dtype=torch.float64))
    assert sum(weight.numel() for weight in switch.parameters()) == 2 * (3 + 2)


# Activation checkpointing


def losses_of(network, switch, case):
    """Back-propagate one case; returns the gradients of adapters, and of the input where it has one."""
    latents = make_latents()
    if case == "policy":
        velocity(network, latents).square().mean().backward()
    elif case == "policy, switched off before backward":
        loss = velocity(network, latents).square().mean()
        with switch.reference():
            loss.backward()
    elif case == "policy's output through the reference":  # gradients come through the reference
        predicted = latents - 0.5 * velocity(network, latents)
        with switch.reference():
            loss = velocity(network, predicted).square().mean()
        loss.backward()
    elif case == "policy's output through the reference, both backward inside":
        predicted = latents - 0.5 * velocity(network, latents)
        with switch.reference():
            velocity(network, predicted).square().mean().backward()
    else:
        assert case == "reference"
        latents.requires_grad_()
        with switch.reference():
            loss = velocity(network, latents).square().mean()
        loss.backward()
        return [latents.grad]
    return [weight.grad for weight in switch.parameters()]


POLICY_CASES = [
    "policy",
    "policy, switched off before backward",
    "policy's output through the reference",
    "policy's output through the reference, both backward inside",
]


@pytest.mark.parametrize("case", [*POLICY_CASES, "reference"])
def test_gradients_are_equal_with_and_without_activation_checkpointing(case):
    def gradients(checkpointed):
        network = make_network()
        switch = make_switch(network)
        if checkpointed:
            network.enable_gradient_checkpointing(gradient_checkpointing_func=switch.checkpoint)
        result = losses_of(network, switch, case)
        assert switch.state.active
        return result

    kept, recomputed = gradients(False), gradients(True)
    assert equal(kept, recomputed)
    assert all(gradient.abs().max() > 0 for gradient in kept)


def test_checkpointing_recomputes_blocks_during_backward():
    """Otherwise the equality above would be about nothing."""
    network = make_network()
    switch = make_switch(network)
    network.enable_gradient_checkpointing(gradient_checkpointing_func=switch.checkpoint)
    seen = []
    for block in network.blocks:
        block.register_forward_pre_hook(lambda *_: seen.append(switch.state.active))
    with switch.reference():
        loss = velocity(network, make_latents().requires_grad_()).square().mean()
    assert seen == [False] * 3
    loss.backward()
    assert seen == [False] * 6


@pytest.mark.parametrize("case", [*POLICY_CASES[1:], "reference"])
def test_plain_checkpointing_recomputes_the_wrong_mode(case):
    """Without the captured state torch notices that other tensors were saved; unchecked, the gradient is wrong."""
    network = make_network()
    switch = make_switch(network)
    network.enable_gradient_checkpointing(gradient_checkpointing_func=PLAIN)
    with pytest.raises(CheckpointError):
        losses_of(network, switch, case)


def test_plain_checkpointing_unchecked_gives_a_wrong_gradient():
    def gradient(function):
        network = make_network()
        switch = make_switch(network)
        network.enable_gradient_checkpointing(gradient_checkpointing_func=function or switch.checkpoint)
        return losses_of(network, switch, "reference")[0]

    right, wrong = gradient(None), gradient(functools.partial(checkpoint, use_reentrant=True))
    assert (right - wrong).norm() > 0.05 * right.norm()


# Targets, sizes, seeds, precision


def test_targets_choose_layers_by_suffix():
    network = make_network(layers=2)
    switch = make_switch(network, rank=2, targets=["attn2.to_k", "ffn.net.0.proj", "ffn.net.2"])
    names = {name.rsplit(".", 2)[0] for name in switch.weights}
    assert names == {f"blocks.{i}.{layer}" for i in range(2) for layer in ("attn2.to_k", "ffn.net.0.proj", "ffn.net.2")}
    assert sum(weight.numel() for weight in switch.parameters()) == 2 * 2 * ((32 + 32) + (32 + 48) + (48 + 32))
    assert type(network.get_submodule("blocks.1.ffn.net.2")) is SwitchedLinear
    assert type(network.get_submodule("blocks.1.attn1.to_q")) is nn.Linear
    loss = velocity(network, make_latents()).square().mean()
    assert all(gradient.abs().max() > 0 for gradient in torch.autograd.grad(loss, switch.parameters()))


def test_a_suffix_matches_whole_names_only():
    with pytest.raises(ValueError, match="'1.to_q' matches no linear layer"):
        make_switch(make_network(layers=1), targets=["1.to_q"])


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("attn1.to_qq", r"lora.targets: 'attn1.to_qq' matches no linear layer; did you mean 'attn1.to_q'\?"),
        ("self_attn.o", r"lora.targets: 'self_attn.o' matches no linear layer.*attn1.to_out.0"),
        ("attn1.norm_q", "'attn1.norm_q' matches no linear layer"),  # there, but not linear
    ],
)
def test_unknown_targets_are_refused_with_a_suggestion(target, message):
    with pytest.raises(ValueError, match=message):
        make_switch(make_network(layers=1), targets=["attn1.to_q", target])


@pytest.mark.parametrize("rank", [0, -4])
def test_rank_must_be_positive(rank):
    with pytest.raises(ValueError, match=f"lora.rank is {rank}: it must be at least 1"):
        make_switch(make_network(layers=1), rank=rank)


def test_an_adapter_needs_layers():
    with pytest.raises(ValueError, match="lora.targets is empty: name suffixes of linear layers"):
        make_switch(make_network(layers=1), targets=[])


def test_the_seed_alone_decides_the_first_weights():
    def weights(seed):
        torch.rand(3)  # the global generator plays no part
        return make_switch(make_network(layers=1), zero=True, seed=seed).state_dict()

    first, same, other = weights(0), weights(0), weights(1)
    down = [name for name in first if name.endswith("lora_A.weight")]
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert all(not torch.equal(first[name], other[name]) for name in down)
    assert all(0 < first[name].abs().max() <= 32**-0.5 for name in down)  # Kaiming-uniform over 32 inputs
    assert not any(first[name].any() for name in first if name not in down)


def test_adapters_of_a_bfloat16_network_stay_float32_with_float32_gradients():
    network = make_network(dtype=torch.bfloat16)
    switch = make_switch(network)
    network.enable_gradient_checkpointing(gradient_checkpointing_func=switch.checkpoint)
    velocity(network, make_latents()).square().mean().backward()
    assert network.blocks[0].attn1.to_q.weight.dtype == torch.bfloat16
    assert all(weight.dtype == weight.grad.dtype == torch.float32 for weight in switch.parameters())
    assert all(weight.grad.isfinite().all() and weight.grad.any() for weight in switch.parameters())


# Saving and loading


def test_state_dict_round_trip_copies():
    network = make_network()
    switch = make_switch(network)
    saved = switch.state_dict()
    with torch.no_grad():
        expected = velocity(network, make_latents())
        for weight in switch.parameters():
            weight.add_(1)
    other = make_network()
    make_switch(other, zero=True).load_state_dict(saved)
    with torch.no_grad():
        assert torch.equal(velocity(other, make_latents()), expected)
    assert all(tensor.dtype == torch.float32 and not tensor.requires_grad for tensor in saved.values())


def test_loading_another_rank_names_both():
    saved = make_switch(make_network(layers=1), rank=8).state_dict()
    switch = make_switch(make_network(layers=1), rank=4)
    before = switch.state_dict()
    both = r"my\.safetensors: .* shape \(8, 32\), this recipe needs \(4, 32\).*lora.rank"
    with pytest.raises(ValueError, match=both):
        switch.load_state_dict(saved, source="my.safetensors")
    assert equal(before.values(), switch.state_dict().values())


def test_loading_other_layers_names_both():
    saved = make_switch(make_network(layers=1), targets=["attn1.to_q", "attn2.to_q"]).state_dict()
    switch = make_switch(make_network(layers=1), targets=["attn1.to_q", "attn1.to_k"])
    with pytest.raises(ValueError, match=r"my\.safetensors.*attn1\.to_k.*attn2\.to_q.*lora\.targets"):
        switch.load_state_dict(saved, source="my.safetensors")


def test_equals_peft_with_the_same_weights():
    network, with_peft = make_network(), make_network()
    switch = make_switch(network, rank=4, alpha=6.0)
    with_peft.add_adapter(PeftConfig(r=4, lora_alpha=6.0, target_modules=SELF_ATTENTION, init_lora_weights=False))
    loaded = set_peft_model_state_dict(with_peft, copy.deepcopy(switch.state_dict()))
    assert not loaded.unexpected_keys
    policy, expected = velocity(network, make_latents()), velocity(with_peft, make_latents())
    torch.testing.assert_close(policy, expected, rtol=1e-6, atol=1e-6)
    ours = torch.autograd.grad(policy.square().mean(), switch.parameters())
    adapters = {n.replace(".default", ""): p for n, p in with_peft.named_parameters() if "lora_" in n}
    theirs = torch.autograd.grad(expected.square().mean(), [adapters[name] for name in switch.weights])
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-7)
    with_peft.disable_adapters()
    with torch.no_grad(), switch.reference():
        assert torch.equal(velocity(network, make_latents()), velocity(with_peft, make_latents()))


# One graph for policy and reference


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_graph_gives_what_branching_gives(dtype):
    """Uncompiled, so that the arithmetic is the same: the reference is the plain network's, bit for bit."""

    def outputs(shared):
        network = make_network(dtype=dtype)
        with torch.no_grad():
            plain = velocity(network, make_latents())
        switch = make_switch(network)
        if shared:
            switch.share_graph()
        network.enable_gradient_checkpointing(gradient_checkpointing_func=switch.checkpoint)
        with torch.no_grad(), switch.reference():
            assert torch.equal(velocity(network, make_latents()), plain)
        return [velocity(network, make_latents()).detach(), *losses_of(network, switch, POLICY_CASES[2])]

    assert equal(outputs(False), outputs(True))


@pytest.mark.parametrize("case", [*POLICY_CASES, "reference"])
def test_one_graph_recomputes_with_the_gate_of_its_forward_pass(case):
    def gradients(checkpointed):
        network = make_network()
        switch = make_switch(network)
        switch.share_graph()
        if checkpointed:
            network.enable_gradient_checkpointing(gradient_checkpointing_func=switch.checkpoint)
        return losses_of(network, switch, case)

    kept, recomputed = gradients(False), gradients(True)
    assert equal(kept, recomputed)
    assert all(gradient.abs().max() > 0 for gradient in kept)


def test_with_one_graph_plain_checkpointing_gives_a_wrong_gradient_unnoticed():
    """Both modes save the same tensors here, so nothing but the captured state stands between this and a wrong step."""

    def gradients(function):
        network = make_network()
        switch = make_switch(network)
        switch.share_graph()
        network.enable_gradient_checkpointing(gradient_checkpointing_func=function or switch.checkpoint)
        return losses_of(network, switch, POLICY_CASES[2])

    pairs = zip(gradients(None), gradients(PLAIN), strict=True)
    assert any((right - wrong).norm() > 0.05 * right.norm() for right, wrong in pairs)


@pytest.mark.slow
def test_compiled_blocks_switch_in_one_graph():
    network = make_network(layers=4)
    switch = make_switch(network)
    switch.share_graph()
    network.enable_gradient_checkpointing(gradient_checkpointing_func=switch.checkpoint)

    def run():
        for weight in switch.parameters():
            weight.grad = None
        gradients = losses_of(network, switch, POLICY_CASES[2])
        with switch.frozen_reference():
            reference = velocity(network, make_latents())
        return [velocity(network, make_latents()).detach(), reference.detach(), *gradients]

    plain = run()
    torch._dynamo.reset()
    counters.clear()
    for block in network.blocks:
        block.forward = torch.compile(block.forward, backend="aot_eager", dynamic=False)
    torch.autograd.grad(velocity(network, make_latents()).sum(), switch.parameters())
    # The first block's input carries no gradient, the others' does. A graph a block would pass dynamo's limit of 8.
    assert counters["stats"]["unique_graphs"] == 2
    compiled, again = run(), run()
    assert counters["stats"]["unique_graphs"] == 2  # the reference has none of its own
    torch._dynamo.reset()
    assert not torch.allclose(compiled[0], compiled[1], atol=1e-3)
    for expected, *found in zip(plain, compiled, again, strict=True):
        for value in found:
            torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-6)


def test_frozen_reference_builds_no_graph_where_it_need_not():
    network = make_network(layers=1)
    switch = make_switch(network)
    latents = make_latents().requires_grad_()
    with switch.frozen_reference():
        assert not velocity(network, latents).requires_grad
    switch.share_graph()
    with switch.frozen_reference():
        assert velocity(network, latents).requires_grad  # as the policy's pass, or it would be another graph
        assert not switch.state.active
    with torch.no_grad(), switch.frozen_reference():
        assert not velocity(network, latents).requires_grad
    assert switch.state.active and torch.is_grad_enabled()
