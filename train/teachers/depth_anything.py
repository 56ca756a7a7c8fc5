"""Nearness of a clip's first frame: Depth-Anything-V2 (Yang et al., 2024) by transformers, frozen.

The relative models predict a DISPARITY, up to scale and shift: near is large. PhysisForcing weights motion by it, so
that near things count (eq. 2). The metric models predict a depth and are refused.

The paper takes ViT-L (depth-anything/Depth-Anything-V2-Large-hf, CC BY-NC; the small model is Apache-2.0).
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from train.teachers.weights import check_path, load_model, normalise, read_config

KEY, EXAMPLE = "depth_anything.path", "depth-anything/Depth-Anything-V2-Large-hf"


@dataclass
class DepthAnythingConfig:
    path: str = ""  # folder or hub id of a relative Depth-Anything model in transformers' form


def check(config: DepthAnythingConfig) -> None:
    """ValueError, before any work, for a path that cannot be one."""
    check_path(KEY, config.path, EXAMPLE)


def build(config: DepthAnythingConfig, device: torch.device | str) -> Callable[[Tensor], Tensor]:
    """The estimator: disparity(frame (H,W,3) uint8) -> (H,W) float32 in [0, 1] on `device`, 1 is nearest.

    It is scaled to the frame's smallest and largest value; a frame without any depth is 1 everywhere, which leaves the
    choice to the motion. Raises ValueError when the checkpoint is missing, incomplete or no relative model.
    """
    from transformers import DepthAnythingForDepthEstimation

    check(config)
    settings = read_config(KEY, config.path, "depth_anything")
    if settings.depth_estimation_type != "relative":
        kind = settings.depth_estimation_type
        raise ValueError(f"{KEY}={config.path!r} is a {kind} model, whose far is large: give a relative one")
    model = load_model(KEY, config.path, DepthAnythingForDepthEstimation, settings, device)
    side, patch = settings.backbone_config.image_size, settings.patch_size

    @torch.no_grad()
    def disparity(frame: Tensor) -> Tensor:
        pixels = preprocess(frame.to(device), side, patch)
        predicted = model(pixel_values=pixels).predicted_depth[:, None].float()  # (1,1,h,w)
        whole = F.interpolate(predicted, size=frame.shape[:2], mode="bilinear", align_corners=False)[0, 0]
        low, high = whole.min(), whole.max()
        return torch.where(high > low, (whole - low) / (high - low).clamp(min=1e-12), 1.0)

    return disparity


def preprocess(frame: Tensor, side: int, patch: int) -> Tensor:
    """(H,W,3) uint8 -> (1,3,h,w) float32: the shorter side scaled to `side`, both rounded to multiples of `patch`,
    antialiased bicubic, ImageNet-normalised; what the authors' code and transformers' processor do.

    By hand: 480 x 832 with side 518 and patch 14 gives 518 x 896 (897.9 before rounding).
    """
    height, width = frame.shape[:2]
    scale = side / min(height, width)
    size = tuple(max(1, round(scale * length / patch)) * patch for length in (height, width))
    image = frame.permute(2, 0, 1)[None].float() / 255  # (1,3,H,W)
    image = F.interpolate(image, size=size, mode="bicubic", antialias=True, align_corners=False).clamp(0, 1)
    return normalise(image)
