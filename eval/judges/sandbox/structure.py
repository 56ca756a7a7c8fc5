"""What stands still in a clip: floor, ramp and panel, found in the averaged background, and how well they fit."""

import torch
from torch import Tensor

from eval.judges.sandbox.vision import Seen
from eval.sandbox.world import BACKDROP_GREY, FLOOR, GROUND_GREY, PANEL_GREY, PANEL_TOP

RISE = 0.05  # u above the floor from which a column of ground belongs to the ramp's straight part


def grid(seen: Seen) -> tuple[Tensor, Tensor]:
    """Pixel centres in u: columns (W,) and rows (H, 1)."""
    height, width = seen.still.shape[1:]
    steps = torch.arange(max(height, width), device=seen.still.device) + 0.5
    return steps[:width] * seen.pixel, (steps[:height] * seen.pixel)[:, None]


def ground_setting(seen: Seen, surface: Tensor) -> Tensor:
    """(N, H, W) grey levels of ground below a surface (N or 1, W) u."""
    _, rows = grid(seen)
    cover = (0.5 + (rows - surface[:, None]) / seen.pixel).clamp(0, 1)
    return BACKDROP_GREY + (GROUND_GREY - BACKDROP_GREY) * cover


def plain_setting(seen: Seen) -> Tensor:
    """(1, H, W) the backdrop with its floor."""
    columns, _ = grid(seen)
    return ground_setting(seen, torch.full_like(columns, FLOOR)[None])


def panel_setting(seen: Seen, left: Tensor, right: Tensor) -> Tensor:
    """(N, H, W) with a panel between left and right (N, 1) u."""
    columns, rows = grid(seen)
    sideways = torch.minimum(columns - left, right - columns)  # (N, W)
    upright = torch.minimum(rows - PANEL_TOP, FLOOR - rows)  # (H, 1)
    cover = (0.5 + sideways / seen.pixel).clamp(0, 1)[:, None] * (0.5 + upright / seen.pixel).clamp(0, 1)
    plain = plain_setting(seen)
    return plain + (PANEL_GREY - plain) * cover


def background_error(seen: Seen, expected: Tensor) -> Tensor:
    """(N,) mean grey-level difference from the expected setting, plus how much the background flickers.

    Compared in cells of 1/16 u, so that soft edges cost little.
    """
    cell = max(1, round(1 / (16 * seen.pixel)))
    difference = torch.nn.functional.avg_pool2d((seen.still - expected)[:, None], cell, ceil_mode=True)
    return difference.abs().mean(dim=(1, 2, 3)) + seen.flicker


def find_panel(seen: Seen) -> tuple[Tensor, Tensor]:
    """Left and right edge (N, 1) u of the dark panel; both 0 where there is none."""
    columns, rows = grid(seen)
    band = ((rows > PANEL_TOP + 0.1) & (rows < FLOOR - 0.1)).float()  # away from its upper edge and from the floor
    dark = ((BACKDROP_GREY - seen.still) / (BACKDROP_GREY - PANEL_GREY)).clamp(0, 1)
    cover = (dark * band).sum(dim=1) / band.sum()  # (N, W)
    cover = cover * (cover > 0.1)
    width = cover.sum(dim=1) * seen.pixel
    middle = (cover * columns).sum(dim=1) / cover.sum(dim=1).clamp(min=1e-6)
    return (middle - width / 2)[:, None], (middle + width / 2)[:, None]


def fit_ramp(seen: Seen) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The ground's surface (N, W) u, and the straight ramp in it: x of its foot on the floor (N,), slope (N,) in
    radians, and its direction (N,), 1 when it descends to the right and -1 to the left. Without a ramp the foot is 0.
    """
    columns, _ = grid(seen)
    cover = ((BACKDROP_GREY - seen.still) / (BACKDROP_GREY - GROUND_GREY)).clamp(0, 1)
    surface = 1 - cover.sum(dim=1) * seen.pixel  # (N, W)
    weight = (surface < FLOOR - RISE).float()
    total = weight.sum(dim=1).clamp(min=1)
    mean_x, mean_y = (weight * columns).sum(dim=1) / total, (weight * surface).sum(dim=1) / total
    offset = (columns - mean_x[:, None]) * weight
    gradient = (offset * (surface - mean_y[:, None])).sum(dim=1) / (offset**2).sum(dim=1).clamp(min=1e-4)
    steep = torch.where(gradient.abs() > 0.05, gradient, 0.05)
    foot = mean_x + (FLOOR - mean_y) / steep
    there = weight.sum(dim=1) >= 3
    foot = torch.where(there, foot.clamp(0, seen.aspect), 0.0)
    return surface, foot, gradient.abs().atan(), torch.where(gradient < 0, -1.0, 1.0)


def fit_line(times: Tensor, values: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """Least squares over the valid of (N, T): value at time 0 and slope, (N, 1) each; slope 0 with fewer than two."""
    weight = valid.float()
    total = weight.sum(dim=1, keepdim=True).clamp(min=1)
    mean_time = (weight * times).sum(dim=1, keepdim=True) / total
    mean = (weight * values).sum(dim=1, keepdim=True) / total
    offset = (times - mean_time) * weight
    slope = (offset * (values - mean)).sum(dim=1, keepdim=True) / (offset**2).sum(dim=1, keepdim=True).clamp(min=1e-4)
    return mean - slope * mean_time, slope


def visible_fraction(centre: Tensor, radius: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Share of a disc at x = centre (N, T) that a panel from left to right (N, 1) leaves visible."""

    def share_left_of(edge: Tensor) -> Tensor:
        reach = ((edge - centre) / radius.clamp(min=1e-3)).clamp(-1, 1)
        return (reach.asin() + reach * (1 - reach**2).clamp(min=0).sqrt()) / torch.pi + 0.5

    return 1 - (share_left_of(right) - share_left_of(left))
