"""Judge scores of losers, each (semantic, physical) in [0, 1]: from a table, from the manifest, or from a judge."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from data_pipeline.manifests import SCORES, check_scores
from eval.judges.scores import Judge, Unjudged
from eval.records import BadRow, csv_records, read_text, require

COLUMNS = ("key", "loser", *SCORES)  # of the table
NEUTRAL = (0.5, 0.5)  # of a loser without a score
Score = tuple[float, float]  # (semantic, physical)
Scores = dict[tuple[str, int], Score]  # by (group key, loser)


def judge_clips(judge: Judge, clips: Tensor, prompts: list[str]) -> tuple[dict[int, Score], Mapping[int, str]]:
    """The scores of clips (N, T, H, W, 3) uint8 by number, and why the others have none."""
    try:
        scores, numbers, failures = judge(clips, prompts), range(len(clips)), {}
    except Unjudged as refusal:
        scores, numbers, failures = refusal.scores, refusal.judged, refusal.failures
    pairs = zip(scores.semantic.tolist(), scores.physical.tolist(), strict=True)
    return {number: check_scores(*pair) for number, pair in zip(numbers, pairs, strict=True)}, failures


def read_scores(path: str | Path) -> Scores:
    """A CSV with the columns key, loser (from 0), semantic, physical; other columns are not read.

    Raises ValueError, before any work, for a missing file or column and for rows that hold no scores in [0, 1], which
    it lists: a lost score must not pass for a neutral one.
    """
    path, columns = Path(path).expanduser(), dict[str, None]()
    if not path.is_file():
        raise ValueError(f"pipeline.scores={path}: no such file")
    rows = list(csv_records(path, COLUMNS, columns))
    require(path, COLUMNS, columns)
    scores: Scores = {}
    problems = []
    for number, row in enumerate(rows, start=1):
        try:
            if isinstance(row, BadRow):
                raise row
            place = read_text(row, "key"), int(row["loser"])
            if place in scores:
                raise ValueError(f"loser {place[1]} of {place[0]!r} a second time")
            scores[place] = check_scores(row["semantic"], row["physical"])
        except (BadRow, ValueError) as error:
            problems.append(f"row {number}: {error}")
    if problems:
        shown = "; ".join(problems[:5]) + ("; ..." if len(problems) > 5 else "")
        raise ValueError(
            f"{path} has {len(problems)} bad rows ({shown}); correct them, or remove them to leave the losers neutral"
        )
    return scores


def loser_scores(
    key: str, own: Sequence[Sequence[float]] | None, scores: Scores, num_losers: int
) -> list[Score | None]:
    """(semantic, physical) of each loser of a row: of the table, else the manifest's `own`, else None."""
    pairs = [tuple(pair) for pair in own or ()]
    pairs = pairs * num_losers if len(pairs) == 1 else pairs or [None] * num_losers
    return [scores.get((key, loser), pairs[loser]) for loser in range(num_losers)]
