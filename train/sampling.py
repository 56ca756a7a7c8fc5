"""Clips from a backbone: every sampler of the project takes its steps from `Stepper`.

Generation, validation and preference losers go through `sample_clips`. Search has loops of its own (pruning, guidance,
refinement of the noise) over the same steps, so that a loop that interferes nowhere gives the same clip bit for bit.

Shapes: B clips, C latent channels, F latent frames, H W latent rows and columns.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from train.backbones.base import NEGATIVE_PROMPT, Backbone, Conditioning
from train.clips import VideoConfig


@dataclass
class SamplerConfig:
    """The defaults are Wan2.1's own for text to video, at 480p too. Wan2.2's own are in its recipes."""

    steps: int = 50  # Euler steps
    guidance: float = 5.0  # classifier-free guidance scale; 1 leaves the negative pass out
    guidance_low: float | None = None  # of the low-noise expert of two-expert families; null: `guidance`
    shift: float = 5.0  # of the time grid, applied once
    negative_prompt: str = NEGATIVE_PROMPT  # what guidance steers away from; Wan's own, in Chinese


def sigma_grid(steps: int, shift: float) -> Tensor:
    """Times of the Euler steps, (steps + 1,) float32 from 1 to 0: s u / (1 + (s - 1) u) over u = linspace(1, 0).

    The shift is applied once. diffusers' FlowMatchEuler applies it to an already shifted range, so its last step is
    nearly empty (4 steps, shift 3: 1, .858, .602, .009, 0 instead of 1, .9, .75, .5, 0).
    """
    if steps < 1 or shift <= 0:
        raise ValueError(f"steps={steps} and shift={shift} make no sigma grid: use steps >= 1 and shift > 0")
    u = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    return (shift * u / (1 + (shift - 1) * u)).float()


class Stepper:
    """The steps of one sampler for one batch, to be taken in order: Euler's method over `sigma_grid`.

    conditioning: of B clips. negative: the encoded negative prompt, of 1 or B clips. ValueError where guidance is not 1
    at some time and there is none.
    """

    def __init__(
        self,
        backbone: Backbone,
        conditioning: Conditioning,
        sampler: SamplerConfig,
        negative: Conditioning | None = None,
    ):
        self.backbone, self.conditioning = backbone, conditioning.to(backbone.device)
        self.times = sigma_grid(sampler.steps, sampler.shift)  # (steps + 1,), on the CPU
        self.scales = {"negative": negative, "guidance": sampler.guidance, "guidance_low": sampler.guidance_low}
        if negative is None and is_guided(backbone, sampler):
            raise ValueError(f"sampler.guidance={sampler.guidance:g} needs the encoded negative prompt: give negative")

    def start(self, noise: Tensor) -> Tensor:
        """The latents before the first step, of initial noise, both (B, C, F, H, W); ValueError for another shape."""
        if noise.dim() != 5 or len(noise) != len(self.conditioning):
            clips = len(self.conditioning)
            raise ValueError(
                f"noise of shape {tuple(noise.shape)} with {clips} conditionings: give (B,C,F,H,W), one each"
            )
        return self.backbone.start(noise.to(self.backbone.device, torch.float32), self.conditioning)

    def velocity(self, latents: Tensor, step: int) -> Tensor:
        """(B, C, F, H, W), of the expert that serves the step's time, with classifier-free guidance. Differentiable."""
        return self.backbone.velocity_at(latents, self.times[step], self.conditioning, **self.scales)

    def clean(self, latents: Tensor, velocity: Tensor, step: int) -> Tensor:
        """The clean latents that the line of the step's velocity points at: x - t v."""
        return latents - self.times[step].to(latents.device) * velocity

    def after(self, latents: Tensor, velocity: Tensor, step: int) -> Tensor:
        """The latents after the step: x + (t' - t) v."""
        return latents + (self.times[step + 1] - self.times[step]).to(latents.device) * velocity


def is_guided(backbone: Backbone, sampler: SamplerConfig) -> bool:
    """Whether some step has a negative pass."""
    return any(backbone.guidance_at(t, sampler.guidance, sampler.guidance_low) != 1 for t in (0.0, 1.0))


def initial_noise(backbone: Backbone, video: VideoConfig, seeds: Sequence[int]) -> Tensor:
    """(B, C, F, H, W) float32 on the CPU, B = len(seeds). Each clip's comes from a generator of its own, so it depends
    on its seed alone, not on the device or on the clips beside it."""
    shape = backbone.latent_shape(video.height, video.width, video.num_frames)
    return torch.stack([torch.randn(shape, generator=torch.Generator("cpu").manual_seed(seed)) for seed in seeds])


@torch.no_grad()
def sample(
    backbone: Backbone,
    conditioning: Conditioning,
    noise: Tensor,
    sampler: SamplerConfig,
    *,
    negative: Conditioning | None = None,
    progress: bool = True,
) -> Tensor:
    """Latents (B, C, F, H, W) float32 of generated clips, from initial noise of that shape.

    conditioning: of B clips. negative: `sampler.negative_prompt` already encoded; without it the text encoder must be
    loaded where a step is guided.
    """
    if negative is None and is_guided(backbone, sampler):
        negative = Conditioning(backbone.encode_text([sampler.negative_prompt]))
    stepper = Stepper(backbone, conditioning, sampler, negative)
    latents = stepper.start(noise)
    for step in tqdm(range(sampler.steps), desc="sampling", unit="step", disable=not progress):
        latents = stepper.after(latents, stepper.velocity(latents, step), step)
    return latents


def sample_clips(
    backbone: Backbone,
    conditioning: Conditioning,
    seeds: Sequence[int],
    video: VideoConfig,
    sampler: SamplerConfig,
    *,
    negative: Conditioning | None = None,
    progress: bool = True,
) -> Tensor:
    """One clip per seed, generated together: latents (B, C, F, H, W) float32, B = len(seeds), as `sample` makes them.

    conditioning: of B clips, or of one for all.
    """
    noise = initial_noise(backbone, video, seeds)
    conditioning = conditioning.expand(len(seeds))
    return sample(backbone, conditioning, noise, sampler, negative=negative, progress=progress)
