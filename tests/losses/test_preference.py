import math

import pytest
import torch

from losses.preference import pairwise_bound, physics_guided_weights, plackett_luce, relative_error


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def reference_weights(semantic, physical, alpha_min=0.5, k_alpha=5.0, b_alpha=0.5, k_gamma=2.0, b_gamma=0.4, lam=0.6):
    v = 1 - (semantic + physical) / 2
    return alpha_min + (1 - alpha_min) * sigmoid(k_alpha * (v - b_alpha)), (
        1 + lam * sigmoid(k_gamma * (v - b_gamma))
    ) / alpha_min


def errors(generator, *shape):
    return torch.rand(*shape, generator=generator, dtype=torch.float64)


def test_physics_guided_weights_by_hand():
    alpha, gamma = physics_guided_weights(torch.tensor([0.5]), torch.tensor([0.5]))
    assert alpha.item() == pytest.approx(0.75)
    assert gamma.item() == pytest.approx(2 * (1 + 0.6 * 0.549834), rel=1e-5)


@pytest.mark.parametrize(
    "options", [{}, {"alpha_min": 0.3, "k_alpha": 4.0, "b_alpha": 0.6, "k_gamma": 3.0, "b_gamma": 0.5, "lam": 0.5}]
)
def test_physics_guided_weights_equal_reference(options):
    generator = torch.Generator().manual_seed(0)
    semantic, physical = errors(generator, 2, 50)
    alpha, gamma = physics_guided_weights(semantic, physical, **options)
    for i in range(50):
        expected = reference_weights(semantic[i].item(), physical[i].item(), **options)
        assert (alpha[i].item(), gamma[i].item()) == pytest.approx(expected, rel=1e-5)
    assert (alpha > options.get("alpha_min", 0.5)).all() and (alpha < 1).all()
    assert (gamma >= 1 / alpha).all()  # what inequality (7) needs


def test_a_score_floor_of_a_fifth_is_a_rating_over_five():
    """Ratings 1 to 5 as scores (r - 1) / 4, against v = 1 - (r / 5 + r' / 5) / 2: two ones give 0.8, not 1."""
    ratings = torch.cartesian_prod(torch.arange(1, 6), torch.arange(1, 6)).double()
    semantic, physical = ((ratings - 1) / 4).unbind(1)
    alpha, gamma = physics_guided_weights(semantic, physical, score_floor=0.2)
    for found, (first, second) in zip(zip(alpha, gamma, strict=True), ratings.tolist(), strict=True):
        v = 1 - (first / 5 + second / 5) / 2
        assert found[0].item() == pytest.approx(0.5 + 0.5 * sigmoid(5 * (v - 0.5)), rel=1e-5)
        assert found[1].item() == pytest.approx((1 + 0.6 * sigmoid(2 * (v - 0.4))) / 0.5, rel=1e-5)
    assert alpha[0].item() == pytest.approx(0.5 + 0.5 * sigmoid(1.5), rel=1e-5)  # the worst: v = 0.8


def test_worse_losers_weigh_more():
    scores = torch.linspace(0, 1, 11)
    alpha, gamma = physics_guided_weights(scores, scores)
    assert (alpha.diff() < 0).all() and (gamma.diff() < 0).all()


def test_pairwise_bound_by_hand():
    loss = pairwise_bound(
        torch.tensor([1.0]),
        torch.tensor([1.1]),
        torch.tensor([1.3]),
        torch.tensor([1.2]),
        alpha=0.5,
        gamma=2.0,
        beta=10.0,
        group_size=4,
    )
    assert loss.item() == pytest.approx(-8 * math.log(sigmoid(1.0)), rel=1e-5)
    assert loss.item() == pytest.approx(2.506093, rel=1e-5)


def test_plackett_luce_by_hand():
    zeros = torch.zeros(1)
    loss = plackett_luce(zeros, zeros, torch.zeros(1, 2), torch.zeros(1, 2), beta=1000.0)
    assert loss.item() == pytest.approx(math.log(3), rel=1e-6)


def test_bound_equals_float64_reference():
    generator = torch.Generator().manual_seed(1)
    pw, rw, pl, rl, alpha, gamma = errors(generator, 6, 40)
    loss = pairwise_bound(pw, rw, pl, rl, alpha=alpha, gamma=gamma, beta=7.0, group_size=3)
    z = -alpha * 7.0 * ((pw - rw) - (pl - rl))
    torch.testing.assert_close(loss.double(), 3 * gamma * torch.log1p(torch.exp(-z)), rtol=1e-5, atol=1e-6)


def test_plackett_luce_equals_float64_reference():
    generator = torch.Generator().manual_seed(2)
    pw, rw = errors(generator, 2, 20)
    pl, rl = errors(generator, 2, 20, 4)
    loss = plackett_luce(pw, rw, pl, rl, beta=7.0)
    expected = torch.log1p(torch.exp(7.0 * ((pw - rw)[:, None] - (pl - rl))).sum(1))
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-6)


def test_one_loser_is_the_pairwise_case():
    generator = torch.Generator().manual_seed(3)
    pw, rw, pl, rl = errors(generator, 4, 30)
    exact = plackett_luce(pw, rw, pl[:, None], rl[:, None], beta=9.0)
    bound = pairwise_bound(pw, rw, pl, rl, alpha=1.0, gamma=1.0, beta=9.0, group_size=1)
    torch.testing.assert_close(exact, bound)  # inequality (7) is an equality at m = 1, alpha = gamma = 1


def test_inequality_7_on_random_inputs():
    """1 + sum exp(x_j) <= prod (1 + exp(alpha_j x_j))^gamma_j for 0 < alpha_j <= 1, gamma_j >= 1 / alpha_j."""
    generator = torch.Generator().manual_seed(4)
    x = 12 * (torch.rand(4000, 5, generator=generator, dtype=torch.float64) - 0.5)
    alpha = torch.rand(4000, 5, generator=generator, dtype=torch.float64).clamp(min=1e-3)
    slack = 1 + torch.rand(4000, 5, generator=generator, dtype=torch.float64) * (
        torch.rand(4000, 1, generator=generator) > 0.5
    )
    gamma = slack / alpha
    for m in range(1, 6):
        exact = torch.log1p(torch.exp(x[:, :m]).sum(1))
        bound = (gamma * torch.log1p(torch.exp(alpha * x)))[:, :m].sum(1)
        assert (bound >= exact - 1e-12).all()
    # Equality needs m = 1 and alpha = gamma = 1 (test_one_loser_is_the_pairwise_case); with more losers it is strict.
    assert (torch.log1p(torch.exp(x).sum(1)) < torch.log1p(torch.exp(x)).sum(1)).all()  # strict for m > 1


def test_inequality_fails_outside_its_conditions():
    """gamma < 1 / alpha breaks the bound: the condition is not idle."""
    x, alpha, gamma = -8.0, 0.5, 1.0
    assert gamma * math.log1p(math.exp(alpha * x)) > math.log1p(math.exp(x))  # holds here ...
    x = 8.0
    assert gamma * math.log1p(math.exp(alpha * x)) < math.log1p(math.exp(x))  # ... and fails here


def test_objective_bounds_the_exact_loss():
    """The mean over a group's losers of eq. 13 is at least eq. 6, with the weights of eq. 9."""
    generator = torch.Generator().manual_seed(5)
    pw, rw = errors(generator, 2, 500)
    pl, rl, semantic, physical = errors(generator, 4, 500, 4)
    alpha, gamma = physics_guided_weights(semantic, physical)
    exact = plackett_luce(pw, rw, pl, rl, beta=5.0)
    bounds = [
        pairwise_bound(pw, rw, pl[:, j], rl[:, j], alpha=alpha[:, j], gamma=gamma[:, j], beta=5.0, group_size=4)
        for j in range(4)
    ]
    assert (torch.stack(bounds).mean(0) >= exact - 1e-5).all()


@pytest.mark.parametrize("beta", [1.0, 1e3, 1e6])
def test_no_overflow(beta):
    pw, rw = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    pl, rl = torch.zeros(2, 3), torch.zeros(2, 3)
    exact = plackett_luce(pw, rw, pl, rl, beta=beta)
    bound = pairwise_bound(pw, rw, pl[:, 0], rl[:, 0], alpha=0.7, gamma=2.0, beta=beta, group_size=3)
    assert torch.isfinite(exact).all() and torch.isfinite(bound).all()
    assert exact[0].item() == pytest.approx(
        math.log(math.exp(min(beta, 600)) * 3 + 1) if beta < 600 else beta + math.log(3), rel=1e-5
    )


def test_gradient_is_coefficient_times_error_difference():
    """d loss / d pw = -d loss / d pl: what lets each clip be back-propagated alone with unit weight."""
    pw, pl = torch.tensor([1.0], requires_grad=True), torch.tensor([1.2], requires_grad=True)
    loss = pairwise_bound(
        pw, torch.tensor([1.1]), pl, torch.tensor([1.1]), alpha=0.8, gamma=2.5, beta=3.0, group_size=4
    )
    loss.sum().backward()
    bracket = (1.0 - 1.1) - (1.2 - 1.1)
    expected = 4 * 2.5 * 0.8 * 3.0 * sigmoid(0.8 * 3.0 * bracket)
    assert pw.grad.item() == pytest.approx(expected, rel=1e-5)
    assert pl.grad.item() == pytest.approx(-expected, rel=1e-5)


def test_zero_difference_means_log_two():
    same = torch.rand(8, generator=torch.Generator().manual_seed(6))
    assert relative_error(same, same, same, same).abs().max() == 0
    loss = pairwise_bound(same, same, same, same, alpha=1.0, gamma=1.0, beta=1000.0, group_size=1)
    torch.testing.assert_close(loss, torch.full((8,), math.log(2)))
