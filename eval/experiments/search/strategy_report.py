"""Strategies against the truth: search, refinement, guidance and what they add to each other, beside what they cost.

Every row is a mean over prompts with a 95% bootstrap interval. "adds" is paired with the same prompts' clips without
the last part of the strategy, from the same noise: a refined clip with the clip of its own noise, guided clips with the
candidates of the same seeds, the best of them with the best of these by the same scorer. A row's motion is that of its
clips over that of all candidates, which shows a strategy that makes clips stiller or livelier. Strata of equal motion
(`report.py`) apply to a choice among guided clips only: there is no choice where one clip is refined.

A cost is that of one prompt, from noise to the chosen clip: network passes forward (without what activation
checkpointing computes anew) and backward, and seconds, those of a batch shared by its clips.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from eval.experiments.search.report import BASELINE, estimate, line, show, strata, stratified

# Per prompt: clips with truth, motion and scores, and the numbers of those taken.
Picks = list[tuple[dict[str, Any], list[int]]]
Costs = list[tuple[dict[str, Any], float]]  # per prompt: what was spent, and the share of it that counts


def rows(records: Sequence[dict[str, Any]], chosen_by: str) -> dict[str, dict[str, Any]]:
    """The strategies' figures by name, as plain JSON values; empty where no strategy was asked for."""
    has = {name: all(name in record for record in records) for name in ("refined", "guided")}
    if not any(has.values()):
        return {}
    count = len(records[0]["seeds"])
    one: Costs = [(record["generation"], 1 / count) for record in records]
    everyone: Costs = [(record["generation"], 1) for record in records]
    first, found = lot(records, 1), best(records, chosen_by)
    spent = [everyone, scoring(records, chosen_by)]
    table = {"one clip": row(records, first, [one]), "search": row(records, found, spent, without=first)}
    if has["refined"]:
        parts = [record["refined"] for record in records]
        refined_first: Picks = [(part, [part["of"].index(0)]) for part in parts]
        chosen = [numbers[0] for _, numbers in found]
        refined_best: Picks = [(part, [part["of"].index(index)]) for part, index in zip(parts, chosen, strict=True)]
        second: Picks = [(part, [lowest(part, chosen_by, map(part["of"].index, part["best"]))]) for part in parts]
        share = [1 / len(part["of"]) for part in parts]
        few = [len(part["best"]) / len(part["of"]) for part in parts]
        refining = list(zip(parts, share, strict=True))
        again = [*spent, list(zip(parts, few, strict=True)), scoring(parts, chosen_by, few)]
        table |= {
            "refinement": row(records, refined_first, [refining], without=first),
            "search + refinement of the best": row(records, refined_best, [*spent, refining], without=found),
            f"search + refinement of {len(parts[0]['best'])}, choice": row(records, second, again, without=found),
        }
    if has["guided"]:
        parts = [record["guided"] for record in records]
        count = len(parts[0]["of"])
        each: Costs = [(part, 1 / count) for part in parts]
        table["guidance"] = row(records, lot(parts, count), [each], without=lot(records, count))
        whole: Costs = [(part, 1) for part in parts]
        for scorer in parts[0]["scorers"]:
            costs = [whole, scoring(parts, scorer)]
            name = f"guidance + best of {count} by {scorer}"
            table[name] = row(records, best(parts, scorer), costs, without=best(records, scorer, count))
            values = np.array([part["scorers"][scorer]["values"] for part in parts])
            truth = np.array([part["truth"]["physical"] for part in parts])
            bins = strata(np.array([part["motion"] for part in parts]))
            table[name]["strata"] = stratified(values, truth, bins)
    return table


# Which clips


def lot(parts: Sequence[dict[str, Any]], count: int) -> Picks:
    """The first `count` clips, whose mean is what a pick by lot gives."""
    return [(part, list(range(count))) for part in parts]


def best(parts: Sequence[dict[str, Any]], scorer: str, count: int | None = None) -> Picks:
    """The best of the first `count` clips (None: of all) by a scorer."""
    return [(part, [lowest(part, scorer, range(len(part["motion"]))[:count])]) for part in parts]


def lowest(part: dict[str, Any], scorer: str, places) -> int:
    return min(places, key=lambda place: part["scorers"][scorer]["values"][place])


def taken(picks: Picks, name: str) -> NDArray:
    """Truth or motion of the picks, (P,), the mean where several are taken."""
    return np.array([np.mean(np.array((part["truth"] | part)[name])[numbers]) for part, numbers in picks])


# Figures


def row(
    records: Sequence[dict[str, Any]], picks: Picks, costs: Sequence[Costs], *, without: Picks | None = None
) -> dict[str, Any]:
    """The picks' means, what they have over others, motion and cost."""
    physical, everyone = taken(picks, "physical"), lot(records, len(records[0]["seeds"]))
    found: dict[str, Any] = {name: estimate(taken(picks, name)) for name in ("physical", "semantic")}
    found["over_random"] = estimate(physical - taken(everyone, "physical"))
    if BASELINE in records[0]["scorers"]:
        found["over_most_motion"] = estimate(physical - taken(best(records, BASELINE), "physical"))
    if without is not None:
        found["adds"] = estimate(physical - taken(without, "physical"))
        found["adds_semantic"] = estimate(taken(picks, "semantic") - taken(without, "semantic"))
    found["motion"] = float(taken(picks, "motion").mean() / taken(everyone, "motion").mean())
    for key in ("passes", "backward", "seconds"):
        found[key] = sum(float(np.mean([share * made.get(key, 0) for made, share in part])) for part in costs)
    return found


def scoring(parts: Sequence[dict[str, Any]], scorer: str, shares: Sequence[float] | None = None) -> Costs:
    """What a scorer took for (a share of) the clips."""
    return [(part["scorers"][scorer], share) for part, share in zip(parts, shares or [1] * len(parts), strict=True)]


def table(found: dict[str, dict[str, Any]]) -> str:
    """The rows as text; empty for none."""
    if not found:
        return ""
    width = max(map(len, found)) + 4
    signed = {"over random": "over_random", "over most motion": "over_most_motion", "adds": "adds"}
    signed |= {"adds, semantic": "adds_semantic"}
    sizes = (24,) * 7 + (8, 9, 10, 8)
    heads = ["physical", "semantic", *signed, "within motion strata", "motion", "forward", "backward", "seconds"]
    lines = ["strategies; passes and seconds are a prompt's", line("", width, heads, sizes)]
    for name, row in found.items():
        cells = [show(row["physical"]), show(row["semantic"])]
        cells += [show(row.get(key), sign=True) for key in signed.values()]
        cells += [show(row.get("strata", {}).get("all"), sign=True), f"{row['motion']:.2f}", f"{row['passes']:.0f}"]
        lines.append(line("  " + name, width, [*cells, f"{row['backward']:.0f}", f"{row['seconds']:.2f}"], sizes))
    return "\n".join(lines)
