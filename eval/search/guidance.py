"""Guidance by a reward on the clip that a sampling step points at (WMReward, arXiv 2601.10553).

At time t the line of the velocity points at the clean latents z_0 = x_t - t v(x_t). They are decoded, a reward looks at
the frames, and its gradient, back through the decoder, moves the latents after the step:

    x <- x + (t' - t) v  +  scale * |x| * g / |g|,      g = d reward(decode(z_0)) / d x_t

Norms are over a clip's generated latents, so a guided step moves a clip by the share `scale` of its length at any
resolution, noise level and reward. The summary of the paper prints neither the normalisation nor the window; both are
ours. 0.005 every 5 steps is what Proprio (section 4) reports as recommended; at these the paper's authors and
Proprio's table 3 find little gain from guidance alone.

The clips of a batch go through the decoder and the reward together, and their activations are gone before the gradient
goes on through the network. A reward is differentiable, higher is better: a surprise is negated.

Shapes: B clips, C latent channels, F latent frames, H W latent rows and columns, T video frames.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from train.backbones.base import Backbone, Conditioning
from train.sampling import SamplerConfig, Stepper, sampling_passes

Reward = Callable[[Tensor], Tensor]  # frames (B,3,T,height,width) float in [-1, 1] -> (B,), higher is better


@dataclass
class GuideConfig:
    scale: float = 0.005  # length of a guided move as a share of the latents' length; 0: plain sampling
    every: int = 5  # sampling steps from one guided step to the next, the first included
    candidates: int = 0  # of a prompt's candidates so many, the first, are made with guidance as well; 0: none

    def __post_init__(self) -> None:
        if not 0 <= self.scale < float("inf"):
            raise ValueError(f"scale={self.scale} must be 0 or more: a reward to be lowered is negated by the caller")
        if self.every < 1:
            raise ValueError(f"every={self.every}: guide every 1 or more steps")

    def settings(self) -> dict[str, Any]:
        """What guided clips depend on, as plain JSON values; the window and the way are fixed."""
        return asdict(self) | {"t_min": 0.0, "t_max": 1.0, "through_network": True}


def sample_guided(
    backbone: Backbone,
    conditioning: Conditioning,
    noise: Tensor,
    sampler: SamplerConfig,
    reward: Reward,
    config: GuideConfig,
    *,
    negative: Conditioning | None = None,
    seeds: Sequence[int] | None = None,
) -> tuple[Tensor, int]:
    """Sample from initial noise (B,C,F,H,W) with guidance; with scale 0 the clip of plain sampling, bit for bit.
    Returns latents (B,C,F,H,W) float32, and network passes backward of one clip; those forward are the sampler's.

    conditioning: of B clips. negative: the encoded negative prompt, needed where sampler.guidance is not 1. seeds: B,
    of the noise that the solver rcm draws. ValueError for noise that does not fit, a backbone without VAE, and a reward
    that is not one finite number per clip.
    """
    stepper = Stepper(backbone, conditioning, sampler, negative, seeds=seeds)
    guided = range(0, sampler.steps, config.every) if config.scale else ()
    held = conditioning.held_frames(noise.shape[2])
    with torch.no_grad():
        latents = stepper.start(noise)
    for step in range(sampler.steps):
        if step not in guided:
            with torch.no_grad():
                latents = stepper.after(latents, stepper.velocity(latents, step), step)
            continue
        with torch.enable_grad():
            latents = latents.detach().requires_grad_()  # not the caller's own tensor
            velocity = stepper.velocity(latents, step)
            clean = stepper.clean(latents, velocity, step)
        gradient = reward_gradient(backbone, clean.detach(), reward)
        (gradient,) = torch.autograd.grad(clean, latents, gradient)
        latents, velocity = latents.detach(), velocity.detach()
        move = config.scale * normalised_move(latents, gradient, held)
        latents = stepper.after(latents, velocity, step, move=move)
    return latents, sum(sampling_passes(backbone, sampler, step, step + 1) for step in guided)


def reward_gradient(backbone: Backbone, clean: Tensor, reward: Reward) -> Tensor:
    """Gradients (B,C,F,H,W) of the rewards of clean latents of that shape."""
    clips = clean.detach().requires_grad_()
    with torch.enable_grad():
        value = reward(backbone.decode_latents(clips, batch_size=len(clips)))
    if value.shape != (len(clips),) or not value.isfinite().all():
        given = value.detach().tolist()
        raise ValueError(f"the reward gave {given} for {len(clips)} clips: it must give one number each")
    (gradient,) = torch.autograd.grad(value, clips, torch.ones_like(value))
    return gradient


def normalised_move(latents: Tensor, gradient: Tensor, held: int) -> Tensor:
    """`gradient` scaled to the length of `latents`, clip by clip, (B,C,F,H,W) both; the first `held` frames stay.

    A clip whose gradient is 0 stays where it is. By hand: latents (3, 4), gradient (0, 2): (0, 5).
    """
    free = gradient.float().clone()
    free[:, :, :held] = 0
    length = latents[:, :, held:].flatten(1).norm(dim=1)
    size = free.flatten(1).norm(dim=1).clamp(min=torch.finfo(torch.float32).tiny)
    return free / size.view(-1, 1, 1, 1, 1) * length.view(-1, 1, 1, 1, 1)
