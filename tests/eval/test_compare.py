"""`eval/report/compare.py` on results written by hand, and what it refuses."""

import json
from dataclasses import asdict

import pytest

from eval.benchmarks import BenchmarkSettings
from eval.benchmarks.sandbox import Sandbox, SandboxConfig
from eval.report import compare
from eval.report import tables as report
from eval.report.results import STRATA, by_motion, summarise
from train.clips import VideoConfig

VIDEO = VideoConfig(64, 64, 17, 8.0)


def scores(model: str, physical: list[float], *, seed: int = 0, motion: float | None = 0.1, broken: int = -1):
    """One clip a prompt, the prompts of odd number being of another category."""
    return [
        {
            "benchmark": "sandbox",
            "model": model,
            "clip": number,
            "key": f"k{number}",
            "seed": seed,
            "prompt": f"prompt {number}",
            "category": "even" if number % 2 == 0 else "odd",
            "cluster": f"k{number}",
            "motion": motion,
            "values": {} if number == broken else {"physical": value, "semantic": 1.0},
            "error": "clip.mp4: truncated" if number == broken else "",
        }
        for number, value in enumerate(physical)
    ]


def write_run(folder, lines, *, clips: int = 4, where: str = "eval"):
    settings = BenchmarkSettings(sandbox=SandboxConfig(clips=clips))
    benchmark = Sandbox(settings.sandbox, VIDEO)
    found = {"figures": ["physical", "semantic"], "lower_is_better": [], "settings": {"clips": clips, "seed": 0}}
    found |= summarise(benchmark, lines, "base")
    results = {"settings": {"video": asdict(VIDEO), "run": asdict(settings)}, "benchmarks": {"sandbox": found}}
    (folder / where).mkdir(parents=True)
    (folder / where / "results.json").write_text(json.dumps(results), encoding="utf-8")
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / where / "scores.jsonl").write_text(text, encoding="utf-8")
    return str(folder)


BASE = [0.0, 0.25, 0.5, 0.25]


@pytest.fixture
def runs(tmp_path):
    first = write_run(tmp_path / "sft", scores("base", BASE) + scores("tuned", [0.5, 0.75, 1.0, 0.75]))
    second = write_run(tmp_path / "gdpo", scores("base", BASE) + scores("tuned", [0.75, 1.0, 1.0, 1.0], broken=2))
    return first, second


def test_differences_by_hand(runs, tmp_path, capsys):
    compared = compare.main([*runs, "--html", str(tmp_path / "page.html")])
    rows = compared["benchmarks"]["sandbox"]["rows"]
    assert [(row["run"], row["model"]) for row in rows] == [
        (runs[0], "base"),
        (runs[0], "tuned"),
        (runs[1], "tuned"),
    ]
    base, reference, other = (row["difference"] for row in rows)
    assert reference is None and base["physical"]["mean"] == -0.5 and base["physical"]["p"] == 2 / 16
    # Without the damaged clip three pairs, each 0.25 better: of 8 patterns two are as large.
    assert other["physical"] == {"mean": 0.25, "low": 0.25, "high": 0.25, "p": 0.25, "clips": 3, "missing": 1}
    printed = capsys.readouterr().out
    assert "+0.250 [+0.250, +0.250], p 0.250 |" in printed
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "+0.250 [+0.250, +0.250], p 0.250" in page and "http://" not in page


def test_other_settings_are_refused(runs, tmp_path):
    other = write_run(tmp_path / "other", scores("base", BASE), clips=5)
    with pytest.raises(ValueError, match=r"run.sandbox.clips is 4 in .*sft and 5 in .*other"):
        compare.main([runs[0], other])


def test_other_seeds_are_not_paired(runs, tmp_path):
    other = write_run(tmp_path / "other", scores("base", [0.1] * 4, seed=1), where=".")
    rows = compare.main([runs[0], other])["benchmarks"]["sandbox"]["rows"]
    assert rows[-1]["run"] == other and rows[-1]["difference"] is None


def test_what_is_no_run_is_refused(tmp_path):
    with pytest.raises(ValueError, match="holds no results.json"):
        compare.main([str(tmp_path)])


# The summary of a benchmark


def test_missing_clips_count_beside_every_figure_and_categories_are_apart():
    found = summarise(Sandbox(SandboxConfig(), VIDEO), scores("base", BASE) + scores("tuned", BASE, broken=1), "base")
    tuned = found["models"]["tuned"]
    assert tuned["figures"]["physical"] | {"low": 0, "high": 0} == {
        "mean": 0.25,
        "low": 0,
        "high": 0,
        "clips": 3,
        "missing": 1,
    }
    assert tuned["errors"] == [{"key": "k1", "seed": 0, "error": "clip.mp4: truncated"}]
    assert (
        tuned["categories"]["even"]["physical"]["mean"] == 0.25 and tuned["categories"]["odd"]["physical"]["clips"] == 1
    )
    assert found["gains"]["tuned"]["categories"]["odd"]["physical"]["missing"] == 1
    assert found["gains"]["tuned"]["figures"]["physical"]["clips"] == 3


def test_a_gain_that_is_all_motion_is_gone_at_equal_motion():
    """The score is the clip's motion; the tuned model has more fast clips. Within a third both are alike."""
    motions = {"base": [0.1] * 5 + [0.5] * 3 + [0.9] * 1, "tuned": [0.1] * 1 + [0.5] * 3 + [0.9] * 5}
    lines = {
        model: [line | {"motion": value} for line, value in zip(scores(model, values), values, strict=True)]
        for model, values in motions.items()
    }
    benchmark = Sandbox(SandboxConfig(), VIDEO)
    found = by_motion(benchmark, lines["tuned"], lines["base"])
    # Of six each the 33rd percentile is at 5.61 between 0.1 and 0.5, the 67th at 11.39 between 0.5 and 0.9.
    assert found["edges"] == pytest.approx([0.1 + 0.61 * 0.4, 0.5 + 0.39 * 0.4])
    counts = [[found["strata"][third][one]["physical"]["clips"] for one in ("base", "figures")] for third in STRATA]
    assert counts == [[5, 1], [3, 3], [1, 5]]
    for third in STRATA:
        assert found["strata"][third]["gain"]["physical"]["mean"] == pytest.approx(0, abs=1e-9)
    assert found["all"]["physical"]["mean"] == pytest.approx(0, abs=1e-9)
    whole = summarise(benchmark, lines["base"] + lines["tuned"], "base")
    assert whole["gains"]["tuned"]["figures"]["physical"]["mean"] == pytest.approx(3.2 / 9)


def test_without_motion_there_are_no_strata():
    lines = scores("base", BASE, motion=None), scores("tuned", BASE, motion=None)
    assert by_motion(Sandbox(SandboxConfig(), VIDEO), *lines) is None


@pytest.mark.parametrize(
    ("value", "sign", "shown"),
    [
        (0.5, False, "0.500"),
        (-0.0001, True, "0.000"),
        (0.25, True, "+0.250"),
        (41.26, False, "41.3"),
        (3, False, "3"),
        (None, False, ""),
        ({"mean": 0.5, "low": 0.25, "high": 1.0}, True, "+0.500 [+0.250, +1.000]"),
    ],
)
def test_numbers_are_shown_alike_everywhere(value, sign, shown):
    assert report.show(value, sign=sign) == shown
