import pytest
import torch

from losses.surprise import surprise


def reference(predicted, target, axis):
    """One clip (K,D), by loops over tokens or features, float64."""

    def normalised(tokens):
        rows = []
        for row in tokens.double():
            centred = row - row.sum() / len(row)
            rows.append(centred / ((centred * centred).sum() / len(row) + 1e-5).sqrt())
        return torch.stack(rows)

    predicted, target = normalised(predicted), normalised(target)
    if axis == "token":
        predicted, target = predicted.T, target.T
    cosines = [float(a @ b / (a @ a).sqrt() / (b @ b).sqrt()) for a, b in zip(predicted, target, strict=True)]
    return 1 - sum(cosines) / len(cosines)


def test_by_hand():
    predicted, target = torch.tensor([[[1.0, 3.0], [1.0, 3.0]]]), torch.tensor([[[1.0, 3.0], [3.0, 1.0]]])
    assert surprise(predicted, target).item() == pytest.approx(1)
    assert surprise(predicted, target, axis="token").item() == pytest.approx(1)
    assert surprise(predicted[:, 1:], target[:, 1:]).item() == pytest.approx(2)
    three = torch.tensor([[[1.0, 3.0], [1.0, 3.0], [3.0, 1.0]]])  # against itself with the last token turned round
    turned = three.clone()
    turned[0, 2] = torch.tensor([1.0, 3.0])
    assert surprise(three, turned).item() == pytest.approx(2 / 3)
    assert surprise(three, turned, axis="token").item() == pytest.approx(2 / 3)


@pytest.mark.parametrize("axis", ["feature", "token"])
def test_equals_the_reference(axis):
    generator = torch.Generator().manual_seed(0)
    predicted, target = (torch.randn(3, 5, 7, generator=generator, dtype=torch.float64) for _ in range(2))
    values = surprise(predicted, target, axis=axis)
    assert values.shape == (3,) and values.dtype == torch.float32
    for clip in range(3):
        assert values[clip].item() == pytest.approx(reference(predicted[clip], target[clip], axis), abs=1e-6)


@pytest.mark.parametrize("axis", ["feature", "token"])
def test_a_perfect_prediction_up_to_scale_and_offset_of_each_token_is_no_surprise(axis):
    target = torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(1))
    scale = torch.tensor([0.5, 1.0, 2.0, 3.0])[:, None]
    assert surprise(scale * target + 1, target, axis=axis).abs().max() < 1e-4
    assert surprise(-target, target, axis=axis).sub(2).abs().max() < 1e-5


def test_gradient_flows_to_both_sides_and_constant_tokens_are_finite():
    predicted = torch.randn(1, 3, 4, generator=torch.Generator().manual_seed(2)).requires_grad_()
    target = torch.ones(1, 3, 4, requires_grad=True)
    surprise(predicted, target).sum().backward()
    assert predicted.grad.isfinite().all() and target.grad.isfinite().all()
    other = torch.randn(1, 3, 4, generator=torch.Generator().manual_seed(3)).requires_grad_()
    surprise(predicted, other).sum().backward()
    assert other.grad.abs().sum() > 0


def test_an_unknown_axis_is_refused():
    with pytest.raises(ValueError, match="axis='time' is unknown"):
        surprise(torch.zeros(1, 2, 3), torch.zeros(1, 2, 3), axis="time")
