"""One sampling step at a time, with gradients where they are wanted: what both kinds of refinement stand on.

`Backbone.sample` is one closed loop without gradients. These are its steps, with the same operations in the same order,
so a loop over them gives the same clip bit for bit.
"""

from collections.abc import Callable

from torch import Tensor

from train.backbones.base import Backbone, Conditioning
from train.sampling import SamplerConfig

Velocity = Callable[[Tensor, Tensor], Tensor]  # latents (B,C,F,H,W), t scalar -> velocity (B,C,F,H,W)


def sampling_velocity(
    backbone: Backbone, conditioning: Conditioning, sampler: SamplerConfig, negative: Conditioning | None
) -> Velocity:
    """The velocity that the sampler follows: of the expert that serves t, with classifier-free guidance.

    negative: the encoded negative prompt. ValueError where guidance is not 1 at some time and there is none.
    """
    guidance, low = sampler.guidance, sampler.guidance_low
    if negative is None and any(backbone.guidance_at(t, guidance, low) != 1 for t in (0.0, 1.0)):
        raise ValueError(f"sampler.guidance={guidance:g} needs the encoded negative prompt: give negative")

    def velocity(latents: Tensor, t: Tensor) -> Tensor:
        return backbone.velocity_at(latents, t, conditioning, negative=negative, guidance=guidance, guidance_low=low)

    return velocity


def check_noise(noise: Tensor, conditioning: Conditioning) -> None:
    """ValueError for initial noise that is not (B,C,F,H,W), one a clip of the conditioning."""
    if noise.dim() != 5 or len(noise) != len(conditioning):
        raise ValueError(
            f"noise of shape {tuple(noise.shape)} with {len(conditioning)} conditionings: give (B,C,F,H,W), one each"
        )
