import pytest
import torch

from losses.flow_matching import flow_error
from losses.self_score import aggregate, hybrid, masked_error, motion_mask


def draw(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_the_mask_by_hand_and_by_loops():
    assert motion_mask(torch.tensor([1.0, 3.0, 4.0]).view(1, 1, 3, 1, 1)).flatten().tolist() == [1.0, 1.0, 0.5]
    latents = draw(0, 2, 3, 4, 2, 3)
    mask = motion_mask(latents)
    assert mask.shape == (2, 4, 2, 3) and mask.dtype == torch.float32
    for clip in range(2):
        change = [(latents[clip, :, f] - latents[clip, :, f - 1]).abs().mean(0) for f in range(1, 4)]
        change = torch.stack([change[0], *change])
        torch.testing.assert_close(mask[clip].double(), change / change.max(), atol=1e-6, rtol=0)
    assert mask.flatten(1).amax(1).tolist() == [1.0, 1.0] and mask.min() >= 0


def test_nothing_moves():
    still = torch.ones(2, 3, 4, 2, 2)
    assert not motion_mask(still).any() and not motion_mask(still[:, :, :1]).any()
    assert masked_error(torch.ones(2, 3, 4, 2, 2), motion_mask(still)).tolist() == [0, 0]
    latents = draw(1, 1, 1, 3, 2, 2).requires_grad_()
    assert not motion_mask(latents).requires_grad


def test_the_masked_error_by_hand_and_by_loops():
    residual = torch.tensor([1.0, 3.0]).view(1, 1, 1, 1, 2)
    assert masked_error(residual).item() == pytest.approx(5)
    weights = torch.tensor([1.0, 0.5]).view(1, 1, 1, 2)
    assert masked_error(residual, weights).item() == pytest.approx(3.666667, rel=1e-5)
    residual, mask = draw(2, 3, 4, 2, 3, 2), draw(3, 3, 2, 3, 2).abs().clamp(max=1)
    errors = masked_error(residual, mask)
    for clip in range(3):
        expected = (mask[clip] * residual[clip].square().mean(0)).sum() / mask[clip].sum()
        assert errors[clip].item() == pytest.approx(expected.item(), rel=1e-5)
    torch.testing.assert_close(masked_error(residual, torch.ones_like(mask)), masked_error(residual), rtol=1e-5, atol=0)


def test_without_a_mask_it_is_the_flow_error():
    velocity, clean, noise = (draw(seed, 2, 3, 2, 2, 2) for seed in (4, 5, 6))
    torch.testing.assert_close(masked_error(velocity - (noise - clean)), flow_error(velocity, clean, noise))


def test_aggregation_by_hand_and_by_loops():
    errors = torch.tensor([[[1.0, 3.0], [4.0, 8.0]]])
    assert aggregate(errors).item() == pytest.approx(2.8, rel=1e-6)
    assert aggregate(errors, weighting="uniform").item() == 4
    errors = draw(7, 5, 4, 3).square()
    scores = aggregate(errors)
    for clip in range(5):
        means = [level.mean().item() for level in errors[clip]]
        weights = [1 / (((level - level.mean()) ** 2).mean().item() + 1e-8) for level in errors[clip]]
        expected = sum(m * w for m, w in zip(means, weights, strict=True)) / sum(weights)
        assert scores[clip].item() == pytest.approx(expected, rel=1e-5)
    one = errors[:, :, :1]
    torch.testing.assert_close(aggregate(one), aggregate(one, weighting="uniform"))
    with pytest.raises(ValueError, match="weighting='variance' is unknown: choose one of inverse_variance, uniform"):
        aggregate(errors, weighting="variance")


def test_the_weights_of_levels_are_constants_to_the_gradient():
    """Weights 0.8 and 0.2 over two draws each. Through them the first error's gradient would be 0.4 - 0.64: the score
    would fall where that error rises, towards its level's other draw."""
    errors = torch.tensor([[[1.0, 3.0], [4.0, 8.0]]], requires_grad=True)
    aggregate(errors).sum().backward()
    torch.testing.assert_close(errors.grad, torch.tensor([[[0.4, 0.4], [0.1, 0.1]]]))


def test_hybrid_and_gradients():
    assert hybrid(torch.tensor(1.0), torch.tensor(2.0)).item() == pytest.approx(1.8)
    residual, mask = draw(8, 2, 2, 2, 2, 2).float().requires_grad_(), draw(9, 2, 2, 2, 2).abs().clamp(max=1)
    errors = torch.stack([masked_error(residual, mask), masked_error(residual)], dim=1)  # (B,2)
    score = hybrid(aggregate(errors.unsqueeze(2)), errors[:, 0])
    score.sum().backward()
    share = 0.8 + 0.2 / 2  # of the masked error; the other tenth is the plain one
    cells = mask.unsqueeze(1) / (mask.flatten(1).sum(1).view(2, 1, 1, 1, 1) + 1e-6)
    expected = residual.detach() * (share * cells + (1 - share) / 8)  # d(r^2 / C)/dr with C = 2 channels, 8 cells
    torch.testing.assert_close(residual.grad, expected.float(), rtol=1e-4, atol=1e-6)
