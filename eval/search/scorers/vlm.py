"""A vision-language model as a scorer: its answers to the two questions of `eval.judges.vlm`, low is good."""

import dataclasses

import torch

from eval.judges import vlm
from eval.judges.vlm import VlmJudgeConfig
from eval.search.scorers.judge import JudgeScore


def build(config: VlmJudgeConfig, aspect: str, fps: float, device: torch.device | str) -> JudgeScore:
    """For clips of `fps` frames a second. Raises ValueError for settings that cannot work, before any question."""
    return JudgeScore(vlm.build(dataclasses.replace(config, fps=fps), device), aspect)
