"""Offloaded blocks on a GPU: the same gradients as with everything on it, memory used again, and none of it leaked;
and how much of the host they may have."""

import gc
import re
from pathlib import Path

import psutil
import pytest
import torch

from train.backbones.fused.fused_block import fuse_blocks
from train.backbones.fused.offload import HostStore, affordable
from train.backbones.loading import random_transformer
from train.backbones.wan import wan_architecture
from train.host_memory import GIB, host_memory, locked
from train.lora_switch import LoraConfig, LoraSwitch

gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="copies between a GPU and its host")
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


@gpu
def test_gradients_are_those_of_kept_activations_in_every_step():
    levels = [4, 1, 4, 4, 3]
    store = HostStore(2**27, torch.device(GPU))
    network, switch = make(levels, store)
    kept, kept_switch = make([3 if level == 4 else level for level in levels])
    for seed in range(3):
        assert_close(gradients(network, switch, seed), gradients(kept, kept_switch, seed))
        assert store.newest() is None and store.free == [(0, 2**27)]  # every parcel is gone when its pass is


@gpu
def test_a_full_host_keeps_on_the_device():
    store = HostStore(2**21, torch.device(GPU))
    network, switch = make([4, 4, 4], store)
    kept, kept_switch = make([3, 3, 3])
    assert_close(gradients(network, switch, 0), gradients(kept, kept_switch, 0))


@gpu
def test_the_memory_is_unlocked_and_locked_again():
    for _ in range(2):
        store = HostStore(2**20, torch.device(GPU))
        assert store.memory.is_pinned()
        del store
        gc.collect()


def plant(file, text):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text, encoding="utf-8")
    return file


@pytest.mark.parametrize(
    ("groups", "limits", "expected"),
    [
        ("0::/slurm/job_7/step_0", {"slurm/job_7/memory.max": 4096, "slurm/job_7/step_0/memory.max": "max"}, 4096),
        ("0::/", {"memory.max": 8192}, 8192),  # a pod sees its own group as the root
        ("0::/a/b", {"a/b/memory.max": 900, "a/memory.max": 700}, 700),
        ("5:cpu,cpuacct:/x\n4:memory:/slurm/job_7", {"memory/slurm/job_7/memory.limit_in_bytes": 5000}, 5000),
        ("4:memory:/", {"memory/memory.limit_in_bytes": 2**63 - 4096}, None),  # version 1 for: no limit
        ("0::/outside/this/mount", {}, None),
    ],
)
def test_the_hosts_memory_is_what_the_control_group_allows(tmp_path, groups, limits, expected):
    file = plant(tmp_path / "cgroup", groups + "\n")
    for name, limit in limits.items():
        plant(tmp_path / "mount" / name, f"{limit}\n")
    assert host_memory(file, tmp_path / "mount") == (expected or psutil.virtual_memory().total)
    assert host_memory(tmp_path / "no cgroups", tmp_path / "mount") == psutil.virtual_memory().total


def test_what_the_job_may_not_have_is_not_asked_for(monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    share = 0.8 * host_memory() / GIB / 2
    assert affordable(share / 2) == share / 2
    with pytest.warns(UserWarning, match="train.offload_gib=1e[+]06 for each of 2 processes is more than this job may"):
        assert affordable(1e6) == pytest.approx(share)


def test_a_loaders_workers_get_no_copy_of_page_locked_memory():
    """Linux copies what is page-locked at each fork: four workers would take four times train.offload_gib more."""
    memory = locked(3 * 2**20, torch.device("cpu"))
    memory.fill_(7)
    mapping = None
    for line in Path("/proc/self/smaps").read_text(encoding="utf-8").splitlines():
        if found := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            mapping = range(int(found[1], 16), int(found[2], 16))
        elif line.startswith("VmFlags:") and memory.data_ptr() in mapping:
            assert "dc" in line.split() and len(mapping) >= memory.numel()  # "do not copy on fork", proc(5)
            return
    raise AssertionError("no mapping holds the memory")
