"""Results as tables, and those as Markdown and as text; `eval.report.page` makes a page of the same tables."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from eval.report.results import STRATA, TRUE

LABELS = {TRUE: "true clips"}
PUBLISHED = "published"  # kind of a row with figures of a paper


@dataclass
class Table:
    title: str
    note: str
    header: list[str]
    rows: list[list[str]] = field(default_factory=list)
    kinds: list[str] = field(default_factory=list)  # a row's: "", "gain", "test" or "published"
    # Of the plot: its label, and (name, estimate) per row; a paper's figure has no low and high.
    label: str = ""
    plotted: list[tuple[str, Mapping[str, Any]]] = field(default_factory=list)

    def add(self, cells: Sequence[str], kind: str = "") -> None:
        self.rows.append(list(cells))
        self.kinds.append(kind)


# Numbers


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


def with_count(value: Mapping[str, Any] | None, usual: int, *, sign: bool = False) -> str:
    """A figure, with the number of clips behind it where it is another one than the row's."""
    text = show(value, sign=sign)
    return f"{text} ({value['clips']})" if value is not None and value["clips"] != usual else text


def used_clips(figures: Mapping[str, Any]) -> list[str]:
    """Clips and missing ones of the first figure that has a value; empty texts where none has."""
    used = next((one for one in figures.values() if one), None)
    return [show(used["clips"]), show(used["missing"])] if used else ["", ""]


# Tables


def tables(results: Mapping[str, Any], name: str) -> list[Table]:
    """All tables of one benchmark."""
    found = results["benchmarks"][name]
    if not found["models"]:
        return []
    made = [figure_table(found, max(1, len(results["seeds"])))]
    for model, gain in found["gains"].items():
        if gain["categories"]:
            made.append(category_table(found, model))
        if gain["motion"]:
            made.append(motion_table(found, model))
    made.append(cost_table(found))
    if any(one["errors"] for one in found["models"].values()):
        made.append(error_table(found))
    return made


def with_arrows(found: Mapping[str, Any]) -> list[str]:
    return [figure + (" ↓" if figure in found["lower_is_better"] else "") for figure in found["figures"]]


def figure_table(found: Mapping[str, Any], seeds: int) -> Table:
    """Models, gains and published figures, one row each."""
    names = found["figures"]
    prompts = f"{found['prompts']} prompts"
    prompts += f" in {found['clusters']} clusters" if found["clusters"] < found["prompts"] else ""
    note = f"{prompts}, {seeds} seed{'s' if seeds > 1 else ''}; mean [95% interval]"
    note += "; ↓ lower is better" if found["lower_is_better"] else ""
    table = Table("Figures", note, ["", *with_arrows(found), "clips", "missing"], label=names[0])
    for model, one in found["models"].items():
        cells = [with_count(one["figures"][figure], one["clips"] - one["missing"]) for figure in names]
        table.add([LABELS.get(model, model), *cells, show(one["clips"]), show(one["missing"])])
        if value := one["figures"][names[0]]:
            table.plotted.append((LABELS.get(model, model), value))
    for model, gain in found["gains"].items():
        figures, counts = gain["figures"], used_clips(gain["figures"])
        label = "gain, paired" if len(found["gains"]) == 1 else f"gain of {model}, paired"
        cells = [with_count(figures[figure], int(counts[0] or 0), sign=True) for figure in names]
        table.add([label, *cells, *counts], "gain")
        tests = [f"p {show_p(one['p'])}" if (one := figures[figure]) else "" for figure in names]
        table.add(["two-sided p", *tests, "", ""], "test")
    for one in found["published"]:
        cells = [show(one["values"].get(figure)) for figure in names]
        if any(cells):
            table.add([f"{one['model']} (published: {one['source']})", *cells, "", ""], PUBLISHED)
        if names[0] in one["values"]:
            value = {"mean": one["values"][names[0]], "low": None, "high": None}
            table.plotted.append((f"{one['model']} (published)", value))
    return table


def category_table(found: Mapping[str, Any], model: str) -> Table:
    first = found["figures"][0]
    header = ["", "base", model, "gain, paired", "p", "pairs", "missing"]
    table = Table(f"By category: {first}", "", header, label=f"gain in {first}")
    for category, gains in found["gains"][model]["categories"].items():
        gain, name = gains[first], category or "(none)"
        cells = [show(found["models"][which]["categories"].get(category, {}).get(first)) for which in ("base", model)]
        ends = [show(gain, sign=True), show_p(gain["p"]), *used_clips({first: gain})] if gain else [""] * 4
        table.add([name, *cells, *ends])
        if gain:
            table.plotted.append((name, gain))
    return table


def motion_table(found: Mapping[str, Any], model: str) -> Table:
    """The control for motion, every figure."""
    motion = found["gains"][model]["motion"]
    low, high = motion["edges"]
    note = (
        f"clips of both models split by motion energy at the 33rd and 67th percentile of all, {low:.4f} and {high:.4f}"
        " (mean change of a pixel, as a share of the full range); within a third the means of unpaired clips are"
        " compared. A gain that remains here is not one of moving more or less."
    )
    table = Table("At equal motion", note, ["", "figure", "base", model, "difference", "clips of both"])
    for figure in found["figures"]:
        for third in STRATA:
            both = [motion["strata"][third][which][figure] for which in ("base", "figures")]
            counts = ", ".join(str(one["clips"]) if one else "0" for one in both)
            gain = show(motion["strata"][third]["gain"][figure], sign=True)
            table.add([f"{third} motion", figure, *map(show, both), gain, counts])
        table.add(["mean of the thirds", figure, "", "", show(motion["all"][figure], sign=True), ""], "gain")
    return table


def cost_table(found: Mapping[str, Any]) -> Table:
    header = ["", "clips made", "seconds of generation", "network passes", "seconds of scoring"]
    table = Table("Compute", "in this and earlier runs; generation is counted on each GPU or CPU and added", header)
    for model, known in found["compute"].items():
        cells = [show(known.get(key)) for key in ("clips_made", "seconds", "passes", "scoring_seconds")]
        table.add([LABELS.get(model, model), *cells])
    return table


def error_table(found: Mapping[str, Any]) -> Table:
    count = sum(one["missing"] for one in found["models"].values())
    title = f"{count} clip{'s' if count > 1 else ''} without a score"
    note = "in no mean above; to make a damaged clip again delete it, and run again to score what failed"
    table = Table(title, note, ["model", "prompt", "seed", "what is wrong"])
    for model, one in found["models"].items():
        for error in one["errors"]:
            table.add([LABELS.get(model, model), error["key"], str(error["seed"]), error["error"]])
    return table


def facts(results: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What the run was made of."""
    lora, compute, sampler = results["lora"], results["compute"], results["settings"]["sampler"]
    tuned = "none: the base model alone"
    if lora:
        shape = lora["shape"]
        if isinstance(shape, Mapping):
            shape = f"rank {shape['rank']}, alpha {shape['alpha']:g}"
        found = lora["sha256"]
        hashes = " and ".join(one[:12] + "…" for one in (found.values() if isinstance(found, Mapping) else [found]))
        tuned = f"{lora['path']} ({shape}, {lora['expert']}, sha256 {hashes})"
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


def comparison_table(compared: Mapping[str, Any], name: str) -> Table:
    """One benchmark of eval.report.compare."""
    found = compared["benchmarks"][name]
    names = found["figures"]
    note = f"mean [95% interval]; differences are to {': '.join(found['reference'])}, over the same prompts and seeds"
    table = Table(name, note, ["", *with_arrows(found), "clips", "missing"], label=names[0])
    for row in found["rows"]:
        label = LABELS.get(row["model"], f"{row['run']}: {row['model']}")
        cells = [with_count(row["figures"][one], row["clips"] - row["missing"]) for one in names]
        table.add([label, *cells, show(row["clips"]), show(row["missing"])])
        if row["figures"][names[0]]:
            table.plotted.append((label, row["figures"][names[0]]))
        if changed := row["difference"]:
            cells = [
                f"{show(value, sign=True)}, p {show_p(value['p'])}" if (value := changed[one]) else "" for one in names
            ]
            table.add(["difference", *cells, *used_clips(changed)], "gain")
    return table


# Renderings


def markdown(results: Mapping[str, Any]) -> str:
    lines = ["# Evaluation", "", *(f"- {name}: {value}" for name, value in facts(results))]
    for name, found in results["benchmarks"].items():
        lines += ["", f"## {name}", ""]
        lines += [f"**Left out or unfinished:** {found['problem']}", ""] if found["problem"] else []
        lines += [f"Clips to watch: [{page}]({page})", ""] if (page := found.get("page")) else []
        for table in tables(results, name):
            lines += [f"### {table.title}", ""] + ([table.note, ""] if table.note else []) + [*rule(table), ""]
    return "\n".join(lines).rstrip() + "\n"


def comparison_markdown(compared: Mapping[str, Any]) -> str:
    lines = []
    for name in compared["benchmarks"]:
        table = comparison_table(compared, name)
        lines += [f"## {table.title}", "", table.note, "", *rule(table), ""]
    return "\n".join(lines).rstrip() + "\n"


def rule(table: Table) -> Iterator[str]:
    """A table in Markdown; papers' figures in italics."""
    yield "| " + " | ".join(table.header) + " |"
    yield "|" + " --- |" * len(table.header)
    for cells, kind in zip(table.rows, table.kinds, strict=True):
        texts = [cell.replace("|", "\\|").replace("\n", " ") for cell in cells]
        yield "| " + " | ".join(f"*{text}*" if text and kind == PUBLISHED else text for text in texts) + " |"


def text(results: Mapping[str, Any]) -> str:
    """The figures and what is wrong, for the terminal."""
    lines = []
    for name, found in results["benchmarks"].items():
        if found["problem"]:
            lines.append(f"{name}: left out or unfinished: {found['problem']}")
        if found["models"]:
            table = figure_table(found, 1)
            kept = [row for row, kind in zip(table.rows, table.kinds, strict=True) if kind != PUBLISHED]
            lines += columns([[f"{name}, {found['prompts']} prompts", *table.header[1:]], *kept])
        for model, one in found["models"].items():
            lines += [
                f"  no score  {model} {error['key']}-{error['seed']}: {error['error']}" for error in one["errors"]
            ]
    return "\n".join(lines)


def columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of equally wide columns, two blanks between them."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in rows]
