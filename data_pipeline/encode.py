"""From pixels and a prompt to what the network sees: the winner's latents and the conditioning."""

import torch
from torch import Tensor

from train.backbones.base import Backbone, Conditioning
from train.clips import from_pixels


@torch.no_grad()
def encode_clip(backbone: Backbone, frames: Tensor, prompt: str) -> tuple[Tensor, Conditioning]:
    """frames (T, H, W, 3) uint8 -> (winner latents (1, C, F, H, W) float32, conditioning of one clip).

    The conditioning carries the first frame's image latents in the families that take one.
    """
    video = from_pixels(frames)[None].to(backbone.device)  # (1, 3, T, H, W)
    image = backbone.encode_first_frame(video[:, :, 0], num_frames=video.shape[2])
    return backbone.encode_video(video), Conditioning(backbone.encode_text([prompt]), image)


def unpad(text: Tensor) -> Tensor:
    """(L, D) zero-padded -> (L', D) up to the last token, for storage."""
    used = text.abs().amax(dim=1).nonzero()
    return text[: int(used.max()) + 1]
