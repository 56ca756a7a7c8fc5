"""Judges by name: how well a clip shows its prompt, and how well it obeys physical laws.

    judge = build_judge(config, fps=16, device="cuda")
    scores = judge(clips, prompts)        clips (N, T, H, W, 3) uint8; scores.semantic, scores.physical (N,) in [0, 1]

A new judge is a file with a config dataclass and `build(config, device)`, a field of JudgeConfig, and a line in JUDGES.
`eval.judges.scores` says what a judge gives back, and what it raises for a clip that it cannot judge.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from eval.judges import videocon_physics, videophy2, vlm
from eval.judges.sandbox import judge as sandbox
from eval.judges.sandbox.judge import SandboxJudgeConfig
from eval.judges.scores import Judge
from eval.judges.videocon_physics import VideoConPhysicsConfig
from eval.judges.videophy2 import VideoPhy2Config
from eval.judges.vlm import VlmJudgeConfig
from recipes import suggest


@dataclass
class JudgeConfig:
    name: str = ""  # sandbox | videocon_physics | videophy2 | vlm; empty: no judge
    sandbox: SandboxJudgeConfig = field(default_factory=SandboxJudgeConfig)
    videocon_physics: VideoConPhysicsConfig = field(default_factory=VideoConPhysicsConfig)
    videophy2: VideoPhy2Config = field(default_factory=VideoPhy2Config)
    vlm: VlmJudgeConfig = field(default_factory=VlmJudgeConfig)


# Each builds its judge from the field of JudgeConfig that has its name.
JUDGES: dict[str, Callable[..., Judge]] = {
    "sandbox": sandbox.build,
    "videocon_physics": videocon_physics.build,
    "videophy2": videophy2.build,
    "vlm": vlm.build,
}


def build_judge(config: JudgeConfig, fps: float, device: torch.device | str) -> Judge:
    """The judge that `config` names, for clips of `fps` frames a second.

    Cheap, and checks everything that can be checked without a clip: call it before any work. Raises ValueError for an
    unknown name, for a judge's own settings that cannot work, and for a frame rate of theirs that is not the clips'.
    """
    if config.name not in JUDGES:
        raise ValueError(f"judge.name={config.name!r} is no judge; {suggest(config.name, JUDGES)}")
    settings = getattr(config, config.name)
    if settings.fps not in (fps, type(settings)().fps):
        raise ValueError(
            f"judge.{config.name}.fps={settings.fps:g}, but the clips have {fps:g} frames a second (video.fps);"
            f" leave judge.{config.name}.fps out"
        )
    return JUDGES[config.name](dataclasses.replace(settings, fps=fps), device)
