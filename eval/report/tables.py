"""Results as a page, as Markdown and as text: three renderings of one list of tables, whose numbers are looked up in
the results by JSON pointer, so that they cannot say anything else than results.json.

The page is one file without a network: plots are inline SVG, clips are small mp4 inside it.
"""

import base64
import math
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from omegaconf import OmegaConf
from torch import Tensor

from eval.report.results import STRATA, TRUE
from train.clips import write_clip
from train.files import render

TEMPLATE = Path(__file__).with_name("report.html")
MAX_WIDTH = 720  # pixels of a clip side by side in the page
MAX_BYTES = 8 * 2**20  # of all clips in the page; further ones are left out, and the page says so
LABELS = {TRUE: "true clips"}
PUBLISHED = "published"  # kind of a row with figures of a paper


@dataclass(frozen=True)
class Cell:
    text: str
    pointer: str = ""  # where the number lies in the results: "/benchmarks/sandbox/…"


@dataclass
class Table:
    title: str
    note: str
    header: list[str]
    rows: list[list[Cell]] = field(default_factory=list)
    kinds: list[str] = field(default_factory=list)  # a row's: "", "gain" or "published"
    plot: str = ""  # SVG

    def add(self, cells: Sequence[Cell], kind: str = "") -> None:
        self.rows.append(list(cells))
        self.kinds.append(kind)


# Numbers


def look_up(results: Any, pointer: str) -> Any:
    """The value at a JSON pointer (RFC 6901)."""
    for part in pointer.split("/")[1:]:
        part = part.replace("~1", "/").replace("~0", "~")
        results = results[int(part)] if isinstance(results, list) else results[part]
    return results


def point(*parts: Any) -> str:
    return "".join("/" + str(part).replace("~", "~0").replace("/", "~1") for part in parts)


def show(value: Any, *, sign: bool = False) -> str:
    """A number, or an estimate with its interval: three decimals, above 10 one. Empty for None."""
    if value is None:
        return ""
    if isinstance(value, Mapping):
        mean, low, high = (show(value[name], sign=sign) for name in ("mean", "low", "high"))
        return f"{mean} [{low}, {high}]"
    plus = "+" if sign else ""
    if isinstance(value, int):
        return f"{value:{plus}d}"
    text = f"{value:{plus}.1f}" if abs(value) >= 10 else f"{value:{plus}.3f}"
    return text if float(text) else "0.000"  # without the sign of a rounded nothing


def show_p(value: float | None) -> str:
    if value is None:
        return ""
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def number(results: Any, *parts: Any, sign: bool = False) -> Cell:
    return Cell(show(look_up(results, point(*parts)), sign=sign), point(*parts))


# Tables


def tables(results: Mapping[str, Any], name: str) -> list[Table]:
    """All tables of one benchmark."""
    found = results["benchmarks"][name]
    if not found["models"]:
        return []
    made = [figure_table(results, name)]
    for model, gain in found["gains"].items():
        if gain["categories"]:
            made.append(category_table(results, name, model))
        if gain["motion"]:
            made.append(motion_table(results, name, model))
    made.append(cost_table(results, name))
    if any(one["errors"] for one in found["models"].values()):
        made.append(error_table(results, name))
    return made


def figure_table(results: Mapping[str, Any], name: str) -> Table:
    """Models, gains and published figures, one row each."""
    place, found = ("benchmarks", name), results["benchmarks"][name]
    names = found["figures"]
    arrows = [figure + (" ↓" if figure in found["lower_is_better"] else "") for figure in names]
    seeds = max(1, len(results["seeds"]))
    prompts = f"{found['prompts']} prompts"
    prompts += f" in {found['clusters']} clusters" if found["clusters"] < found["prompts"] else ""
    note = f"{prompts}, {seeds} seed{'s' if seeds > 1 else ''}; mean [95% interval]"
    note += "; ↓ lower is better" if found["lower_is_better"] else ""
    table = Table("Figures", note, ["", *arrows, "clips", "missing"])
    for model, one in found["models"].items():
        own = (*place, "models", model)
        cells = [with_count(results, (*own, "figures", figure), one["clips"] - one["missing"]) for figure in names]
        counts = [number(results, *own, "clips"), number(results, *own, "missing")]
        table.add([Cell(LABELS.get(model, model)), *cells, *counts])
    for model, gain in found["gains"].items():
        own = (*place, "gains", model, "figures")
        label = "gain, paired" if len(found["gains"]) == 1 else f"gain of {model}, paired"
        used = next((one for one in gain["figures"].values() if one), None)
        counts = [Cell(""), Cell("")]
        if used:
            first = next(figure for figure, one in gain["figures"].items() if one)
            counts = [number(results, *own, first, "clips"), number(results, *own, first, "missing")]
        cells = [with_count(results, (*own, figure), used["clips"] if used else 0, sign=True) for figure in names]
        table.add([Cell(label), *cells, *counts], "gain")
        tests = [
            Cell(
                f"p {show_p(one['p'])}" if one["p"] is not None and one["p"] >= 0.001 else "p < 0.001",
                point(*own, figure, "p"),
            )
            if (one := gain["figures"][figure])
            else Cell("")
            for figure in names
        ]
        table.add([Cell("two-sided p"), *tests, Cell(""), Cell("")], "test")
    for place_of, one in enumerate(found["published"]):
        own = (*place, "published", place_of, "values")
        cells = [number(results, *own, figure) if figure in one["values"] else Cell("") for figure in names]
        if any(cell.text for cell in cells):
            table.add([Cell(f"{one['model']} (published: {one['source']})"), *cells, Cell(""), Cell("")], PUBLISHED)
    table.plot = figure_plot(found)
    return table


def category_table(results: Mapping[str, Any], name: str, model: str) -> Table:
    found = results["benchmarks"][name]
    first = found["figures"][0]
    table = Table(f"By category: {first}", "", ["", "base", model, "gain, paired", "p", "pairs", "missing"])
    rows = []
    for category in found["gains"][model]["categories"]:
        place = ("benchmarks", name, "gains", model, "categories", category, first)
        gain = look_up(results, point(*place))
        ends = [Cell("")] * 4
        if gain:
            ends = [number(results, *place, sign=True), Cell(show_p(gain["p"]), point(*place, "p"))]
            ends += [number(results, *place, "clips"), number(results, *place, "missing")]
            rows.append((category or "(none)", gain))
        cells = [category_cell(results, name, which, category, first) for which in ("base", model)]
        table.add([Cell(category or "(none)"), *cells, *ends])
    table.plot = interval_plot(rows, zero=True, label=f"gain in {first}")
    return table


def category_cell(results: Mapping[str, Any], name: str, model: str, category: str, figure: str) -> Cell:
    if category not in results["benchmarks"][name]["models"][model]["categories"]:
        return Cell("")
    return number(results, "benchmarks", name, "models", model, "categories", category, figure)


def motion_table(results: Mapping[str, Any], name: str, model: str) -> Table:
    """The control for motion, every figure."""
    found, place = results["benchmarks"][name], ("benchmarks", name, "gains", model, "motion")
    low, high = found["gains"][model]["motion"]["edges"]
    note = (
        f"clips of both models split by motion energy at the 33rd and 67th percentile of all, {low:.4f} and {high:.4f}"
        " (mean change of a pixel, as a share of the full range); within a third the means of unpaired clips are"
        " compared. A gain that remains here is not one of moving more or less."
    )
    table = Table("At equal motion", note, ["", "figure", "base", model, "difference", "clips of both"])
    for figure in found["figures"]:
        for third in STRATA:
            own = (*place, "strata", third)
            cells = [number(results, *own, which, figure) for which in ("base", "figures")]
            clips = [look_up(results, point(*own, which, figure)) for which in ("base", "figures")]
            counts = Cell(", ".join(str(one["clips"]) if one else "0" for one in clips))
            table.add(
                [
                    Cell(f"{third} motion"),
                    Cell(figure),
                    *cells,
                    number(results, *own, "gain", figure, sign=True),
                    counts,
                ]
            )
        mean = number(results, *place, "all", figure, sign=True)
        table.add([Cell("mean of the thirds"), Cell(figure), Cell(""), Cell(""), mean, Cell("")], "gain")
    return table


def cost_table(results: Mapping[str, Any], name: str) -> Table:
    found, place = results["benchmarks"][name], ("benchmarks", name, "compute")
    header = ["", "clips made", "seconds of generation", "network passes", "seconds of scoring"]
    table = Table("Compute", "in this and earlier runs; generation is counted on each GPU or CPU and added", header)
    for model in found["compute"]:
        keys = ("clips_made", "seconds", "passes", "scoring_seconds")
        known = found["compute"][model]
        cells = [number(results, *place, model, key) if key in known else Cell("") for key in keys]
        table.add([Cell(LABELS.get(model, model)), *cells])
    return table


def error_table(results: Mapping[str, Any], name: str) -> Table:
    found = results["benchmarks"][name]
    count = sum(one["missing"] for one in found["models"].values())
    title = f"{count} clip{'s' if count > 1 else ''} without a score"
    note = "in no mean above; to make a damaged clip again delete it, and run again to score what failed"
    table = Table(title, note, ["model", "prompt", "seed", "what is wrong"])
    for model, one in found["models"].items():
        for error in one["errors"]:
            table.add(
                [Cell(text) for text in (LABELS.get(model, model), error["key"], str(error["seed"]), error["error"])]
            )
    return table


def with_count(results: Mapping[str, Any], place: tuple, usual: int, *, sign: bool = False) -> Cell:
    """A figure, with the number of clips behind it where it is another one than the row's."""
    cell, value = number(results, *place, sign=sign), look_up(results, point(*place))
    if value is not None and value["clips"] != usual:
        return Cell(f"{cell.text} ({value['clips']})", cell.pointer)
    return cell


def facts(results: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What the run was made of."""
    lora, compute = results["lora"], results["compute"]
    sampler = results["settings"]["sampler"]
    tuned = "none: the base model alone"
    if lora:
        shape = lora["shape"]
        if isinstance(shape, Mapping):
            shape = f"rank {shape['rank']}, alpha {shape['alpha']:g}"
        tuned = f"{lora['path']} ({shape}, {lora['expert']}, sha256 {lora['sha256'][:12]}…)"
    return [
        ("Recipe", results["recipe"] or "none"),
        ("Date", results["date"]),
        ("Backbone", results["backbone"]),
        ("LoRA", tuned),
        ("Seeds", ", ".join(map(str, results["seeds"]))),
        ("Sampler", f"{sampler['steps']} steps, guidance {sampler['guidance']:g}, shift {sampler['shift']:g}"),
        ("Device", f"{compute['device']}, {compute['ranks']} process{'es' if compute['ranks'] > 1 else ''}"),
        ("This run", f"{compute['made_now']} clips made, {compute['seconds']:.0f} s in all"),
    ]


# Plots


def figure_plot(found: Mapping[str, Any]) -> str:
    """The first figure of every model with its interval, and papers' figures as open marks."""
    first = found["figures"][0]
    rows = [(LABELS.get(name, name), one["figures"][first]) for name, one in found["models"].items()]
    rows = [row for row in rows if row[1]]
    rows += [
        (f"{one['model']} (published)", {"mean": one["values"][first], "low": None, "high": None})
        for one in found["published"]
        if first in one["values"]
    ]
    return interval_plot(rows, zero=False, label=first)


def interval_plot(rows: Sequence[tuple[str, Mapping[str, Any]]], *, zero: bool, label: str) -> str:
    """Dots with intervals, one row each, as SVG; open ones without an interval. `zero` draws a line there."""
    if not rows:
        return ""
    ends = [one[name] for _, one in rows for name in ("mean", "low", "high") if one[name] is not None]
    low, high = min([*ends, 0.0]), max([*ends, 0.0])
    ticks = nice_ticks(low, high)
    low, high = min(low, ticks[0]), max(high, ticks[-1])
    left, right, line, width = 230, 20, 22, 720
    height = line * len(rows) + 46

    def x(value: float) -> float:
        return round(left + (value - low) / ((high - low) or 1) * (width - left - right), 1)

    parts = [f'<svg viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img">']
    for tick in ticks:
        kind = "zero" if zero and tick == 0 else "grid"
        parts.append(f'<line class="{kind}" x1="{x(tick)}" x2="{x(tick)}" y1="4" y2="{height - 38}"/>')
        parts.append(f'<text class="tick" x="{x(tick)}" y="{height - 24}" text-anchor="middle">{tick:g}</text>')
    middle = (left + width - right) / 2
    parts.append(f'<text class="tick" x="{middle}" y="{height - 6}" text-anchor="middle">{escape(label)}</text>')
    for place, (name, one) in enumerate(rows):
        y = 4 + line * (place + 0.5)
        shown = name if len(name) <= 36 else name[:35] + "…"
        parts.append(f'<text x="{left - 12}" y="{y + 4}" text-anchor="end">{escape(shown)}</text>')
        kind = "published" if one["low"] is None else "ours"
        if one["low"] is not None:
            parts.append(f'<line class="interval" x1="{x(one["low"])}" x2="{x(one["high"])}" y1="{y}" y2="{y}"/>')
        parts.append(f'<circle class="{kind}" cx="{x(one["mean"])}" cy="{y}" r="4"/>')
    return "".join([*parts, "</svg>"])


def nice_ticks(low: float, high: float) -> list[float]:
    """Round numbers from at most `low` to at least `high`, five or so."""
    raw = (high - low) / 5 or 1
    scale = 10 ** math.floor(math.log10(raw))
    step = scale * next(factor for factor in (1, 2, 5, 10) if factor * scale >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(number * step, 10) for number in range(first, last + 1)]


def escape(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;").replace('"', "&quot;")


# Renderings


def html(results: Mapping[str, Any], clips: Mapping[str, Sequence[tuple[str, Tensor]]]) -> str:
    """The page; clips: of each benchmark, (prompt, side by side (T, H, W, 3) uint8)."""
    left = MAX_BYTES
    sections = []
    for name, found in results["benchmarks"].items():
        embedded, left_out = [], 0
        for prompt, frames in clips.get(name, []):
            data = encode(frames, found["video"]["fps"])
            if len(data) > left:
                left_out += 1
                continue
            left -= len(data)
            embedded.append((prompt, data))
        section = {"name": name, "found": found, "tables": tables(results, name), "clips": embedded}
        sections.append(section | {"left_out": left_out})
    settings = OmegaConf.to_yaml(OmegaConf.create(dict(results["settings"])))
    title = f"Evaluation: {results['recipe']}" if results["recipe"] else "Evaluation"
    return render(TEMPLATE, title=title, facts=facts(results), sections=sections, settings=settings)


def encode(frames: Tensor, fps: float) -> str:
    """Frames (T, H, W, 3) uint8 as the base64 of a small mp4 that browsers play."""
    height, width = frames.shape[1:3]
    if width > MAX_WIDTH:
        size = (round(height * MAX_WIDTH / width / 2) * 2, MAX_WIDTH)
        images = F.interpolate(frames.permute(0, 3, 1, 2), size=size, mode="bicubic", antialias=True)
        frames = images.permute(0, 2, 3, 1)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "clip.mp4"
        write_clip(path, frames, fps)
        return base64.b64encode(path.read_bytes()).decode("ascii")


def markdown(results: Mapping[str, Any]) -> str:
    lines = ["# Evaluation", "", *(f"- {name}: {value}" for name, value in facts(results))]
    for name, found in results["benchmarks"].items():
        lines += ["", f"## {name}", ""]
        lines += [f"**Left out or unfinished:** {found['problem']}", ""] if found["problem"] else []
        for table in tables(results, name):
            lines += [f"### {table.title}", ""] + ([table.note, ""] if table.note else []) + [*rule(table), ""]
    return "\n".join(lines).rstrip() + "\n"


def rule(table: Table) -> Iterator[str]:
    """A table in Markdown; papers' figures in italics."""
    yield "| " + " | ".join(table.header) + " |"
    yield "|" + " --- |" * len(table.header)
    for cells, kind in zip(table.rows, table.kinds, strict=True):
        texts = [cell.text.replace("|", "\\|").replace("\n", " ") for cell in cells]
        yield "| " + " | ".join(f"*{text}*" if text and kind == PUBLISHED else text for text in texts) + " |"


def text(results: Mapping[str, Any]) -> str:
    """The figures and what is wrong, for the terminal."""
    lines = []
    for name, found in results["benchmarks"].items():
        if found["problem"]:
            lines.append(f"{name}: left out or unfinished: {found['problem']}")
        for table in tables(results, name):
            if table.title == "Figures":
                kept = [row for row, kind in zip(table.rows, table.kinds, strict=True) if kind != PUBLISHED]
                texts = [[f"{name}, {found['prompts']} prompts", *table.header[1:]]]
                texts += [[cell.text for cell in row] for row in kept]
                lines += columns(texts)
        for model, one in found["models"].items():
            lines += [
                f"  no score  {model} {error['key']}-{error['seed']}: {error['error']}" for error in one["errors"]
            ]
    return "\n".join(lines)


# Several runs


def comparison_table(compared: Mapping[str, Any], name: str) -> Table:
    """One benchmark of eval.report.compare."""
    found = compared["benchmarks"][name]
    names = [figure + (" ↓" if figure in found["lower_is_better"] else "") for figure in found["figures"]]
    note = f"mean [95% interval]; differences are to {': '.join(found['reference'])}, over the same prompts and seeds"
    table = Table(name, note, ["", *names, "clips", "missing"])
    for place, row in enumerate(found["rows"]):
        own = ("benchmarks", name, "rows", place)
        label = LABELS.get(row["model"], f"{row['run']}: {row['model']}")
        counts = [number(compared, *own, "clips"), number(compared, *own, "missing")]
        cells = [
            with_count(compared, (*own, "figures", one), row["clips"] - row["missing"]) for one in found["figures"]
        ]
        table.add([Cell(label), *cells, *counts])
        if row["difference"]:
            cells, used = [], next((one for one in row["difference"].values() if one), None)
            for one in found["figures"]:
                cell, value = number(compared, *own, "difference", one, sign=True), row["difference"][one]
                cells.append(Cell(f"{cell.text}, p {show_p(value['p'])}" if value else "", cell.pointer))
            counts = [Cell(str(used[key]) if used else "") for key in ("clips", "missing")]
            table.add([Cell("difference"), *cells, *counts], "gain")
    return table


def comparison_markdown(compared: Mapping[str, Any]) -> str:
    lines = []
    for name in compared["benchmarks"]:
        table = comparison_table(compared, name)
        lines += [f"## {table.title}", "", table.note, "", *rule(table), ""]
    return "\n".join(lines).rstrip() + "\n"


def comparison_html(compared: Mapping[str, Any]) -> str:
    """A page like the report's, with one table a benchmark."""
    sections = []
    for name, found in compared["benchmarks"].items():
        table = comparison_table(compared, name)
        first = found["figures"][0]
        shown = [
            (LABELS.get(row["model"], f"{row['run']}: {row['model']}"), row["figures"][first]) for row in found["rows"]
        ]
        table.plot = interval_plot([row for row in shown if row[1]], zero=False, label=first)
        empty = {"problem": "", "requirements": []}
        sections.append({"name": name, "found": empty, "tables": [table], "clips": [], "left_out": 0})
    return render(
        TEMPLATE, title="Runs compared", facts=[("Runs", ", ".join(compared["runs"]))], sections=sections, settings=""
    )


def columns(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in rows]
