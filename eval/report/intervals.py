"""Means with 95% bootstrap intervals, alone and paired, of rows that come in clusters: what is one observation, as a
prompt's clips of several seeds or the views of one scene, goes together.

A figure of a benchmark is a function of its columns' means (`Benchmark.derive`), so every replicate is a set of
columns' means, and all replicates are made at once.

    bootstrap           clusters are drawn with replacement, each with all of its clips; percentile interval
    Wilson's            of a share of so many successes; it has a width where all agree
    paired difference   the same drawn clusters for both models
    paired test         within a cluster both models' labels are exchanged, or not: for a mean, the signs of the
                        clusters' differences are flipped. Two-sided; all exchanges where there are few clusters, else
                        random ones, with the share counted as (1 + at least as large) / (1 + drawn)
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np

RESAMPLES = 10_000
Z = 1.959964  # of a 95% interval
AT_ONCE = 500  # replicates; the table of all of them would be large
PERCENTILES = (33, 67)  # of motion, between its strata: Proprio, appendix A.5

Derive = Callable[[Mapping[str, np.ndarray]], Mapping[str, np.ndarray]]


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
    means = np.concatenate([values[drawn].mean(axis=1) for drawn in _draws(values.size, seed, resamples)])
    low, high = np.quantile(means, [0.025, 0.975])
    return Estimate(float(values.mean()), float(low), float(high))


def wilson(successes: float, count: int) -> Estimate:
    """A share with Wilson's 95% interval (1927). By hand: 8 of 10 -> 0.8 [0.490, 0.943]."""
    rate, square = successes / count, Z**2
    centre = (rate + square / (2 * count)) / (1 + square / count)
    half = Z / (1 + square / count) * math.sqrt(rate * (1 - rate) / count + square / (4 * count**2))
    return Estimate(rate, max(centre - half, 0.0), min(centre + half, 1.0))


@dataclass(frozen=True)
class Clustered:
    """Columns summed over each cluster's clips."""

    columns: tuple[str, ...]
    sums: np.ndarray  # (K, C) float64
    counts: np.ndarray  # (K, C) of clips that have the column

    @classmethod
    def of(
        cls, columns: Sequence[str], clusters: Sequence[str], rows: Sequence[tuple[str, Mapping[str, float]]]
    ) -> "Clustered":
        """rows: (cluster, values by column) a clip; clusters: in whose order, each once. Others' rows are left out."""
        places = {cluster: place for place, cluster in enumerate(clusters)}
        numbers = {column: number for number, column in enumerate(columns)}
        sums, counts = np.zeros((2, len(places), len(numbers)))
        for cluster, values in rows:
            if cluster in places:
                for column, value in values.items():
                    if column in numbers:
                        sums[places[cluster], numbers[column]] += value
                        counts[places[cluster], numbers[column]] += 1
        return cls(tuple(columns), sums, counts)

    def means(self, weights: np.ndarray) -> dict[str, np.ndarray]:
        """Columns' means, (R,) each, with clusters counted `weights` (R, K) times; NaN where no clip has the column."""
        return _divide(self.columns, weights @ self.sums, weights @ self.counts)


def estimate(rows: Clustered, derive: Derive, *, minus: Clustered | None = None) -> dict[str, Estimate | None]:
    """Each figure with its interval, or its difference to `minus`, of the same clusters; None where it has no value."""
    clusters = len(rows.sums)

    def figures(weights: np.ndarray) -> dict[str, np.ndarray]:
        with np.errstate(all="ignore"):
            found = derive(rows.means(weights))
            less = derive(minus.means(weights)) if minus is not None else {}
        return {name: values - less[name] if less else values for name, values in found.items()}

    whole = figures(np.ones((1, clusters)))
    if not clusters:
        return dict.fromkeys(whole)
    parts = [figures(_counted(drawn)) for drawn in _draws(clusters, 0, RESAMPLES)]
    found: dict[str, Estimate | None] = {}
    for name, (value,) in whole.items():
        replicates = np.concatenate([part[name] for part in parts])
        replicates = replicates[np.isfinite(replicates)]  # a draw may hold no clip of a small category
        found[name] = None
        if np.isfinite(value) and len(replicates):
            found[name] = Estimate(float(value), *(float(edge) for edge in np.quantile(replicates, [0.025, 0.975])))
    return found


def paired_test(first: Clustered, second: Clustered, derive: Derive) -> dict[str, float | None]:
    """Two-sided p of each figure's difference between two models with the same clusters and clips."""
    assert (first.counts == second.counts).all(), "only pairs can be exchanged"
    clusters, change = len(first.sums), first.sums - second.sums
    counts, totals = first.counts.sum(axis=0), first.sums.sum(axis=0) + second.sums.sum(axis=0)

    def differences(kept: np.ndarray) -> dict[str, np.ndarray]:
        """With the first model's clips counted as its own where `kept` (R, K) is 1, as the second's where it is 0."""
        ours = second.sums.sum(axis=0) + kept @ change
        with np.errstate(all="ignore"):
            one, other = (derive(_divide(first.columns, sums, counts)) for sums in (ours, totals - ours))
        return {name: values - other[name] for name, values in one.items()}

    seen = {name: float(value) for name, (value,) in differences(np.ones((1, clusters))).items()}
    exact = 2**clusters <= RESAMPLES
    every = np.array(list(product((0, 1), repeat=clusters))) if exact else None
    extreme, drawn = dict.fromkeys(seen, 0), 0
    for kept in [every] if exact else _draws(clusters, 0, RESAMPLES, below=2):
        drawn += len(kept)
        for name, values in differences(kept).items():
            extreme[name] += int((np.abs(values) >= abs(seen[name]) - 1e-9 * max(1, abs(seen[name]))).sum())
    more = 0 if exact else 1
    return {
        name: (extreme[name] + more) / (drawn + more) if np.isfinite(value) and clusters else None
        for name, value in seen.items()
    }


def strata(motion: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The strata (N,) of clips with motion (N,): 0 up to the 33rd percentile of all, 2 above the 67th, 1 between; and
    both percentiles."""
    edges = np.percentile(motion, PERCENTILES)
    return np.searchsorted(edges, motion, side="left"), edges


def _divide(columns: Sequence[str], sums: np.ndarray, counts: np.ndarray) -> dict[str, np.ndarray]:
    """Sums (R, C) over counts (R, C) or (C,), by column."""
    with np.errstate(invalid="ignore", divide="ignore"):
        means = sums / counts
    return {column: means[:, number] for number, column in enumerate(columns)}


def _draws(size: int, seed: int, resamples: int, *, below: int | None = None) -> Iterator[np.ndarray]:
    """Numbers from 0 below `size`, or `below`: (at most AT_ONCE, size), `resamples` rows in all."""
    generator = np.random.default_rng(seed)
    for start in range(0, resamples, AT_ONCE):
        yield generator.integers(0, below or size, (min(AT_ONCE, resamples - start), size))


def _counted(drawn: np.ndarray) -> np.ndarray:
    """How often each of `size` was drawn: (R, size) of (R, size) numbers."""
    count, size = drawn.shape
    flat = (drawn + size * np.arange(count)[:, None]).ravel()
    return np.bincount(flat, minlength=count * size).reshape(count, size).astype(np.float64)
