"""Attention kernels with forward and backward passes of their own, so that a block's output and logsumexp can be kept.

PyTorch's operators below `scaled_dot_product_attention`, the ones autograd calls, and FlashAttention-4's kernels where
that package is installed (Hopper and Blackwell; fastest there for long sequences). No mask, no dropout. Query, key,
value and output are (B, heads, N, size), the logsumexp (B, heads, N).
"""

import importlib.util
import warnings
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from train.entry import first_line


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


# Operators of their own, so that graphs call them without looking inside. Tensors are (B, N, heads, size) here.


@torch.library.custom_op("physalign::flash4", mutates_args=())
def _flash4_operator(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    from flash_attn.cute.interface import _flash_attn_fwd

    out, logsumexp = _flash_attn_fwd(query, key, value, return_lse=True)[:2]
    return out, logsumexp


@_flash4_operator.register_fake
def _(query, key, value):
    batch, tokens, heads, _ = query.shape
    return torch.empty_like(query).contiguous(), query.new_empty((batch, heads, tokens), dtype=torch.float32)


@torch.library.custom_op("physalign::flash4_backward", mutates_args=())
def _flash4_backward_operator(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, logsumexp: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    from flash_attn.cute.interface import _flash_attn_bwd

    return _flash_attn_bwd(query, key, value, out, grad, logsumexp)


@_flash4_backward_operator.register_fake
def _(grad, query, key, value, out, logsumexp):
    return tuple(torch.empty_like(x).contiguous() for x in (query, key, value))


def _flash4(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    out, logsumexp = _flash4_operator(*(x.transpose(1, 2).contiguous() for x in (query, key, value)))
    return out.transpose(1, 2), logsumexp


def _flash4_backward(grad, query, key, value, out, logsumexp):
    inputs = (x.transpose(1, 2).contiguous() for x in (grad, query, key, value, out))
    return tuple(x.transpose(1, 2) for x in _flash4_backward_operator(*inputs, logsumexp))


KERNELS = {
    "cudnn": Kernel(_cudnn, _cudnn_backward),
    "flash": Kernel(_flash, _flash_backward),
    "flash4": Kernel(_flash4, _flash4_backward),
    "cpu": Kernel(_cpu, _cpu_backward),
}


def kernels_on(device: torch.device) -> dict[str, Kernel]:
    """Those of KERNELS that may run in bfloat16 on the device."""
    if device.type != "cuda":
        return {"cpu": KERNELS["cpu"]}
    names = ["cudnn", "flash"]
    if torch.cuda.get_device_capability(device)[0] in (9, 10) and _has_flash4():
        names.append("flash4")
    return {name: KERNELS[name] for name in names}


def _has_flash4() -> bool:
    try:
        return importlib.util.find_spec("flash_attn.cute") is not None
    except ModuleNotFoundError:
        return False


def attention_seconds(heads: int, size: int, device: torch.device) -> dict[str, float]:
    """Seconds of attention over 8192 tokens, forward and backward in bfloat16, by key of KERNELS, on a GPU.

    Kernels that do not run lack; a warning says so of a package that is installed for nothing.
    """
    generator = torch.Generator(device).manual_seed(0)
    shape = (1, 8192, heads, size)
    draws = [torch.randn(shape, device=device, dtype=torch.bfloat16, generator=generator) for _ in range(4)]
    *inputs, grad = (draw.transpose(1, 2) for draw in draws)
    measured = {}
    for name, kernel in kernels_on(device).items():
        times = []
        try:
            with warnings.catch_warnings(action="ignore"):  # FlashAttention-4's compiler has many
                for _ in range(4):  # the first two load the kernels
                    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                    start.record()
                    kernel.backward(grad, *inputs, *kernel.forward(*inputs))
                    end.record()
                    end.synchronize()
                    times.append(start.elapsed_time(end) / 1000)
        except Exception as error:  # compilers of another package: whatever they raise, other kernels do the same
            if name == "flash4":
                why = first_line(error)
                warnings.warn(f"flash-attn-4 is installed but does not run here ({why}): not used", stacklevel=2)
            continue
        measured[name] = min(times[2:])
    return measured
