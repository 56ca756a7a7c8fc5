"""Physics-informative regions of a clip, from point tracks (PhysisForcing, section 3.1, eqs. 1-4).

    m_i = sum_t |p_i(t + 1) - p_i(t)|        motion of point i                                 eq. 1
    q_i = w_i m_i                            w_i in [0, 1]: how near the point is at first     eq. 2
    M_i = [q_i > mean_j q_j]                 the tracks that supervise the network             eq. 3
    R(t, p) = 1 where a chosen track is      the mask of tokens, frame by frame                eq. 4

Points are (x, y), each in [0, 1] inside the frame: cell (row, column) of an H x W grid covers x in [column / W,
(column + 1) / W] and y likewise, whatever the grid: pixels, latents or a teacher's tokens.

Shapes: B clips, T frames, N points, H W rows and columns of a grid. Everything is float32 inside; nothing has a
gradient worth keeping.
"""

import torch
from torch import Tensor

RULES = ("mean", "top_k", "all")


def motion_magnitude(tracks: Tensor, *, aspect: float = 1.0) -> Tensor:
    """Length of each point's path, eq. 1: tracks (B,T,N,2) -> (B,N) float32, in frame heights.

    aspect: width / height of the frame. x is multiplied by it, so that a pixel counts the same in both directions.
    Deviation: the paper sums pixels; the unit makes no difference to eq. 3. A single frame gives 0.

    By hand: (0, 0) -> (0.3, 0.4) -> (0.3, 0.5) with aspect 1 is 0.5 + 0.1 = 0.6; with aspect 2 the first step is
    |(0.6, 0.4)| = 0.721110, the sum 0.821110.
    """
    steps = tracks.float().diff(dim=1)  # (B,T-1,N,2)
    scale = steps.new_tensor([aspect, 1.0])
    return (steps * scale).norm(dim=-1).sum(dim=1)


def select_tracks(motion: Tensor, foreground: Tensor, *, rule: str = "mean", top_k: int | None = None) -> Tensor:
    """The points that move most in the foreground, by q = motion * foreground, eqs. 2-3: two (B,N) -> (B,N) bool.

    foreground: nearness of each point in [0, 1]. It is a disparity: a depth would favour the background.
    rule: "mean" (section 3.1) keeps q above its mean over the points; "top_k" (appendix A) keeps the `top_k` points
    with the largest q, among equal ones the first. A point with q = 0 is never kept, so a clip in which nothing moves
    keeps none under either rule, and `top_k` may keep fewer than top_k points. "all" keeps every point, moving or not:
    the losses without their focus on regions (Table 5).

    Raises ValueError for another rule, and for "top_k" without a top_k of at least 1.

    By hand: motion (4, 1, 2, 0), foreground (0.5, 1, 1, 1): q = (2, 1, 2, 0), mean 1.25, keeps (1, 0, 1, 0); the two
    best are the same, the three best (1, 1, 1, 0), and the four best the same three.
    """
    score = motion.float() * foreground.float()  # q, (B,N)
    if rule == "mean":
        return score > score.mean(dim=1, keepdim=True)
    if rule == "all":
        return torch.ones_like(score, dtype=torch.bool)
    if rule != "top_k":
        raise ValueError(f"rule={rule!r} is unknown: choose one of {', '.join(RULES)}")
    if top_k is None or top_k < 1:
        raise ValueError(f"rule='top_k' needs top_k of 1 or more, not {top_k}")
    best = score.argsort(dim=1, descending=True, stable=True)[:, :top_k]
    return torch.zeros_like(score, dtype=torch.bool).scatter(1, best, True) & (score > 0)


def rasterize(tracks: Tensor, keep: Tensor, size: tuple[int, int]) -> Tensor:
    """The cells that the kept points visit, eq. 4: tracks (B,T,N,2), keep (B,N) bool -> (B,T,H,W) bool, size = (H, W).

    A point marks the cell that it lies in, the one with the nearest centre; on a line between two it marks the latter,
    and x = 1 or y = 1 the last. A point outside of the frame, or not a number, marks none.
    Deviation: the paper marks pixels and resizes the mask to the tokens; marking the tokens themselves keeps every
    token that a point visits, where resizing would lose thin regions.

    By hand: on a 2 x 4 grid (0.3, 0.5) lies in column floor(1.2) = 1 of row floor(1.0) = 1, and (1, 0) in column 3 of
    row 0.
    """
    height, width = size
    x, y = tracks.float().unbind(-1)  # (B,T,N) each
    drawn = keep[:, None] & (x >= 0) & (x <= 1) & (y >= 0) & (y <= 1)
    column = (torch.where(drawn, x, 0) * width).long().clamp(max=width - 1)
    row = (torch.where(drawn, y, 0) * height).long().clamp(max=height - 1)
    cell = torch.where(drawn, row * width + column, height * width)  # one more cell takes what is not drawn
    mask = torch.zeros(*cell.shape[:2], height * width + 1, dtype=torch.bool, device=cell.device)
    return mask.scatter_(2, cell, True)[..., :-1].unflatten(2, (height, width))
