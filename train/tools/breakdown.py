"""How long a step takes and where its time goes, by kind of kernel; a bar chart of what a benchmark measured."""

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch._dynamo.utils import counters
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
BESIDE = ("communication", "copies")  # they run while the others do


def time_step(run: Callable[[], Any], device: torch.device, repeats: int) -> dict[str, Any]:
    """First-step seconds, median seconds of the next ones, their peak memory and graphs that only they compiled, and
    the time by kind of one more step."""
    first = seconds(run, device, 1, warmup=0)
    graphs = counters["stats"]["unique_graphs"]
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    return {
        "seconds": seconds(run, device, repeats, warmup=0),
        "first_seconds": first,
        "memory_gib": peak_memory_gib(device),
        "compiled_later": counters["stats"]["unique_graphs"] - graphs,
        "time": where_time_goes(run, device),
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


def where_time_goes(run: Callable[[], Any], device: torch.device) -> dict[str, float]:
    """Seconds of device time (on a CPU of operators' own time) in one run, by kind.

    With those BESIDE the others they add up to more than the wall time.
    """
    cuda = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU], acc_events=True) as profiler:
        run()
        if cuda:
            torch.cuda.synchronize(device)
    totals = dict.fromkeys(KINDS, 0.0)
    for event in profiler.key_averages():
        microseconds = event.self_device_time_total if cuda else event.self_cpu_time_total
        totals[kind_of(event.key)] += microseconds / 1e6
    return totals


def draw_chart(results: dict[str, Any], path: Path) -> None:
    """Seconds per step of each measured part, beside the limit, and its peak memory. Seconds are stacked by kind where
    that was measured; a thin bar is what ran beside them."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    parts = {name: part for name, part in results.items() if isinstance(part, dict) and "seconds" in part}
    shape = {"figsize": (9, 0.7 * len(parts) + 1.8), "width_ratios": (2, 1), "layout": "constrained"}
    figure, (spent, memory) = pyplot.subplots(1, 2, sharey=True, **shape)
    colours = ("#9467bd", "#b0558c", "#f0b35a", "#3b6ea5", "#79b4a9", "#dddddd")
    colours = dict(zip([*KINDS, "idle"], colours, strict=True))
    shown = set()
    for row, part in enumerate(parts.values()):
        kinds = part.get("time") or {}
        computing = sum(seconds for kind, seconds in kinds.items() if kind not in BESIDE)
        scale = part["seconds"] / max(computing, part["seconds"])
        ends = {True: 0.0, False: 0.0}  # of the thin bar and of the wide one
        for kind, seconds in kinds.items():
            if seconds > 0:
                thin, label = kind in BESIDE, None if kind in shown else kind
                place, height = (row + 0.46, 0.1) if thin else (row, 0.8)
                spent.barh(place, seconds * scale, height, left=ends[thin], color=colours[kind], label=label)
                ends[thin] += seconds * scale
                shown.add(kind)
        spent.barh(row, part["seconds"] - ends[False], left=ends[False], color=colours["idle"])
        spent.text(part["seconds"], row, f" {part['seconds']:.3g}", va="center")
        if "limit_seconds" in part:
            label = None if "limit" in shown else "arithmetic limit"
            spent.plot([part["limit_seconds"]] * 2, [row - 0.4, row + 0.4], color="black", linewidth=2, label=label)
            shown.add("limit")
        memory.barh(row, part["memory_gib"], color="#8c8c8c")
        memory.text(part["memory_gib"], row, f" {part['memory_gib']:.3g}", va="center")
    labels = [name + (f", {part['ranks']} GPUs" if "ranks" in part else "") for name, part in parts.items()]
    spent.set_yticks(range(len(parts)), labels)
    spent.invert_yaxis()
    spent.set_xlabel("seconds per step")
    memory.set_xlabel("peak memory, GiB")
    for axes in (spent, memory):
        axes.margins(x=0.15)
        axes.spines[["top", "right"]].set_visible(False)
    rows, columns, frames = results["video"]
    title = f"{results['architecture']}, {rows}x{columns}x{frames}, {results['device']}, torch {results['torch']}"
    figure.suptitle(title, fontsize=10)
    if shown:
        figure.legend(loc="outside lower center", ncols=5, frameon=False)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
