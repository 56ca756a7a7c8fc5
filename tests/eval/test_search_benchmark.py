"""`eval.experiments.search.benchmark` on the tiny architecture, and the shares that it prints by hand."""

import json

import pytest
import torch

from eval.experiments.search import benchmark

QUICK = ["recipe=tiny", "sampler.steps=4"]
QUICK += ["search.refine.levels=2", "search.refine.draws=2", "search.refine.gradient=last_1"]


def test_all_parts_run_and_are_written(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(benchmark, "REPEATS", 1)
    quick = [*QUICK, f"output={tmp_path}", "backbone.compile=false", "search.refine.steps=2"]
    results = benchmark.main([*quick, "search.residuals.levels=2", "search.residuals.draws=2"])
    assert json.loads((tmp_path / "search_benchmark.json").read_text(encoding="utf-8")) == results
    assert {part: results[part]["passes"] for part in benchmark.PARTS} == {
        "generate": 8,
        "score": 4,
        "refine": 6,
    }
    assert results["refine"]["backward"] == 5  # all but the first of two steps
    for part in benchmark.PARTS:
        assert results[part]["seconds"] > 0 and results[part]["memory_gib"] > 0
    assert results["tokens"] == 80 and not results["fused"]
    assert "scoring one candidate by residual_per_motion" in capsys.readouterr().out


def test_shares_and_table_by_hand():
    figures = {"memory_gib": 1.0, "passes": 16}
    results = {"device": "GPU", "tokens": 10, "fused": True, "generate": figures | {"seconds": 100.0}}
    results |= {"score": figures | {"seconds": 16.0, "scorer": "good"}, "refine": {"refused": "does not fit"}}
    benchmark.share(results)
    assert results["score"]["share"] == 0.16 and results["score"]["race_share"] == pytest.approx(0.61 * 0.16)
    text = benchmark.table(results)
    assert "16.0% of generating it, in a race 9.8%" in text and "does not fit" in text


def test_what_does_not_fit_is_said():
    def make():
        raise torch.OutOfMemoryError

    assert "memory" in benchmark.attempt(make)["refused"]


def test_dry_run_and_what_is_refused(tmp_path, capsys):
    assert benchmark.main(["recipe=wan14b", f"output={tmp_path}", "--dry-run"]) is None
    assert "32760 tokens" in capsys.readouterr().out and not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="search_benchmark.parts: unknown theirs"):
        benchmark.main(["recipe=tiny", "search_benchmark.parts=[theirs]"])
    with pytest.raises(ValueError, match="benchmark is not read by this command; it is search_benchmark now"):
        benchmark.main(["recipe=tiny", "benchmark.parts=[ours]"])
