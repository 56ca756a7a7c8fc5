"""Times of training samples; and, where both experts of Wan2.2 A14B train, which of them serves a step.

With `backbone.expert=both` all groups of a step, on all ranks, meet one expert, so that no step needs both networks. A
block of EXPERT_STEPS steps belongs to the expert that serves one drawn time, and each of its groups then draws its time
anew until it is one that this expert serves. Over a run t has the distribution that the objective's keys say, and each
expert the share of the steps that falls on its side of the boundary. Half each would train the experts on times that
they serve more or less often than the recipe says; AdamW scales each expert's steps by itself, so a share decides how
many steps an expert gets, not how large they are.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from train.backbones import BACKBONES
from train.backbones.base import BOTH, Backbone
from train.backbones.wan22_a14b import expert_at
from train.files import seed_of

EXPERT_STEPS = 8  # in a row: fetching the other expert's weights from host memory takes about a second


@dataclass(frozen=True)
class Share:
    """The times that one of two experts serves."""

    expert: str
    boundary: float

    def holds(self, t: Tensor) -> bool:
        return expert_at(t, self.boundary) == self.expert

    def nearest(self, t: Tensor) -> Tensor:
        """t, or the boundary where the other expert serves t."""
        return t if self.holds(t) else torch.full_like(t, self.boundary)


class Turns:
    """Whose turn it is, a pure function of the seed and the step. ValueError where one expert would have none."""

    def __init__(self, config: Any, boundary: float):
        self.config, self.boundary = config, boundary
        objective = config.objective
        if not objective.t_min < boundary < objective.t_max:
            raise ValueError(
                f"backbone.expert=both needs times on both sides of {boundary:g}, where the experts change, but"
                f" objective.t_min={objective.t_min:g} and t_max={objective.t_max:g}: set them to 0 and 1, or name one"
                " expert"
            )

    def settings(self) -> dict[str, float]:
        """What turns depend on beside the seed, the batch size and the draw of t."""
        return {"boundary": self.boundary, "expert_steps": EXPERT_STEPS}

    def of_step(self, step: int) -> Share:
        """Steps count from 0, by groups seen over the batch size."""
        seed = seed_of(f"expert {self.config.seed} {step // EXPERT_STEPS}") >> 7
        t = draw_time(self.config.objective, torch.Generator().manual_seed(seed))
        return Share(expert_at(t, self.boundary), self.boundary)

    def of_sample(self, position: int) -> Share:
        return self.of_step(position // self.config.optim.batch_size)


def turns_of(config: Any, backbone: Backbone) -> Turns | None:
    """Those of a run that trains both experts, else None."""
    return Turns(config, backbone.boundary) if backbone.trained == BOTH else None


def check_experts(config: Any) -> None:
    """ValueError, before weights are read, for `backbone.expert=both` where it cannot work."""
    family = BACKBONES.get(config.backbone.family)
    if config.backbone.expert != BOTH or family is None:
        return
    family.training_expert(config.backbone)
    Turns(config, family.default_boundary)
    if config.train.parameters == "full":
        raise ValueError("train.parameters=full trains one network: set backbone.expert to high_noise or low_noise")


def draw_time(objective: Any, generator: torch.Generator, share: Share | None = None) -> Tensor:
    """One time t in [t_min, t_max], shape (); with `share` the first of those drawn that lies in it."""
    while True:
        if objective.timesteps == "uniform":
            t = torch.rand((), generator=generator)
        else:
            t = torch.sigmoid(torch.randn((), generator=generator))
        t = objective.timestep_shift * t / (1 + (objective.timestep_shift - 1) * t)
        t = objective.t_min + (objective.t_max - objective.t_min) * t
        if share is None or share.holds(t):
            return t
