"""A ball is thrown sideways, falls and bounces on the floor. Exact: parabolas joined at the exact moments of impact."""

import torch
from torch import Tensor

from eval.sandbox.world import FLOOR, RESTITUTION, Motion, Planted, Scene, World, inside, uniform

STEPS = 4  # exact steps per frame; each may hold one impact


def propose(count: int, generator: torch.Generator, world: World) -> dict[str, Tensor]:
    radius = uniform(count, generator, 0.08, 0.11)
    return {
        "radius": radius,
        "start_x": radius + uniform(count, generator, 0.03, 0.3 * world.aspect),
        "start_y": uniform(count, generator, 0.18, 0.45),
        "speed_x": uniform(count, generator, 0.2, 0.45),
        "speed_y": uniform(count, generator, -0.6, 0.2),
    }


def move(parameters: dict[str, Tensor], world: World, planted: Planted) -> Motion:
    gravity_x, gravity_y = planted.gravity().unbind(-1)
    limit = FLOOR - parameters["radius"] + 0.3 * planted.strength("sink")
    restitution = RESTITUTION + 0.5 * planted.strength("energy")
    x, y = parameters["start_x"], parameters["start_y"]
    velocity_x, velocity_y = parameters["speed_x"], parameters["speed_y"]
    step = 1 / (world.fps * STEPS)
    centres = [torch.stack([x, y], dim=-1)]
    for _ in range(world.num_frames - 1):
        for _ in range(STEPS):
            x = x + velocity_x * step + 0.5 * gravity_x * step**2
            velocity_x = velocity_x + gravity_x * step
            free_y = y + velocity_y * step + 0.5 * gravity_y * step**2
            hit = free_y > limit
            impact_speed = (velocity_y**2 + 2 * gravity_y * (limit - y).clamp(min=0)).sqrt()
            after = step - (impact_speed - velocity_y) / gravity_y  # time left once the floor is reached
            rebound_y = limit - restitution * impact_speed * after + 0.5 * gravity_y * after**2
            resting = rebound_y > limit  # a second impact within the step: the ball lies on the floor
            rebound_velocity = torch.where(resting, 0.0, gravity_y * after - restitution * impact_speed)
            velocity_y = torch.where(hit, rebound_velocity, velocity_y + gravity_y * step)
            y = torch.where(hit, rebound_y.minimum(limit), free_y)
        centres.append(torch.stack([x, y], dim=-1))
    track = torch.stack(centres, dim=1)  # (N, T, 2)
    jump = 0.15 * planted.strength("teleport") * planted.sign[:, None] * (world.times > planted.time[:, None])
    track = torch.stack([track[..., 0] + jump, track[..., 1]], dim=-1)
    return Motion(track[:, :, None])


def accept(parameters: dict[str, Tensor], motion: Motion, world: World) -> Tensor:
    height = motion.centres[:, :, 0, 1]
    up = height[:, 1:] < height[:, :-1] - 0.01
    down = height[:, 1:] > height[:, :-1] + 0.01
    bounce = (down[:, :-1].cumsum(1) >= 3) & up[:, 1:]  # has risen after at least three falling frames
    first = bounce.double().argmax(dim=1) / world.fps
    # The rebound must show: at least three more frames, and in the first 60% of the clip.
    return inside(motion.centres, parameters["radius"], world) & bounce.any(dim=1) & (first < 0.6 * world.duration)


KNOWN = ("gravity", "tilt", "teleport", "vanish", "colour", "sink", "energy")
SCENE = Scene(1, KNOWN, propose, move, accept)
