"""One view of Physics-IQ: a generated clip against take 1, and take 2 against take 1, which is done once and kept."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from eval.benchmarks.physics_iq_frames import (
    REDUCTION,
    binary,
    observe,
    read_frames,
    read_header,
    resampled,
    shrink,
)
from eval.benchmarks.physics_iq_metrics import Agreement, Observed, compare, row_values
from train.clips import ClipError
from train.files import atomic

SECONDS = 5  # that are compared


@dataclass(frozen=True)
class View:
    """Files of one comparison, for a worker process."""

    clip: Path  # the generated one
    start: int  # its frames before those to compare
    fps: int  # of the comparison
    takes: tuple[Path, Path]  # the real videos, at `fps` or another rate
    shipped: tuple[Path | None, Path | None]  # masks of the real videos that come with the benchmark
    mp4v: bool  # masks go through a lossy file
    cache: Path  # of what does not depend on the generated clip


def score_view(view: View) -> dict[str, float]:
    """The columns of one clip. Raises ValueError, as a ClipError, for a file that cannot be compared."""
    header = read_header(view.clip)
    if not math.isclose(header.fps, view.fps, rel_tol=1e-3):
        raise ClipError(view.clip, "frame rate", f"{header.fps:g} frames a second, expected {view.fps}: make it again")
    reality, variance = _reality(view)
    generated = observe(
        read_frames(view.clip, view.start, SECONDS * view.fps),
        reality.frames.shape[1:3],
        fps=view.fps,
        mp4v=view.mp4v,
    )
    return row_values(compare(reality, generated), variance)


def real_frames(path: Path, fps: int, seconds: int) -> Iterator[np.ndarray]:
    """The first `seconds` of a real video at `fps` frames a second, as the official code resamples it."""
    header = read_header(path)
    if math.isclose(header.fps, fps, rel_tol=1e-3):
        return read_frames(path, 0, seconds * fps)
    count = int(seconds * header.fps)
    return resampled(read_frames(path, 0, count), count, seconds * fps)


def _reality(view: View) -> tuple[Observed, Agreement]:
    """Take 1, and what take 2 makes of it."""
    first, second = (read_header(path) for path in view.takes)
    if (first.height, first.width) != (second.height, second.width):
        raise ClipError(
            view.takes[1],
            "size",
            f"{second.width}x{second.height} pixels, take 1 has {first.width}x{first.height}: get both again",
        )
    size = (first.height // REDUCTION, first.width // REDUCTION)
    sources = [path.stat() for path in (*view.takes, *view.shipped) if path]
    stamp = np.array([[source.st_size, source.st_mtime_ns] for source in sources])
    kept = _load(view.cache, stamp)
    if kept is not None:
        return Observed(shrink(real_frames(view.takes[0], view.fps, SECONDS), size), kept[0]), kept[1]
    takes = [_real(path, masks, size, view) for path, masks in zip(view.takes, view.shipped, strict=True)]
    variance = compare(*takes)
    _save(view.cache, stamp, takes[0].masks, variance)
    return takes[0], variance


def _real(path: Path, masks: Path | None, size: tuple[int, int], view: View) -> Observed:
    frames = real_frames(path, view.fps, SECONDS)
    if masks is None:
        return observe(frames, size, fps=view.fps, mp4v=view.mp4v)
    return Observed(shrink(frames, size), binary(read_frames(masks, 0, SECONDS * view.fps), size))


def _save(path: Path, stamp: np.ndarray, masks: np.ndarray, variance: Agreement) -> None:
    with atomic(path) as aside, aside.open("wb") as file:
        np.savez_compressed(
            file,
            stamp=stamp,
            masks=np.packbits(masks),
            shape=np.array(masks.shape),
            **{name: np.asarray(value) for name, value in vars(variance).items()},
        )


def _load(path: Path, stamp: np.ndarray) -> tuple[np.ndarray, Agreement] | None:
    """Masks of take 1 and the variance; None where they are not there, or were made of other files."""
    if not path.exists():
        return None
    with np.load(path) as kept:
        if not np.array_equal(kept["stamp"], stamp):
            return None
        shape = tuple(kept["shape"])
        masks = np.unpackbits(kept["masks"], count=math.prod(shape)).reshape(shape).astype(bool)
        variance = Agreement(
            spatial_iou=float(kept["spatial_iou"]),
            weighted_spatial_iou=float(kept["weighted_spatial_iou"]),
            spatiotemporal_iou=kept["spatiotemporal_iou"],
            mse=kept["mse"],
        )
    return masks, variance
