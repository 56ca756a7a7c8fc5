"""The ablation's table from results worked out by hand, and what is run, continued, repeated or reported."""

import dataclasses
import json
import time
from pathlib import Path

import pytest
import torch
from PIL import Image

import recipes
from data_pipeline import build
from eval import run as eval_run
from eval.experiments.ablation import corrupted
from eval.experiments.ablation import rows as ablation_rows
from eval.experiments.ablation import run as ablation
from eval.experiments.ablation.plan import READS, Plan, read_recipe
from eval.experiments.ablation.rows import CORRUPTED, DEFAULTS, GROUPS, METHODS, PAPER, SUITES, TABLE_3
from eval.experiments.ablation.runner import Processes, StepFailed, read_scores
from eval.experiments.ablation.suite import SANDBOX
from tests.synthetic_groups import write_synthetic_groups
from train import gdpo, sft
from train.backbones import load_backbone
from train.groups import GroupSet
from train.sampling import sampling_passes

CONFIGS = {
    "data_pipeline.build": build.Config,
    "train.gdpo": gdpo.Config,
    "train.sft": sft.Config,
    "eval.run": eval_run.Config,
}
ROWS = SUITES["preference"](lambda world: {"objective": {"beta": 50.0}}).rows
PHYSICS = SUITES["physics"](None).rows
LOSERS, TRANSFER = ablation_rows.loser_rows(None).rows, ablation_rows.transfer(None).rows
# Physical scores of two clips by model and seed.
PHYSICAL = {
    "base": {0: [0.0, 0.5], 1: [0.5, 0.5]},
    "sft": {0: [0.25, 0.5], 1: [0.5, 0.75]},
    "gdpo": {0: [0.5, 1.0], 1: [1.0, 1.0]},
}


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch):
    monkeypatch.chdir(Path(__file__).parents[2])  # the recipe names the shipped model by a relative path


@pytest.fixture(autouse=True)
def undrawn(request, monkeypatch):
    """Pictures take a second each: they are drawn where a test's name says so."""
    if "drawn" not in request.node.name and "draws" not in request.node.name:
        monkeypatch.setattr(ablation, "draw", lambda *_: None)


class Fake:
    """Stands in for the subprocesses: leaves what the commands leave, scores by the run's own row and seed."""

    def __init__(self, fail=()):
        self.calls, self.fail = [], fail

    def __call__(self, module, arguments, log):
        given = dict(pair.split("=", 1) for pair in arguments)
        place = Path(given["output"])
        self.calls.append((module, place.name))
        log.parent.mkdir(parents=True, exist_ok=True)
        if (module, place.name) in self.fail:
            raise StepFailed(f"{module} ended with status 1\n  its last words")
        if module == "data_pipeline.build":
            (place / "index.json").write_text(json.dumps({"losers": given["pipeline.losers.count"]}), encoding="utf-8")
        elif module == "eval.run":
            (place / "eval").mkdir(exist_ok=True)
            name, seed = place.name.rsplit("-", 1)
            models = {"base": "base"} | ({"tuned": name} if "run.lora" in given else {})
            lines = [
                {"model": model, "clip": clip, "values": {"physical": physical, "semantic": 1.0}, "error": ""}
                for model, row in [("true", "base"), *models.items()]
                for clip, physical in enumerate(PHYSICAL.get(row, PHYSICAL["gdpo"])[int(seed)])
            ]
            text = "".join(json.dumps(line) + "\n" for line in lines)
            (place / "eval" / "scores.jsonl").write_text(text, encoding="utf-8")
        else:
            assert (Path(given["train.groups"]) / "index.json").exists()
            exported = place / "train" / "lora" / "pytorch_lora_weights.safetensors"
            exported.parent.mkdir(parents=True)
            exported.write_text(" ".join(arguments), encoding="utf-8")


def start(folder, run, *more, rows="base,sft,gdpo", seeds="0,1"):
    return ablation.main(["--folder", str(folder), "--rows", rows, "--seeds", seeds, "--clips", "2", *more], run)


def read(folder):
    results = json.loads((folder / "ablation.json").read_text(encoding="utf-8"))
    return results, {row["name"]: row for row in results["rows"]}


# ---- the table -------------------------------------------------------------------------------------------------------


def test_the_table_worked_by_hand(tmp_path, capsys):
    assert start(tmp_path, Fake()) == 0
    results, rows = read(tmp_path)
    assert list(rows) == ["base", "sft", "gdpo"] and results["seeds"] == [0, 1]
    base, tuned = rows["base"], rows["gdpo"]
    assert base["physical"]["mean"] == 0.375 and base["gain"] == {"physical": None, "semantic": None}
    assert tuned["physical"]["mean"] == 0.875
    assert {seed: means["physical"] for seed, means in tuned["seeds"].items()} == {"0": 0.75, "1": 1.0}
    # Every clip gains 0.5, so any resample does.
    assert tuned["gain"]["physical"] == {"mean": 0.5, "low": 0.5, "high": 0.5}
    # Against LoRA-SFT 0.25, 0.5, 0.5, 0.25: a resample's mean is (4 + K) / 16 with K of 4 draws being 0.5, binomial,
    # and K = 0 and K = 4 have probability 1/16 each, more than 2.5%: the interval reaches both.
    assert tuned["against"]["physical"] == {"mean": 0.375, "low": 0.25, "high": 0.5}
    assert tuned["against"]["row"] == "sft" and rows["sft"]["against"]["physical"] is None
    assert base["against"]["physical"]["mean"] == -0.125
    printed = capsys.readouterr().out
    assert "+0.500 [+0.500, +0.500]  sft +0.375 [+0.250, +0.500]  2c 1.3B 0.1407, 2b 14B 0.1627" in printed
    assert all(label in printed for label in ("base model", "LoRA-SFT", "PhyGDPO (recipe)"))


def test_seeds_that_lack_a_row_are_not_paired(tmp_path):
    start(tmp_path, Fake(), seeds="0")
    start(tmp_path, Fake(), rows="gdpo")
    results, rows = read(tmp_path)
    assert set(rows["gdpo"]["seeds"]) == {"0", "1"} and set(rows["sft"]["seeds"]) == {"0"}
    assert rows["gdpo"]["against"]["physical"]["mean"] == 0.375  # 0.25 and 0.5, of seed 0 alone
    assert "LoRA-SFT (seeds 0)" in ablation.table(results)


def test_show_prints_and_draws_without_a_run(tmp_path, capsys):
    start(tmp_path, Fake(), rows="base,sft,gdpo,beta_x3,lam_0.9,lam_0.3", seeds="0")
    printed = capsys.readouterr().out
    (tmp_path / "kept").mkdir()
    (tmp_path / "ablation.json").rename(tmp_path / "kept" / "figures.json")
    assert ablation.main(["--show", str(tmp_path / "kept" / "figures.json")], lambda *_: pytest.fail("run")) == 0
    assert capsys.readouterr().out.splitlines()[:-2] == printed.splitlines()[:-2]  # all but where the files are
    with Image.open(tmp_path / "kept" / "figures.png") as image:
        assert image.width == 1800 and 600 < image.height < 2000


@pytest.mark.slow
def test_what_losers_cost_is_drawn_and_paired_with_sft(tmp_path, capsys):
    """`gdpo` is paired with LoRA-SFT, and the cheaper row with both."""
    assert start(tmp_path, Fake(), "--suite", "losers", rows="base,sft,gdpo,1x3") == 0
    _, rows = read(tmp_path)
    assert rows["1x3"]["passes"] == 3 and rows["base"]["against_sft"] is None
    assert rows["1x3"]["against"]["row"] == "gdpo" and rows["1x3"]["against"]["physical"]["mean"] == 0
    assert rows["1x3"]["against_sft"]["physical"]["mean"] == 0.375 == rows["gdpo"]["against_sft"]["physical"]["mean"]
    assert "against SFT" in capsys.readouterr().out.splitlines()[0] and rows["sft"]["against_sft"]["physical"] is None
    with Image.open(tmp_path / "ablation_passes.png") as image:
        assert image.size == (1800, 1000)


def test_scores_of_another_number_of_clips_are_refused(tmp_path):
    path = tmp_path / "scores.jsonl"
    row = {"model": "base", "clip": 0, "values": {"physical": 1.0, "semantic": 1.0}, "error": ""}
    path.write_text(json.dumps(row) + "\n", encoding="utf-8")
    assert read_scores(path, SANDBOX, 1, ["sandbox"]) == {"base": {"physical": [1.0], "semantic": [1.0]}}
    with pytest.raises(ValueError, match="does not hold 2 clips"):
        read_scores(path, SANDBOX, 2, ["sandbox"])
    path.write_text(json.dumps({**row, "clip": 1}) + "\n", encoding="utf-8")
    with pytest.raises(ValueError, match="out of order"):
        read_scores(path, SANDBOX, 1, ["sandbox"])


# ---- running, continuing, failing ------------------------------------------------------------------------------------


def test_groups_are_built_once_a_seed_and_the_base_is_not_trained(tmp_path):
    run = Fake()
    start(tmp_path, run, "--jobs", "3", rows="base,sft,gdpo,flow_dpo", seeds="0")
    assert sorted(run.calls) == [
        ("data_pipeline.build", "groups-0"),
        ("data_pipeline.build", "pairs-0"),
        ("eval.run", "base-0"),
        ("eval.run", "flow_dpo-0"),
        ("eval.run", "gdpo-0"),
        ("eval.run", "sft-0"),
        ("train.gdpo", "flow_dpo-0"),
        ("train.gdpo", "gdpo-0"),
        ("train.sft", "sft-0"),
    ]
    weights = tmp_path / "flow_dpo-0" / "train" / "lora" / "pytorch_lora_weights.safetensors"
    assert f"train.groups={tmp_path / 'pairs-0'}" in weights.read_text(encoding="utf-8")


def test_finished_runs_are_not_repeated_and_changed_ones_start_anew(tmp_path):
    start(tmp_path, Fake(), seeds="0")
    before = read(tmp_path)
    again = Fake()
    assert start(tmp_path, again, seeds="0") == 0 and again.calls == []
    assert read(tmp_path) == before
    changed = Fake()
    start(tmp_path, changed, "--set", "optim.steps=7", rows="base,gdpo", seeds="0")
    assert ("eval.run", "base-0") not in changed.calls  # reads no optim section
    assert ("train.gdpo", "gdpo-0") in changed.calls
    (kept,) = (tmp_path / "replaced").iterdir()
    assert kept.name.startswith("gdpo-0-") and (kept / "result.json").exists()
    assert list(read(tmp_path)[1]) == ["base", "gdpo"]  # sft's result is of other settings


@pytest.mark.slow
def test_other_groups_mean_another_run(tmp_path):
    start(tmp_path, Fake(), rows="gdpo", seeds="0")
    (tmp_path / "groups-0" / "index.json").write_text("{}", encoding="utf-8")
    run = Fake()
    start(tmp_path, run, rows="gdpo", seeds="0")
    # The build restored the same groups: what was trained on them is kept and only evaluated again.
    assert run.calls == [("data_pipeline.build", "groups-0"), ("eval.run", "gdpo-0")]

    class Other(Fake):
        def __call__(self, module, arguments, log):
            super().__call__(module, arguments, log)
            if module == "data_pipeline.build":
                (log.parent / "index.json").write_text("{}", encoding="utf-8")

    (tmp_path / "groups-0" / "index.json").write_text("{}", encoding="utf-8")
    other = Other()
    start(tmp_path, other, rows="gdpo", seeds="0")
    assert ("train.gdpo", "gdpo-0") in other.calls and len(list((tmp_path / "replaced").iterdir())) == 1


def test_another_number_of_clips_only_evaluates_anew(tmp_path, capsys):
    start(tmp_path, Fake(), rows="gdpo", seeds="0")
    run = Fake()
    assert start(tmp_path, run, "--clips", "3", rows="gdpo", seeds="0") == 1  # the stand-in has two clips
    assert run.calls == [("data_pipeline.build", "groups-0"), ("eval.run", "gdpo-0")]
    assert "does not hold 3 clips" in capsys.readouterr().err


def test_a_failing_run_is_reported_and_the_others_finish(tmp_path, capsys):
    run = Fake(fail={("train.sft", "sft-0"), ("data_pipeline.build", "pairs-0")})
    assert start(tmp_path, run, rows="base,sft,gdpo,flow_dpo", seeds="0") == 1
    assert list(read(tmp_path)[1]) == ["base", "gdpo"]
    captured = capsys.readouterr()
    assert "its last words" in captured.out + captured.err
    for line in (
        "FAILED   sft-0: train.sft ended with status 1",
        "FAILED   pairs-0: ",
        "FAILED   flow_dpo-0: what it needs failed",
    ):
        assert line in captured.err
    continued = Fake()
    assert start(tmp_path, continued, rows="base,sft,gdpo,flow_dpo", seeds="0") == 0
    assert {place for _, place in continued.calls} == {"groups-0", "sft-0", "pairs-0", "flow_dpo-0"}


def test_a_failed_evaluation_does_not_train_again(tmp_path):
    assert start(tmp_path, Fake(fail={("eval.run", "sft-0")}), rows="sft", seeds="0") == 1
    run = Fake()
    assert start(tmp_path, run, rows="sft", seeds="0") == 0
    assert run.calls == [("data_pipeline.build", "groups-0"), ("eval.run", "sft-0")]
    result = json.loads((tmp_path / "sft-0" / "result.json").read_text(encoding="utf-8"))
    assert set(result["seconds"]) == {"train", "evaluate"}


def test_a_trainer_that_was_asked_to_stop_is_not_evaluated(tmp_path, capsys):
    class Stopped(Fake):
        def __call__(self, module, arguments, log):
            if module == "train.sft":  # ends with status 0 and without weights
                log.parent.mkdir(parents=True, exist_ok=True)
            else:
                super().__call__(module, arguments, log)

    run = Stopped()
    assert start(tmp_path, run, rows="sft", seeds="0") == 1
    assert run.calls == [("data_pipeline.build", "groups-0")]
    assert "stopped before its last step" in capsys.readouterr().err


def test_rows_that_start_from_another_wait_for_it(tmp_path):
    run = Fake()
    assert start(tmp_path, run, "--suite", "starts", rows="base,sft_start,sft_merged,sft_half", seeds="0") == 0
    order = [name for module, name in run.calls if module.startswith("train")]
    assert order[0] == "sft_half-0" and set(order[1:]) == {"sft_start-0", "sft_merged-0"}
    plan, rows = Plan(tmp_path, (0,), suite="starts"), ablation_rows.starts(None).rows
    folder = tmp_path / "sft_half-0" / "train"
    assert f"lora.start={folder}" in plan.train_arguments(rows["sft_start"], 0)
    merged = f"backbone.loras=[{{path: '{folder}'}}]"
    assert merged in plan.train_arguments(rows["sft_merged"], 0) and merged in plan.eval_arguments(
        rows["sft_merged"], 0
    )
    config = recipes.load(gdpo.Config, plan.train_arguments(rows["sft_merged"], 0))
    assert [lora.path for lora in config.backbone.loras] == [str(folder)]
    other = Plan(tmp_path, (0,), suite="starts", overrides=("optim.lr=1",))
    assert other.digests(rows["sft_start"], 0)["training"] != plan.digests(rows["sft_start"], 0)["training"]
    failing = Fake(fail={("train.sft", "sft_half-0")})
    assert start(tmp_path / "other", failing, "--suite", "starts", rows="sft_half,sft_start", seeds="0") == 1
    assert [name for module, name in failing.calls if module.startswith("train")] == ["sft_half-0"]


@pytest.mark.slow
def test_the_base_models_clips_are_sampled_once_a_seed(tmp_path):
    class Sampling(Fake):
        found: dict[str, bool] = {}

        def __call__(self, module, arguments, log):
            super().__call__(module, arguments, log)
            if module == "eval.run":
                clip = log.parent / "eval" / "sandbox" / "clips" / "base" / "0-0.mp4"
                self.found = self.found | {log.parent.name: clip.exists()}
                if log.parent.name == "base-0":
                    time.sleep(0.3)  # the others are trained by then
                clip.parent.mkdir(parents=True, exist_ok=True)
                clip.touch()

    later, together = Sampling(), Sampling()
    start(tmp_path / "later", later, rows="base", seeds="0")
    start(tmp_path / "later", later, rows="gdpo", seeds="0")
    start(tmp_path / "together", together, "--jobs", "4", seeds="0")
    assert later.found == {"base-0": False, "gdpo-0": True}
    assert together.found == {"base-0": False, "sft-0": True, "gdpo-0": True}


def test_processes_report_the_tail_of_the_log_and_can_be_stopped(tmp_path):
    processes = Processes(jobs=1)
    with pytest.raises(StepFailed, match="status 1.*No module named"):
        try:
            processes.run("no_such_module_here", ["key=value"], tmp_path / "log.txt")
        except StepFailed as error:
            raise StepFailed(str(error).replace("\n", " ")) from error
    assert "$ python -m no_such_module_here key=value" in (tmp_path / "log.txt").read_text(encoding="utf-8")
    processes.stop()
    with pytest.raises(StepFailed, match="stopped"):
        processes.run("json.tool", [], tmp_path / "log.txt")


# ---- the rows --------------------------------------------------------------------------------------------------------


def test_the_table_of_sections_is_that_of_the_commands():
    for module, sections in READS.items():
        names = {field.name for field in dataclasses.fields(CONFIGS[module])}
        others = {"recipe", "output", "seed", "dry_run", "ranks", "benchmarks", "list"}
        if module == "eval.run":
            others |= {"search", "judge", "vlm", "raters"}  # which measure nothing here
        assert names - others == set(sections)


def planned(**changes):
    return Plan(Path("runs/ablation"), (3,), overrides=("optim.steps=5", "sampler.steps=4"), **changes)


@pytest.mark.parametrize("on_gpu", [False, True])
def test_builds_and_evaluations_accept_their_arguments(on_gpu, capsys):
    plan = planned(on_gpu=on_gpu)
    for name in GROUPS:
        module, arguments = plan.build_command(name, 3)
        if name == CORRUPTED:
            assert arguments == ["runs/ablation/groups-3", "runs/ablation/losers_corrupted-3", "3"]
            continue
        made = recipes.load(build.Config, arguments)
        assert module == "data_pipeline.build"
        assert made.pipeline.groups == f"runs/ablation/{name}-3" and made.seed == 3 and made.sampler.steps == 4
    for name in ("base", "gdpo"):  # without training and with it
        measured = recipes.load(eval_run.Config, plan.eval_arguments(ROWS[name], 3))
        assert (measured.run.sandbox.seed, measured.run.sandbox.clips) == (3, 512)
        assert measured.run.folder == f"runs/ablation/{name}-3/eval"
    assert capsys.readouterr().err == ""  # no key that a command ignores


@pytest.mark.slow
def test_rows_differ_in_training_alone():
    """So that the builds and evaluations above stand for those of every row."""
    for row in (*ROWS.values(), *PHYSICS.values(), *LOSERS.values(), *TRANSFER.values()):
        like = ROWS["gdpo"] if row.trainer else ROWS["base"]
        own, others = (planned().eval_arguments(one, 3) for one in (row, like))
        assert [argument.replace(f"/{row.name}-3", f"/{like.name}-3") for argument in own] == others
        assert row.groups in GROUPS


@pytest.mark.slow
def test_every_trainer_accepts_its_arguments(capsys):
    for row in [row for suite in (ROWS, PHYSICS, LOSERS, TRANSFER) for row in suite.values() if row.trainer]:
        arguments = planned().train_arguments(row, 3)
        assert arguments == planned(on_gpu=True).train_arguments(row, 3), row
        config = recipes.load(CONFIGS[row.trainer], arguments)
        gdpo.check(config)
        own = dict(pair.split("=") for pair in row.overrides)
        steps = int(own.get("optim.steps", 5))
        assert config.train.folder == f"runs/ablation/{row.name}-3/train" and config.optim.steps == steps, row
        assert config.train.groups == f"runs/ablation/{row.groups}-3" and config.seed == 3, row
        assert config.optim.lr_end <= config.optim.lr, row
        if row.sweep:
            section = config.objective if row.name in ROWS else config.physics
            assert getattr(section, row.sweep[0]) == pytest.approx(row.sweep[1], rel=1e-4), row
        assert capsys.readouterr().err == "", row  # no key that a command ignores


def test_sweeps_stand_around_the_recipes_values():
    assert [ROWS[name].sweep[1] for name in ROWS if name.startswith("beta")] == pytest.approx([5, 50 / 3, 150, 500])
    objective = gdpo.ObjectiveConfig()
    assert DEFAULTS == {key: getattr(objective, key) for key in DEFAULTS}
    assert set(DEFAULTS) == {"beta", *ablation_rows.SWEEPS}


def test_the_papers_figures():
    for key, figures in TABLE_3.items():  # each has its best at the value that the paper settles on
        assert max(figures, key=figures.get) == DEFAULTS[key] and max(figures.values()) == 0.1627
    assert PAPER["2b"][1]["+ Physics Rewarding"] == 0.1627
    assert PAPER["2c"][1]["PhyGDPO"] == PAPER["2d"][1]["with LoRA-SR"]
    overall = {row.name: [figure["overall"] for figure in ablation.paper_figures(row)] for row in ROWS.values()}
    assert overall["base"] == [0.1232, 0.1288] and overall["sft"] == [0.1283] and overall["full_copy"] == [0.1373]
    assert overall["lam_0.3"] == [0.1592] and overall["lam_0.9"] == []


def test_the_precision_rows_differ_in_precision_alone():
    rows = ablation_rows.precision(None).rows
    names = ("gdpo", "gdpo_bf16", "gdpo_float8", "gdpo_stored_float8")
    plain, fused, eight, stored = (set(rows[name].overrides) for name in names)
    assert plain == set() and eight - fused == {"train.float8=true"} and fused < eight
    assert stored ^ fused == {"backbone.dtype=float8", "backbone.dtype=bfloat16"}
    assert {row.against for row in rows.values()} <= set(rows)


def test_the_timestep_rows_differ_in_where_t_is_drawn_and_one_is_the_recipe():
    suite, objective = (
        ablation_rows.timesteps(None),
        dataclasses.asdict(gdpo.ObjectiveConfig()) | read_recipe((), SANDBOX)["objective"],
    )
    drawn = {name: dict(pair.split("=") for pair in row.overrides) for name, row in suite.rows.items() if row.trainer}
    assert {tuple(pairs) for pairs in drawn.values()} == {("objective.timesteps", "objective.timestep_shift")}
    kind, shift = drawn[suite.middle].values()
    assert (kind, float(shift)) == (objective["timesteps"], objective["timestep_shift"])


def test_the_physics_rows_differ_in_their_terms_alone():
    def weights(name):
        return dict(pair.split("=") for pair in PHYSICS[name].overrides)

    both = {"physics.trajectory": "10", "physics.relational": "1"}
    own = {"self_score.strength": "10"} | dict(pair.split("=") for pair in ablation_rows.ASKED)
    assert weights("sft_both") == both and weights("sft_self") == own and weights("sft_all") == both | own
    assert weights("sft") == weights("gdpo") == {}
    all_three = {"physics.trajectory": "2.5", "physics.relational": "0.25", "self_score.strength": "30"}
    assert weights("gdpo_all") == own | all_three
    assert PHYSICS["gdpo_all"].against == "gdpo" and PHYSICS["sft_both"].against == "sft"
    trained = [row for row in PHYSICS.values() if row.trainer]
    assert {row.groups for row in trained} == {"targets", "everywhere"}  # all rows train on the same clips
    different = set(GROUPS["everywhere"]) ^ set(GROUPS["targets"])
    assert different == {"targets.rule=all"}


def test_what_determines_a_run_is_in_its_digests():
    plan, row = Plan(Path("runs/ablation"), (0,)), ROWS["gdpo"]
    digests = {plan.digests(row, 0)["settings"] for row in ROWS.values()} | {plan.digests(row, 1)["settings"]}
    assert len(digests) == len(ROWS) + 1
    own, base = plan.digests(row, 0), plan.digests(METHODS[0], 0)

    def changed(row, **change):
        return dataclasses.replace(plan, **change).digests(row, 0)

    assert changed(row, on_gpu=True) == own == changed(row, folder=Path("elsewhere"))
    for change in ({"model": "another"}, {"overrides": ("lora.rank=3",)}, {"overrides": ("sampler.steps=3",)}):
        other = changed(row, **change)
        assert other["training"] != own["training"] and other["settings"] not in digests
    assert changed(METHODS[0], overrides=("lora.rank=3",)) == base
    more = changed(row, clips=5)
    assert more["settings"] not in digests and more["training"] == own["training"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--set", "seed=3"], "seed is set for each run"),
        (["--set", "run.sandbox.clips=3"], "--clips"),
        (["--set", "optim.steps"], "no key=value"),
        (["--set", "objectve.beta=3"], "no command reads it"),
        (["--rows", "gpdo"], "--rows gpdo: not known"),
        (["--jobs", "0"], "--jobs 0"),
    ],
)
def test_what_cannot_be_run_is_refused_at_once(tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        ablation.main(["--folder", str(tmp_path / "new"), *arguments], lambda *_: pytest.fail("run"))
    assert not (tmp_path / "new").exists()


def test_a_folder_or_a_file_is_needed():
    with pytest.raises(ValueError, match="--folder"):
        ablation.main([])


def test_passes_are_those_of_the_losers():
    """Count times steps, twice where guidance is applied: at t = 1, .857 and .6, of which two are above 0.8. What a
    cache leaves of them depends on the weights."""
    base = read_recipe((), SANDBOX)["sampler"]
    for row in (row for row in LOSERS.values() if row.groups != CORRUPTED and row.passes):
        arguments = Plan(Path("a"), (0,)).build_command(row.groups, 0)[1]
        config = recipes.load(build.Config, arguments)
        sampler = config.pipeline.losers.sampler(config.sampler)
        backbone = load_backbone(config.backbone, "cpu", parts=())
        losers = config.pipeline.losers
        passes = losers.count * sampling_passes(backbone, sampler, start=losers.start_time)
        assert row.passes < passes if sampler.cache else row.passes == passes, row.name
    assert base["steps"] == 10


def test_corrupted_losers_are_the_winners_frames_in_another_order(tmp_path):
    write_synthetic_groups(tmp_path / "groups", num_groups=3, num_losers=2, latent_shape=(4, 5, 2, 2))
    corrupted.main([str(tmp_path / "groups"), str(tmp_path / "made"), "0"])
    before, after = GroupSet(tmp_path / "groups"), GroupSet(tmp_path / "made")
    assert len(after) == 3 and after.fingerprint == before.fingerprint
    for index in range(3):
        one, other = before[index], after[index]
        assert torch.equal(one.winner, other.winner) and one.key == other.key
        for loser in other.losers:
            assert torch.equal(loser[:, 0], one.winner[:, 0]) and not torch.equal(loser, one.winner)
            order = [int((one.winner == loser[:, [f]]).all(dim=(0, 2, 3)).nonzero()) for f in range(5)]
            assert sorted(order) == [0, 1, 2, 3, 4]


def test_a_row_without_the_one_that_it_starts_from_is_refused(tmp_path):
    own = ["--folder", str(tmp_path), "--suite", "starts", "--seeds", "0"]
    with pytest.raises(ValueError, match="--rows sft_start needs sft_half, unfinished for seed 0: name it as well"):
        ablation.main([*own, "--rows", "base,sft_start"])
