"""`eval.experiments.search.run` end to end on a tiny random pipeline, and the figures of its report by hand."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

from eval.experiments.search import report, run, strategy_report, work
from eval.experiments.search.store import read_tensors
from eval.search.pruning import promising
from train.backbones.tiny import write_tiny_pipeline
from train.clips import VideoConfig, read_clip

WORLD_MODEL = Path(run.__file__).parents[2] / "sandbox" / "world_model"
SCORERS = ["random", "most_motion", "proprio_hybrid-text", "residual_per_motion"]
COMMON = [
    "recipe=tiny",
    "sampler.steps=3",
    "sampler.guidance=1.0",
    "search_experiment.clips=3",
    "search.num_candidates=3",
    "search.batch_size=2",
    "search.residuals.draws=2",
    "search.residuals.levels=2",
    "search.prune.steps=[1,2]",
]


@pytest.fixture(scope="module", autouse=True)
def two_prompts_on_the_page():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(work, "SHOWN", 2)
        yield


@pytest.fixture(scope="module")
def searched(tmp_path_factory):
    folder = tmp_path_factory.mktemp("search")
    write_tiny_pipeline("wan21", folder / "model")
    return folder, run.main([*COMMON, f"output={folder}", f"search_experiment.scorers=[{','.join(SCORERS)}]"])


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
    monkeypatch.setattr(work.Work, "candidates", None)  # nothing of any prompt may be touched
    arguments = [*COMMON, f"output={folder}"]
    assert run.main([*arguments, f"search_experiment.scorers=[{','.join(SCORERS)}]"]) == results
    monkeypatch.undo()
    monkeypatch.setattr(work.Work, "generate", None)  # candidates are there
    monkeypatch.setattr(work.Work, "truth", None)
    more = run.main([*arguments, f"search_experiment.scorers=[{','.join([*SCORERS, 'proprio_global'])}]"])
    assert more["scorers"]["proprio_global"]["passes"] == 4
    for name in SCORERS:
        assert more["scorers"][name] == results["scorers"][name]
    after = {path: path.stat().st_mtime_ns for path in before if path.parent.name in ("candidates", "clips")}
    assert all(before[path] == time for path, time in after.items())


STRATEGIES = [
    "recipe=tiny",
    "sampler.steps=2",
    "sampler.guidance=1.0",
    "search_experiment.clips=2",
    "search.num_candidates=2",
    "search.batch_size=2",
    "search_experiment.scorers=[most_motion]",
    "search.chosen_by=most_motion",
    "search.refine.best=1",
    "search.refine.steps=1",
    "search.refine.updates=1",
    "search.refine.levels=1",
    "search.refine.draws=2",
    "search.guidance.candidates=1",
    "search.surprise.window=4",
    "search.surprise.context=2",
    "search.surprise.stride=16",
    f"search.surprise.path={WORLD_MODEL}",
]


@pytest.mark.slow
def test_strategies_are_judged_resumed_and_shared_between_processes(searched, tmp_path, monkeypatch, capsys):
    arguments = [*STRATEGIES, f"backbone.path={searched[0] / 'model'}", f"output={tmp_path}"]
    assert run.main([*arguments, "search_experiment.share=2/2"]) is None and len(records(tmp_path)) == 1
    assert run.main([*arguments, "search_experiment.share=1/2"]) is None and "strategies" not in capsys.readouterr().out
    monkeypatch.setattr(work.Strategy, "make", None)  # all is there but a record's part: no clip is made again
    record_file = sorted((tmp_path / "search" / "prompts").glob("*.json"))[0]
    record = json.loads(record_file.read_text(encoding="utf-8"))
    del record["parts"]["refined"]
    record_file.write_text(json.dumps(record), encoding="utf-8")
    results = run.main(arguments)
    for record in records(tmp_path):
        best = record["scorers"]["most_motion"]["chosen"]
        assert record["refined"]["of"] == sorted({0, best}) and record["refined"]["best"] == [best]
        each = len(record["refined"]["of"])  # an update of 1 + 2 passes, with gradient; then 2 steps
        assert [len(scores) for scores in record["refined"]["scores"]] == [1] * each
        assert (record["refined"]["passes"], record["refined"]["backward"]) == (5 * each, 3 * each)
        assert (record["guided"]["passes"], record["guided"]["backward"]) == (2, 1)
        for name, count in (("refined", each), ("guided", 1)):
            assert len(record[name]["truth"]["physical"]) == len(record[name]["motion"]) == count
    rows = results["strategies"]
    assert [rows["one clip"]["passes"], rows["search"]["passes"], rows["guidance"]["backward"]] == [2, 4, 1]
    assert rows["refinement"]["passes"] == 5 and rows["search + refinement of the best"]["passes"] == 9
    assert "guidance + best of 1 by most_motion" in capsys.readouterr().out


@pytest.mark.slow
def test_a_refined_clip_is_the_same_in_any_batch(searched, tmp_path):
    arguments = [*STRATEGIES, f"backbone.path={searched[0] / 'model'}", "search.guidance.candidates=0"]
    found = []
    for size in (1, 6):
        run.main([*arguments, f"output={tmp_path / str(size)}", f"search.batch_size={size}"])
        files = sorted((tmp_path / str(size) / "search" / "candidates").glob("*-refined.safetensors"))
        with safe_open(files[0], framework="pt") as file:
            found.append(read_tensors(files[0], file.metadata()["digest"])[0]["latents"])
    torch.testing.assert_close(found[0], found[1], rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_other_settings_make_other_candidates(searched, tmp_path):
    folder, _ = searched
    arguments = [*COMMON, f"backbone.path={folder / 'model'}", "search_experiment.scorers=[most_motion]"]
    arguments += ["search.chosen_by=most_motion", "search.prune.steps=[]", "search_experiment.clips=1"]
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
        "search_experiment.scorers=[proprio]",
        "search.chosen_by=judge",
        "search.chosen_by=nobody",
        "search.num_candidates=1",
        "search.batch_size=0",
        "search.prune.steps=[3]",
        "search.prune.keep=0",
        "search_experiment.share=3/2",
        "search.refine.best=4",
        "search.guidance.candidates=2",
    ],
)
def test_settings_that_cannot_work_are_refused(argument):
    with pytest.raises(ValueError, match=argument.split("=")[0]):
        run.main([*COMMON, argument, "--dry-run"])


def test_the_experiments_keys_have_left_the_section_search():
    with pytest.raises(ValueError, match="unknown key search.scorers; it is search_experiment.scorers now"):
        run.main([*COMMON, "search.scorers=[random]"])


@pytest.mark.parametrize(
    "key",
    ["race", "residuals.seed", "prune.draws", "surprise.frames", "refine.clip", "refine.kl_weight", "refine.score"]
    + ["refine.weighting", "refine.seed", "guidance.t_min", "guidance.t_max", "guidance.through_network"],
)
def test_keys_that_became_constants_are_refused_with_their_place(key):
    with pytest.raises(ValueError, match=f"unknown key search.{key}; it is (the constant eval.search|always).* now"):
        run.main([*COMMON, f"search.{key}={'{confidence: 0.9}' if key == 'race' else 1}"])


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


def test_strategies_by_hand():
    """Two candidates; the chosen second one is refined, and so is the first."""
    found = record([0.2, 0.6], {"good": [2.0, 1.0], "most_motion": [-3.0, -1.0]}, [3.0, 1.0])
    part = {"truth": {"physical": [0.1, 0.9], "semantic": [1.0, 0.5]}, "motion": [1.0, 3.0]}
    part |= {"scorers": {"good": {"values": [4.0, 5.0], "passes": 4, "seconds": 1.0}}, "of": [0, 1]}
    cost = {"passes": 20, "backward": 10, "seconds": 3.0}
    found |= {"seeds": [0, 1], "refined": part | cost | {"best": [1]}, "guided": part | cost}
    rows = strategy_report.rows([found], "good")
    assert {name: row["physical"]["mean"] for name, row in rows.items()} == pytest.approx(
        {
            "one clip": 0.2,
            "search": 0.6,
            "refinement": 0.1,
            "search + refinement of the best": 0.9,
            "search + refinement of 1, choice": 0.9,
            "guidance": 0.5,
            "guidance + best of 2 by good": 0.1,
        }
    )
    adds = [row["adds"]["mean"] for name, row in rows.items() if name != "one clip"]
    assert adds == pytest.approx([0.4, -0.1, 0.3, 0.3, 0.1, -0.5])
    assert rows["search + refinement of the best"]["over_most_motion"]["mean"] == pytest.approx(0.7)
    assert rows["search + refinement of the best"]["adds_semantic"]["mean"] == -0.5
    assert rows["refinement"]["motion"] == 0.5 and rows["search + refinement of the best"]["motion"] == 1.5
    spent = {name: (row["passes"], row["backward"], row["seconds"]) for name, row in rows.items()}
    assert spent["one clip"] == (4, 0, 0.5) and spent["search"] == (12, 0, 1.5) and spent["refinement"] == (10, 5, 1.5)
    assert spent["search + refinement of 1, choice"] == (24, 5, 3.5)
    assert spent["guidance + best of 2 by good"] == (24, 10, 4.0)
    assert (
        "search + refinement" in strategy_report.table(rows) and strategy_report.rows([record([1], {}, [1])], "") == {}
    )


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
    assert promising(torch.tensor([torch.inf, 1.0, 0.0]), 2) == [1, 2]
