"""PhyGenBench (Meng et al., 2024, arXiv 2410.05363): 160 prompts on 27 physical laws, in three stages (PhyGenEval).

    recipe key              run.phygenbench.<field>, see DataConfig
    data                    a clone of OpenGVLab/PhyGenBench: prompts and questions (PhyGenBench/*.json) and the wording
                            of stages 2 and 3 (PhyGenEval/multi/GPT4o.py, PhyGenEval/video/GPT4o.py), read from there

Each stage gives 0 to 3; all line references are to files of that clone.

1. Key phenomena (PhyGenEval/single/vqascore.py), one or two statements. A statement about the last frame scores
   s(frame, statement). Another is looked for around a moment: of 32 frames evenly spaced, the one that shows the
   `Retrieval Prompt` best and two on either side; it scores the best of r + s / (s + a) over them, r, s and a being the
   scores of the retrieval prompt, the statement and its antonym. Two statements: their sum, cut at 1, 1.5 and 2.25. One
   statement: its score less the r of the last frame looked at, cut at 0.25, 0.5 and 0.75 (PhyGenEval/overall.py).
2. Their order (PhyGenEval/multi/GPT4o.py), three yes-or-no questions: does a description fit the first and the middle
   frame, another one the middle and the last, the explicit prompt all three. Where the middle is retrieved, one frame
   on either side is looked at too, and a question counts where the best of r + answer is 1.5 or more.
3. Naturalness (PhyGenEval/video/GPT4o.py): which of four descriptions, from completely fantastical (0) to almost
   realistic (3), fits up to 26 frames.

A clip's score is the rounded mean of the three; `average` and the categories are its means divided by 3. mechanics,
optics, thermal and material are the main categories Force, Light, Heat and both kinds of Properties.

The official code makes all of that twice, with GPT-4o ("closed") and with LLaVA-Interleave and InternVideo2 ("open"),
and its README and PhyGDPO print the half of both, rounded down. Here one judge makes the closed half only: compare with
published figures by rank at best.

Deviations: s, r and a are the judge's P(yes) / (P(yes) + P(no)) where the official code has the P(yes) of
CLIP-FlanT5-XXL (VQAScore), in a question of our own wording; the frame of a moment is the one of the highest r, there
of the highest CLIP similarity. Stage 3 is given the third and the fourth description as video_question.json numbers
them (as InternVideo_physical.py does; GPT4o.py asks for a fourth and a fifth, which are not there). Frames stand before
the words, are at most `judge.frame_height` pixels high, and are always asked about at `judge.temperature`. An answer
that is none is an error here; the official code leaves an earlier value in its place. `judge.frames` plays no part.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from eval.benchmarks.base import Requirement, Row, Sample, Task, read_published
from eval.benchmarks.official_files import place_all, read_records
from eval.benchmarks.official_prompts import prompts
from eval.benchmarks.vlm_rows import AskedBenchmark, ask, judge_requirement, judge_rows, read_object
from eval.prompts import make_key
from eval.vlm.backend import Malformed, Question, Reply
from eval.vlm.client import NoAnswer, Vlm, jpeg_frames, quoted

CATEGORIES = {
    "Force": "mechanics",
    "Light": "optics",
    "Heat": "thermal",
    "Physical Properties": "material",
    "Chemical Properties": "material",
}
DATA = "PhyGenBench"
ORDER, NATURALNESS = "PhyGenEval/multi/GPT4o.py", "PhyGenEval/video/GPT4o.py"
REMEDY = "clone https://github.com/OpenGVLab/PhyGenBench and name the clone in run.phygenbench.folder"
LAST, MIDDLE = "Last Frame", "Middle Frame"  # in place of a retrieval prompt
SAMPLED = 32  # frames among which a moment is looked for
SPREAD = 26  # frames for stage 3
DESCRIPTIONS = ("Completely Fantastical", "Highly Unrealistic", "Slightly Unrealistic", "Almost Realistic")
RULES = "You write valid JSON and nothing else: double quotes, no code fence."
YES_NO_SCHEMA = {
    "type": "object",
    "properties": {"Choice": {"type": "string", "enum": ["Yes", "No"]}, "Reason": {"type": "string"}},
    "required": ["Choice", "Reason"],
    "additionalProperties": False,
}
CHOICE_SCHEMA = YES_NO_SCHEMA | {
    "properties": {"Choice": {"type": "string", "enum": list(DESCRIPTIONS)}, "Reason": {"type": "string"}}
}

_SCORED = ("mechanics", "optics", "thermal", "material")
STAGES = ("detection", "order", "naturalness")


@dataclass(frozen=True)
class Pictures:
    """JPEG frames of a clip."""

    sampled: list[bytes]
    first: bytes
    middle: bytes
    last: bytes
    spread: list[bytes]


class PhyGenBench(AskedBenchmark):
    name = "phygenbench"
    columns = ("average", *_SCORED, *STAGES)
    figures = columns
    published = read_published("phygenbench")

    def requirements(self) -> list[Requirement]:
        licence = "none is stated in the repository: ask its authors before passing it on"
        files = (f"{DATA}/prompts.json", ORDER)
        return [
            self.needs("folder", "PhyGenBench's prompts, questions and wording", licence, REMEDY, files),
            judge_requirement(self.vlm, "GPT-4o, version 0513"),
        ]

    def prompts(self) -> list[Task]:
        """The 160 prompts with their questions. Raises ValueError for files that are not there or do not agree."""
        data = self.path("folder", REMEDY) / DATA
        keys = {
            "prompts": ("caption", "physical_laws", "main_category"),
            "explicit_prompts": ("caption", "explicit_caption"),
            "single_question": ("caption", "singleimage_question"),
            "multi_question": ("caption", "multiimage_question"),
            "video_question": ("caption", "video_question"),
        }
        files = {name: data / f"{name}.json" for name in keys}
        columns = [read_records(path, keys[name], REMEDY) for name, path in files.items()]
        captions = [[record["caption"] for record in column] for column in columns]
        for path, column in zip(files.values(), captions, strict=True):
            if column != captions[0]:
                raise ValueError(f"{path} has not the captions of prompts.json in their order: {REMEDY}")
        return [self._task(index, records) for index, records in enumerate(zip(*columns, strict=True))]

    def _task(self, index: int, records: Sequence[dict[str, Any]]) -> Task:
        prompt, explicit, single, order, video = records
        statements = single["singleimage_question"]
        facts = {"number": index + 1, "caption": prompt["caption"], "law": prompt["physical_laws"]}
        try:
            facts["statements"] = [
                {"moment": one["Retrieval Prompt"], "statement": one["Statement"], "antonym": one["Antonym"]}
                for one in statements
            ]
            question = order["multiimage_question"]
            facts["moment"] = question["Retrieval Prompt"]
            facts["order"] = [question["Description1"], question["Description2"], explicit["explicit_caption"]]
            facts["descriptions"] = [video["video_question"][f"Description{number}"] for number in (1, 2, 3, 4)]
            category = CATEGORIES[prompt["main_category"]]
        except (KeyError, TypeError) as error:
            raise ValueError(f"prompt {index + 1} of {DATA} lacks or does not know {error}: {REMEDY}") from error
        if len(statements) not in (1, 2):
            raise ValueError(f"prompt {index + 1} of {DATA} has {len(statements)} statements, not one or two: {REMEDY}")
        return Task(make_key(index, prompt["caption"]), prompt["caption"], category, facts=facts)

    def layout(self, samples: Sequence[Sample], folder: Path) -> Path:
        """seed-<seed>/output_video_<number>.mp4, as README asks for a model's folder of PhyVideos."""
        return place_all(samples, folder, lambda one: f"seed-{one.seed}/output_video_{one.task.facts['number']}.mp4")

    def score(self, samples: Sequence[Sample], folder: Path) -> Iterator[Row]:
        wording = self._wording()

        async def judge(vlm: Vlm, sample: Sample, pictures: Pictures) -> dict[str, float]:
            task = sample.task
            levels = [
                await detection(vlm, task, pictures),
                await order(vlm, task, pictures, wording),
                await naturalness(vlm, task, pictures, wording),
            ]
            score = overall(*levels) / 3
            stages = {stage: level / 3 for stage, level in zip(STAGES, levels, strict=True)}
            return {"average": score, task.category: score} | stages

        return judge_rows(self.judge, samples, self.model_video, folder, self._pick, judge)

    def _wording(self) -> dict[str, Any]:
        """Official texts: of a question of stage 2, its ending, and both parts of stage 3."""
        two, three = (self.path("folder", REMEDY) / name for name in (ORDER, NATURALNESS))
        return {
            "question": prompts(two, "question1", REMEDY)[0],
            "ending": prompts(two, "pretrix", REMEDY)[0].fill({}),
            "task": prompts(three, "prompt", REMEDY)[0],
            "descriptions": prompts(three, "input_prompt", REMEDY)[0],
        }

    def _pick(self, task: Task, clip: Tensor) -> Pictures:
        sampled = np.linspace(0, len(clip) - 1, SAMPLED, dtype=int)
        seconds = len(clip) / self.model_video.fps / SPREAD
        step = max(1, int(self.model_video.fps * seconds))
        spread = list(range(0, len(clip) - 1, step))[:SPREAD] or [0]
        ends = [0, len(clip) // 2, len(clip) - 1]
        height = self.judge.frame_height
        frames = [jpeg_frames(clip[list(which)], len(which), height) for which in (sampled, ends, spread)]
        return Pictures(frames[0], *frames[1], frames[2])


async def shows(vlm: Vlm, picture: bytes, text: str) -> float:
    """How surely a picture shows a text, in [0, 1]."""
    try:
        return await vlm.yes_probability([picture], f"Does this figure show {quoted(text)}?")
    except NoAnswer as refusal:
        raise NoAnswer(refusal.reason, f"whether {text[:60]!r} is shown: {refusal.detail}", refusal.raw) from refusal


async def find(vlm: Vlm, pictures: Sequence[bytes], text: str) -> tuple[list[float], int]:
    """How surely each picture shows a moment, and the number of the first one that shows it best."""
    found = [await shows(vlm, picture, text) for picture in pictures]
    return found, found.index(max(found))


async def detection(vlm: Vlm, task: Task, pictures: Pictures) -> int:
    """Stage 1, 0 to 3."""
    statements = task.facts["statements"]
    total, last = 0.0, 0.0
    for one in statements:
        if one["moment"] == LAST:
            total += await shows(vlm, pictures.last, one["statement"])
            last = 0.0
            continue
        found, best = await find(vlm, pictures.sampled, one["moment"])
        scores = []
        for number in range(max(best - 2, 0), min(best + 3, len(found))):
            yes = await shows(vlm, pictures.sampled[number], one["statement"])
            no = await shows(vlm, pictures.sampled[number], one["antonym"])
            scores.append(found[number] + (yes / (yes + no) if yes + no else 0.0))
            last = found[number]
        total += max(scores)
    return level_of_one(total - last) if len(statements) == 1 else level_of_two(total)


def level_of_one(score: float) -> int:
    """0 to 3 of the score of a single statement, less its retrieval (overall.py)."""
    return sum(score >= least for least in (0.25, 0.5, 0.75))


def level_of_two(total: float) -> int:
    """0 to 3 of the sum of two statements' scores (vqascore.py)."""
    return sum(total > most for most in (1, 1.5, 2.25))


async def order(vlm: Vlm, task: Task, pictures: Pictures, wording: Mapping[str, Any]) -> int:
    """Stage 2, 0 to 3."""
    first, last = pictures.first, pictures.last

    async def fits(number: int, frames: Sequence[bytes]) -> bool:
        blanks = {"description1": task.facts["order"][number], "pretrix": wording["ending"]}
        question = Question(wording["question"].fill(blanks), RULES, tuple(frames), schema=YES_NO_SCHEMA)
        return await ask(vlm, f"order, question {number + 1}", question, yes)

    if task.facts["moment"] == MIDDLE:
        shown = ([first, pictures.middle], [pictures.middle, last], [first, pictures.middle, last])
        return sum([await fits(number, frames) for number, frames in enumerate(shown)])
    found, best = await find(vlm, pictures.sampled, task.facts["moment"])
    before = range(max(best - 1, 0), best + 1)
    after = range(best, min(best + 2, len(found)))
    scores = [
        max([found[one] + await fits(0, [first, pictures.sampled[one]]) for one in before]),
        max([found[one] + await fits(1, [pictures.sampled[one], last]) for one in after]),
    ]
    middle = [pictures.sampled[one] for one in (*before, *after)]  # the best one twice, as there
    scores.append(found[best] + await fits(2, [first, *middle, last]))
    return sum(score >= 1.5 for score in scores)


async def naturalness(vlm: Vlm, task: Task, pictures: Pictures, wording: Mapping[str, Any]) -> int:
    """Stage 3, 0 to 3."""
    names = [f"data_tmp['video_question']['Description{number}']" for number in (1, 2, 4, 5)]
    blanks = dict(zip(names, task.facts["descriptions"], strict=True))
    blanks |= {"data_tmp['caption']": task.facts["caption"], "data_tmp['physical_laws']": task.facts["law"]}
    text = wording["task"].fill({}) + wording["descriptions"].fill(blanks)
    question = Question(text, RULES, tuple(pictures.spread), schema=CHOICE_SCHEMA)
    return await ask(vlm, "naturalness", question, description)


def overall(detected: int, ordered: int, natural: int) -> int:
    """0 to 3 of the three stages (overall.py, vqascore_gpt_gpt_score)."""
    return round((detected + ordered + natural) / 3)


def choice(reply: Reply) -> str:
    """The field Choice of a JSON answer, which may stand in a code fence or have words around it."""
    said = read_object(reply).get("Choice")
    if not isinstance(said, str):
        raise Malformed(f"the answer is no JSON with a Choice ({said!r:.60})", reply.text)
    return said.lower()


def yes(reply: Reply) -> bool:
    """A no anywhere in the choice counts before a yes, as there."""
    said = choice(reply)
    if "no" not in said and "yes" not in said:
        raise Malformed(f"the choice is {said[:60]!r}, not yes or no", reply.text)
    return "no" not in said


def description(reply: Reply) -> int:
    """Number of the first description whose name stands in the choice."""
    said = choice(reply)
    for level, name in enumerate(DESCRIPTIONS):
        if name.lower() in said:
            return level
    raise Malformed(f"the choice is {said[:60]!r}, none of {', '.join(DESCRIPTIONS)}", reply.text)
