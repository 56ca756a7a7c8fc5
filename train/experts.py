"""The two networks of Wan2.2 A14B: what they are called, where a pipeline has them, and both as one."""

from collections.abc import Mapping

from torch import nn

BOTH = "both"  # a value of backbone.expert, and of a LoRA of both in one file
EXPERT_FOLDERS = {"high_noise": "transformer", "low_noise": "transformer_2"}


def as_one(experts: Mapping[str, nn.Module]) -> nn.ModuleDict:
    """Both experts as one module, in which they are named as their folders in the pipeline."""
    return nn.ModuleDict({folder: experts[name] for name, folder in EXPERT_FOLDERS.items()})
