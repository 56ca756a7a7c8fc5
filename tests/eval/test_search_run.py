"""`eval.search.run` end to end on a tiny random pipeline, and the figures of its report by hand."""

import json
import re

import numpy as np
import pytest

from eval.search import report, run
from eval.search.pruning import promising
from train.backbones.tiny import write_tiny_pipeline
from train.clips import VideoConfig, read_clip

SCORERS = ["random", "most_motion", "proprio_hybrid-text", "residual_per_motion"]
COMMON = [
    "recipe=tiny",
    "sampler.steps=3",
    "sampler.guidance=1.0",
    "search.sandbox.clips=3",
    "search.num_candidates=3",
    "search.batch_size=2",
    "search.residuals.draws=2",
    "search.residuals.levels=2",
    "search.prune.steps=[1,2]",
    "search.shown=2",
]


@pytest.fixture(scope="module")
def searched(tmp_path_factory):
    folder = tmp_path_factory.mktemp("search")
    write_tiny_pipeline("wan21", folder / "model")
    return folder, run.main([*COMMON, f"output={folder}", f"search.scorers=[{','.join(SCORERS)}]"])


def records(folder):
    paths = sorted((folder / "search" / "prompts").glob("*.json"))
    return [json.loads(path.read_text(encoding="utf-8")) for path in paths]


def test_records_hold_every_scorer_and_the_choice(searched):
    folder, results = searched
    found = records(folder)
    assert len(found) == 3
    for record in found:
        assert set(record["scorers"]) == set(SCORERS) and len(set(record["seeds"])) == 3
        for scores in record["scorers"].values():
            values = [np.inf if value is None else value for value in scores["values"]]
            assert scores["chosen"] == int(np.argmin(values))
        passes = {name: scores["passes"] for name, scores in record["scorers"].items()}
        assert passes == {"random": 0, "most_motion": 0, "proprio_hybrid-text": 15, "residual_per_motion": 12}
        assert record["generation"]["passes"] == 9 and len(record["truth"]["physical"]) == 3
        assert record["race"]["passes"] == sum(record["race"]["rounds"]) <= 12
        for look in record["prune"]:
            early = {"most_motion": 0, "residual_per_motion": 6}[look["scorer"]]
            assert look["passes"] == 3 * look["step"] + early + 2 * (3 - look["step"]) + 8  # 2 of 3 are finished
            assert look["chosen"] in look["kept"] and len(look["kept"]) == 2
    assert json.loads((folder / "search" / "results.json").read_text(encoding="utf-8")) == results


def test_the_page_shows_the_clips_and_marks_the_chosen_one(searched):
    folder, _ = searched
    page = (folder / "search" / "index.html").read_text(encoding="utf-8")
    clips = re.findall(r'data-clip="([^"]+)"', page)
    assert len(clips) == 6 == len(set(clips))
    for clip in clips:
        read_clip(folder / "search" / clip, VideoConfig(64, 64, 17, 8.0))  # raises unless it is all there
    for record in records(folder)[:2]:
        chosen = record["clips"][record["scorers"]["residual_per_motion"]["chosen"]]
        figure = page[: page.index(chosen)].rindex("<figure")
        assert page[figure:].startswith('<figure class="chosen">')
    assert page.count('<figure class="chosen">') == 2


def test_running_again_computes_nothing_and_another_scorer_is_all_that_is_added(searched, monkeypatch):
    folder, results = searched
    before = {path: path.stat().st_mtime_ns for path in (folder / "search").rglob("*.*") if path.is_file()}
    monkeypatch.setattr(run.Work, "candidates", None)  # nothing of any prompt may be touched
    arguments = [*COMMON, f"output={folder}"]
    assert run.main([*arguments, f"search.scorers=[{','.join(SCORERS)}]"]) == results
    monkeypatch.undo()
    monkeypatch.setattr(run.Work, "generate", None)  # candidates are there
    monkeypatch.setattr(run.Work, "truth", None)
    more = run.main([*arguments, f"search.scorers=[{','.join([*SCORERS, 'proprio_global'])}]"])
    assert more["scorers"]["proprio_global"]["passes"] == 4
    for name in SCORERS:
        assert more["scorers"][name] == results["scorers"][name]
    after = {path: path.stat().st_mtime_ns for path in before if path.parent.name in ("candidates", "clips")}
    assert all(before[path] == time for path, time in after.items())


@pytest.mark.slow
def test_other_settings_make_other_candidates(searched, tmp_path):
    folder, _ = searched
    arguments = [*COMMON, f"backbone.path={folder / 'model'}", "search.scorers=[most_motion]"]
    arguments += ["search.chosen_by=most_motion", "search.prune.steps=[]", "search.sandbox.clips=1"]
    first = run.main([*arguments, f"output={tmp_path}"])
    assert first["race"] is None and first["prune"] == []
    latents = records(tmp_path)[0]["motion"]
    run.main([*arguments, f"output={tmp_path}", "sampler.steps=2"])
    assert records(tmp_path)[0]["motion"] != latents
    run.main([*arguments, f"output={tmp_path}", "search.num_candidates=4"])
    assert records(tmp_path)[0]["motion"][:3] == pytest.approx(latents, rel=1e-3)  # more add to fewer


def test_dry_run_says_what_would_be_made(searched, tmp_path, capsys):
    run.main([*COMMON, f"output={tmp_path}", "--dry-run"])
    assert "9 candidates of 3 prompts, 3 steps each" in capsys.readouterr().out and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "argument",
    [
        "search.scorers=[proprio]",
        "search.chosen_by=judge",
        "search.chosen_by=nobody",
        "search.combined=[rank_sum]",
        "search.num_candidates=1",
        "search.batch_size=0",
        "search.prune.steps=[3]",
        "search.prune.keep=0",
    ],
)
def test_settings_that_cannot_work_are_refused(argument):
    with pytest.raises(ValueError, match=argument.split("=")[0]):
        run.main([*COMMON, argument, "--dry-run"])


# The report


def record(physical, values, motion, *, passes=4):
    scorers = {name: {"values": found, "passes": passes, "seconds": 0.5} for name, found in values.items()}
    for found in scorers.values():
        found["chosen"] = int(np.argmin(found["values"]))
    truth = {"physical": physical, "semantic": [1.0] * len(physical)}
    return {"truth": truth, "scorers": scorers, "motion": motion, "generation": {"passes": 8, "seconds": 1.0}}


def test_figures_by_hand():
    """Two prompts of two candidates: "good" orders them as the truth does, most motion the other way round."""
    found = [
        record([0.2, 0.8], {"good": [2.0, 1.0], "most_motion": [-3.0, -1.0]}, [3.0, 1.0]),
        record([1.0, 0.4], {"good": [0.0, 5.0], "most_motion": [-1.0, -4.0]}, [1.0, 4.0]),
    ]
    results = report.results(found, ["most_motion", "good"], "good")
    rows = results["scorers"]
    means = {name: rows[name]["physical"]["mean"] for name in rows}
    assert means == pytest.approx({"oracle": 0.9, "random": 0.6, "most_motion": 0.3, "good": 0.9})
    assert rows["good"]["over_random"]["mean"] == pytest.approx(0.3)
    assert rows["good"]["over_most_motion"]["mean"] == pytest.approx(0.6)
    assert rows["good"]["correlation"]["mean"] == pytest.approx(1) and rows["good"]["passes"] == 2
    assert rows["most_motion"]["correlation"]["mean"] == pytest.approx(-1)
    assert results["generation"] == {"passes": 4.0, "seconds": 0.5}
    assert "* good" in report.table(results)


def test_a_gain_that_is_all_motion_vanishes_within_strata():
    """Truth is motion itself; in each third the motion is equal, and so is the truth."""
    motion = np.tile([1.0, 1.0, 2.0, 2.0, 3.0, 3.0], (5, 1))
    found = report.stratified(-motion, motion, report.strata(motion))
    assert [found[name]["mean"] for name in report.STRATA] == [0, 0, 0] and found["all"]["mean"] == 0


def test_strata_by_hand():
    values, truth = np.array([[2.0, 1.0, 0.0]]), np.array([[0.0, 1.0, 0.5]])
    bins = np.array([[0, 0, 2]])
    found = report.stratified(values, truth, bins)
    assert found["low"]["mean"] == 0.5 and found["medium"] is None and found["high"] is None
    assert found["all"]["mean"] == 0.5
    assert report.strata(np.array([[1.0, 2.0, 3.0]])).tolist() == [[0, 1, 2]]


def test_spearman_is_scipys():
    stats = pytest.importorskip("scipy.stats")
    generator = np.random.default_rng(0)
    for _ in range(20):
        a, b = generator.integers(0, 5, 8).astype(float), generator.normal(size=8)
        assert report.spearman(a, b) == pytest.approx(stats.spearmanr(a, b).statistic)
    assert report.spearman(np.ones(3), np.arange(3.0)) is None


def test_what_cannot_be_scored_is_never_promising():
    import torch

    assert promising(torch.tensor([torch.inf, 1.0, 0.0]), 2) == [1, 2]
