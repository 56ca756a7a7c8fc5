"""A ball rolls along the floor at constant speed, passes behind a panel and comes out on the other side."""

import torch
from torch import Tensor

from eval.sandbox.world import FLOOR, Motion, Planted, Scene, Setting, World, inside, uniform


def propose(count: int, generator: torch.Generator, world: World) -> dict[str, Tensor]:
    radius = uniform(count, generator, 0.075, 0.095)
    width = 2 * radius + uniform(count, generator, 0.02, 0.1 * world.aspect)
    middle = world.aspect / 2 + uniform(count, generator, -0.06, 0.06)
    return {
        "radius": radius,
        "start_x": radius + uniform(count, generator, 0.025, 0.08 * world.aspect),
        "speed": uniform(count, generator, 0.33, 0.6),
        "panel_left": middle - width / 2,
        "panel_right": middle + width / 2,
    }


def move(parameters: dict[str, Tensor], world: World, planted: Planted) -> Motion:
    push = planted.gravity()[:, :1]  # (N, 1); the floor carries the vertical part
    times = world.times
    start, speed = parameters["start_x"][:, None], parameters["speed"][:, None]
    middle = (parameters["panel_left"] + parameters["panel_right"])[:, None] / 2
    since = (times - (middle - start) / speed).clamp(min=0)  # time since passing the panel's middle
    x = start + speed * times + 0.5 * push * times**2 + planted.strength("energy") * speed * since
    x = x + 0.15 * planted.strength("teleport") * planted.sign[:, None] * (times > planted.time[:, None])
    y = FLOOR - parameters["radius"][:, None] + planted.drop(times)
    return Motion(torch.stack([x, y], dim=-1)[:, :, None])


def accept(parameters: dict[str, Tensor], motion: Motion, world: World) -> Tensor:
    x, radius = motion.centres[:, :, 0, 0], parameters["radius"][:, None]
    left, right = parameters["panel_left"][:, None], parameters["panel_right"][:, None]
    before = (x + radius < left).sum(dim=1)
    hidden = ((x - radius > left) & (x + radius < right)).sum(dim=1)
    after = (x - radius > right).sum(dim=1)
    shown = 0.2 * world.num_frames
    return inside(motion.centres, parameters["radius"], world) & (before >= shown) & (hidden >= 1) & (after >= shown)


def setting(parameters: dict[str, Tensor]) -> Setting:
    panel = torch.stack([parameters["panel_left"], parameters["panel_right"]], dim=-1)
    return Setting(sizes=parameters["radius"], panel=panel)


KNOWN = ("tilt", "teleport", "vanish", "colour", "sink", "energy")
SCENE = Scene(1, KNOWN, propose, move, accept, setting)
