"""Matrix products in 8 bits: e4m3 operands, scaled per row, for a linear layer's frozen weight.

Rows are the input's tokens and the weight's output channels (`train.backbones.quantize`); the product is accumulated in
the matrix unit and scaled back. Nothing is stored: a weight is quantised where it is used, which costs its bytes once
and no memory, and works on weights that ZeRO-3 gathers. A product of random rows is off by about 4 %.
"""

import torch
from torch import Tensor

from train.backbones.quantize import quantize


def check(device: torch.device) -> None:
    """ValueError for a GPU without 8-bit products (older than Ada and Hopper)."""
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 9):
        name = torch.cuda.get_device_name(device)
        raise ValueError(
            f"train.float8=true needs a GPU of compute capability 8.9 or more, not {name}: set it to false"
        )


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x (..., K) times the transpose of weight (N, K), in x's dtype. K and N must be multiples of 16 on a GPU."""
    left, left_scale = quantize(x.flatten(0, -2))
    right, right_scale = quantize(weight)
    if x.device.type == "cuda":
        y = torch._scaled_mm(left, right.t(), left_scale, right_scale.t(), out_dtype=x.dtype, use_fast_accum=True)
    else:
        y = ((left.float() @ right.float().t()) * left_scale * right_scale.t()).to(x.dtype)
    return y.unflatten(0, x.shape[:-1])
