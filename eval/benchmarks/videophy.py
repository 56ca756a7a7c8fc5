"""VideoPhy (Bansal et al., 2024, arXiv 2406.03520): interactions of solids and fluids, rated by VideoCon-Physics.

    recipe key              run.videophy.<field>, see DataConfig; the rater's is raters.videocon_physics
    data                    videophy_test_public.csv of the data set videophysics/videophy_test_public

A prompt is a caption of that table, which has a row for each of the authors' clips: captions are taken once each, 344.
The judge gives two probabilities, of `semantic` adherence (SA) and `physical` commonsense (PC); 0.5 and above counts as
yes (paper, section on the automatic evaluation). `joint` is the share of clips with both (README, leaderboards).
How it is run, and what it cannot take, stands in `eval.judges.videocon_physics`.

`category` is the table's states_of_matter. Figures are shares from 0 to 1; the leaderboards print them in percent.
"""

import tempfile
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

from eval.benchmarks.base import Benchmark, DataConfig, Requirement, Row, Sample, Task, read_published
from eval.benchmarks.official_files import place, read_table
from eval.judges import videocon_physics
from eval.judges.external_tool import InstallationConfig, Tool, find_tool, tool_settings, write_table
from eval.prompts import make_key
from train.clips import ClipError, read_clip

THRESHOLD = 0.5
MAX_NAME = 200  # characters of a caption in a file name
ENVIRONMENT = "the environment of its README (conda, Python 3.10, transformers 4.28)"


class Rated(Benchmark):
    """A benchmark of VideoPhy's authors: captions of a CSV, judged by a program of their checkout."""

    table: ClassVar[str]  # name of the CSV
    source: ClassVar[str]  # where to get it
    weights: ClassVar[str]  # of the judge
    laid_out: ClassVar[str]  # table of clips and captions for the official program
    dropped: ClassVar[str] = ""  # letters that a caption loses at its end to become a file's name
    rater: ClassVar[ModuleType]  # of eval.judges
    clips_a_call: ClassVar[int] = 128  # rated together, and lost together if the run is stopped
    settings: DataConfig

    @property
    def installation(self) -> InstallationConfig:
        return getattr(self.raters, self.rater.NAME)

    @property
    def recorded(self) -> dict[str, Any]:
        return super().recorded | tool_settings(self.installation)

    def requirements(self) -> list[Requirement]:
        key, own = f"raters.{self.rater.NAME}", self.installation
        get = f"get {self.table} from {self.source} and name its folder in run.{self.name}.folder"
        program = bool(own.checkout) and all((Path(own.checkout) / one).is_file() for one in self.rater.PROGRAMS)
        return [
            self.needs("folder", f"the table {self.table}", "MIT", get, (self.table,)),
            Requirement(
                "the judge's program",
                "MIT",
                f"{key}.checkout={own.checkout}, {key}.python={own.python}",
                program and bool(own.python),
                f"clone https://github.com/Hritikbansal/videophy, make {ENVIRONMENT}, and name the clone in"
                f" {key}.checkout and the environment's interpreter in {key}.python",
            ),
            Requirement(
                "the judge's weights (7B, one GPU)",
                "see the model card; made from LLaMA-7B",
                f"{key}.checkpoint={own.checkpoint}",
                bool(own.checkpoint) and Path(own.checkpoint).is_dir(),
                f"get {self.weights} and name its folder in {key}.checkpoint",
            ),
        ]

    def prompts(self) -> list[Task]:
        """One task per caption, in the order of the table. Raises ValueError for a table that cannot be read."""
        table = self.path("folder", f"name the folder of {self.table}, from {self.source}") / self.table
        remedy = f"give the {self.table} of {self.source} in run.{self.name}.folder"
        tasks = self._tasks(read_table(table, ["caption"], remedy), table)
        if not tasks:
            raise ValueError(f"{table} holds no captions: {remedy}")
        return tasks

    @abstractmethod
    def _tasks(self, rows: list[dict[str, str]], table: Path) -> list[Task]:
        """ValueError, naming `table`, for rows that are not as they should be."""

    def _rate(
        self, tool: Tool, paths: Mapping[int, str], tasks: Sequence[Task], folder: Path
    ) -> tuple[dict[int, dict[str, float]], dict[int, str]]:
        """Clip number -> ratings by name, of clips that have all, and clip number -> why it has none."""
        found, failures = self.rater.rate_files(tool, paths, [task.facts["caption"] for task in tasks], folder)
        clips = set.intersection(*map(set, found.values())) - set(failures)
        return {clip: {name: float(values[clip]) for name, values in found.items()} for clip in clips}, failures

    @abstractmethod
    def _values(self, task: Task, ratings: Mapping[str, float]) -> dict[str, float]: ...

    def layout(self, samples: Sequence[Sample], folder: Path) -> Path:
        """Clips as in the authors' examples, <caption with underscores>_<seed>.mp4, and their table."""
        names: set[str] = set()
        header = self.rater.HEADER
        rows = []
        for sample in samples:
            if not sample.path.is_file():
                continue
            caption = sample.task.facts["caption"]
            stem = (
                caption.replace("/", " ").replace("\0", " ").strip().rstrip(self.dropped).replace(" ", "_")[:MAX_NAME]
            )
            name = f"{stem}_{sample.seed}.mp4"
            if name in names or len(name.encode()) > 255:
                name = f"{sample.task.key}_{sample.seed}.mp4"
            names.add(name)
            target = folder.absolute() / "examples" / name
            place(sample.path, target)
            rows.append({"caption": caption, "videopath": str(target)})
        folder.mkdir(parents=True, exist_ok=True)
        write_table(folder / self.laid_out, header, [[row[name] for name in header] for row in rows])
        return folder

    def score(self, samples: Sequence[Sample], folder: Path) -> Iterator[Row]:
        """Raises ValueError for an installation that is not there, ToolError when the judge fails as a whole."""
        tool = find_tool(self.rater.NAME, self.installation, "cpu", self.rater.PROGRAMS)
        folder.mkdir(parents=True, exist_ok=True)
        for start in range(0, len(samples), self.clips_a_call):
            yield from self._call(tool, samples[start : start + self.clips_a_call], folder)

    def _call(self, tool: Tool, samples: Sequence[Sample], folder: Path) -> Iterator[Row]:
        failures = {}
        for number, sample in enumerate(samples):  # one damaged file would end the judge's whole run
            if reason := self.rater.refuse(sample.task.facts["caption"]) or self._damage(sample):
                failures[number] = reason
        paths = {number: str(sample.path.absolute()) for number, sample in enumerate(samples) if number not in failures}
        rated: dict[int, dict[str, float]] = {}
        if paths:
            with tempfile.TemporaryDirectory(prefix="judge-", dir=folder) as temporary:
                rated, unrated = self._rate(tool, paths, [sample.task for sample in samples], Path(temporary))
                failures |= unrated
        for number, sample in enumerate(samples):
            if number in failures:
                yield Row.of(sample, error=f"{sample.path}: {failures[number]}")
            else:
                yield Row.of(sample, self._values(sample.task, rated[number]))

    def _damage(self, sample: Sample) -> str:
        try:
            read_clip(sample.path, self.model_video)
        except ClipError as error:
            return str(error).removeprefix(f"{sample.path}: ")
        return ""


def once_each(rows: list[dict[str, str]]) -> dict[str, list[dict[str, str]]]:
    """The table's rows by caption, in its order; rows without one are left out."""
    found: dict[str, list[dict[str, str]]] = {}
    for row in rows:
        if caption := row["caption"].strip():
            found.setdefault(caption, []).append(row)
    return found


class VideoPhy(Rated):
    name = "videophy"
    columns = ("joint", "semantic", "physical", "semantic_score", "physical_score")
    figures = ("joint", "semantic", "physical")
    published = read_published("videophy")
    table = "videophy_test_public.csv"
    source = "huggingface.co/datasets/videophysics/videophy_test_public"
    weights = "huggingface.co/videophysics/videocon_physics"
    laid_out = "example.csv"
    rater = videocon_physics

    def _tasks(self, rows: list[dict[str, str]], table: Path) -> list[Task]:
        return [
            Task(make_key(index, caption), caption, group[0].get("states_of_matter", ""), facts={"caption": caption})
            for index, (caption, group) in enumerate(once_each(rows).items())
        ]

    def _values(self, task: Task, ratings: Mapping[str, float]) -> dict[str, float]:
        semantic, physical = (ratings[name] >= THRESHOLD for name in ("semantic", "physical"))
        values = {"joint": semantic and physical, "semantic": semantic, "physical": physical}
        scores = {f"{name}_score": ratings[name] for name in ("semantic", "physical")}
        return {name: float(value) for name, value in values.items()} | scores
