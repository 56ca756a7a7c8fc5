"""Wan2.2 A14B, text and image to video: two experts of 14B, high_noise where t >= boundary and low_noise below it.

Facts from the public configs of Wan-AI/Wan2.2-{T2V,I2V}-A14B-Diffusers (boundary .875 and .9; no CLIP image encoder).
A loaded pipeline's own boundary_ratio is used. The image family stacks on the 16 latent channels a mask of 4 (one for
each video frame of a latent frame; 1 on the first latent frame) and the 16 channels of the VAE latents of [first
frame, zeros ...].
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from train.backbones.base import TRAIN_TIMESTEPS, Conditioning
from train.backbones.conditioning import CONDITION
from train.backbones.wan import WanBackbone, wan_architecture
from train.experts import EXPERT_FOLDERS


def expert_at(t: Tensor, boundary: float) -> str:
    """Name of the expert that serves time t, a scalar in [0, 1]. Compared on the network's clock, as diffusers does: in
    float32 .9 itself rounds below .9."""
    return "high_noise" if TRAIN_TIMESTEPS * t >= TRAIN_TIMESTEPS * boundary else "low_noise"


class Wan22T2V(WanBackbone):
    architectures = {
        "tiny": wan_architecture(heads=2, head_dim=32, ffn=256, layers=2, text_dim=64),
        "A14B": wan_architecture(heads=40, ffn=13824, layers=40),
    }
    expert_folders = EXPERT_FOLDERS
    default_boundary = 0.875

    def _expert_at(self, t: Tensor) -> str:
        return expert_at(t, self.boundary)


class Wan22I2V(Wan22T2V):
    architectures = {
        "tiny": wan_architecture(heads=2, head_dim=32, ffn=256, layers=2, text_dim=64, in_channels=36),
        "A14B": wan_architecture(heads=40, ffn=13824, layers=40, in_channels=36),
    }
    default_boundary = 0.9
    first_frame = (True,)

    @classmethod
    def input_channels(cls, architecture: dict[str, Any]) -> int:
        return 2 * architecture["z_dim"] + architecture["vae_scale_temporal"]

    @classmethod
    def first_frame_shapes(
        cls, architecture: dict[str, Any], clip: tuple[int, ...], prefix_frames: int = 1
    ) -> dict[str, tuple[int, ...]]:
        return {CONDITION: clip}

    def encode_first_frame(self, first_frame: Tensor, num_frames: int) -> Tensor:
        """First frame (B, 3, H, W) in [-1, 1] -> VAE latents (B, C, F, H, W) of that frame, then zeros (mid grey)."""
        return self.encode_video(F.pad(first_frame.unsqueeze(2), (0, 0, 0, 0, 0, num_frames - 1)))

    def _network_input(self, latents: Tensor, timestep: Tensor, conditioning: Conditioning) -> tuple[Tensor, Tensor]:
        if conditioning.image is None:
            raise ValueError(
                "wan22_i2v needs image latents: give condition or sample a first_frame, or a Conditioning with an image"
            )
        batch, _, *size = latents.shape
        mask = latents.new_zeros(batch, self.architecture["vae_scale_temporal"], *size)
        mask[:, :, 0] = 1
        return torch.cat([latents, mask, conditioning.image.to(latents)], dim=1), timestep
