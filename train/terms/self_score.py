"""A regulariser from the generator's own opinion (Proprio, sections 3.1-3.2, turned from inference to training).

The policy predicts the winner from its noisy version. Its untrained self scores how natural that prediction is; the
term is positive where the prediction scores worse than the winner itself:

    z_0 = x_t - t v_theta(x_t)                            from the policy's own pass over the noisy winner
    S(z) = |v_psi((1 - s) z + s n, s) - (n - z)|^2        in the winner's motion mask; one drawn s and n for both
    L   += strength max(0, S(z_0) - S(winner))            every k steps, in units of `train.gdpo.slope`

psi is the switched-off reference: it judges and receives no gradient. Nor does a prediction that is natural enough. The
gradient reaches the policy through z_0 alone, and is taken right after the judge's pass, inside its context: its
activations are gone before the policy's own are needed, and with `train.parameters=full` the copied weights are in
place for both.

Deviations: levels above Proprio's 0.3 to 0.6, at which the hinge was rarely positive on the sandbox; one level and one
draw per step (Proprio: 4 x 4), so there is nothing to weigh by variance; the mask is the winner's for both, or standing
still would be a way out. Where the image is the first latent frame, z_0 has it too, and S leaves that frame out, as in
eval/search/noise_refinement.py: the network says nothing there. Which steps are due follows from the global position of
a sample, so every rank runs the same number of passes. Where both experts of A14B train, the one that serves the step
judges, and a level that it does not serve becomes the boundary.

Shapes: B clips, C latent channels, F latent frames, H W latent rows and columns.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from losses.flow_matching import interpolate
from losses.self_score import masked_error, motion_mask
from train.backbones.base import Conditioning
from train.data import Sample
from train.policy import Policy, Prediction


@dataclass
class SelfScoreConfig:
    # Weight of the hinge, in mean squared velocity, in units of the preference loss's slope (`train.gdpo.slope`), in
    # supervised training of the flow error; 0: no such term.
    strength: float = 0.0
    every: int = 1  # k: the term is on in steps 0, k, 2 k ...
    t_min: float = 0.6  # the level s is drawn uniformly from [t_min, t_max]
    t_max: float = 0.9
    motion_mask: bool = False  # true: score only where the winner moves, as Proprio does; 0.861 against 0.866


def check(config: Any) -> None:
    """Refuse settings that cannot work, naming key, value and remedy."""
    config = config.self_score
    if not (config.strength >= 0 and math.isfinite(config.strength)):
        raise ValueError(f"self_score.strength={config.strength}: must be 0 (no such term) or positive")
    if config.every < 1:
        raise ValueError(f"self_score.every={config.every}: must be at least 1")
    if not 0 < config.t_min <= config.t_max < 1:
        raise ValueError(f"self_score.t_min={config.t_min}, t_max={config.t_max}: need 0 < t_min <= t_max < 1")


def prepare(config: Any, sample: Sample, generator: torch.Generator) -> dict[str, Tensor]:
    """score_t () and score_noise (C,F,H,W); empty where the step of the sample is not due."""
    own = config.self_score
    if own.strength == 0 or sample.position // config.optim.batch_size % own.every:
        return {}
    level = own.t_min + (own.t_max - own.t_min) * torch.rand((), generator=generator)
    level = level if sample.share is None else sample.share.nearest(level)
    return {"score_t": level, "score_noise": torch.randn(sample.group.winner.shape, generator=generator)}


def loss(
    config: Any, policy: Policy, won: Prediction, batch: dict[str, Tensor]
) -> tuple[Tensor, dict[str, Tensor]] | None:
    """strength times the hinge of every clip, (B,) float32, differentiable in `won.velocity`, and metrics; None where
    the batch's step is not due. batch holds what `prepare` gives, stacked."""
    if "score_t" not in batch:
        return None
    winner, level, noise = batch["winner"].float(), batch["score_t"], batch["score_noise"]
    conditioning = Conditioning.of(batch)
    mask = conditioning.generated(motion_mask(winner)) if config.self_score.motion_mask else None
    predicted = won.x_t - batch["t"].view(-1, 1, 1, 1, 1) * won.velocity  # z_0
    predicted = policy.backbone.start(predicted, conditioning)

    def score(clip: Tensor) -> Tensor:  # (B,C,F,H,W) -> (B,)
        answer = policy.backbone.velocity(interpolate(clip, noise, level), level, conditioning)
        return masked_error(conditioning.generated(answer - (noise - clip)), mask)

    with policy.switch.frozen_reference():
        own = score(winner).detach()
    with policy.switch.reference():
        judged = predicted.detach().requires_grad_()
        scores = score(judged)
        hinge = (scores - own).relu()
        (direction,) = torch.autograd.grad(hinge.sum(), judged)
    # Its value is the hinge and its gradient the hinge's, of which the judge's graph is already gone.
    along = (direction * predicted).flatten(1).sum(dim=1)
    total = config.self_score.strength * (hinge.detach() + along - along.detach())
    return total, {"self": hinge.detach().mean(), "self_score": scores.detach().mean(), "self_winner": own.mean()}
