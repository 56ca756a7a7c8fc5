"""`train/benchmark.py` on the tiny architecture: every part runs, and its figures hang together."""

import json

import pytest

from train import benchmark


def test_all_parts_run_and_are_written(tmp_path):
    parts = "benchmark.parts=[ceilings,plain,ours,groupwise,copy,physics,self_score]"
    arguments = ["recipe=tiny", f"output={tmp_path}", "benchmark.repeats=1", parts]
    results = benchmark.main(arguments)
    assert json.loads((tmp_path / "benchmark.json").read_text(encoding="utf-8")) == results
    for part in ("plain", "ours", "groupwise", "copy", "physics", "self_score"):
        assert results[part]["seconds"] > 0 and results[part]["memory_gib"] > 0
    # Without training, the switch's policy is its reference to the last bit.
    assert results["ours"]["untrained_gap"] == results["groupwise"]["untrained_gap"] == 0
    # Two clips against five: the limit is proportional to the clips.
    assert results["groupwise"]["limit_seconds"] == pytest.approx(2.5 * results["ours"]["limit_seconds"])
    assert results["ours"]["limit_seconds"] == results["ceilings"]["pair_limit_seconds"]
    for part in ("physics", "self_score"):
        assert results[part]["ratio"] == results[part]["seconds"] / results["ours"]["seconds"]
    assert results["self_score"]["amortised"] - 1 == pytest.approx((results["self_score"]["ratio"] - 1) / 4)


def test_unknown_part_is_refused():
    with pytest.raises(ValueError, match="benchmark.parts: unknown theirs"):
        benchmark.main(["recipe=tiny", "benchmark.parts=[theirs]"])
