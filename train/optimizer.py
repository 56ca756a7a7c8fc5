"""AdamW on the adapters and the learning-rate schedule (PhyGDPO section 3: 1e-5 to 1e-6, cosine, weight decay 0.01)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn


@dataclass
class OptimConfig:
    steps: int = 10_000  # optimizer steps
    batch_size: int = 8  # preference groups per step over all GPUs; accumulation follows from it
    lr: float = 1e-5  # learning rate after warm-up
    lr_end: float = 1e-6  # learning rate at the last step (cosine only)
    schedule: str = "cosine"  # cosine | constant
    warmup_steps: int = 0  # linear from 0
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0  # global norm above which gradients are scaled down

    def __post_init__(self) -> None:
        if self.steps < 0:
            raise ValueError(f"optim.steps={self.steps}: use 0 or more")
        if self.batch_size < 1:
            raise ValueError(f"optim.batch_size={self.batch_size}: use 1 or more")


def build_optimizer(
    config: OptimConfig, parameters: list[nn.Parameter], *, heads: Sequence[nn.Parameter] = (), head_lr: float = 0.0
) -> torch.optim.AdamW:
    """AdamW over float32 parameters, with betas 0.9 and 0.999 and eps 1e-8. `heads` get the same schedule with its peak
    at `head_lr`: each group's "scale" is what its learning rate is of `learning_rate`."""
    groups = [{"params": parameters, "scale": 1.0}]
    if heads:
        groups.append({"params": list(heads), "scale": head_lr / config.lr})
    return torch.optim.AdamW(
        groups,
        lr=config.lr,
        weight_decay=config.weight_decay,
        fused=parameters[0].is_cuda,
    )


def learning_rate(config: OptimConfig, step: int) -> float:
    """Learning rate of step `step` (0-based), a pure function, so that nothing of the schedule needs saving.

    By hand: cosine over 11 steps from 1 to 0 without warm-up is 0.5 at step 5. ValueError for an unknown schedule.
    """
    if config.schedule not in ("cosine", "constant"):
        raise ValueError(f"optim.schedule={config.schedule!r}: must be cosine or constant")
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.lr
    progress = (step - config.warmup_steps) / max(1, config.steps - 1 - config.warmup_steps)
    return config.lr_end + (config.lr - config.lr_end) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
