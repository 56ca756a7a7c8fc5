"""A block slides from rest down a ramp, round a short fillet and on along the floor, with Coulomb friction throughout.

Along the path of its centre, s'' = g . t - mu (g . n + v^2 k) with tangent t, normal n into the ground and curvature k
(0 on the straight parts, 1 / BEND on the fillet); midpoint rule, 16 steps a frame (error < 2e-4 u).
"""

import torch
from torch import Tensor

from eval.sandbox.world import FLOOR, FRICTION, Motion, Planted, Scene, Setting, World, inside, uniform

STEPS = 16  # midpoint steps a frame
BEND = 0.1  # u, radius of the centre's path between ramp and floor


def propose(count: int, generator: torch.Generator, world: World) -> dict[str, Tensor]:
    size = uniform(count, generator, 0.065, 0.085)
    slope = uniform(count, generator, 0.42, 0.63)  # 24 to 36 degrees
    length = uniform(count, generator, 0.2, 0.6)
    start = size + uniform(count, generator, 0.05, 0.15 * world.aspect)
    # The point where the two straight lines of the centre's path would meet lies `length` + the fillet's tangent ahead.
    meeting = start + (length + BEND * (slope / 2).tan()) * slope.cos()
    return {
        "half_side": size,
        "slope": slope,
        "length": length,
        "foot": meeting - size * (slope / 2).tan(),  # where the two straight lines of the ground meet
    }


def tangent_angle(path: Tensor, slope: Tensor) -> Tensor:
    """Angle of the path below the horizontal at arc lengths `path` counted from the fillet's start."""
    return (slope - path.clamp(min=0) / BEND).clamp(min=0)


def locate(path: Tensor, slope: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """x and y relative to the fillet's start, and tangent angle, at arc lengths `path` counted from there."""
    tangent = tangent_angle(path, slope)
    before, beyond = path.clamp(max=0), (path - BEND * slope).clamp(min=0)
    x = before * slope.cos() + BEND * (slope.sin() - tangent.sin()) + beyond
    y = before * slope.sin() + BEND * (tangent.cos() - slope.cos())
    return x, y, tangent


def move(parameters: dict[str, Tensor], world: World, planted: Planted) -> Motion:
    size, slope = parameters["half_side"], parameters["slope"]
    gravity_x, gravity_y = planted.gravity().unbind(-1)
    friction = FRICTION - 0.5 * planted.strength("energy")
    jump = 0.15 * planted.strength("teleport") * planted.sign

    def acceleration(path: Tensor, speed: Tensor, share: Tensor) -> Tensor:
        tangent = tangent_angle(path, slope)
        cos, sin = tangent.cos(), tangent.sin()
        bending = speed**2 / BEND * share
        drive = gravity_x * cos + gravity_y * sin
        limit = friction * ((gravity_y * cos - gravity_x * sin).clamp(min=0) + bending)
        # At rest friction only holds back what drives.
        grip = torch.where(speed == 0, drive.clamp(-limit, limit), limit * speed.sign())
        return drive - grip

    path, speed = -parameters["length"], torch.zeros_like(size)
    step = 1 / (world.fps * STEPS)
    paths = [path]
    for index in range((world.num_frames - 1) * STEPS):
        # The curvature jumps at the fillet's ends; a step counts it by the share of its way that lies on the fillet.
        ends = [point.clamp(min=0).minimum(BEND * slope) for point in (path, path + step * speed)]
        share = ((ends[1] - ends[0]) / (step * speed).clamp(min=1e-9)).clamp(0, 1)
        half = speed + 0.5 * step * acceleration(path, speed, share)
        moved = path + step * half
        faster = speed + step * acceleration(path + 0.5 * step * speed, half, share)
        speed = torch.where(faster * speed < 0, 0.0, faster)  # friction stops a block, it never turns it round
        time = index * step
        path = moved + jump * ((time <= planted.time) & (planted.time < time + step))
        if (index + 1) % STEPS == 0:
            paths.append(path)
    x, y, tangent = locate(torch.stack(paths, dim=1), slope[:, None])  # (N, T)
    tangent_length = BEND * (slope / 2).tan()
    meeting_x = parameters["foot"] + size * (slope / 2).tan()
    start_x = meeting_x - tangent_length * slope.cos()
    start_y = FLOOR - size - tangent_length * slope.sin()
    y = start_y[:, None] + y + planted.drop(world.times)
    return Motion(torch.stack([start_x[:, None] + x, y], dim=-1)[:, :, None], angles=tangent)


def accept(parameters: dict[str, Tensor], motion: Motion, world: World) -> Tensor:
    track = motion.centres[:, :, 0]
    drop = track[:, -1, 1] - track[:, 0, 1]
    last_step = (track[:, -1] - track[:, -2]).norm(dim=-1) * world.fps
    frames_on_ramp = (motion.angles > parameters["slope"][:, None] - 1e-6).sum(dim=1)
    frames_on_floor = (motion.angles < 1e-6).sum(dim=1)
    return (
        inside(motion.centres, 1.4 * parameters["half_side"], world)
        & (drop > 0.1)
        & (last_step > 0.1)  # still sliding at the end
        & (frames_on_ramp >= 0.35 * world.num_frames)
        & (frames_on_floor >= 3)
    )


def setting(parameters: dict[str, Tensor]) -> Setting:
    size = parameters["half_side"]
    return Setting(sizes=size, ramp=torch.stack([parameters["foot"], parameters["slope"], BEND + size], dim=-1))


KNOWN = ("gravity", "tilt", "teleport", "vanish", "colour", "sink", "energy")
SCENE = Scene(1, KNOWN, propose, move, accept, setting)
