"""Attention kernels against attention in float64; FlashAttention-4's operators with a stand-in for the package."""

import sys
from types import ModuleType

import pytest
import torch

from train.backbones.attention_kernels import KERNELS, attention_seconds, kernels_on


def reference(query, key, value, grad):
    """Output, logsumexp and the three gradients in float64, written out; tensors (B, heads, N, size)."""
    query, key, value, grad = (x.double() for x in (query, key, value, grad))
    scale = query.shape[-1] ** -0.5
    scores = query @ key.transpose(-1, -2) * scale
    weights = scores.softmax(-1)
    out = weights @ value
    weights_grad = grad @ value.transpose(-1, -2)
    scores_grad = weights * (weights_grad - (weights * weights_grad).sum(-1, keepdim=True)) * scale
    gradients = scores_grad @ key, scores_grad.transpose(-1, -2) @ query, weights.transpose(-1, -2) @ grad
    return out, scores.logsumexp(-1), *gradients


def draw(device, dtype, *, queries=96, keys=64, heads=3, size=64):
    """query, key, value and the output's gradient as fused blocks have them: views of (B, N, heads, size)."""
    generator = torch.Generator().manual_seed(0)
    lengths = (queries, keys, keys, queries)
    return [
        torch.randn(2, length, heads, size, generator=generator).to(device, dtype).transpose(1, 2) for length in lengths
    ]


@pytest.fixture
def stand_in(monkeypatch):
    """A flash_attn.cute.interface that computes in float64, in that package's layout and with its five outputs."""
    module = ModuleType("flash_attn.cute.interface")

    def flip(x):
        return x.transpose(1, 2)

    def forward(query, key, value, return_lse):
        assert return_lse and all(x.is_contiguous() for x in (query, key, value))
        out, logsumexp = reference(*(flip(x) for x in (query, key, value)), flip(torch.zeros_like(query)))[:2]
        return flip(out).to(query.dtype).contiguous(), logsumexp.float(), None, None, None

    def backward(query, key, value, out, grad, logsumexp):
        assert logsumexp.shape == (query.shape[0], query.shape[2], query.shape[1]) and out.shape == query.shape
        grads = reference(*(flip(x) for x in (query, key, value, grad)))[2:]
        return tuple(flip(x).to(query.dtype).contiguous() for x in grads)

    module._flash_attn_fwd, module._flash_attn_bwd = forward, backward
    for name in ("flash_attn", "flash_attn.cute"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, "flash_attn.cute.interface", module)


@pytest.mark.parametrize("name", ["cpu", "flash4"])
@pytest.mark.parametrize("queries", [64, 96])
def test_kernels_against_float64(name, queries, stand_in):
    query, key, value, grad = draw("cpu", torch.float32, queries=queries)
    kernel = KERNELS[name]
    out, logsumexp = kernel.forward(query, key, value)
    found = (out, logsumexp, *kernel.backward(grad, query, key, value, out, logsumexp))
    for one, other in zip(found, reference(query, key, value, grad), strict=True):
        torch.testing.assert_close(one.double(), other, atol=2e-5, rtol=1e-4)


def test_flash4_inside_a_graph(stand_in):
    query, key, value, grad = draw("cpu", torch.float32)

    def both(query, key, value, grad):
        out, logsumexp = KERNELS["flash4"].forward(query, key, value)
        return out, *KERNELS["flash4"].backward(grad, query, key, value, out, logsumexp)

    compiled = torch.compile(both, backend="aot_eager", fullgraph=True)
    for one, other in zip(compiled(query, key, value, grad), both(query, key, value, grad), strict=True):
        assert one.stride() == other.stride()
        torch.testing.assert_close(one, other)


def test_a_cpu_has_one_kernel():
    assert list(kernels_on(torch.device("cpu"))) == ["cpu"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="GPU kernels")
def test_gpu_kernels_against_float64():
    device = torch.device("cuda")
    seconds = attention_seconds(4, 128, device)
    assert seconds and set(seconds) <= set(kernels_on(device))
    for name in seconds:
        query, key, value, grad = draw(device, torch.bfloat16, queries=512, keys=256, size=128)
        kernel = KERNELS[name]
        out, logsumexp = kernel.forward(query, key, value)
        grads = kernel.backward(grad, query, key, value, out, logsumexp)
        expected = reference(query, key, value, grad)
        torch.testing.assert_close(logsumexp.reshape(expected[1].shape).double(), expected[1], atol=2e-2, rtol=0)
        for one, other in zip((out, *grads), (expected[0], *expected[2:]), strict=True):
            assert (one.double() - other).norm() <= 1e-2 * other.norm(), name
