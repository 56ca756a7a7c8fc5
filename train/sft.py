"""Supervised fine-tuning by flow matching: the LoRA-SFT baseline, and the base of the physics losses.

    accelerate launch train/sft.py recipe=wan14b

Reads the same preference groups as `train/gdpo.py` and trains on their winners alone:

    loss = mean |v_theta(x_t, t) - (x_1 - x_0)|^2 + trajectory L_pix + relational L_sem + strength L_self

The last three, off by default, are those of train/terms; with trajectory and relational this is PhysisForcing's eq. 13.
"""

from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor

import recipes
from train import entry, gdpo
from train.data import Sample
from train.loop import fit
from train.plan import print_plan
from train.policy import Policy, gradients, predict, winner_passes
from train.terms.physics import feature_block


@dataclass
class ObjectiveConfig(gdpo.ObjectiveConfig):
    """The preference objective's keys, of which SFT reads those of time, weighting and winner."""

    reference_passes: ClassVar[int] = 0

    def clips_per_group(self, num_losers: int) -> int:
        return 1


@dataclass
class Config(gdpo.Config):
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)


def prepare(config: Config, sample: Sample) -> dict[str, Tensor]:
    """`gdpo.winner_tensors` with noise (C,F,H,W): the draws of `gdpo.prepare`'s winner."""
    tensors = gdpo.winner_tensors(config, sample)
    return tensors | {"noise": tensors["noise"][0]}


def step(config: Config, policy: Policy, batch: dict[str, Tensor]) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Gradients of the batch's mean loss with respect to the adapters and heads, and metrics."""
    block = feature_block(config.physics, len(policy.backbone.blocks))
    with winner_passes(batch):
        prediction = predict(policy, batch["winner"], batch["noise"], batch, features_at=block)
    terms, metrics = gdpo.term_losses(config, policy, prediction, batch)
    loss = (gdpo.weigh(config.objective, prediction.error, batch) + terms).mean()
    metrics = {"loss": loss.detach(), "flow": prediction.error.detach().mean()} | metrics
    return gradients(loss, policy), metrics


def main(argv: list[str] | None = None) -> None:
    config = recipes.load(Config, argv)
    gdpo.check(config)
    if config.dry_run:
        print_plan(config, argv, supervised=True)
        return
    shown = ("loss", "grad_norm", "tokens_per_second")
    judged = config.self_score.strength > 0
    fit(config, step=step, prepare=prepare, check_groups=lambda *_: None, shown=shown, keep_reference=judged)


if __name__ == "__main__":
    entry.run(main)
