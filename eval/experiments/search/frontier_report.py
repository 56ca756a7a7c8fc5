"""The frontier's rows as figures, as text and as a picture."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.transforms import Bbox

from eval.experiments.search.report import estimate, line, show
from train.files import atomic

PLAIN = "one clip"  # the row that the others' gains are over
FIELDS = ("physical", "semantic", "motion")  # of each clip
BACKWARD = 2  # passes that a backward one counts beside its forward one: once more forward, and back
COLOURS = {"search": "#0072B2", "guidance": "#009E73", "refinement": "#D55E00"}  # Okabe and Ito's
# Where a row's label may stand, from its point: offset in points, and the side that is there.
PLACES = [((side * 5, up), "left" if side > 0 else "right") for up in (4, -10, 12, -18) for side in (1, -1)]

Units = Mapping[int, Sequence[Mapping[str, Any]]]  # by seed: units in order, their FIELDS (prompts,) and cost


def summary(row: Units, plain: Units) -> dict[str, Any]:
    """A row's means, its gains over the same clips as they are, and the cost of one clip.

    By hand: 3 passes forward of which 1 has a backward one count 5.
    """
    units = [unit for seed in row for unit in row[seed]]
    values = {key: np.concatenate([unit[key] for unit in units]) for key in FIELDS}
    before = {key: np.concatenate([unit[key] for seed in row for unit in plain[seed]]) for key in FIELDS}
    found: dict[str, Any] = {key: estimate(values[key]) for key in ("physical", "semantic")}
    found["gain"] = estimate(values["physical"] - before["physical"])
    found["gain_semantic"] = estimate(values["semantic"] - before["semantic"])
    start = 0
    found["gain_by_seed"] = {}
    for seed, some in row.items():
        stop = start + sum(len(unit["physical"]) for unit in some)
        gains = values["physical"][start:stop] - before["physical"][start:stop]
        found["gain_by_seed"][str(seed)], start = float(gains.mean()), stop
    found["motion"] = float(values["motion"].mean() / before["motion"].mean())
    cost = {
        key: sum(unit[key] for unit in units) / len(values["physical"]) for key in ("passes", "backward", "seconds")
    }
    return found | cost | {"cost": cost["passes"] + BACKWARD * cost["backward"], "clips": len(values["physical"])}


def kind(name: str) -> str:
    """Of COLOURS."""
    return "search" if name.startswith("best of") else "guidance" if name == "guidance" else "refinement"


def table(results: dict[str, Any]) -> str:
    """Rows by cost."""
    rows = dict(sorted(results["rows"].items(), key=lambda item: item[1]["cost"]))
    width, sizes = max(map(len, rows), default=0) + 2, (8, 24, 10, 24, 8, 8, 8)
    heads = ("cost", "gain, physical", "semantic", "physical", "motion", "clips", "seconds")
    lines = [line("", width, heads, sizes)]
    for name, row in rows.items():
        cells = [f"{row['cost']:.0f}", show(row["gain"], sign=True), f"{row['gain_semantic']['mean']:+.3f}"]
        cells += [show(row["physical"]), f"{row['motion']:.2f}", str(row["clips"]), f"{row['seconds']:.2f}"]
        lines.append(line(name, width, cells, sizes))
    lines.append(f"{len(results['seeds'])} seeds of {results['prompts']} prompts; cost: forward passes of one clip")
    return "\n".join(lines)


def draw(results: dict[str, Any], path: Path) -> None:
    """PNG of the gain in the physical score by the cost, on a logarithmic scale, with 95% intervals."""
    figure = Figure(figsize=(9, 5.5), dpi=160, layout="constrained")
    axes, seen = figure.subplots(), set()
    for name, row in results["rows"].items():
        if name == PLAIN:
            continue
        gain, what = row["gain"], kind(name)
        error = [[gain["mean"] - gain["low"]], [gain["high"] - gain["mean"]]]
        label = None if what in seen else what
        axes.errorbar(row["cost"], gain["mean"], yerr=error, fmt="o", color=COLOURS[what], label=label, capsize=2)
        seen.add(what)
    costs = [row["cost"] for row in results["rows"].values()]
    axes.set_xscale("log")
    axes.set_xticks(ticks := [10 * 2**power for power in range(10)], list(map(str, ticks)))
    axes.minorticks_off()
    axes.set_xlim(0.75 * min(costs, default=10), 1.6 * max(costs, default=10))
    axes.axhline(0, color="black", linestyle="--", linewidth=1)
    clips = results["rows"].get(PLAIN, {}).get("clips", 0)
    axes.set_xlabel("network passes of one clip, backward ones as two")
    axes.set_ylabel(f"gain in the physical score, 95% interval over {clips} paired clips")
    if seen:
        axes.legend(frameon=False)
    figure.draw_without_rendering()  # where everything is
    taken: list[Bbox] = []
    for name, row in results["rows"].items():
        short = name.replace(" before the end", " early").replace("by one pass", "1 pass")
        for offset, side in PLACES if name != PLAIN else ():
            place = {"textcoords": "offset points", "fontsize": 7, "ha": side}
            label = axes.annotate(short, (row["cost"], row["gain"]["mean"]), offset, **place)
            box = label.get_window_extent()
            if not any(box.overlaps(other) for other in taken) or offset == PLACES[-1][0]:
                taken.append(box)
                break
            label.remove()
    with atomic(path) as aside:
        figure.savefig(aside, format="png")
