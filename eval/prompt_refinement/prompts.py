"""VLM-guided refinement of prompts (Bootstrapping Physics-Grounded Video Generation through VLM-Guided Iterative
Self-Refinement, section 2).

    prediction = VLM(knowledge, description, first frame)      prompt_1 = VLM(prediction)
    round n:     clip_n = generate(prompt_n)                   critique_n = VLM(clip_n)
                 prompt_n+1 = VLM(critique_n)                  until prompt_n+1 is close to prompt_n, or a limit

    <folder>/<key>/round-01.mp4     the clip
    <folder>/<key>/round-01.json    prompt, similarity to the one before, critique; round 1 also the prediction
    <folder>/<key>/choice.json      which round's clip is the result, why the rounds ended, the scorer's values

A round's JSON is written anew, whole, after each of its stages, so a run that was stopped continues at the stage where
it was; clips and answers that were made with other settings do not count. All prompts go through a stage together, so
that a server has many questions at once and the generator can batch. A model always sees the clip as read from its
file: a continued run asks the same question.

Deviations. The paper continues a video of three seconds; here a clip begins with one frame at most, for no backbone
here takes a longer prefix. One model sees, criticises and writes prompts, where the paper has a language model for the
last. Closeness is the cosine of two sentence embeddings (the text: "when the prompts converge").
A critique without violations ends the rounds too. The result is the last clip, as in the text, or the scorer's choice
among all rounds (section 3, "ensemble").

Answers are data: no part of a path (keys come from `eval.prompts`), never executed, limited in length. A question
without a usable answer ends its prompt's rounds, is named in the round's `failure`, and is asked again in the next run.
"""

import asyncio
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from eval.prompt_refinement import questions
from eval.prompts import Prompt, slug
from eval.search.searcher import batches
from eval.vlm.backend import SEED, TEMPERATURE, Question, VlmConfig
from eval.vlm.client import NoAnswer, Vlm, jpeg_frames, read_answer
from train.clips import VideoConfig, read_clip, write_clip
from train.files import digest, sha256, write_text

ENCODER = "sentence-transformers/all-MiniLM-L6-v2"  # compares prompts
SAME = 0.95  # cosine from which a new prompt counts as the one before
STAGES = ("predict", "rewrite", "clip", "critique")  # of a round, in order

Generate = Callable[[list[Prompt]], Tensor]  # one clip each: (N,T,H,W,3) uint8
ClipScorer = Callable[[str, Tensor], Tensor]  # description, clips (R,T,H,W,3) uint8 -> (R,), lower is better


@dataclass
class PromptRefineConfig:
    rounds: int = 4  # clips per prompt, at most
    batch_size: int = 8  # clips asked of the generator together

    def __post_init__(self) -> None:
        if self.rounds < 1:
            raise ValueError(f"rounds={self.rounds} must be 1 or more")


@dataclass
class Round:
    """What is known of one round; a stage that is still to come has left its fields empty."""

    number: int  # from 1
    prediction: str = ""  # round 1
    prompt: str = ""
    similarity: float | None = None  # of the prompt to that of the round before
    clip_bytes: int = 0  # size of the clip's file; 0: none yet
    violations: list[dict[str, str]] | None = None  # of the clip: law, seen
    description: str = ""  # the clip as it should have been
    failure: str = ""  # why the last question got no answer, and the beginning of what came instead


@dataclass
class Refinement:
    """One prompt's rounds, and how they ended: converged | no violations | limit | failed."""

    prompt: Prompt
    folder: Path
    rounds: list[Round]
    ended: str = ""
    values: list[float] = field(default_factory=list)  # the scorer's, one a clip
    chosen: int | None = None  # number of the round whose clip is the result; None: there is no clip

    def clip(self, number: int) -> Path:
        return self.folder / f"round-{number:02d}.mp4"

    @property
    def clips(self) -> list[int]:
        """Numbers of the rounds with a clip."""
        return [one.number for one in self.rounds if one.clip_bytes]


class PromptRefiner:
    """Refines prompts into `folder`.

    generate: makes one clip per prompt, best with the same noise in every round. made_with: whatever else the clips
    depend on (model, sampler, seed), in words; clips of other settings are made anew. ValueError for settings that
    cannot work.
    """

    def __init__(
        self,
        config: PromptRefineConfig,
        vlm: VlmConfig,
        video: VideoConfig,
        folder: Path,
        generate: Generate,
        *,
        made_with: str,
    ):
        self.config, self.video, self.folder = config, video, Path(folder)
        self.generate, self.made_with = generate, made_with
        self.vlm = Vlm(vlm)
        self._all: list[Refinement] = []

    def run(self, prompts: Sequence[Prompt], scorer: ClipScorer | None = None) -> list[Refinement]:
        """All prompts, in order. scorer: chooses among a prompt's clips; None: the last clip.

        Raises VlmUnavailable, a ValueError, where a model as a whole does not answer; running again continues.
        """
        self._all = found = [self._load(prompt) for prompt in prompts]
        while waiting := [(one, stage) for one in found if (stage := self._stage(one)) in STAGES]:
            first = min((stage for _, stage in waiting), key=STAGES.index)
            chosen = [one for one, stage in waiting if stage == first]
            if first == "clip":
                self._clip(chosen)
            else:
                self._ask(first, chosen)
        for one in found:
            one.ended = self._stage(one)
            self._choose(one, scorer)
        return found

    # What is next

    def _stage(self, one: Refinement) -> str:
        """The stage that a prompt waits for, or how it ended; opens the next round where one is over."""
        last = one.rounds[-1]
        if last.failure:
            return "failed"
        if last.number == 1 and not last.prediction:
            return "predict"
        if not last.prompt:
            return "rewrite"
        if last.similarity is not None and last.similarity >= SAME:
            return "converged"
        if not last.clip_bytes:
            return "clip"
        if last.violations is None:
            return "critique"
        if not last.violations:
            return "no violations"
        if last.number >= self.config.rounds:
            return "limit"
        one.rounds.append(Round(last.number + 1))
        return "rewrite"

    # The stages

    def _clip(self, waiting: list[Refinement]) -> None:
        """Clips that are made together change each other by rounding, so batches are formed by place among all prompts,
        and those of a round are made as a whole: a run that was stopped makes the clips that it would have made."""
        for everyone in batches(self._all, self.config.batch_size):
            missing = [one for one in everyone if one in waiting]
            for number in sorted({one.rounds[-1].number for one in missing}):
                part = [one for one in everyone if number in one.clips or one in missing and len(one.rounds) == number]
                told = [one.rounds[number - 1] for one in part]
                clips = self.generate(
                    [replace(one.prompt, text=now.prompt) for one, now in zip(part, told, strict=True)]
                )
                for one, now, frames in zip(part, told, clips, strict=True):
                    if not now.clip_bytes:
                        write_clip(one.clip(number), frames, self.video.fps)
                        now.clip_bytes = one.clip(number).stat().st_size
                        self._save(one)

    def _ask(self, stage: str, waiting: list[Refinement]) -> None:
        """Keep each one's answer, whose fields are those of a round, or why there is none, and write the round."""

        async def ask(one: Refinement) -> dict[str, Any]:
            question = await asyncio.to_thread(self._question, stage, one)  # it may decode frames
            return await self.vlm.ask(question, lambda reply: read_answer(reply, questions.ANSWERS[stage]).model_dump())

        for one, answer in zip(waiting, self.vlm.run(ask, waiting), strict=True):
            last = one.rounds[-1]
            if isinstance(answer, NoAnswer):
                last.failure = f"{answer}" + (f"; it wrote: {answer.raw}" if answer.raw else "")
            else:
                vars(last).update(answer)
                if stage == "rewrite" and last.number > 1:
                    last.similarity = similarity(one.rounds[-2].prompt, last.prompt)
            self._save(one)

    def _question(self, stage: str, one: Refinement) -> Question:
        text, image, last = one.prompt.text, one.prompt.image, one.rounds[-1]
        count, height = self.vlm.config.frames, self.vlm.config.frame_height
        if stage == "predict":
            first = jpeg_frames(read_clip(image, replace(self.video, num_frames=1)), 1, height) if image else []
            return questions.build(stage, {"Description": text}, first)
        if stage == "critique":
            frames = jpeg_frames(read_clip(one.clip(last.number), self.video), count, height)
            return questions.build(stage, {"Description": text, "Prompt": last.prompt}, frames)
        if last.number == 1:
            return questions.build(stage, {"Description": text, "Notes": last.prediction})
        before = one.rounds[-2]
        wrong = "; ".join(f"{one['law']}: {one['seen']}" for one in before.violations)
        given = {"Description": text, "Notes": before.description}
        return questions.build(stage, given | {"Last prompt": before.prompt, "What its video got wrong": wrong})

    # On disk

    def _digest(self, one: Refinement, number: int) -> str:
        """Of all that a round depends on: the settings, apart from when rounds end, and the round before."""
        vlm, prompt = self.vlm.config, one.prompt
        models = [[vlm.model, vlm.frames, vlm.frame_height, TEMPERATURE, SEED], ["", 8, 360, 0.0, 0]]
        image = sha256(prompt.image) if prompt.image else ""
        rules = [questions.PREDICT, questions.CRITIQUE, questions.REWRITE]
        settings = [prompt.text, image, models, ENCODER, questions.PROMPT_CHARS, rules]
        settings += [self.made_with, asdict(self.video), [asdict(before) for before in one.rounds[: number - 1][-1:]]]
        return digest(settings)

    def _load(self, prompt: Prompt) -> Refinement:
        """What is finished: rounds up to the first that is missing, damaged, of other settings, or lacks its clip."""
        if not prompt.key or slug(prompt.key) != prompt.key:
            raise ValueError(f"key {prompt.key!r} is to name a folder: use a-z, 0-9 and single hyphens")
        one = Refinement(prompt, self.folder / prompt.key, [])
        for number in range(1, self.config.rounds + 1):
            try:
                record = json.loads(one.clip(number).with_suffix(".json").read_text(encoding="utf-8"))
                if record.pop("digest") != self._digest(one, number):
                    break
                last = Round(**record)
            except (OSError, ValueError, KeyError, TypeError, AttributeError):
                break
            last.failure = ""  # to be asked again
            clip = one.clip(number)
            if not clip.is_file() or clip.stat().st_size != last.clip_bytes:
                last.clip_bytes, last.violations, last.description = 0, None, ""
            one.rounds.append(last)
            if not last.violations:
                break
        if not one.rounds:
            one.rounds.append(Round(1))
        return one

    def _save(self, one: Refinement) -> None:
        last = one.rounds[-1]
        record = {"digest": self._digest(one, last.number)} | asdict(last)
        _write_json(one.clip(last.number).with_suffix(".json"), record)

    def _choose(self, one: Refinement, scorer: ClipScorer | None) -> None:
        if one.clips:
            one.chosen = one.clips[-1]
            if scorer is not None:
                clips = torch.stack([read_clip(one.clip(number), self.video) for number in one.clips])
                values = torch.as_tensor(scorer(one.prompt.text, clips)).float().cpu()
                if values.shape != (len(clips),) or values.isnan().any():
                    raise ValueError(f"the scorer gave {values.tolist()} for {len(clips)} clips: give one number each")
                one.values = values.tolist()
                one.chosen = one.clips[int(values.argmin())]
        choice = {"prompt": one.prompt.text, "ended": one.ended, "clips": one.clips, "chosen": one.chosen}
        choice |= {"values": [value if np.isfinite(value) else str(value) for value in one.values]}
        _write_json(one.folder / "choice.json", choice)


def similarity(before: str, after: str) -> float:
    """Cosine of two prompts' embeddings; 1 for equal prompts, whatever the encoder."""
    if before == after:
        return 1.0
    vectors = np.asarray(load_encoder()([before, after]), dtype=np.float64)
    return float(vectors[0] @ vectors[1] / np.linalg.norm(vectors, axis=1).prod())


@cache
def load_encoder() -> Callable[[list[str]], np.ndarray]:
    """N texts -> (N, D), by ENCODER; safetensors only, no code of its own. ValueError where it cannot be loaded."""
    from safetensors import SafetensorError
    from sentence_transformers import SentenceTransformer

    try:
        model = SentenceTransformer(ENCODER, trust_remote_code=False, model_kwargs={"use_safetensors": True})
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise ValueError(
            f"{ENCODER}, which compares prompts, cannot be loaded ({error}): get it once with hf download {ENCODER}"
        ) from error
    return lambda texts: model.encode(texts, show_progress_bar=False, convert_to_numpy=True)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    write_text(path, json.dumps(content, ensure_ascii=False, indent=1, allow_nan=False))
