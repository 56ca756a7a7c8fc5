"""The ablation's results as a table and as a figure."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from eval.experiments.ablation.suite import WORLDS, World
from eval.experiments.search.report import show
from train.files import atomic


def table(results: dict[str, Any]) -> str:
    """The results as text: means with 95% intervals, paired differences, the paper's figures. Where several columns are
    compared, the differences stand in a table of their own."""
    world = WORLDS[results["recipe"]]
    lines = []
    for cells in _differences(results) if len(world.compared) > 1 else [_scores(results)]:
        widths = [max(len(line[column]) for line in cells) for column in range(len(cells[0]))]
        part = [
            "  ".join(f"{cell:<{width}}" for cell, width in zip(line, widths, strict=True)).rstrip() for line in cells
        ]
        part.insert(1, "  ".join("-" * width for width in widths))
        lines += ["", *part] if lines else part
    episodes = f"; {results['episodes']} episodes of each task, the same for all" if "episodes" in results else ""
    lines.append(f"seeds {results['seeds']}, {results['clips']} held-out prompts each{episodes}")
    for name, counts in results.get("missing", {}).items():
        lines.append(f"{name} lacks {', '.join(f'{count} of {column}' for column, count in counts.items())}")
    lines.append(f"device {', '.join(results['device'])}, torch {', '.join(results['torch'])}")
    lines.append("The papers' figures are of other benchmarks and scales: compare orders, not values.")
    return "\n".join(lines)


def _label(row: dict[str, Any], results: dict[str, Any]) -> str:
    return row["label"] + (f" (seeds {','.join(row['seeds'])})" if len(row["seeds"]) < len(results["seeds"]) else "")


def _paper(row: dict[str, Any]) -> str:
    figures = (f"{f['table']} {f['model'].removeprefix('Wan2.1-')} {f['overall']:g}" for f in row["paper"])
    return ", ".join(figures) or "-"


def _scores(results: dict[str, Any]) -> list[tuple[str, ...]]:
    """Cells of one table: both scores, and differences of the physical one."""
    paired = any((row.get("against_sft") or {}).get("physical") for row in results["rows"])
    heads = ("", "physical", "semantic", "gain over base", "against", "paper (table, model, figure)")
    cells = [heads + ("against SFT",) * paired]
    for row in results["rows"]:
        own = (show(row["physical"]), f"{row['semantic']['mean']:.3f}")
        other = row["against"]
        against = f"{other['row']} {show(other['physical'], sign=True)}" if other["physical"] else "-"
        differences = (show(row["gain"]["physical"], sign=True) or "-", against)
        sft = (show((row["against_sft"] or {}).get("physical"), sign=True) or "-",) if paired else ()
        cells.append((_label(row, results), *own, *differences, _paper(row), *sft))
    return cells


def _differences(results: dict[str, Any]) -> list[list[tuple[str, ...]]]:
    """Cells of two tables: every score, and the differences to another row."""
    world = WORLDS[results["recipe"]]
    scores = [("", *(_head(name, world) for name in world.columns))]
    less = [("", "against", *(_head(name, world) for name in world.compared), "paper (table, model, figure)")]
    for row in results["rows"]:
        label, other = _label(row, results), row["against"]
        scores.append((label, *(show(row[name]) or "-" for name in world.columns)))
        differences = [show(other[name], sign=True) or "-" for name in world.compared]
        less.append((label, other["row"] if any(map(other.get, world.compared)) else "-", *differences, _paper(row)))
    return [scores, less]


def _head(name: str, world: World) -> str:
    return name + " (less is better)" * world.columns[name].lower_is_better


BLUE, ORANGE, BLACK = "#0072B2", "#D55E00", "#000000"  # Okabe and Ito's, told apart by colour-blind readers
COLOURS = (BLACK, BLUE, ORANGE)


def draw(results: dict[str, Any], path: Path) -> None:
    """PNG of the paired gains in what is compared: methods above, sweeps below. Readable at a width of 900 pixels."""
    world = WORLDS[results["recipe"]]
    gained = [row for row in results["rows"] if any(row["gain"].values())]
    methods = [row for row in gained if not row["sweep"]]
    swept = [key for key in results["defaults"] if any(row["sweep"] and row["sweep"]["key"] == key for row in gained)]
    lines = -(-len(swept) * len(world.compared) // 4)
    heights = [1.2 + 0.34 * max(1, len(methods))] + [1.9 * lines] * bool(swept)
    figure = Figure(figsize=(9, sum(heights)), dpi=200, layout="constrained")
    upper, *lower = figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
    for number, axes in enumerate(upper.subplots(1, len(world.compared), sharey=True, squeeze=False)[0]):
        _draw_methods(axes, methods, results, world.compared[number])
    if swept:
        columns = min(4, len(swept) * len(world.compared))
        panels = lower[0].subplots(lines, columns, sharey=len(world.compared) == 1, squeeze=False)
        _draw_sweeps(panels, swept, gained, results)
    with atomic(path) as aside:
        figure.savefig(aside, format="png")


def _draw_methods(axes: Any, methods: Sequence[dict[str, Any]], results: dict[str, Any], name: str) -> None:
    """Gains of the rows in one column of the scores."""
    alone = len(WORLDS[results["recipe"]].compared) == 1
    gains = {row["name"]: row["gain"][name] for row in methods}
    places = {row["name"]: place for place, row in enumerate(methods)}
    points = [(gain, places[row], row == results["middle"]) for row, gain in gains.items() if gain]
    _points(axes, points, horizontal=True)
    axes.set_yticks(range(len(methods)), [row["label"] for row in methods])
    axes.set_ylim(len(methods) - 0.4, -0.6)
    base = next((row for row in results["rows"] if row["name"] == "base"), None)
    absolute = f" ({base[name]['mean']:.3f})" if base else ""
    axes.axvline(0, color=BLACK, linestyle="--", linewidth=1, label=f"base model{absolute}")
    if gains.get("sft"):
        axes.axvline(gains["sft"]["mean"], color=ORANGE, linestyle=":", linewidth=1.8, label="LoRA-SFT")
    if alone:
        seeds = len(results["seeds"])
        axes.set_xlabel(f"gain in the {name} score, 95% interval over {seeds} x {results['clips']} paired clips")
    else:
        axes.set_xlabel(f"change of {_head(name, WORLDS[results['recipe']])}", fontsize=8)
        axes.tick_params(labelsize=8)
        axes.locator_params(axis="x", nbins=4)
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2 if alone else 1, frameon=False, **_size(alone))


def _size(alone: bool) -> dict[str, int]:
    return {} if alone else {"fontsize": 8}


def _draw_sweeps(panels: Any, swept: Sequence[str], rows: Sequence[dict[str, Any]], results: dict[str, Any]) -> None:
    """Gains by the value of each key that is swept, of each compared column."""
    compared = WORLDS[results["recipe"]].compared
    wanted = [(name, key) for name in compared for key in swept]
    for panel in panels[:, 0]:
        panel.set_ylabel("gain")
    for panel, (name, key) in zip(panels.flat, wanted, strict=False):
        gains = {row["name"]: row["gain"][name] for row in rows}
        points = {
            row["sweep"]["value"]: gains[row["name"]] for row in rows if row["sweep"] and row["sweep"]["key"] == key
        }
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
        panel.set_title(key if len(compared) == 1 else f"{key}: {name}", fontsize=10)
    for panel in panels.flat[len(wanted) :]:
        panel.set_axis_off()


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
