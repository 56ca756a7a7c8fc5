"""The bill of a dry run: counted work, over measured rates."""

import json

import pytest

import recipes
from data_pipeline import benchmark, build
from data_pipeline.config import PipelineConfig
from train import cost, gdpo, sft
from train.backbones import find_architecture
from train.backbones.wan import WAN
from train.clips import VideoConfig

PAPER = ["recipe=wan14b", "pipeline.groups_planned=17295"]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # no recipe's output folder exists here


def job_of(*arguments):
    return recipes.load(cost.Job, list(arguments), partial=True)


def stages_of(*arguments, groups=0, **options):
    """The stages by name, at round rates: a sampling and a training operation take a second per 1e12."""
    job = job_of(*arguments)
    rates = cost.Rates("GPU", sampling=1.0, training=1.0, encode={"16": 10.0}, decode={"16": 5.0}, **options)
    supervised = job.pipeline.losers.count == 0
    made = cost.Bill(job, rates, find_architecture(job.backbone), supervised=supervised)
    return {stage.name: stage for stage in made.stages(groups)}


def test_operations_by_hand():
    """A network of one block: width 2, feed-forward 3; 2 tokens, text 1."""
    network = {
        "num_attention_heads": 1,
        "attention_head_dim": 2,
        "ffn_dim": 3,
        "num_layers": 1,
        "patch_size": (1, 1, 1),
    }
    architecture = {"kind": WAN, "transformer": network, "z_dim": 4, "vae_scale": 1, "vae_scale_temporal": 1}
    forward, backward = cost.operations(architecture, VideoConfig(height=1, width=2, num_frames=1), 1)
    matrix, attention = 2 * 2 * (6 * 4 + 2 * 2 * 3), 4 * 2 * 3 * 2
    assert forward == pytest.approx((matrix + 1.2 * attention) / 1e12)
    assert backward == pytest.approx((matrix + 1.3 * 2.5 * attention) / 1e12)


def test_the_papers_job_by_hand():
    """Wan 14B, 480x832x81: F = 783.2 + 1.2 * 892.9 = 1854.7 and B = 783.2 + 3.25 * 892.9 = 3685.1 (1e12)."""
    found = stages_of(*PAPER, "self_score.strength=0", "judge.name=vlm", "optim.steps=100", groups=10, targets=2.0)
    assert list(found) == ["losers", "judge", "targets", "encode", "training"]
    assert found["losers"].seconds == pytest.approx(10 * 30 * 1854.7, rel=1e-4)  # 15 guided steps
    pixels = 480 * 832 * 81 / 1e6
    assert found["judge"].seconds == pytest.approx(10 * pixels / 5) and found["targets"].seconds == 5
    assert found["encode"].seconds == pytest.approx(10 * pixels / 10)
    clip = 2 * 16 * 21 * 60 * 104  # bytes of latents
    assert found["losers"].disk == 10 * clip and found["encode"].disk == 10 * 3 * clip
    assert found["training"].seconds == pytest.approx(100 * 8 * 2 * (2 * 1854.7 + 3685.1), rel=1e-4)


def test_what_changes_training():
    def per_group(*arguments):
        return stages_of("recipe=wan14b", "optim.steps=1", "optim.batch_size=1", *arguments)["training"].seconds

    forward, backward = 1854.7, 3685.1
    pair = per_group("self_score.strength=0")
    assert per_group() == pytest.approx(pair + 2 * forward + backward, rel=1e-4)
    assert per_group("self_score.every=4") == pytest.approx(pair + (2 * forward + backward) / 4, rel=1e-4)
    eq6 = ("objective.loss=plackett_luce", "pipeline.losers.count=4", "self_score.strength=0")
    assert per_group(*eq6) == pytest.approx(2.5 * pair)
    generated = (*eq6, "objective.winner=generated", "physics.trajectory=0", "physics.relational=0")
    assert per_group(*generated) == pytest.approx(2 * pair)  # one of the four is the winner
    alone = ("pipeline.losers.count=0", "self_score.strength=0")
    assert per_group(*alone) == pytest.approx(forward + backward, rel=1e-4)
    full = (*alone, "train.parameters=full")
    assert per_group(*full) == pytest.approx(forward + backward + 783.2, rel=1e-4)
    judged = per_group(*full, "self_score.strength=1") - per_group(*full)
    assert judged == pytest.approx(2 * forward + backward, rel=1e-3)  # the judge's weights stay frozen


def test_what_changes_losers():
    def passes(*arguments):
        return stages_of("recipe=wan14b", *arguments, groups=1)["losers"].work.split()[3]

    assert passes() == "30" and passes("pipeline.losers.guidance=1") == "15"
    assert passes("objective.preset=paper") == "100"
    assert "losers" not in stages_of("recipe=wan14b", "pipeline.losers.count=0", groups=1)
    cached = stages_of("recipe=wan14b", "pipeline.losers.cache=0.1", groups=1)["losers"]
    assert cached.work == "1 clips of 30 passes, as if cache ended none early"


def test_an_image_that_begins_a_clip_is_encoded_as_one():
    alone, beside = (stages_of(f"recipe=wan22_a14b_{kind}", groups=3)["encode"] for kind in ("t2v", "i2v"))
    assert beside.seconds == 2 * alone.seconds and beside.work.startswith("3 clips and as many first frames; ")


def test_unknown_is_said_and_not_counted():
    found = stages_of("recipe=wan22_5b", groups=4)  # a VAE of 48 channels, which these rates do not have
    assert found["encode"].seconds is None and found["losers"].seconds > 0
    tiny = stages_of("recipe=sandbox", groups=4)  # of shipped rates a small network's hours do not follow
    assert tiny["losers"].seconds is None and tiny["training"].seconds is None
    assert stages_of("recipe=sandbox", groups=4, own=True)["losers"].seconds > 0


def test_defaults_are_the_commands_own():
    """`Job` repeats some keys of sections that are declared elsewhere."""
    own = gdpo.ObjectiveConfig()
    assert cost.Objective().loss == own.loss
    pipeline, planned = PipelineConfig(), cost.Pipeline()
    assert planned.losers == pipeline.losers and planned.first_frame == pipeline.first_frame
    assert vars(planned.resample) == {key: getattr(pipeline.resample, key) for key in vars(planned.resample)}


def test_both_dry_runs_print_the_same_bill(capsys):
    build.main([*PAPER, "--dry-run"])
    planned = capsys.readouterr().out
    gdpo.main([*PAPER, "--dry-run"])
    trained = capsys.readouterr()
    bill = planned[planned.index("the bill") :].splitlines()
    assert trained.out.endswith("\n".join(bill) + "\n") and "not read" not in trained.err
    assert (
        bill[0] == "the bill        hours of one NVIDIA H200 at the rates that the project measured (train/rates.json)"
    )
    assert [line.split()[0] for line in bill[1:]] == ["losers", "targets", "encode", "training", "in"]
    rates, _ = cost.read_rates("")
    hours = 17295 * 30 * 1854.7 / rates.sampling / 3600
    assert f"{hours:,.1f} h" in bill[1] and "73 GB  17,295 clips of 30 passes" in bill[1]
    assert "not known" in bill[2] and bill[-1].endswith("and what is not known")


def test_a_dry_run_without_groups_counts_training_alone(capsys):
    sft.main(["recipe=wan14b", "--dry-run"])
    *_, first, second = capsys.readouterr().out.splitlines()
    assert first.split()[0] == "training" and "winners alone" in first
    assert "pipeline.groups_planned=N" in second


def test_what_cannot_be_counted_is_said(capsys):
    gdpo.main([*PAPER, "pipeline.losers.stps=3", "objective.beta=3", "--dry-run"])
    assert capsys.readouterr().err == "warning: pipeline.losers.stps is not read by this command: ignored\n"
    for setting in ("pipeline.groups_planned=-5", "optim.steps=-1", "optim.batch_size=0", "self_score.every=0"):
        for main in (build.main, gdpo.main):
            with pytest.raises(ValueError, match=setting):
                main([*PAPER, setting, "--dry-run"])


def test_rates_of_the_jobs_own_folder_come_first(tmp_path):
    shipped, said = cost.read_rates(str(tmp_path))
    assert not shipped.own and "train/rates.json" in said
    cost.save_rates(str(tmp_path), "NVIDIA L40S", {"sampling": 100.0})
    cost.save_rates(str(tmp_path), "NVIDIA L40S", {"training": 90.0})
    own, said = cost.read_rates(str(tmp_path))
    assert own.own and (own.device, own.sampling, own.training) == ("NVIDIA L40S", 100.0, 90.0)
    assert own.encode == shipped.encode and said.endswith("encode, decode as on one NVIDIA H200")
    cost.save_rates(str(tmp_path), "NVIDIA H100", {"sampling": 300.0})  # another GPU's do not mix
    assert cost.read_rates(str(tmp_path))[0].training == shipped.training
    (tmp_path / "rates.json").write_text('{"device": 3}', encoding="utf-8")
    with pytest.raises(ValueError, match=r"rates.json is damaged \(device: .*\); delete it, or measure anew"):
        cost.read_rates(str(tmp_path))


def test_the_builds_benchmark_measures_every_part(tmp_path, capsys):
    small = ["video.height=32", "video.width=32", "video.num_frames=5", "sampler.steps=2", "pipeline.losers.count=1"]
    small = ["recipe=tiny", f"output={tmp_path}", *small, "pipeline.losers.cache=0.5"]
    results = benchmark.main([*small, "targets.tracks=lucas_kanade"])
    assert capsys.readouterr().out.startswith("cache: left out")  # random weights' would end other passes
    assert json.loads((tmp_path / "build_benchmark.json").read_text(encoding="utf-8")) == results
    parts = ("text", "encode", "loser", "decode", "targets")
    assert all(results[part]["seconds"] > 0 and results[part]["compiled_later"] == 0 for part in parts)
    loser = results["loser"]
    assert loser["passes"] == 4 and loser["pass_seconds"] == loser["seconds"] / 4 and loser["pass_limit"] > 0
    rates, _ = cost.read_rates(str(tmp_path))
    assert rates.device == "CPU" and rates.encode == {"16": 32 * 32 * 5 / 1e6 / results["encode"]["seconds"]}
    capsys.readouterr()
    with pytest.raises(ValueError, match="dry_run=true: this command measures"):
        benchmark.main([*small, "--dry-run"])
    gdpo.main([*small, "pipeline.groups_planned=36", "--dry-run"])
    assert f"{36 * loser['seconds'] / 3600:,.1f} h" in capsys.readouterr().out
