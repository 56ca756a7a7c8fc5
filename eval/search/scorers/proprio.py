"""Proprio's self-score (arXiv 2026, section 3.2): the generator's own residual, in three variants.

    global   eq. 5 over all cells     motion   eq. 6 in a mask     hybrid   mixing global + (1 - mixing) motion, eq. 11

with one of the masks of `eval.search.masks` and one of two weightings of the noise levels:

    inverse_variance   eq. 9, each clip by the variance of its own draws
    uniform            for distilled generators (table 8)

An empty or frozen clip is easy to explain, so read these scores beside the motion baseline.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from eval.search.candidates import Candidates
from eval.search.masks import mask_of
from eval.search.residuals import Residuals
from losses.self_score import DELTA, aggregate, hybrid
from train.backbones.base import Backbone

VARIANTS = ("global", "motion", "hybrid")
MIXING = 0.2  # share of the global score in the hybrid one


@dataclass(frozen=True)
class Proprio:
    """One variant of the score; all of them share `residuals`' passes."""

    residuals: Residuals
    variant: str = "hybrid"  # global | motion | hybrid
    mask: str = "motion"  # motion | text | attention
    weighting: str = "inverse_variance"  # inverse_variance | uniform

    def __call__(self, candidates: Candidates) -> Tensor:
        maps = self.residuals.maps(candidates)  # (N, levels, draws, F, H, W)
        errors = {name: masked_mean(maps, weight) for name, weight in self._weights(candidates).items()}
        return self._mix({name: aggregate(values, weighting=self.weighting) for name, values in errors.items()})

    def round_values(self, candidates: Candidates, number: int, chosen: list[int]) -> Tensor:
        """The score from one round of `Residuals` alone, (len(chosen),): with uniform weighting their mean over all
        rounds is the score. ValueError for another weighting."""
        if self.weighting != "uniform":
            raise ValueError(f"weighting {self.weighting!r} is no mean over passes, so it cannot race: use uniform")
        maps = self.residuals.round(candidates, number, chosen)  # (n, F, H, W)
        weights = self._weights(candidates)
        return self._mix({name: masked_mean(maps, weight[chosen]) for name, weight in weights.items()})

    def _weights(self, candidates: Candidates) -> dict[str, Tensor]:
        """Weights of the cells, (N, F, H, W), of the parts that the variant needs."""
        free, weights = free_cells(candidates), {}
        if self.variant in ("global", "hybrid"):
            weights["global"] = free
        if self.variant in ("motion", "hybrid"):
            weights["motion"] = mask_of(self.mask, candidates, self.residuals) * free
        return weights

    def _mix(self, scores: dict[str, Tensor]) -> Tensor:
        if self.variant == "hybrid":
            return hybrid(scores["global"], scores["motion"], mixing=MIXING)
        return scores[self.variant]


def masked_mean(maps: Tensor, mask: Tensor) -> Tensor:
    """Squared residuals (N, ..., F, H, W) averaged by the weights mask (N, F, H, W): (N, ...), eq. 6."""
    weight = mask.flatten(1)  # (N, cells)
    total = torch.einsum("n...c,nc->n...", maps.flatten(-3), weight)
    return total / (weight.sum(dim=1) + DELTA).view(-1, *[1] * (total.dim() - 1))


def free_cells(candidates: Candidates) -> Tensor:
    """(N, F, H, W) float32: 0 in the frames that the image holds fixed, 1 elsewhere."""
    count, _, *size = candidates.latents.shape
    cells = torch.ones(count, *size)
    cells[:, : candidates.conditioning.held_frames(size[0])] = 0
    return cells


def build(config: Any, backbone: Backbone, *_: Any, kind: type[Proprio] = Proprio, **settings: str) -> Proprio:
    """The scorer of a SearchConfig; scorers built from equal settings share their passes."""
    return kind(Residuals(backbone, config.residuals, config.batch_size), **settings)
