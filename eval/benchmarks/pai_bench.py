"""PAI-Bench-G (Zhou et al., 2025), its robot domain by default: image to video, scored by yes-or-no questions.

    recipe key              run.pai_bench.<field>, see PaiBenchConfig
    data                    the data set shi-labs/physical-ai-bench-predict (now also -generation):
                            cosmos_predict2_bench_full_info.json, condition_image/, vqa/<video_id>.json

A prompt is a record of the JSON (video_id, prompt_en, image_name); its domain is how the video_id begins, as in
predict/pbench/vqa_evaluation.py of SHI-Labs/physical-ai-bench. PhysisForcing, Appendix B: 174 prompts of the domain
robot, 5 or 6 questions each. Scoring, its deviations and what is left out (the Quality Score) stand in `vqa`.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from eval.benchmarks.base import Published, Requirement, Sample, Task
from eval.benchmarks.official_files import place, read_records
from eval.benchmarks.vlm_rows import judge_requirement
from eval.benchmarks.vqa import Vqa, VqaConfig, make_keys, read_questions

FILE = "cosmos_predict2_bench_full_info.json"
DOMAINS = ("av", "common_sense", "human", "industry", "misc", "physics", "robot")
REMEDY = (
    "get it with 'hf download shi-labs/physical-ai-bench-predict --repo-type dataset' and name its folder in"
    " run.pai_bench.folder"
)

# PhysisForcing, Table 7: Domain, percent. The judge is Qwen3-VL-235B-A22B-Instruct.
_TABLE_7 = {
    "Wan2.5": 86.44,
    "GigaWorld-0": 85.83,
    "Veo 3.1": 83.50,
    "WoW-Wan 14B": 83.01,
    "Sora v2 Pro": 76.26,
    "Abot-PhysWorld": 93.06,
    "Wan2.2-I2V-A14B": 81.70,
    "Wan2.2-I2V-A14B (ft)": 84.42,
    "PF-Wan": 88.20,
    "Cosmos3-Nano (ft)": 91.54,
    "PF-Cosmos": 93.26,
}


@dataclass
class PaiBenchConfig(VqaConfig):
    domain: str = "robot"  # one of DOMAINS; empty: all


class PaiBench(Vqa):
    name = "pai_bench"
    published = tuple(
        Published(model, {"domain": value / 100}, "PhysisForcing, Table 7 (robot domain, Qwen3-VL-235B as judge)")
        for model, value in _TABLE_7.items()
    )
    settings: PaiBenchConfig

    def requirements(self) -> list[Requirement]:
        folder = self.settings.folder
        return [
            Requirement(
                "the data of PAI-Bench-G (prompts, first frames, questions)",
                "CC BY-NC 4.0",
                f"run.pai_bench.folder={folder}",
                bool(folder) and self._file().is_file(),
                REMEDY,
            ),
            judge_requirement(self.vlm, "Qwen2.5-VL-72B-Instruct"),
        ]

    def prompts(self) -> list[Task]:
        """Tasks of the domain, in the file's order. Raises ValueError for missing or bad files."""
        domain, file = self.settings.domain, self._file()
        if domain not in (*DOMAINS, ""):
            raise ValueError(f"run.pai_bench.domain={domain!r} is no domain: use one of {', '.join(DOMAINS)}, or none")
        if not self.settings.folder:
            raise ValueError(f"run.pai_bench.folder is empty: {REMEDY}")
        records = read_records(file, ("video_id", "prompt_en", "image_name"), REMEDY)
        chosen = [record for record in records if not domain or _domain(record["video_id"], file) == domain]
        if not chosen:
            raise ValueError(f"{file} has no prompt of the domain {domain!r}: {REMEDY}")
        keys = make_keys([record["video_id"] for record in chosen], str(file))
        return [self._task(key, record) for key, record in zip(keys, chosen, strict=True)]

    def _task(self, key: str, record: dict[str, str]) -> Task:
        name = record["video_id"]
        file = self._file().parent / "vqa" / f"{name}.json"
        questions = read_questions(read_records(file, (), REMEDY), str(file))
        image = file.parent.parent / "condition_image" / record["image_name"]
        if not image.is_file():
            raise ValueError(f"{image}, the first frame of {name}, is not there: {REMEDY}")
        facts = {"video_id": name, "questions": questions}
        return Task(key, record["prompt_en"].strip(), _domain(name, file), image, facts)

    def layout(self, samples: Sequence[Sample], folder: Path) -> Path:
        """<video_id>__<number>.mp4, a prompt's seeds numbered from 0: the official code looks for 0 to 4 only."""
        seeds = defaultdict(set)
        for sample in samples:
            seeds[sample.task.key].add(sample.seed)
        for sample in samples:
            if sample.path.is_file():
                number = sorted(seeds[sample.task.key]).index(sample.seed)
                place(sample.path, folder / f"{sample.task.facts['video_id']}__{number}.mp4")
        return folder

    def _file(self) -> Path:
        return Path(self.settings.folder).expanduser() / FILE


def _domain(video_id: str, file: Path) -> str:
    for domain in DOMAINS:
        if video_id.startswith(f"{domain}_"):
            return domain
    raise ValueError(f"{file}: {video_id!r} begins with no domain ({', '.join(DOMAINS)}): {REMEDY}")
