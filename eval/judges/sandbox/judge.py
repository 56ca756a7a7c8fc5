"""The sandbox judge: measures from pixels whether a clip obeys the sandbox world, and whether it shows its prompt.

The judge sees frames and prompts only. It knows the world's constants (gravity, floor, restitution, friction, palette
and grey levels, see `eval.sandbox.world`) because they define the world; sizes, speeds, geometry and colours of a clip
it measures itself.

Physical score: the product over LAWS of 1 / sqrt(1 + (excess / scale)^2), where `excess` is the error beyond the law's
tolerance; the slow tail keeps bad clips comparable. Semantic score: the product of how well the prompt's colour,
direction of motion, setting and event show. Both are multiplied by `alive`, which is 0 for a clip without objects or
one that stands still: nothing in this world ever does.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from eval.judges.sandbox.laws import LAWS as SCENE_LAWS
from eval.judges.sandbox.laws import reference_area
from eval.judges.sandbox.vision import Seen, observe
from eval.judges.scores import Judge, MeasuredScores, Unjudged, check_clips, parse_prompts
from eval.sandbox.clips import SCENES
from eval.sandbox.prompts import Request, parse_prompt
from eval.sandbox.world import COLOUR_NAMES


@dataclass(frozen=True)
class Law:
    """How an error becomes a score."""

    unit: str  # of the reported error
    tolerance_pixels: float  # error without any loss, as far as pixels limit the measurement (in the unit's pixels)
    tolerance: float  # error without any loss, in world units; both are added
    scale: float  # world units beyond the tolerance at which the law's score is 0.71; far beyond it is scale / excess
    meaning: str


# World units: u = frame heights, s = seconds; tolerance_pixels is converted at each clip's size.
LAWS: dict[str, Law] = {
    "acceleration": Law("px/frame^2", 0.15, 0.1, 0.35, "root mean square of seen minus demanded acceleration"),
    "jump": Law("px/frame^2", 0.3, 0.3, 1.0, "largest single error of acceleration: teleports, jerks"),
    "gravity": Law("relative", 0.0, 0.06, 0.2, "strength of gravity fitted to all steps together, minus the world's"),
    "energy": Law("relative", 0.0, 0.08, 0.12, "restitution at contacts, or energy gained or lost between them"),
    "momentum": Law("relative", 0.0, 0.08, 0.12, "change of the common velocity in a collision / closing speed"),
    "penetration": Law("px", 0.5, 0.0, 0.02, "into the floor, ramp or other ball, off what carries it, off the rod"),
    "area": Law("relative", 0.0, 0.04, 0.08, "mean deviation of an object's visible area from what it should be"),
    "stray": Law("relative", 0.0, 0.05, 0.15, "mean area of any other colour / area of the objects"),
    "spread": Law("relative", 0.0, 0.5, 0.3, "mean squared radius / a disc's, minus 1: blur, duplicates"),
    "background": Law("grey levels", 0.0, 0.02, 0.03, "mean difference from the scene's setting, and flicker"),
}

# Semantic tolerances.
SETTING_SCALE = 0.03  # grey levels of background error beyond the law's tolerance at which the setting scores 1/2
DIRECTION_TIME = 0.5  # s after the start at which the direction is read
SURE_DISPLACEMENT = 0.02  # u moved until then that make it certain
STILL_SPEED = 0.03  # u/s below which an object counts as standing still
STILL_TIME = 0.3  # s that everything may stand still (a start, a turning point); hidden objects do not count ...
FROZEN_TIME = 0.55  # s ... and from which on the clip counts as frozen


@dataclass
class SandboxJudgeConfig:
    fps: float = 8.0  # frames a second of the clips
    batch_size: int = 16  # clips measured at once


@dataclass
class SandboxScores(MeasuredScores):
    """Units of the errors: LAWS[law].unit."""

    laws: dict[str, Tensor]  # law -> (N,) score in [0, 1]; physical is their product times `alive`
    aspects: dict[str, Tensor]  # alive, colour, direction, scene -> (N,) in [0, 1]; semantic is their product


def build(config: SandboxJudgeConfig, device: torch.device | str) -> Judge:
    """The judge: score(clips (N, T, H, W, 3) uint8, prompts) -> SandboxScores.

    `score` raises ValueError for clips of another shape or type, fewer than 8 frames, a number of prompts other than N,
    and `Unjudged` for clips with a prompt in which no sandbox scene is recognised.
    """

    def score(clips: Tensor, prompts: list[str]) -> SandboxScores:
        check_clips(clips, prompts)
        if clips.shape[1] < 8:
            raise ValueError(f"clips have {clips.shape[1]} frames; motion is measured on 8 or more")
        requests, failures = parse_prompts(prompts, parse_prompt)
        results = {"semantic": torch.zeros(len(clips)), "physical": torch.zeros(len(clips))}
        # One scene at a time: it decides the number of objects and the laws.
        for scene in SCENES:
            chosen = [index for index, request in requests.items() if request.scene == scene]
            for start in range(0, len(chosen), config.batch_size):
                part = chosen[start : start + config.batch_size]
                index = torch.tensor(part)
                measured = _measure(clips[index].to(device), [requests[i] for i in part], config.fps)
                for name, values in measured.items():
                    results.setdefault(name, torch.zeros(len(clips)))[index] = values.float().cpu()
        judged = torch.tensor(list(requests), dtype=torch.int64)
        results = {name: values[judged] for name, values in results.items()}
        picked = {
            prefix: {name[len(prefix) + 1 :]: v for name, v in results.items() if name.startswith(prefix + " ")}
            for prefix in ("error", "law", "aspect")
        }
        scores = SandboxScores(results["semantic"], results["physical"], *picked.values())
        if failures:
            raise Unjudged(failures, prompts, scores)
        return scores

    return score


@torch.no_grad()
def _measure(frames: Tensor, requests: list[Request], fps: float) -> dict[str, Tensor]:
    """All results of clips of one scene, each (n,)."""
    height, interval = frames.shape[2], 1 / fps
    scene = SCENES[requests[0].scene]
    names = [(request.colour, request.second_colour)[: scene.num_objects] for request in requests]
    requested = torch.tensor(
        [[COLOUR_NAMES.index(name) if name else -1 for name in colours] for colours in names], device=frames.device
    )
    seen = observe(frames, requested)
    errors = SCENE_LAWS[requests[0].scene](seen, interval)
    full = reference_area(seen)
    errors["stray"] = (seen.stray.mean(dim=1) / full.sum(dim=1).clamp(min=seen.pixel**2)).clamp(max=10)
    errors["spread"] = _spread(seen, full)
    # From world units to pixels and frames.
    pixels = {"px/frame^2": height * interval**2, "px": height}
    results: dict[str, Tensor] = {}
    physical = alive = _alive(seen, interval)
    for name, law in LAWS.items():
        factor = pixels.get(law.unit, 1.0)
        error = errors.get(name, torch.zeros_like(alive))  # 0 where the scene has no such law
        excess = (error - law.tolerance - law.tolerance_pixels / factor).clamp(min=0)
        results[f"law {name}"] = (1 + (excess / law.scale) ** 2).rsqrt()
        results[f"error {name}"] = error * factor
        physical = physical * results[f"law {name}"]
    excess = (errors["background"] - LAWS["background"].tolerance).clamp(min=0)
    aspects = {
        "alive": alive,
        "colour": _colour(seen, requested),
        "direction": _direction(seen, requests, interval),
        "scene": errors["event"] / (1 + (excess / SETTING_SCALE) ** 2),
    }
    results |= {f"aspect {name}": values for name, values in aspects.items()}
    results["semantic"] = torch.stack(list(aspects.values())).prod(dim=0)
    results["physical"] = physical
    return results


def _spread(seen: Seen, full: Tensor) -> Tensor:
    """(n,) mean excess of each object's spread over a disc's, over the frames in which all of it shows."""
    whole = (seen.area > 0.8 * full[:, None]) & seen.found
    number = whole.sum(dim=(1, 2))
    mean = ((seen.spread - 1).clamp(min=0) * whole).sum(dim=(1, 2)) / number.clamp(min=1)
    return torch.where(number > 0, mean, 10.0).clamp(max=10)


def _alive(seen: Seen, interval: float) -> Tensor:
    """(n,) 1 for a moving clip, 0 when no object shows or all of them stand still for FROZEN_TIME."""
    speed = (seen.centres[:, 1:] - seen.centres[:, :-1]).norm(dim=-1) / interval  # (n, T-1, K)
    still = (speed < STILL_SPEED).all(dim=-1)
    # A hidden object keeps its last place; that is no standstill if it is found again.
    shown_later = seen.found.any(dim=2).flip(1).cummax(dim=1).values.flip(1)
    hidden = ~seen.found[:, 1:].any(dim=2) & shown_later[:, 1:]
    longest = run = torch.zeros(len(speed), device=speed.device)
    for index in range(speed.shape[1]):
        run = torch.where(hidden[:, index], run, torch.where(still[:, index], run + 1, torch.zeros_like(run)))
        longest = torch.maximum(longest, run)
    moving = ((FROZEN_TIME - longest * interval) / (FROZEN_TIME - STILL_TIME)).clamp(0, 1)
    return moving * seen.found.any(dim=1).all(dim=1)


def _colour(seen: Seen, requested: Tensor) -> Tensor:
    """(n,) share of the clip's chroma in the prompt's colours; for two, the weaker one counts (an even split is 1)."""
    named = requested >= 0
    shares = seen.palette.gather(1, requested.clamp(min=0)) * requested.shape[1]
    shares = torch.where(named, shares, 1.0).clamp(max=1)
    # A moderate shortfall is measurement: contact mixtures, one ball of two drawn smaller.
    return ((shares.amin(dim=1) - 0.25) / 0.5).clamp(0, 1)


def _direction(seen: Seen, requests: list[Request], interval: float) -> Tensor:
    """(n,) 1 when the first object starts in the prompt's direction (and the second rests or meets it), 0 if not."""
    frame = min(max(1, round(DIRECTION_TIME / interval)), seen.centres.shape[1] - 1)
    moved = (seen.centres[:, frame, :, 0] - seen.centres[:, 0, :, 0]) / SURE_DISPLACEMENT  # (n, K)
    sign = {"right": 1.0, "left": -1.0, None: 0.0}
    wanted = torch.tensor([sign[request.direction] for request in requests], device=moved.device)
    result = torch.where(wanted != 0, (0.5 + 0.5 * moved[:, 0] * wanted).clamp(0, 1), 1.0)
    if moved.shape[1] == 2:
        states = [request.second_state for request in requests]
        resting = torch.tensor([state == "resting" for state in states], device=moved.device)
        oncoming = torch.tensor([state == "moving" for state in states], device=moved.device)
        result = result * torch.where(resting, (2 - moved[:, 1].abs()).clamp(0, 1), 1.0)
        meets = torch.where(wanted != 0, (0.5 - 0.5 * moved[:, 1] * wanted).clamp(0, 1), moved[:, 1].abs().clamp(max=1))
        result = result * torch.where(oncoming, meets, 1.0)
    return result
