"""Judges by name: how well a clip shows its prompt, and how well it obeys physical laws.

    judge = build_judge(Judging.of(config), fps=16, device="cuda")
    scores = judge(clips, prompts)        clips (N, T, H, W, 3) uint8; scores.semantic, scores.physical (N,) in [0, 1]

A new judge is a file with `build`, or with what `external_tool.build` takes of another project's program, and a line in
JUDGES and in `judge_settings`. `eval.judges.scores` says what a judge gives back, and what it raises for a clip that it
cannot judge.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from eval.judges import external_tool, videocon_physics, videophy2, vlm
from eval.judges.external_tool import RatersConfig, tool_settings
from eval.judges.robots import judge as robots
from eval.judges.sandbox import judge as sandbox
from eval.judges.sandbox.judge import SandboxJudgeConfig
from eval.judges.scores import Judge
from eval.vlm.backend import VlmConfig, recorded
from recipes import suggest


@dataclass
class JudgeConfig:
    """The recipe's section `judge`. Settings of the judges themselves are the sections `vlm` and `raters`."""

    name: str = ""  # sandbox | robots | videocon_physics | videophy2 | vlm; empty: no judge


@dataclass(frozen=True)
class Judging:
    """The sections of a recipe that say who judges."""

    judge: JudgeConfig = field(default_factory=JudgeConfig)
    vlm: VlmConfig = field(default_factory=VlmConfig)
    raters: RatersConfig = field(default_factory=RatersConfig)

    @classmethod
    def of(cls, config: Any) -> "Judging":
        """Of an entry point's Config that has the three sections."""
        return cls(config.judge, config.vlm, config.raters)


JUDGES: dict[str, Callable[[Judging, float, torch.device | str], Judge]] = {
    "sandbox": lambda given, fps, device: sandbox.build(SandboxJudgeConfig(fps=fps), device),
    "robots": lambda given, fps, device: robots.build(device),
    "videocon_physics": lambda given, *more: external_tool.build(videocon_physics, given.raters, *more),
    "videophy2": lambda given, *more: external_tool.build(videophy2, given.raters, *more),
    "vlm": lambda given, fps, device: vlm.build(given.vlm, fps, device),
}


def build_judge(judging: Judging, fps: float, device: torch.device | str) -> Judge:
    """The judge that `judging.judge` names, for clips of `fps` frames a second.

    Cheap, and checks everything that can be checked without a clip: call it before any work. Raises ValueError for an
    unknown name and for settings of the judge that cannot work.
    """
    name = judging.judge.name
    if name not in JUDGES:
        raise ValueError(f"judge.name={name!r} is no judge; {suggest(name, JUDGES)}")
    return JUDGES[name](judging, fps, device)


def judge_settings(judging: Judging) -> dict[str, Any]:
    """What scores may depend on beside clips and prompts, by judge, as plain JSON values.

    Digests of finished work hold this tree: it has the form that it had when each judge's section held its own rate.
    """
    raters = {name: getattr(judging.raters, name) for name in ("videocon_physics", "videophy2")}
    tools = {name: tool_settings(rater) | {"fps": 16.0} for name, rater in raters.items()}
    tools["videocon_physics"]["batch_size"] = videocon_physics.BATCH_SIZE
    settings = {"sandbox": asdict(SandboxJudgeConfig()), "vlm": recorded(judging.vlm) | {"fps": 16.0}}
    # Added where it is asked for, so that other judges' digests stay as they were.
    settings |= {"robots": {"tolerances": robots.tolerances()}} if judging.judge.name == "robots" else {}
    return {"name": judging.judge.name} | settings | tools
