"""Racing (ours): the winner of full scoring for a fraction of its passes.

A score that is a mean over rounds (one network pass a clip each: a noise level with a draw, shared by all candidates)
need not be finished for a clip that cannot win any more. After a few rounds every candidate is compared with the
leader. Their full scores differ by

    D = mean of x_i - x_leader over all R rounds,   estimated after n of them by the mean d over those,
    standard error  s / sqrt(n) sqrt(1 - n / R)     (rounds are drawn without replacement: at n = R nothing is open)

and a candidate whose d exceeds its error by the normal quantile of the stated confidence is dropped. The risk of losing
the winner of full scoring is shared evenly (Bonferroni) between the rivals. The looks are not paid for: they see the
same rounds again, what is open shrinks with each, and the rounds' levels add to s, so that the intervals are wide as
it is. Simulated races of equally good candidates, the hardest there are, keep the winner as often as stated (the tests
hold that). Shared noise makes the differences small and s with them. A variance of a few rounds is unreliable, so it is
drawn towards the mean over the rivals, which counts for PRIOR rounds.
"""

from collections.abc import Callable
from dataclasses import dataclass
from statistics import NormalDist

import torch
from torch import Tensor

PRIOR = 8.0  # rounds that the variance of all rivals together counts for


@dataclass(frozen=True)
class Race:
    winner: int  # number of the candidate
    scores: Tensor  # (N,) float32, mean over the rounds that the candidate ran; comparable among equal `rounds` only
    rounds: list[int]  # that each candidate ran

    @property
    def passes(self) -> int:
        return sum(self.rounds)


def race(
    observe: Callable[[int, list[int]], Tensor],
    num_candidates: int,
    num_rounds: int,
    *,
    confidence: float = 0.98,
    first: int = 3,
    every: int = 1,
) -> Race:
    """Find the candidate with the lowest mean over all rounds.

    observe(round, candidates) -> (len(candidates),) values of that round for those candidates. The first look is after
    `first` rounds, then one every `every`. Raises ValueError for settings that cannot work.
    """
    if not 0 < confidence < 1:
        raise ValueError(f"confidence={confidence} must lie between 0 and 1")
    if not (num_candidates > 0 and 2 <= first and every > 0 and num_rounds > 0):
        raise ValueError(f"{num_candidates} candidates, {num_rounds} rounds, first={first}, every={every}: first >= 2")
    looks = [n for n in range(first, num_rounds) if (n - first) % every == 0]
    quantile = NormalDist().inv_cdf(1 - (1 - confidence) / max(1, num_candidates - 1))
    values = torch.full((num_candidates, num_rounds), torch.nan, dtype=torch.float64)
    alive = list(range(num_candidates))
    for number in range(num_rounds):
        values[alive, number] = observe(number, alive).double().cpu()
        if number + 1 in looks and len(alive) > 1:
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
