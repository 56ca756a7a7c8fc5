import math

import pytest
import torch

from losses.regions import motion_magnitude, rasterize, select_tracks


def random_tracks(seed, *shape):
    return torch.rand(*shape, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def reference_motion(tracks, aspect):
    batch, frames, points, _ = tracks.shape
    lengths = torch.zeros(batch, points, dtype=torch.float64)
    for b in range(batch):
        for n in range(points):
            for t in range(frames - 1):
                x, y = (float(tracks[b, t + 1, n, axis] - tracks[b, t, n, axis]) for axis in (0, 1))
                lengths[b, n] += math.hypot(aspect * x, y)
    return lengths


def reference_mask(tracks, keep, height, width):
    """The nearest of the cells' centres, searched among all of them."""
    mask = torch.zeros(*tracks.shape[:2], height, width, dtype=torch.bool)
    for b, t, n in torch.cartesian_prod(*(torch.arange(size) for size in tracks.shape[:3])).tolist():
        if keep[b, n]:
            x, y = tracks[b, t, n].tolist()
            column = min(range(width), key=lambda i: abs((i + 0.5) / width - x))
            row = min(range(height), key=lambda i: abs((i + 0.5) / height - y))
            mask[b, t, row, column] = True
    return mask


# ---- motion_magnitude ------------------------------------------------------------------------------------------------


def test_motion_by_hand():
    tracks = torch.tensor([[0.0, 0.0], [0.3, 0.4], [0.3, 0.5]])[None, :, None]  # (1, 3, 1, 2)
    assert motion_magnitude(tracks).item() == pytest.approx(0.6)
    assert motion_magnitude(tracks, aspect=2.0).item() == pytest.approx(0.821110, abs=1e-6)


@pytest.mark.parametrize("aspect", [1.0, 832 / 480])
def test_motion_equals_reference(aspect):
    tracks = random_tracks(0, 2, 5, 7)
    motion = motion_magnitude(tracks, aspect=aspect)
    assert motion.dtype == torch.float32
    torch.testing.assert_close(motion.double(), reference_motion(tracks, aspect), rtol=1e-5, atol=1e-6)


def test_a_pixel_counts_the_same_in_both_directions():
    right, down = torch.zeros(1, 2, 1, 2), torch.zeros(1, 2, 1, 2)
    right[0, 1, 0, 0], down[0, 1, 0, 1] = 10 / 832, 10 / 480
    both = [motion_magnitude(tracks, aspect=832 / 480).item() for tracks in (right, down)]
    assert both == pytest.approx([10 / 480] * 2)


def test_motion_of_still_points_and_of_one_frame_is_zero():
    assert motion_magnitude(random_tracks(1, 2, 1, 4).expand(2, 6, 4, 2)).tolist() == [[0.0] * 4] * 2
    assert motion_magnitude(random_tracks(1, 2, 1, 4)).tolist() == [[0.0] * 4] * 2


def test_half_precision_is_summed_in_float32():
    tracks = torch.linspace(0, 1, 1025, dtype=torch.float64)[None, :, None, None].expand(1, 1025, 1, 2)
    assert motion_magnitude(tracks.bfloat16()).item() == pytest.approx(math.sqrt(2), rel=1e-3)


# ---- select_tracks ---------------------------------------------------------------------------------------------------

MOTION, FOREGROUND = torch.tensor([[4.0, 1.0, 2.0, 0.0]]), torch.tensor([[0.5, 1.0, 1.0, 1.0]])


def kept(motion=MOTION, foreground=FOREGROUND, **options):
    return select_tracks(motion, foreground, **options).int().tolist()


def test_selection_by_hand():
    assert kept() == kept(rule="top_k", top_k=2) == [[1, 0, 1, 0]]
    assert kept(rule="top_k", top_k=1) == [[1, 0, 0, 0]]  # of two equal ones the first
    assert kept(rule="top_k", top_k=3) == kept(rule="top_k", top_k=4) == [[1, 1, 1, 0]]
    assert kept(rule="top_k", top_k=1000) == [[1, 1, 1, 0]]  # more than there are


def test_selection_equals_reference():
    motion, foreground = (random_tracks(seed, 3, 50)[..., 0] for seed in (2, 3))
    score = motion * foreground
    for b in range(3):
        above = [float(q) > math.fsum(score[b].tolist()) / 50 for q in score[b]]
        assert kept(motion, foreground)[b] == [int(value) for value in above]
        best = sorted(range(50), key=lambda n: -float(score[b, n]))[:7]
        assert kept(motion, foreground, rule="top_k", top_k=7)[b] == [int(n in best) for n in range(50)]


def test_the_background_is_kept_out_by_nearness():
    """A strong motion far away loses against a weaker one that is near."""
    motion, disparity = torch.tensor([[1.0, 0.4]]), torch.tensor([[0.1, 1.0]])
    assert kept(motion, disparity) == kept(motion, disparity, rule="top_k", top_k=1) == [[0, 1]]


def test_nothing_is_kept_where_nothing_moves_or_all_is_far():
    zeros, ones = torch.zeros(2, 6), torch.ones(2, 6)
    for motion, foreground in ((zeros, ones), (ones, zeros)):
        assert not select_tracks(motion, foreground).any()
        assert not select_tracks(motion, foreground, rule="top_k", top_k=3).any()
    assert not select_tracks(ones, ones).any()  # none is above the mean


def test_without_region_focus_all_are_kept():
    assert kept(MOTION, FOREGROUND, rule="all") == [[1] * MOTION.shape[1]]
    assert select_tracks(torch.zeros(2, 6), torch.ones(2, 6), rule="all").all()


def test_clips_of_a_batch_do_not_mix():
    motion = torch.tensor([[1.0, 2.0], [100.0, 200.0]])
    assert kept(motion, torch.ones(2, 2)) == [[0, 1], [0, 1]]


def test_selection_refuses_what_it_does_not_know():
    with pytest.raises(ValueError, match="rule='median' is unknown: choose one of mean, top_k, all"):
        select_tracks(MOTION, FOREGROUND, rule="median")
    for top_k in (None, 0):
        with pytest.raises(ValueError, match="top_k of 1 or more"):
            select_tracks(MOTION, FOREGROUND, rule="top_k", top_k=top_k)


# ---- rasterize -------------------------------------------------------------------------------------------------------


def cells(points, size, keep=None):
    """(row, column) of the cells that points of one frame mark."""
    tracks = torch.tensor(points)[None, None]
    keep = torch.ones(1, len(points), dtype=torch.bool) if keep is None else torch.tensor([keep])
    mask = rasterize(tracks, keep, size)
    assert mask.shape == (1, 1, *size) and mask.dtype == torch.bool
    return [tuple(cell) for cell in mask[0, 0].nonzero().tolist()]


def test_cells_by_hand():
    assert cells([[0.3, 0.5]], (2, 4)) == [(1, 1)]
    assert cells([[1.0, 0.0]], (2, 4)) == [(0, 3)]


def test_border_and_outside():
    corners = [[0.0, 0.0], [1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]
    assert cells(corners, (3, 5)) == [(0, 0), (0, 4), (2, 0), (2, 4)]
    assert cells([[-1e-6, 0.5], [1.001, 0.5], [0.5, -0.2], [0.5, 1.5], [math.nan, 0.5], [0.5, math.inf]], (3, 5)) == []


def test_only_kept_points_are_drawn():
    points = [[0.1, 0.1], [0.9, 0.9], [0.9, 0.9]]
    assert cells(points, (2, 2), [True, False, False]) == [(0, 0)]
    assert cells(points, (2, 2), [False, True, False]) == [(1, 1)]  # one that is not kept does not wipe it out
    assert cells(points, (2, 2), [False, False, True]) == [(1, 1)]
    assert cells(points, (2, 2), [False] * 3) == []


@pytest.mark.parametrize("size", [(16, 16), (30, 52), (7, 3), (1, 1)])
def test_mask_equals_reference(size):
    tracks, keep = random_tracks(4, 2, 3, 20), random_tracks(5, 2, 20)[..., 0] > 0.4
    assert torch.equal(rasterize(tracks, keep, size), reference_mask(tracks.float(), keep, *size))


def test_no_points():
    assert not rasterize(torch.zeros(2, 3, 0, 2), torch.zeros(2, 0, dtype=torch.bool), (4, 4)).any()
