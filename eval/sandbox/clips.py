"""Simulated clips: pixels with the truth that made them.

`simulate` draws parameters until the scene's event (bounce, collision, passing the panel ...) really happens inside
the clip, moves the objects, optionally plants a violation in the DYNAMICS (for vanish and colour, in what is drawn),
and renders. A clip with a violation has the parameters, colours and prompt of the true clip with the same generator
state (in "mixed", only if all scenes know the violation).
"""

import itertools
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from eval.sandbox import collision, occluder, pendulum, projectile, ramp
from eval.sandbox.prompts import write_prompt
from eval.sandbox.render import render
from eval.sandbox.world import (
    COLOUR_NAMES,
    COLOURS,
    FIRST_OBJECT,
    FLOOR,
    FRICTION,
    GRAVITY,
    LAYER_DEPTH,
    PANEL_TOP,
    VIOLATIONS,
    Planted,
    Scene,
    Setting,
    World,
    uniform,
)

# A new scene is one file and one line here (and templates in prompts.py, laws in the judge).
SCENES: dict[str, Scene] = {
    "projectile": projectile.SCENE,
    "collision": collision.SCENE,
    "pendulum": pendulum.SCENE,
    "ramp": ramp.SCENE,
    "occluder": occluder.SCENE,
}
ROUNDS = 200  # of drawing parameters before a frame's shape or duration is called unfit


@dataclass
class Clips:
    """N clips of T frames with K objects (K = 2 as soon as one clip has two; a missing object is invisible at 0, 0)."""

    frames: Tensor  # (N, T, H, W, 3) uint8
    prompts: list[str]
    scenes: list[str]
    attributes: list[dict[str, str]]  # colour, direction; collision also second_colour, second_state
    tracks: Tensor  # (N, T, K, 2) float32: x and y of the centres, each in [0, 1] inside the frame
    visibility: Tensor  # (N, T, K) bool: the centre is in the frame, drawn, and behind nothing
    layers: Tensor  # (N, T, H, W) uint8: the layer each pixel shows, see eval.sandbox.world
    parameters: list[dict[str, float]]  # u, u/s, radians; gravity u/s^2, gravity_pixels px/frame^2
    fps: float

    @property
    def masks(self) -> Tensor:
        """(N, T, H, W) uint8: 0 where no object is seen, k + 1 on object k."""
        return (self.layers.clamp(min=FIRST_OBJECT - 1) - (FIRST_OBJECT - 1)).to(torch.uint8)

    @property
    def depth(self) -> Tensor:
        """(N, T, H, W) float32 distance from the camera in frame heights, constant per layer; near is SMALL."""
        return torch.tensor(LAYER_DEPTH, device=self.layers.device)[self.layers.long()]

    def __len__(self) -> int:
        return len(self.prompts)

    def __getitem__(self, index: slice | list[int]) -> "Clips":
        """A part of the clips; a slice's tensors are views."""

        def part(value: Any) -> Any:
            if isinstance(value, list) and isinstance(index, list):
                return [value[number] for number in index]
            return value[index] if isinstance(value, Tensor | list) else value

        return Clips(**{name: part(value) for name, value in vars(self).items()})


def simulate(
    scene: str,
    count: int,
    generator: torch.Generator,
    *,
    height: int = 64,
    width: int = 64,
    num_frames: int = 17,
    fps: float = 8.0,
    violation: str | None = None,
    severity: float = 1.0,
    device: torch.device | str = "cpu",
) -> Clips:
    """Simulate and render `count` clips of a scene, or of all scenes in turn ("mixed").

    Args: scene, a key of SCENES or "mixed" (clip i then shows the i-th scene, cyclically, of those that know the
    violation); height, width in pixels; num_frames and fps, which together should give about 2 seconds, the time in
    which the events happen; violation, a key of VIOLATIONS or None; severity in (0, 1], unused without a violation;
    generator, the only source of chance (dynamics run on the CPU in float64, rendering on `device` in float32).
    Raises ValueError for an unknown scene or violation, a violation that the scene does not know, a severity outside
    (0, 1], and a frame shape or duration in which the scene's event does not fit.
    """
    if scene != "mixed" and scene not in SCENES:
        raise ValueError(f"scene {scene!r} is unknown; choose one of {', '.join(SCENES)} or mixed")
    if violation is not None and violation not in VIOLATIONS:
        raise ValueError(f"violation {violation!r} is unknown; choose one of {', '.join(VIOLATIONS)} or None")
    if violation is not None and not 0 < severity <= 1:
        raise ValueError(f"severity is {severity}; it must lie in (0, 1]")
    if count < 1:
        raise ValueError(f"count is {count}; ask for at least one clip")
    names = [name for name in SCENES if violation is None or violation in SCENES[name].violations]
    if scene != "mixed" and scene not in names:
        raise ValueError(f"scene {scene!r} has no violation {violation!r}; scenes that know it: {', '.join(names)}")
    names = names if scene == "mixed" else [scene]
    world = World(aspect=width / height, num_frames=num_frames, fps=fps)
    counts = [len(range(index, count, len(names))) for index in range(len(names))]
    parts = [
        _simulate_scene(name, share, generator, world, height, width, violation, severity, torch.device(device))
        for name, share in zip(names, counts, strict=True)
        if share
    ]
    return parts[0] if len(parts) == 1 else _interleave(parts, count)


def _simulate_scene(
    name: str,
    count: int,
    generator: torch.Generator,
    world: World,
    height: int,
    width: int,
    violation: str | None,
    severity: float,
    device: torch.device,
) -> Clips:
    scene = SCENES[name]
    parameters = _draw_parameters(name, scene, count, generator, world)
    # All of a clip's chance is drawn here, with or without a violation, so that both have the same look and prompt.
    left = uniform(count, generator, 0, 1) < 0.5
    hue = (uniform(count, generator, 0, len(COLOUR_NAMES))).long()
    turn = torch.where(uniform(count, generator, 0, 1) < 0.5, 2, 4)  # two balls are 120 degrees apart, easy to tell
    template = uniform(count, generator, 0, 12).long()
    planted = Planted(
        kind=violation,
        severity=severity if violation else 0.0,
        # Between two frames, so that "from then on" is not a matter of rounding.
        time=(uniform(count, generator, 0.3, 0.6) * (world.num_frames - 1)).floor().add(0.5) / world.fps,
        sign=torch.where(uniform(count, generator, 0, 1) < 0.5, -1.0, 1.0).double(),
        which=(uniform(count, generator, 0, scene.num_objects)).long(),
    )
    motion = scene.move(parameters, world, planted)
    setting = scene.setting(parameters)

    palette = torch.tensor(list(COLOURS.values()), dtype=torch.float64)
    hues = torch.stack([hue, (hue + turn) % len(palette)], dim=1)[:, : scene.num_objects]  # (N, K)
    struck = (world.times > planted.time[:, None])[..., None] & (
        torch.arange(scene.num_objects) == planted.which[:, None, None]
    )  # (N, T, K)
    sizes = setting.sizes[:, None, None] * (1 - planted.strength("vanish") * struck).sqrt()
    opposite = palette[(hues + 3) % len(palette)] - palette[hues]
    colours = palette[hues][:, None] + planted.strength("colour") * struck[..., None] * opposite[:, None]

    def place(value: Tensor | None) -> Tensor | None:
        return None if value is None else value.to(device=device, dtype=torch.float32)

    setting.sizes, setting.ramp, setting.panel = place(setting.sizes), place(setting.ramp), place(setting.panel)
    frames, layers = render(
        setting, place(motion.centres), place(motion.angles), place(sizes), place(colours), height, width
    )
    mirrored = left.to(device)
    frames[mirrored] = frames[mirrored].flip(-2)
    layers[mirrored] = layers[mirrored].flip(-1)
    visibility = _visible(motion.centres, sizes, setting, world)
    tracks = motion.centres / torch.tensor([world.aspect, 1.0], dtype=torch.float64)
    tracks[..., 0] = torch.where(left[:, None, None], 1 - tracks[..., 0], tracks[..., 0])

    attributes = []
    for index in range(count):
        attribute = {"colour": COLOUR_NAMES[hues[index, 0]], "direction": "left" if left[index] else "right"}
        if scene.num_objects == 2:
            attribute["second_colour"] = COLOUR_NAMES[hues[index, 1]]
            attribute["second_state"] = "resting" if parameters["second_speed"][index] == 0 else "moving"
        attributes.append(attribute)
    constants = {"gravity": GRAVITY, "gravity_pixels": GRAVITY * height / world.fps**2, "friction": FRICTION}
    return Clips(
        frames=frames,
        prompts=[write_prompt(name, attributes[index], int(template[index])) for index in range(count)],
        scenes=[name] * count,
        attributes=attributes,
        tracks=tracks.float().to(device),
        visibility=visibility.to(device),
        layers=layers,
        parameters=[
            {key: float(value[index]) for key, value in parameters.items()} | constants for index in range(count)
        ],
        fps=world.fps,
    )


def _draw_parameters(
    name: str, scene: Scene, count: int, generator: torch.Generator, world: World
) -> dict[str, Tensor]:
    """Rejection sampling: `count` parameter sets whose true motion stays in the frame and shows the event."""
    still = Planted(None, 0.0, *(torch.zeros(1, dtype=torch.float64) for _ in range(3)))
    batch = max(4 * count, 256)
    kept: list[dict[str, Tensor]] = []
    found = 0
    for _ in range(ROUNDS):
        proposed = scene.propose(batch, generator, world)
        good = scene.accept(proposed, scene.move(proposed, world, still), world)
        kept.append({key: value[good] for key, value in proposed.items()})
        found += int(good.sum())
        if found >= count:
            return {key: torch.cat([part[key] for part in kept])[:count] for key in kept[0]}
    raise ValueError(
        f"scene {name!r} does not fit a frame of aspect {world.aspect:.2f} within {world.duration:.2f} s "
        f"({world.num_frames} frames at {world.fps} per second); use an aspect of 1 or more and about 2 seconds"
    )


def _visible(centres: Tensor, sizes: Tensor, setting: Setting, world: World) -> Tensor:
    x, y = centres.unbind(-1)  # (N, T, K)
    visible = (sizes > 0) & (x >= 0) & (x <= world.aspect) & (y >= 0) & (y <= 1)
    if setting.panel is not None:
        left, right = setting.panel.cpu().double()[:, :, None, None].unbind(1)
        visible &= (x < left) | (x > right) | (y < PANEL_TOP) | (y > FLOOR)
    for behind in range(1, centres.shape[2]):  # the first object is drawn in front
        distance = (centres[:, :, 0] - centres[:, :, behind]).norm(dim=-1)
        visible[:, :, behind] &= distance > sizes[:, :, 0]
    return visible


def _interleave(parts: list[Clips], count: int) -> Clips:
    """Clip i comes from part i modulo their number; tracks are padded to the largest number of objects."""
    objects = max(part.tracks.shape[2] for part in parts)
    for part in parts:
        missing = (0, objects - part.tracks.shape[2])
        part.tracks = F.pad(part.tracks, (0, 0, *missing))
        part.visibility = F.pad(part.visibility, missing)

    def join(values: list) -> Any:
        return torch.cat(values) if isinstance(values[0], Tensor) else [item for value in values for item in value]

    fields = [name for name in vars(parts[0]) if name != "fps"]
    joined = Clips(**{name: join([getattr(part, name) for part in parts]) for name in fields}, fps=parts[0].fps)
    starts = [0, *itertools.accumulate(map(len, parts))]
    return joined[[starts[index % len(parts)] + index // len(parts) for index in range(count)]]
