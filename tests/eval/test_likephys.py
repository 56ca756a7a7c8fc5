"""LikePhys: its losses against a float64 reference, its pairs, both sources of clips, and resuming."""

import hashlib
import itertools
import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from eval.benchmarks import likephys
from eval.benchmarks.likephys import (
    LEFT_OUT,
    SCENARIOS,
    LikePhys,
    LikePhysConfig,
    losses_of,
    preference_error,
    share_pairs,
)
from eval.sandbox.clips import SCENES
from eval.sandbox.prompts import write_prompt
from eval.sandbox.splits import is_held_out
from eval.sandbox.world import COLOUR_NAMES, VIOLATIONS
from eval.search.candidates import Candidates
from eval.search.residuals import ResidualConfig, Residuals
from train.backbones import load_backbone
from train.backbones.base import BackboneConfig, Conditioning
from train.clips import VideoConfig, write_clip

RELEASED = likephys.LEVELS
LEVELS = {"levels": 3, "first": 0.2, "last": 0.8, "shift": 1.0, "draws": 2}
VIDEO = VideoConfig(16, 16, 17, 8.0)


@pytest.fixture(scope="module")
def backbone(tiny_pipeline):
    config = BackboneConfig(
        family="wan21", path=str(tiny_pipeline), dtype="float32", text_length=12, architecture="tiny"
    )
    return load_backbone(config, "cpu")


class Flat:
    """Stands in for a backbone: the mean of a clip's pixels decides its loss. Counts what it is asked."""

    first_frame = (False,)
    device, fingerprint = torch.device("cpu"), "flat-0"

    def __init__(self, sign=1.0):
        self.sign, self.asked = sign, 0

    def encode_video(self, frames):
        return frames

    def decode_latents(self, latents):
        raise AssertionError("nothing is decoded")

    def condition(self, prompts):
        return Conditioning(torch.zeros(len(prompts), 1, 1))

    def start(self, latents, conditioning):
        return latents

    def velocity_at(self, noisy, t, conditioning):
        self.asked += len(noisy)
        return self.sign * noisy


@pytest.fixture(autouse=True)
def few_levels(monkeypatch):
    monkeypatch.setattr(likephys, "LEVELS", ResidualConfig(levels=2, first=0.4, last=0.7, shift=1.0, draws=1))


def sandbox(folder, pairs=1, severity=1.0, **settings):
    benchmark = LikePhys(LikePhysConfig(pairs=pairs, severity=severity, **settings), VIDEO)
    benchmark.batch_size = 16
    return benchmark


def test_losses_are_the_reference(backbone):
    generator = torch.Generator().manual_seed(3)
    latents = torch.randn(3, 16, 3, 4, 6, generator=generator)
    text = torch.randn(1, 12, 64, generator=generator)
    found = Candidates("scene-1", "a ball", latents, Conditioning(text), lambda z: z, 8.0)
    config = ResidualConfig(**LEVELS)
    losses = losses_of(Residuals(backbone, config, 2), found)

    expected = np.zeros(3)
    for number, clean in enumerate(latents):
        for t in (0.2, 0.5, 0.8):
            for draw in range(2):
                digest = hashlib.sha256(f"0/scene-1/{t:.9g}/{draw}".encode()).digest()
                own = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
                noise = torch.randn(clean.shape, generator=own).double()  # the same for all three
                noisy = (1 - t) * clean.double() + t * noise
                with torch.no_grad():
                    velocity = backbone.transformer(
                        hidden_states=noisy.float()[None],
                        timestep=torch.tensor([1000.0 * t]),
                        encoder_hidden_states=text,
                        return_dict=False,
                    )[0][0].double()
                predicted = noisy + (1 - t) * velocity
                expected[number] += float((predicted - noise).square().mean()) / 6
    np.testing.assert_allclose(losses.numpy(), expected, rtol=2e-5)


def test_the_levels_are_those_of_the_release():
    times = Residuals(Flat(), RELEASED).times
    np.testing.assert_allclose(times, [(99 + 100 * step) / 1000 for step in range(10)], atol=1e-9)


def test_preference_by_hand():
    assert preference_error([2.0, 4.0], [1.0, 4.0]) == 0.625
    assert preference_error([1.0], [2.0]) == 0 and preference_error([2.0], [1.0]) == 1
    assert preference_error([1.0], [1.0]) == 0.5


def test_pairs_are_shared_by_the_scenes():
    shares = share_pairs(64)
    assert list(shares) == list(SCENES)
    for kind in VIOLATIONS:
        parts = [quota[kind] for quota in shares.values() if kind in quota]
        assert sum(parts) == 64 and max(parts) - min(parts) <= 1
        assert len(parts) == sum(kind in scene.violations for scene in SCENES.values())
    assert shares["projectile"]["tilt"] == 13 and shares["occluder"]["tilt"] == 12


def test_pairs_of_the_sandbox_are_one_scene_with_and_without(tmp_path, monkeypatch):
    few = {name: SCENES[name] for name in ("pendulum", "collision")}  # they know all kinds between them
    monkeypatch.setattr(likephys, "SCENES", few)
    groups = list(sandbox(tmp_path, pairs=3).groups())
    assert len({group.key for group in groups}) == len(groups) == 2 + 1 + 3  # gravity, tilt ... | momentum and ghost
    for group in groups:
        scene = group.key.partition("-")[0]
        assert is_held_out(group.prompt) and group.prompt in {
            write_prompt(scene, {"colour": one, "second_colour": two, "direction": way, "second_state": state}, number)
            for one, two in itertools.product(COLOUR_NAMES, COLOUR_NAMES)
            for way, state, number in itertools.product(("left", "right"), ("moving", "resting"), range(4))
        }
    kinds = [kind for group in groups for kind, _ in group.clips]
    assert {kind: kinds.count(kind) for kind in VIOLATIONS} == dict.fromkeys(VIOLATIONS, 3)
    assert kinds.count("valid") == len(groups)
    clips = {kind: frames() for (kind, _), frames in groups[0].clips.items()}
    true = clips.pop("valid")
    assert true.shape == (17, 16, 16, 3) and all((frames != true).any() for frames in clips.values())
    late = clips["teleport"]
    assert (late[0] == true[0]).all() and (late[-1] != true[-1]).any()
    again = next(iter(sandbox(tmp_path, pairs=3).groups()))
    assert (again.clips["valid", ""]() == true).all()


def test_rows_and_figures_by_kind(tmp_path, monkeypatch):
    few = {name: SCENES[name] for name in ("pendulum", "collision")}
    monkeypatch.setattr(likephys, "SCENES", few)
    benchmark = sandbox(tmp_path, pairs=2)
    rows = list(benchmark.probe(Flat(), tmp_path))
    assert len(rows) == len({row.key for row in rows}) == 2 * len(VIOLATIONS)
    means = {column: np.array([np.mean(found)]) for column in benchmark.columns if (found := column_of(rows, column))}
    assert all(len(column_of(rows, kind)) == 2 for kind in VIOLATIONS)
    assert set(benchmark.derive(means)) == set(benchmark.figures) == {"error", "margin", *VIOLATIONS}
    np.testing.assert_allclose(means["error"], np.mean([means[kind] for kind in VIOLATIONS]))


def test_kinds_of_one_scene_share_its_true_clips_so_they_are_one_observation(tmp_path, monkeypatch):
    monkeypatch.setattr(likephys, "SCENES", {"pendulum": SCENES["pendulum"]})
    benchmark = sandbox(tmp_path, pairs=1)
    (group,) = benchmark.groups()
    rows = list(benchmark.probe(Flat(), tmp_path))
    assert len(rows) > 1 and {row.cluster for row in rows} == {group.key}


def column_of(rows, column):
    return [row.values[column] for row in rows if column in row.values]


def test_resumes_and_notices_another_model(tmp_path, monkeypatch):
    few = {name: replace(SCENES[name], violations=("teleport",)) for name in ("pendulum", "occluder", "collision")}
    monkeypatch.setattr(likephys, "SCENES", few)
    kept, whole, first = tmp_path / "losses.jsonl", Flat(), Flat()
    rows = list(sandbox(tmp_path, pairs=3).probe(whole, tmp_path))
    lines = kept.read_text(encoding="utf-8").splitlines(keepends=True)
    kept.write_text(lines[0] + lines[1] + lines[2][:40], encoding="utf-8")  # killed while writing
    assert list(sandbox(tmp_path, pairs=3).probe(first, tmp_path)) == rows
    passes = [2 * len(group.clips) for group in sandbox(tmp_path, pairs=3).groups()]
    assert whole.asked == sum(passes) and first.asked == sum(passes) - passes[1]
    assert kept.read_text(encoding="utf-8").splitlines(keepends=True) == lines
    other = Flat(sign=-1.0)
    assert list(sandbox(tmp_path, pairs=3).probe(other, tmp_path)) != rows
    assert other.asked == sum(passes)
    settings = Flat()
    list(sandbox(tmp_path, pairs=3, severity=0.5).probe(settings, tmp_path))
    assert settings.asked == sum(passes)


def publish(root, scenes=("0001",)):
    """A dataset in the published layout: two true clips, one violated, and one of a kind that is left out."""
    for scenario, (place, _) in SCENARIOS.items():
        kinds = ["valid_00", "valid_01", "over_bounce_00", *(f"{kind}_00" for kind in LEFT_OUT.get(scenario, ()))]
        for scene in scenes:
            for number, kind in enumerate(kinds):
                frames = torch.full((5, 16, 16, 3), 40 * number, dtype=torch.uint8)
                write_clip(root / place / scene / f"{kind}.mp4", frames, 8.0)


@pytest.mark.slow
def test_the_published_clips(tmp_path, monkeypatch):
    monkeypatch.setattr(likephys, "NUM_FRAMES", 9)
    monkeypatch.setattr(likephys, "LEVELS", ResidualConfig(levels=1, first=0.5, last=0.5, shift=1.0, draws=1))
    root, work = tmp_path / "data", tmp_path / "work"
    work.mkdir()
    settings = LikePhysConfig(folder=str(root))
    (missing,) = LikePhys(settings, VIDEO).requirements()
    assert not missing.found and "LikePhys-Benchmark" in missing.remedy
    with pytest.raises(ValueError, match="run.likephys.folder"):
        list(LikePhys(settings, VIDEO).probe(Flat(), work))
    publish(root)
    benchmark = LikePhys(settings, VIDEO)
    assert benchmark.requirements()[0].found
    (root / "flag_videos" / "0001" / "over_bounce_00.mp4").write_bytes(b"no clip")
    rows = {row.key: row for row in benchmark.probe(Flat(), work)}
    assert set(rows) == {f"{scenario.replace('_', '-')}-0001-over-bounce" for scenario in SCENARIOS}
    assert "flag_videos" in rows["flag-0001-over-bounce"].error and not rows["flag-0001-over-bounce"].values
    values = rows["ball-drop-0001-over-bounce"].values
    assert set(values) == {"error", "margin", "ball_drop"} and values["error"] == values["ball_drop"]
    kept = [json.loads(line) for line in (work / "losses.jsonl").read_text(encoding="utf-8").splitlines()]
    losses = {name: loss for _, name, loss in kept[0]["losses"]}
    assert list(losses) == ["over_bounce_00.mp4", "valid_00.mp4", "valid_01.mp4"]
    true, violated = [losses["valid_00.mp4"], losses["valid_01.mp4"]], losses["over_bounce_00.mp4"]
    assert values["error"] == np.mean([loss > violated for loss in true])
    assert values["margin"] == pytest.approx(violated / np.mean(true) - 1)


def test_frames_are_picked_evenly_and_stretched(tmp_path):
    shades = torch.tensor([0, 60, 120, 180, 240], dtype=torch.uint8)
    write_clip(tmp_path / "clip.mp4", shades[:, None, None, None].expand(5, 16, 32, 3), 8.0)
    frames = likephys.read_evenly(tmp_path / "clip.mp4", VideoConfig(24, 24, 3, 16.0))
    assert frames.shape == (3, 24, 24, 3)
    np.testing.assert_allclose(frames.float().mean(dim=(1, 2, 3)), [0, 120, 240], atol=3)
    assert len(likephys.read_evenly(tmp_path / "clip.mp4", VideoConfig(24, 24, 9, 16.0))) == 9


def test_settings_that_cannot_work_are_refused(tmp_path):
    with pytest.raises(ValueError, match="pairs"):
        LikePhys(LikePhysConfig(pairs=0), VIDEO)
    image = Flat()
    image.first_frame = (True,)
    with pytest.raises(ValueError, match="Flat needs an image with each prompt: use a text-to-video backbone"):
        sandbox(tmp_path).check(image)
