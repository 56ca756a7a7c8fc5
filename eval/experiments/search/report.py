"""What a search found: strategies against the truth, with intervals, within motion strata, and what they cost.

Every figure is a mean over prompts with a 95% bootstrap interval over prompts. `random` is the mean over all of a
prompt's candidates, which is what a choice by lot gives on average, and `oracle` the best of them by the truth: no
scorer can do better. Gains are paired, prompt by prompt.

Motion strata (Proprio, table 9): the candidates of all prompts are split into thirds by motion energy, and within a
prompt and a third a scorer's choice is compared with that third's mean. So what is gained there is not gained by
choosing more or less motion; "most motion" keeps what it gains within a third. Prompts with fewer than two candidates
in a third do not count there.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from eval.report.intervals import Estimate, bootstrap_mean
from eval.search.candidates import ranks
from train.files import write_text

STRATA = ("low", "medium", "high")
BASELINE = "most_motion"
ASPECTS = ("physical", "semantic")


def results(records: Sequence[dict[str, Any]], scorers: Sequence[str], chosen_by: str) -> dict[str, Any]:
    """All figures, as plain JSON values, of the records of all prompts."""
    truth = {name: np.array([record["truth"][name] for record in records]) for name in ASPECTS}  # (P, N)
    physical, count = truth["physical"], truth["physical"].shape[1]
    bins = strata(np.array([record["motion"] for record in records]))
    values = {name: np.array([record["scorers"][name]["values"] for record in records]) for name in scorers}
    picked = {name: found.argmin(axis=1) for name, found in values.items()}
    random = physical.mean(axis=1)
    baseline = _take(physical, picked[BASELINE]) if BASELINE in picked else None
    rows: dict[str, dict[str, Any]] = {}
    for name in ["oracle", "random", *[name for name in scorers if name != "random"]]:
        rows[name] = row = {}
        if name == "random":
            best = {aspect: found.mean(axis=1) for aspect, found in truth.items()}
        else:
            index = physical.argmax(axis=1) if name == "oracle" else picked[name]
            best = {aspect: _take(found, index) for aspect, found in truth.items()}
        row |= {aspect: estimate(found) for aspect, found in best.items()}
        if name != "random":
            row["over_random"] = estimate(best["physical"] - random)
            if baseline is not None and name != BASELINE:
                row["over_most_motion"] = estimate(best["physical"] - baseline)
        if name in values and name != "random":
            row["strata"] = stratified(values[name], physical, bins)
            row["correlation"] = estimate([-rho for rho in map(spearman, values[name], physical) if rho is not None])
        if name in values:
            row["passes"] = float(np.mean([record["scorers"][name]["passes"] for record in records])) / count
            row["seconds"] = float(np.mean([record["scorers"][name]["seconds"] for record in records])) / count
    generation = {
        key: float(np.mean([record["generation"][key] for record in records])) / count for key in ("passes", "seconds")
    }
    found = {"prompts": len(records), "candidates": count, "chosen_by": chosen_by, "generation": generation}
    found |= {"scorers": rows, "race": None, "prune": []}
    full = [record["scorers"][chosen_by] for record in records]
    if all("race" in record for record in records):
        found["race"] = {
            "same_winner": estimate([r["race"]["chosen"] == f["chosen"] for r, f in zip(records, full, strict=True)]),
            "passes_share": estimate([r["race"]["passes"] / f["passes"] for r, f in zip(records, full, strict=True)]),
            "physical": estimate(_take(physical, np.array([record["race"]["chosen"] for record in records]))),
        }
    for looks in zip(*[record.get("prune", []) for record in records], strict=True):
        whole = [r["generation"]["passes"] + f["passes"] for r, f in zip(records, full, strict=True)]
        chosen = np.array([look["chosen"] for look in looks])
        same = [look["chosen"] == f["chosen"] for look, f in zip(looks, full, strict=True)]
        found["prune"].append(
            {
                "step": looks[0]["step"],
                "scorer": looks[0]["scorer"],
                "kept": len(looks[0]["kept"]),
                "same_winner": estimate(same),
                "passes_share": estimate([look["passes"] / all_of for look, all_of in zip(looks, whole, strict=True)]),
                "physical": estimate(_take(physical, chosen)),
                "loss": estimate(_take(physical, chosen) - _take(physical, picked[chosen_by])),
            }
        )
    return found


def estimate(values: Sequence[float] | NDArray) -> dict[str, float] | None:
    """Mean and interval as plain JSON; None where there are no values."""
    values = np.asarray(values, dtype=np.float64)
    if not len(values):
        return None
    found = bootstrap_mean(values)
    return {"mean": found.mean, "low": found.low, "high": found.high}


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
    a, b = (ranks(torch.from_numpy(np.asarray(values, dtype=np.float64))).numpy() for values in (first, second))
    a, b = a - a.mean(), b - b.mean()
    scale = np.sqrt((a**2).sum() * (b**2).sum())
    return float((a * b).sum() / scale) if scale > 0 else None


def _take(values: NDArray, index: NDArray) -> NDArray:
    """values (P, N) at index (P,)."""
    return values[np.arange(len(values)), index]


# As text


def table(found: dict[str, Any]) -> str:
    """The results as text: means with 95% intervals."""
    columns: list[tuple[str, int, Callable[[dict], str]]] = [
        ("physical", 22, lambda row: show(row["physical"])),
        ("semantic", 22, lambda row: show(row["semantic"])),
        ("over random", 24, lambda row: show(row.get("over_random"), sign=True)),
        ("over most motion", 24, lambda row: show(row.get("over_most_motion"), sign=True)),
        ("within motion strata", 24, lambda row: show(row.get("strata", {}).get("all"), sign=True)),
        ("rank correlation", 24, lambda row: show(row.get("correlation"), sign=True)),
        ("passes", 8, lambda row: f"{row['passes']:.0f}" if "passes" in row else ""),
        ("seconds", 8, lambda row: f"{row['seconds']:.3f}" if "seconds" in row else ""),
    ]
    width = max(len(name) for name in found["scorers"]) + 4
    cost = found["generation"]
    lines = [
        f"{found['prompts']} prompts, best of {found['candidates']}; a candidate takes {cost['passes']:.0f} network"
        f" passes and {cost['seconds']:.3f} s to generate, to score what stands at the end of its line",
        f"{'chosen by':<{width}}" + "".join(f"{name:<{size}}" for name, size, _ in columns),
    ]
    for name, row in found["scorers"].items():
        mark = "* " if name == found["chosen_by"] else "  "
        lines.append(f"{mark + name:<{width}}" + "".join(f"{cell(row):<{size}}" for _, size, cell in columns))
    lines += ["", "gain within a third of equal motion"]
    lines.append(f"{'':<{width}}" + "".join(f"{name:<24}" for name in STRATA))
    for name, row in found["scorers"].items():
        if "strata" in row:
            cells = "".join(f"{show(row['strata'][third], sign=True):<24}" for third in STRATA)
            lines.append(f"{'  ' + name:<{width}}{cells}")
    if race := found["race"]:
        lines += ["", f"racing {found['chosen_by']}: the winner of full scoring in {show(race['same_winner'])} of"]
        lines[-1] += f" prompts, for {show(race['passes_share'])} of its passes, physical {show(race['physical'])}"
    for look in found["prune"]:
        line = f"pruning after step {look['step']} by {look['scorer']} to {look['kept']}: the winner of full search in"
        line += f" {show(look['same_winner'])}, {show(look['passes_share'])} of all passes, physical"
        lines.append(f"{line} {show(look['physical'])} ({show(look['loss'], sign=True)})")
    return "\n".join(line.rstrip() for line in lines)


def show(value: dict[str, float] | None, *, sign: bool = False) -> str:
    if value is None:
        return ""
    if sign:
        return f"{value['mean']:+.3f} [{value['low']:+.3f}, {value['high']:+.3f}]"
    return str(Estimate(**value))


def write(folder: Path, found: dict[str, Any], text: str) -> None:
    write_text(folder / "results.json", json.dumps(found, indent=1) + "\n")
    write_text(folder / "table.txt", text + "\n")
