"""Guidance by a reward on the clip that a sampling step points at (WMReward, arXiv 2601.10553).

At time t the line of the velocity points at the clean latents z_0 = x_t - t v(x_t). They are decoded, a reward looks at
the frames, and its gradient, back through the decoder, moves the latents after the step:

    x <- x + (t' - t) v  +  scale * |x| * g / |g|,      g = d reward(decode(z_0)) / d x_t

Norms are over a clip's generated latents, so a guided step moves a clip by the share `scale` of its length at any
resolution, noise level and reward. The summary of the paper prints neither the normalisation nor the window; both are
ours. 0.005 every 5 steps is what Proprio (section 4) reports as recommended; at these the paper's authors and
Proprio's table 3 find little gain from guidance alone.

One clip at a time (or `batch_size`) goes through the decoder and the reward, and their activations are gone before the
gradient goes on through the network. A reward is differentiable, higher is better: a surprise is negated.

Shapes: B clips, C latent channels, F latent frames, H W latent rows and columns, T video frames.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from train.backbones.base import Backbone, Conditioning
from train.sampling import SamplerConfig, Stepper, sampling_passes

Reward = Callable[[Tensor], Tensor]  # frames (B,3,T,height,width) float in [-1, 1] -> (B,), higher is better


@dataclass
class GuidanceConfig:
    scale: float = 0.005  # length of a guided move as a share of the latents' length; 0: plain sampling
    every: int = 5  # sampling steps from one guided step to the next, the first included
    t_min: float = 0.0  # guided steps begin at a time in [t_min, t_max]; 1 is noise
    t_max: float = 1.0
    through_network: bool = True  # false: the velocity counts as a constant, which spares the network's backward pass

    def __post_init__(self) -> None:
        if not 0 <= self.scale < float("inf"):
            raise ValueError(f"scale={self.scale} must be 0 or more: a reward to be lowered is negated by the caller")
        if self.every < 1:
            raise ValueError(f"every={self.every}: guide every 1 or more steps")
        if not 0 <= self.t_min <= self.t_max <= 1:
            raise ValueError(f"t_min={self.t_min} and t_max={self.t_max} must lie in [0, 1], in this order")


@dataclass(frozen=True)
class Guided:
    latents: Tensor  # (B,C,F,H,W) float32
    steps: list[int]  # numbers of the guided steps
    rewards: Tensor  # (len(steps), B), of the clips that those steps pointed at, before they were moved
    passes: int  # network passes of one clip, forward
    backward: int  # network passes of one clip, backward


def sample_guided(
    backbone: Backbone,
    conditioning: Conditioning,
    noise: Tensor,
    sampler: SamplerConfig,
    reward: Reward,
    config: GuidanceConfig,
    *,
    negative: Conditioning | None = None,
    batch_size: int = 1,
) -> Guided:
    """Sample from initial noise (B,C,F,H,W) with guidance; with scale 0 the clip of plain sampling, bit for bit.

    conditioning: of B clips. negative: the encoded negative prompt, needed where sampler.guidance is not 1. batch_size:
    clips that are decoded and rewarded at once. ValueError for noise that does not fit, a backbone without VAE, and a
    reward that is not one finite number per clip.
    """
    stepper = Stepper(backbone, conditioning, sampler, negative)
    guided = guided_steps(stepper.times, config)
    held = conditioning.held_frames(noise.shape[2])
    rewards: list[Tensor] = []
    with torch.no_grad():
        latents = stepper.start(noise)
    for step in range(sampler.steps):
        if step not in guided:
            with torch.no_grad():
                latents = stepper.after(latents, stepper.velocity(latents, step), step)
            continue
        with torch.set_grad_enabled(config.through_network):
            latents = latents.detach().requires_grad_(config.through_network)  # not the caller's own tensor
            velocity = stepper.velocity(latents, step)
            clean = stepper.clean(latents, velocity, step)
        values, gradient = reward_gradient(backbone, clean.detach(), reward, batch_size)
        if config.through_network:
            (gradient,) = torch.autograd.grad(clean, latents, gradient)
        latents, velocity = latents.detach(), velocity.detach()
        move = config.scale * normalised_move(latents, gradient, held)
        latents = stepper.after(latents, velocity, step, move=move)
        rewards.append(values)
    through = guided if config.through_network else []
    backward = sum(sampling_passes(backbone, sampler, step, step + 1) for step in through)
    rewarded = torch.stack(rewards) if rewards else torch.empty(0, len(noise))
    return Guided(latents, guided, rewarded, sampling_passes(backbone, sampler), backward)


def guided_steps(sigmas: Tensor, config: GuidanceConfig) -> list[int]:
    """Numbers of the steps that are guided: every `every`-th from the first, of those that begin in the window."""
    if config.scale == 0:
        return []
    steps = range(0, len(sigmas) - 1, config.every)
    return [step for step in steps if config.t_min <= float(sigmas[step]) <= config.t_max]


def reward_gradient(backbone: Backbone, clean: Tensor, reward: Reward, batch_size: int = 1) -> tuple[Tensor, Tensor]:
    """Rewards (B,) of clean latents (B,C,F,H,W) and their gradients (B,C,F,H,W), `batch_size` clips at a time."""
    values, gradients = [], []
    for clips in clean.split(batch_size):
        clips = clips.detach().requires_grad_()
        with torch.enable_grad():
            value = reward(backbone.decode_latents(clips, batch_size=batch_size))
        if value.shape != (len(clips),) or not value.isfinite().all():
            given = value.detach().tolist()
            raise ValueError(f"the reward gave {given} for {len(clips)} clips: it must give one number each")
        (gradient,) = torch.autograd.grad(value, clips, torch.ones_like(value))
        values.append(value.detach())
        gradients.append(gradient)
    return torch.cat(values), torch.cat(gradients)


def normalised_move(latents: Tensor, gradient: Tensor, held: int) -> Tensor:
    """`gradient` scaled to the length of `latents`, clip by clip, (B,C,F,H,W) both; the first `held` frames stay.

    A clip whose gradient is 0 stays where it is. By hand: latents (3, 4), gradient (0, 2): (0, 5).
    """
    free = gradient.float().clone()
    free[:, :, :held] = 0
    length = latents[:, :, held:].flatten(1).norm(dim=1)
    size = free.flatten(1).norm(dim=1).clamp(min=torch.finfo(torch.float32).tiny)
    return free / size.view(-1, 1, 1, 1, 1) * length.view(-1, 1, 1, 1, 1)
