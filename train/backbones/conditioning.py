"""What a network is told beside the noisy latents. Shapes as in `train.backbones.base`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Conditioning:
    """What the network is told beside the noisy latents.

    `text` (B, L, D) is zero-padded to the backbone's text_length. `image` holds image latents: for wan22_ti2v the
    first latent frame (B, C, 1, H, W); for wan22_i2v the VAE latents (B, C, F, H, W) of [first frame, zeros ...];
    None elsewhere.
    """

    text: Tensor
    image: Tensor | None = None

    def __len__(self) -> int:
        return self.text.shape[0]

    def __getitem__(self, index: slice) -> Conditioning:
        return Conditioning(self.text[index], None if self.image is None else self.image[index])

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Conditioning:
        """Both tensors moved and/or cast."""
        image = None if self.image is None else self.image.to(device=device, dtype=dtype)
        return Conditioning(self.text.to(device=device, dtype=dtype), image)

    def expand(self, batch: int) -> Conditioning:
        """One conditioning repeated for a batch, without a copy; a batch of `batch` is returned as it is."""
        if len(self) == batch:
            return self
        if len(self) != 1:
            raise ValueError(f"a conditioning of {len(self)} clips cannot serve {batch}: give 1 or {batch}")
        image = None if self.image is None else self.image.expand(batch, -1, -1, -1, -1)
        return Conditioning(self.text.expand(batch, -1, -1), image)

    def held_frames(self, num_frames: int) -> int:
        """Leading ones of `num_frames` latent frames that are the image itself and are not generated: wan22_ti2v's
        one, none elsewhere."""
        return 0 if self.image is None or self.image.shape[2] == num_frames else self.image.shape[2]

    def generated(self, cells: Tensor) -> Tensor:
        """The latent frames of cells (..., F, H, W) that are generated, the ones that an error counts: all but the
        `held_frames`."""
        return cells[..., self.held_frames(cells.shape[-3]) :, :, :]

    @staticmethod
    def cat(items: Sequence[Conditioning]) -> Conditioning:
        """Joined along the batch; either all items have an image or none has."""
        with_image = [item.image for item in items if item.image is not None]
        if with_image and len(with_image) != len(items):
            raise ValueError(f"{len(with_image)} of {len(items)} conditionings have an image: give all one, or none")
        return Conditioning(torch.cat([item.text for item in items]), torch.cat(with_image) if with_image else None)
