"""Wan2.2 TI2V-5B: text, and optionally a first frame or a prefix, to video; one timestep per token; its VAE is 16x.

Facts from the public configs of Wan-AI/Wan2.2-TI2V-5B-Diffusers. With an image the first latent frame IS the image's
latent: its tokens are at t = 0, and the network sees it clean. A prefix is the same with its first k latent frames;
deviation: the release and diffusers' pipeline know one frame alone, which is what the weights were trained with.
Without an image every token is at t, so the network is given one timestep per clip: the same function as equal
timesteps per token in diffusers, without the (B, N, 6, D) modulation.
"""

from __future__ import annotations

import torch
from torch import Tensor

from train.backbones.base import Conditioning
from train.backbones.held_frame import HeldFrame
from train.backbones.wan import WanBackbone, wan_architecture


class Wan22TI2V(HeldFrame, WanBackbone):
    architectures = {
        "tiny": wan_architecture(heads=4, head_dim=32, ffn=512, layers=3, text_dim=64, z_dim=12, vae_scale=16),
        "5B": wan_architecture(heads=24, ffn=14336, layers=30, z_dim=48, vae_scale=16),
        "robots": wan_architecture(heads=4, head_dim=64, ffn=576, layers=5, z_dim=16, text_dim=128),
    }
    expand_timesteps = True

    def _network_input(self, latents: Tensor, timestep: Tensor, conditioning: Conditioning) -> tuple[Tensor, Tensor]:
        if conditioning.image is None:
            return latents, timestep
        _, patch_rows, patch_columns = self.architecture["transformer"]["patch_size"]
        frames, rows, columns = latents.shape[2:]
        later = torch.ones(frames, device=latents.device)
        later[: conditioning.image.shape[2]] = 0
        tokens = later.repeat_interleave((rows // patch_rows) * (columns // patch_columns))  # (N,), frame by frame
        return self.start(latents, conditioning), timestep[:, None] * tokens
