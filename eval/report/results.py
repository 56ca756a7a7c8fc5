"""From rows to results: figures with intervals, gains over the base model in pairs, by category, by motion.

Clips with an error count as missing beside every figure that they are missing from, and are listed.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from pydantic import FiniteFloat
from typing_extensions import TypedDict

from eval.benchmarks.base import Benchmark
from eval.report.intervals import Clustered, Estimate, estimate, paired_test, strata

TRUE = "true"  # the model whose clips are a benchmark's references
STRATA = ("low", "medium", "high")


class Score(TypedDict):
    """One clip of one model: a line of scores.jsonl."""

    benchmark: str
    model: str
    clip: int  # number among the model's
    key: str  # of the prompt
    seed: int
    prompt: str
    category: str
    cluster: str  # intervals and p are over these: a prompt's clips of several seeds, or what a benchmark says is one
    motion: FiniteFloat | None  # energy
    values: dict[str, FiniteFloat]  # by column
    error: str


def summarise(benchmark: Benchmark, scores: Sequence[Score], base: str) -> dict[str, Any]:
    """Everything that is reported of one benchmark's scores."""
    by_model: dict[str, list[Score]] = {}
    for score in scores:
        by_model.setdefault(score["model"], []).append(score)
    found: dict[str, Any] = {"models": {}, "gains": {}}
    for model, rows in by_model.items():
        found["models"][model] = {
            "clips": len(rows),
            "missing": sum(bool(row["error"]) for row in rows),
            "errors": [{name: row[name] for name in ("key", "seed", "error")} for row in rows if row["error"]],
            "figures": figures(benchmark, rows),
            "categories": {name: figures(benchmark, part) for name, part in by_category(rows).items()},
        }
    for model, rows in by_model.items():
        if model not in (TRUE, base) and base in by_model:
            found["gains"][model] = gain(benchmark, rows, by_model[base])
    return found


def gain(benchmark: Benchmark, rows: Sequence[Score], base: Sequence[Score]) -> dict[str, Any]:
    """What `rows` have over `base`, in pairs of prompt and seed; by category; and within strata of equal motion."""
    names = by_category([*rows, *base])
    return {
        "figures": differences(benchmark, rows, base),
        "categories": {
            name: differences(benchmark, *([row for row in part if row["category"] == name] for part in (rows, base)))
            for name in names
        },
        "motion": by_motion(benchmark, rows, base),
    }


def by_category(rows: Iterable[Score]) -> dict[str, list[Score]]:
    """Rows by category, in alphabetic order; none where there is no more than one category."""
    found: dict[str, list[Score]] = {}
    for row in rows:
        found.setdefault(row["category"], []).append(row)
    return {name: found[name] for name in sorted(found)} if len(found) > 1 else {}


def figures(benchmark: Benchmark, rows: Sequence[Score]) -> dict[str, dict[str, Any] | None]:
    """Each figure of one model's clips: mean, interval, clips used and missing; None where no clip has it."""
    good = [row for row in rows if not row["error"]]
    found = estimate(clustered(benchmark, good), benchmark.derive)
    return {
        name: _cell(found[name], clips=_used(name, good), missing=len(rows) - len(good)) for name in benchmark.figures
    }


def differences(benchmark: Benchmark, rows: Sequence[Score], base: Sequence[Score]) -> dict[str, dict[str, Any] | None]:
    """Each figure's difference over the pairs in which both clips have a score: mean, interval, p, pairs, missing."""
    first, second = ({(row["key"], row["seed"]): row for row in part} for part in (rows, base))
    every = [pair for pair in first if pair in second]
    both = [pair for pair in every if not (first[pair]["error"] or second[pair]["error"])]
    pairs: tuple[list[Score], list[Score]] = ([], [])
    for pair in both:
        columns = first[pair]["values"].keys() & second[pair]["values"].keys()
        for part, row in zip(pairs, (first[pair], second[pair]), strict=True):
            part.append({**row, "values": {name: row["values"][name] for name in columns}})
    ours, theirs = (clustered(benchmark, part) for part in pairs)
    found, tested = estimate(ours, benchmark.derive, minus=theirs), paired_test(ours, theirs, benchmark.derive)
    return {
        name: _cell(
            found[name], p=tested[name], clips=_used(name, pairs[0]), missing=len(first.keys() | second) - len(both)
        )
        for name in benchmark.figures
    }


def by_motion(benchmark: Benchmark, rows: Sequence[Score], base: Sequence[Score]) -> dict[str, Any] | None:
    """Whether a gain is one of moving more or less (Proprio, table 9): both models' clips of about equal motion.

    The clips of both are split at the 33rd and 67th percentile of their motion energy, pooled; within a stratum the
    means are compared, clip by clip unpaired, with intervals over clusters. `all` is the mean over the strata, one
    third each. None where motion is not known.
    """
    parts = [[row for row in part if not row["error"] and row["motion"] is not None] for part in (rows, base)]
    if not all(parts):
        return None
    numbers, edges = strata(np.array([row["motion"] for part in parts for row in part]))
    split = np.split(numbers, [len(parts[0])])
    clusters = list(dict.fromkeys(row["cluster"] for part in parts for row in part))
    found: dict[str, Any] = {"edges": edges.tolist(), "strata": {}}
    inside = []
    for number, name in enumerate(STRATA):
        chosen = [
            [row for row, one in zip(part, own, strict=True) if one == number]
            for part, own in zip(parts, split, strict=True)
        ]
        ours, theirs = (clustered(benchmark, part, clusters) for part in chosen)
        inside.append((ours, theirs))
        less = estimate(ours, benchmark.derive, minus=theirs)
        found["strata"][name] = {
            "figures": figures(benchmark, chosen[0]),
            "base": figures(benchmark, chosen[1]),
            "gain": {name: _cell(less[name]) for name in benchmark.figures},
        }

    merged = [_beside([pair[side] for pair in inside]) for side in (0, 1)]

    def mean_of_strata(means: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        derived = [
            benchmark.derive({column: means[f"{number} {column}"] for column in benchmark.columns})
            for number in range(len(STRATA))
        ]
        return {name: np.mean([figures[name] for figures in derived], axis=0) for name in benchmark.figures}

    over = estimate(merged[0], mean_of_strata, minus=merged[1])
    return found | {"all": {name: _cell(over[name]) for name in benchmark.figures}}


def clustered(benchmark: Benchmark, rows: Sequence[Score], clusters: Sequence[str] | None = None) -> Clustered:
    """The rows' columns by cluster."""
    clusters = list(dict.fromkeys(row["cluster"] for row in rows)) if clusters is None else clusters
    return Clustered.of(benchmark.columns, clusters, [(row["cluster"], row["values"]) for row in rows])


def _beside(parts: Sequence[Clustered]) -> Clustered:
    """Strata of the same clusters as columns of one table, "<number> <column>"."""
    columns = tuple(f"{number} {column}" for number, part in enumerate(parts) for column in part.columns)
    sums, counts = (np.concatenate([getattr(part, name) for part in parts], axis=1) for name in ("sums", "counts"))
    return Clustered(columns, sums, counts)


def _used(figure: str, rows: Sequence[Score]) -> int:
    """Clips that a figure rests on: those with its column, or all where it is made from several."""
    having = sum(figure in row["values"] for row in rows)
    return having or len(rows)


def _cell(found: Estimate | None, **more: Any) -> dict[str, Any] | None:
    return None if found is None else {**asdict(found), **more}
