"""Families whose first latent frame may be a given image, or their first k a prefix: held fixed, of velocity zero.

diffusers' pipelines let that frame drift and put the image back after each step, or give it the velocity that leads
from its noise to the image: each ends in the same latents, but for a share of noise that the latter keeps where clips
begin below t = 1. Their VAEs are causal, so the latents of a prefix of 4 k - 3 video frames are the whole clip's own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from train.backbones.base import Backbone, Conditioning
from train.backbones.conditioning import CONDITION


class HeldFrame(Backbone):
    first_frame = (False, True)
    takes_prefix = True

    @classmethod
    def first_frame_shapes(
        cls, architecture: dict[str, Any], clip: tuple[int, ...], prefix_frames: int = 1
    ) -> dict[str, tuple[int, ...]]:
        channels, _, *size = clip
        return {CONDITION: (channels, (prefix_frames - 1) // architecture["vae_scale_temporal"] + 1, *size)}

    def encode_first_frame(self, first_frame: Tensor, num_frames: int) -> Tensor:
        """First frame (B, 3, H, W) in [-1, 1], or 4 k - 3 of them (B, 3, 4 k - 3, H, W) -> their latent frames
        (B, C, k, H, W), whatever `num_frames` is."""
        return self.encode_video(first_frame if first_frame.dim() == 5 else first_frame.unsqueeze(2))

    def start(self, latents: Tensor, conditioning: Conditioning) -> Tensor:
        if conditioning.image is None:
            return latents
        given = conditioning.image.to(latents)
        return torch.cat([given, latents[:, :, given.shape[2] :]], dim=2)

    def _network(self, expert: nn.Module, latents: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        velocity = super()._network(expert, latents, t, conditioning)
        if conditioning.image is None:
            return velocity
        given = conditioning.image.shape[2]
        return torch.cat([torch.zeros_like(velocity[:, :, :given]), velocity[:, :, given:]], dim=2)
