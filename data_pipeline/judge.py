"""The judge stage: scores of the losers, from a table that a judge outside filled in, from the manifest, from a judge
that runs here, or neutral; the first of these that has one.

A judge that runs elsewhere gets the loser clips and a table of them (`pipeline.save_losers`) and gives it back with the
columns `semantic` and `physical` (`pipeline.scores`).
"""

import csv
import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor

from data_pipeline.manifests import SCORES, check_scores
from data_pipeline.sources import record_digest
from data_pipeline.store import Store
from data_pipeline.tables import Advance, Made, Stage, Table, Unit, add_columns, drop, read_rows
from eval.judges.scores import Judge, Unjudged
from eval.records import BadRow, csv_records, read_text, require
from train.backbones.base import Backbone
from train.clips import to_pixels, write_clip
from train.files import write_text

COLUMNS = ("key", "loser", *SCORES)  # of the table
Score = tuple[float, float]  # (semantic, physical), each in [0, 1]
NEUTRAL = (0.5, 0.5)  # of a loser that nobody judged
Scores = dict[tuple[str, int], Score]  # by (group key, loser)


class JudgeLosers(Stage):
    """See the module.

    judge: builds the judge, None where there is none; judge_settings: plain values that its scores depend on.
    loser_settings: those of the losers. save_to: folder for the losers as mp4, None to save none. decode_batch: clips
    decoded together; the judge gets all clips of a unit at once, for some judges load their weights for every call.
    """

    name = "judge"

    def __init__(
        self,
        folder: Path,
        load: Callable[[Sequence[str]], Backbone],
        judge: Callable[[], Judge] | None,
        judge_settings: Any,
        scores: Scores,
        *,
        losers: Store,
        loser_settings: Mapping[str, Any],
        num_losers: int,
        decode_batch: int,
        save_to: Path | None,
        fps: float,
    ):
        super().__init__(folder)
        self.load, self.build_judge, self.judge_settings, self.scores = load, judge, judge_settings, scores
        self.losers, self.loser_settings, self.num_losers = losers, loser_settings, num_losers
        self.decode_batch, self.save_to, self.fps = decode_batch, save_to, fps

    @cached_property
    def backbone(self) -> Backbone:
        return self.load(("vae",))

    @cached_property
    def judge(self) -> Judge:
        return self.build_judge()

    def plan(self, before: Table) -> list[Unit]:
        places: set[tuple[str, int]] = set()

        def depends_on(number: int) -> Any:
            rows = before.unit(number, ("key", "scores")).to_pylist()
            places.update((row["key"], loser) for row in rows for loser in range(self.num_losers))
            given = [loser_scores(row["key"], row["scores"], self.scores, self.num_losers) for row in rows]
            judged = self.build_judge is not None and any(None in pairs for pairs in given)
            return [given, [self.judge_settings, self.loser_settings] if judged else None]

        units = before.units(depends_on)
        if strangers := [place for place in self.scores if place not in places]:
            print(f"warning: {len(strangers)} lines of pipeline.scores name no loser here, the first: {strangers[0]}")
        return units

    @torch.no_grad()
    def build(self, unit: Unit, rows: pa.Table, advance: Advance) -> Made:
        records = rows.to_pylist()
        scores = [loser_scores(row["key"], row["scores"], self.scores, self.num_losers) for row in records]
        wanted: list[tuple[int, int]] = []  # (row, loser) of each clip for the judge
        clips: list[Tensor] = []
        for place, record in enumerate(records):
            missing = [j for j, score in enumerate(scores[place]) if score is None] if self.build_judge else []
            save = self.save_to is not None and not self._is_saved(record)
            if missing or save and self.num_losers:
                latents = self.losers.load(record_digest(self.loser_settings, record))["losers"]
                pixels = to_pixels(self.backbone.decode_latents(latents, batch_size=self.decode_batch)).cpu()
                if save:
                    self._save(record, pixels)
                wanted += [(place, loser) for loser in missing]
                clips += [pixels[loser] for loser in missing]
            if not clips:
                advance(1)
        bad = {}
        if clips:
            found, failures = judge_clips(
                self.judge, torch.stack(clips), [records[place]["prompt"] for place, _ in wanted]
            )
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

    def _is_saved(self, record: Mapping[str, Any]) -> bool:
        """Whether the files of a row exist and show its losers, not those of other settings."""
        shown = self.save_to / ".shown" / record["key"]
        return (
            shown.exists()
            and shown.read_bytes() == record_digest(self.loser_settings, record).encode("ascii")
            and all(path.exists() for path in self._paths(record["key"]))
        )

    def _save(self, record: Mapping[str, Any], pixels: Tensor) -> None:
        shown = self.save_to / ".shown" / record["key"]
        shown.unlink(missing_ok=True)
        for clip, path in zip(pixels, self._paths(record["key"]), strict=True):
            write_clip(path, clip, self.fps)
        write_text(shown, record_digest(self.loser_settings, record))

    def is_intact(self, unit: Unit, marker: Mapping[str, Any]) -> bool:
        if self.save_to is None:
            return True
        return all(map(self._is_saved, read_rows(self.folder, unit.number).to_pylist()))

    def conclude(self, table: Table) -> None:
        if self.save_to is None:
            return
        rows = [
            row for number in range(len(table.markers)) for row in table.unit(number, ("key", "prompt")).to_pylist()
        ]
        lines = [(row["key"], j, path, row["prompt"]) for row in rows for j, path in enumerate(self._paths(row["key"]))]
        write_table(self.save_to / "losers.csv", lines)
        print(f"loser clips and their table for a judge: {self.save_to / 'losers.csv'}")


def judge_clips(judge: Judge, clips: Tensor, prompts: list[str]) -> tuple[dict[int, Score], Mapping[int, str]]:
    """The scores of clips (N, T, H, W, 3) uint8 by number, and why the others have none."""
    try:
        scores, numbers, failures = judge(clips, prompts), range(len(clips)), {}
    except Unjudged as refusal:
        scores, numbers, failures = refusal.scores, refusal.judged, refusal.failures
    pairs = zip(scores.semantic.tolist(), scores.physical.tolist(), strict=True)
    return {number: check_scores(*pair) for number, pair in zip(numbers, pairs, strict=True)}, failures


def read_scores(path: str | Path) -> Scores:
    """A CSV with the columns key, loser (from 0), semantic, physical; other columns are not read.

    Raises ValueError, before any work, for a missing file or column and for rows that hold no scores in [0, 1], which
    it lists: a lost score must not pass for a neutral one.
    """
    path, columns = Path(path).expanduser(), dict[str, None]()
    if not path.is_file():
        raise ValueError(f"pipeline.scores={path}: no such file")
    rows = list(csv_records(path, COLUMNS, columns))
    require(path, COLUMNS, columns)
    scores: Scores = {}
    problems = []
    for number, row in enumerate(rows, start=1):
        try:
            if isinstance(row, BadRow):
                raise row
            place = read_text(row, "key"), int(row["loser"])
            if place in scores:
                raise ValueError(f"loser {place[1]} of {place[0]!r} a second time")
            scores[place] = check_scores(row["semantic"], row["physical"])
        except (BadRow, ValueError) as error:
            problems.append(f"row {number}: {error}")
    if problems:
        shown = "; ".join(problems[:5]) + ("; ..." if len(problems) > 5 else "")
        raise ValueError(
            f"{path} has {len(problems)} bad rows ({shown}); correct them, or remove them to leave the losers neutral"
        )
    return scores


def loser_scores(
    key: str, own: Sequence[Sequence[float]] | None, scores: Scores, num_losers: int
) -> list[Score | None]:
    """(semantic, physical) of each loser of a row: of the table, else the manifest's `own`, else None."""
    pairs = [tuple(pair) for pair in own or ()]
    pairs = pairs * num_losers if len(pairs) == 1 else pairs or [None] * num_losers
    return [scores.get((key, loser), pairs[loser]) for loser in range(num_losers)]


def write_table(path: str | Path, losers: Iterable[tuple[str, int, Path, str]]) -> None:
    """CSV of (key, loser, clip, prompt) for a judge outside, atomically; clips relative to the table's folder."""
    path = Path(path)
    buffer = io.StringIO(newline="")
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(["key", "loser", "clip", "prompt"])
    for key, loser, clip, prompt in losers:
        writer.writerow([key, loser, clip.relative_to(path.parent), prompt])
    write_text(path, buffer.getvalue())
