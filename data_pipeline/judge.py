"""Judge scores of the losers: from a table that a judge outside filled in, from the manifest, from a judge that runs
inside the build, or neutral; the first of these that has one.

A judge that runs elsewhere gets the loser clips and a table of them (`write_table`) and gives it back with the columns
`semantic` and `physical` (`read_scores`).
"""

import csv
import io
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from data_pipeline.sources import Row, check_scores
from data_pipeline.units import write_text
from eval.judges import sandbox

Score = tuple[float, float]  # (semantic, physical), each in [0, 1]
NEUTRAL = (0.5, 0.5)  # of a loser that nobody judged
Scores = dict[tuple[str, int], Score]  # by (group key, loser)
Judge = Callable[[Tensor, list[str]], list[Score]]  # of clips (N, T, H, W, 3) uint8 and their prompts


def build_judge(name: str, fps: float, device: torch.device | str) -> Judge:
    """The judge called `name`, a key of JUDGES; ValueError for another name."""
    check_judge(name)
    return JUDGES[name](fps, device)


def check_judge(name: str) -> None:
    """ValueError for a judge that there is not."""
    if name and name not in JUDGES:
        raise ValueError(f"pipeline.judge={name!r}: must be empty or one of {', '.join(JUDGES)}")


def _sandbox(fps: float, device: torch.device | str) -> Judge:
    measure = sandbox.build(sandbox.SandboxJudgeConfig(fps=fps), device)

    def judge(clips: Tensor, prompts: list[str]) -> list[Score]:
        scores = measure(clips, prompts)
        return list(zip(scores.semantic.tolist(), scores.physical.tolist(), strict=True))

    return judge


JUDGES: dict[str, Callable[[float, torch.device | str], Judge]] = {"sandbox": _sandbox}


def read_scores(path: str | Path) -> Scores:
    """A CSV with the columns key, loser (from 0), semantic, physical; other columns are not read.

    Raises ValueError, before any work, for a missing file or column and for lines that hold no scores in [0, 1], which
    it lists: a lost score must not pass for a neutral one.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"pipeline.scores={path}: no such file")
    try:
        reader = csv.DictReader(io.StringIO(path.read_text(encoding="utf-8-sig"), newline=""), strict=True)
        columns = [name.strip() for name in reader.fieldnames or []]
        reader.fieldnames = columns
        lines = [(reader.line_num, line) for line in reader]
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(f"pipeline.scores={path} is not a valid UTF-8 CSV: {error}") from error
    if missing := [name for name in ("key", "loser", "semantic", "physical") if name not in columns]:
        raise ValueError(f"{path} has no column {', '.join(missing)}; found: {', '.join(columns) or 'none'}")
    scores: Scores = {}
    problems = []
    for number, line in lines:
        try:
            place = line["key"].strip(), int(line["loser"])
            if place in scores:
                raise ValueError(f"loser {place[1]} of {place[0]!r} a second time")
            scores[place] = check_scores(line["semantic"], line["physical"])
        except (TypeError, ValueError, AttributeError) as error:
            problems.append(f"line {number}: {error}")
    if problems:
        shown = "; ".join(problems[:5]) + ("; ..." if len(problems) > 5 else "")
        raise ValueError(
            f"{path} has {len(problems)} bad lines ({shown}); correct them, or remove them to leave the losers neutral"
        )
    return scores


def loser_scores(row: Row, scores: Mapping[tuple[str, int], Score], num_losers: int) -> list[Score | None]:
    """(semantic, physical) of each loser of a row: of the table, else of the manifest, else None."""
    own = row.scores * num_losers if len(row.scores) == 1 else row.scores or (None,) * num_losers
    return [scores.get((row.key, loser), own[loser]) for loser in range(num_losers)]


def write_table(path: str | Path, losers: Iterable[tuple[str, int, Path, str]]) -> None:
    """CSV of (key, loser, clip, prompt) for a judge outside, atomically; clips relative to the table's folder."""
    path = Path(path)
    buffer = io.StringIO(newline="")
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(["key", "loser", "clip", "prompt"])
    for key, loser, clip, prompt in losers:
        writer.writerow([key, loser, clip.relative_to(path.parent), prompt])
    write_text(path, buffer.getvalue())
