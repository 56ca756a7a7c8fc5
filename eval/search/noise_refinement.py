"""Refinement of the initial noise by the generator's own score (Proprio, section 3.3, appendix C, table 10).

    zeta = mean + exp(log_scale) * noise,  one mean and scale per channel                              eq. 12
    L    = S(z_0(zeta)) + kl_weight * 1/C sum_c (mean^2 + scale^2 - 1 - 2 log scale) / 2              eq. 13

Adam moves mean and log_scale through a few-step sampler and the score; generator, score noise and motion mask stay as
they are. What is returned is the iterate with the lowest S, without the KL term.

Every sampling step and every pass of the score is checkpointed: the backward pass holds the activations of one network
pass, whatever the number of steps, levels and draws. (To hold those of one block only, turn on the transformer's own
gradient checkpointing as well.) All weights are taken as they stand, an attached LoRA included, and must not be
switched in between. Clips of a batch do not influence each other: clipping is by each clip's own gradient norm.

Deviations. Algorithm 1 never looks at the result of its last update; here it is scored too, so k updates have k + 1
iterates, and no update is the plain sample. The mask is that of the first iterate (the text says only that it is
fixed). With Adam, which divides by the gradient's size, the printed clipping at 3e-4 changes a step only where gradient
norms cross it from one step to the next.

Shapes: B clips, C latent channels, F latent frames, H W latent rows and columns.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from eval.search.pruning import sampling_passes
from eval.search.residuals import ResidualConfig, flow_residual, noise_levels
from eval.search.scorers.proprio import MIXING
from losses.self_score import aggregate, hybrid, masked_error, motion_mask
from train.backbones.base import Backbone, Conditioning
from train.sampling import SamplerConfig, Stepper

CLIP = 3e-4  # largest gradient norm of a clip, over its 2 C parameters; table 10
KL_WEIGHT = 5e-3  # likewise
ANEW = {"use_reentrant": False, "preserve_rng_state": False}  # a pass draws nothing, so there is no state to keep


@dataclass
class RefineConfig(ResidualConfig):
    """Clips refined together, of several prompts, are `batch_size`; levels and draws are those of the score."""

    best: int = 0  # of a prompt's candidates so many, the best by chosen_by, are refined, and the first; 0: none
    steps: int = 4  # of the sampler that gradients pass through; the clip is then sampled with sampler.steps
    updates: int = 10  # Adam steps; table 10
    learning_rate: float = 2e-3

    def __post_init__(self) -> None:
        if self.updates < 0 or self.levels < 1 or self.draws < 1:
            raise ValueError(
                f"updates={self.updates}, levels={self.levels}, draws={self.draws}: use 0, 1 and 1 or more"
            )
        if not 0 < self.learning_rate < float("inf"):
            raise ValueError(f"learning_rate={self.learning_rate} must be a number above 0")

    def settings(self) -> dict[str, Any]:
        """What refined clips depend on, as plain JSON values."""
        fixed = {"clip": CLIP, "kl_weight": KL_WEIGHT, "score": "hybrid", "mixing": MIXING}
        return super().settings() | fixed | {"weighting": "inverse_variance"}


@dataclass(frozen=True)
class Refined:
    """The best iterate of each clip."""

    latents: Tensor  # (B,C,F,H,W) float32, without gradient
    noise: Tensor  # (B,C,F,H,W), the initial noise that gives them
    score: Tensor  # (B,), the lowest of the clip's trace
    trace: Tensor  # (updates + 1, B), the score of every iterate, the plain sample's first
    passes: int  # network passes of one clip: forward, without what a backward pass computes anew
    backward: int  # network passes of one clip, backward


class SelfScore:
    """Proprio's hybrid score of latents (B,C,F,H,W) of one conditioning, differentiable: (B,) float32, eqs. 4-11.

    mask (B,F,H,W) is fixed, and so is the noise: one draw for all clips, a function of level and draw. Frames
    that the image holds fixed do not count. Each level is served by the expert that samples there, without
    classifier-free guidance.
    """

    def __init__(self, backbone: Backbone, conditioning: Conditioning, mask: Tensor, config: RefineConfig):
        self.backbone, self.config = backbone, config
        self.conditioning = conditioning.to(backbone.device)
        self.mask = mask.to(backbone.device)
        self.times = noise_levels(config.levels, config.first, config.last, config.shift)

    def __call__(self, latents: Tensor) -> Tensor:
        config = self.config
        errors = [
            [checkpoint(self.errors, latents, level, draw, **ANEW) for draw in range(config.draws)]
            for level in range(config.levels)
        ]
        stacked = torch.stack([torch.stack(draws, dim=-1) for draws in errors], dim=-2)  # (2,B,levels,draws)
        return hybrid(*map(aggregate, stacked), mixing=MIXING)

    def errors(self, latents: Tensor, level: int, draw: int) -> Tensor:
        """The global and the masked squared error of one pass, (2,B)."""
        noise = self.noise(latents, level, draw)
        residual = flow_residual(self.backbone, latents, noise, self.times[level], self.conditioning)
        residual = self.conditioning.generated(residual)
        return torch.stack([masked_error(residual), masked_error(residual, self.conditioning.generated(self.mask))])

    def noise(self, latents: Tensor, level: int, draw: int) -> Tensor:
        """(B,C,F,H,W), equal for all B, from a CPU generator of its own."""
        generator = torch.Generator("cpu").manual_seed(level * self.config.draws + draw)
        return torch.randn(latents.shape[1:], generator=generator).to(latents.device).expand_as(latents)


def refine(
    backbone: Backbone,
    conditioning: Conditioning,
    noise: Tensor,
    sampler: SamplerConfig,
    config: RefineConfig,
    *,
    negative: Conditioning | None = None,
) -> Refined:
    """Refine the initial noise (B,C,F,H,W) of B clips, each with its own mean and scale per channel.

    Args: conditioning, of B clips, with an image for image-to-video. sampler: its steps are those that gradients pass
    through (the paper's 4). negative: the encoded negative prompt, needed where sampler.guidance is not 1.

    Returns the iterate of lowest score for each clip; ValueError for noise or settings that do not fit, and for a score
    that is not finite.
    """
    stepper = Stepper(backbone, conditioning, sampler, negative)
    stepper.start(noise)  # raises ValueError
    conditioning, noise = stepper.conditioning, noise.to(backbone.device, torch.float32)

    def take(latents: Tensor, step: int) -> Tensor:
        return stepper.after(latents, stepper.velocity(latents, step), step)

    def sample(noise: Tensor) -> Tensor:
        latents = stepper.start(noise)
        for step in range(sampler.steps):
            latents = checkpoint(take, latents, step, **ANEW)
        return latents

    mean, log_scale = (torch.zeros(noise.shape[:2], device=noise.device, requires_grad=True) for _ in range(2))
    optimizer = torch.optim.Adam([mean, log_scale], lr=config.learning_rate)
    trace: list[Tensor] = []
    best: tuple[Tensor, ...] = ()
    for update in range(config.updates + 1):
        last = update == config.updates
        with torch.set_grad_enabled(not last):
            zeta = _channels(mean) + _channels(log_scale.exp()) * noise
            latents = sample(zeta)
            if update == 0:
                score = SelfScore(backbone, conditioning, motion_mask(latents), config)
            value = score(latents)
            loss = (value + KL_WEIGHT * kl_to_standard_normal(mean, log_scale)).sum()
        if not value.isfinite().all():
            raise ValueError(f"the score gave {value.detach().tolist()}: it must give one number for each clip")
        trace.append(value.detach())
        iterate = tuple(tensor.detach().clone() for tensor in (latents, zeta, value))
        if best:  # clip by clip that of the lower score; the earlier where they are equal
            better = value < best[2]  # (B,)
            choices = (better.view(-1, 1, 1, 1, 1), better.view(-1, 1, 1, 1, 1), better)
            iterate = tuple(map(torch.where, choices, iterate, best))
        best = iterate
        if last:
            break
        gradients = torch.autograd.grad(loss, [mean, log_scale])
        norm = torch.cat(gradients, dim=1).norm(dim=1, keepdim=True)  # (B,1)
        factor = (CLIP / norm.clamp(min=torch.finfo(norm.dtype).tiny)).clamp(max=1)
        mean.grad, log_scale.grad = (gradient * factor for gradient in gradients)
        optimizer.step()
    one = sampling_passes(backbone, sampler) + config.levels * config.draws
    return Refined(*best, torch.stack(trace), passes=len(trace) * one, backward=config.updates * one)


def kl_to_standard_normal(mean: Tensor, log_scale: Tensor) -> Tensor:
    """KL divergence of N(mean, exp(log_scale)^2) from N(0, 1), averaged over channels: (B,C), (B,C) -> (B,); eq. 13.

    By hand: one channel, mean 1 and log_scale 0 give (1 + 1 - 1 - 0) / 2 = 0.5.
    """
    return 0.5 * (mean.square() + (2 * log_scale).exp() - 1 - 2 * log_scale).mean(dim=1)


def _channels(values: Tensor) -> Tensor:
    """(B,C) -> (B,C,1,1,1)."""
    return values[:, :, None, None, None]
