"""The policy's pass over the winner, and the terms that read it: what train/gdpo.py and train/sft.py share.

    L += w_pix L_pix + w_sem L_sem + w_self L_self          train/physics.py, train/self_score.py

None of them costs the policy another pass: `predict` returns the block features, the velocity and the flow error.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from losses.flow_matching import flow_error, interpolate
from train import physics, self_score
from train.backbones.base import Conditioning
from train.groups import Sample
from train.loop import Policy


@dataclass
class Prediction:
    error: Tensor  # (N,) flow error of what is generated: an image that is held as the first frame has none
    x_t: Tensor  # (N,C,F,H,W) what the network saw
    velocity: Tensor  # (N,C,F,H,W) float32
    features: Tensor | None  # (N,D,F',H',W') of the block that the physics terms read

    def every(self, members: int) -> "Prediction":
        """The first of every `members` clips."""
        features = None if self.features is None else self.features[::members]
        return Prediction(self.error[::members], self.x_t[::members], self.velocity[::members], features)


def check(config: Any) -> None:
    """Refuse settings that cannot work, naming key, value and remedy."""
    physics.check(config.physics, winner=config.objective.winner, lr=config.optim.lr)
    self_score.check(config.self_score)


def prepare(config: Any, sample: Sample, generator: torch.Generator) -> dict[str, Tensor]:
    """What the terms need of a training sample beside its latents, in fixed shapes; draws come after those of the
    objective, so that a weight of 0 leaves these as they are."""
    drawn = self_score.draws(
        config.self_score,
        position=sample.position,
        batch_size=config.optim.batch_size,
        shape=sample.group.winner.shape,
        generator=generator,
    )
    return physics.group_targets(config.physics, sample.group) | drawn


def waiting(batch: dict[str, Tensor]) -> int:
    """Passes whose activations wait for their backward at once: the winner's, and where a self-score is due its
    judge's."""
    return 2 if "score_t" in batch else 1


def predict(
    policy: Policy, clips: Tensor, noise: Tensor, batch: dict[str, Tensor], *, features_at: int | None = None
) -> Prediction:
    """One pass over clips (N,C,F,H,W) with their noise, at the batch's t and text; N is a multiple of its B groups,
    whose clips stand together."""
    copies = len(clips) // len(batch["t"])
    t = batch["t"].repeat_interleave(copies)
    condition = batch["condition"].repeat_interleave(copies, dim=0) if "condition" in batch else None
    conditioning = Conditioning(batch["text"].repeat_interleave(copies, dim=0), condition)
    x_t, features = interpolate(clips, noise, t), None
    if features_at is None:
        velocity = policy.backbone.velocity(x_t, t, conditioning)
    else:
        velocity, features = policy.backbone.velocity(x_t, t, conditioning, features_at=features_at)
    error = flow_error(*map(conditioning.generated, (velocity, clips, noise)))
    return Prediction(error, x_t, velocity, features)


def winner_losses(
    config: Any, policy: Policy, prediction: Prediction, batch: dict[str, Tensor]
) -> tuple[Tensor, dict[str, Tensor]]:
    """Sum of the weighted terms of every winner, (B,) float32, and metrics; zeros where no term is on."""
    total, metrics = torch.zeros_like(prediction.error), {}
    if prediction.features is not None:
        loss, metrics = physics.physics_losses(config.physics, policy.heads, prediction.features, batch)
        total = total + loss
    if "score_t" in batch:
        loss, more = self_score.self_score_loss(config.self_score, policy, prediction.x_t, prediction.velocity, batch)
        total, metrics = total + loss, metrics | more
    return total, metrics
