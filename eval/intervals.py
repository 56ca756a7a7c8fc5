"""Means with 95% bootstrap intervals, alone and paired."""

from dataclasses import dataclass

import numpy as np

RESAMPLES = 10_000


@dataclass(frozen=True)
class Estimate:
    """A mean and its 95% interval."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"


def bootstrap_mean(values: np.ndarray, *, seed: int = 0, resamples: int = RESAMPLES) -> Estimate:
    """Mean of `values` (N,) with its percentile bootstrap interval; ValueError for no or non-finite values.

    For a paired difference pass the differences of the pairs.
    """
    values = np.asarray(values, dtype=np.float64)
    if values.size == 0 or not np.isfinite(values).all():
        raise ValueError(
            f"{values.size} values, {int((~np.isfinite(values)).sum())} of them not finite: nothing to average"
        )
    generator = np.random.default_rng(seed)
    means = np.empty(resamples)
    for start in range(0, resamples, 500):  # the index table of all resamples at once would be large
        count = min(500, resamples - start)
        means[start : start + count] = values[generator.integers(0, values.size, (count, values.size))].mean(axis=1)
    low, high = np.quantile(means, [0.025, 0.975])
    return Estimate(float(values.mean()), float(low), float(high))
