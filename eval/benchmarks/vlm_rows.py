"""Rows out of questions to a vision-language model: what the benchmarks have in common whose judge is one.

A benchmark says which pictures of a clip the model sees (`pick`) and what it is asked (`judge`); reading, asking many
clips at a time, keeping the answers and naming what went wrong is done here. A clip with a question that got no answer
has no row of its own but an error: never a zero, which official code often counts instead.
"""

import asyncio
import dataclasses
import json
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from torch import Tensor

from eval.benchmarks.base import Benchmark, Requirement, Row, Sample, Task
from eval.vlm.backend import Malformed, Question, Reply, VlmConfig, recorded
from eval.vlm.client import NoAnswer, Vlm
from recipes import redacted
from train.clips import ClipError, VideoConfig, read_clip

AT_ONCE = 64  # clips between two looks of the caller; their rows are kept before the next ones are asked about

T = TypeVar("T")
Pick = Callable[[Task, Tensor], Any]  # of a clip (T, H, W, 3) uint8, in a thread
JudgeClip = Callable[[Vlm, Sample, Any], Awaitable[Mapping[str, float]]]  # of what `pick` gave


def judge_rows(
    config: VlmConfig, samples: Sequence[Sample], video: VideoConfig, folder: Path, pick: Pick, judge: JudgeClip
) -> Iterator[Row]:
    """One row per sample, in order. Answers are kept below `folder`, unless the settings name another cache.

    Raises ValueError for settings that cannot work and VlmUnavailable, one too, when nothing can be answered.
    """
    vlm = Vlm(dataclasses.replace(config, cache=config.cache or str(folder / "answers")))

    async def row(sample: Sample) -> Row:
        try:
            picked = await asyncio.to_thread(lambda: pick(sample.task, read_clip(sample.path, video)))
            return Row.of(sample, await judge(vlm, sample, picked))
        except ClipError as error:
            return Row.of(sample, error=str(error))
        except NoAnswer as refusal:
            return Row.of(sample, error=f"{sample.path}: {refusal}")

    for start in range(0, len(samples), AT_ONCE):
        yield from vlm.run(row, samples[start : start + AT_ONCE])


async def ask(vlm: Vlm, name: str, question: Question, check: Callable[[Reply], T]) -> T:
    """`vlm.ask` with the question's name in its NoAnswer."""
    try:
        return await vlm.ask(question, check)
    except NoAnswer as refusal:
        raise NoAnswer(refusal.reason, f"{name}: {refusal.detail}", refusal.raw) from refusal


def read_object(reply: Reply) -> dict[str, Any]:
    """The JSON object of an answer, from its first brace to its last; Malformed where there is none."""
    text = reply.text
    try:
        found = json.loads(text[text.index("{") : text.rindex("}") + 1])
    except (ValueError, RecursionError) as error:
        raise Malformed(f"the answer is no JSON ({error})", text) from error
    if not isinstance(found, dict):
        raise Malformed("the answer is no JSON object", text)
    return found


class AskedBenchmark(Benchmark):
    """A benchmark whose judge is the model of the section `vlm`."""

    frame_height: ClassVar[int | None] = 576  # pixels of what the judge sees at most; None: vlm.frame_height

    @property
    def judge(self) -> VlmConfig:
        height = self.vlm.frame_height if self.frame_height is None else self.frame_height
        return dataclasses.replace(self.vlm, frame_height=height)

    @property
    def recorded(self) -> dict[str, Any]:
        return super().recorded | {"judge": recorded(self.judge)}


def judge_requirement(config: VlmConfig, official: str) -> Requirement:
    """The judge in requirements(); official: the model that the official protocol asks."""
    named = bool(config.model and (config.base_url or config.backend != "openai"))
    return Requirement(
        f"a vision-language model as judge (officially {official})",
        "the model's own",
        redacted(f"vlm.model={config.model}, vlm.base_url={config.base_url}"),
        named,
        "serve one (vllm serve MODEL) and name it in vlm.model and its address in vlm.base_url",
    )
