"""How long a step takes and where its time goes, by kind of kernel; a bar chart of what a benchmark measured."""

import statistics
import time
from collections.abc import Callable
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch._dynamo.utils import counters
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from train.tracking import peak_memory_gib

# The first kind of which a part stands in the kernel's or operator's name, in lower case: NCCL's and gloo's
# collectives, copies to the host and back, cuDNN and PyTorch's flash kernels, cuBLAS's (nvjet, cutlass, xmma) and MKL's
# products.
KINDS = {
    "communication": ("nccl", "gloo", "c10d::"),
    "copies": ("memcpy dtoh", "memcpy htod"),
    "elementwise": ("triton", "elementwise"),  # what Inductor made, even where it names an attention beside it
    "attention": ("sdpa", "flash", "fmha", "cudnn::fusion", "scaled_dot_product"),
    "matrix": ("gemm", "nvjet", "cutlass", "xmma", "splitk", "addmm", "aten::mm", "aten::bmm"),
}
REST = "elementwise"
COLOURS = ("#9467bd", "#b0558c", "#f0b35a", "#3b6ea5", "#79b4a9")  # of KINDS
BESIDE = ("communication", "copies")  # they run while the others do
WINDOW, GAP = 1.0, 1e-4  # seconds in the middle of a step that the timeline shows, and pauses that it does not


def time_step(run: Callable[[], Any], device: torch.device, repeats: int, *, where: bool = True) -> dict[str, Any]:
    """First-step seconds, median seconds of the next ones, their peak memory and graphs that only they compiled, and
    with `where`, of one more step, what `where_time_goes` says."""
    first = seconds(run, device, 1, warmup=0)
    graphs = counters["stats"]["unique_graphs"]
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    return {
        "seconds": seconds(run, device, repeats, warmup=0),
        "first_seconds": first,
        "memory_gib": peak_memory_gib(device),
        "compiled_later": counters["stats"]["unique_graphs"] - graphs,
        **(where_time_goes(run, device) if where else {}),
    }


def seconds(run: Callable[[], Any], device: torch.device, repeats: int, *, warmup: int = 2) -> float:
    """Median wall seconds of `run`, the device's work included."""
    times = []
    for index in range(warmup + repeats):
        _synchronize(device)
        start = time.perf_counter()
        run()
        _synchronize(device)
        if index >= warmup:
            times.append(time.perf_counter() - start)
    return statistics.median(times)


def sustained(run: Callable[[], Any], device: torch.device, *, span: float = 1.5) -> float:
    """Mean wall seconds of `run` in the second half of `span` seconds (on a CPU of two runs) without a pause."""
    repeats = max(2, round(span / seconds(run, device, 1, warmup=0))) if device.type == "cuda" else 2
    for index in range(repeats):
        if index == repeats // 2:
            _synchronize(device)
            start = time.perf_counter()
        run()
    _synchronize(device)
    return (time.perf_counter() - start) / (repeats - repeats // 2)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def kind_of(kernel: str) -> str:
    """Key of KINDS for a kernel's name; what is nowhere named moves or combines numbers one by one."""
    name = kernel.lower()
    return next((kind for kind, parts in KINDS.items() if any(part in name for part in parts)), REST)


def where_time_goes(run: Callable[[], Any], device: torch.device) -> dict[str, Any]:
    """`time`: seconds of device time (on a CPU of operators' own time) in one run, by kind, and on a GPU
    `copies_hidden`, those of copies while anything but copies runs. With those BESIDE the others they add up to more
    than the wall time. `timeline`, where a GPU copies: by kind what ran in WINDOW, (start, end) in seconds.
    """
    cuda = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU], acc_events=True) as profiler:
        run()
        _synchronize(device)
    totals = dict.fromkeys(KINDS, 0.0)
    for event in profiler.key_averages():
        microseconds = event.self_device_time_total if cuda else event.self_cpu_time_total
        totals[kind_of(event.key)] += microseconds / 1e6
    if not cuda:
        return {"time": totals}
    spans = {kind: [] for kind in KINDS}
    for event in profiler.events():
        if event.device_type == DeviceType.CUDA and not event.is_user_annotation:
            spans[kind_of(event.name)].append((event.time_range.start / 1e6, event.time_range.end / 1e6))
    others = [span for kind, found in spans.items() if kind != "copies" for span in found]
    totals["copies_hidden"] = overlap(spans["copies"], others)
    return {"time": totals} | ({"timeline": window(spans)} if spans["copies"] else {})


def window(spans: dict[str, list[tuple[float, float]]]) -> dict[str, list[tuple[float, float]]]:
    """What runs in the middle WINDOW seconds of all `spans`, from its start on; pauses below GAP are left out."""
    times = [time for found in spans.values() for span in found for time in span]
    begin = max(min(times), (min(times) + max(times) - WINDOW) / 2)
    shown = {}
    for kind, found in spans.items():
        near = [(start, end + GAP) for start, end in found if end > begin and start < begin + WINDOW]
        cut = ((max(start - begin, 0.0), min(end - GAP - begin, WINDOW)) for start, end in _merged(near))
        shown[kind] = [(round(start, 5), round(end, 5)) for start, end in cut]
    return shown


def overlap(spans: list[tuple[float, float]], others: list[tuple[float, float]]) -> float:
    """Time in which at least one of `spans` (start, end) and one of the `others` run."""
    ours, theirs = (_merged(found) for found in (spans, others))
    total, place = 0.0, 0
    for start, end in ours:
        while place < len(theirs) and theirs[place][1] <= start:
            place += 1
        for begin, stop in takewhile(lambda span, end=end: span[0] < end, theirs[place:]):
            total += min(end, stop) - max(start, begin)
    return total


def _merged(spans: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """The same time in spans that do not meet, in order."""
    merged: list[tuple[float, float]] = []
    for start, end in sorted(spans):
        if merged and start <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(end, merged[-1][1])
        else:
            merged.append((start, end))
    return merged


def draw_chart(results: dict[str, Any], path: Path) -> None:
    """Seconds per step of each measured part, beside the limit, and its peak memory. Seconds are stacked by kind where
    that was measured; a thin bar is what ran beside them."""
    parts = {name: part for name, part in results.items() if isinstance(part, dict) and "seconds" in part}
    rows, total = np.arange(len(parts)), np.array([part["seconds"] for part in parts.values()])
    times = {kind: np.array([part.get("time", {}).get(kind, 0.0) for part in parts.values()]) for kind in KINDS}
    computing = sum(seconds for kind, seconds in times.items() if kind not in BESIDE)
    scale = total / np.maximum(computing, total)
    figure = Figure(figsize=(9, 0.7 * len(parts) + 1.8), layout="constrained")
    spent, memory = figure.subplots(1, 2, sharey=True, width_ratios=(2, 1))
    ends = {True: np.zeros(len(parts)), False: np.zeros(len(parts))}  # of the thin bars and of the wide ones
    for (kind, seconds), colour in zip(times.items(), COLOURS, strict=True):
        thin = kind in BESIDE
        if seconds.any():
            place, height = (rows + 0.46, 0.1) if thin else (rows, 0.8)
            spent.barh(place, seconds * scale, height, left=ends[thin], color=colour, label=kind)
            ends[thin] += seconds * scale
    spent.barh(rows, total - ends[False], left=ends[False], color="#dddddd")
    limits = [(row, part["limit_seconds"]) for row, part in enumerate(parts.values()) if "limit_seconds" in part]
    if limits:
        places, seconds = np.transpose(limits)
        spent.vlines(seconds, places - 0.4, places + 0.4, color="black", linewidth=2, label="arithmetic limit")
    peaks = [part["memory_gib"] for part in parts.values()]
    memory.barh(rows, peaks, color="#8c8c8c")
    for axes, values in ((spent, total), (memory, peaks)):
        for row, value in enumerate(values):
            axes.text(value, row, f" {value:.3g}", va="center")
        axes.margins(x=0.15)
        axes.spines[["top", "right"]].set_visible(False)
    labels = [name + (f", {part['ranks']} GPUs" if "ranks" in part else "") for name, part in parts.items()]
    spent.set_yticks(rows, labels)
    spent.invert_yaxis()
    spent.set_xlabel("seconds per step")
    memory.set_xlabel("peak memory, GiB")
    height, width, frames = results["video"]
    title = f"{results['architecture']}, {height}x{width}x{frames}, {results['device']}, torch {results['torch']}"
    figure.suptitle(title, fontsize=10)
    if spent.get_legend_handles_labels()[0]:
        figure.legend(loc="outside lower center", ncols=5, frameon=False)
    figure.savefig(path, dpi=130)


def draw_timeline(timeline: dict[str, list[tuple[float, float]]], path: Path) -> None:
    """What ran beside what, a row for each kind."""
    kinds = [kind for kind in KINDS if timeline[kind]]
    figure = Figure(figsize=(9, 0.5 * len(kinds) + 1), layout="constrained")
    axes = figure.subplots()
    for row, kind in enumerate(kinds):
        bars = [(start, end - start) for start, end in timeline[kind]]
        axes.broken_barh(bars, (row - 0.35, 0.7), color=COLOURS[list(KINDS).index(kind)], linewidth=0)
    axes.set_yticks(range(len(kinds)), kinds)
    axes.set_xlim(0, WINDOW)
    axes.set_xlabel("seconds, from the middle of one step")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)
