"""Racing (ours): the winner of full scoring for a fraction of its passes.

A score that is a mean over rounds (one network pass per clip: a noise level with a draw, shared by all candidates)
need not be finished for a clip that cannot win any more. After a few rounds every candidate is compared with the
leader. Their full scores differ by

    D = mean of x_i - x_leader over all R rounds,   estimated after n of them by the mean d over those,
    standard error  s / sqrt(n) sqrt(1 - n / R)     (rounds are drawn without replacement: at n = R nothing is open)

and a candidate whose d exceeds its error by the normal quantile of CONFIDENCE is dropped. The risk of losing
the winner of full scoring is shared evenly (Bonferroni) between the rivals. There is no correction for looking after
every round: each look sees the earlier rounds again, less is open at each, and the differences between noise levels
count in s, which makes the intervals wide. Simulated races of equally good candidates, the hardest case, keep the
winner as often as stated (see the tests). Shared noise makes the differences, and with them s, small. A variance of a
few rounds is unreliable, so it is drawn towards the mean over the rivals, which counts as much as PRIOR rounds.
"""

from collections.abc import Callable
from dataclasses import dataclass
from statistics import NormalDist

import torch
from torch import Tensor

CONFIDENCE = 0.98  # that the winner is that of full scoring
FIRST = 3  # rounds before the first look; then there is one after every round
PRIOR = 8.0  # rounds that the variance of all rivals together counts for
SETTINGS = {"confidence": CONFIDENCE, "first": FIRST, "every": 1}  # what a race depends on, as plain JSON values


@dataclass(frozen=True)
class Race:
    winner: int  # number of the candidate
    scores: Tensor  # (N,) float32, mean over the rounds that the candidate ran; comparable among equal `rounds` only
    rounds: list[int]  # that each candidate ran

    @property
    def passes(self) -> int:
        return sum(self.rounds)


def race(observe: Callable[[int, list[int]], Tensor], num_candidates: int, num_rounds: int) -> Race:
    """Find the candidate with the lowest mean over all rounds.

    observe(round, candidates) -> (len(candidates),) values of that round for those candidates.
    """
    assert num_candidates > 0 and num_rounds > 0, (num_candidates, num_rounds)
    quantile = NormalDist().inv_cdf(1 - (1 - CONFIDENCE) / max(1, num_candidates - 1))
    values = torch.full((num_candidates, num_rounds), torch.nan, dtype=torch.float64)
    alive = list(range(num_candidates))
    for number in range(num_rounds):
        values[alive, number] = observe(number, alive).double().cpu()
        if FIRST <= number + 1 < num_rounds and len(alive) > 1:
            alive = survivors(values[:, : number + 1], alive, num_rounds, quantile)
        if len(alive) == 1:
            break
    means = values.nanmean(dim=1)
    winner = min(alive, key=lambda index: float(means[index]))
    return Race(winner, means.float(), values.isfinite().sum(dim=1).tolist())


def survivors(values: Tensor, alive: list[int], num_rounds: int, quantile: float) -> list[int]:
    """Those of `alive` that can still win by values (N, n) of the rounds run."""
    n = values.shape[1]
    leader = min(alive, key=lambda index: float(values[index].mean()))
    rivals = [index for index in alive if index != leader]
    difference = values[rivals] - values[leader]  # (rivals, n)
    variance = difference.var(dim=1)
    variance = (PRIOR * variance.mean() + (n - 1) * variance) / (PRIOR + n - 1)
    error = (variance / n * (1 - n / num_rounds)).sqrt()
    beaten = {
        index for index, far in zip(rivals, (difference.mean(dim=1) > quantile * error).tolist(), strict=True) if far
    }
    return [index for index in alive if index not in beaten]
