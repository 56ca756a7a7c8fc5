"""R-Bench (Deng et al., 2026, arXiv 2601.15282): robots at work, image to video, rated by a vision-language model.

    recipe key              run.r_bench.<field>, see RBenchConfig
    data                    the data set DAGroup-PKU/RBench: prompts/<dimension>_prompts.json and imgs/
    wording                 a clone of DAGroup-PKU/ReVidgen; every question is read from its eval/

650 prompts in nine dimensions: five tasks and four embodiments. `average` is the unweighted mean of the nine, `tasks`
and `embodiments` of theirs (PhysisForcing, Appendix B; its Table 1 agrees). All scores lie between 0 and 1.

A task (eval/5_tasks/<task>.py): frames in one picture, one question, a JSON of marks from 1 to 5. With the marks a, b
of the two aspects that decide and the model's own total t, the score is max(min((a + b) / 2, t), 1), less 1, over 4
(summary_scores.py). Visual reasoning asks for a chain of questions about the prompt first, from words alone.

An embodiment (eval/4_embodiments/): plausibility (2_physical_plausibility.py) and adherence (3_task_adherence_
consistency.py), 1 to 5 each, of six frames; and stability (1_robot_subject_stability.py): how much robot and object
change from the first frame to the one at three quarters, A to E each, 1 to 15 together. Scaled to 0 to 1
(8_summarize_robot_results.py): task completion is the mean of the first two, visual quality is .8 stability + .2 motion
smoothness - p(amplitude) - q(A to E), not below 0; the dimension is the mean of the two (summary_scores.py).

Motion smoothness and amplitude come from operators (Q-Align, Grounded-SAM-2, CoTracker), not from a judge. Run steps 4
to 7 of scripts/rbench_eval_4embodiments.sh on the laid-out clips and name its results/4_embodiments in `motion`. Left
out, visual quality is stability - q(A to E): the embodiments and the average are then not comparable with others'.

Kept as they are there: a letter of the object changes q only where the robot's does; long-horizon planning tells the
model the length of the events' text as their number. Deviations: no rounding to three digits on the way; a bad answer
is asked for again and then an error (there it is left out, or counts as 0 for plausibility and adherence); marks above
5 are bad; the picture stands before the words, as JPEG of quality 90. The judge is whatever model serves; officially
GPT-5 and Qwen3-VL-235B-A22B, apart, of which PhysisForcing uses the second. `judge.frames` and `judge.frame_height`
play no part.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from eval.benchmarks.base import Requirement, Row, Sample, Task, read_published
from eval.benchmarks.official_files import place_all, read_records
from eval.benchmarks.r_bench_questions import EMBODIMENTS, SCRIPTS, TASKS, Wording, rate_embodiment, rate_task
from eval.benchmarks.vlm_rows import AskedBenchmark, judge_requirement, judge_rows
from eval.benchmarks.vqa import make_keys
from eval.vlm.client import Vlm, jpeg_frames

DIMENSIONS = (*TASKS, *EMBODIMENTS)
SHAPES = {"spatial_relationship": (1, 3)}  # rows and columns of the picture; others have GRID
GRID = (3, 2)
SAMPLED = 16  # frames out of which a picture's are taken
DATA = (
    "get it with 'hf download DAGroup-PKU/RBench --repo-type dataset' (prompts/ and imgs/) and name its folder in"
    " run.r_bench.folder"
)
CLONE = "clone https://github.com/DAGroup-PKU/ReVidgen and name the clone in run.r_bench.checkout"
MOTION = "run steps 4 to 7 of ReVidgen's scripts/rbench_eval_4embodiments.sh on the laid-out clips"


@dataclass
class RBenchConfig:
    folder: str = ""  # of the data set: prompts/, imgs/
    checkout: str = ""  # a clone of DAGroup-PKU/ReVidgen
    motion: str = ""  # results/4_embodiments of the official motion steps; empty: leave motion out


class RBench(AskedBenchmark):
    name = "r_bench"
    frame_height = None  # a grid of frames, see `rate`
    columns = (*DIMENSIONS, "task_completion", "visual_quality", "plausibility", "adherence", "stability")
    figures = ("average", "tasks", "embodiments", *columns)
    published = read_published("r_bench")

    @property
    def recorded(self) -> dict[str, Any]:
        return super().recorded | {"dimensions": list(DIMENSIONS)}  # had a key of its own

    def requirements(self) -> list[Requirement]:
        data, questions = "the data of R-Bench (prompts and first frames)", "the official questions"
        found = [
            self.needs("folder", data, "see the data set's card", DATA, ("prompts",)),
            self.needs("checkout", questions, "Apache 2.0 (README badge)", CLONE, SCRIPTS),
            judge_requirement(self.vlm, "GPT-5 and Qwen3-VL-235B-A22B-Instruct"),
        ]
        if self.settings.motion:
            found.append(self.needs("motion", "motion smoothness and amplitude", "none", MOTION))
        return found

    def prompts(self) -> list[Task]:
        """Raises ValueError for missing or bad files."""
        folder = self.path("folder", DATA)
        return [task for dimension in DIMENSIONS for task in _tasks(folder, dimension)]

    def layout(self, samples: Sequence[Sample], folder: Path) -> Path:
        """<model>-<seed>/<dimension>/videos/<name>.mp4: ReVidgen/data, with a model's seed as a model of its own."""
        return place_all(
            samples, folder, lambda one: f"{_run(one)}/{one.task.category}/videos/{one.task.facts['name']}.mp4"
        )

    def score(self, samples: Sequence[Sample], folder: Path) -> Iterator[Row]:
        """Raises ValueError for a clone or motion results that cannot be read."""
        wording = Wording(self.path("checkout", CLONE), CLONE)
        motion = self._motion(samples) if self.settings.motion else None

        async def judge(vlm: Vlm, sample: Sample, pictures: Sequence[bytes]) -> dict[str, float]:
            task = sample.task
            if task.category in TASKS:
                return {task.category: await rate_task(vlm, task, pictures[0], wording)}
            found = await rate_embodiment(vlm, task, pictures, wording, motion and motion(sample))
            return {task.category: (found["task_completion"] + found["visual_quality"]) / 2} | found

        ready = []
        for sample in samples:
            if motion is None or sample.task.category in TASKS or motion(sample) is not None:
                ready.append(sample)
            else:
                yield Row.of(sample, error=f"{sample.path}: no motion results in {self.settings.motion}: {MOTION}")
        yield from judge_rows(self.judge, ready, self.model_video, folder, pick, judge)

    def _motion(self, samples: Sequence[Sample]) -> Callable[[Sample], tuple[float, float] | None]:
        """Smoothness and amplitude of a sample, None where there are none."""
        root = self.path("motion", MOTION)

        @cache
        def table(run: str, dimension: str) -> dict[str, tuple[float, float]]:
            path = root / run / dimension / "motion" / "results.json"
            records = read_records(path, ("index",), MOTION) if path.is_file() else []
            names = ("motion_smoothness_score", "perceptible_amplitude_robotic_manipulator")
            values = {str(record["index"]): [record.get(name) for name in names] for record in records}
            return {name: (float(a), float(b)) for name, (a, b) in values.items() if a is not None and b is not None}

        return lambda sample: table(_run(sample), sample.task.category).get(sample.task.facts["name"])

    def derive(self, means: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        tasks, embodiments = ([means[name] for name in names] for names in (TASKS, EMBODIMENTS))
        found = {"tasks": np.mean(tasks, axis=0), "embodiments": np.mean(embodiments, axis=0)}
        found["average"] = np.mean([*tasks, *embodiments], axis=0)
        return {name: found[name] if name in found else means[name] for name in self.figures}


def _tasks(folder: Path, dimension: str) -> list[Task]:
    file = folder / "prompts" / f"{dimension}_prompts.json"
    fields = ("view", *(TASKS[dimension].fields if dimension in TASKS else EMBODIMENTS[dimension]))
    records = read_records(file, ("name", "prompt", "image_path", *fields), DATA)
    keys = make_keys([f"{dimension} {record['name']}" for record in records], str(file))
    tasks = []
    for key, record in zip(keys, records, strict=True):
        image = folder / "imgs" / record["image_path"]
        if not image.is_file():
            raise ValueError(f"{image}, the first frame of {record['name']} in {file.name}, is not there: {DATA}")
        facts = {"name": str(record["name"]), "prompt": record["prompt"], **{one: record[one] for one in fields}}
        tasks.append(Task(key, record["prompt"].strip(), dimension, image, facts))
    return tasks


def pick(task: Task, clip: Tensor) -> list[bytes]:
    """Pictures for the questions, as JPEG: a grid of frames; for an embodiment also the pair for its stability."""
    sampled = np.linspace(0, len(clip) - 1, min(SAMPLED, len(clip)), dtype=int)
    rows, columns = SHAPES.get(task.category, GRID)
    chosen = sampled[np.linspace(0, len(sampled) - 1, rows * columns, dtype=int)]
    pictures = [grid(clip, chosen, columns)]
    if task.category in EMBODIMENTS:
        pictures.append(grid(clip, [0, int(0.75 * (len(clip) - 1))], 2))
    return pictures


def grid(clip: Tensor, chosen: Sequence[int], columns: int) -> bytes:
    """Frames of a clip (T, H, W, 3) side by side, row by row, in full size."""
    frames = clip.numpy()[list(chosen)]
    count, height, width, _ = frames.shape
    picture = frames.reshape(count // columns, columns, height, width, 3).swapaxes(1, 2)
    picture = picture.reshape(1, count // columns * height, columns * width, 3)
    return jpeg_frames(picture, 1, picture.shape[1])[0]


def _run(sample: Sample) -> str:
    """The official code's name of a model: ours, which is the folder of its clips, and the seed."""
    return f"{sample.path.parent.name}-{sample.seed}"
