import pytest
import torch

from losses.flow_matching import bell_weight, flow_error, interpolate, velocity_target


def test_values_by_hand():
    clean = torch.tensor([0.0, 0.0]).view(1, 1, 1, 1, 2)
    noise = torch.tensor([1.0, 1.0]).view(1, 1, 1, 1, 2)
    velocity = torch.tensor([1.0, 3.0]).view(1, 1, 1, 1, 2)
    assert flow_error(velocity, clean, noise).tolist() == [2.0]  # errors 0 and 4, mean 2
    assert interpolate(clean, noise, torch.tensor([0.25])).flatten().tolist() == [0.25, 0.25]


def test_ends_of_the_path():
    generator = torch.Generator().manual_seed(0)
    clean, noise = torch.randn(2, 3, 2, 4, 5, 6, generator=generator)
    assert torch.equal(interpolate(clean, noise, torch.zeros(3)), clean)
    assert torch.equal(interpolate(clean, noise, torch.ones(3)), noise)
    # dx/dt is the velocity target
    slope = interpolate(clean, noise, torch.full((3,), 0.75)) - interpolate(clean, noise, torch.full((3,), 0.25))
    torch.testing.assert_close(slope / 0.5, velocity_target(clean, noise))


def test_equals_float64_reference_and_reduces_in_float32():
    generator = torch.Generator().manual_seed(1)
    velocity, clean, noise = torch.randn(3, 4, 2, 3, 5, 6, generator=generator, dtype=torch.float64)
    expected = [((velocity[i] - (noise[i] - clean[i])) ** 2).sum() / velocity[i].numel() for i in range(4)]
    error = flow_error(velocity, clean, noise)
    assert error.shape == (4,) and error.dtype == torch.float32
    torch.testing.assert_close(error.double(), torch.stack(expected), rtol=1e-6, atol=0)
    assert flow_error(velocity.bfloat16(), clean, noise).dtype == torch.float32


def test_gradient_is_that_of_a_mean():
    velocity = torch.zeros(1, 2, 1, 1, 2, requires_grad=True)
    clean, noise = torch.zeros(1, 2, 1, 1, 2), torch.ones(1, 2, 1, 1, 2)
    flow_error(velocity, clean, noise).sum().backward()
    torch.testing.assert_close(velocity.grad, torch.full_like(velocity, 2 * -1.0 / 4))


def test_the_bell_by_hand_and_on_the_releases_grid():
    """Its values on the grid of shift 5, and its mean there; the grid's last time is 5 * .001 / 1.004."""
    t = torch.tensor([1, 0.98, 0.9, 0.75, 0.5, 0.25])
    weights = bell_weight(t, shift=5.0)
    assert weights.dtype == torch.float32
    assert weights.tolist() == pytest.approx([0, 0.13, 0.63, 1.46, 2.08, 1.46], abs=0.005)
    assert bell_weight(torch.tensor(0.5), shift=5.0).item() == pytest.approx((1 - 0.606531) / 0.189496, rel=1e-5)
    for shift in (1.0, 5.0):
        grid = torch.tensor([shift * (i / 1000) / (1 + (shift - 1) * i / 1000) for i in range(1000, 0, -1)]).double()
        bell = torch.exp(-2 * ((1000 * grid - 500) / 1000) ** 2)
        bell = bell - bell.min()
        torch.testing.assert_close(bell_weight(grid, shift=shift).double(), bell / bell.mean(), rtol=1e-5, atol=1e-6)
