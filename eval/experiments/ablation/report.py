"""The ablation's results as a table and as a figure."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from eval.experiments.search.report import show
from train.files import atomic


def table(results: dict[str, Any]) -> str:
    """The results as text: means with 95% intervals, paired differences of the physical score, the paper's figures."""
    paired = any((row.get("against_sft") or {}).get("physical") for row in results["rows"])
    heads = ("", "physical", "semantic", "gain over base", "against", "paper (table, model, figure)")
    heads += ("against SFT",) * paired
    cells = [heads]
    for row in results["rows"]:
        missing = f" (seeds {','.join(row['seeds'])})" if len(row["seeds"]) < len(results["seeds"]) else ""
        figures = (f"{f['table']} {f['model'].removeprefix('Wan2.1-')} {f['overall']:g}" for f in row["paper"])
        own = (show(row["physical"]), f"{row['semantic']['mean']:.3f}")
        other = row["against"]
        against = f"{other['row']} {show(other['physical'], sign=True)}" if other["physical"] else "-"
        differences = (show(row["gain"]["physical"], sign=True) or "-", against)
        sft = (show((row["against_sft"] or {}).get("physical"), sign=True) or "-",) if paired else ()
        cells.append((row["label"] + missing, *own, *differences, ", ".join(figures) or "-", *sft))
    widths = [max(len(line[column]) for line in cells) for column in range(len(heads))]
    lines = ["  ".join(f"{cell:<{width}}" for cell, width in zip(line, widths, strict=True)).rstrip() for line in cells]
    lines.insert(1, "  ".join("-" * width for width in widths))
    lines.append(f"seeds {results['seeds']}, {results['clips']} held-out prompts each")
    lines.append(f"device {', '.join(results['device'])}, torch {', '.join(results['torch'])}")
    lines.append("The papers' figures are of other benchmarks and scales: compare orders, not values.")
    return "\n".join(lines)


BLUE, ORANGE, BLACK = "#0072B2", "#D55E00", "#000000"  # Okabe and Ito's, told apart by colour-blind readers
COLOURS = (BLACK, BLUE, ORANGE)


def draw(results: dict[str, Any], path: Path) -> None:
    """PNG of the paired gains in the physical score: methods above, sweeps below. Readable at a width of 900 pixels."""
    gains = {row["name"]: row["gain"]["physical"] for row in results["rows"] if row["trainer"]}
    methods = [row for row in results["rows"] if row["trainer"] and not row["sweep"]]
    swept = {key: {} for key in results["defaults"]}
    for row in results["rows"]:
        if row["sweep"]:
            swept[row["sweep"]["key"]][row["sweep"]["value"]] = gains[row["name"]]
    swept = {key: points for key, points in swept.items() if points}
    lines = -(-len(swept) // 4)
    heights = [1.2 + 0.34 * max(1, len(methods))] + [1.9 * lines] * bool(swept)
    figure = Figure(figsize=(9, sum(heights)), dpi=200, layout="constrained")
    upper, *lower = figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
    axes = upper.subplots()
    points = [(gains[row["name"]], place, row["name"] == results["middle"]) for place, row in enumerate(methods)]
    _points(axes, points, horizontal=True)
    axes.set_yticks(range(len(methods)), [row["label"] for row in methods])
    axes.set_ylim(len(methods) - 0.4, -0.6)
    base = next((row for row in results["rows"] if row["name"] == "base"), None)
    absolute = f" ({base['physical']['mean']:.3f})" if base else ""
    axes.axvline(0, color=BLACK, linestyle="--", linewidth=1, label=f"base model{absolute}")
    if "sft" in gains:
        axes.axvline(gains["sft"]["mean"], color=ORANGE, linestyle=":", linewidth=1.8, label="LoRA-SFT")
    seeds = len(results["seeds"])
    axes.set_xlabel(f"gain in the physical score, 95% interval over {seeds} x {results['clips']} paired clips")
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2, frameon=False)
    panels = np.empty((0, 1))  # rows of axes
    if swept:
        panels = lower[0].subplots(lines, min(4, len(swept)), sharey=True, squeeze=False)
    for panel in panels[:, 0]:
        panel.set_ylabel("gain")
    for panel, (key, points) in zip(panels.flat, swept.items(), strict=False):
        middle = {results["defaults"][key]: gains[results["middle"]]} if results["middle"] in gains else {}
        shown = sorted({**points, **middle}.items())
        if key in ("beta", "trajectory", "relational"):
            panel.set_xscale("log")
        panel.plot([value for value, _ in shown], [gain["mean"] for _, gain in shown], color=BLUE, linewidth=1)
        _points(panel, [(gain, value, value in middle) for value, gain in shown], horizontal=False)
        panel.set_xticks([value for value, _ in shown], [f"{value:.3g}" for value, _ in shown])
        panel.minorticks_off()
        panel.axhline(0, color=BLACK, linestyle="--", linewidth=1)
        if "sft" in gains:
            panel.axhline(gains["sft"]["mean"], color=ORANGE, linestyle=":", linewidth=1.8)
        panel.set_title(key, fontsize=10)
    for panel in panels.flat[len(swept) :]:
        panel.set_axis_off()
    with atomic(path) as aside:
        figure.savefig(aside, format="png")


def draw_passes(results: dict[str, Any], path: Path) -> None:
    """PNG of the physical score against the network passes that a prompt's losers take, by training steps; rows of
    unknown passes are left out."""
    usual = "as the recipe"
    by_steps: dict[str, list[dict[str, Any]]] = {}
    for row in results["rows"]:
        if row.get("passes") is not None:
            given = [value.partition("=")[2] for value in row["overrides"] if value.startswith("optim.steps=")]
            by_steps.setdefault(given[-1] if given else usual, []).append(row)
    figure = Figure(figsize=(9, 5), dpi=200, layout="constrained")
    axes = figure.subplots()
    for steps, colour in zip(sorted(by_steps, key=lambda key: (key != usual, key)), COLOURS, strict=False):
        rows = by_steps[steps]
        places, means = [row["passes"] for row in rows], [row["physical"]["mean"] for row in rows]
        reach = [[abs(row["physical"][end] - row["physical"]["mean"]) for row in rows] for end in ("low", "high")]
        axes.errorbar(places, means, reach, fmt="o", color=colour, capsize=2.5, label=f"training steps: {steps}")
        for row, place, mean in zip(rows, places, means, strict=True):
            axes.annotate(row["name"], (place, mean), (4, 4), textcoords="offset points", fontsize=7)
    axes.set_xscale("symlog", linthresh=1)
    ticks = sorted({row["passes"] for rows in by_steps.values() for row in rows})
    axes.set_xlim(-0.2, 1.6 * ticks[-1])
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.set_xlabel("network passes per prompt for its losers")
    axes.set_ylabel(f"physical score, 95% interval over {len(results['seeds'])} x {results['clips']} clips")
    axes.legend(frameon=False)
    with atomic(path) as aside:
        figure.savefig(aside, format="png")


def _points(axes: Any, points: Sequence[tuple[dict[str, float], float, bool]], *, horizontal: bool) -> None:
    """Gains with intervals at places; the middle of the sweeps is a filled diamond."""
    for gain, place, is_middle in points:
        reach = [[gain["mean"] - gain["low"]], [gain["high"] - gain["mean"]]]
        marker = {"marker": "D", "markersize": 6} if is_middle else {"marker": "o", "markersize": 5}
        fill = BLUE if is_middle else "white"
        style = {"color": BLUE, "markerfacecolor": fill, "capsize": 2.5, "linewidth": 1.4, **marker}
        if horizontal:
            axes.errorbar([gain["mean"]], [place], xerr=reach, **style)
        else:
            axes.errorbar([place], [gain["mean"]], yerr=reach, **style)
