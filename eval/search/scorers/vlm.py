"""A vision-language model as a scorer: its answers to the two questions of `eval.judges.vlm`, low is good."""

import torch

from eval.judges import vlm
from eval.judges.vlm import VlmJudgeConfig
from eval.search.scorers.judge import JudgeScore


def build(config: VlmJudgeConfig, aspect: str, device: torch.device | str) -> JudgeScore:
    """Raises ValueError for settings that cannot work, before any question is asked."""
    return JudgeScore(vlm.build(config, device), aspect)
