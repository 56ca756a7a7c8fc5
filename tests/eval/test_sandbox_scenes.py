"""Scenes: the tracks obey the world's constants, the pixels show the tracks, prompts can be read back."""

import pytest
import torch

from eval.sandbox.clips import SCENES, simulate
from eval.sandbox.prompts import TEMPLATES, parse_prompt, write_prompt
from eval.sandbox.world import (
    COLOUR_NAMES,
    COLOURS,
    FLOOR,
    FRICTION,
    GRAVITY,
    PIVOT_HEIGHT,
    RESTITUTION,
    VIOLATIONS,
    World,
)
from tests.counting import calls

INTERVAL = 1 / 8  # s between frames


def draw(scene, count=40, seed=0, **options):
    return simulate(scene, count, torch.Generator().manual_seed(seed), **options)


def world_tracks(clips):
    """(N, T, K, 2) in frame heights, mirrored so that all first objects start to the right."""
    height, width = clips.frames.shape[2:4]
    tracks = clips.tracks.double().clone()
    for index, attributes in enumerate(clips.attributes):
        if attributes["direction"] == "left":
            tracks[index, ..., 0] = 1 - tracks[index, ..., 0]
    tracks[..., 0] *= width / height
    return tracks


def second_difference(values):
    return (values[:, 2:] - 2 * values[:, 1:-1] + values[:, :-2]) / INTERVAL**2


def parameter(clips, name):
    return torch.tensor([values[name] for values in clips.parameters], dtype=torch.float64)


@pytest.mark.parametrize("scene", SCENES)
def test_shapes_types_and_ranges(scene):
    clips = draw(scene, count=6, height=48, width=72, num_frames=17)
    objects = SCENES[scene].num_objects
    assert clips.frames.shape == (6, 17, 48, 72, 3) and clips.frames.dtype == torch.uint8
    assert clips.tracks.shape == (6, 17, objects, 2) and clips.visibility.shape == (6, 17, objects)
    assert clips.masks.shape == clips.layers.shape == clips.depth.shape == (6, 17, 48, 72)
    assert len(clips.prompts) == len(clips.scenes) == len(clips.attributes) == len(clips.parameters) == len(clips) == 6
    assert clips.tracks.min() >= 0 and clips.tracks.max() <= 1
    drawn = SCENES[scene].propose(1, torch.Generator(), World(1.5, 17, 8.0))
    assert set(drawn) <= set(clips.parameters[0])
    assert clips.parameters[0]["gravity_pixels"] == pytest.approx(GRAVITY * 48 / 64)
    assert len(clips[2:4]) == 2 and clips[2:4].prompts == clips.prompts[2:4]


def test_generator_decides_everything():
    first, again, other = draw("mixed", 15, seed=3), draw("mixed", 15, seed=3), draw("mixed", 15, seed=4)
    assert torch.equal(first.frames, again.frames) and first.prompts == again.prompts
    assert torch.equal(first.tracks, again.tracks) and first.parameters == again.parameters
    assert not torch.equal(first.frames, other.frames)
    state = torch.random.get_rng_state()
    draw("mixed", 5)
    assert torch.equal(state, torch.random.get_rng_state())  # the global generator stays untouched


def test_mixed_shows_all_scenes_in_turn():
    clips = draw("mixed", 12)
    names = list(SCENES)
    assert clips.scenes == [names[index % len(names)] for index in range(12)]
    assert clips.tracks.shape[2] == 2
    assert not clips.visibility[0, :, 1].any()  # a projectile has no second object


@pytest.mark.parametrize("scene", SCENES)
@pytest.mark.parametrize("size", [(64, 64), (48, 72)])
def test_pixels_show_the_tracks(scene, size):
    height, width = size
    clips = draw(scene, 12, height=height, width=width)
    columns, rows = torch.arange(width) + 0.5, torch.arange(height) + 0.5
    for k in range(SCENES[scene].num_objects):
        mask = (clips.masks == k + 1).double()
        area = mask.sum(dim=(2, 3))
        full = area.amax(dim=1, keepdim=True)
        x = (mask.sum(dim=2) @ columns.double()) / area.clamp(min=1)
        y = (mask.sum(dim=3) @ rows.double()) / area.clamp(min=1)
        seen = (area > 0.93 * full) & clips.visibility[..., k]
        assert seen.double().mean() > 0.5
        truth = clips.tracks[:, :, k].double() * torch.tensor([width, height])
        error = ((x - truth[..., 0]) ** 2 + (y - truth[..., 1]) ** 2).sqrt()
        assert error[seen].max() < 0.6  # pixels; masks are hard-edged
        # The object has its prompt's colour there.
        name = clips.attributes[0]["colour" if k == 0 else "second_colour"]
        inside = clips.frames[0][clips.masks[0] == k + 1].double().mean(dim=0) / 255
        assert (inside - torch.tensor(COLOURS[name]).double()).abs().max() < 0.1
    assert clips.masks.max() == SCENES[scene].num_objects


def test_anti_aliasing_keeps_the_area():
    clips = draw("projectile", 20)
    chroma = clips.frames.double().amax(dim=-1) - clips.frames.double().amin(dim=-1)
    area = chroma.sum(dim=(2, 3)) / (0.75 * 255) / 64**2
    expected = torch.pi * parameter(clips, "radius")[:, None] ** 2
    assert (area / expected - 1).abs().max() < 0.03


def test_depth_orders_the_layers():
    clips = draw("occluder", 6)
    hidden = ~clips.visibility[..., 0]
    assert hidden.any(dim=1).all()
    panel, objects, backdrop = clips.depth.amin(), clips.depth[clips.masks == 1].unique(), clips.depth.amax()
    assert panel < objects.min() <= objects.max() < backdrop


def test_projectile_falls_and_bounces_as_the_constants_say():
    clips = draw("projectile", 60)
    x, y = world_tracks(clips)[:, :, 0].unbind(-1)
    assert second_difference(x).abs().max() < 1e-4
    radius = parameter(clips, "radius")[:, None]
    assert (y + radius - FLOOR).max() < 1e-5
    vertical = second_difference(y)
    free = (vertical - GRAVITY).abs() < 1e-3
    assert free.sum(dim=1).min() >= 6 and vertical[~free].max() < GRAVITY  # the others are pushed up by the floor
    # Each flight's impact speed follows from its energy; after n bounces it is RESTITUTION^n times the first.
    speed = (y[:, 1:] - y[:, :-1]) / INTERVAL
    height = FLOOR - radius - (y[:, 1:] + y[:, :-1]) / 2 + GRAVITY * INTERVAL**2 / 8
    impact = (speed**2 + 2 * GRAVITY * height).sqrt()
    bounces = (impact / impact[:, :1]).log() / torch.tensor(RESTITUTION).log()
    between = bounces[:, 1:][free]  # intervals that end a step without contact
    assert (between - between.round()).abs().max() < 0.02 and between.min() > -0.02
    assert (torch.where(free, bounces[:, 1:], 0).amax(dim=1) > 0.98).all()  # every clip bounces


def test_collision_keeps_the_momentum():
    clips = draw("collision", 60)
    x = world_tracks(clips)[..., 0]
    assert second_difference(x.mean(dim=-1)).abs().max() < 1e-3
    speed = (x[:, 1:] - x[:, :-1]) / INTERVAL
    approach, parting = speed[:, 0, 0] - speed[:, 0, 1], speed[:, -1, 1] - speed[:, -1, 0]
    assert (parting / approach - 0.9).abs().max() < 1e-4
    gap = x[..., 1] - x[..., 0] - 2 * parameter(clips, "radius")[:, None]
    assert gap.min() > -1e-6


def test_pendulum_keeps_length_and_energy():
    clips = draw("pendulum", 60)
    x, y = world_tracks(clips)[:, :, 0].unbind(-1)
    right, down = x - 0.5, y - PIVOT_HEIGHT
    length = parameter(clips, "length")[:, None]
    assert ((right**2 + down**2).sqrt() - length).abs().max() < 1e-5
    angle = torch.atan2(right, down)
    # Stoermer's rule with its next term: errors of order (omega h)^6.
    pull = -GRAVITY / length * angle.sin()
    numerov = pull[:, 1:-1] + (pull[:, 2:] - 2 * pull[:, 1:-1] + pull[:, :-2]) / 12
    assert (second_difference(angle) - numerov).abs().max() < 5e-3
    assert ((right[:, 0] < 0) & (right.amax(dim=1) > 0.05)).all()  # crosses the lowest point


def test_ramp_slides_with_friction():
    clips = draw("ramp", 60)
    track = world_tracks(clips)[:, :, 0]
    slope = parameter(clips, "slope")
    acceleration = second_difference(track)
    start = acceleration[:, :4]  # the first six frames lie on the straight ramp
    demanded = GRAVITY * (slope.sin() - FRICTION * slope.cos())
    along = torch.stack([slope.cos(), slope.sin()], dim=-1)
    assert (start - (demanded[:, None] * along)[:, None]).norm(dim=-1).max() < 2e-3
    end = acceleration[:, -1]
    assert (end[:, 0] + FRICTION * GRAVITY).abs().max() < 2e-3 and end[:, 1].abs().max() < 2e-3


def test_occluded_ball_moves_uniformly_and_comes_out_again():
    clips = draw("occluder", 60)
    x = world_tracks(clips)[:, :, 0, 0]
    assert second_difference(x).abs().max() < 1e-4
    seen = clips.visibility[..., 0]
    assert seen[:, 0].all() and seen[:, -1].all() and (~seen).any(dim=1).all()
    assert (clips.masks[seen] == 1).flatten(1).any(dim=1).all()


def test_directions_are_those_of_the_tracks():
    clips = draw("mixed", 50)
    moved = clips.tracks[:, 4, 0, 0] - clips.tracks[:, 0, 0, 0]
    for index, attributes in enumerate(clips.attributes):
        assert (moved[index] > 0) == (attributes["direction"] == "right")
    assert {attributes["direction"] for attributes in clips.attributes} == {"left", "right"}
    assert {attributes["colour"] for attributes in clips.attributes} == set(COLOUR_NAMES)


@pytest.mark.parametrize("kind", VIOLATIONS)
def test_violation_changes_only_what_it_says(kind):
    for scene in (name for name in SCENES if kind in SCENES[name].violations):
        true, planted = draw(scene, 10, seed=5), draw(scene, 10, seed=5, violation=kind, severity=1.0)
        assert true.prompts == planted.prompts and true.parameters == planted.parameters
        assert torch.equal(true.frames[:, 0], planted.frames[:, 0])
        changed = (true.frames != planted.frames).flatten(1).any(dim=1)
        assert changed.all()
        if kind in ("vanish", "colour"):
            assert torch.equal(true.tracks, planted.tracks)
        else:
            assert (true.tracks - planted.tracks).abs().flatten(1).amax(dim=1).min() > 0.02


def test_vanished_object_is_invisible():
    planted = draw("projectile", 10, violation="vanish", severity=1.0)
    gone = ~planted.visibility[..., 0]
    assert gone[:, -1].all() and not gone[:, 0].any()
    assert not planted.masks[gone].any()


@pytest.mark.parametrize("scene", TEMPLATES)
def test_prompts_read_back(scene):
    for colour in COLOUR_NAMES:
        for direction in ("left", "right"):
            for template in range(len(TEMPLATES[scene])):
                attributes = {"colour": colour, "direction": direction}
                if scene == "collision":
                    attributes |= {"second_colour": "blue" if colour != "blue" else "red", "second_state": "moving"}
                request = parse_prompt(write_prompt(scene, attributes, template))
                assert request.scene == scene and request.colour == colour and request.direction == direction
                assert request.second_colour == attributes.get("second_colour")
                assert request.second_state == attributes.get("second_state")


def test_free_prompts_are_read():
    request = parse_prompt("A Red ball is tossed from the left towards the right; it hits the floor and bounces.")
    assert (request.scene, request.colour, request.direction) == ("projectile", "red", "right")
    request = parse_prompt("two balls collide: cyan from the left, magenta standing still")
    assert (request.scene, request.colour, request.second_colour) == ("collision", "cyan", "magenta")
    assert request.direction is None and request.second_state == "resting"
    assert parse_prompt("a pendulum").colour is None
    with pytest.raises(ValueError, match="sandbox scenes"):
        parse_prompt("a dog in the park")


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (("nowhere", 2), {}, "scene 'nowhere'"),
        (("ramp", 2), {"violation": "magic"}, "violation 'magic'"),
        (("ramp", 2), {"violation": "ghost"}, "collision"),
        (("ramp", 2), {"violation": "gravity", "severity": 1.5}, "severity"),
        (("ramp", 0), {}, "count"),
        (("occluder", 2), {"width": 24}, "aspect"),
        (("projectile", 2), {"num_frames": 5}, "2 seconds"),
    ],
)
def test_user_errors_name_the_remedy(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        simulate(*arguments, torch.Generator().manual_seed(0), **options)


def test_clips_are_simulated_and_drawn_together():
    """What is done for each clip by itself is only its prompt and parameters; a loop over clips would cost 30 times."""
    assert calls(lambda: draw("mixed", 150)) < 1.5 * calls(lambda: draw("mixed", 5))
