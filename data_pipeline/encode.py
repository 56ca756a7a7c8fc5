"""From pixels and prompts to what the network sees: the winners' latents and the conditioning."""

from collections.abc import Sequence

import torch
from torch import Tensor

from train.backbones.base import Backbone, Conditioning
from train.clips import from_pixels


@torch.no_grad()
def encode_clips(backbone: Backbone, frames: Tensor, prompts: Sequence[str]) -> tuple[Tensor, Conditioning]:
    """frames (B, T, H, W, 3) uint8 -> (latents (B, C, F, H, W) float32, conditioning of B clips), in one pass each.

    The conditioning carries the first frames' image latents in the families that take one.
    """
    video = from_pixels(frames.to(backbone.device))  # (B, 3, T, H, W)
    image = backbone.encode_first_frame(video[:, :, 0], num_frames=video.shape[2])
    return backbone.encode_video(video, batch_size=len(video)), Conditioning(backbone.encode_text(list(prompts)), image)


def unpad(text: Tensor) -> Tensor:
    """(L, D) zero-padded -> (L', D) up to the last token, for storage."""
    used = text.abs().amax(dim=1).nonzero()
    return text[: int(used.max()) + 1]
