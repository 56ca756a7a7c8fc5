"""Rectified-flow interpolation and its velocity error (PhyGDPO, arXiv 2512.24551, eqs. 10 and 12).

Time t lies in [0, 1] and 1 is noise:

    x_t = (1 - t) x_0 + t x_1,      x_1 ~ N(0, I),      u* = x_1 - x_0,      l(t) = mean |v(x_t, t) - u*|^2

Shapes: B batch, C latent channels, F latent frames, H latent rows, W latent columns.
"""

import math

import torch
from torch import Tensor


def interpolate(clean: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """x_t of eq. 10. `clean` and `noise` (B,C,F,H,W), `t` (B,) in [0, 1]; returns (B,C,F,H,W) float32."""
    t = t.float().view(-1, *[1] * (clean.dim() - 1))  # (B,1,1,1,1)
    return (1 - t) * clean.float() + t * noise.float()


def velocity_target(clean: Tensor, noise: Tensor) -> Tensor:
    """The oracle velocity u* = x_1 - x_0, (B,C,F,H,W) float32."""
    return noise.float() - clean.float()


def flow_error(velocity: Tensor, clean: Tensor, noise: Tensor) -> Tensor:
    """Squared velocity error l of eq. 12, one value per sample: (B,) float32, in squared latent units.

    Deviation: the paper writes the squared norm, a SUM over the latent; this is the MEAN, so that one `beta` serves
    every resolution and clip length (a sum is this value times C F H W).

    By hand: velocity = (1, 3), clean = (0, 0), noise = (1, 1): target (1, 1), errors (0, 4), mean 2.
    """
    return (velocity.float() - velocity_target(clean, noise)).square().flatten(1).mean(1)


def bell_weight(t: Tensor, *, shift: float) -> Tensor:
    """Weight of a flow error at time t in the authors' released code: float32 of t's shape, 0 at t = 1.

        w(t) = (b(t) - b(1)) / mean over the grid of (b - b(1)),        b(t) = exp(-2 (t - 1/2)^2)

    The grid is the release's 1,000 training times: shift u / (1 + (shift - 1) u) for u = 1, 0.999 ... 0.001. So the
    weight is 1 on average where t is drawn from it (the paper has no weight).

    By hand, shift 5: the mean of b - b(1) is 0.189496, so w(.5) = (1 - 0.606531) / 0.189496 = 2.0764.
    """

    def bell(t: Tensor) -> Tensor:
        return torch.exp(-2 * (t.double() - 0.5).square()) - math.exp(-0.5)

    u = torch.arange(1, 1001, dtype=torch.float64) / 1000
    return (bell(t) / bell(shift * u / (1 + (shift - 1) * u)).mean().item()).float()
