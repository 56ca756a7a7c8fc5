"""Several scorers as one: the mean of a clip's ranks among its prompt's candidates, which needs no common scale."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from eval.search.candidates import Candidates, Scorer, ranks


@dataclass(frozen=True)
class RankSum:
    """By hand: ranks 1, 2, 3 and 2, 1, 3 give 1.5, 1.5, 3."""

    scorers: Sequence[Scorer]

    def __call__(self, candidates: Candidates) -> Tensor:
        return torch.stack([ranks(scorer(candidates)) for scorer in self.scorers]).mean(dim=0).float()
