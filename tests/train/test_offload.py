"""Offloaded blocks on a GPU: the same gradients as with everything on it, memory used again, and none of it leaked."""

import gc

import pytest
import torch

from train.backbones.architecture import wan_architecture
from train.backbones.fused_block import fuse_blocks
from train.backbones.loading import random_transformer
from train.lora_switch import LoraConfig, LoraSwitch
from train.offload import HostStore

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="copies between a GPU and its host")
GPU = "cuda"


def make(levels, store=None):
    architecture = wan_architecture(heads=4, head_dim=64, ffn=512, layers=len(levels), z_dim=4, text_dim=16)
    network = random_transformer(architecture, device=GPU, dtype=torch.bfloat16, seed=0)
    switch = LoraSwitch(network, LoraConfig(8, 8.0))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in switch.parameters():
            weight.copy_(0.1 * torch.randn(weight.shape, generator=generator))
    fuse_blocks(network, switch, lambda *_: levels, store=store, compiled=False)
    return network, switch


def gradients(network, switch, seed):
    def draw(*shape):
        return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(GPU, torch.bfloat16)

    inputs = {"hidden_states": draw(1, 4, 5, 32, 32), "encoder_hidden_states": draw(1, 16, 16)}
    velocity = network(**inputs, timestep=torch.tensor([300.0], device=GPU), return_dict=False)[0]
    return torch.autograd.grad(velocity.float().square().mean(), switch.parameters())


def assert_close(found, expected):
    """Attention's backward pass adds in any order on a GPU, so that bfloat16 gradients differ in their last bit."""
    for value, other in zip(found, expected, strict=True):
        assert (value - other).norm() <= 5e-3 * other.norm() and other.norm() > 0


def test_gradients_are_those_of_kept_activations_in_every_step():
    levels = [4, 1, 4, 4, 3]
    store = HostStore(2**27, torch.device(GPU))
    network, switch = make(levels, store)
    kept, kept_switch = make([3 if level == 4 else level for level in levels])
    used = []
    for seed in range(3):
        assert_close(gradients(network, switch, seed), gradients(kept, kept_switch, seed))
        used.append(store.used)
        assert store.newest() is None  # every parcel is gone when its pass is
    assert used[0] == used[2] > 0


def test_a_full_host_keeps_on_the_device():
    store = HostStore(2**21, torch.device(GPU))
    network, switch = make([4, 4, 4], store)
    kept, kept_switch = make([3, 3, 3])
    assert_close(gradients(network, switch, 0), gradients(kept, kept_switch, 0))


def test_the_memory_is_unlocked_and_locked_again():
    for _ in range(2):
        store = HostStore(2**20, torch.device(GPU))
        assert store.memory.is_pinned()
        del store
        gc.collect()
