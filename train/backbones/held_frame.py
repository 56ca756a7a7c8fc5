"""Families whose first latent frame may be a given image: it is held fixed, and its velocity is zero.

diffusers' pipelines let that frame drift and put the image back after each step, or give it the velocity that leads
from its noise to the image: each ends in the same latents, but for a share of noise that the latter keeps where clips
begin below t = 1.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from train.backbones.base import Backbone, Conditioning
from train.backbones.conditioning import CONDITION


class HeldFrame(Backbone):
    first_frame = (False, True)

    @classmethod
    def first_frame_shapes(cls, architecture: dict[str, Any], clip: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        channels, _, *size = clip
        return {CONDITION: (channels, 1, *size)}

    def encode_first_frame(self, first_frame: Tensor, num_frames: int) -> Tensor:
        """First frame (B, 3, H, W) in [-1, 1] -> its latent frame (B, C, 1, H, W), whatever `num_frames` is."""
        return self.encode_video(first_frame.unsqueeze(2))

    def start(self, latents: Tensor, conditioning: Conditioning) -> Tensor:
        if conditioning.image is None:
            return latents
        return torch.cat([conditioning.image.to(latents), latents[:, :, 1:]], dim=2)

    def _network(self, expert: nn.Module, latents: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        velocity = super()._network(expert, latents, t, conditioning)
        if conditioning.image is None:
            return velocity
        return torch.cat([torch.zeros_like(velocity[:, :, :1]), velocity[:, :, 1:]], dim=2)
