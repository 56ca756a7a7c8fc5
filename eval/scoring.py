"""Clips to rows: what a benchmark asks for, and scoring what has no row yet.

One failing clip is a row with an error; a benchmark that fails as a whole keeps the rows that it has.
"""

import json
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from eval.benchmarks.base import Benchmark, Row, Sample, Task
from eval.maker import Model, Request
from eval.report.results import TRUE
from eval.report.rows import RowFile, identity
from train.backbones.base import Backbone
from train.clips import ClipError, VideoConfig, contact_sheet, read_clip, side_by_side, write_clip
from train.files import write_text

COMPLETE = ""  # key of the row that ends those of a benchmark without clips

SHOWN = 6  # prompts in the comparison and the sheet

Name = tuple[str, int]  # of a sample: its task's key, its seed
Mark = tuple[str, float | None]  # identity of a clip's row, and the clip's motion energy; None: a reference


@dataclass
class Plan:
    """What one benchmark asks for."""

    benchmark: Benchmark
    folder: Path
    problem: str = ""  # why it cannot run, or did not run to its end
    tasks: list[Task] = field(default_factory=list)
    requests: dict[str, list[Request]] = field(default_factory=dict)  # by model, a clip each
    samples: dict[str, list[Sample]] = field(default_factory=dict)  # by model
    refused: dict[str, str] = field(default_factory=dict)  # key of a task whose image cannot be read -> why
    identities: dict[str, str] = field(default_factory=dict)  # by model, of rows without a clip
    seconds: dict[str, float] = field(default_factory=dict)  # by model, of scoring, in this and earlier runs

    def unfinished(self) -> list[Request]:
        return [
            request for requests in self.requests.values() for request in requests if not request.clip.is_finished()
        ]

    def rows(self, model: str) -> RowFile:
        return RowFile(self.folder / f"rows-{model}.jsonl")

    def cost(self, model: str) -> dict[str, float]:
        """Seconds of scoring, and what the model's clips took to make: clips, seconds and network passes in all."""
        scoring = {"scoring_seconds": round(self.seconds[model], 1)}
        if model not in self.requests:
            return scoring
        records = [record for request in self.requests[model] if (record := request.clip.record())]
        seconds, passes = (sum(record[name] for record in records) for name in ("seconds", "passes"))
        return {"clips_made": len(records), "seconds": round(seconds, 1), "passes": round(passes)} | scoring

    def page(self, scores: Sequence[dict[str, Any]]) -> Path | None:
        """The benchmark's own page of its lines of scores.jsonl, where it has one."""
        clips = {model: rows_clips(self.folder, model, own) for model, own in self.identities.items()}
        return self.benchmark.page(self.folder, scores, clips)


@dataclass(frozen=True)
class Probe:
    """A benchmark that asks a model itself."""

    benchmark: str
    model: Model
    identity: str


def unprobed(plan: Plan, models: Sequence[Model]) -> Iterator[Probe]:
    """Of the models that a benchmark has not asked to the end, or of which rows have errors."""
    for model in models:
        if own := plan.identities.get(model.name, ""):
            with plan.rows(model.name) as rows:
                if rows.find(own, COMPLETE, 0) is None or any(row["error"] for row in rows.every(own)):
                    yield Probe(plan.benchmark.name, model, own)


def probe(benchmark: Benchmark, backbone: Backbone, probe: Probe, folder: Path) -> None:
    """Keep the rows of a benchmark that asks the backbone itself, as it stands."""
    work = folder / "scoring" / probe.model.name
    work.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    with RowFile(folder / f"rows-{probe.model.name}.jsonl") as rows:
        try:
            done = {row["key"] for row in rows.every(probe.identity) if not row["error"]}
            for row in benchmark.probe(backbone, work, done):
                seconds, started = time.perf_counter() - started, time.perf_counter()
                known = rows.find(probe.identity, row.key, row.seed)
                if known is None or known["error"]:
                    keep_clips(row, rows_clips(folder, probe.model.name, probe.identity), benchmark.model_video.fps)
                    facts = {"motion": None, "seconds": round(seconds, 4), "cluster": row.cluster or row.key}
                    rows.append(probe.identity, row, facts)
            rows.append(probe.identity, Row(COMPLETE, 0), {"motion": None, "seconds": 0})
        except Exception:  # whatever it is, the other benchmarks run, and the report says that rows are missing
            traceback.print_exc()


def rows_clips(folder: Path, model: str, identity: str) -> Path:
    """Where a benchmark's rows without a clip keep what is to be watched, apart from those of other settings."""
    return folder / "clips" / f"{model}-{identity[:12]}"


def keep_clips(row: Row, folder: Path, fps: float) -> None:
    """Write a row's clips, and then how many frames they have."""
    for name, frames in row.clips.items():
        write_clip(folder / f"{row.key}-{name}.mp4", torch.from_numpy(frames), fps)
    if row.clips:
        lengths = {name: len(frames) for name, frames in row.clips.items()}
        write_text(folder / f"{row.key}.json", json.dumps(lengths) + "\n")


def score(plan: Plan) -> Iterator[dict[str, Any]]:
    """A line of scores.jsonl for every clip of the plan; what has no row yet is scored first."""
    if not plan.benchmark.of_clips:
        for model, own in plan.identities.items():
            with plan.rows(model) as rows:
                found = rows.every(own)
            if all(row["key"] != COMPLETE for row in found):
                plan.problem = f"{model} was not asked to the end; run the same command again"
            plan.seconds[model] = sum(row["seconds"] for row in found)
            found = [row for row in found if row["key"] != COMPLETE]
            for number, row in enumerate(found):
                yield _line(plan, model, number, row, Task(row["key"], "", cluster=row["cluster"]))
        return
    for model, samples in plan.samples.items():
        every, marks = {(sample.task.key, sample.seed): sample for sample in samples}, _marks(plan, model)
        with plan.rows(model) as rows:
            found = {name: rows.find(marks[name][0], *name) for name in every}
            missing = {name for name, row in found.items() if row is None or row["error"]}
            if missing and not plan.problem:
                _score_missing(plan, model, every, missing, rows, marks)
                found = {name: rows.find(marks[name][0], *name) for name in every}
        plan.seconds[model] = sum(row["seconds"] for row in found.values() if row)
        for number, (name, sample) in enumerate(every.items()):
            error = f"{sample.path}: not scored: {plan.problem}"
            row = found[name] or {"seed": sample.seed, "values": {}, "motion": None, "error": error}
            yield _line(plan, model, number, row, sample.task)


def _marks(plan: Plan, model: str) -> dict[Name, Mark]:
    clips = {request.clip.path: request.clip for request in plan.requests.get(model, [])}
    marks = {}
    for sample in plan.samples[model]:
        record = clips[sample.path].record() if sample.path in clips else None
        own = identity(record["digest"] if record else _file_mark(sample.path), plan.benchmark.recorded)
        marks[sample.task.key, sample.seed] = (own, record["motion"] if record else None)
    return marks


def _score_missing(
    plan: Plan, model: str, every: dict[Name, Sample], missing: set[Name], rows: RowFile, marks: dict[Name, Mark]
) -> None:
    """Append a row for each missing one; where the benchmark fails as a whole, only for some.

    Samples that are scored together are so by their place among all, whatever is missing of them.
    """
    refused = [name for name in every if model != TRUE and name[0] in plan.refused]
    names, size = [name for name in every if name not in refused], plan.benchmark.together
    chunks = [names[start : start + size] for start in range(0, len(names), size)]
    left = {name: every[name] for chunk in chunks if missing.intersection(chunk) for name in chunk}

    def keep(row: Row, seconds: float) -> None:
        if (row.key, row.seed) in missing:
            own, motion = marks[row.key, row.seed]
            rows.append(own, row, {"motion": motion, "seconds": round(seconds, 4)})

    for name in refused:
        keep(Row.of(every[name], error=plan.refused[name[0]]), 0)
    work = plan.folder / "scoring"
    work.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    with tqdm(total=len(left), desc=f"{plan.benchmark.name} {model}", unit="clip", smoothing=0) as bar:
        try:
            for row in plan.benchmark.score(list(left.values()), work):
                left.pop((row.key, row.seed))  # KeyError for a row of another clip
                keep(row, time.perf_counter() - started)
                started = time.perf_counter()
                bar.update()
            for sample in list(left.values()):
                keep(Row.of(sample, error=f"{sample.path}: {plan.benchmark.name} gave no row"), 0)
        except Exception as error:  # whatever it is, the rows are kept and the other benchmarks run
            traceback.print_exc()
            plan.problem = f"{type(error).__name__}: {error}"


def _file_mark(path: Path) -> list[Any]:
    """What tells a file without a sidecar from others; of a missing one its name alone."""
    try:
        found = path.stat()
    except OSError:
        return [path.name]
    return [path.name, found.st_size, found.st_mtime_ns]


def _line(plan: Plan, model: str, number: int, row: dict[str, Any], task: Task) -> dict[str, Any]:
    """A line of scores.jsonl."""
    own = {"key": task.key, "seed": row["seed"], "prompt": task.text, "category": task.category}
    own |= {"cluster": task.cluster or task.key}
    result = {name: row[name] for name in ("motion", "values", "error")}
    return {"benchmark": plan.benchmark.name, "model": model, "clip": number} | own | result


def compare_clips(plan: Plan, video: VideoConfig) -> list[tuple[str, Tensor]]:
    """Write comparison.mp4 and sheet.png of the first prompts; returns their prompts with the clips side by side."""
    rows, compared, before = [], [], plan.benchmark.prefix_frames  # which references do not begin with
    video = replace(video, num_frames=video.num_frames - before)
    for task in plan.tasks[:SHOWN]:
        clips = {}
        for model, samples in plan.samples.items():
            own = [sample for sample in samples if sample.task.key == task.key]
            with suppress(ClipError):  # a clip that cannot be read is named in the report
                start = 0.0 if model == TRUE else before / video.fps
                clips[model] = read_clip(own[0].path, video, start=start)
        if clips:
            rows += [(f"{model}: {task.text}", clip) for model, clip in clips.items()]
            compared.append((task.text, side_by_side(list(clips.values()), list(clips))))
    if compared:
        widest = max(clip.shape[2] for _, clip in compared)
        padded = [F.pad(clip, (0, 0, 0, widest - clip.shape[2])) for _, clip in compared]
        write_clip(plan.folder / "comparison.mp4", torch.cat(padded), video.fps)
        contact_sheet(plan.folder / "sheet.png", rows)
    return compared
