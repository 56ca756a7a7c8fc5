"""What a checkpoint's configs say, without its weights: shapes, sequence lengths and sizes, for `--dry-run` too.

An architecture is a plain dict: "transformer" (keyword arguments of WanTransformer3DModel), "z_dim" (latent channels),
"vae_scale" (pixels per latent row or column) and "vae_scale_temporal" (frames per latent frame, after the first).
"""

from __future__ import annotations

import functools
import json
from typing import Any

import torch
from diffusers import WanTransformer3DModel


def wan_architecture(
    *,
    heads: int,
    ffn: int,
    layers: int,
    z_dim: int = 16,
    in_channels: int | None = None,
    vae_scale: int = 8,
    head_dim: int = 128,
    text_dim: int = 4096,
) -> dict[str, Any]:
    """One entry of a family's architectures: the transformer's keyword arguments and the VAE facts that shapes need."""
    transformer = {
        "patch_size": (1, 2, 2),
        "num_attention_heads": heads,
        "attention_head_dim": head_dim,
        "in_channels": in_channels or z_dim,
        "out_channels": z_dim,
        "text_dim": text_dim,
        "freq_dim": 256,
        "ffn_dim": ffn,
        "num_layers": layers,
    }
    return {"transformer": transformer, "z_dim": z_dim, "vae_scale": vae_scale, "vae_scale_temporal": 4}


def latent_shape(architecture: dict[str, Any], height: int, width: int, num_frames: int) -> tuple[int, int, int, int]:
    """(C, F, H, W) of a video of `height` x `width` pixels and `num_frames` frames; needs no weights.

    Raises ValueError, naming the nearest legal value, when a side is no multiple of VAE scale x patch or when
    num_frames - 1 is no multiple of the VAE's temporal scale.
    """
    scale, scale_temporal = architecture["vae_scale"], architecture["vae_scale_temporal"]
    _, *patch = architecture["transformer"]["patch_size"]
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
    patch_frames, patch_rows, patch_columns = architecture["transformer"]["patch_size"]
    return (frames // patch_frames) * (rows // patch_rows) * (columns // patch_columns)


def parameter_dtype(key: str, dtype: torch.dtype) -> torch.dtype:
    """Of a transformer's parameter by name: float32 for norms, time embedder and scale tables, else `dtype`."""
    return torch.float32 if set(WanTransformer3DModel._keep_in_fp32_modules) & set(key.split(".")) else dtype


def parameter_bytes(architecture: dict[str, Any], dtype: torch.dtype) -> tuple[int, int]:
    """Bytes of one transformer's parameters: of one of its blocks, and of all that is outside of them."""
    network = without_storage(architecture)
    sizes = {key: p.numel() * parameter_dtype(key, dtype).itemsize for key, p in network.named_parameters()}
    block = sum(size for key, size in sizes.items() if key.startswith("blocks.0."))
    return block, sum(size for key, size in sizes.items() if not key.startswith("blocks."))


def parameter_count(architecture: dict[str, Any]) -> int:
    """Parameters of one transformer (of each of the two experts of A14B), counted on the meta device."""
    return sum(parameter.numel() for parameter in without_storage(architecture).parameters())


def parameter_shapes(architecture: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Shape of every parameter of one transformer, by its name, from the meta device."""
    return {name: tuple(parameter.shape) for name, parameter in without_storage(architecture).named_parameters()}


def without_storage(architecture: dict[str, Any]) -> WanTransformer3DModel:
    """One transformer on the meta device, the same one for the same architecture: to be looked at, not changed."""
    return _on_meta(json.dumps(architecture["transformer"], sort_keys=True))


@functools.cache
def _on_meta(config: str) -> WanTransformer3DModel:
    with torch.device("meta"):
        return WanTransformer3DModel.from_config(json.loads(config))
