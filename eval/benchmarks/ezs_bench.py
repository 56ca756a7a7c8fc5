"""EZS-Bench (ABot-PhysWorld, Chen et al., 2026, arXiv 2603.23376): robots that no training set shows, image to video.

    recipe key              run.ezs_bench.<field>, see VqaConfig; frame_rate is 3 here
    data                    the ModelScope data set amap_cvlab/EZS-Bench_data: data.jsonl and the first frames

A line of data.jsonl holds `video` (the first frame; its stem is the video_id), `prompt` and `question`, a list
(EZS-Bench/README.md of amap-cvlab/ABot-PhysWorld); 196 of them. A first frame is looked for at its path, in the data's
folder, and below it by name. The Domain Score is what evaluate_ezsbench.py prints as Robot Score. Scoring, its
deviations and what is left out (the Quality Score) stand in `vqa`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from eval.benchmarks.base import Published, Requirement, Sample, Task
from eval.benchmarks.official_files import place, read_records
from eval.benchmarks.vlm_rows import judge_requirement
from eval.benchmarks.vqa import Vqa, VqaConfig, make_keys, read_questions

FILE = "data.jsonl"
REMEDY = (
    "get it with 'git clone https://www.modelscope.cn/datasets/amap_cvlab/EZS-Bench_data.git' (git lfs) and name its"
    " folder in run.ezs_bench.folder"
)

# PhysisForcing, Table 8: Domain, percent. The judge is Qwen2.5-VL-72B-Instruct.
_TABLE_8 = {
    "WoW-Wan 14B": 79.51,
    "GigaWorld-0": 78.26,
    "Cosmos-Predict 2.5": 76.98,
    "UnifoLM-WMA-0": 52.32,
    "Kling 2.6 Pro": 80.72,
    "Abot-PhysWorld": 83.66,
    "Wan2.2-I2V-A14B": 77.42,
    "Wan2.2-I2V-A14B (ft)": 81.95,
    "PF-Wan": 84.49,
    "Cosmos3-Nano (ft)": 83.16,
    "PF-Cosmos": 85.20,
}


@dataclass
class EzsBenchConfig(VqaConfig):
    frame_rate: float = 3.0  # frames a second that the judge sees; judge.frames plays no part


class EzsBench(Vqa):
    name = "ezs_bench"
    published = tuple(
        Published(model, {"domain": value / 100}, "PhysisForcing, Table 8 (Qwen2.5-VL-72B as judge)")
        for model, value in _TABLE_8.items()
    )

    def requirements(self) -> list[Requirement]:
        folder = self.settings.folder
        return [
            Requirement(
                "the data of EZS-Bench (prompts, first frames, questions)",
                "MIT (the repository's; the data set's card may differ)",
                f"run.ezs_bench.folder={folder}",
                bool(folder) and self._file().is_file(),
                REMEDY,
            ),
            judge_requirement(self.vlm, "Qwen2.5-VL-72B-Instruct"),
        ]

    def prompts(self) -> list[Task]:
        """A task a line. Raises ValueError for missing or bad files."""
        if not self.settings.folder:
            raise ValueError(f"run.ezs_bench.folder is empty: {REMEDY}")
        file = self._file()
        records = read_records(file, ("video", "prompt", "question"), REMEDY)
        names = [Path(record["video"]).stem for record in records]
        tasks = []
        for key, name, record in zip(make_keys(names, str(file)), names, records, strict=True):
            facts = {"video_id": name, "questions": read_questions(record["question"], f"{file}, {name}")}
            tasks.append(Task(key, record["prompt"].strip(), "robot", self._image(record["video"]), facts))
        if not tasks:
            raise ValueError(f"{file} holds no prompts: {REMEDY}")
        return tasks

    def _image(self, path: str) -> Path:
        folder = self._file().parent
        for candidate in (folder / path, *sorted(folder.rglob(Path(path).name))):
            if candidate.is_file():
                return candidate
        raise ValueError(f"{folder} holds no {Path(path).name}, a first frame: {REMEDY}")

    def layout(self, samples: Sequence[Sample], folder: Path) -> Path:
        """seed-<seed>/<video_id>.mp4: to the official code, which knows one clip a prompt, each seed is a method."""
        for sample in samples:
            if sample.path.is_file():
                place(sample.path, folder / f"seed-{sample.seed}" / f"{sample.task.facts['video_id']}.mp4")
        return folder

    def _file(self) -> Path:
        return Path(self.settings.folder).expanduser() / FILE
