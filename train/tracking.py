"""What a run says of itself: metrics.jsonl, trackers, a progress bar, tokens per second, share of the peak, memory.

`metrics.jsonl` is always written, one object per line; after a resume, lines of steps that are trained again are
dropped, so that a step stands in it once.
"""

import json
import math
import resource
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
from tqdm.auto import tqdm

import recipes
from train import files
from train.backbones import text_tokens
from train.backbones.architecture import forward_flops
from train.backbones.base import Backbone

# Dense bf16 peak of a device by name, TFLOP/s, from the vendors' datasheets.
PEAK_TFLOPS = {
    "H200": 989.0,
    "H100": 989.0,
    "H800": 989.0,
    "B200": 2250.0,
    "A100": 312.0,
    "A800": 312.0,
    "L40S": 362.0,
    "RTX 4090": 165.0,
}


def check_trackers(names: list[str]) -> None:
    """ValueError for a tracker that accelerate does not know, or that is not installed: it would leave it out."""
    installed = {str(tracker) for tracker in get_available_trackers()}
    for name in names:
        if name not in LOGGER_TYPE_TO_CLASS:
            raise ValueError(f"train.trackers: {name!r} is no tracker; {recipes.suggest(name, LOGGER_TYPE_TO_CLASS)}")
        if name not in installed:
            raise ValueError(
                f"train.trackers: {name} is not installed: run pip install -e '.[logging]' (tensorboard, wandb,"
                " trackio), install it yourself, or take it out of the list"
            )


def device_peak_tflops(device: torch.device) -> float | None:
    """Dense bf16 peak of `device`, or None when it is not in the table (a CPU, say)."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for key, peak in PEAK_TFLOPS.items() if key in name), None)


def peak_memory_gib(device: torch.device) -> float:
    """Peak allocated device memory since the last reset, or the process's peak resident memory on a CPU, in GiB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


class Pace:
    """Tokens per second, arithmetic rate and its share of the device's peak, memory, for steps of `clips` clips per
    group."""

    def __init__(self, config: Any, backbone: Backbone, clips: int, device: torch.device):
        video = config.video
        self.device = device
        tokens = backbone.num_tokens(video.height, video.width, video.num_frames)
        matrix, attention = forward_flops(backbone.architecture, tokens, text_tokens(config.backbone))
        clips *= config.optim.batch_size
        passes = config.objective.reference_passes
        self.tokens = tokens * clips
        # A forward pass of the policy, those of the reference, a backward pass.
        self.flops = clips * ((2 + passes) * matrix + (1 + passes + 2.5) * attention)
        self.restart()

    def restart(self) -> None:
        self.clock = time.perf_counter()

    def measure(self) -> dict[str, float]:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        seconds = time.perf_counter() - self.clock
        world = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
        tflops = self.flops / seconds / world / 1e12
        peak = device_peak_tflops(self.device)
        measured = {
            "seconds": seconds,
            "tokens_per_second": self.tokens / seconds,
            "tflops_per_device": tflops,
            "memory_gib": peak_memory_gib(self.device),
        }
        return measured | ({"share_of_peak": tflops / peak} if peak else {})


class Tracker:
    """Writes one step's metrics everywhere they go. Only the main process writes; call on all.

    Metrics are plain numbers. A number that is not finite is written as null, so that every line stays JSON.
    """

    def __init__(self, accelerator: Accelerator, config: Any, *, start: int):
        """`config` is that of the run, `start` the first step that will be logged."""
        self.accelerator, self.bar = accelerator, None
        self.path = Path(config.train.folder) / "metrics.jsonl"
        if accelerator.log_with:
            accelerator.init_trackers("physalign", config=flatten(recipes.redacted(asdict(config))))
        if accelerator.is_main_process:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            _drop_lines_from(self.path, start)
            self.file = self.path.open("a", encoding="utf-8")
            options = {"total": config.optim.steps, "initial": start, "unit": "step", "desc": "train"}
            self.bar = tqdm(**options, dynamic_ncols=True, smoothing=0.1)

    def log(self, step: int, metrics: dict[str, float], *, shown: tuple[str, ...]) -> None:
        """Record step `step` (0-based) with its `seconds`; `shown` names the metrics that stand in the progress bar."""
        if self.bar is None:
            return
        metrics = metrics | {"eta_seconds": (self.bar.total - step - 1) * metrics["seconds"]}
        line = {"step": step, **{k: v if math.isfinite(v) else None for k, v in metrics.items()}}
        self.file.write(json.dumps(line) + "\n")
        self.file.flush()
        self.accelerator.log(metrics, step=step)
        self.bar.set_postfix({key: f"{metrics[key]:.4g}" for key in shown if key in metrics}, refresh=False)
        self.bar.update(1)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
            self.file.close()
        self.accelerator.end_training()


def _drop_lines_from(path: Path, start: int) -> None:
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            if json.loads(line)["step"] < start:
                kept.append(line)
        except (ValueError, TypeError, KeyError):
            continue  # the half-written last line of a killed run, or what a power cut left in its place
    files.write_text(path, "".join(line + "\n" for line in kept))


def flatten(config: dict[str, Any], prefix: str = "") -> dict[str, bool | int | float | str]:
    """{"optim": {"lr": 0.1}} -> {"optim.lr": 0.1}; what is no plain value, as lists are, becomes its text."""
    flat = {}
    for key, value in config.items():
        if isinstance(value, dict):
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = value if isinstance(value, int | float | str | bool) else str(value)
    return flat
