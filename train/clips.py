"""Video files in and out, through PyAV. Pixels only: nothing here knows the model.

A clip is a uint8 tensor (T, H, W, 3), RGB. The network's side is float in [-1, 1], channels first: `from_pixels` and
`to_pixels` convert. Whether a size suits a model is that model's check (`Backbone.latent_shape`), not this file's.
"""

import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

MAX_SIDE = 8192  # pixels; a larger declared size is taken for damage, and refused before a frame buffer exists
THUMBNAIL = 320  # pixels, the widest frame of a contact sheet, which is looked at whole
SEEK_FROM = 10.0  # seconds; a later start is sought, an earlier one reached by decoding, which always works
SEEK_MARGIN = 1.0  # seconds; seeking goes by decoding time, which runs ahead of presentation with B-frames
TIME_TOLERANCE = 1e-3  # seconds; containers round presentation times, Matroska to the millisecond
# x264's AVX-512 code has been seen to give other bytes from one run to the next; SSE 4.2 costs next to nothing more.
H264_SETTINGS = {"crf": "17", "preset": "medium", "x264-params": "asm=sse4.2:cpu-independent=1"}
# Without loss: RGB, every pixel as it was. Players for H.264 in RGB are few: this is for measuring.
LOSSLESS_SETTINGS = {"qp": "0", "preset": "medium", "x264-params": H264_SETTINGS["x264-params"]}
# BT.709 is what players assume; written into the stream as well, so that no reader has to guess.
BT709 = int(av.video.reformatter.ColorPrimaries.BT709)


@dataclass
class VideoConfig:
    height: int = 480  # pixels
    width: int = 832  # pixels
    num_frames: int = 81  # frames a clip; 4k + 1 for Wan's VAE
    fps: float = 16.0  # frames per second the model was trained at: 16 for Wan 2.1 and A14B, 24 for TI2V-5B

    def __post_init__(self) -> None:
        if not 0 < self.fps < math.inf:  # the sizes are the backbone's check
            raise ValueError(f"video.fps={self.fps} is no frame rate: use a number above 0, Wan 2.1 was trained at 16")


class ClipError(ValueError):
    """A file that cannot serve as a clip. `reason` is one of a few fixed words, for counting; the message says more."""

    def __init__(self, path: Path, reason: str, detail: str):
        super().__init__(f"{path}: {reason}: {detail}")
        self.reason = reason


def read_clip(path: str | Path, video: VideoConfig, *, start: float = 0.0) -> Tensor:
    """Decode the clip that begins `start` seconds into the file: (T, H, W, 3) uint8 at the size and rate of `video`.

    Frame i is the one shown at time start + i / fps, so variable frame rates come out right. Rotation flags and
    non-square pixels are honoured; the picture covers the frame, cropped at its centre and scaled (antialiased
    bicubic). Decoding stops at the last frame needed and only chosen frames are converted: memory is the result's.

    Raises ClipError, a ValueError with the file, a reason and the remedy: "missing", "unreadable" (no video, or cut
    before its index), "no video stream", "too large" (declares more than 8192 pixels a side), "truncated" (or damaged
    where it is read), "too short" (ends before the last frame's time).
    """
    path = Path(path)
    if not path.is_file():
        raise ClipError(path, "missing", "no such file")
    if not (math.isfinite(start) and start >= 0):
        raise ValueError(f"{path}: start must be a number of seconds, 0 or more, not {start}")
    frames = _read(path, video, start, seek=True) if start > SEEK_FROM else None
    return _read(path, video, start, seek=False) if frames is None else frames


def _read(path: Path, video: VideoConfig, start: float, *, seek: bool) -> Tensor | None:
    """`read_clip`; None when a seek landed behind `start`, as it does in containers without an index."""
    frames = torch.empty(video.num_frames, video.height, video.width, 3, dtype=torch.uint8)
    try:
        # Only local files: a playlist inside a file that calls itself a clip must not reach the network.
        container = av.open(str(path), options={"protocol_whitelist": "file"}, metadata_errors="replace")
    except (av.error.FFmpegError, OSError) as error:
        raise ClipError(path, "unreadable", f"no video file, or cut short ({error.strerror})") from error
    with container:
        if not container.streams.video:
            raise ClipError(path, "no video stream", "none of its streams is video; it may be cut short")
        stream = container.streams.video[0]
        width, height = stream.codec_context.width, stream.codec_context.height
        if max(width, height) > MAX_SIDE:
            raise ClipError(path, "too large", f"declares {width}x{height} pixels; at most {MAX_SIDE} a side are read")
        stream.codec_context.options = {"max_pixels": str(MAX_SIDE**2)}  # the decoder's own headers may disagree
        stream.thread_type = "AUTO"
        times = [start + i / video.fps for i in range(video.num_frames)]
        filled, end = 0, 0.0
        try:
            if seek:
                _seek(container, stream, start - SEEK_MARGIN)
            for frame, shown_from, shown_until in _shown_frames(container, stream):
                if seek and end == 0 and shown_from > start + TIME_TOLERANCE:
                    return None
                end = shown_until
                if times[filled] >= shown_until - TIME_TOLERANCE:
                    continue
                pixels = _fit(frame, stream.sample_aspect_ratio, video.height, video.width)
                while filled < len(times) and times[filled] < shown_until - TIME_TOLERANCE:
                    frames[filled] = pixels
                    filled += 1
                if filled == len(times):
                    return frames
        except (av.error.FFmpegError, OSError) as error:
            raise ClipError(path, "truncated", f"damaged after {end:.2f} s ({error.strerror})") from error
        declared = _declared_duration(container, stream)
    needed = times[-1] + 1 / video.fps
    if declared is not None and declared >= times[-1] + TIME_TOLERANCE:
        raise ClipError(path, "truncated", f"declares {declared:.2f} s, but its frames end at {max(end, start):.2f} s")
    raise ClipError(
        path,
        "too short",
        f"it ends at {end if end else declared or 0.0:.2f} s, but {video.num_frames} frames at"
        f" {video.fps:g} fps from {start:g} s need {needed:.2f} s; use a longer clip, an earlier start,"
        " fewer video.num_frames or a higher video.fps",
    )


def _seek(container, stream, seconds: float) -> None:
    container.seek((stream.start_time or 0) + int(seconds / stream.time_base), stream=stream, backward=True)


def _shown_frames(container, stream) -> Iterator[tuple[av.VideoFrame, float, float]]:
    """Each decoded frame with the times it is shown from and until, in seconds from the stream's first frame."""
    origin = float((stream.start_time or 0) * stream.time_base)
    previous = None
    for frame in container.decode(stream):
        if frame.is_corrupt:
            raise av.error.InvalidDataError(0, "damaged frame")
        if frame.time is None:
            raise av.error.InvalidDataError(0, "a frame without a presentation time")
        if previous is not None:
            yield previous, previous.time - origin, frame.time - origin
        previous = frame
    if previous is not None:
        duration = float(previous.duration * previous.time_base) if previous.duration else 0.0
        begin = previous.time - origin
        yield previous, begin, begin + (duration or float(1 / (stream.average_rate or 1)))


def _declared_duration(container, stream) -> float | None:
    """Seconds the container says the stream lasts, None where it says nothing."""
    if stream.duration:
        return float(stream.duration * stream.time_base)
    return container.duration / av.time_base if container.duration else None


def _fit(frame: av.VideoFrame, pixel_aspect: Fraction | None, height: int, width: int) -> Tensor:
    """One frame, upright, cut at its centre to the shape of the result and scaled to it: (height, width, 3) uint8.

    Cutting first gives what scaling to cover and cropping gives, to half a source pixel, and never scales what is cut.
    """
    pixels = torch.from_numpy(frame.to_ndarray(format="rgb24"))  # (rows, columns, 3)
    turns = round(frame.rotation / 90) % 4  # the flag counts counter-clockwise degrees, as rot90 does
    aspect = float(pixel_aspect) if pixel_aspect else 1.0  # width over height of one pixel
    if turns:
        pixels = torch.rot90(pixels, turns, dims=(0, 1))
        aspect = aspect if turns == 2 else 1 / aspect
    rows, columns, _ = pixels.shape
    kept_rows = min(rows, max(1, round(columns * aspect * height / width)))
    kept_columns = min(columns, max(1, round(rows / aspect * width / height)))
    top, left = (rows - kept_rows) // 2, (columns - kept_columns) // 2
    return _resize(pixels[None, top : top + kept_rows, left : left + kept_columns], (height, width))[0]


def _resize(frames: Tensor, size: tuple[int, int]) -> Tensor:
    """(T, H, W, 3) uint8 to another (H, W), antialiased bicubic."""
    if frames.shape[1:3] == size:
        return frames
    images = frames.permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last)
    return F.interpolate(images, size=size, mode="bicubic", antialias=True).permute(0, 2, 3, 1)


def write_clip(path: str | Path, frames: Tensor, fps: float, *, lossless: bool = False) -> None:
    """Write frames (T, H, W, 3) uint8 as an H.264 mp4 that browsers play, atomically.

    4:2:0 colour needs even sides: an odd one is padded by repeating its last row or column. One encoder thread and
    bit-exact muxing: equal frames give equal bytes. `lossless` writes H.264 in RGB instead, which `read_clip` gives
    back bit for bit at its own size; few browsers play it.
    """
    assert frames.dtype == torch.uint8 and frames.ndim == 4 and frames.shape[-1] == 3, (frames.dtype, frames.shape)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    _, height, width, _ = frames.shape
    even = 1 if lossless else 2
    rows = torch.arange(height + height % even).clamp(max=height - 1)
    columns = torch.arange(width + width % even).clamp(max=width - 1)
    codec, settings = ("libx264rgb", LOSSLESS_SETTINGS) if lossless else ("libx264", H264_SETTINGS)
    options = {"movflags": "+faststart", "fflags": "+bitexact"}
    with av.open(str(temporary), "w", format="mp4", options=options) as container:
        stream = container.add_stream(codec, rate=Fraction(fps).limit_denominator(1001), options=settings)
        stream.width, stream.height, stream.pix_fmt = len(columns), len(rows), "rgb24" if lossless else "yuv420p"
        context = stream.codec_context
        context.thread_count = 1
        if not lossless:
            context.color_primaries = context.color_trc = context.colorspace = BT709
            context.color_range = int(av.video.reformatter.ColorRange.MPEG)
        for pixels in frames.cpu():
            frame = av.VideoFrame.from_ndarray(pixels[rows][:, columns].numpy(), format="rgb24")
            if not lossless:
                frame = frame.reformat(format="yuv420p", dst_colorspace="itu709")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    _finish(temporary, path)


def _finish(temporary: Path, path: Path) -> None:
    with temporary.open("rb+") as file:
        os.fsync(file.fileno())
    os.replace(temporary, path)


def side_by_side(clips: Sequence[Tensor], labels: Sequence[str]) -> Tensor:
    """Clips of one shape (T, H, W, 3), left to right, a caption bar above each: (T, bar + H, n W, 3) uint8."""
    shapes = {tuple(clip.shape) for clip in clips}
    if len(shapes) != 1 or len(clips) != len(labels):
        raise ValueError(f"side_by_side needs clips of one shape and a label each: {shapes}, {len(labels)} labels")
    num_frames, height, width, _ = clips[0].shape
    bar = max(14, height // 16)
    captioned = []
    for clip, label in zip(clips, labels, strict=True):
        caption = _caption(label, width, bar).expand(num_frames, -1, -1, -1)
        captioned.append(torch.cat([caption, clip.cpu()], dim=1))
    return torch.cat(captioned, dim=2)


def contact_sheet(path: str | Path, rows: Sequence[tuple[str, Tensor]], *, columns: int = 6) -> None:
    """Write a PNG with one labelled row a clip (T, H, W, 3): `columns` frames evenly spaced from first to last."""
    thumbnails = []
    for label, clip in rows:
        chosen = torch.linspace(0, len(clip) - 1, columns).round().long()
        frames = clip[chosen].cpu()
        if frames.shape[2] > THUMBNAIL:
            frames = _resize(frames, (round(frames.shape[1] * THUMBNAIL / frames.shape[2]), THUMBNAIL))
        thumbnails.append((label, torch.cat(list(frames), dim=1)))
    width = max(strip.shape[1] for _, strip in thumbnails)
    lines = []
    for label, strip in thumbnails:
        lines += [_caption(label, width, 18), F.pad(strip, (0, 0, 0, width - strip.shape[1]))]
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    Image.fromarray(torch.cat(lines).numpy()).save(temporary, format="PNG")
    _finish(temporary, path)


def _caption(label: str, width: int, height: int) -> Tensor:
    """White text on black, cut with an ellipsis where it does not fit: (height, width, 3) uint8."""
    image = Image.new("RGB", (width, height))
    draw = ImageDraw.Draw(image)
    font = ImageFont.load_default(size=height * 0.7)
    label = " ".join(label.split())
    shown = label
    while shown and draw.textlength(shown if shown == label else shown + "…", font=font) > width - 4:
        shown = shown[:-1]
    draw.text((2, height / 2), shown if shown == label else shown + "…", font=font, fill="white", anchor="lm")
    return torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).reshape(height, width, 3)


def motion_energy(frames: Tensor) -> float:
    """Mean absolute change from frame to frame of a clip (T, H, W, 3) uint8, as a share of the full range."""
    changes = [(b.short() - a.short()).abs().float().mean() for a, b in zip(frames[:-1], frames[1:], strict=True)]
    return float(torch.stack(changes).mean()) / 255 if changes else 0.0


def to_pixels(frames: Tensor) -> Tensor:
    """Float (B, 3, T, H, W) in [-1, 1] to uint8 (B, T, H, W, 3)."""
    return ((frames.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 4, 1)


def from_pixels(frames: Tensor) -> Tensor:
    """uint8 (T, H, W, 3) or (B, T, H, W, 3) to float32 in [-1, 1], (3, T, H, W) or (B, 3, T, H, W)."""
    return (frames.float() / 127.5 - 1).movedim(-1, -4)
