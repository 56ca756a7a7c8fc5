"""The robots benchmark: a model gets the first frame of an expert's demonstration and its instruction, and its clip is
measured by the robots' judge and against the demonstration itself, whose future is known.

Both clips are measured from pixels by the same code: `gripper_error` and `object_error` are distances between the
centres of what is seen, as a share of the frame's height, averaged over the frames in which the demonstration shows
them; a clip that does not show them there is off by half of it. The demonstrations are scored as well, as `true`.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from eval.benchmarks.base import Benchmark, Requirement, Row, Sample, Task
from eval.judges.robots import judge
from eval.judges.robots.vision import observe, track_errors
from eval.prompts import make_key
from eval.robots import simulators, world
from eval.robots.demonstrations import Listed, check_video, list_demonstrations
from eval.robots.tasks import TASKS, parse_prompt
from train.clips import ClipError, read_clip, write_clip

AHEAD = 4  # demonstrations that may be made while one is asked for


@dataclass
class RobotsConfig:
    clips: int = 128  # held-out demonstrations, the tasks in turn
    tasks: list[str] = field(default_factory=lambda: list(TASKS))
    seed: int = 0  # of the demonstrations

    def __post_init__(self) -> None:
        if self.clips < 1 or not self.tasks or not set(self.tasks) <= TASKS.keys():
            raise ValueError(f"run.robots: give clips of 1 or more, and tasks out of {', '.join(TASKS)}")


def simulator() -> Requirement:
    try:
        world.load()
        found = True
    except ValueError:
        found = False
    return Requirement("Meta-World and MuJoCo", "MIT, Apache-2.0", "the extra robots", found, world.INSTALL)


class Robots(Benchmark):
    name = "robots"
    columns = ("physical", "semantic", "gripper_error", "object_error", *(f"error_{law}" for law in judge.LAWS))
    figures = ("physical", "semantic", "gripper_error", "object_error")
    lower_is_better = ("gripper_error", "object_error")
    lossless = True
    together = judge.BATCH_SIZE

    def requirements(self) -> list[Requirement]:
        return [simulator()]

    def prompts(self) -> list[Task]:
        check_video(self.model_video)
        return [
            Task(make_key(number, one.prompt), one.prompt, one.task, Path(one.name), {"number": number})
            for number, one in enumerate(self._listed(range(self.settings.clips)))
        ]

    def shown(self, task: Task) -> np.ndarray:
        """The demonstration's first frame: (1, H, W, 3) uint8; that of its true clip where an earlier run kept it."""
        path = self._true_path(self.folder / "references", task)
        with suppress(ClipError):
            return read_clip(path, replace(self.model_video, num_frames=1)).numpy()
        return self._simulate(task, drawn="first")

    def references(self, folder: Path) -> list[Sample]:
        samples = [Sample(task, 0, self._true_path(folder, task)) for task in self.prompts()]
        for sample in samples:
            try:
                self._true_clip(folder, sample.task)
            except ValueError as error:
                print(f"robots: no true clip: {error}")  # its row says that the file is missing
        return samples

    def score(self, samples: Sequence[Sample], folder: Path) -> Iterator[Row]:
        truths = folder.parent / "references"
        for start in range(0, len(samples), self.together):
            read = []
            for sample in samples[start : start + self.together]:
                try:
                    true_clip = self._true_clip(truths, sample.task)
                    read.append((sample, true_clip, read_clip(sample.path, self.model_video)))
                except ValueError as error:
                    yield Row.of(sample, error=str(error))
            if read:
                prompts = [sample.task.text for sample, *_ in read]
                true_clips, clips = (torch.stack([one[place] for one in read]) for place in (1, 2))
                rows = judge.build("cpu")(clips, prompts).rows()
                colours = [parse_prompt(prompt)[1] for prompt in prompts]
                errors = track_errors(observe(clips, colours), observe(true_clips, colours))
                for index, ((sample, *_), row) in enumerate(zip(read, rows, strict=True)):
                    yield Row.of(sample, row | {name: float(values[index]) for name, values in errors.items()})

    def _listed(self, numbers: Iterable[int]) -> list[Listed]:
        return list_demonstrations(self.settings.tasks, "heldout", self.settings.seed, numbers)

    def _true_path(self, folder: Path, task: Task) -> Path:
        video, (listed,) = self.model_video, self._listed([task.facts["number"]])
        size = f"{listed.seed}-{video.width}x{video.height}x{video.num_frames}-{video.fps:g}fps"
        return folder / size / f"{listed.task}-{listed.index}.mp4"

    def _true_clip(self, folder: Path, task: Task) -> Tensor:
        """(T, H, W, 3) uint8, written without loss where it is not there yet. Raises ValueError."""
        path = self._true_path(folder, task)
        if not path.exists():
            write_clip(path, torch.from_numpy(self._simulate(task)), self.model_video.fps, lossless=True)
        return read_clip(path, self.model_video)

    def _simulate(self, task: Task, drawn: str = "frames") -> np.ndarray:
        number = task.facts["number"]
        listed, *then = self._listed(range(number, min(number + AHEAD, self.settings.clips)))
        try:
            return simulators.shared().get(listed, self.model_video, drawn=drawn, then=then).frames
        except simulators.SimulatorError as error:
            raise ValueError(f"{listed.name}: the simulator failed: {error}") from error
