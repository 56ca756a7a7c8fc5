"""What every judge gives back: `Scores` of all clips, or `Unjudged`, which names the clips that have none.

A judge never invents a score. When some clips cannot be judged (a caption that the judge cannot take, an answer that is
no score), it raises `Unjudged` with the reasons and with the scores of the others, so that nothing that was computed is
lost. A caller that does not know about it stops; one that does drops the named clips and goes on:

    try:
        scores, judged = judge(clips, prompts), range(len(clips))
    except Unjudged as refusal:
        scores, judged = refusal.scores, refusal.judged    # refusal.failures: clip -> reason

What concerns all clips (a tool that crashes, a server that is down) is another error, and no scores come with it.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

P = TypeVar("P")

SHOWN = 5  # failures spelled out in a message


@dataclass
class Scores:
    """Scores of N clips, float32, on the CPU; never NaN."""

    semantic: Tensor  # (N,) in [0, 1], semantic adherence: does the clip show its prompt
    physical: Tensor  # (N,) in [0, 1], physical commonsense: does it obey physical laws


@dataclass
class MeasuredScores(Scores):
    """Of a judge that measures pixels."""

    errors: dict[str, Tensor]  # law -> (N,); never NaN

    def rows(self) -> list[dict[str, float]]:
        """One flat dict a clip."""
        columns = {"semantic": self.semantic, "physical": self.physical}
        columns |= {f"error_{name}": values for name, values in self.errors.items()}
        return [{name: float(values[index]) for name, values in columns.items()} for index in range(len(self.physical))]


Judge = Callable[[Tensor, list[str]], Scores]  # of clips (N, T, H, W, 3) uint8 and a prompt for each


class Unjudged(ValueError):
    """Some clips could not be judged.

    failures: clip number -> reason; judged: numbers of the other clips, ascending; scores: theirs, in that order.
    """

    def __init__(self, failures: Mapping[int, str], prompts: Sequence[str], scores: Scores):
        first = sorted(failures.items())[:SHOWN]
        shown = [f"clip {clip} ({_short(prompts[clip])}): {reason}" for clip, reason in first]
        more = [f"and {len(failures) - SHOWN} more"] if len(failures) > SHOWN else []
        super().__init__(
            f"{len(failures)} of {len(prompts)} clips could not be judged: {'; '.join(shown + more)}."
            " Leave them out, or remove the cause"
        )
        self.failures = dict(failures)
        self.judged = [clip for clip in range(len(prompts)) if clip not in failures]
        self.scores = scores


def check_clips(clips: Tensor, prompts: Sequence[str]) -> None:
    """ValueError unless clips are (N, T, H, W, 3) uint8, with frames, and there is one prompt each."""
    if clips.ndim != 5 or clips.shape[-1] != 3 or clips.dtype != torch.uint8 or 0 in clips.shape[1:]:
        raise ValueError(
            f"clips are {clips.dtype} of shape {tuple(clips.shape)}; give uint8 (clips, frames, height, width, 3)"
        )
    if len(prompts) != len(clips):
        raise ValueError(f"{len(clips)} clips but {len(prompts)} prompts; give one prompt per clip")


def parse_prompts(prompts: Sequence[str], parse: Callable[[str], P]) -> tuple[dict[int, P], dict[int, str]]:
    """What `parse` makes of each prompt, by place; why it refuses others, as its ValueError says."""
    requests: dict[int, P] = {}
    failures: dict[int, str] = {}
    for index, prompt in enumerate(prompts):
        try:
            requests[index] = parse(prompt)
        except ValueError as error:
            failures[index] = str(error)
    return requests, failures


def refuse_caption(prompt: str, reserved: Sequence[str] = ()) -> str | None:
    """Why a judge cannot take a caption, None if it can; `reserved` words would change the question it stands in."""
    if not prompt.strip():
        return "its prompt is empty"
    if any(letter == "\0" or "\ud800" <= letter <= "\udfff" for letter in prompt):
        return "its prompt holds a character that no text file can hold"
    found = next((word for word in reserved if word in prompt), None)
    return f"its prompt holds {found!r}, which the judge takes for a mark of its own" if found else None


def unit_score(value: str | float) -> float:
    """A score as a number in [0, 1]; ValueError says what it is instead."""
    try:
        number = float(value)
    except ValueError:
        raise ValueError(f"{_short(str(value))} is no number") from None
    if not 0 <= number <= 1:  # nor is NaN
        raise ValueError(f"{number} does not lie in [0, 1]")
    return number


def _short(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:57] + "...")
