"""Video in and out for Physics-IQ, through OpenCV: its decoder, scaling and filters are part of the protocol.

Frames are (H,W,3) uint8, BGR. Constants are those of google-deepmind/physics-IQ-benchmark.
"""

import math
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from fractions import Fraction
from itertools import islice
from pathlib import Path
from typing import Any

import av
import numpy as np

from eval.benchmarks.physics_iq_metrics import Agreement, Observed, compare, row_values
from train.clips import ClipError
from train.files import atomic

SECONDS = 5  # that are compared
REDUCTION = 4  # frames and masks are compared at a quarter of the real video's size
THRESHOLD = 10  # of 255: a pixel that differs more than this from its running average moves
AVERAGE_RATE = 0.3  # weight of the new frame in the running average
KERNEL = 5  # pixels, of the blur and of opening and closing


def opencv() -> Any:
    """The cv2 module, at one thread: clips are scored side by side. ValueError where it is not installed."""
    try:
        import cv2
    except ImportError as error:
        raise ValueError(
            "physics_iq needs OpenCV: pip install 'physalign[trackers]' (opencv-python-headless)"
        ) from error
    cv2.setNumThreads(1)
    return cv2


@dataclass(frozen=True)
class Header:
    """What a video file says of itself."""

    fps: float
    num_frames: int
    height: int
    width: int


def read_header(path: Path) -> Header:
    """Raises ClipError for a file that is missing or no video."""
    capture, header = _open(path)
    capture.release()
    return header


def _open(path: Path) -> tuple[Any, Header]:
    cv2 = opencv()
    if not path.is_file():
        raise ClipError(path, "missing", "no such file")
    capture = cv2.VideoCapture(str(path), cv2.CAP_FFMPEG, [cv2.CAP_PROP_N_THREADS, 1])
    fps, num_frames, height, width = (
        capture.get(getattr(cv2, f"CAP_PROP_{name}")) for name in ("FPS", "FRAME_COUNT", "FRAME_HEIGHT", "FRAME_WIDTH")
    )
    if not capture.isOpened() or not (fps > 0 and height > 0 and width > 0):
        capture.release()
        raise ClipError(path, "unreadable", "no video file, or cut short")
    return capture, Header(fps, int(num_frames), int(height), int(width))


def read_frames(path: Path, count: int) -> Iterator[np.ndarray]:
    """The first `count` frames. Raises ClipError for a file that cannot be read or has fewer.

    Decoded by one thread: clips are scored side by side.
    """
    capture, header = _open(path)
    try:
        for number in range(count):
            found, frame = capture.read()
            if not found:
                reason = "too short" if header.num_frames <= number else "truncated"
                raise ClipError(path, reason, f"it has {number} of the {count} frames needed")
            if frame.shape != (header.height, header.width, 3):
                raise ClipError(path, "size", f"frame {number} is not of {header.width}x{header.height} pixels")
            yield frame
    finally:
        capture.release()


def resampled(frames: Iterable[np.ndarray], count: int, new_count: int) -> Iterator[np.ndarray]:
    """`count` frames as `new_count`: first and last stay, those between are blended from their two neighbours.

    Linear in float32 and cut to uint8, as the official `fps_changer`, which then also goes through H.264; this does
    not.
    """
    frames = iter(frames)
    before = after = next(frames)
    last = 0  # number of `after`
    for number in range(new_count):
        share = number * (count - 1) / max(1, new_count - 1)
        index = int(share)
        share -= index
        while last < min(index + 1, count - 1):
            before, after = after, next(frames)
            last += 1
        left = before if last == index + 1 else after
        yield ((1 - share) * left.astype(np.float32) + share * after.astype(np.float32)).astype(np.uint8)


def motion_masks(frames: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    """Where each frame differs from the running average: (H,W) uint8, 0 or 255.

    Nothing moves in the first frame. H and W are cut to even numbers.
    """
    cv2, average = opencv(), None
    for frame in frames:
        grey = cv2.GaussianBlur(cv2.cvtColor(frame, cv2.COLOR_BGR2GRAY), (KERNEL, KERNEL), 0)
        if average is None:
            average, mask = grey.astype(np.float64), np.zeros_like(grey)
        else:
            cv2.accumulateWeighted(grey, average, AVERAGE_RATE)
            difference = cv2.absdiff(grey, cv2.convertScaleAbs(average))
            mask = cv2.threshold(difference, THRESHOLD, 255, cv2.THRESH_BINARY)[1]
            for operation in (cv2.MORPH_OPEN, cv2.MORPH_CLOSE):
                mask = cv2.morphologyEx(mask, operation, np.ones((KERNEL, KERNEL), np.uint8))
        height, width = mask.shape
        yield mask[: height - height % 2, : width - width % 2]


def through_mp4v(masks: Iterable[np.ndarray], fps: float) -> Iterator[np.ndarray]:
    """The masks after a round trip through a lossy mp4 file, as the official code keeps them: (H,W,3) uint8, grey."""
    cv2 = opencv()
    with tempfile.TemporaryDirectory() as folder:
        path, writer, count = Path(folder, "masks.mp4"), None, 0
        for mask in masks:
            if writer is None:
                size = mask.shape[1], mask.shape[0]
                writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"mp4v"), round(fps), size, isColor=False)
                if not writer.isOpened():
                    raise ValueError(
                        "run.physics_iq.masks: this OpenCV cannot write mp4v; use masks=memory, or the wheel of"
                        " opencv-python-headless"
                    )
            writer.write(np.ascontiguousarray(mask))
            count += 1
        writer.release()
        yield from read_frames(path, count)


def observe(frames: Iterable[np.ndarray], size: tuple[int, int], *, fps: float, mp4v: bool) -> Observed:
    """Frames and masks of a clip at `size` (rows, columns); mp4v: the masks go through a file on the way."""
    kept: list[np.ndarray] = []

    def keeping() -> Iterator[np.ndarray]:
        for frame in frames:
            kept.append(_scaled(frame, size))
            yield frame

    masks = motion_masks(keeping())
    found = binary(through_mp4v(masks, fps) if mp4v else masks, size)
    return Observed(np.stack(kept), found)


def shrink(frames: Iterable[np.ndarray], size: tuple[int, int]) -> np.ndarray:
    """Frames at `size` (rows, columns): (T,h,w,3) uint8."""
    return np.stack([_scaled(frame, size) for frame in frames])


def binary(masks: Iterable[np.ndarray], size: tuple[int, int]) -> np.ndarray:
    """Masks (H,W) or grey (H,W,3) of 0 and 255, or nearly, at `size` (rows, columns): (T,h,w) bool."""
    return np.stack([_scaled(mask if mask.ndim == 2 else mask[..., 0], size) > 127 for mask in masks])


def _scaled(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    return opencv().resize(image, (size[1], size[0]))


def write_lossless(path: Path, frames: Iterable[av.VideoFrame], fps: float) -> None:
    """An mp4 that decodes to the same values: H.264 without quantisation, YUV as YUV and RGB as RGB. Atomic."""
    options = {"fflags": "+bitexact"}
    with atomic(path) as aside, av.open(str(aside), "w", format="mp4", options=options) as container:
        stream = None
        for number, frame in enumerate(frames):
            if frame.format.is_rgb:  # planes or pixels: the same numbers
                frame = frame.reformat(format="bgr24")
            if stream is None:
                codec = "libx264rgb" if frame.format.is_rgb else "libx264"
                options = {"qp": "0", "preset": "veryfast", "bf": "0", "x264-params": "asm=sse4.2:cpu-independent=1"}
                stream = container.add_stream(codec, rate=Fraction(fps).limit_denominator(1001), options=options)
                stream.width, stream.height, stream.pix_fmt = frame.width, frame.height, frame.format.name
                context = stream.codec_context
                context.thread_count = 1
                for name in ("color_primaries", "color_trc", "colorspace", "color_range"):
                    setattr(context, name, int(getattr(frame, name)))
            frame.pts, frame.time_base = number, 1 / stream.codec_context.rate
            frame.pict_type = 0  # of the file that it comes from: the encoder chooses its own
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def trim(path: Path, target: Path, count: int, *, start: int = 0) -> None:
    """`count` frames of a file from frame `start` on, as a file of their own, without loss. Raises ClipError."""
    header = read_header(path)
    try:
        with av.open(str(path)) as container:
            frames = list(islice(container.decode(video=0), start, start + count))
    except av.error.FFmpegError as error:
        raise ClipError(path, "truncated", f"damaged ({error.strerror})") from error
    if len(frames) < count:
        raise ClipError(path, "too short", f"it has {len(frames)} of the {count} frames needed")
    write_lossless(target, frames, header.fps)


# One view: a clip against take 1, and take 2 against take 1, which is done once and kept


@dataclass(frozen=True)
class View:
    """Files of one comparison, for a worker process."""

    clip: Path  # the generated one
    start: int  # its frames before those that are compared
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
        islice(read_frames(view.clip, view.start + SECONDS * view.fps), view.start, None),
        reality.frames.shape[1:3],
        fps=view.fps,
        mp4v=view.mp4v,
    )
    return row_values(compare(reality, generated), variance)


def real_frames(path: Path, fps: int, seconds: int) -> Iterator[np.ndarray]:
    """The first seconds of a real video at `fps` frames a second, as the official code resamples it."""
    header = read_header(path)
    if math.isclose(header.fps, fps, rel_tol=1e-3):
        return read_frames(path, seconds * fps)
    count = int(seconds * header.fps)
    return resampled(read_frames(path, count), count, seconds * fps)


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
    return Observed(shrink(frames, size), binary(read_frames(masks, SECONDS * view.fps), size))


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
        return masks, Agreement(**{one.name: kept[one.name][()] for one in fields(Agreement)})
