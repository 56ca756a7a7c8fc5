"""The sandbox world: its constants, its units, and the contract between scenes, violations and the renderer.

World coordinates do not depend on the resolution: the frame is 1 high and `aspect` = width / height wide, x grows to
the right, y grows DOWN, the origin is the top left corner. Lengths are therefore "frame heights" (u), times are
seconds, and a clip of H rows at f frames per second turns u/s^2 into pixels/frame^2 by H / f^2 (at 64 rows and 8 frames
per second that factor is exactly 1).

Everything that a judge may know without seeing a clip's hidden parameters is a constant of this file.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

GRAVITY = 2.0  # u/s^2, downwards
FLOOR = 0.875  # u, height of the floor line (y)
RESTITUTION = 0.75  # rebound speed / impact speed of a ball on the floor
COLLISION_RESTITUTION = 0.9  # the same for the relative speed of two balls
FRICTION = 0.2  # Coulomb coefficient of a block on ramp and floor; rolling balls have none
PIVOT_HEIGHT = 0.1  # u, y of the pendulum's pivot; its x is the middle of the frame
PANEL_TOP = 0.3  # u, y of the occluding panel's upper edge; it stands on the floor

# Grey levels. Everything that is not an object is achromatic, so an object is found by its chroma alone, whatever
# lies behind its soft edge.
BACKDROP_GREY = 0.85
GROUND_GREY = 0.45  # floor and ramp
PANEL_GREY = 0.12
ROD_GREY = 0.25

# Six hues 60 degrees apart with equal chroma (largest minus smallest channel = 0.75).
CHROMA = 0.75
COLOURS: dict[str, tuple[float, float, float]] = {
    "red": (0.9, 0.15, 0.15),
    "yellow": (0.9, 0.9, 0.15),
    "green": (0.15, 0.9, 0.15),
    "cyan": (0.15, 0.9, 0.9),
    "blue": (0.15, 0.15, 0.9),
    "magenta": (0.9, 0.15, 0.9),
}
COLOUR_NAMES = tuple(COLOURS)  # index i has hue 60 i degrees

# Layers of the label map and their distances from the camera (u). A 2-D world has one depth per layer.
BACKDROP, GROUND, ROD, PANEL, FIRST_OBJECT = 0, 1, 2, 3, 4
LAYER_DEPTH = (4.0, 3.0, 2.5, 1.0, 2.0, 2.0)  # backdrop, ground, rod, panel, first object, second object

# What can be planted, and what severity 1 means. Severity s in (0, 1] scales it linearly.
VIOLATIONS: dict[str, str] = {
    "gravity": "gravity is (1 + s) times too strong or (1 - 0.8 s) times too weak, by a coin",
    "tilt": "gravity is turned by 30 s degrees to the left or right",
    "teleport": "at a random moment an object jumps by 0.15 s of the frame's height, along its path",
    "vanish": "from a random moment on, an object has lost the fraction s of its area",
    "colour": "from a random moment on, an object has turned by the fraction s into the colour opposite on the wheel",
    "sink": "the floor holds only 0.3 s below its surface: objects pass through it",
    "energy": "contacts add energy: restitution 0.75 + 0.5 s, collision 0.9 + 0.8 s, pendulum 1 + 0.5 s at each pass, "
    "friction 0.2 - 0.5 s, speed behind the panel 1 + s",
    "momentum": "a collision kicks both balls to the same side by 0.6 s of their closing speed",
    "ghost": "balls collide only after overlapping by the fraction s of their diameter; at 1 they pass through",
}


@dataclass(frozen=True)
class World:
    """A clip's frame of reference."""

    aspect: float  # width / height of the frame
    num_frames: int
    fps: float  # frames per second

    @property
    def duration(self) -> float:
        """Seconds between the first and the last frame."""
        return (self.num_frames - 1) / self.fps

    @property
    def times(self) -> Tensor:
        """(T,) seconds."""
        return torch.arange(self.num_frames, dtype=torch.float64) / self.fps


@dataclass(frozen=True)
class Planted:
    """A violation with its per-clip random choices; `kind` None is the true world."""

    kind: str | None
    severity: float
    time: Tensor  # (N,) seconds: when sudden violations happen
    sign: Tensor  # (N,) -1 or 1
    which: Tensor  # (N,) index of the object that is hit

    def strength(self, kind: str) -> float:
        """The severity if this is the planted kind, else 0."""
        return self.severity if self.kind == kind else 0.0

    def gravity(self) -> Tensor:
        """(N, 2) gravity vector, u/s^2."""
        strength = self.strength("gravity")
        size = GRAVITY * torch.where(self.sign > 0, 1 + strength, 1 - 0.8 * strength)
        angle = self.sign * torch.pi / 6 * self.strength("tilt")
        return torch.stack([size * angle.sin(), size * angle.cos()], dim=-1)

    def drop(self, times: Tensor) -> Tensor:
        """(N, T) how far a supported object has fallen through what carries it, u."""
        since = (times - self.time[:, None]).clamp(min=0)
        return (0.5 * GRAVITY * since**2).clamp(max=0.3 * self.strength("sink"))


@dataclass
class Motion:
    """Exact dynamics of N clips, simulated as if moving to the right (clips to the left are mirrored after drawing)."""

    centres: Tensor  # (N, T, K, 2) u
    angles: Tensor | None = None  # (N, T) radians of a block, clockwise; None for balls


@dataclass
class Setting:
    """What stands still in N clips, in world coordinates."""

    sizes: Tensor  # (N,) radius of the balls or half side of the block, u
    ramp: Tensor | None = None  # (N, 3): x where ramp and floor lines meet, slope in radians, radius of the fillet
    panel: Tensor | None = None  # (N, 2): left and right edge, u
    pendulum: bool = False  # a rod from the pivot to the ball


def balls(parameters: dict[str, Tensor]) -> Setting:
    """The setting of scenes with nothing but balls on the floor."""
    return Setting(sizes=parameters["radius"])


@dataclass(frozen=True)
class Scene:
    """One scene: functions over dicts of (N,) float64 parameters; lengths in u, speeds in u/s, angles in radians."""

    num_objects: int
    violations: tuple[str, ...]
    propose: Callable[[int, torch.Generator, World], dict[str, Tensor]]  # random parameters, not yet checked
    move: Callable[[dict[str, Tensor], World, Planted], Motion]
    accept: Callable[[dict[str, Tensor], Motion, World], Tensor]  # (N,) bool: in frame, and the event happens
    setting: Callable[[dict[str, Tensor]], Setting] = balls


def uniform(count: int, generator: torch.Generator, low: float, high: float) -> Tensor:
    """(count,) float64 draws from [low, high)."""
    draws = torch.rand(count, generator=generator, dtype=torch.float64, device=generator.device)
    return (low + (high - low) * draws).cpu()


def inside(centres: Tensor, sizes: Tensor, world: World, margin: float = 0.02) -> Tensor:
    """(N,) bool: every object (N, T, K, 2) stays `margin` away from the frame's edges."""
    reach = (sizes + margin)[:, None, None]
    x, y = centres.unbind(-1)
    return ((x > reach) & (x < world.aspect - reach) & (y > reach) & (y < 1 - reach)).flatten(1).all(dim=1)
