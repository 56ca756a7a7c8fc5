"""The difficulty stage: how well the model already does each action (PhyGDPO, section 2.1, the scores S_f).

The prompts that match an action best are its representatives. The model generates one clip for each, the judge scores
it, and the mean of the two scores stays beside the row as `trial`. Which rows those are depends on all rows, so they
are chosen in `plan`; the work is shared like any other stage's.

Deviation: the paper does not say whose clips are judged; the model's own say what is difficult for it.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from data_pipeline.generate import LoserMaker
from data_pipeline.judge import judge_clips
from data_pipeline.resample import representatives
from data_pipeline.sources import clip_identity, row_of
from data_pipeline.tables import Advance, Made, Stage, Table, Unit, add_columns, drop
from eval.judges.scores import Judge
from train.clips import to_pixels


class Difficulty(Stage):
    """See the module.

    maker: of one clip a row. judge: builds the judge; judge_settings: plain values that its scores depend on.
    representatives: rows of each action. decode_batch: clips decoded together.
    """

    name = "difficulty"

    def __init__(
        self,
        folder: Path,
        maker: LoserMaker,
        judge: Callable[[], Judge],
        judge_settings: Any,
        *,
        representatives: int,
        decode_batch: int,
    ):
        super().__init__(folder)
        assert maker.num_losers == 1, maker.num_losers
        self.maker, self.build_judge, self.judge_settings = maker, judge, judge_settings
        self.representatives, self.decode_batch = representatives, decode_batch

    @cached_property
    def judge(self) -> Judge:
        return self.build_judge()

    def plan(self, before: Table) -> list[Unit]:
        columns = before.columns(("key", "action", "action_score"))
        actions, index = number_actions(columns["action"])
        check_actions(actions)
        scores = columns["action_score"].to_numpy(zero_copy_only=False).astype(np.float64)
        wanted = representatives(index, scores, columns["key"].to_pylist(), self.representatives)
        spans = zip(before.firsts[:-1], before.firsts[1:], strict=True)
        places = [tuple(np.flatnonzero(wanted[first:end]).tolist()) for first, end in spans]

        def depends_on(number: int) -> Any:
            if not places[number]:
                return None
            rows = before.unit(number).take(pa.array(places[number], pa.int64())).to_pylist()
            identities = [clip_identity(row_of(row)) for row in rows]
            return [places[number], identities, self.maker.settings, self.judge_settings]

        return [replace(unit, places=places[unit.number]) for unit in before.units(depends_on)]

    @torch.no_grad()
    def build(self, unit: Unit, rows: pa.Table, advance: Advance) -> Made:
        """Generate and judge the unit's representatives; those whose clip cannot be read are dropped."""
        records = rows.take(pa.array(unit.places, pa.int64())).to_pylist()
        found = [row_of(record) for record in records]
        identities = [clip_identity(row) for row in found]
        bad = self.maker.make(found, identities, advance)
        made = [place for place in range(len(found)) if place not in bad]
        trials: list[float | None] = [None] * len(rows)
        if made:
            latents = [
                self.maker.store.load(self.maker.digest(found[place], identities[place]))["losers"] for place in made
            ]
            decoded = self.maker.backbone.decode_latents(torch.cat(latents), batch_size=self.decode_batch)
            scores, failures = judge_clips(
                self.judge, to_pixels(decoded).cpu(), [found[place].prompt for place in made]
            )
            for number, why in failures.items():
                print(f"warning: the clip of {found[made[number]].key!r} does not count: {why}")
            for number, (semantic, physical) in scores.items():
                trials[unit.places[made[number]]] = (semantic + physical) / 2
        columns = add_columns(rows, self.name, {"trial": trials})
        return drop(columns, {unit.places[place]: reason for place, reason in bad.items()})


def number_actions(column: pa.ChunkedArray) -> tuple[list[str], np.ndarray]:
    """Distinct actions (A,), in alphabetical order, and each row's number among them (R,)."""
    names, index = np.unique(np.asarray(column.to_pylist(), dtype=object).astype(str), return_inverse=True)
    return names.tolist(), index


def check_actions(actions: Sequence[str]) -> None:
    """ValueError where no row has an action."""
    if set(actions) <= {""}:
        raise ValueError(
            "pipeline.resample.budget is set, but no row has an action: set pipeline.cluster.model, or give the"
            " manifest a column action"
        )
