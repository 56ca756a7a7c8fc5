"""What a network is told beside the noisy latents. Shapes as in `train.backbones.base`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from train.group_sample import MORE, beginning

CONDITION = "condition"  # what groups and batches call the image latents


@dataclass
class Conditioning:
    """What the network is told beside the noisy latents.

    `text` (B, L, D) is zero-padded to the backbone's text_length; a row of zeros is padding, and where a network reads
    masks they follow from that. `image` holds image latents: for wan22_ti2v and cosmos25 the first latent frame
    (B, C, 1, H, W), or the first k of a prefix; for wan22_i2v the VAE latents (B, C, F, H, W) of [first frame,
    zeros ...]; None elsewhere. `more` has what else a family reads, by name, each (B, ...): further texts have names
    that begin with "text" and are padded likewise.
    """

    text: Tensor
    image: Tensor | None = None
    more: dict[str, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return self.text.shape[0]

    def __getitem__(self, index: slice) -> Conditioning:
        return self._each(lambda tensor: tensor[index])

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Conditioning:
        """All tensors moved and/or cast."""
        return self._each(lambda tensor: tensor.to(device=device, dtype=dtype))

    def expand(self, batch: int) -> Conditioning:
        """One conditioning repeated for a batch, without a copy; a batch of `batch` is returned as it is."""
        if len(self) == batch:
            return self
        if len(self) != 1:
            raise ValueError(f"a conditioning of {len(self)} clips cannot serve {batch}: give 1 or {batch}")
        return self._each(lambda tensor: tensor.expand(batch, *tensor.shape[1:]))

    def repeated(self, copies: int) -> Conditioning:
        """Each clip's `copies` times, one after another."""
        return self._each(lambda tensor: tensor.repeat_interleave(copies, dim=0))

    def _each(self, change: Callable[[Tensor], Tensor]) -> Conditioning:
        return Conditioning.of({name: change(tensor) for name, tensor in self.named().items()})

    def with_texts_of(self, other: Conditioning) -> Conditioning:
        """This one with the other's texts, as a negative prompt stands beside the same image."""
        more = self.more | {name: tensor for name, tensor in other.more.items() if name.startswith("text")}
        return replace(self, text=other.text, more=more)

    def texts(self) -> dict[str, Tensor]:
        """Every text, by name."""
        return {"text": self.text} | {name: value for name, value in self.more.items() if name.startswith("text")}

    def named(self) -> dict[str, Tensor]:
        """All tensors, by the names that groups and batches have for them."""
        image = {} if self.image is None else {CONDITION: self.image}
        return {"text": self.text, **image, **{f"{MORE}{name}": tensor for name, tensor in self.more.items()}}

    @staticmethod
    def of(tensors: Mapping[str, Tensor]) -> Conditioning:
        """The one that `named` describes; other names, as of a batch, do not count."""
        return Conditioning(tensors["text"], tensors.get(CONDITION), beginning(MORE, tensors))

    def held_frames(self, num_frames: int) -> int:
        """Leading ones of `num_frames` latent frames that are the given ones themselves and are not generated: one
        of wan22_ti2v and cosmos25, or the k of a prefix; none elsewhere."""
        return 0 if self.image is None or self.image.shape[2] == num_frames else self.image.shape[2]

    def generated(self, cells: Tensor) -> Tensor:
        """The latent frames of cells (..., F, H, W) that are generated, the ones that an error counts: all but the
        `held_frames`."""
        return cells[..., self.held_frames(cells.shape[-3]) :, :, :]

    @staticmethod
    def cat(items: Sequence[Conditioning]) -> Conditioning:
        """Joined along the batch; either all items have an image or none has."""
        with_image = [item for item in items if item.image is not None]
        if with_image and len(with_image) != len(items):
            raise ValueError(f"{len(with_image)} of {len(items)} conditionings have an image: give all one, or none")
        named = [item.named() for item in items]
        return Conditioning.of({name: torch.cat([one[name] for one in named]) for name in named[0]})


def pad_texts(tensors: Mapping[str, Tensor], lengths: Mapping[str, int]) -> dict[str, Tensor]:
    """A group's conditioning, by the names of `Conditioning.named` and without a batch axis, with texts zero-padded to
    their number of tokens in `lengths` (names as in `Conditioning.texts`). ValueError for a longer one."""
    padded = {name: tensors[key] for name in lengths if (key := _key(name)) in tensors}
    return dict(tensors) | {_key(name): pad_text(text, lengths[name]) for name, text in padded.items()}


def unpad_texts(tensors: Mapping[str, Tensor], texts: Iterable[str]) -> dict[str, Tensor]:
    """The same with each of `texts` up to its last token, as groups store them."""
    return dict(tensors) | {_key(name): unpad(tensors[_key(name)]) for name in texts}


def _key(text: str) -> str:
    return text if text == "text" else f"{MORE}{text}"


def pad_text(text: Tensor, length: int) -> Tensor:
    """text (L', D) -> (length, D), zeros behind the L' tokens. Raises ValueError if L' > length."""
    if len(text) > length:
        raise ValueError(
            f"a text embedding of {len(text)} tokens does not fit into {length}; raise backbone.text_length or build "
            "the groups again with the shorter one"
        )
    return torch.nn.functional.pad(text, (0, 0, 0, length - len(text)))


def unpad(text: Tensor) -> Tensor:
    """(L, D) zero-padded -> (L', D) up to the last token."""
    used = text.abs().amax(dim=1).nonzero()
    return text[: int(used.max()) + 1 if len(used) else 0]
