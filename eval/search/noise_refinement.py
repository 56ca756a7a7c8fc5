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

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from eval.search.residuals import noise_levels
from losses.flow_matching import interpolate, velocity_target
from losses.self_score import WEIGHTINGS, aggregate, hybrid, masked_error, motion_mask
from train.backbones.base import Backbone, Conditioning
from train.sampling import SamplerConfig, Stepper, sampling_passes

VARIANTS = ("global", "motion", "hybrid")
ANEW = {"use_reentrant": False, "preserve_rng_state": False}  # a pass draws nothing, so there is no state to keep

Score = Callable[[Tensor], Tensor]  # latents (B,C,F,H,W) -> (B,), differentiable, lower is better


@dataclass
class ProprioRefineConfig:
    updates: int = 10  # Adam steps; table 10
    learning_rate: float = 2e-3
    clip: float = 3e-4  # largest gradient norm of a clip, over its 2 C parameters
    kl_weight: float = 5e-3
    score: str = "hybrid"  # global | motion | hybrid
    levels: int = 4  # noise levels of the score, evenly spaced from first to last; appendix E
    first: float = 0.3  # share of the sampling steps before a level, see eval.search.residuals
    last: float = 0.6
    shift: float = 3.0  # of the grid of these steps; in a recipe sampler.shift
    draws: int = 4  # of noise, at each level
    weighting: str = "inverse_variance"  # inverse_variance | uniform (distilled generators)
    seed: int = 0  # of the score's noise

    def __post_init__(self) -> None:
        if self.updates < 0 or self.levels < 1 or self.draws < 1:
            raise ValueError(
                f"updates={self.updates}, levels={self.levels}, draws={self.draws}: use 0, 1 and 1 or more"
            )
        for name in ("learning_rate", "clip"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"{name}={getattr(self, name)} must be a number above 0")
        if not self.kl_weight >= 0:
            raise ValueError(f"kl_weight={self.kl_weight} must be 0 or more")
        for name, known in (("score", VARIANTS), ("weighting", WEIGHTINGS)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name}={getattr(self, name)!r} is unknown: use one of {', '.join(known)}")


@dataclass(frozen=True)
class Refined:
    """The best iterate of each clip."""

    latents: Tensor  # (B,C,F,H,W) float32, without gradient
    noise: Tensor  # (B,C,F,H,W), the initial noise that gives them
    score: Tensor  # (B,), the lowest of the clip's trace
    trace: Tensor  # (updates + 1, B), the score of every iterate, the plain sample's first
    mean: Tensor  # (B,C)
    log_scale: Tensor  # (B,C)
    passes: int  # network passes of one clip: forward, without what a backward pass computes anew
    backward: int  # network passes of one clip, backward
    seconds: float


class SelfScore:
    """Proprio's score of latents (B,C,F,H,W) of one conditioning, differentiable: (B,) float32, eqs. 4-11.

    mask (B,F,H,W) is fixed, and so is the noise: one draw for all clips, a function of seed, level and draw. Frames
    that the image holds fixed do not count. Each level is served by the expert that samples there, without
    classifier-free guidance.
    """

    def __init__(self, backbone: Backbone, conditioning: Conditioning, mask: Tensor, config: ProprioRefineConfig):
        self.backbone, self.config = backbone, config
        self.conditioning = conditioning.to(backbone.device)
        self.mask = mask.to(backbone.device)
        self.times = noise_levels(config.levels, config.first, config.last, config.shift)

    @property
    def passes(self) -> int:
        """Network passes of one clip's score."""
        return self.config.levels * self.config.draws

    def __call__(self, latents: Tensor) -> Tensor:
        config = self.config
        errors = [
            [checkpoint(self.errors, latents, level, draw, **ANEW) for draw in range(config.draws)]
            for level in range(config.levels)
        ]
        stacked = torch.stack([torch.stack(draws, dim=-1) for draws in errors], dim=-2)  # (2,B,levels,draws)
        whole, motion = (aggregate(part, weighting=config.weighting) for part in stacked)
        if config.score == "hybrid":
            return hybrid(whole, motion)
        return whole if config.score == "global" else motion

    def errors(self, latents: Tensor, level: int, draw: int) -> Tensor:
        """The global and the masked squared error of one pass, (2,B)."""
        t, noise = self.times[level], self.noise(latents, level, draw)
        noisy = interpolate(latents, noise, torch.full((len(latents),), t, device=latents.device))
        noisy = self.backbone.start(noisy, self.conditioning)
        velocity = self.backbone.velocity_at(noisy, t, self.conditioning)
        residual = self.conditioning.generated(velocity - velocity_target(latents, noise))
        return torch.stack([masked_error(residual), masked_error(residual, self.conditioning.generated(self.mask))])

    def noise(self, latents: Tensor, level: int, draw: int) -> Tensor:
        """(B,C,F,H,W), equal for all B, from a CPU generator of its own."""
        number = level * self.config.draws + draw
        generator = torch.Generator("cpu").manual_seed(self.config.seed * 1_000_003 + number)
        return torch.randn(latents.shape[1:], generator=generator).to(latents.device).expand_as(latents)


def refine(
    backbone: Backbone,
    conditioning: Conditioning,
    noise: Tensor,
    sampler: SamplerConfig,
    config: ProprioRefineConfig,
    *,
    score: Score | None = None,
    negative: Conditioning | None = None,
) -> Refined:
    """Refine the initial noise (B,C,F,H,W) of B clips, each with its own mean and scale per channel.

    Args: conditioning, of B clips, with an image for image-to-video. sampler: its steps are those that gradients pass
    through (the paper's 4). score: instead of `SelfScore` with the motion mask of the first iterate. negative: the
    encoded negative prompt, needed where sampler.guidance is not 1.

    Returns the iterate of lowest score for each clip; ValueError for noise or settings that do not fit, and for a score
    that is not one finite number per clip.
    """
    started = time.perf_counter()
    stepper = Stepper(backbone, conditioning, sampler, negative)
    stepper.start(noise)  # raises ValueError
    conditioning, noise = stepper.conditioning, noise.to(backbone.device, torch.float32)

    def sample(noise: Tensor) -> Tensor:
        latents = stepper.start(noise)
        for step in range(sampler.steps):
            velocity = checkpoint(stepper.velocity, latents, step, **ANEW)
            latents = stepper.after(latents, velocity, step)
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
            if score is None:
                score = SelfScore(backbone, conditioning, motion_mask(latents), config)
            value = score(latents)
            loss = (value + config.kl_weight * kl_to_standard_normal(mean, log_scale)).sum()
        _check_score(value, len(noise))
        trace.append(value.detach())
        iterate = tuple(tensor.detach().clone() for tensor in (latents, zeta, value, mean, log_scale))
        best = iterate if not best else _lower(iterate, best)
        if last:
            break
        gradients = torch.autograd.grad(loss, [mean, log_scale])
        norm = torch.cat(gradients, dim=1).norm(dim=1, keepdim=True)  # (B,1)
        factor = (config.clip / norm.clamp(min=torch.finfo(norm.dtype).tiny)).clamp(max=1)
        mean.grad, log_scale.grad = (gradient * factor for gradient in gradients)
        optimizer.step()
    one = sampling_passes(backbone, sampler) + getattr(score, "passes", 0)
    seconds = time.perf_counter() - started
    passes = {"passes": len(trace) * one, "backward": config.updates * one}
    return Refined(*best[:3], torch.stack(trace), *best[3:], **passes, seconds=seconds)


def kl_to_standard_normal(mean: Tensor, log_scale: Tensor) -> Tensor:
    """KL divergence of N(mean, exp(log_scale)^2) from N(0, 1), averaged over channels: (B,C), (B,C) -> (B,); eq. 13.

    By hand: one channel, mean 1 and log_scale 0 give (1 + 1 - 1 - 0) / 2 = 0.5.
    """
    return 0.5 * (mean.square() + (2 * log_scale).exp() - 1 - 2 * log_scale).mean(dim=1)


def _channels(values: Tensor) -> Tensor:
    """(B,C) -> (B,C,1,1,1)."""
    return values[:, :, None, None, None]


def _check_score(value: Tensor, batch: int) -> None:
    if value.shape != (batch,) or not value.isfinite().all():
        raise ValueError(f"the score gave {value.detach().tolist()} for {batch} clips: it must give one number each")


def _lower(iterate: tuple[Tensor, ...], best: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Clip by clip that of the two whose score, the third, is lower; the earlier where they are equal."""
    better = iterate[2] < best[2]  # (B,)
    return tuple(
        torch.where(better.view(-1, *[1] * (new.dim() - 1)), new, old) for new, old in zip(iterate, best, strict=True)
    )
