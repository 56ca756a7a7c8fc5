"""`train/teachers/targets.py` by itself: what training can make of a clip without a simulator.

What the shard builder makes with it is in tests/data_pipeline/test_targets.py.
"""

import pytest
import torch

from train.clips import VideoConfig
from train.teachers import TRACKERS
from train.teachers.points import query_grid, unpack
from train.teachers.targets import TargetMaker, TargetsConfig

VIDEO = VideoConfig(height=32, width=64, num_frames=5, fps=8.0)


@pytest.fixture
def tracker(monkeypatch):
    """Points of the left half go right by a quarter, the others stand still."""

    def track(frames, queries):
        time = torch.linspace(0, 1, len(frames))[:, None, None]
        step = torch.tensor([0.25, 0.0]) * (queries[:, :1] < 0.5)
        return queries + time * step, torch.ones(len(frames), len(queries), dtype=torch.bool)

    monkeypatch.setattr(TRACKERS["lucas_kanade"], "check", lambda config: None)
    monkeypatch.setattr(TRACKERS["lucas_kanade"], "build", lambda config, device: track)


def make(**options):
    config = TargetsConfig(tracks="lucas_kanade", grid=6, **options)
    return TargetMaker(config, VIDEO, "cpu").make(torch.zeros(5, 32, 64, 3, dtype=torch.uint8))


def test_what_moves_is_kept_and_everything_without_region_focus(tracker):
    made, left = make(), query_grid(6)[:, 0] < 0.5
    assert torch.equal(made["keep"], left) and make(rule="all")["keep"].all()
    moved = unpack(made["tracks"])[-1] - unpack(made["tracks"])[0]
    assert torch.allclose(moved[left], torch.tensor([0.25, 0.0]), atol=1e-4) and not moved[~left].any()
    assert set(made) == {"tracks", "visible", "keep"}


def test_the_simulator_is_not_at_hand_while_training():
    with pytest.raises(ValueError, match="targets.tracks='simulator' is unknown: choose lucas_kanade or cotracker"):
        TargetMaker(TargetsConfig(tracks="simulator"), VIDEO, "cpu")
    with pytest.raises(ValueError, match="needs tracks as well: set targets.tracks to lucas_kanade or cotracker"):
        TargetMaker(TargetsConfig(depth="depth_anything"), VIDEO, "cpu")


def test_a_dry_run_says_what_it_cannot_read(tracker, tmp_path):
    config = TargetsConfig(tracks="lucas_kanade", grid=6, relation="vjepa2")
    config.vjepa2.path = str(tmp_path)
    *lines, unread, last = TargetMaker(config, VIDEO, "cpu").describe().splitlines()
    assert [line.split()[0] for line in lines] == ["tracks", "visible", "keep"]
    assert unread.startswith("relation tokens come on top: vjepa2.path=") and last.startswith("targets: at most ")
