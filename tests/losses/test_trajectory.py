import math

import pytest
import torch

from losses.trajectory import predict_tracks, trajectory_loss


def tensors(seed, *shapes):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in shapes]


def bilinear(grid, x, y):
    """Value (C,) of a grid (C,H,W) at (x, y), held constant beyond the outermost centres."""
    _, height, width = grid.shape
    column, row = min(max(x * width - 0.5, 0), width - 1), min(max(y * height - 0.5, 0), height - 1)
    left, top = min(int(column), width - 1), min(int(row), height - 1)
    right, bottom = min(left + 1, width - 1), min(top + 1, height - 1)
    a, b = column - left, row - top
    upper = (1 - a) * grid[:, top, left] + a * grid[:, top, right]
    return (1 - b) * upper + b * ((1 - a) * grid[:, bottom, left] + a * grid[:, bottom, right])


def reference_tracks(features, queries):
    """Eqs. 5-7 by loops, float64."""
    batch, frames, channels, height, width = features.shape
    tracks = queries.unsqueeze(1).repeat(1, frames, 1, 1)
    for b in range(batch):
        for n in range(queries.shape[1]):
            query = bilinear(features[b, 0], *queries[b, n].tolist())
            for t in range(1, frames):
                weights, places = [], []
                for row in range(height):
                    for column in range(width):
                        weights.append(math.exp(float(query @ features[b, t, :, row, column]) / math.sqrt(channels)))
                        places.append(((column + 0.5) / width, (row + 0.5) / height))
                for axis in range(2):
                    mean = sum(w * p[axis] for w, p in zip(weights, places, strict=True)) / sum(weights)
                    tracks[b, t, n, axis] = mean
    return tracks


def test_a_track_by_hand():
    features = torch.tensor([[2.0, 0.0], [1.0, 3.0]]).view(1, 2, 1, 1, 2)
    tracks = predict_tracks(features, torch.tensor([[[0.25, 0.5]]]))
    assert tracks[0, 0, 0].tolist() == [0.25, 0.5]
    assert tracks[0, 1, 0].tolist() == pytest.approx([0.741007, 0.5], abs=1e-6)


@pytest.mark.parametrize("size", [(3, 5), (4, 4), (1, 6)])
def test_tracks_equal_the_reference_also_at_the_border(size):
    (features,) = tensors(0, (2, 4, 6, *size))
    queries = torch.rand(2, 7, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    queries[0, :3] = torch.tensor([[0.0, 0.0], [1.0, 1.0], [0.5, 0.0]])
    tracks = predict_tracks(features, queries)
    assert tracks.shape == (2, 4, 7, 2) and tracks.dtype == torch.float32
    torch.testing.assert_close(tracks.double(), reference_tracks(features, queries), atol=2e-6, rtol=0)


def test_constant_features_expect_the_middle_and_distinct_ones_find_their_point():
    still = predict_tracks(torch.ones(1, 3, 4, 6, 8), torch.tensor([[[0.1, 0.9]]]))
    assert still[0, 1:, 0].flatten().tolist() == pytest.approx([0.5] * 4, abs=1e-6)
    code = 40 * torch.eye(24).view(24, 4, 6)
    moved = torch.stack([code, code.roll(1, dims=2)]).unsqueeze(0)  # every cell goes one to the right
    tracks = predict_tracks(moved, torch.tensor([[[0.25, 0.125]]]))  # the centre of column 1, row 0
    assert tracks[0, 1, 0].tolist() == pytest.approx([2.5 / 6, 0.125], abs=1e-5)


def test_the_loss_by_hand_and_by_loops():
    predicted, reference = (torch.tensor(value).view(1, 2, 1, 2) for value in ([0, 0, 0.5, 0.5], [9, 9, 0.8, 0.1]))
    everything = torch.ones(1, 1, dtype=torch.bool), torch.ones(1, 2, 1, dtype=torch.bool)
    assert trajectory_loss(predicted, reference, *everything).item() == pytest.approx(0.25)
    predicted, reference, draws = tensors(2, (3, 5, 4, 2), (3, 5, 4, 2), (3, 5, 4))
    keep, visible = torch.tensor([[1, 0, 1, 1], [0, 0, 0, 0], [1, 1, 1, 1]]).bool(), draws > 0
    loss = trajectory_loss(predicted, reference, keep, visible)
    for b in range(3):
        counted = [(t, n) for t in range(1, 5) for n in range(4) if keep[b, n] and visible[b, t, n]]
        total = sum(float((predicted[b, t, n] - reference[b, t, n]).square().sum()) for t, n in counted)
        assert loss[b].item() == pytest.approx(total / max(1, len(counted)), rel=1e-5)
    assert loss[1] == 0


def test_points_that_do_not_count_touch_no_gradient():
    predicted, reference = (tensor.float() for tensor in tensors(3, (2, 3, 2, 2), (2, 3, 2, 2)))
    predicted.requires_grad_()
    visible = torch.ones(2, 3, 2, dtype=torch.bool)
    visible[0, :, 0] = False  # and nothing of the second clip is kept
    reference[0, :, 0] = math.nan
    keep = torch.tensor([[True, True], [False, False]])
    loss = trajectory_loss(predicted, reference, keep, visible)
    loss.sum().backward()
    assert torch.isfinite(loss).all() and loss[0] > 0 and loss[1] == 0
    assert torch.isfinite(predicted.grad).all()
    assert predicted.grad[0, 1:, 1].abs().min() > 0
    assert not predicted.grad[0, :, 0].any() and not predicted.grad[0, 0].any() and not predicted.grad[1].any()


def test_gradients_reach_the_features():
    (features,) = (tensor.requires_grad_() for tensor in tensors(4, (1, 3, 2, 2, 3)))
    queries, target = torch.tensor([[[0.3, 0.6], [0.9, 0.2]]], dtype=torch.float64), tensors(5, (1, 3, 2, 2))[0]
    keep, visible = torch.ones(1, 2, dtype=torch.bool), torch.ones(1, 3, 2, dtype=torch.bool)

    def loss(values):
        return trajectory_loss(predict_tracks(values, queries), target, keep, visible).sum().double()

    (gradient,) = torch.autograd.grad(loss(features), features)
    direction = gradient / gradient.norm()
    with torch.no_grad():
        slope = (loss(features + 1e-2 * direction) - loss(features - 1e-2 * direction)) / 2e-2
    assert slope.item() == pytest.approx(gradient.norm().item(), rel=1e-3)
