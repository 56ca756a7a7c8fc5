"""`eval/report/results.py`: rows of one observation are drawn and exchanged together."""

import numpy as np
import pytest

from eval.benchmarks.sandbox import Sandbox, SandboxConfig
from eval.report.intervals import bootstrap_mean
from eval.report.results import summarise
from train.clips import VideoConfig

SCENARIOS, VIEWS = 12, 3


def rows(model: str, values: np.ndarray, views: int) -> list[dict]:
    """Views of one scenario with the same value each."""
    return [
        {
            "model": model,
            "key": f"{scenario}-{view}",
            "seed": 0,
            "category": "",
            "cluster": f"{scenario}",
            "motion": float(value),
            "values": {"physical": float(value)},
            "error": "",
        }
        for scenario, value in enumerate(values)
        for view in range(views)
    ]


def test_equal_views_of_a_scenario_prove_no_more_than_one_view():
    benchmark = Sandbox(SandboxConfig(), VideoConfig(64, 64, 17, 8.0))
    generator = np.random.default_rng(0)
    base, tuned = generator.normal(0.5, 0.2, SCENARIOS), generator.normal(0.6, 0.2, SCENARIOS)
    once, thrice = (
        summarise(benchmark, rows("base", base, views) + rows("tuned", tuned, views), "base") for views in (1, VIEWS)
    )
    figure = thrice["models"]["base"]["figures"]["physical"]
    expected = bootstrap_mean(base)  # over 12 scenarios, not over 36 views
    assert [figure[name] for name in ("mean", "low", "high")] == pytest.approx(
        [expected.mean, expected.low, expected.high]
    )
    assert figure["clips"] == SCENARIOS * VIEWS
    one, other = (found["gains"]["tuned"] for found in (once, thrice))
    for name in ("mean", "low", "high", "p"):
        assert other["figures"]["physical"][name] == pytest.approx(one["figures"]["physical"][name])
    for name in ("mean", "low", "high"):
        assert other["motion"]["all"]["physical"][name] == pytest.approx(one["motion"]["all"]["physical"][name])
