"""What a benchmark is: prompts, files as its official code expects them, one row per clip, and its figures.

    benchmark.requirements()                    what it needs that a package cannot bring, and whether it is there
    benchmark.prompts()                         Task: one prompt, with the picture that it starts from
    benchmark.layout(samples, folder)           the clips under the names and in the form of the official code
    benchmark.score(samples, folder)            one Row per clip, as soon as it is known
    benchmark.derive(means)                     the figures to print, from the columns' means

A new benchmark is a file with a settings dataclass and a subclass of `Benchmark`, and a line in
`eval.benchmarks.BENCHMARKS`. `eval/run.py` makes the clips, keeps the rows and resumes; `eval/report/intervals.py`
makes means and intervals of them. So a benchmark holds no loop over models, no seeds, no statistics.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from eval.judges.external_tool import RatersConfig
from eval.vlm.backend import VlmConfig
from recipes import read_yaml
from train.backbones.base import Backbone
from train.clips import VideoConfig
from train.sampling import SamplerConfig


@dataclass
class DataConfig:
    """Settings of a benchmark that needs files of others and nothing else; its module says which."""

    folder: str = ""  # with the benchmark's data


@dataclass(frozen=True)
class Task:
    """One prompt of a benchmark."""

    key: str  # of [a-z0-9-]: names files
    text: str
    category: str = ""  # of the breakdown
    image: Path | None = None  # picture or clip whose first frame the video starts from
    facts: Mapping[str, Any] = field(default_factory=dict)  # what scoring needs to know, as plain JSON values
    cluster: str = ""  # of tasks that are one observation, as views of one scene: intervals draw them together


@dataclass(frozen=True)
class Sample:
    """A clip of a task that a model made: an mp4 that may be missing or damaged."""

    task: Task
    seed: int
    path: Path


@dataclass(frozen=True)
class Row:
    """What was found of one clip: a finite number for each column that applies, or the reason why there is none."""

    key: str  # of the task
    seed: int
    values: Mapping[str, float] = field(default_factory=dict)
    error: str = ""  # the file and what is wrong with it
    cluster: str = ""  # as a task's, of rows without a clip; empty: the key
    # To be watched, of rows without a clip: (T, H, W, 3) uint8 by name, kept beside the row for `Benchmark.page`.
    clips: Mapping[str, np.ndarray] = field(default_factory=dict, compare=False)

    @classmethod
    def of(cls, sample: Sample, values: Mapping[str, float] | None = None, *, error: str = "") -> "Row":
        return cls(sample.task.key, sample.seed, dict(values or {}), error)


@dataclass(frozen=True)
class Requirement:
    """Something that a user has to fetch: data, a model, another project's checkout."""

    what: str
    licence: str
    where: str  # the recipe's key for it, and its value
    found: bool
    remedy: str  # what to get from where, and where to put it


@dataclass(frozen=True)
class Published:
    """A figure that a paper printed, shown beside ours and marked as theirs."""

    model: str
    values: Mapping[str, float]  # by figure, in this benchmark's units
    source: str  # paper and table


PUBLISHED: dict[str, Any] = read_yaml(Path(__file__).with_name("published.yaml"), "figures by benchmark")


def read_published(name: str) -> tuple[Published, ...]:
    """What published.yaml holds of the benchmark `name`, in its order."""
    found = []
    for table in PUBLISHED[name]:
        scale = 100 if table.get("percent") else 1
        for model, values in table["models"].items():
            own = {figure: value / scale for figure, value in zip(table["figures"], values, strict=True)}
            found.append(Published(model, own, table["source"]))
    return tuple(found)


class Benchmark(ABC):
    """A benchmark with its settings. Building it reads nothing; `prompts` and `score` raise ValueError for bad data."""

    name: ClassVar[str]
    columns: ClassVar[tuple[str, ...]]  # of a row
    figures: ClassVar[tuple[str, ...]]  # that the report prints, the first one decides
    lower_is_better: ClassVar[tuple[str, ...]] = ()  # of the figures
    published: ClassVar[tuple[Published, ...]] = ()
    lossless: ClassVar[bool] = False  # whether clips have to be kept without loss
    together: ClassVar[int] = 1  # samples that are scored as one batch, and so change each other's values by rounding
    of_clips: ClassVar[bool] = True  # False: it asks the backbone itself, see `probe`

    def __init__(
        self,
        settings: Any,
        video: VideoConfig,
        vlm: VlmConfig | None = None,
        raters: RatersConfig | None = None,
        sampler: SamplerConfig | None = None,
        batch_size: int = 1,
        folder: Path = Path(),
    ):
        self.prefix_frames = 0  # of the clip that a model continues; 0: it is shown a picture, or nothing
        self.settings, self.model_video, self.sampler = settings, video, sampler or SamplerConfig()
        self.vlm, self.raters = vlm or VlmConfig(), raters or RatersConfig()
        self.batch_size = batch_size  # clips in a network pass, of a benchmark that asks the backbone itself
        self.folder = folder  # with all its files of a run

    @property
    def recorded(self) -> dict[str, Any]:
        """All that scores may depend on, beside the clip, as plain JSON values; rows are told apart by it."""
        return asdict(self.settings)

    @abstractmethod
    def requirements(self) -> list[Requirement]:
        """What it needs; cheap. Nothing missing: the rest can run."""

    def needs(self, key: str, what: str, licence: str, remedy: str, files: Sequence[str] = ("",)) -> Requirement:
        """That the setting `key` names a folder with all of `files`, or a file."""
        value = getattr(self.settings, key)
        found = bool(value) and all((Path(value).expanduser() / one).exists() for one in files)
        return Requirement(what, licence, f"run.{self.name}.{key}={value}", found, remedy)

    def path(self, key: str, remedy: str) -> Path:
        """The folder or file that the setting `key` names. ValueError, with the remedy, where it names none."""
        if not (value := getattr(self.settings, key)):
            raise ValueError(f"run.{self.name}.{key} is empty: {remedy}")
        return Path(value).expanduser()

    def prompts(self) -> list[Task]:
        """Every clip to make, in a fixed order."""
        return []

    def video(self, video: VideoConfig) -> VideoConfig:
        """Size, length and rate of the clips to make, for a model whose own are `video`."""
        return video

    def shown(self, task: Task) -> np.ndarray | None:
        """What a model is shown of a task, (n, H, W, 3) uint8 at the size of its video; None: the first frame of
        `task.image`, cut at its centre. ValueError, with file and reason, where that cannot be read."""
        return None

    def references(self, folder: Path) -> list[Sample]:
        """True clips, written below `folder` where they are not there yet, scored as a model of their own; or none."""
        return []

    def layout(self, samples: Sequence[Sample], folder: Path) -> Path | None:
        """The folder below `folder` with the clips as the official code reads them; None where it has no such form."""
        return None

    def score(self, samples: Sequence[Sample], folder: Path) -> Iterator[Row]:
        """A row for every sample, in any order; one with an error for a clip that cannot be scored.

        folder: for files of its own (a tool's CSV, a cache), the same for all models. Called with what has no row yet.
        """
        raise NotImplementedError

    def check(self, shell: Backbone) -> None:
        """ValueError where `probe` cannot work with this backbone, which has no weights yet."""
        return

    def probe(self, backbone: Backbone, folder: Path, done: Set[str] = frozenset()) -> Iterator[Row]:
        """Rows of the backbone as it stands (a LoRA on or off), for benchmarks with `of_clips` False.

        folder: for files of its own, one for each model below a common one. done: keys of the rows of this model that
        are kept, which need not come again.
        """
        raise NotImplementedError

    def page(self, folder: Path, scores: Sequence[Mapping[str, Any]], clips: Mapping[str, Path]) -> Path | None:
        """Write a page of its own into `folder`, beside the report's; None where it has none.

        scores: the benchmark's lines of scores.jsonl. clips: of each model the folder below `folder` with its rows'
        clips: `<key>-<name>.mp4`, and `<key>.json`, written after them, with the number of frames by name.
        """
        return None

    def derive(self, means: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """`figures` from the columns' means, (R,) each: one per replicate. By default the columns themselves."""
        return {name: means[name] for name in self.figures}
