"""Yes-or-no questions about a clip, from the benchmark's own files: the Domain Score of PAI-Bench-G and of EZS-Bench.

As SHI-Labs/physical-ai-bench, predict/pbench/vqa_evaluation.py, has it; EZS-Bench of amap-cvlab/ABot-PhysWorld bundles
that file:
- Every question is asked alone, about the whole clip, at temperature 0. Its answer is right if it has "yes" and not
  "no", or the other way round, as letters anywhere in it, and that is what the record's index2ans[answer] says.
- A clip's score is the share of its questions answered right. Its mean over the seeds of a prompt, then over prompts,
  is the category's score: with as many seeds a prompt, the mean over clips.
- The clip is sampled at 2 frames a second (EZS-Bench: 3), evenly, an even number and at least 4, as qwen_vl_utils does.

Deviations: an answer that has both words or neither counts as wrong there and has no row here, after asking again; the
question's wording is ours; frames come as pictures, unless `judge.send=video`, and at most 576 pixels high (there 768
patches of 28x28, which is 480x832 and 576x1024 unscaled). The judge is whatever model serves, there Qwen2.5-VL-72B.
PhysisForcing asks Qwen3-VL-235B-A22B for PAI-Bench and Qwen2.5-VL-72B for EZS-Bench: compare with figures of the same
judge only.

The Quality Score of both is the mean of eight dimensions of PAI-Bench's own VBench (aesthetic, imaging, motion
smoothness, subject, background, overall consistency, i2v subject, i2v background). It is not computed here, and so
neither is the average of the two: the laid-out clips are what the official evaluate.py wants.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from eval.benchmarks.base import Row, Sample, Task
from eval.benchmarks.vlm_rows import AskedBenchmark, ask, judge_rows
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


@dataclass
class VqaConfig:
    folder: str = ""  # of the benchmark's data
    frame_rate: float = 2.0  # frames a second that the judge sees; judge.frames plays no part


class Vqa(AskedBenchmark):
    """A benchmark of yes-or-no questions: a subclass reads prompts with the fact `questions`, see `read_questions`."""

    columns = ("domain",)
    figures = ("domain",)

    def score(self, samples: Sequence[Sample], folder: Path) -> Iterator[Row]:
        """`domain`, the share of a clip's questions that the judge answered as the benchmark expects."""
        if not self.settings.frame_rate > 0:
            raise ValueError(f"run.{self.name}.frame_rate={self.settings.frame_rate} must be above 0")
        return judge_rows(self.judge, samples, self.model_video, folder, self._pick, answer_questions)

    def _pick(self, task: Task, clip: Tensor) -> list[bytes]:
        count = frame_count(len(clip), self.model_video.fps, self.settings.frame_rate)
        return jpeg_frames(clip, count, self.judge.frame_height)


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
