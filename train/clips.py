"""Video files in and out, through PyAV. Pixels only: nothing here knows the model.

A clip is a uint8 tensor (T, H, W, 3), RGB. The network's side is float in [-1, 1], channels first: `from_pixels` and
`to_pixels` convert. Whether a size suits a model is that model's check (`Backbone.latent_shape`), not this file's.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path

import av
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from train.clip_frames import deinterlaced, fit, orientation_of, orientation_of_still, resize
from train.files import atomic

MAX_SIDE = 8192  # pixels; a larger declared size is taken for damage, and refused before a frame buffer exists
THUMBNAIL = 320  # pixels, the widest frame of a contact sheet, which is looked at whole
SEEK_FROM = 10.0  # seconds; a later start is sought, an earlier one reached by decoding, which always works
SEEK_MARGIN = 1.0  # seconds; seeking goes by decoding time, which runs ahead of presentation with B-frames
# What is read. Left out: text, and whatever names other files, such as playlists.
FORMATS = (
    "mov,matroska,avi,mpegts,mpeg,flv,asf,gif,ogg,apng,rm,nut,mxf,dv,ivf,wtv,gxf,amv,yuv4mpegpipe,webp,"
    "h264,hevc,m4v,mpegvideo,mjpeg,av1,obu,vvc,vc1,h263,"
    "image2,png_pipe,jpeg_pipe,webp_pipe,tiff_pipe,bmp_pipe,gif_pipe,jpegxl_pipe,j2k_pipe,ppm_pipe,exr_pipe"
)
STILLS = ("_pipe", "image2")  # how the formats of pictures end
# Files that are no video, by how they begin, in small letters.
NO_VIDEO = {
    b"<html": "it begins with <html: a web page, not a video; fetch it again",
    b"<!doctype": "it begins with <!DOCTYPE: a web page, not a video; fetch it again",
    b"<?xml": "it begins with <?xml: text, maybe a server's error, not a video; fetch it again",
    b"version https://git-lfs": "a Git LFS pointer in place of the file; run git lfs pull",
    b"#extm3u": "a playlist, which names other files; give the video itself",
    b"ffconcat": "a playlist, which names other files; give the video itself",
}
DOLBY_VISION = ("dvh1", "dvhe", "dva1", "dvav", "dav1")  # tags of streams that only its own decoder shows rightly
# What PyAV raises for damaged files; overflowing numbers and time bases of 0 among it.
DAMAGE = (av.error.FFmpegError, OSError, ArithmeticError, ValueError)
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
    num_frames: int = 81  # frames per clip; 4k + 1 for Wan's VAE
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

    Frame i is the one shown at time start + i / fps, so variable frame rates come out right; times count from the
    first frame that can be decoded. The last frame is held for up to its own duration or 1 / fps, whichever is
    shorter: 81 frames at 16 fps, whose last one lies at 5.000 s, can be had of a clip of 5.000 s. Display matrices,
    EXIF orientation and non-square pixels are honoured, interlaced frames deinterlaced, HDR and wide gamuts converted
    to SDR BT.709. The picture covers the frame, cropped at its centre and scaled (antialiased bicubic). Decoding
    stops at the last frame needed and only chosen frames are converted: memory is the result's.

    Raises ClipError, a ValueError with the file, a reason and the remedy: "missing", "unreadable" (no video, or cut
    before its index), "no video stream", "unknown codec", "HDR" (Dolby Vision that needs its own decoder), "no time
    stamps" (raw streams), "too large" (declares more than 8192 pixels per side), "truncated" (or damaged where it is
    read), "too short" (ends before the last frame's time).
    """
    path = Path(path)
    if not path.is_file():
        raise ClipError(path, "missing", "no such file")
    if not (math.isfinite(start) and start >= 0):
        raise ValueError(f"{path}: start must be a number of seconds, 0 or more, not {start}")
    for way in ("seek", "presentation", "decoding") if start > SEEK_FROM else ("presentation", "decoding"):
        with suppress(_BadTimes):
            return _read(path, video, start, way)
    raise ClipError(
        path,
        "no time stamps",
        "the times of its frames are missing or go back; encode it anew with its frame rate in place of 30:"
        " ffmpeg -r 30 -i IN -crf 12 OUT.mp4",
    )


def check_clip(path: str | Path, video: VideoConfig, *, start: float = 0.0) -> None:
    """Raise ClipError as `read_clip` does, as far as the container tells: nothing is decoded unless it tells of a
    fault. Damage inside the pictures passes."""
    if not _lasts(Path(path), video, start):
        read_clip(path, video, start=start)


def read_first_frames(path: str | Path, video: VideoConfig, *, start: float = 0.0, count: int = 1) -> Tensor:
    """The first frames of `read_clip`: (count, H, W, 3) uint8. Raises ClipError as `check_clip` does; of a clip that it
    takes nothing behind them is decoded."""
    if _lasts(Path(path), video, start):
        video = replace(video, num_frames=count)
    return read_clip(path, video, start=start)[:count]


def _lasts(path: Path, video: VideoConfig, start: float) -> bool:
    """Whether a file's packets, by their own times, last until the clip's last frame; False where that is not sure."""
    last, origin, end, hold = start + (video.num_frames - 1) / video.fps, None, 0.0, 0.0
    if not path.is_file():
        return False
    with suppress(*DAMAGE, _BadTimes), _open(path) as container:
        stream = _video_stream(path, container)
        if start > SEEK_FROM:
            origin = next(float(packet.pts * packet.time_base) for packet in container.demux(stream))
            container.seek(int((origin + start) / stream.time_base), stream=stream, backward=True)
        for packet in container.demux(stream):
            if packet.size and (packet.is_corrupt or packet.pts is None):
                return False
            if not packet.size or packet.is_discard or origin is None and not packet.is_keyframe:
                continue
            shown, duration = float(packet.pts * packet.time_base), float((packet.duration or 0) * packet.time_base)
            origin = shown if origin is None else origin
            end, hold = max((end, hold), (shown + duration - origin, min(duration, 1 / video.fps)))
            if last < end - TIME_TOLERANCE:
                return True
        return last - 1 / video.fps < end - TIME_TOLERANCE and last < end + hold - TIME_TOLERANCE
    return False


class _BadTimes(Exception):
    """This way of reading cannot tell when the frames are shown."""


def _read(path: Path, video: VideoConfig, start: float, way: str) -> Tensor:
    """`read_clip` by one way: seeking, or from the first frame on by presentation or decoding times."""
    times = [start + i / video.fps for i in range(video.num_frames)]
    frames = torch.empty(video.num_frames, video.height, video.width, 3, dtype=torch.uint8)
    filled, end = 0, 0.0
    with _open(path) as container:
        try:
            stream = _video_stream(path, container)
            upright = orientation_of_still(path) if container.format.name.endswith(STILLS) else None
            hold = 0.0
            for frame, shown_from, shown_until in _shown_frames(container, stream, way, start):
                end, hold = shown_until, min(shown_until - shown_from, 1 / video.fps)
                upright = upright or orientation_of(frame)  # once: looked at, a frame stays in memory for long
                if times[filled] >= end - TIME_TOLERANCE:
                    continue
                pixels = fit(frame, stream.sample_aspect_ratio, upright, video.height, video.width)
                while filled < len(times) and times[filled] < end - TIME_TOLERANCE:
                    frames[filled] = pixels
                    filled += 1
                if filled == len(times):
                    return frames
            if filled == len(times) - 1 and times[-1] < end + hold - TIME_TOLERANCE:
                frames[-1] = fit(frame, stream.sample_aspect_ratio, upright, video.height, video.width)
                return frames
            declared = _declared_duration(container, stream)
        except ClipError:
            raise
        except DAMAGE as error:
            raise ClipError(path, "truncated", f"damaged after {end:.2f} s ({_words(error)})") from error
    if declared is not None and declared >= times[-1] + TIME_TOLERANCE:
        raise ClipError(path, "truncated", f"declares {declared:.2f} s, but its frames end at {max(end, start):.2f} s")
    raise ClipError(
        path,
        "too short",
        f"it ends at {end if end else declared or 0.0:.2f} s, but {video.num_frames} frames at"
        f" {video.fps:g} fps from {start:g} s need {times[-1]:.2f} s; use a longer clip, an earlier start,"
        " fewer video.num_frames or a higher video.fps",
    )


def _open(path: Path):
    """The opened container. Raises ClipError."""
    try:
        with path.open("rb") as file:
            head = file.read(64).removeprefix(b"\xef\xbb\xbf").strip().lower()
        for beginning, what in NO_VIDEO.items():
            if head.startswith(beginning):
                raise ClipError(path, "unreadable", what)
        if not path.stat().st_size:
            raise ClipError(path, "unreadable", "it has 0 bytes; fetch it again")
        # A clip is one local file: nothing inside it may name another, and a colon or %d in its name means nothing.
        options = {"protocol_whitelist": "file", "format_whitelist": FORMATS, "pattern_type": "none"}
        return av.open(f"file:{path}", options=options, metadata_errors="replace")
    except ClipError:
        raise
    except DAMAGE as error:
        detail = f"no video file of a known kind, or cut short ({_words(error)})"
        raise ClipError(path, "unreadable", detail) from error


def _video_stream(path: Path, container):
    """The first video stream, ready to be decoded. Raises ClipError."""
    if av.format.Flags.no_timestamps in av.format.Flags(container.format.flags):
        if container.format.name != "mpegvideo":  # whose headers hold the frame rate
            raise _BadTimes
    streams = [s for s in container.streams.video if not s.disposition & av.stream.Disposition.attached_pic]
    if not streams:
        raise ClipError(path, "no video stream", "none of its streams is video; it may be cut short")
    stream = streams[0]
    context = stream.codec_context
    if context is None:
        raise ClipError(path, "unknown codec", "its video is of a kind that ffmpeg does not decode; use H.264")
    if context.codec_tag in DOLBY_VISION:
        raise ClipError(path, "HDR", "Dolby Vision without a compatible base; convert it to SDR first")
    if max(context.width, context.height) > MAX_SIDE:
        detail = f"declares {context.width}x{context.height} pixels; at most {MAX_SIDE} a side are read"
        raise ClipError(path, "too large", detail)
    context.options = {"max_pixels": str(MAX_SIDE**2)}  # the decoder's own headers may disagree
    stream.thread_type = "AUTO"
    return stream


def _shown_frames(container, stream, way: str, start: float) -> Iterator[tuple[av.VideoFrame, float, float]]:
    """Each frame with the times it is shown from and until, in seconds from the first frame of the file.

    By seeking, the first one is shown at `start` or before. Raises _BadTimes.
    """
    origin = None
    if way == "seek":
        first = next(_decoded(container, stream, way), None)
        if first is None:
            raise _BadTimes
        origin = first.time
        seconds = origin + start - SEEK_MARGIN
        container.seek(int(seconds / stream.time_base), stream=stream, backward=True)
    previous = None
    for frame in deinterlaced(_decoded(container, stream, way)):
        if previous is None:
            origin = frame.time if origin is None else origin
            if way == "seek" and frame.time - origin > start + TIME_TOLERANCE:
                raise _BadTimes  # as in containers without an index
        else:
            yield previous, previous.time - origin, frame.time - origin
        previous = frame
    if previous is not None:
        duration = float(previous.duration * previous.time_base) if previous.duration else 0.0
        begin = previous.time - origin
        yield previous, begin, begin + (duration or float(1 / (stream.average_rate or 1)))


def _decoded(container, stream, way: str) -> Iterator[av.VideoFrame]:
    """The frames from the first key frame on, each with its time. Raises _BadTimes, and InvalidDataError for damage.

    By decoding times: AVI knows no others, and where B-frames come out of order there, a frame is shown when the
    packet that completes it is decoded, less a constant. The last ones, which no packet completes, follow evenly.
    """
    found_key, damaged_from = False, math.inf
    previous, step = None, 0
    for packet in container.demux(stream):
        found_key = found_key or packet.is_keyframe
        if not found_key:
            continue
        if packet.is_corrupt:
            stamps = [stamp for stamp in (packet.dts, packet.pts) if stamp is not None]
            damaged_from = min([damaged_from, *stamps]) if stamps else -math.inf
        for frame in packet.decode():
            if way == "decoding":
                frame.pts = previous + step if frame.dts is None and step else frame.dts
                frame.duration = step or frame.duration  # AVI holds none
            if frame.pts is None or (previous is not None and frame.pts < previous):
                raise _BadTimes
            # Nothing shown before a packet is decoded depends on it.
            if frame.is_corrupt or frame.pts >= damaged_from:
                raise av.error.InvalidDataError(0, "damaged frame")
            if previous is not None:
                step = frame.pts - previous
            previous = frame.pts
            yield frame
    if not found_key:
        raise av.error.InvalidDataError(0, "no key frame")


def _declared_duration(container, stream) -> float | None:
    """Seconds the container says the stream lasts, None where it says nothing."""
    if stream.duration:
        return float(stream.duration * stream.time_base)
    return container.duration / av.time_base if container.duration else None


def _words(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


def write_clip(path: str | Path, frames: Tensor, fps: float, *, lossless: bool = False) -> None:
    """Write frames (T, H, W, 3) uint8 as an H.264 mp4 that browsers play, atomically.

    4:2:0 colour needs even sides: an odd one is padded by repeating its last row or column. One encoder thread and
    bit-exact muxing: equal frames give equal bytes. `lossless` writes H.264 in RGB instead, which `read_clip` gives
    back bit for bit at its own size; few browsers play it.
    """
    assert frames.dtype == torch.uint8 and frames.ndim == 4 and frames.shape[-1] == 3, (frames.dtype, frames.shape)
    _, height, width, _ = frames.shape
    even = 1 if lossless else 2
    rows = torch.arange(height + height % even).clamp(max=height - 1)
    columns = torch.arange(width + width % even).clamp(max=width - 1)
    codec, settings = ("libx264rgb", LOSSLESS_SETTINGS) if lossless else ("libx264", H264_SETTINGS)
    options = {"movflags": "+faststart", "fflags": "+bitexact"}
    with atomic(path) as aside, av.open(f"file:{aside}", "w", format="mp4", options=options) as container:
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
    """Write a PNG with one labelled row per clip (T, H, W, 3): `columns` frames evenly spaced from first to last."""
    thumbnails = []
    for label, clip in rows:
        chosen = torch.linspace(0, len(clip) - 1, columns).round().long()
        frames = clip[chosen].cpu()
        if frames.shape[2] > THUMBNAIL:
            frames = resize(frames, (round(frames.shape[1] * THUMBNAIL / frames.shape[2]), THUMBNAIL))
        thumbnails.append((label, torch.cat(list(frames), dim=1)))
    width = max(strip.shape[1] for _, strip in thumbnails)
    lines = []
    for label, strip in thumbnails:
        lines += [_caption(label, width, 18), F.pad(strip, (0, 0, 0, width - strip.shape[1]))]
    with atomic(path) as aside:
        Image.fromarray(torch.cat(lines).numpy()).save(aside, format="PNG")


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
