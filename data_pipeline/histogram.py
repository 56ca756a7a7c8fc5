"""How many clips each action has, as a table and a picture."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.tables import write_csv
from train.files import atomic

SHOWN = 40  # actions in the picture
COLOURS = ("#b8c4d0", "#d1603d")


def write_histogram(
    stem: Path, columns: Mapping[str, Sequence[Any]], counts: Sequence[str], difficulty: np.ndarray | None = None
) -> None:
    """<stem>.csv, a row per action, and <stem>.png of the largest, each written atomically.

    columns: of the table, "action" among them. counts: the one or two columns that are drawn as bars; the first one
    gives the order, equal ones come by name. difficulty (A,) in [0, 1] is drawn beside them.
    """
    order = sorted(range(len(columns["action"])), key=lambda a: (-columns[counts[0]][a], columns["action"][a]))
    rows = ([values[a] for values in columns.values()] for a in order)
    write_csv(stem.with_name(f"{stem.name}.csv"), [list(columns), *rows])
    names = [columns["action"][a] for a in order]
    bars = {name: np.array([columns[name][a] for a in order], np.int64) for name in counts}
    with atomic(stem.with_name(f"{stem.name}.png")) as partial:
        _draw(partial, names, bars, None if difficulty is None else difficulty[order])


def _draw(path: Path, names: list[str], bars: Mapping[str, np.ndarray], difficulty: np.ndarray | None) -> None:
    from matplotlib.figure import Figure  # takes a second

    shown = min(len(names), SHOWN)
    figure = Figure(figsize=(10, 2 + 0.24 * shown), layout="constrained")
    axes = figure.subplots(1, 2 if difficulty is not None else 1, sharey=True, squeeze=False)[0]
    rows, height = np.arange(shown), 0.8 / len(bars)
    for number, (name, values) in enumerate(bars.items()):
        places = rows + (number - (len(bars) - 1) / 2) * height
        axes[0].barh(places, values[:shown], height, color=COLOURS[number], label=f"{name}: {values.sum()} clips")
    axes[0].set_yticks(rows, [name if len(name) <= 32 else name[:31] + "…" for name in names[:shown]], parse_math=False)
    axes[0].invert_yaxis()
    axes[0].set_xscale("symlog", linthresh=10)
    axes[0].set_xlabel("clips")
    axes[0].legend()
    if len(names) > shown:
        more = ", ".join(f"{name} {values[shown:].sum()}" for name, values in bars.items())
        axes[0].set_title(f"and {len(names) - shown} more actions: {more}", loc="left", fontsize="small")
    if difficulty is not None:
        axes[1].barh(rows, difficulty[:shown], 0.6, color="#3d6fa3")
        axes[1].set_xlim(0, 1)
        axes[1].set_xlabel("difficulty, 1 - score of the model's own clips")
    figure.savefig(path, format="png", dpi=110, metadata={"Software": None})
