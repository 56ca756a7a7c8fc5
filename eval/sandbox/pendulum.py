"""A ball on a rigid rod, released from rest, swings about a pivot in the middle of the frame.

theta'' = -(g / L) sin(theta), integrated with classical Runge-Kutta of order 4, 4 steps a frame (error < 1e-6 u).
"""

import torch
from torch import Tensor

from eval.sandbox.world import PIVOT_HEIGHT, Motion, Planted, Scene, Setting, World, inside, uniform

STEPS = 4  # Runge-Kutta steps a frame


def propose(count: int, generator: torch.Generator, world: World) -> dict[str, Tensor]:
    return {
        "radius": uniform(count, generator, 0.08, 0.11),
        "length": uniform(count, generator, 0.38, 0.58),
        "start_angle": -uniform(count, generator, 0.5, 1.05),  # left of the pivot: swings to the right
    }


def move(parameters: dict[str, Tensor], world: World, planted: Planted) -> Motion:
    gravity_x, gravity_y = planted.gravity().unbind(-1)
    length = parameters["length"]
    jump = 0.15 * planted.strength("teleport") * planted.sign / length
    gain = 1 + 0.5 * planted.strength("energy")

    def torque(angle: Tensor) -> Tensor:
        return (gravity_x * angle.cos() - gravity_y * angle.sin()) / length

    angle, speed = parameters["start_angle"], torch.zeros_like(length)
    step = 1 / (world.fps * STEPS)
    angles = [angle]
    for index in range((world.num_frames - 1) * STEPS):
        k1, a1 = speed, torque(angle)
        k2, a2 = speed + 0.5 * step * a1, torque(angle + 0.5 * step * k1)
        k3, a3 = speed + 0.5 * step * a2, torque(angle + 0.5 * step * k2)
        k4, a4 = speed + step * a3, torque(angle + step * k3)
        moved = angle + step / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
        speed = speed + step / 6 * (a1 + 2 * a2 + 2 * a3 + a4)
        speed = torch.where(angle * moved < 0, gain * speed, speed)  # the lowest point
        time = index * step
        angle = moved + jump * ((time <= planted.time) & (planted.time < time + step))
        if (index + 1) % STEPS == 0:
            angles.append(angle)
    theta = torch.stack(angles, dim=1)  # (N, T)
    x = world.aspect / 2 + length[:, None] * theta.sin()
    y = PIVOT_HEIGHT + length[:, None] * theta.cos()
    return Motion(torch.stack([x, y], dim=-1)[:, :, None])


def accept(parameters: dict[str, Tensor], motion: Motion, world: World) -> Tensor:
    side = motion.centres[:, :, 0, 0] - world.aspect / 2
    crosses = (side > 0.05).double().argmax(dim=1) / world.fps
    return inside(motion.centres, parameters["radius"], world) & (crosses > 0) & (crosses < 0.6 * world.duration)


def setting(parameters: dict[str, Tensor]) -> Setting:
    return Setting(sizes=parameters["radius"], pendulum=True)


KNOWN = ("gravity", "tilt", "teleport", "vanish", "colour", "energy")
SCENE = Scene(1, KNOWN, propose, move, accept, setting)
