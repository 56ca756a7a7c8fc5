"""Matrices in 8 bits: e4m3 numbers, which have 3 bits of mantissa, and a float32 scale for each row.

Every row is divided by its largest magnitude over 448, e4m3's largest number. A number keeps its value within 1/16, or
within 1/450,000 of its row's largest where it is smaller than that.
"""

import torch
from torch import Tensor

LARGEST = 448.0  # of torch.float8_e4m3fn


def quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    """(M, K) -> e4m3 (M, K) and float32 scales (M, 1); x is about their product."""
    scale = x.abs().amax(-1, keepdim=True).float().clamp(min=1e-12) / LARGEST
    return (x / scale).to(torch.float8_e4m3fn).contiguous(), scale  # both operands of a product must be row-major


def restore(codes: Tensor, scale: Tensor, to: Tensor) -> None:
    """Write what `quantize` gave, multiplied, to (M, K) of any dtype."""
    to.copy_(codes).mul_(scale)


def round_matrix(weight: Tensor) -> None:
    """Give a matrix the numbers that it has after `quantize` and `restore`."""
    restore(*quantize(weight), weight)
