"""Difficulty and resampling as stages of a build: whose clips are made and judged, and which rows follow from that."""

import json
from collections import Counter

import pyarrow.parquet as pq
import pytest
import torch

from data_pipeline import build, tables
from data_pipeline.config import Setup
from data_pipeline.own_clips import ClipMaker
from data_pipeline.stages import STAGES
from data_pipeline.stages.resample import targets
from eval.judges.scores import Scores, Unjudged
from train.backbones.tiny import write_tiny_pipeline
from train.clips import write_clip
from train.files import seed_of

SCORE = {"ball": 0.25, "block": 0.75, "pendulum": 0.5}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_tiny_pipeline("wan21", tmp_path_factory.mktemp("wan21"))


@pytest.fixture
def judge(monkeypatch):
    """A judge that knows the prompts only, and says what it was asked; `refuses` names those that it does not take."""
    asked, refuses = [], set()

    def score(clips, prompts):
        asked.extend(prompts)
        assert clips.shape[1:] == (9, 32, 32, 3) and clips.dtype == torch.uint8
        failures = {number: "too odd" for number, prompt in enumerate(prompts) if prompt in refuses}
        values = [SCORE[word(prompt)] for prompt in prompts if prompt not in refuses]
        scores = Scores(torch.tensor(values), torch.tensor(values) / 2)
        if failures:
            raise Unjudged(failures, prompts, scores)
        return scores

    monkeypatch.setattr(tables, "TABLE_ROWS", 8)
    monkeypatch.setattr(Setup, "build_judge", lambda self: score)
    score.asked, score.refuses = asked, refuses
    return score


def word(prompt):
    return next(name for name in SCORE if name in prompt)


@pytest.fixture
def manifest(tmp_path):
    """30 rows of three actions, and clips of noise: 18 balls, 9 blocks, 3 pendulums."""
    frames = torch.randint(0, 255, (9, 32, 32, 3), generator=torch.Generator().manual_seed(0)).byte()
    write_clip(tmp_path / "clip.mp4", frames, 4)
    kinds = ["ball"] * 18 + ["block"] * 9 + ["pendulum"] * 3
    rows = [
        {"clip": "clip.mp4", "prompt": f"{kind} number {number}", "key": f"r{number:02d}", "action": kind}
        for number, kind in enumerate(kinds)
    ]
    path = tmp_path / "clips.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def run(model, manifest, output, *more):
    fixed = ("backbone.architecture=tiny", "backbone.dtype=float32", "backbone.text_length=32", "video.height=32")
    fixed += ("video.width=32", "video.num_frames=9", "video.fps=4", "sampler.steps=1", "sampler.guidance=1")
    sizes = ("pipeline.losers.count=1", "pipeline.unit_size=4", "judge.name=sandbox")
    chosen = ("pipeline.resample.budget=12", "pipeline.resample.representatives=2", "pipeline.stage=pool..resample")
    places = (f"output={output}", f"backbone.path={model}", f"pipeline.manifest={manifest}")
    build.main([*places, *fixed, *sizes, *chosen, *more])


def rows(output, stage):
    files = sorted((output / "pipeline" / stage).glob("unit-?????.parquet"))
    return [row for path in files for row in pq.read_table(path).to_pylist()]


@pytest.mark.slow
def test_the_difficult_are_taken_more_often(model, manifest, judge, tmp_path, capsys):
    """S = 3/4 of the judge's first score: d = 1 - 0.1875, 1 - 0.5625, 1 - 0.375; r = exp(3 d) = 11.44, 3.72, 6.52."""
    output = tmp_path / "out"
    run(model, manifest, output)
    tried = {row["key"]: row["trial"] for row in rows(output, "difficulty") if row["trial"] is not None}
    assert tried == {"r00": 0.1875, "r01": 0.1875, "r18": 0.5625, "r19": 0.5625, "r27": 0.375, "r28": 0.375}
    assert len(judge.asked) == 6
    assert len(list((output / "pipeline" / "difficulty" / "clips").glob("??/*.safetensors"))) == 6
    kept = rows(output, "resample")
    # Shares of 12: 11.44 / 21.69 -> 6.33, 3.72 / 21.69 -> 2.06, 6.52 / 21.69 -> 3.61, of which there are 3.
    assert Counter(row["action"] for row in kept) == {"ball": 6, "block": 2, "pendulum": 3}
    assert {row["action"]: round(row["difficulty"], 4) for row in kept} == {
        "ball": 0.8125,
        "block": 0.4375,
        "pendulum": 0.625,
    }
    assert [row["key"] for row in kept] == sorted(row["key"] for row in kept)  # the order of the table before
    files = sorted((output / "pipeline" / "resample").glob("unit-?????.parquet"))
    assert [pq.read_metadata(path).num_rows for path in files] == [8, 3]
    summary = json.loads((output / "pipeline" / "resample" / "summary.json").read_text(encoding="utf-8"))
    assert (summary["in"], summary["kept"], summary["dropped"]) == (30, 11, {"not chosen": 19})
    assert (output / "pipeline" / "resample" / "actions.png").stat().st_size > 1000
    table = (output / "pipeline" / "resample" / "actions.csv").read_text(encoding="utf-8").splitlines()
    assert table[1:] == ["ball,18,6,0.8125", "block,9,2,0.4375", "pendulum,3,3,0.6250"]
    assert (output / "groups" / "build" / "quarantine.jsonl").read_text(encoding="utf-8") == ""
    assert "actions before and after" in capsys.readouterr().out


@pytest.mark.slow
def test_what_is_known_is_not_made_again(model, manifest, judge, tmp_path, monkeypatch):
    output = tmp_path / "out"
    run(model, manifest, output)
    first = rows(output, "resample")
    monkeypatch.setattr(ClipMaker, "generate", lambda *_: pytest.fail("a clip was generated again"))
    judge.asked.clear()
    run(model, manifest, output)
    assert rows(output, "resample") == first and not judge.asked
    run(model, manifest, output, "pipeline.resample.tau=1", "pipeline.resample.redistribute=true")
    counts = Counter(row["action"] for row in rows(output, "resample"))
    expected = targets([18, 9, 3], [0.8125, 0.4375, 0.625], tau=1.0, budget=12, redistribute=True)
    assert [counts[name] for name in SCORE] == [expected[0], expected[1], expected[2]] and not judge.asked
    assert {row["key"] for row in rows(output, "resample")} != {row["key"] for row in first}
    run(model, manifest, output, "pipeline.resample.tau=0")  # needs no clip and no judge
    assert Counter(row["action"] for row in rows(output, "resample")) == {"ball": 4, "block": 4, "pendulum": 3}
    assert {row["difficulty"] for row in rows(output, "resample")} == {None}
    run(model, manifest, output, "pipeline.resample.budget=0")
    assert len(rows(output, "resample")) == 30
    with pytest.raises(pytest.fail.Exception, match="generated again"):
        run(model, manifest, output, "sampler.steps=2")


@pytest.mark.slow
def test_a_stopped_trial_continues_with_the_missing_clips(model, manifest, judge, tmp_path, monkeypatch):
    run(model, manifest, tmp_path / "whole")
    real, made = ClipMaker.generate, []

    def failing(self, rows, begins):
        if len(made) == 3:
            raise KeyboardInterrupt
        made.append(list(map(self.seeds, rows)))
        return real(self, rows, begins)

    monkeypatch.setattr(ClipMaker, "generate", failing)
    with pytest.raises(KeyboardInterrupt):
        run(model, manifest, tmp_path / "out")
    assert made[0] == [[seed_of(0, "r00", 0)]]
    monkeypatch.setattr(ClipMaker, "generate", lambda *a: made.append(a[1]) or real(*a))
    run(model, manifest, tmp_path / "out")
    assert len(made) == 6
    for name in ("difficulty", "resample"):
        files = [sorted((tmp_path / which / "pipeline" / name).glob("*.parquet")) for which in ("whole", "out")]
        assert [path.read_bytes() for path in files[0]] == [path.read_bytes() for path in files[1]]


@pytest.mark.slow
def test_clips_that_cannot_be_judged_or_read_do_not_count(model, manifest, judge, tmp_path, capsys):
    judge.refuses |= {"pendulum number 27", "pendulum number 28", "ball number 0"}
    text = manifest.read_text(encoding="utf-8").replace(
        '"clip.mp4", "prompt": "block number 18"', '"x.mp4", "prompt": "b"'
    )
    manifest.write_text(text, encoding="utf-8")
    run(model, manifest, tmp_path / "out")
    out = capsys.readouterr().out
    assert "the clip of 'r27' does not count: too odd" in out
    dropped = [
        row
        for path in sorted((tmp_path / "out" / "pipeline" / "difficulty").glob("*.dropped.parquet"))
        for row in pq.read_table(path).to_pylist()
    ]
    found = {row["action"]: row["difficulty"] for row in rows(tmp_path / "out", "resample")}
    assert found["ball"] == 0.8125 and found["block"] == 0.4375
    assert found["pendulum"] == pytest.approx(1 - (0.1875 + 0.5625) / 2)  # the mean of the others
    # A text-to-video family needs no frame of the clip, but a row whose clip is gone is of no use further on.
    assert [(row["key"], row["reason"]) for row in dropped] == [("r18", "missing")]


def test_settings_that_cannot_work_stop_before_any_work(model, manifest, tmp_path, monkeypatch):
    monkeypatch.setattr(ClipMaker, "generate", lambda *_: pytest.fail("work was begun"))
    for more, message in (
        (["judge.name=''"], "resample.tau=3 needs a judge"),
        (["pipeline.resample.budget=-1"], "resample.budget=-1"),
        (["pipeline.resample.representatives=0"], "resample.representatives=0"),
    ):
        with pytest.raises(ValueError, match=message):
            run(model, manifest, tmp_path / "out", *more)
    text = "".join(
        json.dumps({**json.loads(line), "action": ""}) + "\n"
        for line in manifest.read_text(encoding="utf-8").splitlines()
    )
    manifest.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match="no row has an action: set pipeline.cluster.model"):
        run(model, manifest, tmp_path / "out")


def test_a_dry_run_counts_the_budget(model, manifest, tmp_path, capsys):
    run(model, manifest, tmp_path / "out", "dry_run=true")
    assert "groups          12 at most" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()
    assert list(STAGES).index("difficulty") == list(STAGES).index("resample") - 1
