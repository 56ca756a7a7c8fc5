import math

import pytest
import torch
from safetensors.torch import load, save
from transformers import VJEPA2Config, VJEPA2Model

import recipes
from data_pipeline.simulated_tracks import simulated_disparity, simulated_tracks
from data_pipeline.stages.targets import TargetMaker
from eval.sandbox.clips import SCENES, simulate
from eval.sandbox.world import FIRST_OBJECT, GROUND, LAYER_DEPTH, PANEL, PIVOT_HEIGHT, ROD, Planted, World
from losses.regions import motion_magnitude, select_tracks
from train.clips import VideoConfig
from train.groups import Group, Loser, check_group
from train.teachers import ENCODERS, TRACKERS
from train.teachers.points import look_up, query_grid, unpack
from train.teachers.targets import TargetsConfig
from train.teachers.vjepa2 import VJepa2Config

SMALL = VideoConfig(height=64, width=64, num_frames=17, fps=8.0)
WIDE = VideoConfig(height=96, width=160, num_frames=17, fps=8.0)
QUERIES = query_grid(25)


def clips(scene, count=2, video=SMALL, seed=0, **options):
    size = {"height": video.height, "width": video.width, "num_frames": video.num_frames, "fps": video.fps}
    return simulate(scene, count, torch.Generator().manual_seed(seed), **size, **options)


def layer_of(clip, queries=QUERIES):
    return look_up(clip.layers[0, 0].long(), queries)


@pytest.fixture(scope="session")
def encoder(tmp_path_factory):
    """A tiny V-JEPA 2: 4 x 8 x 8 tokens of width 24."""
    config = VJEPA2Config(
        crop_size=128,
        frames_per_clip=8,
        hidden_size=24,
        num_attention_heads=2,
        num_hidden_layers=1,
        pred_hidden_size=12,
        pred_num_attention_heads=2,
        pred_num_hidden_layers=1,
    )
    folder = tmp_path_factory.mktemp("encoder")
    VJEPA2Model(config).save_pretrained(folder)
    return VJepa2Config(str(folder))


def maker(video=SMALL, **options):
    return TargetMaker(TargetsConfig(**options), video, "cpu")


SIMULATED = {"tracks": "simulator", "depth": "simulator"}


# ---- the simulator's points ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("video", [SMALL, WIDE], ids=["square", "wide"])
@pytest.mark.parametrize("scene", SCENES)
def test_points_move_with_what_they_are_on(scene, video):
    """Several points an object, all of the object's path; everything else but the rod stands still."""
    made = clips(scene, 3, video)
    for index in range(3):
        clip = made[index : index + 1]
        tracks, visible = simulated_tracks(clip, QUERIES)
        assert tracks.shape == (17, 625, 2) and tracks.dtype == torch.float32 and visible.dtype == torch.bool
        assert torch.equal(tracks[0], QUERIES) and visible[0].all()
        layers = layer_of(clip)
        for number in range(SCENES[scene].num_objects):
            own = layers == FIRST_OBJECT + number
            assert own.sum() >= 4
            centre = clip.tracks[0, :, number]
            path = tracks[:, own].mean(dim=1) - tracks[0, own].mean(dim=0)
            assert ((path - (centre - centre[0])).abs() * 64).max() < (2 if scene == "ramp" else 1e-3)  # pixels
        still = (layers < FIRST_OBJECT) & (layers != ROD)
        assert torch.equal(tracks[:, still], QUERIES[still].expand(17, -1, -1)) and still.sum() > 300


@pytest.mark.parametrize("seed", range(3))
def test_a_block_turns_as_the_simulator_says(seed):
    """Against the exact angles of the simulation, which the clip itself does not carry; to both sides."""
    made = clips("ramp", 4, WIDE, seed)
    world = World(160 / 96, 17, 8.0)
    parameters = {
        name: torch.tensor([values[name] for values in made.parameters], dtype=torch.float64)
        for name in ("half_side", "slope", "length", "foot")
    }
    angles = SCENES["ramp"].move(parameters, world, Planted(None, 0.0, *torch.zeros(3, 4))).angles  # (N,T)
    assert {attribute["direction"] for attribute in made.attributes} == {"left", "right"}
    for index in range(4):
        tracks, visible = simulated_tracks(made[index : index + 1], QUERIES)
        own = layer_of(made[index : index + 1]) == FIRST_OBJECT
        world_points = tracks[:, own].double() * torch.tensor([160 / 96, 1])
        arm = world_points - made.tracks[index, :, :1].double() * torch.tensor([160 / 96, 1])  # (T,n,2)
        turned = torch.atan2(arm[..., 1], arm[..., 0]) - torch.atan2(arm[0, :, 1], arm[0, :, 0])
        turned = (turned + math.pi) % (2 * math.pi) - math.pi
        sign = -1 if made.attributes[index]["direction"] == "left" else 1
        far = arm[0].norm(dim=1) > 0.02
        expected = sign * (angles[index] - angles[index, 0])
        assert (turned[:, far] - expected[:, None]).abs().max() < 1e-3 and far.sum() > 3
        assert expected.abs().max() > 0.4  # from the slope to the floor
        torch.testing.assert_close(arm.norm(dim=-1), arm[0].norm(dim=-1).expand(17, -1), atol=1e-5, rtol=0)  # rigid
        assert visible[:, own].float().mean() > 0.85  # points at the very edge flicker


def test_the_rod_turns_about_its_pivot():
    clip = clips("pendulum", 1, WIDE)
    tracks, visible = simulated_tracks(clip, query_grid(100))
    own = layer_of(clip, query_grid(100)) == ROD
    shape = torch.tensor([160 / 96, 1])
    arm = tracks[:, own] * shape - torch.tensor([160 / 96 / 2, PIVOT_HEIGHT])
    torch.testing.assert_close(arm.norm(dim=-1), arm[0].norm(dim=-1).expand(17, -1), atol=1e-5, rtol=0)
    assert own.sum() > 20 and visible[:, own].float().mean() > 0.7  # it is two pixels wide: its edge flickers
    moved = motion_magnitude((tracks * shape)[None])[0, own]
    assert moved.max() > 0.3 and torch.corrcoef(torch.stack([moved, arm[0].norm(dim=1)]))[0, 1] > 0.99


def test_points_of_one_object_keep_their_colour():
    """The pixels themselves: a point inside a ball shows the ball's hue in every frame in which it is visible."""
    clip = clips("projectile", 1)
    tracks, visible = simulated_tracks(clip, QUERIES)
    centre = clip.tracks[0, 0, 0]
    inside = (QUERIES - centre).norm(dim=1) < 0.05
    images = clip.frames[0].permute(0, 3, 1, 2).float()  # (T,3,H,W)
    shown = torch.stack([look_up(image, tracks[t, inside].expand(3, -1, -1)) for t, image in enumerate(images)])
    spread = shown - shown[:1]  # (T,3,n)
    assert inside.sum() >= 3 and visible[:, inside].all()
    assert spread.abs().max() < 25  # of 255: the highlight's shading; the backdrop is 150 away


def test_a_hidden_point_is_invisible_and_comes_back():
    clip = clips("occluder", 1)
    tracks, visible = simulated_tracks(clip, QUERIES)
    layers = layer_of(clip)
    ball, panel = layers == FIRST_OBJECT, layers == PANEL
    assert not visible[:, ball].all() and visible[0, ball].all() and visible[-1, ball].any()
    hidden = (~visible[:, ball]).all(dim=1)
    assert hidden.any() and not hidden[-1]  # a frame in which the whole ball is behind the panel
    assert visible[:, panel].all()
    behind = (layers == GROUND) & ~visible.all(dim=0)
    assert torch.equal(tracks[:, behind], QUERIES[behind].expand(17, -1, -1))


def test_background_that_a_ball_passes_is_hidden_meanwhile():
    clip = clips("projectile", 1)
    _, visible = simulated_tracks(clip, QUERIES)
    passed = ~visible.all(dim=0) & (layer_of(clip) < FIRST_OBJECT)
    assert passed.sum() > 10 and visible[0, passed].all() and visible[-1, passed].float().mean() > 0.5


def test_what_leaves_the_frame_is_invisible():
    clip = clips("projectile", 1)
    clip.tracks[0, 9:, 0, 0] += 2.0
    clip.layers[0, 9:, :, -1] = FIRST_OBJECT  # whatever the edge shows
    tracks, visible = simulated_tracks(clip, QUERIES)
    ball = layer_of(clip) == FIRST_OBJECT
    assert not visible[9:, ball].any() and (tracks[9:, ball, 0] == 1).all()


def test_disparity_is_nearness():
    clip = clips("occluder", 1)
    near = simulated_disparity(clip)
    layers = clip.layers[0, 0].long()
    assert near.shape == (64, 64) and near.min() == 0 and near.max() == 1
    by_layer = {layer: near[layers == layer].unique().tolist() for layer in layers.unique().tolist()}
    assert all(len(values) == 1 for values in by_layer.values())
    order = sorted(by_layer, key=lambda layer: by_layer[layer])
    assert order == sorted(by_layer, key=lambda layer: -LAYER_DEPTH[layer])
    assert order[-1] == PANEL


# ---- targets of a clip -----------------------------------------------------------------------------------------------


def test_targets_of_a_simulated_clip():
    clip = clips("projectile", 1)
    made = maker(**SIMULATED).make(clip.frames[0], clip)
    assert {name: (tuple(value.shape), value.dtype) for name, value in made.items()} == {
        "tracks": ((17, 625, 2), torch.uint16),
        "visible": ((17, 625), torch.bool),
        "disparity": ((625,), torch.float16),
        "keep": ((625,), torch.bool),
    }
    tracks, visible = simulated_tracks(clip, QUERIES)
    assert (unpack(made["tracks"]) - tracks).abs().max() <= 0.51 / 65535 and torch.equal(made["visible"], visible)
    assert torch.equal(made["keep"], layer_of(clip) == FIRST_OBJECT)  # what moves, and only that


@pytest.mark.parametrize("options", [{}, {"rule": "top_k", "top_k": 7}])
def test_keep_follows_from_what_is_stored(options):
    clip = clips("pendulum", 1, WIDE)
    made = maker(WIDE, **SIMULATED, **options).make(clip.frames[0], clip)
    motion = motion_magnitude(unpack(made["tracks"])[None], aspect=160 / 96)
    rule = {"rule": "mean"} | options
    assert torch.equal(made["keep"], select_tracks(motion, made["disparity"].float()[None], **rule)[0])
    assert made["keep"].any() and (made["keep"].sum() == 7 or not options)


def test_depth_favours_what_is_near():
    """The pendulum's rod is behind its ball: it loses more of its points by depth than the ball does."""
    clip = clips("pendulum", 1, WIDE)
    both = (SIMULATED, {"tracks": "simulator"})
    made, plain = (maker(WIDE, **options, grid=60).make(clip.frames[0], clip) for options in both)
    assert "disparity" not in plain
    motion = motion_magnitude(unpack(plain["tracks"])[None], aspect=160 / 96)
    assert torch.equal(plain["keep"], select_tracks(motion, torch.ones(1, 3600))[0])
    layers = layer_of(clip, query_grid(60))
    ball, rod = layers == FIRST_OBJECT, layers == ROD
    assert (made["disparity"][ball] == 1).all() and (0 < made["disparity"][rod]).all()
    assert (made["disparity"][rod] < 1).all() and made["keep"][ball].all() and plain["keep"][ball].all()
    assert made["keep"][rod].sum() < plain["keep"][rod].sum()


def test_relation_tokens_are_those_that_moving_points_visit(encoder):
    clip = clips("collision", 1)
    making = maker(**SIMULATED, relation="vjepa2", vjepa2=encoder)
    made = making.make(clip.frames[0], clip)
    tokens = ENCODERS["vjepa2"].build(encoder, "cpu")(clip.frames[0])
    assert made["relation_grid"].tolist() == [4, 8, 8]
    indices = made["relation_indices"].long()
    assert made["relation_tokens"].dtype == torch.bfloat16 and made["relation_indices"].dtype == torch.int32
    torch.testing.assert_close(made["relation_tokens"], tokens.values[indices].bfloat16(), atol=0, rtol=0)
    tracks, visible, keep = unpack(made["tracks"]), made["visible"], made["keep"]
    expected = set()
    for part, frames in enumerate(tokens.frames.tolist()):
        for frame in frames:
            for point in (keep & visible[frame]).nonzero()[:, 0].tolist():
                column, row = (min(7, int(8 * float(value))) for value in tracks[frame, point])
                expected.add(64 * part + 8 * row + column)
    assert indices.tolist() == sorted(expected) and 8 < len(expected) < 100
    few = maker(**SIMULATED, relation="vjepa2", vjepa2=encoder, max_tokens=5).make(clip.frames[0], clip)
    assert len(few["relation_indices"]) == 5 and set(few["relation_indices"].tolist()) < expected


def test_a_clip_in_which_nothing_moves(encoder):
    clip = clips("projectile", 1)
    clip.tracks[:], clip.layers[:] = clip.tracks[:, :1].clone(), clip.layers[:, :1].clone()
    for options in ({}, {"rule": "top_k"}):
        made = maker(**SIMULATED, relation="vjepa2", vjepa2=encoder, **options).make(clip.frames[0], clip)
        assert not made["keep"].any()
        assert made["relation_tokens"].shape == (0, 24) and made["relation_indices"].shape == (0,)
        again = load(save(made))
        assert all(torch.equal(again[name], value) for name, value in made.items())


def test_targets_fit_into_a_group(encoder):
    clip = clips("pendulum", 1)
    made = maker(**SIMULATED, relation="vjepa2", vjepa2=encoder).make(clip.frames[0], clip)
    latent = torch.zeros(16, 5, 8, 8)
    group = Group(
        key="a",
        prompt="a ball",
        action="",
        physics_richness=None,
        source="",
        losers_info=[Loser(0, 0.5, 0.5)],
        fingerprint="f",
        winner=latent,
        losers=latent[None] + 1,
        text=torch.zeros(3, 4),
        extra=made,
    )
    check_group(group)
    assert all(value.is_contiguous() and value.device.type == "cpu" for value in made.values())


def test_any_tracker_and_depth_will_do(monkeypatch):
    """Clips that nobody simulated: Lucas-Kanade here, its points in place of the simulator's."""
    pytest.importorskip("cv2", reason="OpenCV is optional")
    clip = clips("projectile", 1, WIDE)
    made = maker(WIDE, tracks="lucas_kanade", grid=15).make(clip.frames[0])
    assert made["tracks"].shape == (17, 225, 2) and made["keep"].any()
    start = query_grid(15)[made["keep"]] * torch.tensor([160 / 96, 1])
    ball = clip.tracks[0, 0, 0] * torch.tensor([160 / 96, 1])
    assert (start - ball).norm(dim=1).max() < 0.2  # frame heights: on the ball or at its edge
    monkeypatch.setattr(TRACKERS["lucas_kanade"], "build", lambda config, device: lambda f, q: (q + torch.nan, q > 0))
    with pytest.raises(ValueError, match="gave positions that are not finite"):
        maker(WIDE, tracks="lucas_kanade").make(clip.frames[0])


def test_no_targets_unless_asked():
    assert maker().make(clips("projectile", 1).frames[0]) == {}
    assert maker().describe() == "targets: none"


@pytest.mark.parametrize("full", [False, True])
def test_description_counts_the_bytes(encoder, full):
    options = SIMULATED | ({"relation": "vjepa2", "vjepa2": encoder} if full else {})
    making = maker(**options, max_tokens=20)
    clip = clips("collision", 1)
    made = making.make(clip.frames[0], clip)
    *lines, last = making.describe().splitlines()
    assert [line.split()[0] for line in lines] == list(made)
    total = sum(value.nbytes for value in made.values())
    assert last == f"targets: at most {total} bytes per group"
    assert sum(int(line.split()[-2]) for line in lines) == total


# ---- what a user can fix ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, words",
    [
        ({"tracks": "tapir"}, "targets.tracks='tapir' is unknown: choose simulator or lucas_kanade or cotracker"),
        ({"tracks": "simulator", "depth": "midas"}, "targets.depth='midas' is unknown: choose simulator or depth_any"),
        ({"tracks": "simulator", "relation": "simulator"}, "targets.relation='simulator' is unknown: choose vjepa2"),
        ({"depth": "simulator"}, "targets.depth=simulator needs tracks as well"),
        ({"relation": "vjepa2"}, "targets.relation=vjepa2 needs tracks as well"),
        ({"tracks": "simulator", "relation": "vjepa2"}, "targets.relation=vjepa2: vjepa2.path is empty"),
        ({"tracks": "simulator", "depth": "depth_anything"}, "depth_anything.path is empty"),
        ({"tracks": "cotracker"}, "targets.tracks=cotracker: cotracker.path=''"),
        ({"rule": "median"}, "targets.rule='median' is unknown: choose one of mean, top_k, all"),
        ({"grid": 0}, "targets.grid=0: use 1 or more"),
        ({"top_k": 0}, "targets.top_k=0: use 1 or more"),
        ({"max_tokens": -1}, "targets.max_tokens=-1: use 1 or more"),
    ],
)
def test_bad_settings_are_named_before_any_work(options, words):
    with pytest.raises(ValueError, match=words.replace("(", r"\(")):
        maker(**options)


@pytest.mark.parametrize(
    "options, words",
    [
        (SIMULATED, "targets.tracks=simulator, but this clip is no simulated one: use lucas_kanade or cotracker"),
        ({"tracks": "lucas_kanade", "depth": "simulator"}, "targets.depth=simulator, .* use depth_anything"),
    ],
)
def test_the_simulator_knows_its_own_clips_only(options, words):
    if options["tracks"] == "lucas_kanade":
        pytest.importorskip("cv2", reason="OpenCV is optional")
    with pytest.raises(ValueError, match=words):
        maker(**options).make(clips("projectile", 1).frames[0])


def test_settings_can_stand_in_a_recipe():
    from dataclasses import dataclass, field

    @dataclass
    class Config:
        pipeline: TargetsConfig = field(default_factory=TargetsConfig)

    arguments = ["pipeline.tracks=lucas_kanade", "pipeline.lucas_kanade.window=0.1", "pipeline.vjepa2.path=a/b"]
    config = recipes.load(Config, arguments)
    assert config.pipeline.lucas_kanade.window == 0.1 and config.pipeline.vjepa2.path == "a/b"
    with pytest.raises(ValueError, match="did you mean"):
        recipes.load(Config, ["pipeline.lucas_kanade.windows=0.1"])
