"""Demonstrations of robots as a source of a build. Where no simulator is installed, stand-ins take its place."""

import importlib.util
import sys
from dataclasses import fields

import numpy as np
import pytest
import torch

from data_pipeline import build, sources
from data_pipeline.frames import FrameReader, clip_identity
from data_pipeline.manifests import Row
from data_pipeline.simulated_tracks import simulated_disparity, simulated_tracks
from eval.robots import simulators, world
from eval.robots.demonstrations import Demonstration, check_video
from train.clips import ClipError, VideoConfig

VIDEO = VideoConfig(height=16, width=16, num_frames=5, fps=20)


@pytest.fixture
def simulator(monkeypatch):
    """Demonstrations filled with their number; number 2 of a task fails."""

    class StandIn:
        def get(self, listed, video, *, then=(), **options):
            if listed.index == 2:
                raise simulators.SimulatorError("its process ended with status 7")
            size = video.num_frames, video.height, video.width
            arrays = {field.name: np.zeros(1) for field in fields(Demonstration)}
            arrays["frames"] = np.full((*size, 3), listed.index, np.uint8)
            arrays["depth"] = np.full(size, 2.0, np.float32)
            arrays["depth"][:, 0] = 1
            arrays["layers"] = np.zeros(size, np.uint8)
            arrays["geoms"] = np.zeros(size[1:], np.int16)
            arrays["places"] = np.zeros((size[0], 1, 3), np.float32)
            arrays["turns"] = np.eye(3, dtype=np.float32)[None, None].repeat(size[0], axis=0)
            return Demonstration(**arrays)

    monkeypatch.setattr(simulators, "shared", StandIn)
    monkeypatch.setattr(world, "load", lambda: None)


def rows(manifest, video=VIDEO):
    found = sources.open_sources(manifest, num_losers=0, video=video, seed=0)
    return [row for source in found for row in source.rows()]


def test_tasks_are_joined_with_commas_as_sources_are(simulator):
    video = VideoConfig(height=64, width=64, num_frames=17, fps=8)
    found = rows("robots:push,drawer-open:4,sandbox:ramp:2,robots:reach:2:pool", video)
    assert all(isinstance(row, Row) for row in found)
    assert [row.source for row in found] == ["robots"] * 4 + ["sandbox"] * 2 + ["robots"] * 2
    assert [row.key for row in found[:4]] == [
        "push-000000",
        "drawer-open-000001",
        "push-000002",
        "drawer-open-000003",
    ]
    assert found[2].clip == "robots:push:train:0:1" and found[6].action == "reach"
    assert len({row.action for row in rows("robots:mixed:20")}) == 10


@pytest.mark.parametrize("manifest", ["robots:push", "robots:bowling:4", "robots:push:0", "robots:push:4:test"])
def test_a_bad_source_is_refused(simulator, manifest):
    with pytest.raises(ValueError, match=r"use robots:<task>.*drawer-open.*heldout"):
        rows(manifest)


def test_a_rate_that_the_simulator_has_not_is_refused(simulator):
    video = VideoConfig(height=16, width=16, num_frames=5, fps=24)
    with pytest.raises(ValueError, match="video.fps=24 does not divide"):
        sources.open_sources("robots:push:4", num_losers=0, video=video, seed=0)


def test_a_clip_longer_than_an_episode_is_refused():
    assert check_video(VideoConfig(height=16, width=16, num_frames=123, fps=20)) == 4  # 122 x 4 + 12 of 500 steps
    with pytest.raises(ValueError, match="video.num_frames=124: at 20 fps a robot's clip has 123 at most"):
        check_video(VideoConfig(height=16, width=16, num_frames=124, fps=20))


def test_without_the_extra_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "metaworld", None)
    with pytest.raises(ValueError, match=r"install physalign\[robots\]"):
        sources.open_sources("robots:push:4", num_losers=0, video=VIDEO, seed=0)


def test_rows_are_read_and_told_apart(simulator):
    reader = FrameReader(VIDEO, "cpu")
    first, second, third = (vars(row) for row in rows("robots:push:3"))
    assert int(reader.read(second).unique()) == 1 and reader.read_first(second).shape == (1, 16, 16, 3)
    with pytest.raises(ClipError, match=r"robots:push:train:0:2: simulator failed: its process ended with status 7"):
        reader.read(third)
    other = vars(rows("robots:reach,push:4")[1])  # the same clip in another list
    assert clip_identity(first) == clip_identity(other) != clip_identity(second)


def test_the_simulator_gives_tracks_and_nearness(simulator):
    reader = FrameReader(VIDEO, "cpu")
    clip = reader.demonstration(vars(rows("robots:push:1")[0]), drawn="truth")
    queries = torch.tensor([[0.25, 0.25], [0.5, 0.75]])
    tracks, visible = simulated_tracks(clip, queries)
    assert torch.allclose(tracks, queries.expand(5, 2, 2)) and visible.all() and tracks.dtype == torch.float32
    nearness = simulated_disparity(clip)
    assert nearness.shape == (16, 16) and (nearness[0] == 1).all() and (nearness[1:] == 0).all()


@pytest.mark.slow
def test_a_build_of_demonstrations(tmp_path):
    if importlib.util.find_spec("metaworld") is None:
        pytest.skip("the extra `robots` is not installed")
    from train.backbones.tiny import write_tiny_pipeline

    model = write_tiny_pipeline("wan22_ti2v", tmp_path / "model")
    command = [
        *("recipe=tiny", f"output={tmp_path}", "backbone.family=wan22_ti2v", f"backbone.path={model}"),
        *("pipeline.manifest=robots:drawer-open,reach:3", "pipeline.first_frame=true", "pipeline.losers.count=0"),
        *("video.height=64", "video.width=64", "video.num_frames=9", "video.fps=10"),
        *("targets.tracks=simulator", "targets.depth=simulator", "targets.grid=8"),
    ]
    build.main(command)
    shards = {path.name: path.read_bytes() for path in (tmp_path / "groups").glob("*.tar")}
    assert shards
    build.main(command)
    assert shards == {path.name: path.read_bytes() for path in (tmp_path / "groups").glob("*.tar")}
