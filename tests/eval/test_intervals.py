import numpy as np
import pytest

from eval.intervals import bootstrap_mean


def test_constant_values_have_no_width():
    estimate = bootstrap_mean(np.full(10, 0.25))
    assert (estimate.mean, estimate.low, estimate.high) == (0.25, 0.25, 0.25)


def test_equals_the_normal_interval_for_many_values():
    values = np.random.default_rng(0).normal(2.0, 3.0, 4000)
    estimate = bootstrap_mean(values)
    half = 1.96 * values.std() / np.sqrt(values.size)
    assert estimate.mean == pytest.approx(values.mean())
    assert (estimate.low, estimate.high) == pytest.approx((values.mean() - half, values.mean() + half), rel=0.01)


def test_covers_the_truth_as_often_as_it_says():
    generator = np.random.default_rng(1)
    hits = 0
    for seed in range(200):
        estimate = bootstrap_mean(generator.exponential(1.0, 200), seed=seed, resamples=1000)
        hits += estimate.low <= 1.0 <= estimate.high
    assert 180 <= hits <= 199  # 95% of 200, within four standard errors


def test_same_seed_same_interval():
    values = np.random.default_rng(2).random(50)
    assert bootstrap_mean(values, seed=3) == bootstrap_mean(values, seed=3)
    assert bootstrap_mean(values, seed=3) != bootstrap_mean(values, seed=4)


@pytest.mark.parametrize("values", [[], [1.0, float("nan")]])
def test_nothing_to_average_is_an_error(values):
    with pytest.raises(ValueError, match="nothing to average"):
        bootstrap_mean(np.array(values))
