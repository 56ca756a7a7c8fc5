"""Two equal balls on the floor: one rolls into another that rests or comes the other way.

Exact: without friction the motion between contacts is uniform, and the contact's moment is solved for.
"""

import torch
from torch import Tensor

from eval.sandbox.world import COLLISION_RESTITUTION, FLOOR, Motion, Planted, Scene, World, inside, uniform

STEPS = 4  # exact steps per frame; each may hold one contact


def propose(count: int, generator: torch.Generator, world: World) -> dict[str, Tensor]:
    radius = uniform(count, generator, 0.08, 0.1)
    moving = (uniform(count, generator, 0, 1) < 0.5).double()
    start = radius + uniform(count, generator, 0.03, 0.08 * world.aspect)
    return {
        "radius": radius,
        "start_x": start,
        "second_start_x": start + 2 * radius + uniform(count, generator, 0.15, 0.5 * world.aspect),
        "speed": uniform(count, generator, 0.22, 0.45),
        "second_speed": -moving * uniform(count, generator, 0.15, 0.35),
    }


def move(parameters: dict[str, Tensor], world: World, planted: Planted) -> Motion:
    push = planted.gravity()[:, 0]  # the floor carries the vertical part
    restitution = COLLISION_RESTITUTION + 0.8 * planted.strength("energy")
    ghost = planted.strength("ghost")
    distance = 2 * parameters["radius"] * (1 - ghost)
    kick = 0.6 * planted.strength("momentum") * planted.sign
    jump = 0.15 * planted.strength("teleport")
    first, second = parameters["start_x"], parameters["second_start_x"]
    first_speed, second_speed = parameters["speed"], parameters["second_speed"]
    step = 1 / (world.fps * STEPS)
    xs = [torch.stack([first, second], dim=-1)]
    for index in range((world.num_frames - 1) * STEPS):
        time = index * step
        jumps = (time <= planted.time) & (planted.time < time + step)
        first = first - jump * (jumps & (planted.which == 0))  # away from the other ball, so that they never overlap
        second = second + jump * (jumps & (planted.which == 1))
        closing = first_speed - second_speed
        gap = second - first - distance
        contact = (closing > 0) & (gap >= 0) & (closing * step > gap)
        if ghost >= 1:
            contact = torch.zeros_like(contact)
        before = torch.where(contact, gap / closing, step)
        mean = (first_speed + second_speed) / 2 + kick * closing
        half = restitution * closing / 2
        after = step - before
        first = first + first_speed * before + torch.where(contact, mean - half, first_speed) * after
        second = second + second_speed * before + torch.where(contact, mean + half, second_speed) * after
        # The common push leaves the balls' relative motion untouched: it can be added to the step as a whole.
        first, second = first + 0.5 * push * step**2, second + 0.5 * push * step**2
        first_speed = torch.where(contact, mean - half, first_speed) + push * step
        second_speed = torch.where(contact, mean + half, second_speed) + push * step
        if (index + 1) % STEPS == 0:
            xs.append(torch.stack([first, second], dim=-1))
    x = torch.stack(xs, dim=1)  # (N, T, 2 balls)
    fall = planted.drop(world.times)[..., None] * (torch.arange(2) == planted.which[:, None])[:, None]
    y = FLOOR - parameters["radius"][:, None, None] + fall
    return Motion(torch.stack([x, y], dim=-1))


def accept(parameters: dict[str, Tensor], motion: Motion, world: World) -> Tensor:
    gap = motion.centres[:, :, 1, 0] - motion.centres[:, :, 0, 0] - 2 * parameters["radius"][:, None]
    contact = (parameters["second_start_x"] - parameters["start_x"] - 2 * parameters["radius"]) / (
        parameters["speed"] - parameters["second_speed"]
    )
    in_time = (contact > 0.25 * world.duration) & (contact < 0.7 * world.duration)
    return inside(motion.centres, parameters["radius"], world) & in_time & (gap[:, -1] > 0.03)


KNOWN = ("tilt", "teleport", "vanish", "colour", "sink", "energy", "momentum", "ghost")
SCENE = Scene(2, KNOWN, propose, move, accept)
