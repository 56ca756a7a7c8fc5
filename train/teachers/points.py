"""Points of a clip: where they start, how they are stored, and which tokens of a video encoder they visit.

What the files here share, and what training needs to read the targets of a group (`data_pipeline/stages/targets.py`) or
to make them on the fly. A point is (x, y), each in [0, 1] inside the frame, as in `losses.regions`.

Shapes: T frames, N points, K tokens, H W rows and columns of a grid.
"""

import torch
from torch import Tensor

from losses.regions import rasterize

STEPS = 65535  # of a stored coordinate


def query_grid(side: int) -> Tensor:
    """The centres of side x side equal cells, row by row: (side^2, 2) float32, the points to be tracked from frame 0.

    By hand: side 2 gives (0.25, 0.25), (0.75, 0.25), (0.25, 0.75), (0.75, 0.75).
    """
    centres = (torch.arange(side, dtype=torch.float32) + 0.5) / side
    y, x = torch.meshgrid(centres, centres, indexing="ij")
    return torch.stack([x, y], dim=-1).flatten(0, 1)


def pack(points: Tensor) -> Tensor:
    """Coordinates in [0, 1] as uint16 fixed point.

    The largest error is 1 / 131070 of the frame, 0.006 pixels at a width of 832. float16 takes the same bytes and is
    up to 0.20 pixels off there, more than many points move from one frame to the next.
    """
    return (points.float() * STEPS).round().to(torch.int32).to(torch.uint16)


def unpack(points: Tensor) -> Tensor:
    """What `pack` gave, as float32 in [0, 1]."""
    return points.to(torch.int32).float() / STEPS


def look_up(image: Tensor, points: Tensor) -> Tensor:
    """The values of the pixels that points lie in: image (..., H, W) and points (..., N, 2) -> (..., N).

    Points outside of the frame read its edge. Cells are found in float32, as `losses.regions.rasterize` does.
    """
    height, width = image.shape[-2:]
    points = points.float()
    column = (points[..., 0] * width).long().clamp(0, width - 1)
    row = (points[..., 1] * height).long().clamp(0, height - 1)
    return image.flatten(-2).gather(-1, row * width + column)


def token_mask(tracks: Tensor, visible: Tensor, keep: Tensor, frames: Tensor, size: tuple[int, int]) -> Tensor:
    """The tokens that kept points visit while they are visible: (F,H,W) bool, PhysisForcing eqs. 4 and 10.

    tracks (T,N,2), visible (T,N) bool, keep (N,) bool; frames (F,P): the frames of the clip that each slice of tokens
    saw; size: (H, W) of a slice. A token counts when a point is in it in any of its slice's frames.
    """
    # Rasterised frame by frame, for what is kept differs: an occluded point is somewhere, but is not seen there.
    drawn = rasterize(tracks[:, None], keep & visible, size)[:, 0]  # (T,H,W)
    return drawn[frames].any(dim=1)


def choose_tokens(mask: Tensor, most: int) -> Tensor:
    """At most `most` of the marked tokens, evenly spaced in their order: (K,) int64 indices into the flattened mask.

    No chance is involved: each frame keeps its share, and equal masks give equal tokens on every device.

    By hand: marked 2, 3, 5, 7, 8 and most 3 gives places floor((i + 0.5) 5 / 3) = 0, 2, 4: tokens 2, 5, 8.
    """
    marked = mask.flatten().nonzero()[:, 0]
    if len(marked) <= most:
        return marked
    places = torch.arange(most, device=mask.device) * 2 + 1  # in half steps: whole numbers have no rounding
    return marked[places * len(marked) // (2 * most)]
