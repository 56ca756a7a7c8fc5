"""Point tracks by optical flow: OpenCV's pyramidal Lucas-Kanade. No weights, no GPU, for want of a learnt tracker.

Each point is followed from frame to frame, and lost, for good, when

    - its surroundings in frame 0 are flat: there is nothing to follow;
    - the flow from the next frame back does not return to where it came from (forward-backward error);
    - its surroundings no longer look as they did in frame 0: it is hidden, or was carried off by what passed;
    - it leaves the frame.

What a flow cannot know: a point beside a moving edge on a plain background moves with that edge, up to about a pixel
or two away from it. Windows are colour: two colours of one brightness are told apart.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

Tracker = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]

LEAST_WINDOW = 9  # pixels, the smallest window
LEVELS = 2  # of the pyramid above the frames themselves: motions of many pixels per frame
STOP = (3, 30, 0.01)  # cv2.TermCriteria: by count (30 steps) or accuracy (0.01 pixels)
LEAST_CONTRAST = 0.5  # grey levels; surroundings with a smaller standard deviation are flat


@dataclass
class LucasKanadeConfig:
    window: float = 0.06  # side of the window that is matched, in frame heights; never below 9 pixels
    max_return: float = 1.0  # pixels between a point and where the flow there and back ends
    max_change: float = 20.0  # grey levels, mean over a point's surroundings, against frame 0

    def __post_init__(self) -> None:
        if not 0 < self.window <= 1:
            raise ValueError(f"lucas_kanade.window={self.window}: use a share of the frame's height, such as 0.06")
        for name in ("max_return", "max_change"):
            if not getattr(self, name) > 0:
                raise ValueError(f"lucas_kanade.{name}={getattr(self, name)}: use a number above 0")


def check(config: LucasKanadeConfig) -> None:
    """ValueError, before any work, where OpenCV is not installed."""
    try:
        import cv2  # noqa: F401
    except ImportError as error:
        raise ValueError(
            "tracks=lucas_kanade needs OpenCV: pip install 'physalign[trackers]' (opencv-python-headless)"
        ) from error


def build(config: LucasKanadeConfig, device: torch.device | str) -> Tracker:
    """The tracker: track(frames (T,H,W,3) uint8, queries (N,2) in [0,1]) -> tracks (T,N,2) float32, visible (T,N) bool.

    queries are points of frame 0. A point is invisible from the frame in which it is lost, and stays where it was last
    seen. Runs on the CPU; the result is on `device`. Raises ValueError where OpenCV is not installed.
    """
    check(config)

    @torch.no_grad()
    def track(frames: Tensor, queries: Tensor) -> tuple[Tensor, Tensor]:
        frames, queries = frames.cpu(), queries.cpu().float()
        size = queries.new_tensor([frames.shape[2], frames.shape[1]])  # width, height
        window = max(LEAST_WINDOW, round(config.window * frames.shape[1])) | 1
        first = _surroundings(frames[0], queries, window)  # (N,9,3)
        tracks, alive = [queries], first.std(dim=1).amax(dim=1) >= LEAST_CONTRAST
        visible = [alive]
        for before, after in zip(frames[:-1], frames[1:], strict=True):
            place = tracks[-1]
            moved, returned = _there_and_back(before, after, place[alive] * size - 0.5, window)
            moved = (moved + 0.5) / size  # pixel i is centred at (i + 0.5) / size
            good = (returned <= config.max_return) & ((moved >= 0) & (moved <= 1)).all(dim=1)
            change = (_surroundings(after, moved, window) - first[alive]).abs().mean(dim=(1, 2))
            good &= change <= config.max_change
            chosen = alive.nonzero()[good, 0]
            alive = torch.zeros_like(alive).scatter(0, chosen, True)
            tracks.append(place.index_put((chosen,), moved[good]))
            visible.append(alive)
        return torch.stack(tracks).to(device), torch.stack(visible).to(device)

    return track


def _there_and_back(before: Tensor, after: Tensor, points: Tensor, window: int) -> tuple[Tensor, Tensor]:
    """Flow of `points` (N,2) pixels: where they are in the next frame (N,2), and how far from their start the flow from
    there ends in this one (N,), infinite where there is none."""
    import cv2

    if len(points) == 0:
        return points, points[:, 0]
    settings = {"winSize": (window, window), "maxLevel": LEVELS, "criteria": STOP}
    images = before.contiguous().numpy(), after.contiguous().numpy()
    start = points.numpy()[:, None]  # (N,1,2)
    there, found, _ = cv2.calcOpticalFlowPyrLK(*images, start, None, **settings)
    back, found_back, _ = cv2.calcOpticalFlowPyrLK(*images[::-1], there, None, **settings)
    error = np.linalg.norm(back - start, axis=2)  # (N,1)
    error[(found == 0) | (found_back == 0) | ~np.isfinite(error)] = np.inf
    return torch.from_numpy(there[:, 0]), torch.from_numpy(error[:, 0])


def _surroundings(frame: Tensor, points: Tensor, window: int) -> Tensor:
    """What a frame (H,W,3) shows at points (N,2), each in [0,1], and around them: (N,9,3) float32.

    3 x 3 values, interpolated, that span the middle third of the window: a smallest window's are neighbouring pixels.
    """
    height, width, _ = frame.shape
    steps = torch.tensor([-1.0, 0.0, 1.0]) * window / LEAST_WINDOW  # pixels
    offsets = torch.cartesian_prod(steps, steps) / torch.tensor([width, height])  # (9,2)
    where = (points[:, None] + offsets) * 2 - 1  # (N,9,2), -1 ... 1 from edge to edge
    image = frame.permute(2, 0, 1)[None].float()  # (1,3,H,W)
    values = F.grid_sample(image, where[None], padding_mode="border", align_corners=False)  # (1,3,N,9)
    return values[0].permute(1, 2, 0)
