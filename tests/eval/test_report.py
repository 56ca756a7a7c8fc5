"""The report of every benchmark, from made-up rows: papers' figures beside ours, marked as theirs."""

import random
from dataclasses import asdict

import pytest

from eval.benchmarks import BENCHMARKS, BenchmarkSettings
from eval.report import page as pages
from eval.report import tables as report
from eval.report.results import summarise
from train.clips import VideoConfig


@pytest.mark.parametrize("name", BENCHMARKS)
def test_every_benchmark_has_a_report(name):
    settings, video = BenchmarkSettings(), VideoConfig(64, 64, 17, 8.0)
    benchmark = BENCHMARKS[name](getattr(settings, name), video)
    assert benchmark.name == name
    draw = random.Random(0)
    lines = [
        {
            "model": model,
            "key": f"k{number}",
            "seed": 0,
            "category": "ab"[number % 2],
            "cluster": f"k{number // 2}",
            "motion": draw.random(),
            "values": {column: draw.random() for column in benchmark.columns},
            "error": "",
        }
        for model in ("base", "tuned")
        for number in range(8)
    ]
    found = {
        "problem": "",
        "requirements": [],
        "prompts": 8,
        "clusters": 4,
        "video": asdict(video),
        "figures": [*benchmark.figures],
    }
    found |= {"lower_is_better": [*benchmark.lower_is_better], "compute": {}, "settings": {}}
    found |= {"published": [asdict(one) for one in benchmark.published], **summarise(benchmark, lines, "base")}
    found |= {"page": "planner/episodes.html"} if name == "planner" else {}
    results = {"recipe": name, "date": "", "backbone": "", "lora": None, "seeds": [0], "benchmarks": {name: found}}
    results["compute"] = {"device": "CPU", "ranks": 1, "made_now": 0, "seconds": 1.0}
    results["settings"] = {"sampler": {"steps": 1, "guidance": 1.0, "shift": 3.0}}
    page, text = pages.html(results, {}), report.markdown(results)
    assert (
        page == pages.html(results, {})
        and page.count("<svg") == 2
        and "http" not in page.partition("<svg")[2].partition("</svg>")[0]
    )
    assert ('<a href="planner/episodes.html">' in page) == ("(planner/episodes.html)" in text) == (name == "planner")
    assert all(found["models"][model]["figures"][benchmark.figures[0]] for model in ("base", "tuned"))
    shown = [one for one in benchmark.published if set(one.values) & set(benchmark.figures)]
    assert page.count('<tr class="published">') == len(shown)
    assert all(f"{one.model} (published: {one.source})" in text for one in shown)
