"""Demonstrations on disk, so that trainings and builds draw each of them once.

    recorded = record(folder, list_demonstrations(tasks, "anytime", 0, range(6000)), video)     makes what is missing
    frames, actions = recorded.load(0)

A recording holds frames and actions alone, 0.1 MB for 33 frames of 96x96. A build reads those in
<output>/demonstrations instead of simulating (`data_pipeline.frames`).
"""

import os
import time
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from eval.robots.demonstrations import Listed
from eval.robots.simulators import SimulatorError, shared
from train.clips import VideoConfig
from train.files import atomic

FOLDER = "demonstrations"  # in a build's output folder
KEPT = ("frames", "actions")  # of a Demonstration


@dataclass(frozen=True)
class Recordings:
    """Those of a list that could be made, in its order."""

    folder: Path
    listed: list[Listed]
    video: VideoConfig

    def load(self, place: int) -> tuple[np.ndarray, np.ndarray]:
        """Frames (T, H, W, 3) uint8 and actions ((T - 1) * skip, 4) float32 in [-1, 1]."""
        frames, actions = read(self.folder, self.listed[place], self.video)
        return frames, actions

    def frames(self, places: Sequence[int]) -> np.ndarray:
        """(N, T, H, W, 3) uint8."""
        return np.stack([self.load(place)[0] for place in places])


def load_all(recorded: Sequence[Recordings]) -> tuple[Tensor, Tensor]:
    """Frames and actions of all of them as `Recordings.load`, stacked."""
    loaded = [one.load(place) for one in recorded for place in range(len(one.listed))]
    frames, actions = (torch.from_numpy(np.stack(part)) for part in zip(*loaded, strict=True))
    return frames, actions


def path_of(folder: Path, one: Listed, video: VideoConfig) -> Path:
    size = f"{video.width}x{video.height}x{video.num_frames}-{video.fps:g}fps"
    return folder / size / f"{one.task}-{one.split}" / f"{one.seed}-{one.index:06d}.npz"


def read(folder: Path, one: Listed, video: VideoConfig) -> tuple[np.ndarray, np.ndarray] | None:
    """Frames and actions as `Recordings.load`; None where it was not recorded."""
    path = path_of(folder, one, video)
    if not path.exists():
        return None
    with np.load(path) as arrays:
        return arrays["frames"], arrays["actions"]


def record(folder: Path, listed: Sequence[Listed], video: VideoConfig) -> Recordings:
    """Record those that are not there yet, in one process per core. What fails in the simulator is named and left out;
    ValueError where all of them do, or the first two of each core."""
    todo = [one for one in listed if not path_of(folder, one, video).exists()]
    started, failed, cores = time.monotonic(), set(), os.cpu_count() or 1
    for number, one in enumerate(tqdm(todo, desc="demonstrations", unit="clip", mininterval=5)):
        try:
            made = shared().get(one, video, then=todo[number + 1 : number + 1 + 2 * cores])
        except SimulatorError as error:
            print(f"left out {one.name}: {error}")
            failed.add(one.name)
            if len(failed) == number + 1 == min(len(listed), 2 * cores):
                shared().close()
                raise ValueError(
                    f"none of the first {len(failed)} demonstrations could be made ({error}): see eval/robots/README.md"
                ) from error
            continue
        _write(path_of(folder, one, video), {name: getattr(made, name) for name in KEPT})
    shared().close()
    if todo:
        minutes = (time.monotonic() - started) / 60
        rate = len(todo) / minutes / cores
        print(
            f"{len(todo)} demonstrations in {minutes:.1f} min, {rate:.0f} a minute and core ({cores} cores)", flush=True
        )
    return Recordings(folder, [one for one in listed if one.name not in failed], video)


def _write(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """As np.savez_compressed, whose compression takes several times as long."""
    with atomic(path) as aside, zipfile.ZipFile(aside, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for name, array in arrays.items():
            with archive.open(f"{name}.npy", "w") as file:
                np.lib.format.write_array(file, array)
