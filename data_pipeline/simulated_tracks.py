"""Point tracks, visibility and nearness of a simulated clip, from the simulator that made it.

The robots' follows points itself (eval/robots/render.py). The sandbox's knows the centres of a few objects. Here every
point of frame 0 belongs to what its pixel shows, and moves with it: with the object (a block also turns), with the
pendulum's rod about its pivot, or, on backdrop, ground and panel, not at all. A ball does not turn, for it is drawn so.
"""

import torch
from torch import Tensor

from eval.robots.demonstrations import Demonstration
from eval.sandbox.clips import Clips
from eval.sandbox.ramp import BEND
from eval.sandbox.world import FIRST_OBJECT, PIVOT_HEIGHT, ROD
from train.teachers.points import look_up


def simulated_tracks(clip: Clips | Demonstration, queries: Tensor) -> tuple[Tensor, Tensor]:
    """Follow the points `queries` (N,2), given in frame 0, through one clip (a `Clips` of length 1, or a robot's).

    Returns tracks (T,N,2) float32 in [0, 1] and visible (T,N) bool: whether the pixel at the point shows the layer that
    the point belongs to. A point that leaves the frame is invisible and stays at its edge.
    """
    if isinstance(clip, Demonstration):
        tracks, visible = clip.follow(queries.cpu().double().numpy())
        return torch.from_numpy(tracks), torch.from_numpy(visible)
    layers = clip.layers[0].cpu().long()  # (T,H,W)
    num_frames, height, width = layers.shape
    aspect = width / height
    shape = torch.tensor([aspect, 1.0], dtype=torch.float64)  # of the frame, u
    queries = queries.cpu().double()
    belongs = look_up(layers[0], queries)  # (N,) layer
    start = queries * shape  # (N,2) u
    centres = clip.tracks[0].cpu().double() * shape  # (T,K,2) u

    shift = torch.zeros(num_frames, len(queries), 2, dtype=torch.float64)  # u
    for index in range(centres.shape[1]):
        own = belongs == FIRST_OBJECT + index
        shift[:, own] = _shift(start[own], centres[:, index], _turns(clip, centres[:, index], aspect))
    pivot = torch.tensor([aspect / 2, PIVOT_HEIGHT], dtype=torch.float64)
    rod = centres[:, 0] - pivot  # (T,2)
    own = belongs == ROD
    shift[:, own] = _shift(start[own], pivot.expand(num_frames, 2), torch.atan2(rod[:, 1], rod[:, 0]))

    tracks = queries + shift / shape
    inside = ((tracks >= 0) & (tracks <= 1)).all(dim=-1)
    visible = inside & (look_up(layers, tracks) == belongs)
    return tracks.clamp(0, 1).float(), visible


def simulated_disparity(clip: Clips | Demonstration) -> Tensor:
    """Nearness of every pixel of the first frame: (H,W) float32, 1 / depth scaled to [0, 1] over the frame."""
    depth = torch.from_numpy(clip.depth[0]) if isinstance(clip, Demonstration) else clip.depth[0, 0].cpu()
    disparity = 1 / depth
    low, high = disparity.min(), disparity.max()  # floor and backdrop are in every scene, so they differ
    return (disparity - low) / (high - low)


def _shift(points: Tensor, centres: Tensor, angles: Tensor) -> Tensor:
    """How far points (N,2) at rest in a body have moved since frame 0: (T,N,2), exactly 0 there.

    The body is at `centres` (T,2) and turned clockwise by `angles` (T,) radians.
    """
    turn = angles - angles[0]
    cos, sin = turn.cos()[:, None], turn.sin()[:, None]  # (T,1)
    arm = points - centres[0]
    x, y = arm.unbind(-1)  # (N,)
    turned = torch.stack([x * cos - y * sin, x * sin + y * cos], dim=-1)  # (T,N,2)
    return (centres - centres[0])[:, None] + (turned - arm)


def _turns(clip: Clips, centres: Tensor, aspect: float) -> Tensor:
    """(T,) radians by which an object with the centres (T,2) u is turned: the block by the slope beneath it."""
    values = clip.parameters[0]
    if clip.scenes[0] != "ramp":
        return torch.zeros(len(centres), dtype=torch.float64)
    mirrored = clip.attributes[0]["direction"] == "left"
    x = aspect - centres[:, 0] if mirrored else centres[:, 0]
    # Along the fillet x = begin + BEND (sin slope - sin angle), see eval/sandbox/ramp.py.
    slope = torch.tensor(values["slope"], dtype=torch.float64)
    begin = values["foot"] + values["half_side"] * (slope / 2).tan() - BEND * (slope / 2).tan() * slope.cos()
    angle = (slope.sin() - (x - begin) / BEND).clamp(min=0).minimum(slope.sin()).asin()
    return -angle if mirrored else angle
