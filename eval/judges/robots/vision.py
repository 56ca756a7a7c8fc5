"""From pixels to measurements of a robot's clip: hand, arm, goal and object found by hue, and what changes when.

Everything but these four is grey. Areas are in pixels, shares of the object's or hand's own size, or of the frame.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from eval.judges.sandbox.vision import chroma_planes, hue_coverage
from eval.robots.tasks import ARM, GOAL, HAND
from eval.sandbox.world import COLOUR_NAMES

SEEN = 0.2  # coverage from which a pixel counts as the colour's; faces in the shade have a third of full chroma
NEAR = 0.05  # frame heights: pixels of the hand nearer than that to the object may touch it
SMALLEST = 0.0003  # of the frame: a smaller patch is no object (the puck has 0.0015)
LOST = 0.5  # frame heights, the track error of what is not there


@dataclass
class Seen:
    """What is seen in N clips of T frames; masks (N, T, H, W) float, 0 or 1."""

    hand: Tensor
    robot: Tensor  # the hand as well
    goal: Tensor
    object: Tensor
    grey: Tensor  # (N, T, H, W) brightness in [0, 1]

    def area(self, mask: Tensor) -> Tensor:
        """(N, T) share of the frame."""
        return mask.mean(dim=(2, 3))

    def middle(self, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Centre (N, T, 2), x and y in frame heights, and whether there is one (N, T)."""
        height, width = mask.shape[2:]
        x = (torch.arange(width, device=mask.device) + 0.5) / height
        y = (torch.arange(height, device=mask.device) + 0.5) / height
        total = mask.sum(dim=(2, 3)).clamp(min=1)
        centre = torch.stack([mask.sum(dim=2) @ x, mask.sum(dim=3) @ y], dim=-1) / total[..., None]
        return centre, self.area(mask) > SMALLEST


def observe(frames: Tensor, colours: list[str]) -> Seen:
    """frames (N, T, H, W, 3) uint8; the object's colour in each clip."""
    first, second, grey = chroma_planes(frames)
    none = torch.zeros(len(frames), device=frames.device)
    robot_hues = [COLOUR_NAMES.index(name) for name in (HAND, ARM, GOAL)]
    hues = [torch.full_like(none, hue) for hue in robot_hues]
    hues.append(torch.tensor([float(COLOUR_NAMES.index(name)) for name in colours], device=frames.device))
    coverage = torch.stack([hue_coverage(first, second, hue, none) for hue in hues])  # (4, N, T, H, W)
    strongest = coverage.amax(dim=0)
    hand, arm, goal, thing = ((part == strongest) & (part > SEEN) for part in coverage)
    return Seen(*(mask.float() for mask in (hand, hand | arm, goal, thing)), grey)


def track_errors(seen: Seen, truth: Seen) -> dict[str, Tensor]:
    """`gripper_error` and `object_error` (N,): mean distance in frame heights between the centres of what is seen in N
    clips and in the true ones, over the frames in which these show it; LOST where the clip does not, and at most."""
    found = {}
    for name, mask in (("gripper_error", "hand"), ("object_error", "object")):
        (place, there), (true_place, truly) = (one.middle(getattr(one, mask)) for one in (seen, truth))
        distance = torch.where(there, (place - true_place).norm(dim=-1).clamp(max=LOST), LOST)
        found[name] = (distance * truly).sum(dim=1) / truly.sum(dim=1).clamp(min=1)
    return found


def grow(mask: Tensor, pixels: int) -> Tensor:
    """A mask (N, T, H, W) and all within `pixels` of it, in a square."""
    return F.max_pool2d(mask, 2 * pixels + 1, stride=1, padding=pixels)
