"""How often a row's clip is decoded: once per stage that needs its pixels, one frame or none elsewhere."""

import json

import pytest
import torch

from data_pipeline import build
from data_pipeline.frames import FrameReader
from train import clips
from train.backbones.tiny import write_tiny_pipeline
from train.clips import ClipError, VideoConfig, write_clip

VIDEO = VideoConfig(32, 32, 9, 4.0)


@pytest.fixture
def pictures(monkeypatch):
    """The frames that are decoded to pictures, in a list that grows."""
    made, real = [], clips.fit
    monkeypatch.setattr(clips, "fit", lambda frame, *more: made.append(frame.time) or real(frame, *more))
    return made


def write(path, num_frames):
    frames = torch.randint(0, 255, (num_frames, 32, 32, 3), generator=torch.Generator().manual_seed(num_frames)).byte()
    write_clip(path, frames, 4)
    return {"source": "manifest", "path": str(path), "clip": path.name, "start": 0.0}


@pytest.mark.parametrize("start", [0.0, 0.6, 11.3])
def test_the_first_frame_is_that_of_the_whole_clip_and_the_only_one_that_is_decoded(start, tmp_path, pictures):
    row = write(tmp_path / "clip.mp4", 60) | {"start": start}
    reader = FrameReader(VIDEO, "cpu")
    reader.check(row)
    assert pictures == []
    (first,) = reader.read_first(row)
    assert len(pictures) == 1
    assert torch.equal(first, reader.read(row)[0]) and len(pictures) == 1 + VIDEO.num_frames


@pytest.mark.parametrize("damage", ["short", "held too long", "cut", "text", "none"])
def test_what_the_container_tells_is_refused_in_the_same_words_whatever_is_asked_for(damage, tmp_path):
    row = write(tmp_path / "clip.mp4", {"short": 5, "held too long": 7}.get(damage, 40))
    path, reader = tmp_path / "clip.mp4", FrameReader(VIDEO, "cpu")
    data = {"cut": path.read_bytes()[:-6000], "text": b"no clip"}.get(damage, path.read_bytes())
    path.write_bytes(data)
    if damage == "none":
        path.unlink()
    said = []
    for read in (reader.read, reader.read_first, reader.check):
        with pytest.raises(ClipError) as caught:
            read(row | {"start": 7.5 if damage == "cut" else 0.0})
        said.append((caught.value.reason, str(caught.value)))
    assert said[0] == said[1] == said[2]


def test_a_clip_whose_last_frame_is_held_is_taken_by_all(tmp_path):
    """Eight frames end at 2.00 s, where the ninth is due."""
    row, reader = write(tmp_path / "clip.mp4", 8), FrameReader(VIDEO, "cpu")
    reader.check(row)
    assert torch.equal(reader.read_first(row)[0], reader.read(row)[0])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "more", "decoded"),
    [
        ("wan21", [], {"generate": 0, "targets": 9, "encode": 9}),
        ("wan22_ti2v", ["pipeline.first_frame=true"], {"generate": 1, "targets": 9, "encode": 9}),
    ],
)
def test_each_stage_decodes_what_it_needs_of_a_clip(family, more, decoded, tmp_path, pictures):
    pytest.importorskip("cv2", reason="OpenCV is optional")
    write(tmp_path / "clip.mp4", 12)
    line = json.dumps({"clip": "clip.mp4", "prompt": "a ball falls", "key": "a", "action": "fall"})
    (tmp_path / "clips.jsonl").write_text(line + "\n", encoding="utf-8")
    model = write_tiny_pipeline(family, tmp_path / "model")
    arguments = [f"output={tmp_path / 'out'}", f"pipeline.manifest={tmp_path / 'clips.jsonl'}", "sampler.steps=1"]
    arguments += [f"backbone.family={family}", f"backbone.path={model}", "backbone.architecture=tiny"]
    arguments += ["backbone.dtype=float32", "backbone.text_length=16", "video.height=32", "video.width=32"]
    arguments += ["video.num_frames=9", "video.fps=4", "sampler.guidance=1", "pipeline.losers.count=1"]
    arguments += ["targets.tracks=lucas_kanade", "targets.grid=4", *more]
    found = {}
    for stage in ("pool..resample", "generate", "judge", "targets", "encode"):
        pictures.clear()
        build.main([*arguments, f"pipeline.stage={stage}"])
        found[stage] = len(pictures)
    assert found == {"pool..resample": 0, "judge": 0, **decoded}
