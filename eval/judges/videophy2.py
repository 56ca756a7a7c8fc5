"""VideoPhy2-AutoRater, the judge of VideoPhy-2 (Bansal et al., 2025, arXiv 2503.06800), in the user's own installation.

The judge is a video language model that rates a clip from 1 to 5, once for semantic adherence (SA: does it match the
description) and once for physical commonsense (PC: does it adhere to the physical laws). A score is (rating - 1) / 4;
the ratings themselves are kept, as the benchmark counts clips with SA >= 4 and PC >= 4.

A call runs VIDEOPHY2/inference.py of the checkout twice, with `--task sa` and `--task pc`, on one table of `caption`
and `videopath`; it writes that table with an index in front and `score` behind. The weights are loaded both times, and
clips are rated one by one: give many clips per call.

The tool writes 0 when it finds no rating in the model's answer. That is no score, and the clip counts as not judged.

`--task rule` asks of one physical rule whether a clip follows it. There the 0 of an answer without a number cannot be
told from that of a rule that is broken.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from eval.judges.external_tool import Tool, ToolError, write_table
from eval.judges.scores import Scores, refuse_caption

NAME = "videophy2"
FOLDER = "VIDEOPHY2"  # of the checkout, where the tool runs
INFERENCE = f"{FOLDER}/inference.py"
HEADER = ["caption", "videopath"]
ANSWER_HEADER = ["", "caption", "videopath", "score"]
TASKS = {"semantic": "sa", "physical": "pc"}
RULE_HEADER = ["videopath", "rule"]
RULE_ANSWER_HEADER = ["", *RULE_HEADER, "score"]
BROKEN, FOLLOWED, UNSEEN = 0, 1, 2  # a rule that the clip breaks, follows, or does not show
RESERVED = ("<|video|>", "<image>")  # where the tool puts media into a question
PROGRAMS = (INFERENCE,)
RATINGS = range(1, 6)


@dataclass
class VideoPhy2Scores(Scores):
    semantic_rating: Tensor  # (N,) int64, 1 to 5
    physical_rating: Tensor  # (N,) int64, 1 to 5


refuse = partial(refuse_caption, reserved=RESERVED)  # why the tool cannot take a prompt, None if it can


def make_scores(ratings: dict[str, list[int]]) -> VideoPhy2Scores:
    semantic, physical = (torch.tensor(ratings[name], dtype=torch.int64) for name in ("semantic", "physical"))
    return VideoPhy2Scores((semantic.float() - 1) / 4, (physical.float() - 1) / 4, semantic, physical)


def rate_files(
    tool: Tool, paths: Mapping[int, str], prompts: Sequence[str], folder: Path
) -> tuple[dict[str, dict[int, int]], dict[int, str]]:
    """Ratings of clips that lie in files: name of TASKS -> clip number -> 1 to 5; clip number -> why it has none.

    paths: clip number -> absolute path; prompts: of all clips, by number. `folder` takes the tables and the log. A clip
    without one of the ratings may still have the other. Raises ToolError.
    """
    failures: dict[int, str] = {}
    write_table(folder / "clips.csv", HEADER, [[prompts[clip], path] for clip, path in paths.items()])
    return {name: _rate(tool, name, folder, paths, prompts, failures) for name in TASKS}, failures


def judge_rules(tool: Tool, pairs: Sequence[tuple[str, str]], folder: Path) -> list[int | str]:
    """BROKEN, FOLLOWED or UNSEEN for each pair of an absolute path and a rule; text: why there is none of them.

    `folder` takes the tables and the log. Raises ToolError.
    """
    write_table(folder / "rules.csv", RULE_HEADER, pairs)
    header, *rows = _run(tool, folder, "rules.csv", "rule", "rule")
    if header != RULE_ANSWER_HEADER or [row[1] for row in rows if len(row) == 4] != [path for path, _ in pairs]:
        raise ToolError(f"{NAME}: {INFERENCE} wrote no table of {RULE_ANSWER_HEADER} with one row per rule")
    return [_verdict(row, rule) for row, (_, rule) in zip(rows, pairs, strict=True)]


def _run(tool: Tool, folder: Path, table: str, task: str, name: str) -> list[list[str]]:
    """Header and rows that the program answers a table of `folder` with, in answers-<name>.csv. Raises ToolError."""
    answered = folder / f"answers-{name}.csv"
    arguments = ["--input_csv", str(folder / table), "--output_csv", str(answered)]
    tool.run(INFERENCE, [*arguments, "--checkpoint", str(tool.checkpoint), "--task", task], folder, where=FOLDER)
    return tool.read_table(answered, INFERENCE, folder) or [[]]


def _verdict(row: Sequence[str], rule: str) -> int | str:
    if row[2] != rule:  # "NA" and "1.0" are no text to the tool's reader
        return f"the tool did not read the rule {rule[:60]!r} as text, but as {row[2][:60]!r}"
    known = {f"{value}.0": value for value in (BROKEN, FOLLOWED, UNSEEN)}
    return known.get(row[3], f"its verdict on the rule {rule[:60]!r} is {row[3][:60]!r}, not 0.0, 1.0 or 2.0")


def _rate(
    tool: Tool, name: str, folder: Path, paths: Mapping[int, str], prompts: Sequence[str], failures: dict[int, str]
) -> dict[int, int]:
    """Clip number -> rating for one of TASKS; clips without a valid one go to `failures`."""
    header, *rows = _run(tool, folder, "clips.csv", TASKS[name], name)
    if header != ANSWER_HEADER:
        raise ToolError(f"{NAME}: {INFERENCE} wrote the columns {header!r:.200} instead of {ANSWER_HEADER}")
    clips = {path: clip for clip, path in paths.items()}
    ratings: dict[int, int] = {}
    seen = set()
    for row in rows:
        if len(row) != 4 or row[2] not in clips or row[2] in seen:
            raise ToolError(f"{NAME}: {INFERENCE} wrote a row that rates no clip for the first time: {row!r:.200}")
        seen.add(row[2])
        clip = clips[row[2]]
        if row[1] != prompts[clip]:  # "NA" and "1.0" are no text to the tool's reader
            failures[clip] = f"the tool did not read its prompt as text, but as {row[1][:60]!r}"
            continue
        try:
            ratings[clip] = rating(row[3])
        except ValueError as error:
            failures[clip] = f"its {name} rating {error}"
    for clip in clips.values():
        if paths[clip] not in seen:
            failures.setdefault(clip, f"the tool wrote no {name} rating for it")
    return ratings


def rating(value: str) -> int:
    """A rating from 1 to 5, as the tool writes it ("4.0"); ValueError says what it is instead."""
    try:
        number = float(value)
    except ValueError:
        raise ValueError(f"{value[:60]!r} is no number") from None
    if number == 0:
        raise ValueError("is 0: the tool found none in the model's answer")
    if number not in RATINGS:
        raise ValueError(f"{number} is not one of 1 to 5")
    return int(number)
