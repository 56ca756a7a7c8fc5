"""Clips in and out: timing, size, colour, damage. Every file is made here."""

import struct
from fractions import Fraction

import av
import numpy as np
import pytest
import torch
from PIL import Image

from train.clips import (
    ClipError,
    VideoConfig,
    contact_sheet,
    from_pixels,
    motion_energy,
    read_clip,
    side_by_side,
    to_pixels,
    write_clip,
)


def grey_steps(num_frames: int, *, height: int = 64, width: int = 64, step: int = 10) -> torch.Tensor:
    """Frame i is grey of value i * step, so that a frame's brightness is its number."""
    values = torch.arange(num_frames, dtype=torch.uint8) * step
    return values[:, None, None, None].expand(num_frames, height, width, 3).contiguous()


def frame_numbers(clip: torch.Tensor, step: int = 10) -> list[int]:
    return (clip.float().mean(dim=(1, 2, 3)) / step).round().int().tolist()


def scene(num_frames: int = 9, height: int = 64, width: int = 96) -> torch.Tensor:
    """Smooth colours that change over space and time."""
    frames = torch.zeros(num_frames, height, width, 3)
    frames[..., 0] = torch.linspace(20, 230, width)
    frames[..., 1] = torch.linspace(30, 220, height)[:, None]
    frames[..., 2] = torch.linspace(60, 190, num_frames)[:, None, None]
    return frames.round().to(torch.uint8)


def video(num_frames: int = 9, fps: float = 8.0, height: int = 64, width: int = 64) -> VideoConfig:
    return VideoConfig(height=height, width=width, num_frames=num_frames, fps=fps)


def test_round_trip_keeps_size_length_and_colours(tmp_path):
    frames = scene()
    write_clip(tmp_path / "clip.mp4", frames, 8)
    back = read_clip(tmp_path / "clip.mp4", video(width=96))
    assert back.shape == frames.shape and back.dtype == torch.uint8
    assert (back.float() - frames.float()).abs().mean() < 2.5


@pytest.mark.parametrize("colour", [(255, 0, 0), (0, 255, 0), (0, 0, 255), (200, 100, 50)])
def test_colours_survive_for_readers_who_go_by_the_tags(tmp_path, colour):
    frames = torch.tensor(colour, dtype=torch.uint8).expand(3, 64, 64, 3).contiguous()
    write_clip(tmp_path / "clip.mp4", frames, 8)
    back = read_clip(tmp_path / "clip.mp4", video(num_frames=3))
    assert (back.int() - frames.int()).abs().max() <= 4


def test_equal_frames_give_equal_bytes(tmp_path):
    for number in range(6):
        write_clip(tmp_path / f"{number}.mp4", scene(), 8)
    assert len({(tmp_path / f"{number}.mp4").read_bytes() for number in range(6)}) == 1
    assert not list(tmp_path.glob(".*"))  # no temporary file is left


@pytest.mark.parametrize(("height", "width"), [(64, 96), (63, 95)])
def test_lossless_clips_come_back_bit_for_bit(tmp_path, height, width):
    shape = (9, height, width, 3)
    frames = torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    for number in range(2):
        write_clip(tmp_path / f"{number}.mp4", frames, 8, lossless=True)
    back = read_clip(tmp_path / "0.mp4", video(height=height, width=width))
    assert torch.equal(back, frames)
    assert (tmp_path / "0.mp4").read_bytes() == (tmp_path / "1.mp4").read_bytes()


def test_motion_energy_by_hand():
    """Grey 0, 10, 20: every pixel changes by 10 of 255 twice. Half the pixels going 0, 255, 0: half the range."""
    assert motion_energy(grey_steps(3)) == pytest.approx(10 / 255)
    flicker = grey_steps(3, step=0)
    flicker[1, :32] = 255
    assert motion_energy(flicker) == pytest.approx(0.5)
    assert motion_energy(grey_steps(1)) == 0


def test_written_clip_plays_in_browsers(tmp_path):
    write_clip(tmp_path / "clip.mp4", scene(height=63, width=95), 23.976)
    data = (tmp_path / "clip.mp4").read_bytes()
    assert data.index(b"moov") < data.index(b"mdat")  # playable before it is loaded
    with av.open(str(tmp_path / "clip.mp4")) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.pix_fmt) == ("h264", "yuv420p")
        assert (stream.width, stream.height) == (96, 64)  # odd sides are padded
        assert float(stream.average_rate) == pytest.approx(23.976, abs=1e-3)


@pytest.mark.parametrize(
    ("fps", "num_frames", "start", "expected"),
    [
        (8.0, 8, 0.0, [0, 3, 6, 9, 12, 15, 18, 21]),
        (8.0, 4, 0.5, [12, 15, 18, 21]),
        (16.0, 5, 0.0, [0, 1, 3, 4, 6]),  # the frame shown at 1/16 s is the second of 24 a second
        (24.0, 24, 0.0, list(range(24))),
        (48.0, 6, 0.0, [0, 0, 1, 1, 2, 2]),
        (8.0, 3, 0.07, [1, 4, 7]),
    ],
)
def test_resampling_takes_the_frame_shown_at_each_time(tmp_path, fps, num_frames, start, expected):
    write_clip(tmp_path / "clip.mp4", grey_steps(24), 24)
    clip = read_clip(tmp_path / "clip.mp4", video(num_frames, fps), start=start)
    assert frame_numbers(clip) == expected


def test_variable_frame_rate_goes_by_presentation_time(tmp_path):
    times = [0, 100, 500, 550, 600, 1000]  # milliseconds
    with av.open(str(tmp_path / "clip.mkv"), "w") as container:
        stream = container.add_stream("libx264", rate=24)
        stream.width = stream.height = 64
        stream.codec_context.time_base = Fraction(1, 1000)
        for pixels, time in zip(grey_steps(len(times), step=40), times, strict=True):
            frame = av.VideoFrame.from_ndarray(pixels.numpy(), format="rgb24")
            frame.pts, frame.time_base = time, Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    clip = read_clip(tmp_path / "clip.mkv", video(num_frames=5, fps=4))  # at 0, 250, 500, 750, 1000 ms
    assert frame_numbers(clip, step=40) == [0, 1, 2, 4, 5]


@pytest.mark.parametrize("suffix", ["mp4", "ts"])  # with an index to seek by, and without
def test_a_late_start_is_found_by_seeking(tmp_path, suffix):
    path = tmp_path / f"clip.{suffix}"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=12, options={"g": "40", "bf": "3"})
        stream.width = stream.height = 32
        for number in range(200):
            pixels = np.full((32, 32, 3), number, dtype=np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    clip = read_clip(path, video(num_frames=4, fps=4, height=32, width=32), start=12.5)
    assert frame_numbers(clip, step=1) == pytest.approx([150, 153, 156, 159], abs=1)


def test_centre_crop_and_scale(tmp_path):
    frames = torch.zeros(3, 64, 128, 3, dtype=torch.uint8)
    frames[:, :, 32:96, 0] = 255  # red in the middle square, black beside it
    write_clip(tmp_path / "clip.mp4", frames, 8)
    clip = read_clip(tmp_path / "clip.mp4", video(num_frames=3, height=32, width=32))
    assert clip.shape == (3, 32, 32, 3)
    assert clip[:, :, 2:-2, 0].min() > 230  # the square fills the picture
    tall = read_clip(tmp_path / "clip.mp4", video(num_frames=3, height=128, width=32))
    assert tall.shape == (3, 128, 32, 3) and tall[..., 0].min() > 200


def test_scaling_down_is_antialiased(tmp_path):
    frames = torch.zeros(3, 128, 128, 3, dtype=torch.uint8)
    frames[:, :, ::2] = 255  # one-pixel stripes: any subsampling gives black or white
    write_clip(tmp_path / "clip.mp4", frames, 8)
    clip = read_clip(tmp_path / "clip.mp4", video(num_frames=3, height=32, width=32))
    assert 100 < clip.float().mean() < 155 and clip.float().std() < 25


def test_rotation_flag_is_honoured(tmp_path):
    frames = torch.zeros(3, 64, 96, 3, dtype=torch.uint8)
    frames[:, :32, :48] = 255  # white top left
    write_clip(tmp_path / "clip.mp4", frames, 8)
    data = bytearray((tmp_path / "clip.mp4").read_bytes())
    matrix = data.index(b"tkhd") + 44
    # A phone held upright: show the picture turned clockwise by 90 degrees.
    data[matrix : matrix + 36] = struct.pack(">9i", 0, 1 << 16, 0, -1 << 16, 0, 0, 64 << 16, 0, 1 << 30)
    (tmp_path / "turned.mp4").write_bytes(data)
    clip = read_clip(tmp_path / "turned.mp4", video(num_frames=3, height=96, width=64)).float()
    assert clip[:, 4:44, 36:60].min() > 230  # top right
    assert clip[:, 4:44, 4:28].max() < 25 and clip[:, 52:92].max() < 25


def test_non_square_pixels_are_honoured(tmp_path):
    with av.open(str(tmp_path / "clip.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=8)
        stream.width, stream.height = 64, 64
        stream.codec_context.sample_aspect_ratio = Fraction(2, 1)  # shown as 128 x 64
        pixels = np.zeros((64, 64, 3), dtype=np.uint8)
        pixels[:, 16:48] = 255  # the middle half
        for _ in range(3):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    clip = read_clip(tmp_path / "clip.mp4", video(num_frames=3))
    assert clip[:, :, 2:-2].min() > 220  # the centre square of 128 x 64 is the white half


def test_a_picture_is_a_clip_of_one_frame(tmp_path):
    Image.new("RGB", (80, 60), (10, 200, 30)).save(tmp_path / "frame.png")
    clip = read_clip(tmp_path / "frame.png", video(num_frames=1))
    assert clip.shape == (1, 64, 64, 3)
    assert (clip.int() - torch.tensor([10, 200, 30])).abs().max() <= 2


def damaged(tmp_path, fraction: float):
    noise = torch.randint(0, 255, (9, 64, 64, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    write_clip(tmp_path / "whole.mp4", noise, 8)
    data = (tmp_path / "whole.mp4").read_bytes()
    (tmp_path / "clip.mp4").write_bytes(data[: int(len(data) * fraction)])
    return tmp_path / "clip.mp4"


@pytest.mark.parametrize("fraction", [0.3, 0.6, 0.95])
def test_truncated_file(tmp_path, fraction):
    with pytest.raises(ClipError, match="truncated") as error:
        read_clip(damaged(tmp_path, fraction), video())
    assert error.value.reason == "truncated"


def test_a_truncated_file_is_read_as_far_as_it_is_whole(tmp_path):
    assert read_clip(damaged(tmp_path, 0.6), video(num_frames=2)).shape == (2, 64, 64, 3)


def test_file_cut_before_its_index(tmp_path):
    with pytest.raises(ClipError, match="unreadable.*cut short"):
        read_clip(damaged(tmp_path, 0.001), video())


def test_short_clip_names_both_lengths_and_the_remedy(tmp_path):
    write_clip(tmp_path / "clip.mp4", grey_steps(3), 8)
    with pytest.raises(ClipError, match="ends at 0.38 s, but 9 frames at 8 fps from 0 s need 1.00 s; use a longer"):
        read_clip(tmp_path / "clip.mp4", video())
    with pytest.raises(ClipError, match="ends at 0.38 s.*from 5 s"):
        read_clip(tmp_path / "clip.mp4", video(num_frames=1), start=5)


def test_missing_file_and_text_file(tmp_path):
    with pytest.raises(ValueError, match="no such file"):
        read_clip(tmp_path / "none.mp4", video())
    (tmp_path / "text.mp4").write_text("not a video\n" * 50, encoding="utf-8")
    with pytest.raises(ValueError, match="unreadable"):
        read_clip(tmp_path / "text.mp4", video())


def test_file_without_a_video_stream(tmp_path):
    with av.open(str(tmp_path / "sound.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=16000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), dtype=np.float32), format="fltp", layout="mono")
        frame.rate = 16000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    with pytest.raises(ClipError, match="no video stream"):
        read_clip(tmp_path / "sound.mp4", video())


def test_absurd_size_is_refused_before_decoding(tmp_path, monkeypatch):
    write_clip(tmp_path / "wide.mp4", torch.zeros(2, 16, 8208, 3, dtype=torch.uint8), 8)
    monkeypatch.setattr("train.clips._shown_frames", lambda *_: pytest.fail("decoded"))
    with pytest.raises(ClipError, match="8208x16 pixels; at most 8192"):
        read_clip(tmp_path / "wide.mp4", video(num_frames=2))


def test_bad_start_and_rate(tmp_path):
    write_clip(tmp_path / "clip.mp4", grey_steps(9), 8)
    for start in (-1.0, float("nan")):
        with pytest.raises(ValueError, match="start must be"):
            read_clip(tmp_path / "clip.mp4", video(), start=start)
    with pytest.raises(ValueError, match="video.fps=0"):
        video(fps=0)


def test_pixels_to_network_and_back():
    frames = torch.arange(256, dtype=torch.uint8).repeat(3)[: 2 * 4 * 8 * 3].reshape(2, 4, 8, 3)
    network = from_pixels(frames)
    assert network.shape == (3, 2, 4, 8) and network.min() == -1 and network.max() < 1
    assert network[2, 1, 3, 7] == frames[1, 3, 7, 2] / 127.5 - 1
    batch = from_pixels(frames[None])
    assert batch.shape == (1, 3, 2, 4, 8)
    assert torch.equal(to_pixels(batch), frames[None])
    assert to_pixels(torch.tensor([-3.0, 3.0]).view(1, 1, 1, 1, 2).expand(1, 3, 1, 1, 2)).unique().tolist() == [0, 255]


def test_side_by_side_keeps_pixels_below_a_caption():
    left, right = grey_steps(3, height=48, width=64), grey_steps(3, height=48, width=64, step=40)
    joined = side_by_side([left, right], ["base", "a label much too long for sixty-four pixels"])
    bar = joined.shape[1] - 48
    assert joined.shape == (3, 48 + bar, 128, 3) and bar > 0
    assert torch.equal(joined[:, bar:, :64], left) and torch.equal(joined[:, bar:, 64:], right)
    for caption in (joined[0, :bar, :64], joined[0, :bar, 64:]):
        assert caption.max() > 150  # text
        assert caption[:, -1].max() == 0  # that ends inside its clip
    with pytest.raises(ValueError, match="one shape"):
        side_by_side([left, right[:2]], ["a", "b"])


def test_contact_sheet_shows_evenly_spaced_frames(tmp_path):
    rows = [("one", grey_steps(11)), ("two", grey_steps(11, height=32, width=700))]
    contact_sheet(tmp_path / "sheet.png", rows, columns=6)
    sheet = torch.from_numpy(np.array(Image.open(tmp_path / "sheet.png")))
    assert sheet.shape == (18 + 64 + 18 + 15, 6 * 320, 3)  # wide frames are shrunk to 320 pixels
    shown = [int(sheet[18 + 32, 32 + 64 * column, 0]) // 10 for column in range(6)]
    assert shown == [0, 2, 4, 6, 8, 10]
