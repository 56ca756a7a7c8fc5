"""VideoPhy-2 (Bansal et al., 2025, arXiv 2503.06800): 590 prompts about 200 actions, rated by VideoPhy2-AutoRater.

    recipe key              run.videophy2.<field>, see VideoPhy2Config; the rater's is raters.videophy2
    data                    videophy2_test.csv of the data set videophysics/videophy2_test

The AutoRater rates a clip from 1 to 5 for `semantic` adherence (SA) and for `physical` commonsense (PC). A clip counts
where its rating is 4 or 5; `joint` is the share of clips where both are (VIDEOPHY2/README.md, inference, step 5). The
figures hard_* are the same over the prompts that the table marks in its column is_hard. How the AutoRater is run, and
what becomes of an answer without a rating (the tool writes 0; here it is an error, not a low rating), stands in
`eval.judges.videophy2`.

The table has a row for each of the authors' clips: captions are taken once each, and one that any row marks is hard.
Some papers generate from the short captions (PhyGDPO), others from the table's upsampled ones; the judge sees the short
ones in both cases. `category` is the table's own column. Figures are shares from 0 to 1.

The table also lists physical rules that a clip of a caption follows, breaks or does not show. With `rules`, the
AutoRater is asked about each rule of a caption, and `rules_followed` is the mean over clips of followed / (followed +
broken). The authors print no such figure: compare base and tuned by it, nothing else.
"""

import ast
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eval.benchmarks.base import DataConfig, Task, read_published
from eval.benchmarks.videophy import Rated, once_each
from eval.judges import videophy2
from eval.prompts import make_key

GOOD = 4  # the least rating that counts
RULES = ("physics_rules_followed", "physics_rules_unfollowed", "physics_rules_cannot_be_determined")
TRUE, FALSE = ("1", "1.0", "true"), ("0", "0.0", "false", "")

COUNTED = ("semantic", "physical", "joint")


@dataclass
class VideoPhy2Config(DataConfig):
    upsampled: bool = False  # generate from the table's long captions; the judge sees the short ones
    rules: bool = False  # ask about the table's physical rules too: one question per rule, weights loaded once more


class VideoPhy2(Rated):
    name = "videophy2"
    columns = ("semantic_rating", "physical_rating", *COUNTED, *(f"hard_{name}" for name in COUNTED), "rules_followed")
    figures = ("joint", "semantic", "physical", "hard_joint", "hard_semantic", "hard_physical", "rules_followed")
    published = read_published("videophy2")
    table = "videophy2_test.csv"
    source = "huggingface.co/datasets/videophysics/videophy2_test"
    weights = "huggingface.co/videophysics/videophy_2_auto"
    laid_out = "sa_pc.csv"
    dropped = "."
    rater = videophy2
    settings: VideoPhy2Config

    @property
    def recorded(self) -> dict[str, Any]:
        return super().recorded | {"split": "all"}  # had a key of its own

    def _tasks(self, rows: list[dict[str, str]], table: Path) -> list[Task]:
        needed = ["is_hard", *(["upsampled_caption"] if self.settings.upsampled else [])]
        for column in [*needed, *(RULES if self.settings.rules else [])]:
            if rows and column not in rows[0]:
                raise ValueError(f"{table} has no column {column!r}: give the {self.table} of {self.source}")
        tasks = []
        for index, (caption, group) in enumerate(once_each(rows).items()):
            hard = any(_is_hard(row, table) for row in group)
            text = group[0]["upsampled_caption"].strip() if self.settings.upsampled else caption
            if not text:
                raise ValueError(f"{table}: {caption!r} has no upsampled_caption; use upsampled=false")
            facts = {"caption": caption, "hard": hard}
            if self.settings.rules:
                facts["rules"] = list(dict.fromkeys(rule for row in group for rule in _rules(row, table)))
            tasks.append(Task(make_key(index, caption), text, group[0].get("category", ""), facts=facts))
        return tasks

    def _rate(self, tool, paths, tasks, folder):
        ratings, failures = super()._rate(tool, paths, tasks, folder)
        pairs = [(clip, rule) for clip in ratings for rule in tasks[clip].facts.get("rules", [])]
        verdicts = defaultdict(list)
        if pairs:
            judged = videophy2.judge_rules(tool, [(paths[clip], rule) for clip, rule in pairs], folder)
            for (clip, _), verdict in zip(pairs, judged, strict=True):
                if isinstance(verdict, str):
                    failures[clip] = verdict
                elif verdict != videophy2.UNSEEN:
                    verdicts[clip].append(verdict == videophy2.FOLLOWED)
        for clip, followed in verdicts.items():
            ratings[clip]["rules_followed"] = sum(followed) / len(followed)
        return ratings, failures

    def _values(self, task: Task, ratings: Mapping[str, float]) -> dict[str, float]:
        semantic, physical = (ratings[name] >= GOOD for name in ("semantic", "physical"))
        counted = {"semantic": float(semantic), "physical": float(physical), "joint": float(semantic and physical)}
        values = {f"{name}_rating": ratings[name] for name in ("semantic", "physical")} | counted
        values |= {name: value for name, value in ratings.items() if name == "rules_followed"}
        return values | {f"hard_{name}": value for name, value in counted.items()} if task.facts["hard"] else values


def _is_hard(row: dict[str, str], table: Path) -> bool:
    value = row["is_hard"].strip().lower()
    if value not in (*TRUE, *FALSE):
        raise ValueError(f"{table}: is_hard is {row['is_hard']!r} for {row['caption']!r}, not 0 or 1")
    return value in TRUE


def _rules(row: dict[str, str], table: Path) -> list[str]:
    """The rules of a row, which writes them as Python lists of strings."""
    found = []
    for column in RULES:
        try:
            listed = ast.literal_eval(row[column].strip() or "[]")
        except (ValueError, SyntaxError, MemoryError, RecursionError) as error:
            raise ValueError(f"{table}: {column} of {row['caption']!r} is no list ({error})") from error
        if not isinstance(listed, list) or not all(isinstance(rule, str) for rule in listed):
            raise ValueError(f"{table}: {column} of {row['caption']!r} is no list of strings")
        found += [rule.strip() for rule in listed if rule.strip()]
    return found
