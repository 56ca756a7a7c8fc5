"""`eval.experiments.search.frontier` end to end on a tiny random pipeline, and its figures by hand."""

import json

import pytest

from eval.experiments.search import frontier
from eval.experiments.search.frontier_report import PLAIN, kind, summary
from eval.search.noise_refinement import RefineConfig
from eval.search.searcher import Searcher
from train.backbones.tiny import write_tiny_pipeline

QUICK = ["recipe=tiny", "sampler.steps=2", "sampler.guidance=1.0", "search_experiment.clips=1"]
QUICK += ["search.num_candidates=2", "search.residuals.levels=2", "search.residuals.draws=1"]
QUICK += ["search.refine.steps=1"]
ROWS = {"1 update": {"updates": 1}, "1 update, forward only": {"updates": 1, "gradient": "spsa"}}


@pytest.mark.slow
def test_rows_are_made_once_shared_and_collected(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(frontier, "SEEDS", (0, 1))
    monkeypatch.setattr(frontier, "REFINEMENTS", ROWS)
    write_tiny_pipeline("wan21", tmp_path / "model")
    quick = [*QUICK, f"output={tmp_path}"]
    assert frontier.main([*quick, "search_experiment.share=2/2"]) is None
    assert not (tmp_path / "search" / "frontier.json").exists()
    results = frontier.main(quick)
    assert json.loads((tmp_path / "search" / "frontier.json").read_text(encoding="utf-8")) == results
    assert (tmp_path / "search" / "frontier.png").stat().st_size > 0 and "best of 2" in capsys.readouterr().out
    rows = results["rows"]
    # One clip takes 2 steps; a score 2 passes, or 1; an update 1 step and 1 pass, with backward ones, or twice that
    # and a step for the mask.
    expected = {PLAIN: 2, "best of 2": 2 * 4, "best of 2, by one pass": 2 * 3, "1 update": 3 * 2 + 2}
    expected["best of 2, by one pass before the end"] = (
        2 * 2 + 1 + 1
    )  # a step and a look each, one's last and its score
    assert {name: row["cost"] for name, row in rows.items()} == expected | {"1 update, forward only": 1 + 4 + 2}
    assert all(row["clips"] == 2 for row in rows.values()) and rows[PLAIN]["gain"]["mean"] == 0
    assert len(list((tmp_path / "search" / "frontier").glob("*.json"))) == 5 * 2  # parts and seeds

    monkeypatch.setattr(Searcher, "refined", None)  # nothing is made again
    monkeypatch.setattr(Searcher, "sample", None)
    assert frontier.main(quick) == results
    monkeypatch.undo()
    monkeypatch.setattr(frontier, "SEEDS", (0, 1))
    monkeypatch.setattr(frontier, "REFINEMENTS", ROWS)
    monkeypatch.setattr(Searcher, "sample", None)
    changed = frontier.main([*quick, "search.refine.learning_rate=0.5"])  # the refined rows alone depend on it
    assert changed["rows"][PLAIN] == rows[PLAIN] and changed["rows"]["best of 2"] == rows["best of 2"]


def test_a_summary_by_hand():
    def unit(physical, passes, backward):
        return {"physical": physical, "semantic": [1.0] * 2, "motion": [2.0] * 2} | {
            "passes": passes,
            "backward": backward,
            "seconds": 4.0,
        }

    plain = {0: [unit([0.0, 0.5], 2, 0)], 1: [unit([0.25, 0.25], 2, 0)]}
    found = summary({0: [unit([0.5, 0.5], 6, 2)], 1: [unit([0.25, 0.75], 6, 2)]}, plain)
    assert found["gain"]["mean"] == pytest.approx(0.25) and found["gain_by_seed"] == {"0": 0.25, "1": 0.25}
    assert (found["passes"], found["backward"], found["cost"], found["clips"]) == (3, 1, 5, 4)
    assert found["motion"] == 1 and found["seconds"] == 2
    assert [kind(name) for name in ("best of 2", "guidance", "1 update")] == ["search", "guidance", "refinement"]


def test_the_papers_row_is_its_preset():
    printed = RefineConfig(**frontier.REFINEMENTS["as printed"])
    assert (printed.updates, printed.learning_rate, printed.levels, printed.draws) == (10, 2e-3, 4, 4)
    assert not printed.fresh and printed.steps == 4
