"""What a term is. It reads the policy's pass over the winner, so that it costs the policy none of its own.

A new term is a module in this folder with these three functions, and a line in `train.terms.TERMS`.
"""

from typing import Any, Protocol

import torch
from torch import Tensor

from train.data import Sample
from train.policy import Policy, Prediction


class Term(Protocol):
    def check(self, config: Any) -> None:
        """Refuse settings that cannot work: ValueError naming key, value and remedy."""

    def prepare(self, config: Any, sample: Sample, generator: torch.Generator) -> dict[str, Tensor]:
        """What the term needs of a sample beside its latents, in fixed shapes; empty where its weight is 0. A term
        draws after the objective and after the terms before it, so that a weight of 0 leaves their draws as they are.
        """

    def loss(
        self, config: Any, policy: Policy, won: Prediction, batch: dict[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]] | None:
        """The weighted term of every winner, (B,) float32, and metrics; None where it is not on."""
