"""What lies between the products of Wan's transformer block: norms, modulation, gates, rotary and cross-attention.

Plain tensor functions of (settings, frozen, *inputs), some with a constant before these. Hidden states are (B, N, D): B
batch, N tokens, D width.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from train.backbones.attention_kernels import Kernel

Frozen = dict[str, Tensor]  # the block's weights by name, and text, temb, cos, sin, gate


class Settings(NamedTuple):
    """What is the same for all blocks and constant in their graphs."""

    heads: int
    eps: float
    kernel: Kernel  # of self-attention
    cross_kernel: Kernel  # one that autograd knows
    float8: bool = False


def _modulation(frozen: Frozen, index: int) -> Tensor:
    """Row `index` of shift, scale, gate (self-attention, then feed-forward): float32 (B, 1, D) or (B, N, D)."""
    temb = frozen["temb"]  # (B, 6, D) or (B, N, 6, D)
    row = temb[..., index, :].float() + frozen["scale_shift_table"][:, index]
    return row.unsqueeze(1) if temb.ndim == 3 else row


def heads(settings: Settings, x: Tensor) -> Tensor:
    """(B, N, D) -> (B, heads, N, D / heads), a view."""
    return x.unflatten(2, (settings.heads, -1)).transpose(1, 2)


def _root_mean_square_norm(settings: Settings, x: Tensor, weight: Tensor) -> Tensor:
    """Over all heads together, float32."""
    x = x.float()
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + settings.eps) * weight.float()


def modulated_norm(first: int, settings: Settings, frozen: Frozen, hidden: Tensor) -> Tensor:
    """Layer norm with the modulation's rows `first` (shift) and the next (scale)."""
    x = F.layer_norm(hidden.float(), hidden.shape[-1:], eps=settings.eps)
    return (x * (1 + _modulation(frozen, first + 1)) + _modulation(frozen, first)).to(hidden.dtype)


def gated(index: int, settings: Settings, frozen: Frozen, hidden: Tensor, out: Tensor) -> Tensor:
    """Residual addition of what a row of the modulation scales."""
    return (hidden.float() + out.float() * _modulation(frozen, index)).to(hidden.dtype)


def gelu(settings: Settings, frozen: Frozen, wide: Tensor) -> Tensor:
    """GELU's tanh form, as a sigmoid: (1 + tanh u) / 2 = sigmoid(2 u), which GPUs compute faster."""
    x = wide.float()
    return (x * torch.sigmoid(math.sqrt(8 / math.pi) * (x + 0.044715 * x**3))).to(wide.dtype)


def cross_norm(settings: Settings, frozen: Frozen, hidden: Tensor) -> Tensor:
    if "norm2.weight" not in frozen:
        return hidden
    weight, bias = frozen["norm2.weight"].float(), frozen["norm2.bias"].float()
    return F.layer_norm(hidden.float(), hidden.shape[-1:], weight, bias, settings.eps).to(hidden.dtype)


def rotate(name: str, settings: Settings, frozen: Frozen, x: Tensor) -> Tensor:
    """Norm over all heads, by the weight `name`, and rotary embedding of channel pairs (2i, 2i + 1): (B, N, D) ->
    (B, heads, N, D / heads)."""
    cos, sin = frozen["cos"], frozen["sin"]  # (1, N, 1, D / heads), each pair's value twice
    sign = torch.tensor([-1.0, 1.0], device=sin.device).repeat(sin.shape[-1] // 2)
    y = _root_mean_square_norm(settings, x, frozen[name]).unflatten(2, (settings.heads, -1))
    swapped = y.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
    return (y * cos + swapped * (sin * sign)).to(x.dtype).transpose(1, 2)


def cross_attend(settings: Settings, frozen: Frozen, cross_query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    dtype = cross_query.dtype
    query = _root_mean_square_norm(settings, cross_query, frozen["attn2.norm_q.weight"]).to(dtype)
    key = _root_mean_square_norm(settings, key, frozen["attn2.norm_k.weight"]).to(dtype)
    attended, _ = settings.cross_kernel.forward(*(heads(settings, x) for x in (query, key, value)))
    return attended.transpose(1, 2).flatten(2)
