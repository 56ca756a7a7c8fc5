"""The stages that choose rows: filter, cluster and resample, on tables.

What they ask of prompts and frames is in cot_filter.py, cluster.py and resample.py.
"""

import json
from collections.abc import Iterator, Mapping
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from data_pipeline import resample
from data_pipeline.cluster import ActionMatcher, ClusterConfig, count_actions, write_histogram
from data_pipeline.cot_filter import CotFilter, FilterConfig, Item, Refused
from data_pipeline.difficulty import check_actions, number_actions
from data_pipeline.manifests import Row
from data_pipeline.resample import ResampleConfig
from data_pipeline.sources import FrameReader, row_of
from data_pipeline.tables import Advance, Made, Stage, Table, Unit, add_columns, drop, dropped_table
from eval.vlm.backend import VlmConfig
from eval.vlm.client import jpeg_frames
from train.files import digest

NO_PHYSICS, NOT_CHOSEN = "no physics", "not chosen"  # reasons of the rows that filter and resample leave out


class Filter(Stage):
    """Keeps the physics-rich rows. settings: plain values that an answer depends on."""

    name = "filter"

    def __init__(
        self, folder: Path, config: FilterConfig, vlm: VlmConfig, settings: Mapping[str, Any], reader: FrameReader
    ):
        super().__init__(folder)
        self.config, self.vlm, self.settings, self.reader = config, vlm, settings, reader

    @cached_property
    def filter(self) -> CotFilter:
        return CotFilter(self.config, self.vlm)

    def plan(self, before: Table) -> list[Unit]:
        return before.units(lambda number: self.settings)

    def build(self, unit: Unit, rows: pa.Table, advance: Advance) -> Made:
        found = [row_of(record) for record in rows.to_pylist()]
        items = [Item(row.key, row.prompt, partial(self._frames, row)) for row in found]
        answers = self.filter.run(items, advance)
        bad = {}
        for place, answer in enumerate(answers):
            if isinstance(answer, Refused):
                bad[place] = (answer.reason, answer.detail)
            elif not answer.physics_label:
                bad[place] = (NO_PHYSICS, f"physics_richness={answer.physics_richness:g}")
        columns = {
            name: [None if isinstance(answer, Refused) else getattr(answer, name) for answer in answers]
            for name in ("reason", "physics_richness", "physics_label", "extended")
        }
        columns["parse"] = [
            None if isinstance(answer, Refused) else json.dumps(answer.parse, ensure_ascii=False) for answer in answers
        ]
        return drop(add_columns(rows, self.name, columns), bad)

    def _frames(self, row: Row) -> list[bytes]:
        return jpeg_frames(self.reader.read(row), self.vlm.frames, self.vlm.frame_height)

    def is_worth_a_retry(self, marker: Mapping[str, Any]) -> bool:
        return "server" in marker["dropped"]


class Cluster(Stage):
    """Gives each row the action that its prompt tells of. settings: plain values that a match depends on."""

    name = "cluster"

    def __init__(self, folder: Path, config: ClusterConfig, settings: Mapping[str, Any], device: torch.device):
        super().__init__(folder)
        self.config, self.settings, self.device = config, settings, device

    @cached_property
    def matcher(self) -> ActionMatcher:
        return ActionMatcher(self.config, self.device)

    def plan(self, before: Table) -> list[Unit]:
        return before.units(lambda number: self.settings)

    def build(self, unit: Unit, rows: pa.Table, advance: Advance) -> Made:
        found = self.matcher.match(rows["prompt"].to_pylist())
        columns = {"action": found.actions, "category": found.categories, "action_score": found.scores}
        return add_columns(rows, self.name, columns), dropped_table()

    def conclude(self, table: Table) -> None:
        rows = table.columns(("action", "category"))
        actions = rows["action"].to_pylist()
        categories = dict(zip(actions, rows["category"].to_pylist(), strict=True))
        write_histogram(self.folder / "actions", count_actions(actions), categories)
        print(f"actions: {self.folder / 'actions.png'}")


class Resample(Stage):
    """Takes as many rows of each action as its difficulty asks for. part_rows: rows a unit of its table."""

    name = "resample"
    whole = True

    def __init__(self, folder: Path, config: ResampleConfig, *, seed: int, part_rows: int):
        super().__init__(folder)
        self.config, self.seed, self.part_rows = config, seed, part_rows

    def plan(self, before: Table) -> list[Unit]:
        config = self.config
        settings = [config.budget, config.tau, config.redistribute, self.seed, self.part_rows]
        return [Unit(0, digest([before.contents(), settings]), 0, len(before))]

    def parts(self, before: Table) -> Iterator[Made]:
        config, columns = self.config, before.columns(("key", "action", "trial"))
        actions, index = number_actions(columns["action"])
        check_actions(actions)
        difficulty = np.zeros(len(actions))
        if config.tau:
            trials = columns["trial"].to_numpy(zero_copy_only=False).astype(np.float64)
            difficulty = resample.difficulties(index, trials, len(actions))
        available = resample.count_rows(index, len(actions))
        counts = resample.targets(
            available, difficulty, tau=config.tau, budget=config.budget, redistribute=config.redistribute
        )
        chosen = resample.choose(index, columns["key"].to_pylist(), counts, seed=self.seed)
        known = difficulty if config.tau else None
        resample.write_histogram(self.folder / "actions", actions, available, counts, known)
        kept, dropped, begun = [], [], False
        for number, (first, end) in enumerate(zip(before.firsts[:-1], before.firsts[1:], strict=True)):
            values = difficulty[index[first:end]] if config.tau else None
            rows = add_columns(before.unit(number), self.name, {"difficulty": values})
            others = np.flatnonzero(~chosen[first:end]).tolist()
            made = drop(rows, dict.fromkeys(others, (NOT_CHOSEN, "")))
            kept.append(made[0])
            dropped.append(made[1])
            while sum(map(len, kept)) >= self.part_rows:
                together = pa.concat_tables(kept)
                yield together.slice(0, self.part_rows), pa.concat_tables(dropped)
                kept, dropped, begun = [together.slice(self.part_rows)], [dropped_table()], True
        if not begun or any(map(len, [*kept, *dropped])):
            yield pa.concat_tables(kept), pa.concat_tables(dropped)

    def conclude(self, table: Table) -> None:
        print(f"actions before and after: {self.folder / 'actions.png'}")
