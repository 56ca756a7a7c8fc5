"""The learning-rate schedule by hand, and AdamW's settings."""

import pytest
import torch

from train.optimizer import OptimConfig, build_optimizer, learning_rate


def rates(steps, **changes):
    config = OptimConfig(steps=steps, **changes)
    return [learning_rate(config, step) for step in range(steps)]


def test_cosine_by_hand():
    # lr_end + (lr - lr_end) (1 + cos(pi step / 4)) / 2 for step 0 to 4: cos is 1, 0.70711, 0, -0.70711, -1.
    expected = [1.0, 0.8535533905932737, 0.5, 0.14644660940672627, 0.0]
    assert rates(5, lr=1.0, lr_end=0.0) == pytest.approx(expected, abs=1e-12)
    expected = [3.0, 2.7071067811865475, 2.0, 1.2928932188134525, 1.0]
    assert rates(5, lr=3.0, lr_end=1.0) == pytest.approx(expected)


@pytest.mark.parametrize("steps", [2, 10, 10_000])
def test_cosine_goes_from_lr_to_lr_end(steps):
    config = OptimConfig(steps=steps)  # the paper's 1e-5 to 1e-6
    assert learning_rate(config, 0) == 1e-5
    assert learning_rate(config, steps - 1) == pytest.approx(1e-6, rel=1e-12)
    assert all(a > b for a, b in zip(rates(steps), rates(steps)[1:], strict=False))


def test_warm_up_rises_linearly_and_cosine_takes_over():
    # Warm-up 4: a quarter, a half, three quarters, all; then cosine from the full rate at step 4 to lr_end at step 8.
    high, low = 0.1 + 0.45 * (1 + 2**-0.5), 0.1 + 0.45 * (1 - 2**-0.5)
    expected = [0.25, 0.5, 0.75, 1.0, 1.0, high, 0.55, low, 0.1]
    assert rates(9, lr=1.0, lr_end=0.1, warmup_steps=4) == pytest.approx(expected)


def test_constant_stays_after_warm_up():
    assert rates(4, lr=0.5, schedule="constant") == [0.5] * 4
    assert rates(4, lr=0.5, schedule="constant", warmup_steps=2) == [0.25, 0.5, 0.5, 0.5]


@pytest.mark.parametrize("changes", [{}, {"warmup_steps": 1}, {"warmup_steps": 5}])
def test_a_single_step_is_no_division_by_zero(changes):
    assert 0 < learning_rate(OptimConfig(steps=1, lr=1.0, **changes), 0) <= 1.0


def test_steps_beyond_the_last_keep_lr_end():
    assert learning_rate(OptimConfig(steps=10), 25) == pytest.approx(1e-6)


@pytest.mark.parametrize("step", [0, 3])
def test_an_unknown_schedule_is_refused(step):
    with pytest.raises(ValueError, match="optim.schedule='linear': must be cosine or constant"):
        learning_rate(OptimConfig(schedule="linear", warmup_steps=2), step)


def test_adamw_by_hand_for_one_step():
    """The first step: a weight decays by lr wd, and moves lr against the sign of its gradient."""
    weight = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
    optimizer = build_optimizer(OptimConfig(lr=0.1, weight_decay=0.5), [weight])
    weight.grad = torch.tensor([0.3, -4.0])
    optimizer.step()
    torch.testing.assert_close(weight.detach(), torch.tensor([1.0 * 0.95 - 0.1, -2.0 * 0.95 + 0.1]))
    (group,) = optimizer.param_groups
    assert group["betas"] == (0.9, 0.999) and group["eps"] == 1e-8 and group["weight_decay"] == 0.5
