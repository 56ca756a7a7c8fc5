"""Refinement of the initial noise by the generator's own score (Proprio, section 3.3, appendix C, table 10).

    zeta = mean + exp(log_scale) * noise,  one mean and scale per channel                              eq. 12
    L    = S(z_0(zeta)) + kl_weight * 1/C sum_c (mean^2 + scale^2 - 1 - 2 log scale) / 2              eq. 13

Adam moves mean and log_scale through a few-step sampler and the score; the generator and the motion mask, that of the
first iterate, stay as they are. `gradient` says how:

    proprio         the paper's way, through all steps; levels and draws stay, so scores compare, and the iterate with
                    the lowest S (without the KL term) is returned. The last update's result is scored for that: k
                    updates have k + 1 iterates
    all             ours, as all that follow: each update has levels and draws of its own (fresh noise), so one of each
                    will do; the last iterate is returned, and neither sampled nor scored here
    last_2, last_1  through the last steps, with the velocities of the steps before as constants
    score           through the score alone: every velocity is a constant
    spsa            no backward pass: simultaneous perturbation (Spall 1992), a score on either side of the parameters,
                    g = (L(p + c d) - L(p - c d)) / 2c d, with d = +1 or -1 in each of the 2 C places, drawn anew

Every sampling step and every pass of the score but the last one, whose backward pass comes first, is checkpointed: the
activations of one network pass are held, whatever the number of steps, levels and draws. (To hold those of one block
only, turn on the transformer's own gradient checkpointing as well.) All weights are taken as they stand, an attached
LoRA included, and must not be switched in between. Clips of a batch do not influence each other: clipping is by each
clip's own gradient norm.

Levels count alike, without weights of their variance: the paper refines distilled generators, for which it leaves them
out (appendix A.4).

Deviations. Algorithm 1 never looks at the result of its last update; here it is scored, or returned. With Adam, which
divides by the gradient's size, the printed clipping at 3e-4 changes a step only where gradient norms cross it from one
step to the next.

Shapes: B clips, C latent channels, F latent frames, H W latent rows and columns.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from eval.search.residuals import ResidualConfig, flow_residual, noise_levels
from eval.search.scorers.proprio import MIXING
from losses.self_score import aggregate, hybrid, masked_error, motion_mask
from train.backbones.base import Backbone, Conditioning
from train.files import seed_of
from train.sampling import SamplerConfig, Stepper, sampling_passes

CLIP = 3e-4  # largest gradient norm of a clip, over its 2 C parameters; table 10
KL_WEIGHT = 5e-3  # likewise
WEIGHTING = "uniform"  # of the levels
# By `gradient`: how many sampling steps, the last ones, it passes through; None: all.
THROUGH = {"proprio": None, "all": None, "last_2": 2, "last_1": 1, "score": 0, "spsa": 0}
PERTURBATION = 0.05  # c of spsa
ANEW = {"use_reentrant": False, "preserve_rng_state": False}  # a pass draws nothing, so there is no state to keep


@dataclass
class RefineConfig(ResidualConfig):
    """Levels and draws are those of an update's score.

    The paper's settings (table 10) are the preset `proprio`; those here take a fifteenth of their passes; the folder's
    README says what both gain."""

    best: int = 0  # of a prompt's candidates so many, the best by chosen_by, are refined, and the first; 0: none
    steps: int = 4  # of the sampler that gradients pass through; the clip is then sampled with sampler.steps
    updates: int = 2  # Adam steps
    learning_rate: float = 0.05
    levels: int = 1
    draws: int = 1
    gradient: str = "all"  # proprio | all | last_2 | last_1 | score | spsa, see above

    def __post_init__(self) -> None:
        if self.updates < 0 or self.levels < 1 or self.draws < 1:
            raise ValueError(
                f"updates={self.updates}, levels={self.levels}, draws={self.draws}: use 0, 1 and 1 or more"
            )
        if not 0 < self.learning_rate < float("inf"):
            raise ValueError(f"learning_rate={self.learning_rate} must be a number above 0")
        if self.gradient not in THROUGH:
            raise ValueError(f"gradient={self.gradient!r} is unknown: use one of {', '.join(THROUGH)}")

    @property
    def fresh(self) -> bool:
        """Whether each update has noise of its own."""
        return self.gradient != "proprio"

    def settings(self) -> dict[str, Any]:
        """What refined clips depend on, as plain JSON values."""
        fixed = {"clip": CLIP, "kl_weight": KL_WEIGHT, "score": "hybrid", "mixing": MIXING}
        fixed |= {"perturbation": PERTURBATION} if self.gradient == "spsa" else {}
        return super().settings() | fixed | {"weighting": WEIGHTING}


@dataclass(frozen=True)
class Refined:
    """One iterate of each clip: that of the lowest score, or the last where noise is fresh."""

    latents: Tensor | None  # (B,C,F,H,W) float32, without gradient; None where that iterate has not been sampled
    noise: Tensor  # (B,C,F,H,W), the initial noise that gives them
    # (iterates scored, B), the plain sample's first; comparable among each other without fresh noise only.
    trace: Tensor
    passes: int  # network passes of one clip: forward, without what a backward pass computes anew
    backward: int  # network passes of one clip, backward


class SelfScore:
    """Proprio's hybrid score of latents (B,C,F,H,W) of one conditioning, differentiable: (B,) float32, eqs. 4-11.

    mask (B,F,H,W) is fixed. The noise is one draw for all clips, a function of level and draw, and of `update` where
    it is fresh: then each level lies anywhere in its share of first to last. Frames that the image holds fixed do not
    count. Each level is served by the expert that samples there, without classifier-free guidance.
    """

    def __init__(self, backbone: Backbone, conditioning: Conditioning, mask: Tensor, config: RefineConfig):
        self.backbone, self.config = backbone, config
        self.conditioning = conditioning.to(backbone.device)
        self.mask = mask.to(backbone.device)
        self.times = noise_levels(config.levels, config.first, config.last, config.shift)

    def __call__(self, latents: Tensor, update: int = 0) -> Tensor:
        config = self.config
        *others, last = itertools.product(range(config.levels), range(config.draws))
        errors = [checkpoint(self.errors, latents, *one, update, **ANEW) for one in others]
        errors = torch.stack([*errors, self.errors(latents, *last, update)], dim=-1)  # (2,B,levels*draws)
        stacked = errors.unflatten(-1, (config.levels, config.draws))
        return hybrid(*(aggregate(part, weighting=WEIGHTING) for part in stacked), mixing=MIXING)

    def errors(self, latents: Tensor, level: int, draw: int, update: int = 0) -> Tensor:
        """The global and the masked squared error of one pass, (2,B)."""
        noise, t = self.noise(latents, level, draw, update), self.time(level, update)
        residual = self.conditioning.generated(flow_residual(self.backbone, latents, noise, t, self.conditioning))
        return torch.stack([masked_error(residual), masked_error(residual, self.conditioning.generated(self.mask))])

    def time(self, level: int, update: int) -> float:
        """The level's t: without fresh noise one of `noise_levels`."""
        config = self.config
        if not config.fresh:
            return self.times[level]
        generator = torch.Generator("cpu").manual_seed(seed_of("refinement level", update, level))
        share = (level + torch.rand((), generator=generator).item()) / config.levels
        share = config.first + share * (config.last - config.first)
        return noise_levels(1, share, share, config.shift)[0]

    def noise(self, latents: Tensor, level: int, draw: int, update: int) -> Tensor:
        """(B,C,F,H,W), equal for all B, from a CPU generator of its own."""
        number = level * self.config.draws + draw
        seed = seed_of("refinement noise", update, number) if self.config.fresh else number
        generator = torch.Generator("cpu").manual_seed(seed)
        return torch.randn(latents.shape[1:], generator=generator).to(latents.device).expand_as(latents)


class Objective:
    """L of eq. 13 by the parameters, with the network passes of one clip that it has cost so far."""

    def __init__(self, stepper: Stepper, noise: Tensor, sampler: SamplerConfig, config: RefineConfig):
        self.stepper, self.noise, self.sampler, self.config = stepper, noise, sampler, config
        self.score: SelfScore | None = None  # from the first iterate on, whose mask it has
        self.passes = self.backward = 0

    def zeta(self, parameters: Tensor) -> Tensor:
        """The initial noise (B,C,F,H,W) of mean and log_scale, (2,B,C); eq. 12."""
        mean, log_scale = parameters[..., None, None, None]
        return mean + log_scale.exp() * self.noise

    def sample(self, parameters: Tensor) -> Tensor:
        """z_0, (B,C,F,H,W): differentiable through the last steps of `gradient`, with the other velocities as given."""
        steps, through = self.sampler.steps, THROUGH[self.config.gradient]
        constant = 0 if through is None else max(0, steps - through)  # so many steps
        if not torch.is_grad_enabled():
            constant = steps
        latents = self.stepper.start(self.zeta(parameters))
        for step in range(steps):
            if step < constant:
                with torch.no_grad():
                    velocity = self.stepper.velocity(latents, step)
            else:
                velocity = checkpoint(self.stepper.velocity, latents, step, **ANEW)
            latents = self.stepper.after(latents, velocity, step)
        self.passes += sampling_passes(self.stepper.backbone, self.sampler)
        self.backward += sampling_passes(self.stepper.backbone, self.sampler, constant)
        if self.score is None:
            mask = motion_mask(latents)
            self.score = SelfScore(self.stepper.backbone, self.stepper.conditioning, mask, self.config)
        return latents

    def value(self, latents: Tensor, update: int) -> Tensor:
        """S of the latents under the update's noise, (B,); ValueError for a score that is not finite."""
        value, passes = self.score(latents, update), self.config.levels * self.config.draws
        if not value.isfinite().all():
            raise ValueError(f"the score gave {value.detach().tolist()}: it must give one number for each clip")
        self.passes += passes
        self.backward += passes if torch.is_grad_enabled() else 0
        return value

    @torch.enable_grad()
    def gradient(self, parameters: Tensor, value: Tensor) -> Tensor:
        """Of L by the parameters, (2,B,C), where S is `value`."""
        loss = (value + KL_WEIGHT * kl_to_standard_normal(*parameters)).sum()
        return torch.autograd.grad(loss, parameters)[0]

    @torch.no_grad()
    def spsa(self, parameters: Tensor, update: int) -> tuple[Tensor, Tensor]:
        """The gradient (2,B,C) from two scores on either side, without a backward pass, and their mean (B,)."""
        if self.score is None:
            self.sample(parameters)  # for its mask
        generator = torch.Generator("cpu").manual_seed(seed_of("refinement direction", update))
        signs = 2 * torch.randint(2, (2, 1, parameters.shape[2]), generator=generator) - 1
        direction = signs.to(parameters)  # of every clip
        ends = [parameters + side * PERTURBATION * direction for side in (1, -1)]
        values = [self.value(self.sample(end), update) for end in ends]
        losses = [value + KL_WEIGHT * kl_to_standard_normal(*end) for value, end in zip(values, ends, strict=True)]
        slope = (losses[0] - losses[1]) / (2 * PERTURBATION)  # (B,)
        return slope[:, None] * direction, (values[0] + values[1]) / 2


def refine(
    backbone: Backbone,
    conditioning: Conditioning,
    noise: Tensor,
    sampler: SamplerConfig,
    config: RefineConfig,
    *,
    negative: Conditioning | None = None,
    seeds: Sequence[int] | None = None,
) -> Refined:
    """Refine the initial noise (B,C,F,H,W) of B clips, each with its own mean and scale per channel.

    Args: conditioning, of B clips, with an image for image-to-video. sampler: its steps are those that gradients pass
    through (the paper's 4). negative: the encoded negative prompt, needed where sampler.guidance is not 1. seeds: B, of
    the noise that the solver rcm draws; it stays as it is.

    ValueError for noise or settings that do not fit, and for a score that is not finite.
    """
    stepper = Stepper(backbone, conditioning, sampler, negative, seeds=seeds)
    stepper.start(noise)  # raises ValueError
    noise = noise.to(backbone.device, torch.float32)
    objective = Objective(stepper, noise, sampler, config)
    parameters = torch.zeros(2, *noise.shape[:2], device=noise.device, requires_grad=True)  # mean, log_scale: (2,B,C)
    optimizer = torch.optim.Adam([parameters], lr=config.learning_rate)
    trace: list[Tensor] = []
    best: tuple[Tensor, ...] = ()
    for update in range(config.updates + (not config.fresh)):
        last = update == config.updates
        if config.gradient == "spsa":
            gradient, value = objective.spsa(parameters, update)
        else:
            with torch.set_grad_enabled(not last):
                latents = objective.sample(parameters)
                value = objective.value(latents, update)
            if not config.fresh:
                zeta = objective.zeta(parameters)
                best = lower(best, tuple(tensor.detach().clone() for tensor in (latents, zeta, value)))
            gradient = None if last else objective.gradient(parameters, value)
        trace.append(value.detach())
        if not last:
            norm = gradient.norm(dim=(0, 2), keepdim=True)  # (1,B,1)
            parameters.grad = gradient * (CLIP / norm.clamp(min=torch.finfo(norm.dtype).tiny)).clamp(max=1)
            optimizer.step()
    latents, zeta = best[:2] if best else (None, objective.zeta(parameters).detach())
    scores = torch.stack(trace) if trace else noise.new_empty(0, len(noise))
    return Refined(latents, zeta, scores, objective.passes, objective.backward)


def lower(best: tuple[Tensor, ...], iterate: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Latents, noise and score (B,), clip by clip those of the lower score; the earlier where they are equal."""
    if not best:
        return iterate
    better = iterate[2] < best[2]
    choices = (better.view(-1, 1, 1, 1, 1), better.view(-1, 1, 1, 1, 1), better)
    return tuple(map(torch.where, choices, iterate, best))


def kl_to_standard_normal(mean: Tensor, log_scale: Tensor) -> Tensor:
    """KL divergence of N(mean, exp(log_scale)^2) from N(0, 1), averaged over channels: (B,C), (B,C) -> (B,); eq. 13.

    By hand: one channel, mean 1 and log_scale 0 give (1 + 1 - 1 - 0) / 2 = 0.5.
    """
    return 0.5 * (mean.square() + (2 * log_scale).exp() - 1 - 2 * log_scale).mean(dim=1)
