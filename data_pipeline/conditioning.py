"""What a model's clips begin from: the text of their prompts and, of some families, a first frame."""

from collections.abc import Sequence

import torch
from torch import Tensor

from train.backbones.base import Backbone, Conditioning
from train.clips import from_pixels


def takes_first_frame(family: type[Backbone], asked: bool | None) -> bool:
    """Whether groups of a family hold their clip's first frame: pipeline.first_frame, or where it is null the family's
    own way. ValueError for a way that it has not."""
    if asked is None:
        return family.first_frame[0]
    if asked not in family.first_frame:
        way = "begins every clip with an image" if family.first_frame[0] else "generates from text alone"
        raise ValueError(f"pipeline.first_frame={str(asked).lower()}: this backbone.family {way}; leave the key out")
    return asked


@torch.no_grad()
def condition(backbone: Backbone, prompts: Sequence[str], first: Tensor | None, *, num_frames: int) -> Conditioning:
    """The conditioning of B clips of `num_frames`, in one pass. first: their first frames (B, H, W, 3) uint8, whose
    image latents it then carries; None for clips from text alone."""
    text, image = backbone.encode_text(list(prompts)), None
    if first is not None:
        frame = from_pixels(first[:, None].to(backbone.device))[:, :, 0]  # (B, 3, H, W)
        image = backbone.encode_first_frame(frame, num_frames=num_frames)
    return Conditioning(text, image)
