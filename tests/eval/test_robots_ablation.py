"""The suite `robots` of the ablation without the simulator: its commands, what rows share, and the table by hand."""

import dataclasses
import json
import time
from pathlib import Path

import pytest
from PIL import Image

import recipes
from data_pipeline import build
from eval import run as eval_run
from eval.experiments import processes
from eval.experiments.ablation import run as ablation
from eval.experiments.ablation.plan import Plan
from eval.experiments.ablation.rows import GROUPS, SUITES
from eval.experiments.ablation.runner import Processes, StepFailed, read_scores
from eval.experiments.ablation.suite import ROBOTS
from eval.experiments.world_model.sources import SOURCES
from eval.robots.planning import GIVEN
from train import gdpo, sft
from train.backbones.architecture import shape_of
from train.backbones.wan22_ti2v import Wan22TI2V

ROWS = SUITES["robots"](None).rows
TRAINERS = {"train.sft": sft.Config, "train.gdpo": gdpo.Config}
# Physical scores of two clips by model and seed, and success in three episodes; the object is off by 1 - physical.
PHYSICAL = {"base": {0: [0.0, 0.5], 1: [0.5, 0.5]}, "sft": {0: [0.25, 0.5], 1: [0.5, 0.75]}}
SUCCESS = {"base": {0: [0, 0, 0], 1: [0, 0, 0]}, "sft": {0: [1, 0, 0], 1: [1, 1, None]}}
OTHER = {0: [0.5, 1.0], 1: [1.0, 1.0]}, {0: [1, 1, 1], 1: [1, 1, 0]}


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch, request):
    monkeypatch.chdir(Path(__file__).parents[2])
    if "drawn" not in request.node.name:
        monkeypatch.setattr(ablation, "draw", lambda *_: None)


@pytest.fixture
def model(tmp_path):
    """A base model's folder with the inverse dynamics model that planners share, and demonstrations beside it."""
    (tmp_path / "base" / "model").mkdir(parents=True)
    (tmp_path / "base" / "demonstrations").mkdir()
    (tmp_path / "base" / "model" / GIVEN).write_bytes(b"first")
    return tmp_path / "base" / "model"


class Fake:
    """Stands in for the subprocesses: leaves what they leave, and scores of the row's name and seed."""

    def __init__(self, problem=""):
        self.calls, self.found, self.problem = [], {}, problem

    def __call__(self, module, arguments, log):
        given = dict(pair.removeprefix("--").split("=", 1) for pair in arguments)
        place = Path(given["output"])
        self.calls.append((module, place.name))
        log.parent.mkdir(parents=True, exist_ok=True)
        if module == "eval.experiments.world_model.training":
            self.found["recordings"] = given["recordings"]
            (place / "model.safetensors").touch()
        elif module == "data_pipeline.build":
            assert (Path(given["targets.vjepa2.path"]) / "model.safetensors").exists()
            (place / "index.json").write_text("{}", encoding="utf-8")
        elif module == "eval.run":
            self.evaluate(place, given)
        else:
            weights = place / "train" / "lora" / "pytorch_lora_weights.safetensors"
            weights.parent.mkdir(parents=True)
            weights.write_text(" ".join(arguments), encoding="utf-8")

    def evaluate(self, place, given):
        name, seed = place.name.rsplit("-", 1)
        models = {"base": "base"} | ({"tuned": Path(given["run.lora"]).parent.name[:-2]} if "run.lora" in given else {})
        if "run.search" in given:
            models |= {"base-best_of_n": "best", "tuned-best_of_n": "best"}
        folder = place / "eval"
        self.found[place.name] = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
        lines = []
        for benchmark in given["benchmarks"].strip("[]").split(","):
            for model, row in [("true", "base"), *models.items()]:
                (folder / benchmark / "clips" / model).mkdir(parents=True, exist_ok=True)
                (folder / benchmark / "clips" / model / "0.mp4").touch()
                (folder / benchmark / f"rows-{model}.jsonl").write_text(f"{benchmark} {model}", encoding="utf-8")
                own = {"benchmark": benchmark, "model": model}
                if benchmark == "planner":
                    found = SUCCESS.get(row, OTHER[1])[int(seed)]
                    for number, value in enumerate(found if model != "true" else []):
                        error = "the simulator failed" if value is None else ""
                        values = {} if value is None else {"success": value, "push": value}
                        lines.append({**own, "key": f"push-{number:04d}", "values": values, "error": error})
                else:
                    for number, value in enumerate(PHYSICAL.get(row, OTHER[0])[int(seed)]):
                        errors = {"gripper_error": 0.25, "object_error": 1 - value}
                        values = {"physical": value, "semantic": 1.0, **errors}
                        lines.append({**own, "key": f"{number}-push", "values": values, "error": ""})
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (folder / "scores.jsonl").write_text(text, encoding="utf-8")
        results = {"benchmarks": {"planner": {"problem": self.problem}}}
        (folder / "results.json").write_text(json.dumps(results), encoding="utf-8")


def start(tmp_path, model, run, *more, rows="base,sft,sft_both", seeds="0,1"):
    own = [
        "--suite",
        "robots",
        "--folder",
        str(tmp_path / "suite"),
        "--clips",
        "2",
        "--episodes",
        "3",
        "--seeds",
        seeds,
    ]
    return ablation.main([*own, "--rows", rows, *more, "--set", f"backbone.path={model}"], run)


def read(tmp_path):
    results = json.loads((tmp_path / "suite" / "ablation.json").read_text(encoding="utf-8"))
    return results, {row["name"]: row for row in results["rows"]}


def test_the_table_worked_by_hand_and_drawn(tmp_path, model, capsys):
    assert start(tmp_path, model, Fake(), rows="base,sft,sft_both,sft_block_1") == 0
    results, rows = read(tmp_path)
    base, sft_row, both = (rows[name] for name in ("base", "sft", "sft_both"))
    assert (
        results["recipe"] == "robots" and results["episodes"] == 3 and results["missing"] == {"sft-1": {"success": 1}}
    )
    assert base["success"] == {"mean": 0, "low": 0, "high": 0} and base["gain"]["success"] is None
    # By episode, over the seeds that have it: 1, 0.5, and of the last one seed 0 alone: 0.
    assert sft_row["success"]["mean"] == 0.5 and sft_row["seeds"]["1"]["success"] == 1
    assert (sft_row["success"]["low"], sft_row["success"]["high"]) == (0, 1)
    # 1, 1, 0.5 without the base's; in pairs with SFT's: 0, 0.5, and 1 of seed 0 alone.
    assert both["gain"]["success"]["mean"] == pytest.approx(2.5 / 3) and both["against"]["success"]["mean"] == 0.5
    # Clips of two seeds are other clips: 0.25, 0.5, 0.5, 0.25.
    assert both["against"]["physical"] == {"mean": 0.375, "low": 0.25, "high": 0.5}
    assert both["against"]["object_error"] == {"mean": -0.375, "low": -0.5, "high": -0.25}
    printed = capsys.readouterr().out
    assert "sft      +0.375 [+0.250, +0.500]  -0.375 [-0.500, -0.250]  " in printed
    assert "sft-1 lacks 1 of success" in printed and "object_error (less is better)" in printed
    with Image.open(tmp_path / "suite" / "ablation.png") as image:
        assert image.width == 1800 and 600 < image.height < 2000


@pytest.mark.slow
def test_the_world_model_comes_once_and_before_all_builds(tmp_path, model):
    run = Fake()
    start(tmp_path, model, run, rows="base", seeds="0")
    assert run.calls == [("eval.run", "base-0")]
    start(tmp_path, model, run, "--jobs", "3", rows="sft,sft_both_everywhere", seeds="0")
    names = [module for module, _ in run.calls[1:]]
    assert names[0] == "eval.experiments.world_model.training" and names.count(names[0]) == 1
    assert run.found["recordings"] == str(model.parent / "demonstrations")
    again = Fake()
    start(tmp_path, model, again, rows="base,sft,gdpo", seeds="0")
    assert [module for module, _ in again.calls] == ["data_pipeline.build", "train.gdpo", "eval.run"]


def test_a_world_model_that_was_stopped_costs_its_rows_and_no_more(tmp_path, model, capsys):
    class Stopped(Fake):
        def __call__(self, module, arguments, log):
            if module == "eval.experiments.world_model.training":  # ends with status 0 and without weights
                self.calls.append((module, ""))
            else:
                super().__call__(module, arguments, log)

    run = Stopped()
    assert start(tmp_path, model, run, rows="base,sft", seeds="0") == 1
    assert [module for module, _ in run.calls] == ["eval.run", "eval.experiments.world_model.training"]
    errors = capsys.readouterr().err
    assert "FAILED   world_model: the training of" in errors and "FAILED   robots_targets-0: what" in errors


def test_rows_share_the_bases_clips_episodes_and_inverse_dynamics(tmp_path, model):
    run = Fake()
    start(tmp_path, model, run, rows="base,sft,sft_residual", seeds="0")
    given = f"planner/scoring/{GIVEN}"
    assert run.found["base-0"] == [given]
    shared = [f"{name}/clips/base/0.mp4" for name in ("planner", "robots")]
    shared += [f"{name}/rows-{row}.jsonl" for name in ("planner", "robots") for row in ("base", "true")]
    assert run.found["sft-0"] == sorted([given, *shared])
    own = [path.replace("base", "tuned") for path in shared if "base" in path]
    assert run.found["sft_residual-0"] == sorted([given, *shared, *own])
    (model / GIVEN).write_bytes(b"second")  # other actions for the same clips
    again = Fake()
    start(tmp_path, model, again, rows="sft", seeds="0")
    assert again.calls == [("data_pipeline.build", "robots_targets-0"), ("eval.run", "sft-0")]
    # The base's episodes were decoded by the first one, so they are not taken, nor are the row's own.
    assert not [path for path in again.found["sft-0"] if path.startswith("planner") and path != given]
    assert (tmp_path / "suite" / "sft-0" / "eval" / given).read_bytes() == b"second"


def test_a_search_measures_clips_of_sft_alone(tmp_path, model):
    run = Fake()
    assert start(tmp_path, model, run, rows="sft,sft_surprise", seeds="0") == 0
    assert [place for _, place in run.calls[-2:]] == ["sft-0", "sft_surprise-0"]
    searched = read(tmp_path)[1]["sft_surprise"]
    assert searched["success"] is None and searched["physical"]["mean"] == 0.75
    assert searched["against"]["row"] == "sft" and searched["against"]["physical"]["mean"] == 0.375
    assert searched["gain"]["physical"]["mean"] == 0.5 and searched["gain"]["success"] is None
    changed = Fake()
    start(tmp_path, model, changed, "--set", "optim.steps=7", rows="sft,sft_surprise", seeds="0")
    assert ("eval.run", "sft_surprise-0") in changed.calls  # of other weights


def test_a_benchmark_that_did_not_run_and_scores_that_are_all_missing_are_no_result(tmp_path, model, capsys):
    assert start(tmp_path, model, Fake(problem="base was not asked to the end"), rows="base", seeds="0") == 1
    assert "planner did not run to its end: base was not asked to the end" in capsys.readouterr().err
    path = tmp_path / "scores.jsonl"
    row = {"benchmark": "planner", "model": "base", "key": "push-0000", "values": {}, "error": "a crash"}
    path.write_text(json.dumps(row) + "\n", encoding="utf-8")
    with pytest.raises(ValueError, match="base has no success at all: a crash"):
        read_scores(path, ROBOTS, 2, ["planner"])


def test_when_the_minutes_are_over_the_rest_waits_for_the_next_command(tmp_path, model, monkeypatch, capsys):
    stopped = []

    class Slow(Fake):
        def __call__(self, module, arguments, log):
            if module == "train.sft":
                while not stopped:
                    time.sleep(0.01)
                raise StepFailed("stopped")
            super().__call__(module, arguments, log)

    monkeypatch.setattr(Processes, "stop", lambda self: stopped.append(True))
    monkeypatch.setattr(processes, "GRACE", 64.5)  # of 65 seconds
    run = Slow()
    assert start(tmp_path, model, run, "--minutes", str(65 / 60), seeds="0", rows="base,sft") == 75
    assert stopped and "not finished: run the same command again" in capsys.readouterr().out
    assert list(read(tmp_path)[1]) == ["base"]
    again = Fake()
    assert start(tmp_path, model, again, seeds="0", rows="base,sft") == 0
    assert [module for module, _ in again.calls] == ["data_pipeline.build", "train.sft", "eval.run"]
    with pytest.raises(ValueError, match="--minutes=1: give more than 1"):
        start(tmp_path, model, again, "--minutes", "1")


def test_what_cannot_be_run_is_refused_at_once(tmp_path, model):
    for more, message in (
        (["--set", "run.robots.clips=3"], "run.robots.clips is set for each run"),
        (["--set", "run.planner.episodes=3"], "run.planner.episodes is set for each run"),
        (["--episodes", "0"], "--episodes 0"),
    ):
        with pytest.raises(ValueError, match=message):
            start(tmp_path, model, lambda *_: pytest.fail("run"), *more)
    with pytest.raises(ValueError, match="backbone.path=.*is no folder.*eval/robots/README.md"):
        start(tmp_path, tmp_path / "none", lambda *_: pytest.fail("run"))


def planned(**changes):
    return Plan(Path("runs/suite"), (3,), suite="robots", clips=128, overrides=("backbone.path=runs/base",), **changes)


@pytest.mark.parametrize("on_gpu", [False, True])
def test_the_commands_accept_their_arguments(on_gpu, capsys):
    plan = planned(on_gpu=on_gpu)
    for name in ("robots_targets", "robots_everywhere"):
        module, arguments = plan.build_command(name, 3)
        made = recipes.load(build.Config, arguments)
        assert module == "data_pipeline.build" and made.targets.vjepa2.path == "runs/suite/world_model"
        assert made.pipeline.first_frame and made.pipeline.losers.count == 4
    for row in ROWS.values():
        config = recipes.load(eval_run.Config, plan.eval_arguments(row, 3))
        eval_run.check(config)
        assert config.benchmarks == (["robots"] if row.search else ["robots", "planner"])
        assert (config.run.robots.clips, config.run.robots.seed, config.run.planner.episodes) == (128, 3, 20)
        weights = {"base": ""}.get(row.name, f"runs/suite/{'sft' if row.search else row.name}-3/train")
        assert config.run.lora == weights and config.search.chosen_by == (row.search or "residual_per_motion")
        if row.trainer:
            config = recipes.load(TRAINERS[row.trainer], plan.train_arguments(row, 3))
            gdpo.check(config)
            assert config.train.groups == f"runs/suite/{row.groups}-3" and row.groups in GROUPS
            blocks = shape_of(Wan22TI2V.architectures[config.backbone.architecture]).layers
            assert -1 <= config.physics.block < blocks == 5 and SUITES["robots"](None).defaults["block"] == blocks // 2
    surprised = recipes.load(eval_run.Config, plan.eval_arguments(ROWS["sft_surprise"], 3)).search
    video = SOURCES["robots"].video
    assert surprised.surprise.path == "runs/suite/world_model" and surprised.surprise.window <= video.num_frames
    assert capsys.readouterr().err == ""  # no key that a command ignores


def test_what_determines_a_run_is_in_its_digests(model):
    plan = planned()
    settings = {name: plan.digests(row, 3)["settings"] for name, row in ROWS.items()}
    assert len(set(settings.values())) == len(ROWS)
    more = dataclasses.replace(plan, episodes=5).digests(ROWS["sft"], 3)
    assert more["settings"] != settings["sft"] and more["training"] == plan.digests(ROWS["sft"], 3)["training"]
    other = dataclasses.replace(plan, suite="physics", overrides=())  # which has no episodes
    row = SUITES["physics"](None).rows["sft"]
    assert other.digests(row, 3) == dataclasses.replace(other, episodes=5).digests(row, 3)
