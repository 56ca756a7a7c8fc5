"""Yes-or-no questions about a clip, from the benchmark's own files: the Domain Score of PAI-Bench-G and of EZS-Bench.

PAI-Bench-G (Zhou et al., 2025), its robot domain: image to video.

    recipe key              run.pai_bench.<field>, see DataConfig
    data                    the data set shi-labs/physical-ai-bench-predict (now also -generation):
                            cosmos_predict2_bench_full_info.json, condition_image/, vqa/<video_id>.json

A prompt is a record of the JSON (video_id, prompt_en, image_name); its domain is how the video_id begins, as in
predict/pbench/vqa_evaluation.py of SHI-Labs/physical-ai-bench. PhysisForcing, Appendix B: 174 prompts of the domain
robot, 5 or 6 questions each.

EZS-Bench (ABot-PhysWorld, Chen et al., 2026, arXiv 2603.23376): robots that no training set shows, image to video.

    recipe key              run.ezs_bench.<field>, see DataConfig
    data                    the ModelScope data set amap_cvlab/EZS-Bench_data: data.jsonl and the first frames

A line of data.jsonl holds `video` (the first frame; its stem is the video_id), `prompt` and `question`, a list
(EZS-Bench/README.md of amap-cvlab/ABot-PhysWorld); 196 of them. A first frame is looked for at its path, in the data's
folder, and below it by name. The Domain Score is what evaluate_ezsbench.py prints as Robot Score.

Scoring of both:

As SHI-Labs/physical-ai-bench, predict/pbench/vqa_evaluation.py, has it; EZS-Bench of amap-cvlab/ABot-PhysWorld bundles
that file:
- Every question is asked alone, about the whole clip, at temperature 0. Its answer is right if it has "yes" and not
  "no", or the other way round, as letters anywhere in it, and that is what the record's index2ans[answer] says.
- A clip's score is the share of its questions answered right. Its mean over the seeds of a prompt, then over prompts,
  is the category's score: with equally many seeds for each prompt, the mean over clips.
- The clip is sampled at 2 frames a second (EZS-Bench: 3), evenly, an even number and at least 4, as qwen_vl_utils does.

Deviations: an answer that has both words or neither counts as wrong there and has no row here, after asking again; the
question's wording is ours; frames come as pictures, unless `vlm.send=video`, and at most 576 pixels high (there 768
patches of 28x28, which is 480x832 and 576x1024 unscaled). The judge is whatever model serves, there Qwen2.5-VL-72B.
PhysisForcing asks Qwen3-VL-235B-A22B for PAI-Bench and Qwen2.5-VL-72B for EZS-Bench: compare with figures of the same
judge only.

The Quality Score of both is the mean of eight dimensions of PAI-Bench's own VBench (aesthetic, imaging, motion
smoothness, subject, background, overall consistency, i2v subject, i2v background). It is not computed here, and so
neither is the average of the two: the laid-out clips are what the official evaluate.py reads.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from eval.benchmarks.base import Requirement, Row, Sample, Task, read_published
from eval.benchmarks.official_files import place_all, read_records
from eval.benchmarks.vlm_rows import AskedBenchmark, ask, judge_requirement, judge_rows
from eval.prompts import slug
from eval.vlm.backend import Malformed, Question, Reply
from eval.vlm.client import Vlm, jpeg_frames

ANSWERS = ("yes", "no")
LEAST_FRAMES = 4
RULES = "You answer questions about videos. Say YES or NO and nothing else."
TEXT = (
    "These are frames of one video, in order. Look at all of them to see what happens in it, then answer this question"
    " about the video.\nQuestion: {question}\nAnswer with YES or NO."
)
DOMAIN = "robot"  # of PAI-Bench


class Vqa(AskedBenchmark):
    """A benchmark of yes-or-no questions: a subclass reads prompts with the fact `questions`, see `read_questions`."""

    columns = ("domain",)
    figures = ("domain",)
    frame_rate: ClassVar[float]  # frames a second that the judge sees; vlm.frames plays no part
    title: ClassVar[str]
    licence: ClassVar[str]  # of the data
    file: ClassVar[str]  # with the prompts, in the folder of the data
    remedy: ClassVar[str]  # where the data is got

    @property
    def recorded(self) -> dict[str, Any]:
        return super().recorded | {"frame_rate": self.frame_rate}

    def requirements(self) -> list[Requirement]:
        what = f"the data of {self.title} (prompts, first frames, questions)"
        return [
            self.needs("folder", what, self.licence, self.remedy, (self.file,)),
            judge_requirement(self.vlm, "Qwen2.5-VL-72B-Instruct"),
        ]

    def _file(self) -> Path:
        return self.path("folder", self.remedy) / self.file

    def score(self, samples: Sequence[Sample], folder: Path) -> Iterator[Row]:
        """`domain`, the share of a clip's questions that the judge answered as the benchmark expects."""
        return judge_rows(self.judge, samples, self.model_video, folder, self._pick, answer_questions)

    def _pick(self, task: Task, clip: Tensor) -> list[bytes]:
        count = frame_count(len(clip), self.model_video.fps, self.frame_rate)
        return jpeg_frames(clip, count, self.judge.frame_height)


class PaiBench(Vqa):
    name, title, licence, frame_rate = "pai_bench", "PAI-Bench-G", "CC BY-NC 4.0", 2.0
    published = read_published("pai_bench")
    file = "cosmos_predict2_bench_full_info.json"
    remedy = (
        "get it with 'hf download shi-labs/physical-ai-bench-predict --repo-type dataset' and name its folder in"
        " run.pai_bench.folder"
    )

    @property
    def recorded(self) -> dict[str, Any]:
        return super().recorded | {"domain": DOMAIN}  # had a key of its own

    def prompts(self) -> list[Task]:
        """Tasks of the domain, in the file's order. Raises ValueError for missing or bad files."""
        file = self._file()
        records = read_records(file, ("video_id", "prompt_en", "image_name"), self.remedy)
        chosen = [record for record in records if record["video_id"].startswith(f"{DOMAIN}_")]
        if not chosen:
            raise ValueError(f"{file} has no prompt of the domain {DOMAIN!r}: {self.remedy}")
        keys = make_keys([record["video_id"] for record in chosen], str(file))
        return [self._task(key, record) for key, record in zip(keys, chosen, strict=True)]

    def _task(self, key: str, record: dict[str, str]) -> Task:
        name = record["video_id"]
        file = self._file().parent / "vqa" / f"{name}.json"
        questions = read_questions(read_records(file, (), self.remedy), str(file))
        image = file.parent.parent / "condition_image" / record["image_name"]
        if not image.is_file():
            raise ValueError(f"{image}, the first frame of {name}, is not there: {self.remedy}")
        facts = {"video_id": name, "questions": questions}
        return Task(key, record["prompt_en"].strip(), DOMAIN, image, facts)

    def layout(self, samples: Sequence[Sample], folder: Path) -> Path:
        """<video_id>__<number>.mp4, a prompt's seeds numbered from 0: the official code looks for 0 to 4 only."""
        seeds = defaultdict(set)
        for sample in samples:
            seeds[sample.task.key].add(sample.seed)
        return place_all(
            samples,
            folder,
            lambda one: f"{one.task.facts['video_id']}__{sorted(seeds[one.task.key]).index(one.seed)}.mp4",
        )


class EzsBench(Vqa):
    name, title, frame_rate = "ezs_bench", "EZS-Bench", 3.0
    licence = "MIT (the repository's; the data set's card may differ)"
    published = read_published("ezs_bench")
    file = "data.jsonl"
    remedy = (
        "get it with 'git clone https://www.modelscope.cn/datasets/amap_cvlab/EZS-Bench_data.git' (git lfs) and name"
        " its folder in run.ezs_bench.folder"
    )

    def prompts(self) -> list[Task]:
        """One task per line. Raises ValueError for missing or bad files."""
        file = self._file()
        records = read_records(file, ("video", "prompt", "question"), self.remedy)
        names = [Path(record["video"]).stem for record in records]
        tasks = []
        for key, name, record in zip(make_keys(names, str(file)), names, records, strict=True):
            facts = {"video_id": name, "questions": read_questions(record["question"], f"{file}, {name}")}
            tasks.append(Task(key, record["prompt"].strip(), "robot", self._image(record["video"]), facts))
        if not tasks:
            raise ValueError(f"{file} holds no prompts: {self.remedy}")
        return tasks

    def _image(self, path: str) -> Path:
        folder = self._file().parent
        for candidate in (folder / path, *sorted(folder.rglob(Path(path).name))):
            if candidate.is_file():
                return candidate
        raise ValueError(f"{folder} holds no {Path(path).name}, a first frame: {self.remedy}")

    def layout(self, samples: Sequence[Sample], folder: Path) -> Path:
        """seed-<seed>/<video_id>.mp4: to the official code, which knows one clip per prompt, each seed is a method."""
        return place_all(samples, folder, lambda one: f"seed-{one.seed}/{one.task.facts['video_id']}.mp4")


async def answer_questions(vlm: Vlm, sample: Sample, frames: list[bytes]) -> dict[str, float]:
    questions = sample.task.facts["questions"]
    right = 0
    for one in questions:
        question = Question(TEXT.format(question=one["question"]), RULES, tuple(frames))
        right += await ask(vlm, f"question {one['uid']}", question, yes_or_no) == one["expected"]
    return {"domain": right / len(questions)}


def yes_or_no(reply: Reply) -> str:
    """Which of the two an answer says; Malformed for both or neither."""
    said = [word for word in ANSWERS if word in reply.text.lower()]
    if len(said) != 1:
        raise Malformed(
            f"the answer says {' and '.join(said) or 'neither yes nor no'}: {reply.text[:60]!r}", reply.text
        )
    return said[0]


def frame_count(num_frames: int, fps: float, rate: float) -> int:
    """Frames of a clip at `rate` a second: even, 4 or more where the clip has them."""
    return max(min(LEAST_FRAMES, num_frames), 2 * int(min(num_frames / fps * rate, num_frames) / 2))


def read_questions(records: Any, place: str) -> list[dict[str, str]]:
    """uid, question and the expected yes or no of a clip's records; ValueError for what is no such question."""
    if not isinstance(records, list) or not records:
        raise ValueError(f"{place} has no list of questions; get the benchmark's files again")
    return [_read_question(record, f"{place}, question {number}") for number, record in enumerate(records, start=1)]


def _read_question(record: Any, place: str) -> dict[str, str]:
    try:
        uid, text = str(record["uid"]), record["question"].strip()
        expected = record["index2ans"][record["answer"]].strip().lower()
    except (TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{place} has not uid, question, index2ans and an answer out of it ({error!r})") from error
    if not text or expected not in ANSWERS:
        raise ValueError(f"{place} expects {expected!r} of {text!r}, not yes or no")
    return {"uid": uid, "question": text, "expected": expected}


def make_keys(names: Sequence[str], place: str) -> list[str]:
    """Keys out of the clips' names; ValueError where two make the same one, or a name none."""
    keys = [slug(name) for name in names]
    if "" in keys or len(set(keys)) != len(keys):
        doubled = next(name for name, key in zip(names, keys, strict=True) if not key or keys.count(key) > 1)
        raise ValueError(f"{place}: {doubled!r} is there twice, or has no letter or digit; names must tell clips apart")
    return keys
