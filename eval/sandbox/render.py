"""Draws moving objects over a still setting, anti-aliased by signed distance: coverage = clamp(1/2 + distance * rows).

Layers from back to front: backdrop, ground (floor and ramp), rod, objects (the first in front), panel. Objects carry a
slight grey highlight; grey leaves their chroma untouched.
"""

from dataclasses import replace

import torch
from torch import Tensor

from eval.sandbox.world import (
    BACKDROP_GREY,
    FIRST_OBJECT,
    FLOOR,
    GROUND,
    GROUND_GREY,
    PANEL,
    PANEL_GREY,
    PANEL_TOP,
    PIVOT_HEIGHT,
    ROD,
    ROD_GREY,
    Setting,
)

CLIPS_AT_ONCE = 8  # a chunk's planes then stay in the processor's cache
ROD_HALF_WIDTH = 0.01  # u
PIVOT_RADIUS = 0.022  # u
HIGHLIGHT = 0.08  # grey level added at most
ROUNDING = 0.25  # corner radius of a block, in half sides


def ground_surface(ramp: Tensor | None, columns: Tensor) -> tuple[Tensor, Tensor]:
    """Height (y, u) and slope angle of the ground, both (N or 1, W), at columns (W,) u; ramp (N, 3) as in `Setting`."""
    if ramp is None:
        return torch.full_like(columns, FLOOR)[None], torch.zeros_like(columns)[None]
    foot, slope, fillet = ramp[:, :, None].unbind(1)  # (N, 1) each
    tangent_length = fillet * (slope / 2).tan()
    behind = columns - (foot + tangent_length)  # < 0 left of the fillet's lower end, where the circle's centre stands
    on_fillet = (behind < 0) & (columns > foot - tangent_length * slope.cos())
    arc = FLOOR - fillet + (fillet**2 - behind**2).clamp(min=0).sqrt()
    line = FLOOR - (foot - columns) * slope.tan()
    surface = torch.where(on_fillet, arc, torch.where(behind < 0, line, FLOOR))
    angle = torch.where(on_fillet, (-behind / fillet).clamp(max=1).asin(), torch.where(behind < 0, slope, 0.0))
    return surface, angle


def render(
    setting: Setting, centres: Tensor, angles: Tensor | None, sizes: Tensor, colours: Tensor, height: int, width: int
) -> tuple[Tensor, Tensor]:
    """Draw N clips.

    Args: centres (N, T, K, 2) u; angles (N, T) radians of blocks or None for balls; sizes (N, T, K) radius or half
    side, 0 draws nothing; colours (N, T, K, 3) in [0, 1].
    Returns: frames (N, T, H, W, 3) uint8 and the layer of each pixel (N, T, H, W) uint8, see `eval.sandbox.world`.
    """
    parts = []
    for start in range(0, len(centres), CLIPS_AT_ONCE):
        chunk = slice(start, start + CLIPS_AT_ONCE)
        ramp, panel, turned = (None if it is None else it[chunk] for it in (setting.ramp, setting.panel, angles))
        part = replace(setting, sizes=setting.sizes[chunk], ramp=ramp, panel=panel)
        parts.append(_render_chunk(part, centres[chunk], turned, sizes[chunk], colours[chunk], height, width))
    frames, layers = zip(*parts, strict=True)
    return torch.cat(frames), torch.cat(layers)


def _render_chunk(
    setting: Setting, centres: Tensor, angles: Tensor | None, sizes: Tensor, colours: Tensor, height: int, width: int
) -> tuple[Tensor, Tensor]:
    count, frames, objects = centres.shape[:3]
    device = centres.device
    columns = (torch.arange(width, device=device) + 0.5) / height  # (W,) u
    rows = ((torch.arange(height, device=device) + 0.5) / height)[:, None]  # (H, 1) u

    def coverage(distance: Tensor) -> Tensor:
        return (0.5 + distance * height).clamp_(0, 1)

    # What stands still, (n or 1, H, W).
    surface, slope = ground_surface(setting.ramp, columns)
    ground = coverage((rows - surface[:, None]) * slope.cos()[:, None])
    still = BACKDROP_GREY + (GROUND_GREY - BACKDROP_GREY) * ground
    labels = ((ground > 0.5) * GROUND).to(torch.uint8)
    grey = still[:, None]  # (n or 1, 1, H, W)
    layers = labels[:, None].expand(count, frames, height, width).clone()
    if setting.pendulum:
        rod = coverage(_rod_distance(centres[:, :, 0], columns, rows, width / height / 2))
        grey = grey + (ROD_GREY - grey) * rod
        layers[rod > 0.5] = ROD

    planes = [grey.expand(count, frames, height, width).clone() for _ in range(3)]
    for index in reversed(range(objects)):
        x, y = (part[..., None, None] for part in centres[:, :, index].unbind(-1))  # (n, T, 1, 1)
        size = sizes[:, :, index, None, None]
        right, down = columns - x, rows - y  # (n, T, 1, W) and (n, T, H, 1)
        if angles is None:
            distance = size - (right**2 + down**2).sqrt_()
        else:
            cos, sin = angles.cos()[..., None, None], angles.sin()[..., None, None]
            along, across = (right * cos + down * sin).abs_(), (down * cos - right * sin).abs_()
            core = size * (1 - ROUNDING)
            outside = ((along - core).clamp_(min=0) ** 2 + (across - core).clamp_(min=0) ** 2).sqrt_()
            distance = size - core - outside
            distance = torch.where(outside > 0, distance, size - torch.maximum(along, across))
        cover = coverage(distance) * (size > 0)
        # Brightest up and to the left, fading within one radius.
        toward = ((right + 0.4 * size) ** 2 + (down + 0.4 * size) ** 2).sqrt_()
        highlight = (1 - toward / size.clamp(min=1e-6)).clamp_(0, 1).mul_(HIGHLIGHT)
        for channel, plane in enumerate(planes):
            plane += cover * (colours[:, :, index, channel, None, None] + highlight - plane)
        layers[cover > 0.5] = FIRST_OBJECT + index
    if setting.panel is not None:
        left, edge = setting.panel[:, 0, None, None], setting.panel[:, 1, None, None]
        sideways = torch.minimum(columns - left, edge - columns)
        upright = torch.minimum(rows - PANEL_TOP, FLOOR - rows)
        panel = (coverage(sideways) * coverage(upright))[:, None]  # (n, 1, H, W)
        for plane in planes:
            plane += panel * (PANEL_GREY - plane)
        layers[(panel > 0.5).expand_as(layers)] = PANEL
    pixels = torch.empty(count, frames, height, width, 3, dtype=torch.uint8, device=device)
    for channel, plane in enumerate(planes):
        pixels[..., channel] = plane.mul_(255).add_(0.5).clamp_(0, 255).to(torch.uint8)
    return pixels, layers


def _rod_distance(bob: Tensor, columns: Tensor, rows: Tensor, pivot_x: float) -> Tensor:
    """Signed distance (n, T, H, W), positive inside, to the rod from pivot to bob (n, T, 2) and the pivot's disc."""
    reach_x, reach_y = ((part[..., None, None]) for part in (bob[..., 0] - pivot_x, bob[..., 1] - PIVOT_HEIGHT))
    right, down = columns - pivot_x, rows - PIVOT_HEIGHT
    along = ((right * reach_x + down * reach_y) / (reach_x**2 + reach_y**2)).clamp_(0, 1)
    rod = ROD_HALF_WIDTH - ((right - along * reach_x) ** 2 + (down - along * reach_y) ** 2).sqrt_()
    return torch.maximum(rod, PIVOT_RADIUS - (right**2 + down**2).sqrt())


def degrade(clips: Tensor, generator: torch.Generator, *, factor: int = 4, noise: float = 0.02) -> Tensor:
    """What a good but soft generator does to true clips: `factor` times smaller and back, plus Gaussian noise.

    Args: clips (N, T, H, W, 3) uint8; noise, standard deviation as a share of the full range. Returns the same shape.
    """
    count, frames, height, width, _ = clips.shape
    planes = clips.flatten(0, 1).permute(0, 3, 1, 2).float()
    small = torch.nn.functional.avg_pool2d(planes, factor)
    soft = torch.nn.functional.interpolate(small, size=(height, width), mode="bilinear", align_corners=False)
    soft += 255 * noise * torch.randn(soft.shape, generator=generator, device=generator.device).to(soft.device)
    return soft.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).unflatten(0, (count, frames))
