"""Tokens of a clip from V-JEPA 2 (Assran et al., 2025), by transformers, frozen: the teacher of eqs. 9-12.

PhysisForcing takes ViT-L at 256 x 256 and 64 frames (facebook/vjepa2-vitl-fpc64-256): 32 x 16 x 16 tokens of width
1024; here the numbers are the checkpoint's. Only the encoder is used.

The whole frame is squeezed into the square, without a crop, so that token (row, column) of an H x W grid covers the
cell of `losses.regions`. Deviation: the paper resamples trilinearly; here each frame is scaled with antialiasing, and
frames are taken evenly, or repeated, rather than blended: a blend of two frames shows every moving thing twice.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from train.teachers.weights import check_path, load_model, normalise, read_config

KEY, EXAMPLE = "vjepa2.path", "facebook/vjepa2-vitl-fpc64-256"


@dataclass
class VJepa2Config:
    path: str = ""  # folder or hub id of a V-JEPA 2 model in transformers' form


class VideoTokens(NamedTuple):
    values: Tensor  # (K,D) float32, K = F H W in this order
    grid: tuple[int, int, int]  # (F,H,W)
    frames: Tensor  # (F,P) int64: the clip's frames that each slice of tokens saw


def check(config: VJepa2Config) -> None:
    """ValueError, before any work, for a path that cannot be one."""
    check_path(KEY, config.path, EXAMPLE)


def shape(config: VJepa2Config) -> tuple[tuple[int, int, int], int]:
    """((F,H,W), D) of the tokens, from the checkpoint's config alone. Raises ValueError as `build` does."""
    settings = read_config(KEY, config.path, "vjepa2")
    side = settings.crop_size // settings.patch_size
    return (settings.frames_per_clip // settings.tubelet_size, side, side), settings.hidden_size


def build(config: VJepa2Config, device: torch.device | str) -> Callable[[Tensor], VideoTokens]:
    """The encoder: encode(frames (T,H,W,3) uint8) -> VideoTokens on `device`, for any T.

    Raises ValueError when the checkpoint is missing, incomplete or another model.
    """
    from transformers import VJEPA2Model

    check(config)
    settings = read_config(KEY, config.path, "vjepa2")
    encoder = load_model(KEY, config.path, VJEPA2Model, settings, device).encoder
    grid, _ = shape(config)
    wanted, side = grid[0] * settings.tubelet_size, grid[1] * settings.patch_size  # tokens then cover all of both

    @torch.no_grad()
    def encode(frames: Tensor) -> VideoTokens:
        chosen = sample_frames(len(frames), wanted)
        pixels = preprocess(frames[chosen.to(frames.device)].to(device), side)
        values = encoder(pixel_values_videos=pixels[None]).last_hidden_state[0].float()
        return VideoTokens(values, grid, chosen.unflatten(0, (grid[0], -1)).to(device))

    return encode


def sample_frames(num_frames: int, wanted: int) -> Tensor:
    """Which of `num_frames` frames to take for `wanted` ones, evenly: (wanted,) int64, the i-th from the middle of the
    i-th of `wanted` equal parts of the clip. Fewer frames are repeated.

    By hand: 81 frames for 64 begin 0, 1, 3, 4, 5 and end with 80; 2 for 4 are 0, 0, 1, 1.
    """
    return (torch.arange(wanted) * 2 + 1) * num_frames // (2 * wanted)


def preprocess(frames: Tensor, side: int) -> Tensor:
    """(T,H,W,3) uint8 -> (T,3,side,side) float32, antialiased bilinear, ImageNet-normalised."""
    images = frames.permute(0, 3, 1, 2).float() / 255
    return normalise(F.interpolate(images, size=(side, side), mode="bilinear", antialias=True, align_corners=False))
