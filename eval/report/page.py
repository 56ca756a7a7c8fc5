"""Results as a page: one file without a network, plots as inline SVG and clips as small mp4 inside it."""

import base64
import io
import re
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from omegaconf import OmegaConf
from torch import Tensor

from eval.report.tables import Table, comparison_table, facts, tables
from train.clips import write_clip
from train.files import render

TEMPLATE = Path(__file__).with_name("report.html")
MAX_WIDTH = 720  # pixels of a clip side by side in the page
MAX_BYTES = 8 * 2**20  # of all clips in the page; further ones are left out, and the page says so
NAME_LENGTH = 36  # letters of a row's name in a plot
ACCENT, FAINT = "#1f5fa8", "#666d78"


def html(results: Mapping[str, Any], clips: Mapping[str, Sequence[tuple[str, Tensor]]]) -> str:
    """The page; clips: of each benchmark, (prompt, side by side (T, H, W, 3) uint8)."""
    left, sections = MAX_BYTES, []
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
    return _page(title, facts(results), sections, settings)


def comparison_html(compared: Mapping[str, Any]) -> str:
    """A page like the report's, with one table per benchmark."""
    empty = {"found": {"problem": "", "requirements": []}, "clips": [], "left_out": 0}
    sections = [{"name": name, "tables": [comparison_table(compared, name)]} | empty for name in compared["benchmarks"]]
    return _page("Runs compared", [("Runs", ", ".join(compared["runs"]))], sections, "")


def _page(title: str, facts: Sequence[tuple[str, str]], sections: Sequence[Mapping[str, Any]], settings: str) -> str:
    return render(TEMPLATE, title=title, facts=facts, sections=sections, settings=settings, plot=plot)


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


def plot(table: Table) -> str:
    """The table's estimates as SVG: dots with intervals, one row each; papers' figures as open dots. The same table
    gives the same text. Empty where nothing is plotted."""
    from matplotlib import rc_context  # late: it takes a second
    from matplotlib.figure import Figure

    if not table.plotted:
        return ""
    with rc_context({"svg.hashsalt": "physalign", "svg.fonttype": "none", "font.size": 9}):
        figure = Figure(figsize=(7.5, 0.25 * len(table.plotted) + 0.6), layout="constrained")
        axes = figure.add_subplot()
        for row, (_, one) in enumerate(table.plotted):
            published = one["low"] is None
            if not published:
                axes.plot([one["low"], one["high"]], [row, row], color=ACCENT)
            axes.plot(one["mean"], row, "o", color=FAINT if published else ACCENT, mfc="white" if published else None)
        names = [name if len(name) <= NAME_LENGTH else name[: NAME_LENGTH - 1] + "…" for name, _ in table.plotted]
        # A dollar would begin a formula.
        axes.set_yticks(range(len(names)), [name.replace("$", r"\$") for name in names])
        axes.axvline(0, color="black", linewidth=0.8)
        axes.invert_yaxis()
        axes.grid(axis="x", color="#dcdfe4")
        axes.set_axisbelow(True)
        axes.set_frame_on(False)
        axes.tick_params(length=0)
        axes.set_xlabel(table.label.replace("$", r"\$"))
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    svg = file.getvalue()
    # Inside a page an element needs no namespaces, and the page names no address.
    return re.sub(r'<metadata>.*?</metadata>|\sxmlns(:\w+)?="[^"]*"', "", svg[svg.index("<svg") :], flags=re.DOTALL)
