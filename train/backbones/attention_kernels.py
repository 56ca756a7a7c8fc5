"""Attention kernels with forward and backward passes of their own, so that a block's output and logsumexp can be kept.

PyTorch's operators below `scaled_dot_product_attention`, the ones autograd calls; no mask, no dropout. Query, key,
value and output are (B, heads, N, size), the logsumexp (B, heads, N).
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn


class Kernel(NamedTuple):
    """An attention kernel: forward (q, k, v) -> (out, logsumexp), and its backward."""

    forward: Callable[..., tuple[Tensor, Tensor]]
    backward: Callable[..., tuple[Tensor, Tensor, Tensor]]


def _cudnn(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    return torch.ops.aten._scaled_dot_product_cudnn_attention(query, key, value, None, True)[:2]


def _cudnn_backward(grad, query, key, value, out, logsumexp):
    unused = torch.zeros((), dtype=torch.int64, device=grad.device)  # random state: there is no dropout
    lengths = None, None, query.shape[2], key.shape[2]
    backward = torch.ops.aten._scaled_dot_product_cudnn_attention_backward
    return backward(grad, query, key, value, out, logsumexp, unused, unused, None, *lengths, 0.0, False)


def _flash(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    return torch.ops.aten._scaled_dot_product_flash_attention(query, key, value)[:2]


def _flash_backward(grad, query, key, value, out, logsumexp):
    unused = torch.zeros(2, dtype=torch.uint64, device=grad.device)
    lengths = None, None, query.shape[2], key.shape[2]
    backward = torch.ops.aten._scaled_dot_product_flash_attention_backward
    return backward(grad, query, key, value, out, logsumexp, *lengths, 0.0, False, unused, unused)


def _cpu(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, key, value)


def _cpu_backward(grad, query, key, value, out, logsumexp):
    backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    return backward(grad, query, key, value, out, logsumexp, 0.0, False)


KERNELS = {"cudnn": Kernel(_cudnn, _cudnn_backward), "flash": Kernel(_flash, _flash_backward)}
KERNELS["cpu"] = Kernel(_cpu, _cpu_backward)


def kernel_name(network: nn.Module) -> str | None:
    """Key of KERNELS for the kernel that `train.backbones.loading.choose_attention` set, or None: another one."""
    attention = network.blocks[0].attn1
    backend, weight = attention.processor._attention_backend, attention.to_q.weight
    name = None if backend is None else getattr(backend, "value", backend)
    if weight.device.type == "cpu":
        return "cpu" if name in (None, "native") else None
    if weight.dtype != torch.bfloat16:
        return None
    return {"_native_cudnn": "cudnn", None: "flash", "native": "flash", "_native_flash": "flash"}.get(name)
