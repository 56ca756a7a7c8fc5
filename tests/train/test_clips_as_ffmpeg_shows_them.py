"""Files as they come from phones, cameras, editors and broken downloads, against ffmpeg's own decode or by hand.

Frame n of a film is as bright as its number on its left half, so that the choice of frames can be read off.
"""

import random
import struct
import subprocess
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from train.clips import ClipError, VideoConfig, contact_sheet, read_clip, write_clip

imageio_ffmpeg = pytest.importorskip("imageio_ffmpeg")
HEIGHT, WIDTH = 64, 96
CORNERS = ((16, 24), (16, 72), (48, 24), (48, 72))
COLOURS = ((220, 30, 30), (30, 200, 30), (30, 30, 220), (230, 230, 230))
EVERY_125_MS = [0, 3, 7, 11, 15, 18, 22, 26, 30, 33, 37, 41, 45, 48, 52, 56, 60]  # of 30 frames a second
MATRICES = {  # (a, b, c, d) as phones and editors write them
    "as it is": (1, 0, 0, 1),
    "mirrored": (-1, 0, 0, 1),
    "turned half": (-1, 0, 0, -1),
    "upside down": (1, 0, 0, -1),
    "transposed": (0, 1, 1, 0),
    "turned right": (0, 1, -1, 0),
    "anti-transposed": (0, -1, -1, 0),
    "turned left": (0, -1, 1, 0),
}


def ffmpeg(*arguments, data: bytes | None = None) -> bytes:
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-y", "-threads", "1", *map(str, arguments)]
    return subprocess.run(command, input=data, check=True, capture_output=True).stdout


def shown_by_ffmpeg(path: Path, *arguments, height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    """Every frame, (T, height, width, 3)."""
    data = ffmpeg("-i", path, *arguments, "-f", "rawvideo", "-pix_fmt", "rgb24", "-")
    return np.frombuffer(data, np.uint8).reshape(-1, height, width, 3)


def encode(path: Path, frames: np.ndarray, *arguments, fps: float = 30, pixels: str = "rgb24") -> Path:
    _, height, width, _ = frames.shape
    source = ["-f", "rawvideo", "-pix_fmt", pixels, "-s", f"{width}x{height}", "-r", fps, "-i", "-"]
    ffmpeg(*source, *arguments, path, data=frames.tobytes())
    return path


def film(num_frames: int = 90) -> np.ndarray:
    """Frame n: its number as a brightness on the left, a moving pattern on the right, so that B-frames pay."""
    number = np.arange(num_frames)[:, None, None]
    rows, columns = np.arange(HEIGHT)[None, :, None], np.arange(WIDTH)[None, None, :]
    grey = np.where(
        columns < WIDTH // 2, np.minimum(3 * number + 15, 240), (columns * 3 + rows * 5 + number * 7) % 200 + 20
    )
    return np.broadcast_to(grey[..., None], (num_frames, HEIGHT, WIDTH, 3)).astype(np.uint8)


def corners(num_frames: int = 6, height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    picture = np.zeros((height, width, 3), np.uint8)
    for number, colour in enumerate(COLOURS):
        row, column = divmod(number, 2)
        picture[row * height // 2 :, column * width // 2 :] = colour
        if column:
            picture[row * height // 2 :, : width // 2] = COLOURS[number - 1]
    return np.repeat(picture[None], num_frames, axis=0)


def numbers(clip: torch.Tensor) -> list[int]:
    return ((clip[:, 4:-4, 4:40].float().mean(dim=(1, 2, 3)) - 15) / 3).round().int().tolist()


def at_corners(frame) -> torch.Tensor:
    return torch.stack([torch.as_tensor(np.array(frame[row, column])) for row, column in CORNERS]).int()


def video(num_frames: int = 17, fps: float = 8, height: int = HEIGHT, width: int = WIDTH) -> VideoConfig:
    return VideoConfig(height, width, num_frames, fps)


H264 = ("-c:v", "libx264", "-pix_fmt", "yuv420p", "-crf", 4, "-bf", 3, "-x264-params", "b-adapt=0")


@pytest.fixture(scope="module")
def mp4(tmp_path_factory) -> Path:
    return encode(tmp_path_factory.mktemp("film") / "film.mp4", film(), *H264, "-g", 30)


# ---- when a frame is shown -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("suffix", "codec"),
    [
        ("mp4", ["copy"]),
        ("avi", ["copy"]),
        ("avi", ["libxvid", "-bf", 2, "-q:v", 1]),
        ("avi", ["mpeg4", "-bf", 2, "-q:v", 1]),
        ("avi", ["mjpeg", "-q:v", 1]),
        ("mkv", ["copy"]),
        ("mpg", ["mpeg2video", "-bf", 2, "-q:v", 1]),
        ("asf", ["mpeg4", "-bf", 2, "-q:v", 1]),
    ],
)
def test_b_frames_come_at_their_times_in_every_container(tmp_path, mp4, suffix, codec):
    ffmpeg("-i", mp4, "-c:v", *codec, tmp_path / f"clip.{suffix}")
    found = numbers(read_clip(tmp_path / f"clip.{suffix}", video()))
    assert np.abs(np.subtract(found, EVERY_125_MS)).max() <= (1 if "-q:v" in codec else 0)  # brightness of old codecs


def test_an_mp4_whose_times_are_those_of_decoding_is_read_in_order(tmp_path, mp4):
    """As older tools make them of AVI: every frame is there, the stamps of B-frames go back and forth."""
    ffmpeg("-i", mp4, "-c:v", "mpeg4", "-bf", 2, "-q:v", 1, "-bsf:v", "setts=pts=DTS", tmp_path / "clip.mp4")
    found = numbers(read_clip(tmp_path / "clip.mp4", video()))
    assert np.abs(np.subtract(found, EVERY_125_MS)).max() <= 1


def test_the_last_frame_of_an_avi_with_b_frames_is_shown_as_long_as_the_others(tmp_path, mp4):
    ffmpeg("-i", mp4, "-c", "copy", tmp_path / "clip.avi")
    assert read_clip(tmp_path / "clip.avi", video(25, 8)).shape[0] == 25  # the last one lies at 3 s, where it ends


def test_a_late_start_in_an_avi_with_b_frames(tmp_path):
    steps = np.repeat(np.arange(0, 200, dtype=np.uint8), 2)[:, None, None, None]  # 400 frames, 25 a second
    encode(tmp_path / "clip.mp4", np.tile(steps, (1, 32, 32, 3)), *H264, "-g", 50, fps=25)
    ffmpeg("-i", tmp_path / "clip.mp4", "-c", "copy", tmp_path / "clip.avi")
    clip = read_clip(tmp_path / "clip.avi", video(4, 5, 32, 32), start=12.0)  # frames 300, 305, 310, 315
    assert np.abs(clip.float().mean(dim=(1, 2, 3)).numpy() - [150, 152, 155, 157]).max() <= 1


def test_a_raw_stream_is_named_with_a_command_that_mends_it(tmp_path, mp4):
    raw = tmp_path / "clip.h264"
    ffmpeg("-i", mp4, "-c", "copy", "-bsf:v", "h264_mp4toannexb", raw)
    with pytest.raises(ClipError, match="no time stamps: .*ffmpeg -r 30 -i IN -crf 12 OUT.mp4") as error:
        read_clip(raw, video())
    assert error.value.reason == "no time stamps"
    ffmpeg("-r", 30, "-i", raw, "-crf", 12, tmp_path / "mended.mp4")
    assert np.abs(np.subtract(numbers(read_clip(tmp_path / "mended.mp4", video())), EVERY_125_MS)).max() <= 1


@pytest.mark.parametrize("codec", ["libx264", "mpeg2video"])
def test_a_recording_that_begins_between_key_frames_starts_at_the_first(tmp_path, codec):
    quality = ["-crf", 4] if codec == "libx264" else ["-q:v", 1]
    encode(tmp_path / "whole.ts", film(), "-c:v", codec, *quality, "-g", 30, "-bf", 2, "-sc_threshold", 10**9)
    data = (tmp_path / "whole.ts").read_bytes()
    with av.open(str(tmp_path / "whole.ts")) as container:
        position = [packet.pos for packet in container.demux(video=0) if packet.pos is not None][10]
    (tmp_path / "clip.ts").write_bytes(data[: 3 * 188] + data[position // 188 * 188 :])
    found = numbers(read_clip(tmp_path / "clip.ts", video(8)))
    assert 28 <= found[0] <= 31  # the second key frame
    assert np.abs(np.subtract(found, found[0]) - EVERY_125_MS[:8]).max() <= 1


@pytest.mark.parametrize(("rate", "num_frames", "fps"), [(r, 81, 16) for r in (24, 25, 30, 60)] + [(24, 121, 24)])
def test_a_clip_of_five_seconds_gives_81_frames_of_16_and_121_of_24(tmp_path, rate, num_frames, fps):
    frames = np.repeat(np.arange(5 * rate) % 200 + 20, 16 * 16 * 3).reshape(-1, 16, 16, 3).astype(np.uint8)
    encode(tmp_path / "clip.mp4", frames, "-c:v", "libx264", "-qp", 4, "-pix_fmt", "yuv444p", fps=rate)
    clip = read_clip(tmp_path / "clip.mp4", video(num_frames, fps, 16, 16))
    chosen = [min(i * rate // fps, 5 * rate - 1) for i in range(num_frames)]  # the last one, at 5 s, is held
    assert np.abs(clip.float().mean(dim=(1, 2, 3)).numpy() - frames[chosen].mean(axis=(1, 2, 3))).max() < 2


@pytest.mark.parametrize(("rate", "count"), [(30, 147), (60, 298), (4, 19)])
def test_a_clip_that_lacks_more_than_a_frame_is_refused_with_the_seconds_needed(tmp_path, rate, count):
    """4.9, 4.97 and 4.75 s. At 4 frames a second the last one is held for 1/16 s, not for its own 1/4 s."""
    encode(tmp_path / "clip.mp4", np.zeros((count, 16, 16, 3), np.uint8), "-c:v", "libx264", fps=rate)
    with pytest.raises(ClipError, match=rf"ends at {count / rate:.2f} s, .* from 0 s need 5.00 s") as error:
        read_clip(tmp_path / "clip.mp4", video(81, 16, 16, 16))
    assert error.value.reason == "too short"


# ---- which way up ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MATRICES)
def test_display_matrices_are_honoured_flips_too(tmp_path, name):
    path = encode(tmp_path / "plain.mp4", corners(), *H264, fps=8)
    data = bytearray(path.read_bytes())
    a, b, c, d = (65536 * value for value in MATRICES[name])
    place = data.index(b"tkhd") + 44
    data[place : place + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    (tmp_path / "clip.mp4").write_bytes(data)
    height, width = (HEIGHT, WIDTH) if a else (WIDTH, HEIGHT)
    clip = read_clip(tmp_path / "clip.mp4", video(2, 8, height, width))
    shown = shown_by_ffmpeg(tmp_path / "clip.mp4", height=height, width=width)
    assert (clip[0].int() - torch.tensor(shown[0]).int()).abs().float().mean() < 2


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
def test_first_frames_lie_as_their_exif_orientation_says(tmp_path, suffix, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(corners(1)[0]).save(tmp_path / f"frame.{suffix}", exif=exif, quality=95, lossless=True)
    shown = np.array(ImageOps.exif_transpose(Image.open(tmp_path / f"frame.{suffix}")).convert("RGB"))
    clip = read_clip(tmp_path / f"frame.{suffix}", video(1, 8, *shown.shape[:2]))
    assert (clip[0].int() - torch.tensor(shown).int()).abs().float().mean() < 3


# ---- colour ----------------------------------------------------------------------------------------------------------


def hlg_signal(light: np.ndarray) -> np.ndarray:
    """ITU-R BT.2100's inverse OOTF and OETF for a display of 1000 cd/m²."""
    luma = light @ np.array([0.2627, 0.6780, 0.0593])
    scene = light / 1000 / np.maximum(luma / 1000, 1e-9)[..., None] ** (1 / 6)
    a, b, c = 0.17883277, 0.28466892, 0.55991073
    return np.where(scene <= 1 / 12, np.sqrt(3 * scene), a * np.log(np.maximum(12 * scene - b, 1e-9)) + c)


def pq_signal(light: np.ndarray) -> np.ndarray:
    power = (light / 10000) ** (1305 / 8192)
    return ((107 / 128 + 2413 / 128 * power) / (1 + 2392 / 128 * power)) ** (2523 / 32)


def hdr_film(path: Path, light: np.ndarray, transfer: str) -> Path:
    """light: (H, W, 3) cd/m², BT.709 primaries."""
    to_bt2020 = np.array([[0.6274, 0.3293, 0.0433], [0.0691, 0.9195, 0.0114], [0.0164, 0.0880, 0.8956]])
    signal = {"arib-std-b67": hlg_signal, "smpte2084": pq_signal}[transfer](light @ to_bt2020.T)
    frames = np.repeat((signal.clip(0, 1) * 65535).round().astype("<u2")[None], 4, axis=0)
    tags = f"log-level=none:colorprim=bt2020:transfer={transfer}:colormatrix=bt2020nc"
    convert = ["-vf", "scale=out_color_matrix=bt2020:out_range=tv,format=yuv420p10le"]
    codec = ["-c:v", "libx265", "-x265-params", tags, "-crf", 4]
    return encode(path, frames, *convert, *codec, fps=8, pixels="rgb48le")


@pytest.mark.parametrize("transfer", ["arib-std-b67", "smpte2084"])
def test_hdr_clips_get_the_colours_of_an_sdr_screen(tmp_path, transfer):
    """SDR colours put into HDR with white at 203 cd/m² come back, but for the curve that makes room for highlights."""
    path = hdr_film(tmp_path / "clip.mp4", (corners(1)[0] / 255) ** 2.4 * 203, transfer)
    found = at_corners(read_clip(path, video(2))[0])
    assert (found - torch.tensor(COLOURS)).abs().max() <= 8
    assert (at_corners(shown_by_ffmpeg(path)[0]) - torch.tensor(COLOURS)).abs().max() > 40  # without tone mapping


def test_hdr_matches_ffmpegs_own_tone_mapping_highlights_too(tmp_path):
    light = np.repeat(np.geomspace(2, 900, WIDTH)[None, :, None], HEIGHT, axis=0) * np.array([1.0, 0.8, 0.6])
    path = hdr_film(tmp_path / "clip.mp4", light, "smpte2084")
    found = read_clip(path, video(2))[0].float()
    linear = "zscale=t=linear:npl=203,format=gbrpf32le,zscale=p=bt709"
    curve = f"tonemap=mobius:param=0.7:peak={1000 / 203}:desat=0,zscale=t=bt709:m=bt709:r=limited,format=yuv444p"
    expected = torch.tensor(shown_by_ffmpeg(path, "-vf", f"{linear},{curve}")[0]).float()
    assert (found - expected).abs().max() <= 6 and (found - expected).abs().mean() < 2


@pytest.mark.parametrize("primaries", ["bt2020", "smpte432"])
def test_wide_gamuts_are_converted_to_bt709(tmp_path, primaries):
    convert = f"zscale=tin=bt709:pin=bt709:min=gbr:rin=full:p={primaries}:t=bt709:m=bt709:r=limited,format=yuv444p10le"
    tags = f"log-level=none:colorprim={primaries}:transfer=bt709:colormatrix=bt709"
    codec = ["-c:v", "libx265", "-x265-params", tags, "-crf", 4]
    path = encode(tmp_path / "clip.mp4", corners(), "-vf", convert, *codec, fps=8)
    assert (at_corners(read_clip(path, video(2))[0]) - torch.tensor(COLOURS)).abs().max() <= 4
    assert (at_corners(shown_by_ffmpeg(path)[0]) - torch.tensor(COLOURS)).abs().max() > 15  # unconverted


@pytest.mark.parametrize(
    ("size", "matrix"), [((720, 1280), "bt709"), ((1280, 720), "bt709"), ((480, 640), "smpte170m")]
)
def test_clips_without_colour_tags_are_bt709_from_720_lines_on(tmp_path, size, matrix):
    height, width = size
    convert = f"scale={width}:{height}:flags=neighbor:out_color_matrix={matrix}:out_range=tv,format=yuv420p"
    untagged = "h264_metadata=colour_primaries=2:transfer_characteristics=2:matrix_coefficients=2"
    path = encode(tmp_path / "clip.mp4", corners(2), "-vf", convert, "-c:v", "libx264", "-bsf:v", untagged, fps=8)
    assert (at_corners(read_clip(path, video(2))[0]) - torch.tensor(COLOURS)).abs().max() <= 6


def test_dolby_vision_without_a_compatible_base_is_named(tmp_path):
    path = encode(tmp_path / "clip.mp4", corners(), "-c:v", "libx265", "-x265-params", "log-level=none", fps=8)
    path.write_bytes(path.read_bytes().replace(b"hev1", b"dvhe"))
    with pytest.raises(ClipError, match="HDR: Dolby Vision") as error:
        read_clip(path, video(2))
    assert error.value.reason == "HDR"


# ---- interlacing -----------------------------------------------------------------------------------------------------


def moving_bar(num_frames: int) -> np.ndarray:
    frames = np.zeros((num_frames, HEIGHT, WIDTH, 3), np.uint8)
    for number in range(num_frames):
        frames[number, :, 4 * number % 80 : 4 * number % 80 + 12] = 230
    return frames


def test_interlaced_clips_are_deinterlaced_frame_for_frame(tmp_path):
    codec = ["-c:v", "libx264", "-flags", "+ilme+ildct", "-pix_fmt", "yuv420p", "-crf", 4]
    path = encode(tmp_path / "clip.mp4", moving_bar(40), "-vf", "interlace=lowpass=0", *codec, fps=20)
    clip = read_clip(path, video(20, 10)).int()
    expected = torch.tensor(shown_by_ffmpeg(path, "-vf", "bwdif=mode=send_frame:deint=interlaced")).int()
    assert clip.shape == expected.shape and (clip - expected).abs().float().mean() < 1

    def combing(frames: torch.Tensor) -> float:
        return (2 * frames[:, 1:-1] - frames[:, :-2] - frames[:, 2:]).abs().float().mean().item()

    assert combing(clip) < 0.25 * combing(torch.tensor(shown_by_ffmpeg(path)).int())


# ---- damage, and what is no video ------------------------------------------------------------------------------------


def test_lost_packets_of_a_transport_stream_are_damage(tmp_path):
    noise = np.random.default_rng(0).integers(0, 255, (60, HEIGHT, WIDTH, 3), dtype=np.uint8)
    encode(tmp_path / "whole.ts", noise, "-c:v", "libx264", "-g", 20, "-bf", 2)
    data = (tmp_path / "whole.ts").read_bytes()
    cut = len(data) // 2 // 188 * 188
    (tmp_path / "clip.ts").write_bytes(data[:cut] + data[cut + 29 * 188 :])
    with pytest.raises(ClipError, match="truncated: damaged after") as error:
        read_clip(tmp_path / "clip.ts", video(12))
    assert error.value.reason == "truncated"
    whole, damaged = (read_clip(tmp_path / f"{name}.ts", video(6)) for name in ("whole", "clip"))
    assert torch.equal(whole, damaged)  # before the damage, a clip is as it was


def test_cover_art_is_no_video(tmp_path, mp4):
    Image.fromarray(corners(1)[0]).save(tmp_path / "cover.jpg")
    sound = ["-f", "lavfi", "-i", "sine=duration=1"]
    cover = ["-i", tmp_path / "cover.jpg"]
    ffmpeg(*sound, *cover, "-map", 0, "-map", 1, "-c:v", "copy", "-disposition:v:0", "attached_pic", tmp_path / "a.mp4")
    with pytest.raises(ClipError, match="no video stream"):
        read_clip(tmp_path / "a.mp4", video())
    maps = ["-map", 0, "-map", 1, "-c", "copy", "-disposition:v:0", "attached_pic", "-disposition:v:1", "default"]
    ffmpeg(*cover, "-i", mp4, *maps, tmp_path / "both.mp4")
    assert numbers(read_clip(tmp_path / "both.mp4", video())) == EVERY_125_MS


def test_a_codec_that_ffmpeg_does_not_know_is_named(tmp_path, mp4):
    (tmp_path / "clip.mp4").write_bytes(mp4.read_bytes().replace(b"avc1", b"zzzz"))
    with pytest.raises(ClipError, match="unknown codec") as error:
        read_clip(tmp_path / "clip.mp4", video())
    assert error.value.reason == "unknown codec"


@pytest.mark.parametrize(
    ("content", "detail"),
    [
        (b"", "it has 0 bytes"),
        (b"\n<HTML><head>Not found", "begins with <html"),
        (b"<!DOCTYPE html>\n<html>", "begins with <!DOCTYPE"),
        (b"\xef\xbb\xbf<?xml version='1.0'?><Error><Code>AccessDenied</Code>", "begins with <?xml"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00", "git lfs pull"),
        (b"ffconcat version 1.0\nfile film.mp4\n", "a playlist"),
        (b"#EXTM3U\n#EXT-X-TARGETDURATION:3\n#EXTINF:3,\nfilm.mp4\n#EXT-X-ENDLIST\n", "a playlist"),
        (b"# a comment\nffconcat version 1.0\nfile film.mp4\n", "no video file"),
    ],
)
@pytest.mark.parametrize("name", ["clip.mp4", "clip.m3u8"])
def test_files_that_are_no_video_say_what_they_are(tmp_path, mp4, content, detail, name):
    (tmp_path / "film.mp4").write_bytes(mp4.read_bytes())
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ClipError) as error:
        read_clip(tmp_path / name, video())
    assert error.value.reason == "unreadable" and detail in str(error.value)


def test_a_name_with_a_colon_or_a_percent_sign_is_that_file_and_no_other(tmp_path, mp4, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("12:30.mp4").write_bytes(mp4.read_bytes())
    assert numbers(read_clip("12:30.mp4", video())) == EVERY_125_MS
    Image.new("RGB", (32, 32), (200, 30, 30)).save("frame%d.png")
    Image.new("RGB", (32, 32), (30, 30, 200)).save("frame0.png")
    assert read_clip("frame%d.png", video(1))[..., 0].min() > 190
    write_clip("13:30.mp4", torch.zeros(2, 16, 16, 3, dtype=torch.uint8), 8)
    assert read_clip("13:30.mp4", video(2)).max() == 0


def test_no_link_is_followed_at_a_temporary_name(tmp_path):
    (tmp_path / "victim").write_text("keep", encoding="utf-8")
    for name in ("clip.mp4", "sheet.png"):
        (tmp_path / f".{name}.tmp").symlink_to(tmp_path / "victim")
    frames = torch.zeros(2, 16, 16, 3, dtype=torch.uint8)
    write_clip(tmp_path / "clip.mp4", frames, 8)
    contact_sheet(tmp_path / "sheet.png", [("a", frames)])
    assert (tmp_path / "victim").read_text(encoding="utf-8") == "keep"


NUMBERS = (b"\xff" * 4, bytes(4), b"\x7f\xff\xff\xff", b"\x80\0\0\0")


def mutated(data: bytes, generator: random.Random) -> bytes:
    """One damaged copy: bytes or whole numbers changed, mostly in headers, or a piece taken out."""
    damaged = bytearray(data)
    for _ in range(generator.choice((1, 1, 3, 20))):
        place = generator.randrange(min(len(damaged) - 8, generator.choice((1500, len(damaged)))))
        match generator.randrange(3):
            case 0:
                damaged[place] = generator.randrange(256)
            case 1:
                damaged[place : place + 4] = generator.choice(
                    (b"\xff" * 4, bytes(4), b"\x7f\xff\xff\xff", b"\x80\0\0\0")
                )
            case 2:
                del damaged[place : place + generator.randrange(1, 9)]
    return bytes(damaged)


@pytest.mark.parametrize("count", [10, pytest.param(170, marks=pytest.mark.slow)])
def test_damaged_files_of_every_kind_are_read_or_refused_as_clips(tmp_path, mp4, count):
    """12 formats; with 170 copies of each, 2,040 in all."""
    generator = random.Random(0)
    for suffix in ("mp4", "faststart.mp4", "avi", "mkv", "ts", "flv", "mov", "nut", "gif", "mpg", "asf", "jpg"):
        options = ["-movflags", "+faststart"] if suffix.startswith("fast") else []
        codec = ["-c", "copy"] if suffix in ("mp4", "faststart.mp4", "avi", "mkv", "ts", "flv", "mov", "nut") else []
        frames = ["-update", 1, "-frames:v", 1] if suffix == "jpg" else []
        ffmpeg("-i", mp4, *codec, *options, *frames, tmp_path / f"whole.{suffix}")
        data = (tmp_path / f"whole.{suffix}").read_bytes()
        for _ in range(count):
            (tmp_path / "clip").write_bytes(mutated(data, generator))
            try:
                clip = read_clip(tmp_path / "clip", video(2, 8, 16, 16), start=generator.choice((0.0, 0.0, 11.0)))
            except ClipError as error:
                assert error.reason
            else:
                assert clip.shape == (2, 16, 16, 3)
