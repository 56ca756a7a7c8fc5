"""What a search found: strategies against the truth, with intervals, within motion strata, and what they cost.

Every figure is a mean over prompts with a 95% bootstrap interval over prompts. `random` is the mean over all of a
prompt's candidates, which is what a choice by lot gives on average, and `oracle` the best of them by the truth: no
scorer can do better. Gains are paired, prompt by prompt.

Motion strata (Proprio, table 9): the candidates of all prompts are split into thirds by motion energy, and within a
prompt and a third a scorer's choice is compared with that third's mean. So what is gained there is not gained by
choosing more or less motion; "most motion" keeps what it gains within a third. Prompts with fewer than two candidates
in a third do not count there.
"""

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import spearmanr

from eval.report.intervals import Estimate, bootstrap_mean

STRATA = ("low", "medium", "high")
BASELINE = "most_motion"
ASPECTS = ("physical", "semantic")
SIGNED = {  # columns of differences and correlations, and their keys
    "over random": "over_random",
    "over most motion": "over_most_motion",
    "within motion strata": "strata",
    "rank correlation": "correlation",
}


def results(records: Sequence[dict[str, Any]], scorers: Sequence[str], chosen_by: str) -> dict[str, Any]:
    """All figures, as plain JSON values, of the records of all prompts."""
    truth = {name: np.array([record["truth"][name] for record in records]) for name in ASPECTS}  # (P, N)
    physical, count = truth["physical"], truth["physical"].shape[1]
    values = {name: np.array([record["scorers"][name]["values"] for record in records]) for name in scorers}
    picked = {name: found.argmin(axis=1) for name, found in values.items()}
    bins = strata(np.array([record["motion"] for record in records]))
    random = physical.mean(axis=1)
    baseline = _take(physical, picked[BASELINE]) if BASELINE in picked else None

    def cost(made: Iterable[dict[str, Any]]) -> dict[str, float]:  # per candidate
        made = list(made)
        return {key: float(np.mean([one[key] for one in made])) / count for key in ("passes", "seconds")}

    rows: dict[str, dict[str, Any]] = {}
    for name in ["oracle", "random", *[name for name in scorers if name != "random"]]:
        index = physical.argmax(axis=1) if name == "oracle" else picked.get(name)
        by_lot = name == "random"
        best = {aspect: found.mean(axis=1) if by_lot else _take(found, index) for aspect, found in truth.items()}
        rows[name] = row = {aspect: estimate(found) for aspect, found in best.items()}
        if name != "random":
            row["over_random"] = estimate(best["physical"] - random)
            if baseline is not None and name != BASELINE:
                row["over_most_motion"] = estimate(best["physical"] - baseline)
        if name in values and name != "random":
            row["strata"] = stratified(values[name], physical, bins)
            row["correlation"] = estimate([-rho for rho in map(spearman, values[name], physical) if rho is not None])
        if name in values:
            row |= cost(record["scorers"][name] for record in records)
    found = {"prompts": len(records), "candidates": count, "chosen_by": chosen_by}
    found |= {"generation": cost(record["generation"] for record in records), "scorers": rows, "race": None}
    full = [record["scorers"][chosen_by] for record in records]
    if all("race" in record for record in records):
        raced = [record["race"] for record in records]
        found["race"] = _early(raced, full, [one["passes"] for one in full], physical)
    whole = [record["generation"]["passes"] + one["passes"] for record, one in zip(records, full, strict=True)]
    found["prune"] = []
    for looks in zip(*[record.get("prune", []) for record in records], strict=True):
        row = {"step": looks[0]["step"], "scorer": looks[0]["scorer"], "kept": len(looks[0]["kept"])}
        row |= _early(looks, full, whole, physical)
        chosen = np.array([look["chosen"] for look in looks])
        row["loss"] = estimate(_take(physical, chosen) - _take(physical, picked[chosen_by]))
        found["prune"].append(row)
    return found


def _early(found: Sequence[dict], full: Sequence[dict], passes: Sequence[int], physical: NDArray) -> dict[str, Any]:
    """Choices for fewer passes beside those of full scoring: how often the same, passes over `passes`, the truth."""
    return {
        "same_winner": estimate([one["chosen"] == other["chosen"] for one, other in zip(found, full, strict=True)]),
        "passes_share": estimate([one["passes"] / whole for one, whole in zip(found, passes, strict=True)]),
        "physical": estimate(_take(physical, np.array([one["chosen"] for one in found]))),
    }


def estimate(values: Sequence[float] | NDArray) -> dict[str, float] | None:
    """Mean and interval as plain JSON; None where there are no values."""
    values = np.asarray(values, dtype=np.float64)
    return asdict(bootstrap_mean(values)) if len(values) else None


def strata(motion: NDArray) -> NDArray:
    """Thirds by motion over all candidates: (P, N) of 0, 1, 2."""
    return np.searchsorted(np.quantile(motion, [1 / 3, 2 / 3]), motion, side="left")


def stratified(values: NDArray, truth: NDArray, bins: NDArray) -> dict[str, Any]:
    """Truth of the choice within each third minus the third's mean, all (P, N); "all" averages a prompt's thirds.

    By hand: one prompt, values 2, 1, truth 0, 1, one third: the second is chosen, the gain is 1 - 0.5.
    """
    gains = np.full((len(STRATA), len(values)), np.nan)
    for number in range(len(STRATA)):
        for prompt, inside in enumerate(bins == number):
            if inside.sum() >= 2:
                best = np.where(inside, values[prompt], np.inf).argmin()
                gains[number, prompt] = truth[prompt, best] - truth[prompt, inside].mean()
    found = {name: estimate(row[~np.isnan(row)]) for name, row in zip(STRATA, gains, strict=True)}
    some = ~np.isnan(gains).all(axis=0)
    return found | {"all": estimate(np.nanmean(gains[:, some], axis=0))}


def spearman(first: NDArray, second: NDArray) -> float | None:
    """Rank correlation of two lists (N,), ties sharing ranks; None where one of them is constant."""
    if np.ptp(first) == 0 or np.ptp(second) == 0:
        return None
    return float(spearmanr(first, second).statistic)


def order(values: Sequence[float]) -> list[int]:
    """Numbers of the candidates, the best first."""
    return sorted(range(len(values)), key=values.__getitem__)


def _take(values: NDArray, index: NDArray) -> NDArray:
    """values (P, N) at index (P,)."""
    return values[np.arange(len(values)), index]


# As text


def table(found: dict[str, Any]) -> str:
    """The results as text: means with 95% intervals."""
    names = ("physical", "semantic", *SIGNED, "passes", "seconds")
    sizes = (22, 22, 24, 24, 24, 24, 8, 8)
    width = max(len(name) for name in found["scorers"]) + 4
    cost = found["generation"]
    lines = [
        f"{found['prompts']} prompts, best of {found['candidates']}; a candidate takes {cost['passes']:.0f} network"
        f" passes and {cost['seconds']:.3f} s to generate, to score what stands at the end of its line",
        line("chosen by", width, names, sizes),
    ]
    for name, row in found["scorers"].items():
        values = row | {"strata": row.get("strata", {}).get("all")}
        cells = [show(row["physical"]), show(row["semantic"])]
        cells += [show(values.get(key), sign=True) for key in SIGNED.values()]
        cells += [f"{row['passes']:.0f}", f"{row['seconds']:.3f}"] if "passes" in row else []
        lines.append(line(("* " if name == found["chosen_by"] else "  ") + name, width, cells, sizes))
    lines += ["", "gain within a third of equal motion", line("", width, STRATA, sizes[2:])]
    for name, row in found["scorers"].items():
        if "strata" in row:
            cells = [show(row["strata"][third], sign=True) for third in STRATA]
            lines.append(line("  " + name, width, cells, sizes[2:]))
    if race := found["race"]:
        lines += ["", f"racing {found['chosen_by']}: the winner of full scoring in {show(race['same_winner'])} of"]
        lines[-1] += f" prompts, for {show(race['passes_share'])} of its passes, physical {show(race['physical'])}"
    for look in found["prune"]:
        text = f"pruning after step {look['step']} by {look['scorer']} to {look['kept']}: the winner of full search in"
        text += f" {show(look['same_winner'])}, {show(look['passes_share'])} of all passes, physical"
        lines.append(f"{text} {show(look['physical'])} ({show(look['loss'], sign=True)})")
    return "\n".join(lines)


def line(name: str, width: int, cells: Sequence[str], sizes: Sequence[int]) -> str:
    """One line of a table: a name and cells, each left-aligned in its column's size."""
    return (f"{name:<{width}}" + "".join(f"{cell:<{size}}" for cell, size in zip(cells, sizes, strict=False))).rstrip()


def show(value: dict[str, float] | None, *, sign: bool = False) -> str:
    if value is None:
        return ""
    if sign:
        return f"{value['mean']:+.3f} [{value['low']:+.3f}, {value['high']:+.3f}]"
    return str(Estimate(**value))
