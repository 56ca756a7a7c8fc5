"""Physics-IQ: does a generated clip go on as the filmed experiment did? 66 experiments, 3 views, filmed twice.

    recipe key              run.physics_iq.<field>, see PhysicsIQConfig
    data                    the folder physics-IQ-benchmark, or physics-IQ-benchmark-verified, as downloaded

A model gets the frame at which the experiment starts (image to video) or the three seconds up to it (multiframe, video
to video) and the description; the five seconds that follow are compared with take 1. Metrics in `physics_iq_metrics`,
masks and files in `physics_iq_frames`; both equal google-deepmind/physics-IQ-benchmark, which arXiv 2501.09038
describes. Its leaderboards know these two inputs. A model that takes text alone is shown nothing of the scene:
`input=text` is possible but comparable with no published figure.

Length and rate: the official code takes exactly five seconds at a whole number of frames per second, which the real
videos are resampled to. Wan's 4k + 1 frames (81 at 16, 121 at 24) are cut to 80 and 120. Of the three seconds a model
gets the last 4k + 1 frames (45 at 16, 69 at 24), and makes 125 or 189 frames in all.
"""

import csv
import importlib.util
import math
import multiprocessing
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from eval.benchmarks.base import Benchmark, Requirement, Row, Sample, Task, read_published
from eval.benchmarks.physics_iq_frames import SECONDS, View, opencv, real_frames, score_view, trim
from eval.benchmarks.physics_iq_metrics import METRICS, physics_iq
from eval.prompts import slug
from train.clips import ClipError, VideoConfig, write_clip
from train.files import sha256

INPUTS = ("image", "multiframe", "text")
MASKS = ("memory", "mp4v", "both")
PREFIX_SECONDS = 3  # of a conditioning video
SOURCE_FPS = 30  # of the videos that are always there
COLUMNS = (*METRICS, *(f"variance_{name}" for name in METRICS), "verified", *(f"verified_{name}" for name in METRICS))
MP4V = "_mp4v"  # ends the columns and figures of the official masks, where both kinds are asked for
REMEDY = (
    "get it with the official physiq/download_physics_iq_data.py (gs://physics-iq-benchmark), or the verified one with"
    " 'hf download Anates-Labs-Research/Physics-IQ-Verified --repo-type dataset', and name its folder in"
    " run.physics_iq.folder"
)


@dataclass
class PhysicsIQConfig:
    folder: str = ""  # the benchmark's data, as downloaded
    input: str = "image"  # what a model is shown: image (the switch frame), multiframe (the 3 s up to it) or text
    masks: str = "memory"  # memory, mp4v (the official round trip through a lossy file), or both, reported side by side

    def __post_init__(self) -> None:
        for name, choices in (("input", INPUTS), ("masks", MASKS)):
            if getattr(self, name) not in choices:
                raise ValueError(f"run.physics_iq.{name}={getattr(self, name)}: use one of {', '.join(choices)}")


class PhysicsIQ(Benchmark):
    """One row per view: its metrics, the variance between the takes, and its verified scores."""

    name: ClassVar[str] = "physics_iq"
    columns = COLUMNS
    figures = ("physics_iq", "physics_iq_verified", *METRICS)
    lower_is_better = ("mse",)
    workers: ClassVar[int] = os.cpu_count() or 1  # processes; the real 4K videos need about 1 GB in each
    published = read_published("physics_iq")

    def __init__(self, settings: PhysicsIQConfig, video: VideoConfig, *judges: Any):
        super().__init__(settings, video, *judges)
        if video.fps != round(video.fps):
            raise ValueError(
                f"video.fps={video.fps:g}: Physics-IQ compares whole numbers of frames per second; use the model's own"
                " 8, 16, 24 or 30, or leave physics_iq out of benchmarks"
            )
        self.fps = round(video.fps)
        if settings.input != "image":
            self.published = ()  # the figures are of image to video
        if settings.input == "multiframe":
            self.prefix_frames = (PREFIX_SECONDS * self.fps - 1) // 4 * 4 + 1
        self.root = Path(settings.folder)
        self.descriptions = self.root / "descriptions.csv"
        if settings.masks == "both":
            self.columns = tuple(f"{name}{ending}" for ending in ("", MP4V) for name in type(self).columns)
            self.figures = tuple(f"{name}{ending}" for ending in ("", MP4V) for name in type(self).figures)
            self.lower_is_better = ("mse", f"mse{MP4V}")

    # What it needs

    def requirements(self) -> list[Requirement]:
        needed = [self._videos("testing")]
        if self.settings.input == "image":
            needed.append(self.root / "switch-frames")
        if self.settings.input == "multiframe":
            needed.append(self._videos("conditioning"))
        there = bool(self.settings.folder) and all(folder.is_dir() for folder in needed)
        where, descriptions = f"run.physics_iq.folder={self.settings.folder}", self.descriptions
        copy = (
            "copy descriptions/descriptions_original.csv, or best_practice/descriptions_base.csv (verified), of"
            " google-deepmind/physics-IQ-benchmark there"
        )
        found = importlib.util.find_spec("cv2") is not None
        return [
            Requirement("Physics-IQ videos and switch frames", "CC BY 4.0", where, there, REMEDY),
            Requirement("Physics-IQ descriptions", "CC BY 4.0", str(descriptions), descriptions.is_file(), copy),
            Requirement("OpenCV", "Apache-2.0", "the module cv2", found, "pip install 'physalign[trackers]'"),
        ]

    @property
    def recorded(self) -> dict[str, Any]:
        return super().recorded | {"descriptions": "", "context_frames": 0}  # had keys of their own

    def _videos(self, kind: str) -> Path:
        """Folder of testing or conditioning videos at the model's rate, else at 30, from which they are resampled.

        The bucket names them split-videos/testing, the official README split-videos/testing-videos.
        """
        tried = [
            self.root / "split-videos" / name / f"{fps}FPS"
            for fps in (self.fps, SOURCE_FPS)
            for name in (kind, f"{kind}-videos")
        ]
        return next((folder for folder in tried if folder.is_dir()), tried[-2])

    def _video(self, facts: Mapping[str, Any], take: int) -> Path:
        return _real_file(self._videos("testing"), "testing-videos", facts, take)

    def _shipped_masks(self, facts: Mapping[str, Any], take: int) -> Path | None:
        """The benchmark's own masks of a real video, which the official code prefers to making them."""
        folder = self.root / "video-masks" / "real" / f"{self.fps}FPS"
        return _real_file(folder, "video-masks", facts, take) if folder.is_dir() else None

    # What to make

    def video(self, video: VideoConfig) -> VideoConfig:
        """At least the prefix and five seconds, as 4k + 1 frames; a model that makes longer clips keeps its length."""
        needed = self.prefix_frames + SECONDS * self.fps
        return video if video.num_frames >= needed else replace(video, num_frames=4 * math.ceil((needed - 1) / 4) + 1)

    def prompts(self) -> list[Task]:
        """The 198 views of take 1 in the order of their numbers; the views of a scenario are one cluster."""
        path = self.descriptions
        if not path.is_file():
            raise ValueError(f"{path}: no such file; {self.requirements()[1].remedy}")
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = list(csv.DictReader(file))
        takes: dict[tuple[str, str], dict[str, dict[str, str]]] = {}
        for number, row in enumerate(rows, 2):
            form = r"(\d{4})_(perspective-\w+)_take-([12])_([\w.-]+)\.mp4"
            found = re.fullmatch(form, row.get("scenario") or "", re.ASCII)
            if not found or not row.get("description"):
                raise ValueError(
                    f"{path}, line {number}: no scenario of the form"
                    " 0001_perspective-left_take-1_name.mp4 with a description; get the file again"
                )
            numbered = {**row, "id": found[1]}
            if takes.setdefault((found[4], found[2]), {}).setdefault(found[3], numbered) is not numbered:
                raise ValueError(f"{path}, line {number}: {row['scenario']} comes twice")
        tasks = [self._task(scenario, view, both, path) for (scenario, view), both in takes.items()]
        missing = [str(task.image) for task in tasks if task.image and not task.image.is_file()]
        if missing:
            raise ValueError(
                f"run.physics_iq.folder={self.settings.folder}: {len(missing)} of {len(tasks)} inputs are not there,"
                f" as {missing[0]}; {REMEDY}"
            )
        return sorted(tasks, key=lambda task: task.key)

    def _task(self, scenario: str, view: str, takes: Mapping[str, Mapping[str, str]], path: Path) -> Task:
        if set(takes) != {"1", "2"}:
            raise ValueError(
                f"{path}: {scenario}, {view} has take {', '.join(sorted(takes))} alone;"
                " both are needed to know the physical variance, get the file again"
            )
        first, second = takes["1"], takes["2"]
        words = f"{first['id']}-{view.removeprefix('perspective-')}-{scenario.removeprefix('trimmed-')}"
        facts = {"id": first["id"], "take_2": second["id"], "view": view, "scenario": scenario}
        image = None
        if self.settings.input == "image":
            image = self.root / "switch-frames" / f"{first['id']}_switch-frames_anyFPS_{view}_{scenario}.jpg"
        elif self.settings.input == "multiframe":
            image = _real_file(self._videos("conditioning"), "conditioning-videos", facts, 1)
            facts["start"] = self.prefix_frames  # of a clip, before the five seconds
        return Task(slug(words), first["description"], first.get("category") or "", image, facts, cluster=scenario)

    def shown(self, task: Task) -> np.ndarray:
        """What the model is shown, at its size: (n,H,W,3) uint8 RGB, one frame or the prefix.

        Stretched to the size, not cut: the official code stretches what the model makes back over the whole real frame.
        """
        cv2 = opencv()
        assert task.image is not None, "input=text shows nothing"
        if self.prefix_frames:
            return self._stretched(list(real_frames(task.image, self.fps, PREFIX_SECONDS))[-self.prefix_frames :])
        frame = cv2.imdecode(np.fromfile(task.image, np.uint8), cv2.IMREAD_COLOR)
        if frame is None:
            raise ValueError(f"{task.image}: no picture, or cut short; {REMEDY}")
        return self._stretched([frame])

    def _stretched(self, frames: Iterable[np.ndarray]) -> np.ndarray:
        """BGR frames of any size as RGB of the model's."""
        cv2 = opencv()
        size = (self.model_video.width, self.model_video.height)
        return np.stack([cv2.resize(frame, size, interpolation=cv2.INTER_AREA)[..., ::-1] for frame in frames])

    def references(self, folder: Path) -> list[Sample]:
        """Take 2, which scores 100 by construction: its metrics are the physical variance itself.

        Where the benchmark has it at another rate alone, a clip of the model's rate and size, a little below 100.
        """
        samples = []
        for task in self.prompts():
            path = self._video(task.facts, 2)
            if path.parent.name != f"{self.fps}FPS":
                source, path = path, folder / f"{task.key}-{sha256(path)[:12]}.mp4"
                if not path.exists():
                    frames = self._stretched(real_frames(source, self.fps, SECONDS))
                    write_clip(path, torch.from_numpy(frames), self.fps)
            facts = {name: fact for name, fact in task.facts.items() if name != "start"}
            samples.append(Sample(replace(task, facts=facts), 0, path))
        return samples

    # What was made

    def layout(self, samples: Sequence[Sample], folder: Path) -> Path:
        """`run_01`, `run_02` … (one folder per seed) with 198 clips of five seconds each, for --input_folders.

        Cut without loss, so the official code sees the pixels that are scored here. Clips that cannot be read are left
        out; their rows say why.
        """
        runs: dict[str, int] = {}
        for sample in samples:
            runs[sample.task.key] = runs.get(sample.task.key, 0) + 1
            facts = sample.task.facts
            name = f"{facts['id']}_{facts['view']}_{facts['scenario']}.mp4"
            target = folder / f"run_{runs[sample.task.key]:02d}" / name
            with suppress(ClipError, FileNotFoundError):
                if not target.exists() or target.stat().st_mtime_ns < sample.path.stat().st_mtime_ns:
                    trim(sample.path, target, SECONDS * self.fps, start=facts.get("start", 0))
        return folder

    def score(self, samples: Sequence[Sample], folder: Path) -> Iterator[Row]:
        """Rows as they are done; metrics of take 1 and 2 are kept in `folder` for the next model."""
        opencv()
        if not (videos := self._videos("testing")).is_dir():
            raise ValueError(f"run.physics_iq.folder={self.settings.folder}: no {videos} with real videos; {REMEDY}")
        jobs = [(sample, self._views(sample, folder)) for sample in samples]
        workers = min(self.workers, len(jobs))
        if workers <= 1:
            yield from (_row(*job) for job in jobs)
            return
        # Spawned: a fork of a process that has used a GPU or OpenCV's threads can hang.
        pool = ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"))
        try:
            for future in as_completed([pool.submit(_row, *job) for job in jobs]):
                yield future.result()
        finally:
            pool.shutdown(cancel_futures=True)

    def _views(self, sample: Sample, folder: Path) -> dict[str, View]:
        """What to compare, by the ending of its columns."""
        facts = sample.task.facts
        kinds = {"memory": {"": False}, "mp4v": {"": True}, "both": {"": False, MP4V: True}}[self.settings.masks]
        return {
            ending: View(
                clip=sample.path,
                start=facts.get("start", 0),
                fps=self.fps,
                takes=(self._video(facts, 1), self._video(facts, 2)),
                shipped=(self._shipped_masks(facts, 1), self._shipped_masks(facts, 2)) if mp4v else (None, None),
                mp4v=mp4v,
                cache=folder / "real" / f"{facts['id']}-{self.fps}fps{MP4V if mp4v else ''}.npz",
            )
            for ending, mp4v in kinds.items()
        }

    def derive(self, means: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        figures = {}
        for ending in ("", MP4V) if self.settings.masks == "both" else ("",):
            here = {name: means[f"{name}{ending}"] for name in COLUMNS}
            figures[f"physics_iq{ending}"] = physics_iq(here)
            figures[f"physics_iq_verified{ending}"] = 100 * here["verified"]
            figures |= {f"{name}{ending}": here[name] for name in METRICS}
        return figures


def _real_file(folder: Path, kind: str, facts: Mapping[str, Any], take: int) -> Path:
    """What the benchmark ships of one take, `folder` being called by the rate."""
    number = facts["take_2"] if take == 2 else facts["id"]
    return folder / f"{number}_{kind}_{folder.name}_{facts['view']}_take-{take}_{facts['scenario']}.mp4"


def _row(sample: Sample, views: Mapping[str, View]) -> Row:
    try:
        scored = {ending: score_view(view) for ending, view in views.items()}
    except ValueError as error:
        return Row.of(sample, error=str(error))
    return Row.of(sample, {f"{name}{end}": value for end, values in scored.items() for name, value in values.items()})
