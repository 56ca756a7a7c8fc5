"""Frames without interlacing, and one frame to upright RGB of a given size: colour, HDR, orientation, crop, scale.

Ordinary frames become 8-bit RGB by ffmpeg's own conversion. HDR and wide-gamut frames are converted to what an SDR
screen of BT.709 shows, in float: signal to linear light, primaries to BT.709, a tone curve for HDR, and back by the
display's gamma.
"""

import math
from collections.abc import Iterator
from contextlib import suppress
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import torch
import torch.nn.functional as F
from av.sidedata.sidedata import Type as SideData
from av.video.reformatter import ColorPrimaries, Colorspace, ColorTrc
from PIL import ExifTags, Image, UnidentifiedImageError
from torch import Tensor

# Where nothing is tagged, players take BT.709 for HD and BT.601 below it.
HD_LINES, HD_COLUMNS = 720, 1280
UNTAGGED = 2  # AVCOL_SPC_UNSPECIFIED, which PyAV does not name
# How a picture lies, as (a, b, c, d) of its display matrix: column x and row y are shown at (a x + c y, b x + d y).
Orientation = tuple[float, float, float, float]
EXIF_ORIENTATIONS: dict[int, Orientation] = {
    1: (1, 0, 0, 1),
    2: (-1, 0, 0, 1),
    3: (-1, 0, 0, -1),
    4: (1, 0, 0, -1),
    5: (0, 1, 1, 0),
    6: (0, 1, -1, 0),
    7: (0, -1, -1, 0),
    8: (0, -1, 1, 0),
}
# Linear RGB to linear BT.709 RGB, both with white D65. BT.2020: ITU-R BT.2087-0, table 2. Display P3: SMPTE EG 432-1's
# chromaticities.
TO_BT709 = {
    ColorPrimaries.BT2020: ((1.6605, -0.5876, -0.0728), (-0.1246, 1.1329, -0.0083), (-0.0182, -0.1006, 1.1187)),
    ColorPrimaries.SMPTE432: ((1.2249, -0.2249, 0.0), (-0.0421, 1.0421, 0.0), (-0.0196, -0.0786, 1.0983)),
}
BT2020_LUMA = (0.2627, 0.6780, 0.0593)  # ITU-R BT.2020-2, table 4
DISPLAY_GAMMA = 2.4  # ITU-R BT.1886: what an SDR screen makes of a signal
REFERENCE_WHITE = 203.0  # cd/m²; a white sheet in HDR (ITU-R BT.2408), shown as white in SDR
HDR_PEAK = 1000.0  # cd/m²; HLG's nominal display (ITU-R BT.2100); PQ above it is cut, though files may hold 10,000
TONE_KNEE = 0.7  # of the reference white; linear light up to it is kept, what lies above is compressed


def fit(
    frame: av.VideoFrame, pixel_aspect: Fraction | None, orientation: Orientation, height: int, width: int
) -> Tensor:
    """One frame, upright, cut at its centre to the shape of the result and scaled to it: (height, width, 3) uint8.

    Cutting first gives what scaling to cover and cropping gives, to half a source pixel, and never scales what is cut.
    """
    special = frame.color_trc in HDR or frame.color_primaries in TO_BT709
    if frame.colorspace == UNTAGGED and (frame.height >= HD_LINES or frame.width >= HD_COLUMNS):
        frame.colorspace = Colorspace.ITU709
    pixels = torch.from_numpy(frame.to_ndarray(format="rgb48le" if special else "rgb24"))  # (rows, columns, 3)
    across, down = orientation[0] or orientation[2], orientation[3] or orientation[1]
    aspect = float(pixel_aspect) if pixel_aspect else 1.0  # width over height of one pixel
    if not orientation[0]:
        pixels, aspect = pixels.transpose(0, 1), 1 / aspect
    if mirrored := [axis for axis, direction in enumerate((down, across)) if direction < 0]:
        pixels = pixels.flip(mirrored)
    rows, columns, _ = pixels.shape
    kept_rows = min(rows, max(1, round(columns * aspect * height / width)))
    kept_columns = min(columns, max(1, round(rows / aspect * width / height)))
    top, left = (rows - kept_rows) // 2, (columns - kept_columns) // 2
    kept = pixels[None, top : top + kept_rows, left : left + kept_columns]
    if not special:
        return resize(kept, (height, width))[0]
    signal = resize(kept.float() / 65535, (height, width))[0].clamp(0, 1)
    return _to_sdr(signal, frame.color_trc, frame.color_primaries)


def resize(frames: Tensor, size: tuple[int, int]) -> Tensor:
    """(T, H, W, 3) to another (H, W), antialiased bicubic."""
    if frames.shape[1:3] == size:
        return frames
    images = frames.permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last)
    return F.interpolate(images, size=size, mode="bicubic", antialias=True).permute(0, 2, 3, 1)


def orientation_of(frame: av.VideoFrame) -> Orientation:
    """How a video's frame is to be shown, by its display matrix, to the nearest quarter turn and flip."""
    try:
        matrix = frame.side_data.get(SideData.DISPLAYMATRIX)
    except ValueError:  # side data beside it of a kind that PyAV does not know: its angle is what can be had
        angle = math.radians(frame.rotation)  # counter-clockwise
        a, b, c, d = math.cos(angle), -math.sin(angle), math.sin(angle), math.cos(angle)
    else:
        if matrix is None:
            return EXIF_ORIENTATIONS[1]
        a, b, _, c, d = np.frombuffer(matrix, dtype="=i4")[:5].tolist()
    if abs(a) + abs(d) >= abs(b) + abs(c):
        return math.copysign(1, a), 0, 0, math.copysign(1, d)
    return 0, math.copysign(1, b), math.copysign(1, c), 0


def orientation_of_still(path: Path) -> Orientation:
    """How a picture file is to be shown, by its EXIF data."""
    try:
        with Image.open(path) as image:
            value = image.getexif().get(ExifTags.Base.Orientation, 1)
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError):  # ffmpeg reads more formats, and damaged ones
        value = 1
    return EXIF_ORIENTATIONS.get(value, EXIF_ORIENTATIONS[1])


def _to_sdr(signal: Tensor, transfer: int, primaries: int) -> Tensor:
    """RGB signal (H, W, 3) in [0, 1] to what an SDR screen shows: uint8 BT.709."""
    light = HDR[transfer](signal) / REFERENCE_WHITE if transfer in HDR else signal**DISPLAY_GAMMA
    matrix = TO_BT709.get(primaries)
    if matrix is None and transfer in HDR and primaries == ColorPrimaries.UNSPECIFIED:
        matrix = TO_BT709[ColorPrimaries.BT2020]
    if matrix is not None:
        light = light @ torch.tensor(matrix).T
    if transfer in HDR:
        light = _tone_mapped(light)
    return (light.clamp(0, 1) ** (1 / DISPLAY_GAMMA) * 255).round().to(torch.uint8)


def _pq_light(signal: Tensor) -> Tensor:
    """ITU-R BT.2100, table 4: the PQ signal's light in cd/m²."""
    m1, m2, c1, c2, c3 = 1305 / 8192, 2523 / 32, 107 / 128, 2413 / 128, 2392 / 128
    power = signal ** (1 / m2)
    return 10000 * ((power - c1).clamp(min=0) / (c2 - c3 * power)) ** (1 / m1)


def _hlg_light(signal: Tensor) -> Tensor:
    """ITU-R BT.2100, table 5: the HLG signal's light in cd/m² on its nominal display, system gamma 1.2."""
    a, b, c = 0.17883277, 0.28466892, 0.55991073
    scene = torch.where(signal <= 0.5, signal**2 / 3, (((signal - c) / a).exp() + b) / 12)
    luma = (scene * torch.tensor(BT2020_LUMA)).sum(dim=-1, keepdim=True)
    return HDR_PEAK * luma**0.2 * scene


HDR = {ColorTrc.SMPTE2084: _pq_light, ColorTrc.ARIB_STD_B67: _hlg_light}


def _tone_mapped(light: Tensor) -> Tensor:
    """Light (H, W, 3) in units of the reference white to [0, 1]: a Möbius curve of the brightest of R, G and B.

    It is the identity up to the knee j, with slope 1 there, and 1 at the peak. Hue and saturation are kept. This is
    ffmpeg's `tonemap=mobius:desat=0`.
    """
    j, peak = TONE_KNEE, HDR_PEAK / REFERENCE_WHITE
    a = -(j**2) * (peak - 1) / (j**2 - 2 * j + peak)
    b = (j**2 - 2 * j * peak + peak) / (peak - 1)
    brightest = light.amax(dim=-1, keepdim=True).clamp(min=1e-6)
    curve = (b + j) ** 2 / (b - a) * (brightest + a) / (brightest + b)
    return light * torch.where(brightest <= j, 1, curve / brightest)


def deinterlaced(frames: Iterator[av.VideoFrame]) -> Iterator[av.VideoFrame]:
    """The same frames, one for one; from the first interlaced one on, interlaced ones are deinterlaced."""
    graph = shape = None
    for frame in frames:
        if graph is None and not frame.interlaced_frame:
            yield frame
            continue
        if shape != (frame.width, frame.height, frame.format.name):
            if graph is not None:
                yield from _filtered(graph, None)
            shape = (frame.width, frame.height, frame.format.name)
            graph = av.filter.Graph()
            source = graph.add_buffer(
                width=frame.width, height=frame.height, format=frame.format, time_base=frame.time_base
            )
            graph.link_nodes(source, graph.add("bwdif", "mode=send_frame:deint=interlaced"), graph.add("buffersink"))
            graph.configure()
        yield from _filtered(graph, frame)
    if graph is not None:
        yield from _filtered(graph, None)


def _filtered(graph, frame: av.VideoFrame | None) -> Iterator[av.VideoFrame]:
    """What the filter gives for one more frame; for None, what it still holds."""
    graph.vpush(frame)
    with suppress(BlockingIOError, EOFError):
        while True:
            yield graph.vpull()
