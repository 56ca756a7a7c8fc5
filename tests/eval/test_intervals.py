import numpy as np
import pytest

from eval.report.intervals import Clustered, Estimate, bootstrap_mean, estimate, paired_test, strata


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


# Figures of rows in clusters


def clustered(rows, columns=("a",)):
    """Of (prompt, values) pairs, prompts in the order in which they come."""
    return Clustered.of(columns, list(dict.fromkeys(prompt for prompt, _ in rows)), rows)


def same(means):
    return means


def test_clips_of_a_prompt_go_together_by_hand():
    """Two prompts with two clips each, means 0 and 1: a resample is (0,0), (0,1), (1,0) or (1,1), so 0, 1/2 or 1 with
    the outer ones 25% each: the interval reaches both, whatever the clips within a prompt are."""
    rows = clustered([("x", {"a": -1.0}), ("x", {"a": 1.0}), ("y", {"a": 0.0}), ("y", {"a": 2.0})])
    assert estimate(rows, same)["a"] == Estimate(0.5, 0.0, 1.0)


def test_prompts_count_by_their_clips():
    rows = clustered([("x", {"a": 0.0}), ("y", {"a": 1.0}), ("y", {"a": 1.0}), ("y", {})])
    found = estimate(rows, same)["a"]
    assert found.mean == pytest.approx(2 / 3) and (found.low, found.high) == (0.0, 1.0)


def test_one_clip_a_prompt_is_the_plain_bootstrap():
    values = np.random.default_rng(0).random(40)
    found = estimate(clustered([(f"k{n}", {"a": value}) for n, value in enumerate(values)]), same)["a"]
    plain = bootstrap_mean(values)
    assert (found.mean, found.low, found.high) == pytest.approx((plain.mean, plain.low, plain.high), abs=1e-12)


def test_a_ratio_of_means_agrees_with_an_independent_bootstrap():
    generator = np.random.default_rng(3)
    a, b = generator.random(60) + 1, generator.random(60) + 2
    rows = clustered([(f"k{n}", {"a": x, "b": y}) for n, (x, y) in enumerate(zip(a, b, strict=True))], ("a", "b"))
    found = estimate(rows, lambda means: {"ratio": means["a"] / means["b"]})["ratio"]
    drawn = [generator.choice(60, 60) for _ in range(20000)]
    low, high = np.quantile([a[index].mean() / b[index].mean() for index in drawn], [0.025, 0.975])
    assert found.mean == pytest.approx(a.mean() / b.mean())
    assert (found.low, found.high) == pytest.approx((low, high), abs=2e-3)


def test_a_paired_difference_has_the_pairs_interval():
    """Every pair differs by 1 though the prompts differ by much more."""
    first = clustered([(f"k{n}", {"a": 10.0 * n + 1}) for n in range(9)])
    second = clustered([(f"k{n}", {"a": 10.0 * n}) for n in range(9)])
    found = estimate(first, same, minus=second)["a"]
    assert (found.mean, found.low, found.high) == pytest.approx((1, 1, 1))


def test_paired_test_by_hand():
    """Differences 1, 1, 1: of the 8 sign patterns two are as large. 3, 1, 1: sums 5, 3, 3, 1 and their negatives, two
    of 8 are as large as 5; 1, 1, -1: sum 1, and every pattern's is 1 or 3."""
    for changes, p in (([1, 1, 1], 2 / 8), ([3, 1, 1], 2 / 8), ([1, 1, -1], 1.0)):
        first = clustered([(f"k{n}", {"a": change}) for n, change in enumerate(changes)])
        second = clustered([(f"k{n}", {"a": 0.0}) for n in range(3)])
        assert paired_test(first, second, same) == {"a": pytest.approx(p)}


def test_seeds_of_a_prompt_are_exchanged_together():
    """Two prompts with two clips each: 4 patterns, and both that keep the sign are as large."""
    first = clustered([("x", {"a": 1.0}), ("x", {"a": 1.0}), ("y", {"a": 1.0}), ("y", {"a": 1.0})])
    second = clustered([("x", {"a": 0.0}), ("x", {"a": 0.0}), ("y", {"a": 0.0}), ("y", {"a": 0.0})])
    assert paired_test(first, second, same) == {"a": 0.5}


@pytest.mark.parametrize("size", [10, 40])  # all patterns, and random ones
def test_paired_test_agrees_with_an_independent_one(size):
    generator = np.random.default_rng(size)
    changes = generator.normal(0.3, 1.0, size)
    first = clustered([(f"k{n}", {"a": change}) for n, change in enumerate(changes)])
    second = clustered([(f"k{n}", {"a": 0.0}) for n in range(size)])
    signs = generator.choice([-1, 1], (200_000, size))
    expected = (np.abs(signs @ changes) >= abs(changes.sum()) - 1e-9).mean()
    assert paired_test(first, second, same)["a"] == pytest.approx(expected, abs=0.015)


def test_paired_test_of_a_derived_figure_exchanges_labels():
    """a / b of (2, 1), (4, 2) against (1, 2), (2, 4): 6/3 - 3/6 = 1.5 as it is and -1.5 with both prompts exchanged;
    with the first or the second alone 5/4 - 4/5 or its negative. Two of four are as large."""
    first = clustered([("x", {"a": 2.0, "b": 1.0}), ("y", {"a": 4.0, "b": 2.0})], ("a", "b"))
    second = clustered([("x", {"a": 1.0, "b": 2.0}), ("y", {"a": 2.0, "b": 4.0})], ("a", "b"))
    assert paired_test(first, second, lambda means: {"ratio": means["a"] / means["b"]}) == {"ratio": 0.5}


def test_no_clips_no_figure():
    nothing = Clustered.of(("a",), [], [])
    assert estimate(nothing, same) == {"a": None} and paired_test(nothing, nothing, same) == {"a": None}
    rows = clustered([("x", {"a": 1.0})], ("a", "b"))
    assert estimate(rows, same) == {"a": Estimate(1.0, 1.0, 1.0), "b": None}


def test_strata_by_hand():
    """0 … 100: the 33rd percentile is 33, the 67th 67; a clip on an edge belongs below it."""
    numbers, edges = strata(np.arange(101.0))
    assert edges.tolist() == [33, 67]
    assert [np.flatnonzero(numbers == n)[[0, -1]].tolist() for n in range(3)] == [[0, 33], [34, 67], [68, 100]]
