"""Difficulty resampling: more clips of the actions that the model does badly (PhyGDPO, section 2.1).

    S_k = mean score of the model's own clips for action k's most typical prompts
    d_k = 1 - S_k                                              difficulty
    r_k = exp(tau d_k)                                         sampling weight
    H_r(k) = min(H_f(k), floor(N r_k / sum_j r_j))             clips taken of the H_f(k) that there are

Deviations: the floor, which the paper does not print; `redistribute`, off by default, which gives what the caps H_f
leave over to the actions that have more; and `other`. In the paper every prompt belongs to its nearest action. Here the
prompts that are near to none (`pipeline.cluster.threshold`) are `other`, and take part as one more action with a
difficulty of its own: they tell of nothing in the list of actions, which does not mean that they show no physics. Rows
without an action (empty cells of a manifest) take part likewise, as one.

The paper chooses at random within an action; so it is here, by a hash of seed and key, so that a clip's fate does not
depend on the order of the rows.

Shapes: A actions, R rows.
"""

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from train.files import atomic, seed_of

SHOWN = 40  # actions in the picture


@dataclass
class ResampleConfig:
    budget: int = 0  # N, clips taken in all, at most; 0: all. Paper: 20000, of which the caps left 17K
    tau: float = 3.0  # how much the difficult is preferred; 0: all actions alike, and nothing has to be generated
    representatives: int = 8  # n_c, prompts of each action that the model is tried on
    redistribute: bool = False  # give what actions with too few clips leave over to the others


def check(config: ResampleConfig) -> None:
    """ValueError for settings that cannot work."""
    if config.budget < 0:
        raise ValueError(f"pipeline.resample.budget={config.budget}: use 0 (all clips) or more")
    if not (config.tau >= 0 and np.isfinite(config.tau)):
        raise ValueError(f"pipeline.resample.tau={config.tau}: use 0 (all actions alike) or more, such as 3")
    if config.representatives < 1:
        raise ValueError(f"pipeline.resample.representatives={config.representatives}: use 1 or more")


def targets(
    available: np.ndarray, difficulty: np.ndarray, *, tau: float, budget: int, redistribute: bool = False
) -> np.ndarray:
    """H_r, how many clips to take of each action: available H_f (A,) whole numbers, difficulty (A,) -> (A,) int64.

    With `redistribute` the budget is shared again among the actions that have more clips than their share, by the
    same weights, until none has too few; then the sum is the budget less at most one clip an action, or all there is.

    By hand, five actions, tau = ln 4, N = 120: difficulty 0, 0.5, 1, 0.5, 0 gives r = 1, 2, 4, 2, 1 with the sum 10,
    shares 12, 24, 48, 24, 12. With 100, 10, 30, 24, 5 available: 12, 10, 30, 24, 5, together 81. Redistributed: the
    second, third and fifth have too few (10, 30, 5), 75 are left for r = 1 and 2, shares 25 and 50; now the fourth has
    too few (24), and the first gets the 51 that are left: 51, 10, 30, 24, 5, together 120.
    """
    available = np.asarray(available, dtype=np.int64)
    weight = np.exp(tau * np.asarray(difficulty, dtype=np.float64))
    if not redistribute:
        return np.minimum(available, _floor(budget * weight / weight.sum()))
    taken, left, open_ = available.copy(), float(budget), np.ones(len(available), dtype=bool)
    while open_.any():
        share = left * np.where(open_, weight, 0) / weight[open_].sum()
        full = open_ & (available <= share)
        if not full.any():
            taken[open_] = _floor(share[open_])
            break
        left -= available[full].sum()
        open_ &= ~full
    return taken


def _floor(share: np.ndarray) -> np.ndarray:
    """Whole clips; a share that is a whole number but for rounding counts as that number."""
    return np.floor(share + 1e-9 * (1 + share)).astype(np.int64)


def count_rows(index: np.ndarray, num_actions: int) -> np.ndarray:
    """H_f (A,) from each row's action number (R,)."""
    return np.bincount(index, minlength=num_actions)


def representatives(index: np.ndarray, scores: np.ndarray, keys: Sequence[str], most: int) -> np.ndarray:
    """The `most` rows of each action whose prompts match it best, ties by key: (R,) bool.

    index (R,) action numbers, scores (R,) of the match; a score that is not known counts as the lowest.
    """
    order = np.lexsort((np.asarray(keys), -np.nan_to_num(scores, nan=-np.inf), index))
    return _first_of_each(index, order, np.full(index.max(initial=-1) + 1, most))


def choose(index: np.ndarray, keys: Sequence[str], counts: np.ndarray, *, seed: int) -> np.ndarray:
    """`counts` (A,) rows of each action, drawn without replacement: (R,) bool.

    Those with the smallest hash of (seed, key): an action's choice grows and shrinks with its count, and does not
    change with the other rows.
    """
    lots = np.fromiter((seed_of(seed, key) for key in keys), np.uint64, len(keys))
    return _first_of_each(index, np.lexsort((lots, index)), counts)


def _first_of_each(index: np.ndarray, order: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """(R,) bool: the first `counts[a]` rows of each action a in `order`, which lists action after action."""
    sizes = np.bincount(index, minlength=len(counts))
    place = np.arange(len(order)) - np.repeat(np.cumsum(sizes) - sizes, sizes)  # within the action
    chosen = np.zeros(len(order), dtype=bool)
    chosen[order] = place < np.repeat(counts, sizes)
    return chosen


def difficulties(index: np.ndarray, trials: np.ndarray, num_actions: int) -> np.ndarray:
    """d (A,) from the scores (R,) of the model's own clips, NaN where a row was not tried.

    An action without any score, all of whose clips the judge refused, say, has the mean difficulty of the others.
    ValueError when there is no score at all.
    """
    known = ~np.isnan(trials)
    if not known.any():
        raise ValueError("no clip of the model was judged, so the actions' difficulty is not known")
    tried = np.bincount(index[known], minlength=num_actions)
    total = np.bincount(index[known], trials[known], minlength=num_actions)
    score = np.where(tried > 0, total / np.maximum(tried, 1), np.nan)
    return 1 - np.where(tried > 0, score, np.nanmean(score))


def write_histogram(
    path: Path, actions: Sequence[str], available: np.ndarray, taken: np.ndarray, difficulty: np.ndarray | None
) -> None:
    """<path>.csv of all actions, and <path>.png of the largest: H_f and H_r side by side, and the difficulty."""
    order = sorted(range(len(actions)), key=lambda a: (-available[a], actions[a]))
    with atomic(path.with_suffix(".csv")) as partial, partial.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["action", "available", "taken", "difficulty"])
        for a in order:
            writer.writerow([actions[a], available[a], taken[a], "" if difficulty is None else f"{difficulty[a]:.4f}"])
    picture = _draw(
        [actions[a] for a in order[:SHOWN]],
        *(None if values is None else np.asarray(values)[order] for values in (available, taken, difficulty)),
    )
    with atomic(path.with_suffix(".png")) as partial:
        partial.write_bytes(picture)


def _draw(names: list[str], available: np.ndarray, taken: np.ndarray, difficulty: np.ndarray | None) -> bytes:
    from matplotlib.figure import Figure  # takes a second

    shown = len(names)
    figure = Figure(figsize=(10, 2 + 0.24 * shown), layout="constrained")
    axes = figure.subplots(1, 2 if difficulty is not None else 1, sharey=True, squeeze=False)[0]
    rows = np.arange(shown)
    axes[0].barh(rows - 0.2, available[:shown], 0.4, color="#b8c4d0", label=f"before: {available.sum()} clips")
    axes[0].barh(rows + 0.2, taken[:shown], 0.4, color="#d1603d", label=f"after: {taken.sum()}")
    axes[0].set_yticks(rows, [name if len(name) <= 32 else name[:31] + "…" for name in names], parse_math=False)
    axes[0].invert_yaxis()
    axes[0].set_xscale("symlog", linthresh=10)
    axes[0].set_xlabel("clips")
    axes[0].legend()
    if len(available) > shown:
        more = (
            f"and {len(available) - shown} actions more: {available[shown:].sum()} clips, {taken[shown:].sum()} after"
        )
        axes[0].set_title(more, loc="left", fontsize="small")
    if difficulty is not None:
        axes[1].barh(rows, difficulty[:shown], 0.6, color="#3d6fa3")
        axes[1].set_xlim(0, 1)
        axes[1].set_xlabel("difficulty, 1 - score of the model's own clips")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()
