"""Supervised fine-tuning by flow matching: the LoRA-SFT baseline, and the base of the physics losses.

    accelerate launch train/sft.py recipe=wan14b

Reads the same preference groups as `train/gdpo.py` and trains on their winners alone:

    loss = mean |v_theta(x_t, t) - (x_1 - x_0)|^2
"""

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

import recipes
from losses.flow_matching import flow_error, interpolate
from train import gdpo
from train.backbones.base import Conditioning
from train.groups import GroupSet, Sample, pad_text
from train.loop import Policy, fit
from train.plan import print_plan


@dataclass
class ObjectiveConfig(gdpo.ObjectiveConfig):
    """The preference objective's keys, of which SFT reads those of time and winner."""

    reference_passes: ClassVar[int] = 0

    def clips_per_group(self, groups: GroupSet) -> int:
        return 1


@dataclass
class Config(gdpo.Config):
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)


def prepare(config: Config, sample: Sample) -> dict[str, Tensor]:
    """winner (C,F,H,W), text (L,D), t (), noise (C,F,H,W) float32, condition (optional): the draws of
    `gdpo.prepare`'s winner."""
    group = sample.group
    generator = torch.Generator().manual_seed(gdpo.draw_seed(config.seed, sample.position))
    t = gdpo.draw_time(config.objective, generator)
    tensors = {
        "winner": group.winner,
        "text": pad_text(group.text, config.backbone.text_length),
        "t": t,
        "noise": torch.randn(group.winner.shape, generator=generator),
    }
    return tensors if group.condition is None else tensors | {"condition": group.condition}


def step(config: Config, policy: Policy, batch: dict[str, Tensor]) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Gradients of the batch's mean flow error with respect to the adapters, and metrics."""
    x_t = interpolate(batch["winner"], batch["noise"], batch["t"])
    velocity = policy.backbone.velocity(x_t, batch["t"], Conditioning(batch["text"], batch.get("condition")))
    loss = flow_error(velocity, batch["winner"], batch["noise"]).mean()
    return list(torch.autograd.grad(loss, policy.switch.parameters())), {"loss": loss.detach()}


def main(argv: list[str] | None = None) -> None:
    config = recipes.load(Config, argv)
    gdpo.check(config)
    if config.dry_run:
        print_plan(config)
        return
    shown = ("loss", "grad_norm", "tokens_per_second")
    fit(config, step=step, prepare=prepare, check_groups=lambda *_: None, shown=shown)


if __name__ == "__main__":
    main()
