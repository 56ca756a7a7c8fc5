"""The judge stage: scores of the losers, from a table that a judge outside filled in, from the manifest, from a judge
that runs here, or neutral; the first of these that has one.

A judge that runs elsewhere gets the loser clips and a table of them (`pipeline.save_losers`) and gives it back with the
columns `semantic` and `physical` (`pipeline.scores`).
"""

from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor

from data_pipeline.config import Setup
from data_pipeline.contract import Stage
from data_pipeline.manifests import SCORES
from data_pipeline.scores import NEUTRAL, judge_clips, loser_scores
from data_pipeline.tables import (
    Advance,
    Bad,
    Made,
    Marker,
    Table,
    TableRow,
    Unit,
    add_columns,
    drop,
    read_rows,
    write_csv,
)
from eval.judges.scores import Judge
from train.backbones.base import Backbone
from train.clips import to_pixels, write_clip
from train.files import write_text


class JudgeLosers(Stage):
    """The judge gets all clips of a unit at once, for some judges load their weights for every call."""

    name = "judge"

    def __init__(self, setup: Setup):
        super().__init__(setup)
        self.losers, self.num_losers = setup.losers, setup.pipeline.num_losers
        self.judges = bool(setup.config.judge.name)
        self.scores = setup.scores
        self.save_to = Path(setup.config.output) / "losers" if setup.pipeline.save_losers else None

    @cached_property
    def backbone(self) -> Backbone:
        return self.setup.load(("vae",))

    @cached_property
    def judge(self) -> Judge:
        return self.setup.build_judge()

    def plan(self, before: Table) -> list[Unit]:
        places: set[tuple[str, int]] = set()

        def depends_on(number: int) -> Any:
            rows = before.unit(number, ("key", "scores")).to_pylist()
            places.update((row["key"], loser) for row in rows for loser in range(self.num_losers))
            given = list(map(self._given, rows))
            judged = self.judges and any(None in pairs for pairs in given)
            return [given, [self.setup.judge_settings, self.losers.settings] if judged else None]

        units = before.units(depends_on)
        if strangers := [place for place in self.scores if place not in places]:
            print(f"warning: {len(strangers)} lines of pipeline.scores name no loser here, the first: {strangers[0]}")
        return units

    def _given(self, row: TableRow) -> list[Any]:
        return loser_scores(row["key"], row["scores"], self.scores, self.num_losers)

    @torch.no_grad()
    def build(self, unit: Unit, rows: pa.Table, advance: Advance) -> Made:
        records = rows.to_pylist()
        scores = list(map(self._given, records))
        wanted: list[tuple[int, int]] = []  # (row, loser) of each clip for the judge
        clips: list[Tensor] = []
        for place, record in enumerate(records):
            missing = [j for j, score in enumerate(scores[place]) if score is None] if self.judges else []
            save = self.save_to is not None and not self._is_saved(record)
            if missing or save and self.num_losers:
                latents = self.losers.load_of(record)["losers"]
                decoded = self.backbone.decode_latents(latents, batch_size=self.setup.pipeline.encode_batch)
                pixels = to_pixels(decoded).cpu()
                if save:
                    self._save(record, pixels)
                wanted += [(place, loser) for loser in missing]
                clips += [pixels[loser] for loser in missing]
            if not clips:
                advance(1)
        bad: Bad = {}
        if clips:
            prompts = [records[place]["prompt"] for place, _ in wanted]
            found, failures = judge_clips(self.judge, torch.stack(clips), prompts)
            for number, (place, loser) in enumerate(wanted):
                if number in failures:
                    bad[place] = ("not judged", f"loser {loser}: {failures[number]}")
                else:
                    scores[place][loser] = found[number]
        pairs = [[NEUTRAL if score is None else score for score in of_row] for of_row in scores]
        columns = {name: [[pair[i] for pair in of_row] for of_row in pairs] for i, name in enumerate(SCORES)}
        return drop(add_columns(rows, self.name, columns), bad)

    # The losers as files

    def _paths(self, key: str) -> list[Path]:
        return [self.save_to / f"{key}-{loser}.mp4" for loser in range(self.num_losers)]

    def _is_saved(self, record: TableRow) -> bool:
        """Whether the files of a row exist and show its losers, not those of other settings."""
        shown = self.save_to / ".shown" / record["key"]
        return (
            shown.exists()
            and shown.read_bytes() == self.losers.digest(record).encode("ascii")
            and all(path.exists() for path in self._paths(record["key"]))
        )

    def _save(self, record: TableRow, pixels: Tensor) -> None:
        shown = self.save_to / ".shown" / record["key"]
        shown.unlink(missing_ok=True)
        for clip, path in zip(pixels, self._paths(record["key"]), strict=True):
            write_clip(path, clip, self.setup.video.fps)
        write_text(shown, self.losers.digest(record))

    def is_intact(self, unit: Unit, marker: Marker) -> bool:
        return self.save_to is None or all(map(self._is_saved, read_rows(self.folder, unit.number).to_pylist()))

    def conclude(self, table: Table) -> None:
        if self.save_to is None:
            return
        rows = table.columns(("key", "prompt")).to_pylist()
        lines = [
            (row["key"], loser, path.name, row["prompt"])
            for row in rows
            for loser, path in enumerate(self._paths(row["key"]))
        ]
        write_csv(self.save_to / "losers.csv", [("key", "loser", "clip", "prompt"), *lines])
        print(f"loser clips and their table for a judge: {self.save_to / 'losers.csv'}")
