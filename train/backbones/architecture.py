"""What a checkpoint's configs say, without its weights: shapes, sequence lengths and sizes, for `--dry-run` too.

An architecture is a plain dict: "kind" (the `NetworkKind`), "transformer" (keyword arguments of its class), "z_dim"
(latent channels), "vae_scale" (pixels per latent row or column) and "vae_scale_temporal" (frames per latent frame,
after the first).
"""

from __future__ import annotations

import functools
import inspect
import json
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class Shape(NamedTuple):
    """What decides the time and memory of a transformer."""

    layers: int
    heads: int
    width: int
    ffn: int  # width inside its feed-forward layers
    patch: tuple[int, int, int]  # latent frames, rows and columns of one token


Observe = Callable[[nn.Module, Tensor, list[int]], AbstractContextManager[dict[str, Tensor]]]


@dataclass(frozen=True, eq=False)
class NetworkKind:
    """What the project knows of a kind of transformer. A family's file has it, `Backbone.kind` names it."""

    model: type[nn.Module]  # diffusers' class
    shape: Callable[[Mapping[str, Any]], Shape]  # of a config
    # (shape, video tokens, text tokens) -> operations of one forward pass of one sample: matrix products, attention
    flops: Callable[[Shape, int, int], tuple[float, float]]
    blocks: str = "blocks"  # the attribute that holds its blocks
    fill_buffers: Callable[[nn.Module, torch.device | str], None] | None = None  # what no checkpoint holds
    attention: type | None = None  # in the place of its blocks' attention processor, without a mask
    cached: bool = False  # whether diffusers' First Block Cache knows its blocks
    fused: bool = False  # whether `train.backbones.fused.fused_block` computes these blocks; they attend without a mask
    # Layers of a block: diffusers' name -> that of the model's own code, which ComfyUI's LoRA files have.
    original_names: Mapping[str, str] = field(default_factory=dict)
    observe: Observe | None = None  # attention of a pass, as `eval.search.masks` reads it

    def blocks_of(self, network: nn.Module) -> nn.ModuleList:
        return getattr(network, self.blocks)

    def parameter_dtype(self, key: str, dtype: torch.dtype) -> torch.dtype:
        """Of a parameter by name: float32 for what diffusers' class keeps so (norms, time embedder), else `dtype`."""
        kept = set(self.model._keep_in_fp32_modules or ())
        return torch.float32 if kept & set(key.split(".")) else dtype

    def in_8_bits(self, key: str, parameter: Tensor, dtype: torch.dtype) -> bool:
        """Whether `backbone.dtype=float8` rounds a block's parameter: a matrix that is not kept in float32."""
        return parameter.dim() == 2 and self.parameter_dtype(key, dtype) == dtype


def defaults_of(model: type[nn.Module]) -> dict[str, Any]:
    """What diffusers' class takes for the keys of its config that are absent."""
    arguments = inspect.signature(model.__init__).parameters.items()
    return {name: one.default for name, one in arguments if one.default is not inspect.Parameter.empty}


def shape_of(architecture: Mapping[str, Any]) -> Shape:
    """Of an architecture's transformer."""
    return architecture["kind"].shape(architecture["transformer"])


def forward_flops(architecture: Mapping[str, Any], tokens: int, text_tokens: int) -> tuple[float, float]:
    """Operations of one forward pass of one sample: (matrix products, attention); its texts have `text_tokens` together
    (`train.backbones.text_tokens`). A backward pass with frozen weights costs the matrix part once (input gradients
    only) and 2.5 times the attention."""
    return architecture["kind"].flops(shape_of(architecture), tokens, text_tokens)


def latent_shape(architecture: dict[str, Any], height: int, width: int, num_frames: int) -> tuple[int, int, int, int]:
    """(C, F, H, W) of a video of `height` x `width` pixels and `num_frames` frames; needs no weights.

    Raises ValueError, naming the nearest legal value, when a side is no multiple of VAE scale x patch or when
    num_frames - 1 is no multiple of the VAE's temporal scale.
    """
    scale, scale_temporal = architecture["vae_scale"], architecture["vae_scale_temporal"]
    _, *patch = shape_of(architecture).patch
    for key, value, side in zip(("height", "width"), (height, width), patch, strict=True):
        multiple = scale * side
        if value < multiple or value % multiple:
            nearest = max(1, round(value / multiple)) * multiple
            raise ValueError(f"{key}={value} is no multiple of {multiple} (VAE {scale} x patch {side}): use {nearest}")
    if num_frames < 1 or (num_frames - 1) % scale_temporal:
        nearest = 1 + scale_temporal * max(0, round((num_frames - 1) / scale_temporal))
        raise ValueError(f"num_frames={num_frames} is not 1 + a multiple of {scale_temporal}: use {nearest}")
    return architecture["z_dim"], 1 + (num_frames - 1) // scale_temporal, height // scale, width // scale


def num_tokens(architecture: dict[str, Any], height: int, width: int, num_frames: int) -> int:
    """Transformer sequence length of a video; needs no weights. Raises as `latent_shape` does."""
    _, frames, rows, columns = latent_shape(architecture, height, width, num_frames)
    patch_frames, patch_rows, patch_columns = shape_of(architecture).patch
    return (frames // patch_frames) * (rows // patch_rows) * (columns // patch_columns)


def bytes_outside_blocks(architecture: dict[str, Any], dtype: torch.dtype) -> int:
    """Bytes of one transformer's parameters that are no block's."""
    network, kind = without_storage(architecture), architecture["kind"]
    outside = [(key, one) for key, one in network.named_parameters() if not key.startswith(f"{kind.blocks}.")]
    return sum(one.numel() * kind.parameter_dtype(key, dtype).itemsize for key, one in outside)


def parameter_count(architecture: dict[str, Any]) -> int:
    """Parameters of one transformer (of each of the two experts of A14B), counted on the meta device."""
    return sum(parameter.numel() for parameter in without_storage(architecture).parameters())


def parameter_shapes(architecture: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Shape of every parameter of one transformer, by its name, from the meta device."""
    return {name: tuple(parameter.shape) for name, parameter in without_storage(architecture).named_parameters()}


def without_storage(architecture: dict[str, Any]) -> nn.Module:
    """One transformer on the meta device, the same one for the same architecture: to be looked at, not changed."""
    return _on_meta(architecture["kind"], json.dumps(architecture["transformer"], sort_keys=True))


@functools.cache
def _on_meta(kind: NetworkKind, config: str) -> nn.Module:
    with torch.device("meta"):
        return kind.model.from_config(json.loads(config))
