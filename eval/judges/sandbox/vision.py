"""From pixels to measurements: finds the sandbox's objects by hue and averages what stands still.

Everything but the objects is grey, so a pixel's chroma vector is (coverage of the object) x (chroma of its colour),
whatever grey lies behind a soft or blurred edge. Projecting on a colour's hue therefore gives the coverage itself, and
area, centre and spread follow as moments, with sub-pixel accuracy.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from eval.sandbox.world import BACKDROP_GREY, CHROMA, COLOUR_NAMES, PIVOT_HEIGHT, ROD_GREY

NOISE_COVERAGE = 0.12  # coverage below which a pixel counts as noise ...
SURE_COVERAGE = 0.25  # ... and from which on it counts in full
GREY_COVERAGE = 0.15  # largest chroma (as a coverage) of a pixel that counts as background
SMALLEST_AREA = 0.004  # u^2, an object below that is not seen (a true one has 0.016 at least)


@dataclass
class Seen:
    """What is seen in N clips; lengths in frame heights (u)."""

    area: Tensor  # (N, T, K) u^2
    centres: Tensor  # (N, T, K, 2) u; where an object is not found, its last place (before the first: its first)
    found: Tensor  # (N, T, K) bool
    spread: Tensor  # (N, T, K) mean squared radius / that of a disc of the same area: 1 for a disc, 1.05 for a square
    stray: Tensor  # (N, T) u^2 of chroma that belongs to none of the K objects
    still: Tensor  # (N, H, W) grey level of the background, averaged over the frames in which it shows
    flicker: Tensor  # (N,) mean absolute deviation of background pixels from `still`, grey levels
    rod: Tensor  # (N,) how dark the line from the pivot to the first object is: 0 as the backdrop, 1 as a rod
    palette: Tensor  # (N, 6) share of each palette colour in all the chroma of the clip, before K colours were chosen
    pixel: float  # u, side of a pixel
    aspect: float  # width / height


def chroma_planes(frames: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """frames (..., 3) uint8 -> two chroma coordinates, in units of an object's chroma, and grey; each (...)."""
    red, green, blue = (frames[..., channel].float() for channel in range(3))
    first = red - 0.5 * (green + blue)
    second = (math.sqrt(3) / 2) * (green - blue)
    grey = (red + green + blue).mul_(1 / (3 * 255))
    return first.mul_(1 / (255 * CHROMA)), second.mul_(1 / (255 * CHROMA)), grey


def hue_coverage(first: Tensor, second: Tensor, hue: Tensor, partner_side: Tensor) -> Tensor:
    """Coverage (n, T, H, W) of the palette colour `hue` (n,): 1 on it, 0 at the neighbouring hues (60 degrees away).

    partner_side (n,) is +1 (-1) when a second object has the hue 120 degrees further (back): between the two, a mixture
    of both colours at their contact is then split exactly, instead of being read as the hue that lies between.
    """
    angle = hue.float() * (torch.pi / 3)
    cos, sin = angle.cos()[:, None, None, None], angle.sin()[:, None, None, None]
    along = first * cos + second * sin
    across = second * cos - first * sin
    slope = 1 / math.sqrt(3)
    side = partner_side.float()[:, None, None, None]
    coverage = along.addcmul_((across * side).clamp_(min=0), torch.tensor(2 * slope, device=first.device))
    return coverage.sub_(across.abs_(), alpha=slope).clamp_(min=0)


def _drop_noise(coverage: Tensor) -> Tensor:
    return coverage * ((coverage - NOISE_COVERAGE) / (SURE_COVERAGE - NOISE_COVERAGE)).clamp_(0, 1)


def choose_hues(first: Tensor, second: Tensor, requested: Tensor) -> tuple[Tensor, Tensor]:
    """Which palette colours the objects have.

    Args: chroma planes (n, T, H, W); requested (n, K) hues of the prompt, -1 where it names none.
    Returns: hues (n, K): the requested ones when they hold at least half as much chroma as the K strongest, otherwise
    the strongest, a requested one among them keeping its place; and the palette shares (n, 6).
    """
    every = slice(None, None, 4)
    first, second = first[:, every], second[:, every]
    count, objects = requested.shape
    none = torch.zeros(count, device=first.device)
    shares = torch.stack(
        [
            _drop_noise(hue_coverage(first, second, torch.full_like(none, hue), none)).sum(dim=(1, 2, 3))
            for hue in range(len(COLOUR_NAMES))
        ],
        dim=1,
    )  # (n, 6)
    strongest = shares.topk(objects, dim=1)  # (n, K)
    wanted = shares.gather(1, requested.clamp(min=0))
    keep = ((requested >= 0) & (wanted >= 0.5 * strongest.values[:, -1:])).all(dim=1)
    fallback = strongest.indices
    if objects == 2:
        swap = (fallback[:, 0] == requested[:, 1]) | (fallback[:, 1] == requested[:, 0])
        fallback = torch.where(swap[:, None], fallback.flip(1), fallback)
    hues = torch.where(keep[:, None], requested, fallback)
    return hues, shares / shares.sum(dim=1, keepdim=True).clamp(min=1e-6)


def observe(frames: Tensor, requested: Tensor) -> Seen:
    """Measure N clips.

    Args: frames (N, T, H, W, 3) uint8; requested (N, K) hue indices of the prompt's colours, -1 where none is named.
    """
    height, width = frames.shape[2:4]
    objects = requested.shape[1]
    pixel = 1 / height
    first, second, grey = chroma_planes(frames)
    hues, palette = choose_hues(first, second, requested)
    columns = (torch.arange(width, device=frames.device) + 0.5) * pixel
    rows = (torch.arange(height, device=frames.device) + 0.5) * pixel

    chroma = (first**2 + second**2).sqrt_()
    explained = torch.zeros_like(chroma)
    areas, centres, spreads = [], [], []
    for index in range(objects):
        side = torch.zeros(len(frames), device=frames.device)
        if objects == 2:
            ahead = (hues[:, 1 - index] - hues[:, index]) % 6
            side = (ahead == 2).float() - (ahead == 4).float()
        coverage = _drop_noise(hue_coverage(first, second, hues[:, index], side))
        explained += coverage
        by_column, by_row = coverage.sum(dim=2), coverage.sum(dim=3)  # (n, T, W), (n, T, H)
        mass = by_column.sum(dim=2).clamp(min=1e-6)
        x, y = by_column @ columns / mass, by_row @ rows / mass
        variance = by_column @ columns**2 / mass - x**2 + by_row @ rows**2 / mass - y**2
        area = mass * pixel**2
        areas.append(area)
        centres.append(torch.stack([x, y], dim=-1))
        spreads.append(variance * 2 * torch.pi / area.clamp(min=SMALLEST_AREA))
    area = torch.stack(areas, dim=-1)
    found = area > SMALLEST_AREA
    stray = _drop_noise((chroma - explained).clamp_(min=0)).sum(dim=(2, 3)) * pixel**2

    held = _hold(torch.stack(centres, dim=2), found)
    rod = _rod_darkness(grey, held[:, :, 0], width / height / 2)
    background = (chroma < GREY_COVERAGE).float()
    shown = background.sum(dim=1)  # (n, H, W) number of frames
    still = (background * grey).sum(dim=1) / shown.clamp(min=1)
    deviation = (grey.sub_(still[:, None]).abs_().mul_(background)).sum(dim=(1, 2, 3))
    return Seen(
        area=area,
        centres=held,
        found=found,
        spread=torch.stack(spreads, dim=-1),
        stray=stray,
        still=still,
        flicker=deviation / background.sum(dim=(1, 2, 3)).clamp(min=1),
        rod=rod,
        palette=palette,
        pixel=pixel,
        aspect=width / height,
    )


def _rod_darkness(grey: Tensor, bob: Tensor, pivot_x: float) -> Tensor:
    """Mean darkness (n,) of five points between pivot and bob (n, T, 2), over all frames of grey (n, T, H, W)."""
    height, width = grey.shape[2:]
    pivot = torch.tensor([pivot_x, PIVOT_HEIGHT], device=grey.device)
    share = torch.linspace(0.2, 0.65, 5, device=grey.device)[:, None]
    points = pivot + (bob[:, :, None] - pivot) * share  # (n, T, 5, 2)
    column = (points[..., 0] * height).long().clamp(0, width - 1)
    row = (points[..., 1] * height).long().clamp(0, height - 1)
    samples = grey.flatten(2).gather(2, row * width + column)
    return ((BACKDROP_GREY - samples) / (BACKDROP_GREY - ROD_GREY)).mean(dim=(1, 2))


def _hold(centres: Tensor, found: Tensor) -> Tensor:
    """Where an object (N, T, K) is not found, its place is the last one known, or the first one before that."""
    frames = torch.arange(found.shape[1], device=found.device)[None, :, None]
    last = torch.where(found, frames, -1).cummax(dim=1).values
    start = found.float().argmax(dim=1, keepdim=True)
    source = torch.where(last >= 0, last, start)
    return centres.gather(1, source[..., None].expand_as(centres))
