"""The difficulty stage: how well the model already does each action (PhyGDPO, section 2.1, the scores S_f).

The prompts that match an action best are its representatives. The model generates one clip for each, the judge scores
it, and the mean of the two scores stays beside the row as `trial`. Which rows those are depends on all rows, so they
are chosen in `plan`; the work is shared like any other stage's.

Deviation: the paper does not say whose clips are judged; the model's own say what is difficult for it.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from data_pipeline.config import Setup
from data_pipeline.contract import Stage
from data_pipeline.frames import clip_identity
from data_pipeline.own_clips import ClipMaker
from data_pipeline.scores import judge_clips
from data_pipeline.store import Store
from data_pipeline.tables import Advance, Made, Table, Unit, add_columns, drop
from eval.judges.scores import Judge
from train.clips import to_pixels


class Difficulty(Stage):
    name = "difficulty"

    def __init__(self, setup: Setup):
        super().__init__(setup)
        self.maker = ClipMaker(setup, Store(self.folder / "clips", setup.clip_settings(1)), 1)

    @cached_property
    def judge(self) -> Judge:
        return self.setup.build_judge()

    def plan(self, before: Table) -> list[Unit]:
        columns = before.columns(("key", "action", "action_score"))
        actions, index = number_actions(columns["action"])
        scores = columns["action_score"].to_numpy(zero_copy_only=False).astype(np.float64)
        most = self.setup.pipeline.resample.representatives
        wanted = representatives(index, scores, columns["key"].to_pylist(), most)
        places = [tuple(np.flatnonzero(wanted[first:end]).tolist()) for first, end in pairwise(before.firsts)]

        def depends_on(number: int) -> Any:
            if not places[number]:
                return None
            rows = before.unit(number).take(pa.array(places[number], pa.int64())).to_pylist()
            identities = list(map(clip_identity, rows))
            return [places[number], identities, self.maker.store.settings, self.setup.judge_settings]

        return [replace(unit, places=places[unit.number]) for unit in before.units(depends_on)]

    @torch.no_grad()
    def build(self, unit: Unit, rows: pa.Table, advance: Advance) -> Made:
        """Generate and judge the unit's representatives; those whose clip cannot be read are dropped."""
        records = rows.take(pa.array(unit.places, pa.int64())).to_pylist()
        records = [record | {"identity": clip_identity(record)} for record in records]
        bad = self.maker.make(records, advance)
        made = [place for place in range(len(records)) if place not in bad]
        trials: list[float | None] = [None] * len(rows)
        if made:
            latents = torch.cat([self.maker.store.load_of(records[place])["losers"] for place in made])
            decoded = self.maker.backbone.decode_latents(latents, batch_size=self.setup.pipeline.encode_batch)
            prompts = [records[place]["prompt"] for place in made]
            scores, failures = judge_clips(self.judge, to_pixels(decoded).cpu(), prompts)
            for number, why in failures.items():
                print(f"warning: the clip of {records[made[number]]['key']!r} does not count: {why}")
            for number, (semantic, physical) in scores.items():
                trials[unit.places[made[number]]] = (semantic + physical) / 2
        columns = add_columns(rows, self.name, {"trial": trials})
        return drop(columns, {unit.places[place]: reason for place, reason in bad.items()})


def number_actions(column: pa.ChunkedArray) -> tuple[list[str], np.ndarray]:
    """Distinct actions (A,), in alphabetical order, and each row's number among them (R,). ValueError where no row has
    an action."""
    names, index = np.unique(np.asarray(column.to_pylist(), dtype=object).astype(str), return_inverse=True)
    if set(names.tolist()) <= {""}:
        raise ValueError(
            "pipeline.resample.budget is set, but no row has an action: set pipeline.cluster.model, or give the"
            " manifest a column action"
        )
    return names.tolist(), index


def representatives(index: np.ndarray, scores: np.ndarray, keys: Sequence[str], most: int) -> np.ndarray:
    """The `most` rows of each action whose prompts match it best, ties by key: (R,) bool.

    index (R,) action numbers, scores (R,) of the match; a score that is not known counts as the lowest.
    """
    order = np.lexsort((np.asarray(keys), -np.nan_to_num(scores, nan=-np.inf), index))
    return first_of_each(index, order, np.full(index.max(initial=-1) + 1, most))


def first_of_each(index: np.ndarray, order: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """(R,) bool: the first `counts[a]` rows of each action a in `order`, which lists action after action."""
    sizes = np.bincount(index, minlength=len(counts))
    place = np.arange(len(order)) - np.repeat(np.cumsum(sizes) - sizes, sizes)  # within the action
    chosen = np.zeros(len(order), dtype=bool)
    chosen[order] = place < np.repeat(counts, sizes)
    return chosen
