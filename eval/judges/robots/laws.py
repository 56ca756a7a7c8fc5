"""Errors of a robot's clip, measured without knowing what should happen: each (N,), 0 for a perfect world.

The object is a rigid body that only the robot moves. It may be hidden by the robot, and by nothing else but its own
fixture, whose share of hiding is the task's and part of the tolerance (see `judge.TOLERANCES`).
"""

import torch
from torch import Tensor

from eval.judges.robots.vision import NEAR, SMALLEST, Seen, grow

COASTING = 0.8  # of an object's speed that it keeps per frame while the hand is near and hides it
MOST = 10.0  # errors are cut there: nothing is measured


def errors(seen: Seen) -> dict[str, Tensor]:
    change, touched = _changes(seen)
    whole, size = _whole(seen)
    return {
        "permanence": _missing(seen),
        "hand": _missing_hand(seen),
        "contact": _untouched(change, touched).clamp(max=MOST),
        "jump": change.amax(dim=1).clamp(max=MOST),
        "shape": _deformation(seen, whole, size),
        "background": _flicker(seen),
    }


def moved(seen: Seen) -> Tensor:
    """(N,) share of the object's size by which first and last frame differ, where the robot hides it in neither."""
    ends = seen.object[:, [0, -1]]
    free = 1 - grow(seen.robot[:, [0, -1]], 1).amax(dim=1)
    difference = ((ends[:, 0] - ends[:, 1]).abs() * free).sum(dim=(1, 2))
    return difference / ends[:, 0].sum(dim=(1, 2)).clamp(min=SMALLEST * free[0].numel())


def _near(seen: Seen) -> int:
    return max(2, round(NEAR * seen.object.shape[2]))


def _changes(seen: Seen) -> tuple[Tensor, Tensor]:
    """How much of the object's picture changes from each frame to the next, as a share of its size, outside of what
    the robot covers in either; and whether the hand is near enough to touch it. (N, T - 1) each."""
    thing, covered = seen.object, grow(seen.robot, 1)
    free = 1 - torch.maximum(covered[:, 1:], covered[:, :-1])
    difference = ((thing[:, 1:] - thing[:, :-1]).abs() * free).mean(dim=(2, 3))
    change = difference / seen.area(thing).amax(dim=1, keepdim=True).clamp(min=SMALLEST)
    close = (grow(seen.robot, _near(seen)) * thing).amax(dim=(2, 3)) > 0
    # An object that the robot hides altogether may be touched as well.
    hidden = seen.area(thing) <= SMALLEST
    close = close | hidden
    return change, close[:, 1:] | close[:, :-1]


def _untouched(change: Tensor, touched: Tensor) -> Tensor:
    """The change of the object while nothing is near it, beyond what a push allows: it may go on as fast as when it was
    last touched, and gets slower only. change, touched (N, T - 1)."""
    total = momentum = torch.zeros_like(change[:, 0])
    for now, near in zip(change.unbind(dim=1), touched.unbind(dim=1), strict=True):
        total = total + torch.where(near, 0.0, (now - momentum).clamp(min=0))
        momentum = torch.where(near, torch.maximum(now, COASTING * momentum), torch.minimum(now, momentum))
    return total


def _missing(seen: Seen) -> Tensor:
    """The largest share of the object that is gone in a frame beyond what the robot may hide there, where it was last
    seen: its pixels in the box around that place."""
    mask = seen.object
    full = seen.area(mask)[:, 0].clamp(min=SMALLEST)  # its size: what is seen in the first frame
    last = mask[:, 0]
    worst = torch.zeros_like(full)
    for frame in range(1, mask.shape[1]):
        now = mask[:, frame]
        around = grow(torch.maximum(last, now)[:, None], _near(seen))[:, 0]
        hiding = (around * seen.robot[:, frame]).mean(dim=(1, 2))
        worst = torch.maximum(worst, 1 - (now.mean(dim=(1, 2)) + hiding) / full)
        last = torch.where((now.mean(dim=(1, 2)) > SMALLEST)[:, None, None], now, last)
    return worst.clamp(0, 1)


def _missing_hand(seen: Seen) -> Tensor:
    """The largest share of the hand's size that is gone in three frames out of four that follow each other; the arm
    may hide it for a moment, and it may leave the frame together with the arm's end."""
    area = seen.area(seen.hand)
    share = 1 - area / area.median(dim=1, keepdim=True).values.clamp(min=SMALLEST)
    return share.clamp(0, 1).unfold(1, 4, 1).sort(dim=-1).values[..., 1].amax(dim=1)


def _whole(seen: Seen) -> tuple[Tensor, Tensor]:
    """Frames (N, T) in which no part of the robot is near the object, and the object's sizes (N, T, 3): the logarithms
    of its area's root and of its two principal lengths."""
    near = (grow(seen.robot, 2) * seen.object).amax(dim=(2, 3)) > 0
    area, (centre, there) = seen.area(seen.object), seen.middle(seen.object)
    height, width = seen.object.shape[2:]
    x = (torch.arange(width, device=area.device) + 0.5) / height
    y = (torch.arange(height, device=area.device) + 0.5) / height
    total = seen.object.sum(dim=(2, 3)).clamp(min=1)
    columns, rows = seen.object.sum(dim=2), seen.object.sum(dim=3)
    xx = columns @ x**2 / total - centre[..., 0] ** 2
    yy = rows @ y**2 / total - centre[..., 1] ** 2
    xy = torch.einsum("nthw,w,h->nt", seen.object, x, y) / total - centre[..., 0] * centre[..., 1]
    mean, spread = (xx + yy) / 2, (((xx - yy) / 2) ** 2 + xy**2).sqrt()
    least = (0.5 / height) ** 2 / 3  # of a pixel
    lengths = torch.stack([area.clamp(min=SMALLEST), mean + spread + least, (mean - spread).clamp(min=0) + least], -1)
    return there & ~near, 0.5 * lengths.log()


def _deformation(seen: Seen, whole: Tensor, size: Tensor) -> Tensor:
    """How far the object's sizes (N, T, 3) range over the frames in which all of it shows, in natural logarithms."""
    many = whole.sum(dim=1) >= 2
    low = torch.where(whole[..., None], size, torch.inf).amin(dim=1)
    high = torch.where(whole[..., None], size, -torch.inf).amax(dim=1)
    return torch.where(many, (high - low).amax(dim=1), 0.0).clamp(max=MOST)


def _flicker(seen: Seen) -> Tensor:
    """Mean change of brightness from one frame to the next where neither robot nor object nor goal is or was."""
    taken = grow((seen.robot + seen.object + seen.goal).clamp(max=1), 2)
    free = 1 - torch.maximum(taken[:, 1:], taken[:, :-1])
    difference = (seen.grey[:, 1:] - seen.grey[:, :-1]).abs() * free
    return difference.sum(dim=(1, 2, 3)) / free.sum(dim=(1, 2, 3)).clamp(min=1)
