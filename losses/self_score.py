"""A generator's own opinion of a clip (Proprio, sections 3.1-3.2, eqs. 4-11, and appendix D's motion mask).

A clip z_0 is noised again, the generator predicts the velocity, and its error is the score: low where the clip is
something that the generator knows how to explain.

    r   = v(z_t, t) - (noise - z_0)                                                    eq. 4
    e   = |r|^2, in the motion mask M only: sum_u M_u |r_u|^2 / (sum_u M_u + delta)    eqs. 5-6
    mu_k, v_k = mean and variance of e over the draws at noise level k                 eqs. 7-8
    S   = sum_k mu_k w_k,   w_k proportional to 1 / (v_k + eps)                        eqs. 9-10
    S   = mixing S_global + (1 - mixing) S_motion                                      eq. 11

Shapes: B clips, C latent channels, F latent frames, H W latent rows and columns. Everything is float32 inside. Low is
good everywhere. An empty or frozen clip is easy to explain: report these scores beside a motion baseline.
"""

import torch
from torch import Tensor

DELTA = 1e-6  # of eq. 6, which does not print it
WEIGHTINGS = ("inverse_variance", "uniform")


def motion_mask(latents: Tensor) -> Tensor:
    """Where a clip changes: latents (B,C,F,H,W) -> (B,F,H,W) float32 in [0, 1], without gradient.

    Mean over channels of the absolute difference to the frame before (the first frame takes the second's), divided by
    the clip's largest. A clip that stands still, or of one frame, gives 0 everywhere. Appendix D leaves the operator
    and the normalisation open (eq. 14).

    By hand: one channel, one cell, frames 1, 3, 4: differences 2, 2, 1, mask 1, 1, 0.5.
    """
    latents = latents.detach().float()
    if latents.shape[2] == 1:
        return torch.zeros_like(latents[:, 0])
    change = latents.diff(dim=2).abs().mean(dim=1)  # (B,F-1,H,W)
    change = torch.cat([change[:, :1], change], dim=1)
    largest = change.amax(dim=(1, 2, 3), keepdim=True)
    return torch.where(largest > 0, change / largest.clamp(min=torch.finfo(torch.float32).tiny), 0.0)


def masked_error(residual: Tensor, mask: Tensor | None = None) -> Tensor:
    """Squared residual (B,C,F,H,W), averaged over channels, then over cells by the weights `mask` (B,F,H,W): (B,).

    Deviation: eqs. 5-6 sum over channels (and eq. 5 over cells); a mean keeps one scale with
    `losses.flow_matching.flow_error`, which it equals without a mask. An empty mask gives 0.

    By hand: one channel, cells with residuals 1 and 3: 5 without a mask; with mask (1, 0.5) it is
    (1 + 4.5) / 1.5 = 3.666667, up to DELTA.
    """
    squared = residual.float().square().mean(dim=1)  # (B,F,H,W)
    if mask is None:
        return squared.flatten(1).mean(dim=1)
    mask = mask.float()
    return (mask * squared).flatten(1).sum(dim=1) / (mask.flatten(1).sum(dim=1) + DELTA)


def aggregate(errors: Tensor, *, weighting: str = "inverse_variance", eps: float = 1e-8) -> Tensor:
    """One score per clip from errors (B, levels, draws): (B,) float32.

    weighting: "inverse_variance" trusts the noise levels whose draws agree (biased variance, as in eq. 8); "uniform"
    is for distilled generators. With one draw a level all variances are 0, and both are the same. ValueError for
    another weighting. The weights are constants to a gradient, which the paper leaves open: through them the score
    could fall where an error rises (below, the first error's gradient would be 0.4 - 0.64).

    By hand: level 1 with errors 1 and 3 (mean 2, variance 1), level 2 with 4 and 8 (mean 6, variance 4): weights 0.8
    and 0.2, score 2.8; uniform 4.
    """
    errors = errors.float()
    mean = errors.mean(dim=2)  # (B,levels)
    if weighting == "uniform":
        return mean.mean(dim=1)
    if weighting != "inverse_variance":
        raise ValueError(f"weighting={weighting!r} is unknown: choose one of {', '.join(WEIGHTINGS)}")
    weight = 1 / (errors.detach().var(dim=2, correction=0) + eps)
    return (mean * weight).sum(dim=1) / weight.sum(dim=1)


def hybrid(global_score: Tensor, motion_score: Tensor, *, mixing: float = 0.2) -> Tensor:
    """mixing * global_score + (1 - mixing) * motion_score, eq. 11: float32 of the inputs' shape.

    By hand: 1 and 2 with mixing 0.2 give 1.8.
    """
    return mixing * global_score.float() + (1 - mixing) * motion_score.float()
