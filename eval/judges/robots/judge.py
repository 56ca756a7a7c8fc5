"""The robots' judge: measures from pixels whether a clip obeys physics, and whether it shows its instruction.

It sees frames and instructions only. It knows the colours (eval/robots/tasks.py), and of each task how large every
error is in true clips (tolerances.json, made by `python -m eval.judges.robots.calibration --fit`).

Physical score: the product over LAWS of 1 / sqrt(1 + (excess / scale)^2), with the error beyond the task's tolerance,
times whether a hand and an object are there. Semantic score: how far the clip gets with its task. Where a green mark
shows the goal: 1 minus the distance left / the distance at the start; elsewhere the object's change from first to last
frame / that of true clips.
"""

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from eval.judges.robots.laws import errors, moved
from eval.judges.robots.vision import Seen, observe
from eval.judges.scores import Judge, MeasuredScores, Unjudged, check_clips, parse_prompts
from eval.robots.tasks import TASKS, parse_prompt


@dataclass(frozen=True)
class Law:
    scale: float  # error beyond the tolerance at which the law's score is 0.71; far beyond it is scale / excess
    meaning: str


LAWS: dict[str, Law] = {
    "permanence": Law(0.15, "largest share of the object that is gone and that the robot cannot hide"),
    "hand": Law(0.15, "largest share of the hand that is gone for three frames"),
    "contact": Law(0.3, "change of the object that the robot is not near, beyond the momentum it has, in its sizes"),
    "jump": Law(0.3, "largest change of the object from one frame to the next, in its sizes"),
    "shape": Law(0.15, "range of the object's area and lengths while all of it shows, in natural logarithms"),
    "background": Law(0.01, "mean change of brightness where nothing moves, in the full range"),
}
TOLERANCES = Path(__file__).with_name("tolerances.json")
BATCH_SIZE = 8  # clips measured at once


@cache
def tolerances() -> dict[str, dict[str, float]]:
    """By task: of each law, and `done`, what a clip shows in which the task is done."""
    return json.loads(TOLERANCES.read_text(encoding="utf-8"))


def build(device: torch.device | str) -> Judge:
    """The judge: score(clips (N, T, H, W, 3) uint8, instructions) -> MeasuredScores.

    `score` raises ValueError for clips of another shape or type, fewer than 5 frames, a number of instructions other
    than N, and `Unjudged` for clips whose instruction is none of the robots' tasks.
    """

    def score(clips: Tensor, prompts: list[str]) -> MeasuredScores:
        check_clips(clips, prompts)
        if clips.shape[1] < 5:
            raise ValueError(f"clips have {clips.shape[1]} frames; a robot's motion is measured on 5 or more")
        requests, failures = parse_prompts(prompts, parse_prompt)
        chosen = list(requests)
        parts = [chosen[start : start + BATCH_SIZE] for start in range(0, len(chosen), BATCH_SIZE)]
        measured = [_judge(clips[part].to(device), [requests[index] for index in part]) for part in parts]
        found = {name: torch.cat([part[name] for part in measured]).cpu() for name in measured[0]} if measured else {}
        none = torch.zeros(0)
        scores = MeasuredScores(
            found.pop("semantic", none), found.pop("physical", none), found or dict.fromkeys(LAWS, none)
        )
        if failures:
            raise Unjudged(failures, prompts, scores)
        return scores

    return score


@torch.no_grad()
def _judge(frames: Tensor, requests: list[tuple[str, str]]) -> dict[str, Tensor]:
    """Scores and errors, (n,) each."""
    seen = observe(frames, [colour for _, colour in requests])
    found = errors(seen)
    known = [tolerances()[task] for task, _ in requests]
    there = (seen.middle(seen.hand)[1][:, :4].any(dim=1) & seen.middle(seen.object)[1][:, 0]).float()
    physical = there
    for name, law in LAWS.items():
        excess = (found[name] - torch.tensor([values[name] for values in known], device=frames.device)).clamp(min=0)
        physical = physical * (1 + (excess / law.scale) ** 2).rsqrt()
    amount = done(seen, [task for task, _ in requests])
    enough = torch.tensor([values["done"] for values in known], device=frames.device)
    start = goal_distance(seen, [task for task, _ in requests])[:, 0]
    left = (amount - enough).clamp(min=0) / (start - enough).clamp(min=0.02)
    with_goal = torch.tensor([TASKS[task].shows_goal for task, _ in requests], device=frames.device)
    semantic = torch.where(with_goal, 1 - left, amount / enough).clamp(0, 1) * there
    return {"semantic": semantic, "physical": physical, **found}


def goal_distance(seen: Seen, tasks: list[str]) -> Tensor:
    """(N, T) frame heights from the goal, where it is first seen, to the object, or in "reach" to the hand; where they
    are hidden, as last seen. 10 where there is no goal."""
    goal, there = seen.middle(seen.goal)
    first = there.float().argmax(dim=1)  # frame in which it is first seen
    goal = goal[torch.arange(len(goal), device=goal.device), first][:, None]
    reach = torch.tensor([task == "reach" for task in tasks], device=goal.device)
    mask = torch.where(reach[:, None, None, None], seen.hand, seen.object)
    place, found = seen.middle(mask)
    frames = torch.arange(found.shape[1], device=goal.device)
    last = torch.where(found, frames, 0).cummax(dim=1).values
    distance = (place - goal).norm(dim=-1).gather(1, last)
    return torch.where(there.any(dim=1, keepdim=True), distance, 10.0)


def done(seen: Seen, tasks: list[str]) -> Tensor:
    """(N,) what decides whether a task is done: the distance from the goal in the end, the least of the last quarter;
    or how much the object has changed."""
    quarter = max(1, seen.hand.shape[1] // 4)
    distance = goal_distance(seen, tasks)[:, -quarter:].amin(dim=1)
    with_goal = torch.tensor([TASKS[task].shows_goal for task in tasks], device=distance.device)
    return torch.where(with_goal, distance, moved(seen))
