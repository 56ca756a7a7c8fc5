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

from collections.abc import Iterator, Sequence
from itertools import pairwise

import numpy as np
import pyarrow as pa

from data_pipeline import tables
from data_pipeline.contract import WholeStage
from data_pipeline.histogram import write_histogram
from data_pipeline.stages.difficulty import first_of_each, number_actions
from data_pipeline.tables import Made, Table, Unit, add_columns, drop, dropped_table
from train.files import digest, seed_of

NOT_CHOSEN = "not chosen"  # the reason of rows that are left out


class Resample(WholeStage):
    name = "resample"

    def plan(self, before: Table) -> list[Unit]:
        config = self.setup.pipeline.resample
        settings = [config.budget, config.tau, config.redistribute, self.setup.config.seed, tables.TABLE_ROWS]
        return [Unit(0, digest([[marker["content"] for marker in before.markers], settings]), 0, len(before))]

    def parts(self, before: Table) -> Iterator[Made]:
        columns = before.columns(("key", "action", "trial"))
        actions, index = number_actions(columns["action"])
        chosen, difficulty = self._choose(columns, actions, index)
        kept, dropped, begun, most = [], [], False, tables.TABLE_ROWS
        for number, (first, end) in enumerate(pairwise(before.firsts)):
            values = None if difficulty is None else difficulty[index[first:end]]
            rows = add_columns(before.unit(number), self.name, {"difficulty": values})
            others = np.flatnonzero(~chosen[first:end]).tolist()
            made = drop(rows, dict.fromkeys(others, (NOT_CHOSEN, "")))
            kept.append(made[0])
            dropped.append(made[1])
            while sum(map(len, kept)) >= most:
                together = pa.concat_tables(kept)
                yield together.slice(0, most), pa.concat_tables(dropped)
                kept, dropped, begun = [together.slice(most)], [dropped_table()], True
        if not begun or any(map(len, [*kept, *dropped])):
            yield pa.concat_tables(kept), pa.concat_tables(dropped)

    def _choose(self, columns: pa.Table, actions: list[str], index: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        """The rows to take (R,) bool, and the actions' difficulty (A,) where it counts; writes both as a histogram."""
        config, difficulty = self.setup.pipeline.resample, None
        if config.tau:
            trials = columns["trial"].to_numpy(zero_copy_only=False).astype(np.float64)
            difficulty = difficulties(index, trials, len(actions))
        available = np.bincount(index, minlength=len(actions))
        taken = targets(
            available,
            np.zeros(len(actions)) if difficulty is None else difficulty,
            tau=config.tau,
            budget=config.budget,
            redistribute=config.redistribute,
        )
        said = [""] * len(actions) if difficulty is None else [f"{value:.4f}" for value in difficulty]
        table = {"action": actions, "available": available, "taken": taken, "difficulty": said}
        write_histogram(self.folder / "actions", table, ("available", "taken"), difficulty)
        return choose(index, columns["key"].to_pylist(), taken, seed=self.setup.config.seed), difficulty

    def conclude(self, table: Table) -> None:
        print(f"actions before and after: {self.folder / 'actions.png'}")


def targets(
    available: np.ndarray, difficulty: np.ndarray, *, tau: float, budget: int, redistribute: bool = False
) -> np.ndarray:
    """H_r, how many clips to take of each action: available H_f (A,) whole numbers, difficulty (A,) -> (A,) int64.

    With `redistribute` the budget is shared again among the actions that have more clips than their share, by the
    same weights, until none has too few; then the sum is the budget less at most one clip per action, or all there is.
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


def choose(index: np.ndarray, keys: Sequence[str], counts: np.ndarray, *, seed: int) -> np.ndarray:
    """`counts` (A,) rows of each action, drawn without replacement: (R,) bool.

    Those with the smallest hash of (seed, key): an action's choice grows and shrinks with its count, and does not
    change with the other rows.
    """
    lots = np.fromiter((seed_of(seed, key) for key in keys), np.uint64, len(keys))
    return first_of_each(index, np.lexsort((lots, index)), counts)


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
