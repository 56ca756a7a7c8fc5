"""The physics terms: features to losses. Coordinates, frame order and grids by toys that a swap of any would break."""

import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from losses.relational import cosines
from losses.trajectory import trajectory_loss
from tests.synthetic_groups import random_targets, synthetic_group
from train.data import Sample
from train.teachers.points import pack, unpack
from train.teachers.targets import TargetsConfig
from train.terms import physics
from train.terms.physics import PhysicsConfig, PhysicsHeads, physics_losses, sample_trilinear, target_tensors

BOTH = PhysicsConfig(trajectory=1.0, relational=1.0, sem_width=24)
CONFIG = SimpleNamespace(physics=BOTH, targets=TargetsConfig())


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def batch_of(config, *extras, frames=5):
    tensors = [target_tensors(config, extra, num_frames=frames, max_tokens=512) for extra in extras]
    return {name: torch.stack([one[name] for one in tensors]) for name in tensors[0]}


# ---- resampling ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grid", [(4, 3, 7), (9, 2, 11), (5, 6, 8), (1, 1, 1)])
def test_sampling_equals_trilinear_interpolation(grid):
    """Up, down, unchanged and to a single cell, on sides that all differ; a grid of its own for each clip."""
    features = normal(2, 6, 5, 6, 8)
    other = (2, 9, 3)
    indices = [
        torch.randint(math.prod(size), (13,), generator=torch.Generator().manual_seed(3)) for size in (grid, other)
    ]
    found = sample_trilinear(features, torch.tensor([grid, other]), torch.stack(indices))
    for clip, (size, chosen) in enumerate(zip((grid, other), indices, strict=True)):
        whole = F.interpolate(features[clip : clip + 1], size=size, mode="trilinear", align_corners=False)
        torch.testing.assert_close(found[clip], whole[0].flatten(1).T[chosen], atol=1e-5, rtol=1e-5)


# ---- heads -----------------------------------------------------------------------------------------------------------


def test_heads_are_those_of_the_terms_and_follow_the_seed():
    one, same, other = (PhysicsHeads(BOTH, 20, seed=seed) for seed in (1, 1, 2))
    assert {name.split(".")[0] for name, _ in one.named_parameters()} == {"pix", "sem"}
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), same.parameters(), strict=True))
    assert not torch.equal(one.pix[0].weight, other.pix[0].weight)
    only = PhysicsHeads(PhysicsConfig(relational=0.5), 20, seed=0)
    assert [name for name, _ in only.named_children()] == ["sem"]


def test_a_head_reads_any_scale_and_dtype():
    """Layer normalisation: the residual stream of a trained network may be a thousand times larger."""
    heads = PhysicsHeads(BOTH, 20, seed=0)
    tokens = normal(3, 20) + 0.5
    out = heads("sem", tokens)
    assert out.shape == (3, 24) and out.dtype == torch.float32
    torch.testing.assert_close(heads("sem", 1000 * tokens), out, atol=1e-3, rtol=1e-3)
    low = heads("sem", tokens.bfloat16())
    assert low.dtype == torch.float32
    torch.testing.assert_close(low, out, atol=0.05, rtol=0.05)


def test_the_default_block_is_the_middle():
    assert physics.feature_block(BOTH, 40) == 20 and physics.feature_block(BOTH, 30) == 15
    assert physics.feature_block(PhysicsConfig(trajectory=1, block=7), 30) == 7
    assert physics.feature_block(PhysicsConfig(), 30) is None
    for block in (30, -2):
        with pytest.raises(ValueError, match=f"physics.block={block} is no block of this network: use 0 to 29"):
            physics.feature_block(PhysicsConfig(trajectory=1, block=block), 30)


# ---- targets ---------------------------------------------------------------------------------------------------------


def test_targets_take_the_frames_of_the_latents_and_are_padded():
    extra = random_targets(5, seed=4)
    count = len(extra["relation_indices"])
    tensors = target_tensors(BOTH, extra, num_frames=5, max_tokens=512)
    assert torch.equal(tensors["tracks"], unpack(extra["tracks"])[[0, 4, 8, 12, 16]])
    assert torch.equal(tensors["visible"], extra["visible"][[0, 4, 8, 12, 16]])
    assert torch.equal(tensors["keep"], extra["keep"]) and not extra["keep"].all()
    assert tensors["relation_valid"].sum() == count and tensors["relation_tokens"].shape == (512, 24)
    assert torch.equal(tensors["relation_tokens"][:count], extra["relation_tokens"])
    everywhere = target_tensors(PhysicsConfig(trajectory=1.0, region_focus=False), extra, num_frames=5, max_tokens=512)
    assert everywhere["keep"].all() and "relation_tokens" not in everywhere
    with pytest.raises(ValueError, match="tracks over 17 video frames do not fit 6 latent frames"):
        target_tensors(BOTH, extra, num_frames=6, max_tokens=512)
    with pytest.raises(ValueError, match=f"a group has {count} relation tokens: set targets.max_tokens={count}"):
        target_tensors(PhysicsConfig(relational=1.0), extra, num_frames=5, max_tokens=2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tracks": torch.zeros(17, 25, 3).to(torch.uint16)}, r"tracks has shape \(17, 25, 3\).*not \(17, 25, 2\)"),
        ({"tracks": torch.zeros(17, 25, 2)}, r"tracks has .*torch.float32, not .*torch.uint16"),
        ({"tracks": torch.tensor(0).to(torch.uint16)}, r"tracks has shape \(\)"),
        ({"visible": torch.ones(17, 24, dtype=torch.bool)}, r"visible has shape \(17, 24\).*not \(17, 25\)"),
        ({"keep": torch.ones(25)}, r"keep has .*torch.float32, not \(25,\) and torch.bool"),
        ({"relation_grid": torch.ones(2, dtype=torch.int32)}, r"relation_grid has shape \(2,\).*not \(3,\)"),
        ({"relation_grid": torch.tensor([3, 0, 4], dtype=torch.int32)}, r"outside of the grid \(3, 0, 4\)"),
        ({"relation_indices": torch.tensor([0, 60], dtype=torch.int32)}, r"outside of the grid \(3, 5, 4\)"),
        ({"relation_indices": torch.tensor([-1, 0], dtype=torch.int32)}, r"outside of the grid \(3, 5, 4\)"),
        ({"relation_tokens": torch.ones(3, 24).bfloat16()}, r"relation_tokens has shape \(3, 24\).*not \(2, 24\)"),
    ],
)
def test_targets_of_another_form_are_refused_with_the_group_and_the_remedy(changes, message):
    """A place outside of the grid would be gathered from another clip's memory, or stop the GPU without a name."""
    sizes = {"num_losers": 1, "latent_shape": (4, 5, 4, 4), "text_shape": (3, 8)}
    group = synthetic_group(0, **sizes, fingerprint="tiny", seed=0, targets=True)
    group.extra["relation_indices"] = torch.tensor([0, 59], dtype=torch.int32)
    group.extra["relation_tokens"] = torch.ones(2, 24).bfloat16()
    assert physics.prepare(CONFIG, Sample(0, group, 0), torch.Generator())["relation_valid"].sum() == 2
    group.extra |= changes
    with pytest.raises(ValueError, match=f"group 'group-000000': .*{message}.*: build the targets again"):
        physics.prepare(CONFIG, Sample(0, group, 0), torch.Generator())


def test_losses_are_the_two_terms_of_each_clip_and_padding_does_not_count():
    """Against the plain order: resample everything, project everything, choose, compare, one clip after the other."""
    features, heads = normal(2, 20, 5, 6, 4), PhysicsHeads(BOTH, 20, seed=0)
    extras = [random_targets(5, seed=seed) for seed in (0, 1)]
    batch = batch_of(BOTH, *extras)
    config = PhysicsConfig(trajectory=2.0, relational=3.0)
    loss, metrics = physics_losses(config, heads, features, batch)
    for clip, extra in enumerate(extras):
        tokens = features[clip].permute(1, 2, 3, 0)  # (F,H,W,D)
        maps = heads("pix", tokens)
        start = unpack(extra["tracks"])[0]
        predicted = physics.predict_tracks(maps.permute(0, 3, 1, 2)[None], start[None])
        tracks, visible = unpack(extra["tracks"])[::4], extra["visible"][::4]
        pix = trajectory_loss(predicted, tracks[None], extra["keep"][None], visible[None])[0]
        whole = F.interpolate(features[clip : clip + 1], size=(3, 5, 4), mode="trilinear")[0].flatten(1).T
        student = heads("sem", whole)[extra["relation_indices"].long()]
        sem = (cosines(student[None]) - cosines(extra["relation_tokens"][None])).abs().mean()
        assert loss[clip].item() == pytest.approx((2 * pix + 3 * sem).item(), rel=1e-4)
    single = [physics_losses(config, heads, features[i : i + 1], batch_of(BOTH, extras[i]))[1] for i in (0, 1)]
    for name, value in metrics.items():
        assert value.item() == pytest.approx(sum(one[name].item() for one in single) / 2, rel=1e-5), name


def test_a_clip_in_which_nothing_is_kept_gives_zero_and_finite_gradients():
    extra = random_targets(5, seed=0)
    extra["keep"][:] = False
    extra |= {"relation_tokens": extra["relation_tokens"][:0], "relation_indices": extra["relation_indices"][:0]}
    features, heads = normal(1, 20, 5, 6, 4).requires_grad_(), PhysicsHeads(BOTH, 20, seed=0)
    loss, _ = physics_losses(BOTH, heads, features, batch_of(BOTH, extra))
    assert loss.item() == 0
    gradients = torch.autograd.grad(loss.sum(), [features, *heads.parameters()])
    assert all(not gradient.any() for gradient in gradients)


def settings(winner="real", **physics):
    objective, optim = SimpleNamespace(winner=winner), SimpleNamespace(lr=1e-5)
    return SimpleNamespace(physics=PhysicsConfig(**physics), objective=objective, optim=optim)


def test_settings_and_groups_that_cannot_work():
    with pytest.raises(ValueError, match="physics.trajectory=-1: must be 0"):
        physics.check(settings(trajectory=-1))
    with pytest.raises(ValueError, match="objective.winner=generated has no physics targets"):
        physics.check(settings(trajectory=1, winner="generated"))
    with pytest.raises(ValueError, match="physics.head_lr=0"):
        physics.check(settings(relational=1, head_lr=0))
    physics.check(settings(winner="generated"))


# ---- toys ------------------------------------------------------------------------------------------------------------

FRAMES, ROWS, COLUMNS, WIDTH = 5, 6, 10, 16  # no two sides are equal


def moving_noise(frames=FRAMES):
    """Frozen noise as features (1,D,F,H,W) that slides one column right a frame, and down half as fast; what enters
    is new noise."""
    sheet = normal(WIDTH, ROWS + frames, COLUMNS + frames, seed=5)
    views = []
    for frame in range(frames):
        down, right = frame // 2, frame
        top, left = frames // 2 - down, frames - right
        views.append(sheet[:, top : top + ROWS, left : left + COLUMNS])
    return torch.stack(views, dim=1)[None]


def moving_points():
    """Cell centres of the first frame that stay inside, and where they go: the video's 17 frames, packed."""
    time = torch.arange(4 * (FRAMES - 1) + 1) / 4
    rows, columns = torch.meshgrid(torch.arange(0, 4), torch.arange(0, 6), indexing="ij")
    start = torch.stack([(columns.flatten() + 0.5) / COLUMNS, (rows.flatten() + 0.5) / ROWS], dim=-1)  # (24,2)
    step = torch.stack([time.floor() / COLUMNS, (time.floor() // 2) / ROWS], dim=-1)  # whole cells at latent frames
    return {
        "tracks": pack(start + step[:, None]),
        "visible": torch.ones(17, 24, dtype=torch.bool),
        "keep": torch.ones(24, dtype=torch.bool),
    }


def distance_in_cells(predicted, tracks):
    """Mean and largest distance in cells, x and y apart: (2,) each, over all frames but the first."""
    difference = (predicted - tracks)[:, 1:].abs() * torch.tensor([COLUMNS, ROWS])
    return difference.mean(dim=(0, 1, 2)), difference.amax(dim=(0, 1, 2))


def train_heads(config, features, batch, steps):
    heads = PhysicsHeads(config, WIDTH, seed=0)
    optimizer = torch.optim.Adam(heads.parameters(), lr=3e-3)
    for _ in range(steps):
        loss, _ = physics_losses(config, heads, features, batch)
        optimizer.zero_grad()
        loss.sum().backward()
        optimizer.step()
    return heads, loss.item()


def test_the_trajectory_term_alone_finds_the_moving_pattern():
    config = PhysicsConfig(trajectory=1.0)
    features, batch = moving_noise(), batch_of(config, moving_points())
    queries = batch["tracks"][:, 0]
    before, _ = distance_in_cells(
        physics.student_tracks(PhysicsHeads(config, WIDTH, seed=0), features, queries), batch["tracks"]
    )
    heads, _ = train_heads(config, features, batch, 150)
    after, worst = distance_in_cells(physics.student_tracks(heads, features, queries), batch["tracks"])
    assert (before > 0.5).any() and (after < 0.1).all() and (worst < 0.5).all()


@pytest.mark.parametrize("swap", ["x and y", "frame order", "rows and columns"])
def test_what_the_toy_would_notice(swap):
    """With the pattern fitted by the same heads, every swap is a cell or more away."""
    config = PhysicsConfig(trajectory=1.0)
    features, batch = moving_noise(), batch_of(config, moving_points())
    heads, _ = train_heads(config, features, batch, 150)
    tracks = batch["tracks"]
    if swap == "x and y":
        wrong = physics.student_tracks(heads, features, tracks[:, 0].flip(-1)).flip(-1)
    elif swap == "frame order":
        wrong = physics.student_tracks(
            heads, torch.cat([features[:, :, :1], features[:, :, 1:].flip(2)], 2), tracks[:, 0]
        )
    else:
        wrong = physics.student_tracks(heads, features.transpose(3, 4), tracks[:, 0])
    assert (distance_in_cells(wrong, tracks)[0] > 0.5).any()


def test_the_features_themselves_can_follow(monkeypatch):
    """The term's gradient reaches the features: with the heads fixed, noise without any motion learns the tracks."""
    monkeypatch.setattr(physics, "HIDDEN_WIDTH", 64)
    monkeypatch.setattr(physics, "PIX_WIDTH", 32)
    config = PhysicsConfig(trajectory=1.0)
    batch, heads = batch_of(config, moving_points()), PhysicsHeads(config, WIDTH, seed=0)
    features = normal(1, WIDTH, FRAMES, ROWS, COLUMNS, seed=9).requires_grad_()
    optimizer = torch.optim.Adam([features], lr=0.05)
    for _ in range(500):
        optimizer.zero_grad()
        physics_losses(config, heads, features, batch)[0].sum().backward()
        optimizer.step()
    _, worst = distance_in_cells(physics.student_tracks(heads, features, batch["tracks"][:, 0]), batch["tracks"])
    assert (worst < 0.5).all()


def test_the_relation_term_alone_aligns_the_matrices():
    """A teacher on another grid, whose tokens are a random function of the student's: aligned from 0.5 to below 0.05;
    with indices in the wrong order (columns for rows) they are not."""
    config = PhysicsConfig(relational=1.0, sem_width=32)
    features, grid = moving_noise(), (3, 4, 5)
    whole = F.interpolate(features, size=grid, mode="trilinear")[0].flatten(1).T  # (60,D)
    teacher = torch.tanh(whole @ normal(WIDTH, 24, seed=6))
    indices = torch.arange(0, 60, 2)
    extra = {
        "relation_tokens": teacher[indices].bfloat16(),
        "relation_indices": indices.int(),
        "relation_grid": torch.tensor(grid, dtype=torch.int32),
    }
    batch = batch_of(config, extra)
    heads, loss = train_heads(config, features, batch, 200)
    start = physics_losses(config, PhysicsHeads(config, WIDTH, seed=0), features, batch)[0].item()
    assert loss < 0.05 < 2 * 0.05 < start
    swapped = batch | {"relation_grid": torch.tensor([[3, 5, 4]])}
    assert physics_losses(config, heads, features, swapped)[0].item() > 2 * loss
