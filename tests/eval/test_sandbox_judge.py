"""The judge on held-out simulated clips: calibration, clips that try to fool it, and its errors in their units."""

import pytest
import torch

from eval.judges.sandbox.calibration import CAUGHT_BELOW, calibrate
from eval.judges.sandbox.judge import LAWS, SandboxJudgeConfig, build
from eval.sandbox.clips import SCENES, simulate
from eval.sandbox.prompts import write_prompt
from eval.sandbox.render import degrade
from eval.sandbox.world import COLOUR_NAMES, GRAVITY, VIOLATIONS
from tests.counting import calls

SEVERITIES = (0.25, 0.5, 1.0)
NEAR_ZERO = 0.02


@pytest.fixture(scope="module")
def judge():
    return build(SandboxJudgeConfig(), "cpu")


@pytest.fixture(scope="module")
def true_clips():
    return simulate("mixed", 50, torch.Generator().manual_seed(900))


@pytest.fixture(scope="module")
def table():
    return {(row.kind, row.severity): row for row in calibrate(count=20, seed=901, severities=SEVERITIES)}


def test_true_clips_score_near_one(table, judge):
    row = table["true", 0.0]
    assert row.physical > 0.98 and row.semantic > 0.98
    assert row.fifth_percentile > CAUGHT_BELOW + 0.3
    assert row.caught <= 0.05


def test_soft_noisy_clips_stay_clear_of_violations(table):
    row = table["true, degraded", 0.0]
    worst_violation = max(table[kind, 1.0].physical for kind in VIOLATIONS)
    assert row.physical > 0.9 and row.semantic > 0.9 and row.caught <= 0.05
    assert row.fifth_percentile > worst_violation + 0.3


@pytest.mark.parametrize("kind", VIOLATIONS)
def test_violations_are_caught_and_ordered(table, kind):
    scores = [table["true", 0.0].physical] + [table[kind, severity].physical for severity in SEVERITIES]
    assert all(later < earlier for earlier, later in zip(scores, scores[1:], strict=False)), scores
    assert table[kind, 1.0].caught >= 0.95
    assert table[kind, 1.0].physical < 0.25


@pytest.mark.parametrize("scene", SCENES)
def test_full_violations_are_caught_in_every_scene(judge, scene):
    for kind in SCENES[scene].violations:
        clips = simulate(scene, 15, torch.Generator().manual_seed(902), violation=kind, severity=1.0)
        assert (judge(clips.frames, clips.prompts).physical < CAUGHT_BELOW).float().mean() >= 0.95, kind


@pytest.mark.parametrize("size", [(32, 32), (64, 96)])
def test_other_sizes(judge, size):
    clips = simulate("mixed", 40, torch.Generator().manual_seed(903), height=size[0], width=size[1])
    scores = judge(clips.frames, clips.prompts)
    assert scores.physical.quantile(0.05) > 0.9 and scores.semantic.quantile(0.05) > 0.9


def test_other_frame_rate():
    clips = simulate("mixed", 20, torch.Generator().manual_seed(904), num_frames=25, fps=12.0)
    scores = build(SandboxJudgeConfig(fps=12.0), "cpu")(clips.frames, clips.prompts)
    assert scores.physical.min() > 0.8 and scores.semantic.min() > 0.8
    slow = build(SandboxJudgeConfig(fps=8.0), "cpu")(clips.frames, clips.prompts)  # the clip in slow motion
    falls = torch.tensor([scene in ("projectile", "pendulum") for scene in clips.scenes])
    assert slow.physical[falls].max() < CAUGHT_BELOW


def repeat(frame, frames):
    return frame.expand_as(frames).contiguous()


def noise(frames):
    return torch.randint(0, 256, frames.shape, generator=torch.Generator().manual_seed(905), dtype=torch.uint8)


def blur(frames, factor):
    return degrade(frames, torch.Generator(), factor=factor, noise=0.0)


FOOLING = {
    "black": torch.zeros_like,
    "white": lambda frames: torch.full_like(frames, 255),
    "empty": lambda frames: repeat(frames.median(dim=1, keepdim=True).values, frames),
    "frozen": lambda frames: repeat(frames[:, :1], frames),
    "frozen midway": lambda frames: torch.cat([frames[:, :8], repeat(frames[:, 8:9], frames[:, 8:])], dim=1),
    "noise": noise,
    "static noise": lambda frames: repeat(noise(frames)[:, :1], frames),
    "grey static noise": lambda frames: repeat(noise(frames)[:, :1, ..., :1], frames),
    "blurred": lambda frames: blur(frames, 32),
    "time average": lambda frames: repeat(frames.float().mean(dim=1, keepdim=True).to(torch.uint8), frames),
}


@pytest.mark.parametrize("name", FOOLING)
def test_fooling_clips_score_near_zero(judge, true_clips, name):
    scores = judge(FOOLING[name](true_clips.frames[:25]), true_clips.prompts[:25])
    assert scores.physical.max() < NEAR_ZERO
    assert scores.semantic.max() < NEAR_ZERO
    for values in scores.errors.values():
        assert values.isfinite().all()


def test_moderate_blur_and_shuffled_frames_are_unphysical(judge, true_clips):
    generator = torch.Generator().manual_seed(906)
    frames, prompts = true_clips.frames, true_clips.prompts
    assert judge(blur(frames, 16), prompts).physical.max() < NEAR_ZERO
    order = torch.randperm(17, generator=generator)
    assert judge(frames[:, order], prompts).physical.max() < NEAR_ZERO
    assert judge(frames.flip(2), prompts).physical.max() < 0.1  # upside down


def test_semantics_follow_the_prompt_and_physics_does_not(judge, true_clips):
    def prompts(**changes):
        return [
            write_prompt(scene, attributes | {key: change(attributes) for key, change in changes.items()}, 0)
            for scene, attributes in zip(true_clips.scenes, true_clips.attributes, strict=True)
        ]

    same = judge(true_clips.frames, prompts())
    assert same.semantic.min() > 0.9
    other_colour = judge(
        true_clips.frames,
        prompts(colour=lambda attributes: COLOUR_NAMES[(COLOUR_NAMES.index(attributes["colour"]) + 1) % 6]),
    )
    opposite = {"left": "right", "right": "left"}
    other_direction = judge(true_clips.frames, prompts(direction=lambda attributes: opposite[attributes["direction"]]))
    for scores in (other_colour, other_direction):
        assert scores.semantic.max() < 0.1
        assert scores.physical.min() > 0.9  # the motion is as physical as before
    other_scene = judge(true_clips.frames, true_clips.prompts[1:] + true_clips.prompts[:1])
    assert other_scene.semantic.max() < 0.75 and other_scene.semantic.mean() < 0.05


def test_second_ball_must_do_what_the_prompt_says(judge):
    clips = simulate("collision", 20, torch.Generator().manual_seed(907))
    states = [attributes["second_state"] for attributes in clips.attributes]
    assert set(states) == {"resting", "moving"}
    swapped = [
        write_prompt("collision", attributes | {"second_state": {"resting": "moving", "moving": "resting"}[state]}, 0)
        for attributes, state in zip(clips.attributes, states, strict=True)
    ]
    assert judge(clips.frames, clips.prompts).semantic.min() > 0.9
    assert judge(clips.frames, swapped).semantic.max() < 0.6


def test_errors_have_their_units(judge):
    """Weightless balls err by exactly g, in pixels/frame^2; gravity 0.2 times as strong by 0.8, relatively."""
    clips = simulate("projectile", 30, torch.Generator().manual_seed(908), violation="gravity", severity=1.0)
    scores = judge(clips.frames, clips.prompts)
    strong = scores.errors["gravity"] > 0.9
    assert strong.any() and (~strong).any()
    assert scores.errors["gravity"][strong] == pytest.approx(1.0, abs=0.03)
    assert scores.errors["gravity"][~strong] == pytest.approx(0.8, abs=0.03)
    assert scores.errors["acceleration"][~strong].median() == pytest.approx(0.8 * GRAVITY, rel=0.15)
    assert set(scores.errors) == set(scores.laws) == set(LAWS)
    large = simulate("projectile", 10, torch.Generator().manual_seed(909), height=128, width=128, violation="sink")
    small = simulate("projectile", 10, torch.Generator().manual_seed(909), violation="sink")
    depths = [judge(clips.frames, clips.prompts).errors["penetration"] for clips in (large, small)]
    assert depths[0] == pytest.approx(2 * depths[1], rel=0.1)  # pixels


def test_energy_error_is_the_restitution_error(judge):
    clips = simulate("projectile", 30, torch.Generator().manual_seed(910), violation="energy", severity=0.5)
    errors = judge(clips.frames, clips.prompts).errors
    assert errors["energy"].median() == pytest.approx(0.25, abs=0.02)
    assert errors["acceleration"].median() < 0.15  # flights stay true


def test_scores_and_rows(judge, true_clips):
    scores = judge(true_clips.frames[:7], true_clips.prompts[:7])
    assert scores.semantic.shape == scores.physical.shape == (7,)
    rows = scores.rows()
    assert len(rows) == 7 and rows[3]["physical"] == pytest.approx(float(scores.physical[3]))
    assert "error_acceleration" in rows[0]
    # Neither order nor batch size matters.
    backwards = build(SandboxJudgeConfig(batch_size=2), "cpu")(
        true_clips.frames[:7].flip(0), true_clips.prompts[:7][::-1]
    )
    assert torch.allclose(backwards.physical.flip(0), scores.physical, atol=1e-5)


def test_user_errors(judge, true_clips):
    frames, prompts = true_clips.frames[:2], true_clips.prompts[:2]
    with pytest.raises(ValueError, match="uint8"):
        judge(frames.float(), prompts)
    with pytest.raises(ValueError, match="prompts"):
        judge(frames, prompts[:1])
    with pytest.raises(ValueError, match="frames"):
        judge(frames[:, :5], prompts)
    with pytest.raises(ValueError, match="sandbox scenes"):
        judge(frames, ["a dog", "a cat"])


@pytest.mark.parametrize("scene", SCENES)
def test_clips_of_a_scene_are_measured_together(scene):
    judge = build(SandboxJudgeConfig(batch_size=32), "cpu")
    clips = simulate(scene, 32, torch.Generator().manual_seed(913))
    few = calls(lambda: judge(clips.frames[:4], clips.prompts[:4]))
    assert calls(lambda: judge(clips.frames, clips.prompts)) < 4 * few  # a loop over clips would cost 8 times
