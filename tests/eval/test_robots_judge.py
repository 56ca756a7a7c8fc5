"""The robots' judge on drawn squares: each law by itself, in the units it says. Nothing is simulated."""

import pytest
import torch

from eval.judges.robots import judge, laws
from eval.judges.robots.vision import LOST, observe, track_errors
from eval.judges.scores import Unjudged
from eval.sandbox.world import COLOURS

SIZE, FRAMES = 64, 12
PROMPT = "the robot opens the red drawer"


def draw(hand, thing=None, *, side=8, grey=0.5):
    """A clip (1, T, 64, 64, 3): a blue hand of 6 x 12 at `hand` and a red square at `thing`, (x, y) of each frame."""
    clip = torch.full((FRAMES, SIZE, SIZE, 3), grey)
    for frame in range(FRAMES):
        for colour, place, (width, height) in (("red", thing, (side, side)), ("blue", hand, (6, 12))):
            if place is not None and place[frame] is not None:
                x, y = place[frame]
                clip[frame, y : y + height, x : x + width] = torch.tensor(COLOURS[colour])
    return (clip * 255).round().to(torch.uint8)[None]


AWAY = [(4 + frame, 4) for frame in range(FRAMES)]
STILL = [(40, 40)] * FRAMES


def measure(clip):
    return {name: float(value) for name, value in laws.errors(observe(clip, ["red"])).items()}


def test_a_clip_in_which_nothing_is_wrong_has_no_error():
    assert measure(draw(AWAY, STILL)) == pytest.approx(dict.fromkeys(judge.LAWS, 0.0), abs=1e-5)


def test_an_object_that_vanishes_is_missed_unless_the_robot_hides_it():
    gone = [(40, 40)] * 6 + [None] * 6
    assert measure(draw(AWAY, gone))["permanence"] == pytest.approx(1)
    assert measure(draw([(40, 38)] * FRAMES, gone))["permanence"] < 0.1  # the hand stands before it all the time
    assert measure(draw(AWAY[:6] + [None] * 6, STILL))["hand"] == pytest.approx(1)


def test_motion_counts_where_the_robot_is_not_near():
    slides = [(40 - 2 * frame, 40) for frame in range(FRAMES)]
    found = measure(draw(AWAY, slides))
    # 2 px a frame of an 8 px square: a quarter of it appears and a quarter is left, eleven times.
    assert found["contact"] == pytest.approx(11 * 0.5) and found["jump"] == pytest.approx(0.5)
    assert measure(draw([(x + 8, 38) for x, _ in slides], slides))["contact"] == 0
    assert measure(draw(AWAY, STILL[:6] + [(20, 40)] * 6))["jump"] == pytest.approx(2)


def test_shape_is_the_range_of_lengths():
    grown = torch.cat([draw(AWAY, STILL)[:, :6], draw(AWAY, STILL, side=16)[:, 6:]], dim=1)
    assert measure(grown)["shape"] == pytest.approx(torch.tensor(2.0).log().item(), abs=0.01)
    flicker = torch.cat([draw(AWAY, STILL)[:, :6], draw(AWAY, STILL, grey=0.6)[:, 6:]], dim=1)
    assert measure(flicker)["background"] == pytest.approx(0.1 / 11, abs=1e-3)


def test_track_errors_are_in_frame_heights():
    true = observe(draw(AWAY, STILL), ["red"])
    shifted = observe(draw([(x, y + 16) for x, y in AWAY], [None] * FRAMES), ["red"])
    found = track_errors(shifted, true)
    assert float(found["gripper_error"]) == pytest.approx(0.25) and float(found["object_error"]) == LOST
    assert all(float(value) == 0 for value in track_errors(true, true).values())


def test_the_judge_scores_and_refuses():
    score = judge.build("cpu")
    good, empty = draw(AWAY, STILL), draw([None] * FRAMES)
    scores = score(torch.cat([good, empty]), [PROMPT] * 2)
    assert scores.physical[0] > 0.9 and scores.physical[1] == 0
    assert scores.semantic[0] < 0.1  # the drawer has not moved
    assert scores.rows()[0].keys() == {"semantic", "physical", *(f"error_{law}" for law in judge.LAWS)}
    with pytest.raises(Unjudged, match="no instruction") as refusal:
        score(torch.cat([good, good]), ["a ball rolls", PROMPT])
    assert refusal.value.judged == [1] and len(refusal.value.scores.physical) == 1
    with pytest.raises(Unjudged):
        score(good, ["a ball rolls"])
    with pytest.raises(ValueError, match="5 or more"):
        score(good[:, :4], [PROMPT])
