"""What a user can get wrong, and what goes wrong in a run: a clear error, and nothing lost. And validation clips."""

import json
import math
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

import train.parallel
import train.validation
from tests.synthetic_groups import write_synthetic_groups
from train import checkpoint, files, gdpo, loop, sft
from train.backbones.loading import fingerprint
from train.backbones.tiny import write_tiny_pipeline
from train.data import Prepared
from train.loop import accumulation_steps

LATENT_SHAPE, TEXT_SHAPE = (16, 5, 8, 8), (12, 64)
PROMPT = "validation.prompts=[a red ball falls,a box slides down a ramp]"


def files_of(folder):
    """But the lock's, which names the last process."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != files.LOCK}


@pytest.fixture
def trained(tiny, tmp_path):
    """A run of two steps, finished."""
    tiny.train(tmp_path, "optim.steps=2", "train.checkpoint_every=1")
    return tmp_path


# ---- settings --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("objective.loss=pl", "objective.loss='pl': must be one of bound, plackett_luce"),
        ("objective.winner=best", "objective.winner='best': must be one of real, generated"),
        ("objective.noise=none", "objective.noise='none': must be one of shared, independent"),
        ("objective.timesteps=normal", "objective.timesteps='normal': must be one of uniform, logit_normal"),
        ("objective.preset=relased", "objective.preset='relased' is not known.*released"),
        ("objective.beta=0", "objective.beta=0.0: must be positive"),
        ("objective.beta=nan", "objective.beta=nan: must be positive"),
        ("objective.alpha_min=1.5", r"objective.alpha_min=1.5: must lie in \(0, 1\]"),
        ("objective.t_min=0.9 objective.t_max=0.2", "objective.t_min=0.9, t_max=0.2"),
        ("objective.timestep_shift=0", "objective.timestep_shift=0.0: must be positive"),
        ("objective.betta=3", "unknown key objective.betta; did you mean 'beta'"),
        ("train.trackers=[wanbd]", "train.trackers: 'wanbd' is no tracker; did you mean 'wandb'"),
        ("optim.schedule=linear", "optim.schedule='linear': must be cosine or constant"),
        ("lora.rank=0", "lora.rank is 0"),
        ("lora.targets=[attn1.to_x]", "lora.targets: 'attn1.to_x' matches no linear layer; did you mean 'attn1.to_"),
        ("train.checkpoint_every=0", "train.checkpoint_every=0: must be at least 1"),
        ("validation.every=0", "validation.every=0: must be at least 1"),
        (
            "backbone.family=wan22_i2v validation.prompts=[a,b]",
            "validation.prompts=.*picture for each in validation.im",
        ),
        ("validation.prompts=[a,b] validation.images=[a.png]", "validation.images names 1 files for 2 prompts"),
        ("validation.prompts=[a] validation.images=[a.png]", "generates from text alone; leave the key out"),
        ("train.keep_checkpoints=0", "train.keep_checkpoints=0: must be at least 1"),
        ("backbone.text_length=8", "text embedding of 12 tokens does not fit into 8; raise backbone.text_length"),
        ("video.height=60", "height=60 is no multiple of 16.*use 64"),
        ("backbone.path=/nowhere/at/all", "backbone.path='/nowhere/at/all' is no folder"),
    ],
)
def test_a_setting_that_cannot_work(tiny, tmp_path, setting, said):
    with pytest.raises(ValueError, match=said):
        tiny.train(tmp_path, "optim.steps=1", *setting.split())
    assert not (tmp_path / "train" / "checkpoints").exists()


@pytest.mark.parametrize(
    ("batch", "ranks", "pairs", "said"), [(8, 3, 1, "6 or .*9"), (8, 3, 4, "12"), (6, 2, 2, "4 or .*8")]
)
def test_a_batch_that_does_not_divide_over_the_ranks(tiny, tmp_path, batch, ranks, pairs, said):
    config = tiny.config(tmp_path, f"optim.batch_size={batch}", f"train.pairs_per_pass={pairs}")
    expected = (
        f"optim.batch_size={batch} does not divide over {ranks} ranks x train.pairs_per_pass={pairs}: use .*{said}"
    )
    with pytest.raises(ValueError, match=expected):
        accumulation_steps(config, ranks)
    assert accumulation_steps(replace(config, optim=replace(config.optim, batch_size=ranks * pairs * 5)), ranks) == 5


def test_dry_run_prints_and_writes_nothing(tiny, tmp_path, capsys):
    for entry in (gdpo, sft):
        tiny.train(tmp_path / "run", "--dry-run", entry=entry)
        printed = capsys.readouterr().out
        for name in ("backbone", "adapters", "memory", "steps", "groups"):
            assert name in printed
    assert not (tmp_path / "run").exists()
    with pytest.raises(ValueError, match="optim.batch_size=3 does not divide"):
        tiny.train(tmp_path / "run", "--dry-run", "optim.batch_size=3", "train.pairs_per_pass=2")


def test_full_parameters_do_not_train_sharded(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(train.parallel, "sharding", lambda accelerator: object())
    with pytest.raises(ValueError, match="train.parameters=full cannot train under ZeRO-3.*launch/ddp.yaml"):
        tiny.train(tmp_path, "train.parameters=full", "optim.steps=1", entry=sft)


# ---- groups ----------------------------------------------------------------------------------------------------------


def write_groups(folder, **changes):
    options = {"num_groups": 4, "num_losers": 2, "latent_shape": LATENT_SHAPE, "text_shape": TEXT_SHAPE, **changes}
    write_synthetic_groups(folder, **options)
    return f"train.groups={folder}"


def test_groups_of_another_backbone(tiny, tmp_path):
    groups = write_groups(tmp_path / "groups", fingerprint="wan21-000000000000")
    with pytest.raises(ValueError, match=f"wan21-000000000000.*{tiny.fingerprint}"):
        tiny.train(tmp_path, groups, "optim.steps=1")


def test_groups_of_another_size(tiny, tmp_path):
    groups = write_groups(tmp_path / "groups", fingerprint=tiny.fingerprint, latent_shape=(16, 3, 8, 12))
    said = r"hold latents of shape \(16, 3, 8, 12\), the recipe's video.*gives \(16, 5, 8, 8\): set video.height"
    with pytest.raises(ValueError, match=said):
        tiny.train(tmp_path, groups, "optim.steps=1")


def test_no_groups(tiny, tmp_path):
    with pytest.raises(ValueError, match=re.escape(str(tmp_path / "empty"))):
        tiny.train(tmp_path, f"train.groups={tmp_path / 'empty'}", "optim.steps=1")


def test_groups_without_losers(tiny, tmp_path):
    groups = write_groups(tmp_path / "groups", fingerprint=tiny.fingerprint, num_losers=[1, 0, 2, 2])
    with pytest.raises(ValueError, match="has groups without losers.*train/sft.py.*pipeline.losers.count"):
        tiny.train(tmp_path, groups, "optim.steps=1")


def test_groups_of_unequal_size_suit_the_bound_alone(tiny, tmp_path):
    groups = write_groups(tmp_path / "groups", fingerprint=tiny.fingerprint, num_losers=[1, 3, 2, 2])
    with pytest.raises(ValueError, match="plackett_luce needs equally many losers.*1 to 3.*objective.loss=bound"):
        tiny.train(tmp_path, groups, "objective.loss=plackett_luce", "optim.steps=1")
    with pytest.raises(ValueError, match="winner 'generated' needs at least 2 losers.*group-000000"):
        tiny.train(tmp_path, groups, "objective.winner=generated", "optim.steps=1")
    tiny.train(tmp_path, groups, "optim.steps=1")


@pytest.mark.parametrize("workers", [0, 1])
def test_a_byte_that_flips_in_a_shard(tiny, tmp_path, monkeypatch, workers):
    """Found by its checksum when the sample is read; the checkpoints stay, and with the byte restored it goes on."""
    groups = write_groups(tmp_path / "groups", fingerprint=tiny.fingerprint, samples_per_shard=4)
    shard = tmp_path / "groups" / "shard-00000.tar"
    run = (groups, "optim.steps=30", "train.checkpoint_every=100", f"train.num_workers={workers}")
    whole, step = shard.read_bytes(), gdpo.step
    calls = 0

    def flip_later(*args):
        nonlocal calls
        calls += 1
        if calls == 4:
            data = bytearray(whole)
            for sample in json.loads((tmp_path / "groups" / "index.json").read_text(encoding="utf-8"))["shards"][0][
                "samples"
            ]:
                data[sample["offset"] + sample["bytes"] // 2] ^= 1
            shard.write_bytes(data)
        return step(*args)

    monkeypatch.setattr(gdpo, "step", flip_later)
    with pytest.raises(ValueError, match=r"^\S*shard-00000.tar is damaged: group 'group-0000.*run the build again$"):
        tiny.train(tmp_path, *run)  # one line, from a loader's process too
    reached = len(tiny.metrics(tmp_path))
    assert 2 <= reached < 30
    assert checkpoint.latest(tmp_path / "train" / "checkpoints").name == f"step_{reached:08d}"
    shard.write_bytes(whole)
    tiny.train(tmp_path, *run[:-1], f"optim.steps={reached + 1}")
    assert len(tiny.metrics(tmp_path)) == reached + 1


# ---- numbers that are not finite -------------------------------------------------------------------------------------


def spoil(monkeypatch, where):
    """Where `where(call)` holds, make the step return a NaN loss (even calls) or an infinite gradient (odd calls)."""
    step, calls = gdpo.step, iter(range(10_000))

    def spoiled(*args):
        gradients, metrics = step(*args)
        call = next(calls)
        if where(call) and call % 2 == 0:
            metrics["loss"] = torch.tensor(math.nan)
        elif where(call):
            gradients[3].view(-1)[5] = math.inf
        return gradients, metrics

    monkeypatch.setattr(gdpo, "step", spoiled)


def test_what_is_wrong_with_a_group_is_handed_on_and_a_fault_in_the_code_is_not():
    def prepare(_, sample):
        return files.parse_json(sample, dict, name="group", remedy="build it") or int("x")

    stream = [b"no JSON", b"{}"]
    found = Prepared(None, stream, prepare)[0]
    assert isinstance(found, ValueError) and str(found).startswith("group is damaged")
    with pytest.raises(ValueError, match="invalid literal"):
        Prepared(None, stream, prepare)[1]


def test_a_step_that_is_not_finite_is_skipped_and_its_groups_named(tiny, tmp_path, monkeypatch, capsys):
    """By the keys of the groups that it read."""
    prepare, read = gdpo.prepare, []

    def noted(config, sample):
        read.append(sample.group.key)
        return prepare(config, sample)

    monkeypatch.setattr(gdpo, "prepare", noted)
    spoil(monkeypatch, lambda call: call in (4, 5, 10))  # two groups a step
    tiny.train(tmp_path, "optim.steps=6", "optim.batch_size=2")
    named = [line for line in capsys.readouterr().out.splitlines() if "not finite" in line]
    reason = "is skipped, its loss or gradient is not finite; its groups:"
    assert named == [f"step {step} {reason} {read[2 * step]}, {read[2 * step + 1]}" for step in (2, 5)]


def test_a_batch_larger_than_the_groups_is_said_once(tiny, tmp_path, capsys):
    groups = write_groups(tmp_path / "groups", fingerprint=tiny.fingerprint, num_groups=1)
    tiny.train(tmp_path, groups, "optim.steps=2", "optim.batch_size=2")
    assert capsys.readouterr().out.count("optim.batch_size=2 is more than the 1 groups there are") == 1


def test_a_step_that_is_not_finite_is_skipped_and_counted(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "MAX_NONFINITE", 2)
    spoil(monkeypatch, lambda call: call in (2, 3, 5))
    run = (
        "optim.steps=8",
        "optim.batch_size=1",
        "train.checkpoint_every=1",
        "train.keep_checkpoints=9",
    )
    checkpoints = tiny.train(tmp_path, *run)
    metrics = tiny.metrics(tmp_path)
    assert [line["skipped"] for line in metrics] == [0, 0, 1, 2, 2, 3, 3, 3]
    assert [line["loss"] is None for line in metrics] == [call == 2 for call in range(8)]
    assert metrics[3]["grad_norm"] is None and metrics[5]["grad_norm"] is None
    saved = [tiny.weights(checkpoints / f"step_{step:08d}") for step in range(1, 9)]
    for number in range(1, 8):  # weights and moments after step `number` against those before it
        same = all(torch.equal(saved[number][name], saved[number - 1][name]) for name in saved[0])
        assert same == (number in (2, 3, 5))
    state = json.loads((checkpoints / "step_00000008" / checkpoint.STATE_FILE).read_text(encoding="utf-8"))
    assert state["skipped"] == 3 and state["samples_seen"] == 8  # a skipped group is not met again at once
    assert all(torch.isfinite(tensor).all() for tensor in saved[-1].values())


def test_too_many_in_a_row_stop_the_run(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "MAX_NONFINITE", 2)
    run = ("optim.steps=9", "optim.batch_size=1", "train.checkpoint_every=2")
    with monkeypatch.context() as patch:
        spoil(patch, lambda call: call >= 3)
        with pytest.raises(ValueError) as caught:
            tiny.train(tmp_path, *run)
    message, checkpoints = str(caught.value), tmp_path / "train" / "checkpoints"
    newest = checkpoint.latest(checkpoints)
    assert "not finite for 3 steps in a row, last at step 5" in message
    assert str(newest) in message and "optim.lr" in message and "objective.beta" in message
    assert all(torch.isfinite(tensor).all() for tensor in tiny.weights(newest).values())
    tiny.train(tmp_path, *run)  # what was wrong has been put right: it goes on
    assert [line["step"] for line in tiny.metrics(tmp_path)] == list(range(9))


# ---- resuming something else -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("seed=1", "trained with seed=0, the recipe says seed=1"),
        ("train.parameters=full", "holds lora.safetensors.*this recipe trains transformer.safetensors: restore"),
        ("lora.rank=4", "has rank 8, the recipe says lora.rank=4.*Set lora.rank=8"),
        ("lora.alpha=16", "has alpha 8.0, the recipe says lora.alpha=16.0.*Set lora.alpha=8"),
        ("lora.targets=[attn2.to_q]", "adapters for other layers.*lora.targets"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused(tiny, trained, setting, said):
    before = files_of(trained)
    with pytest.raises(ValueError, match=said):
        tiny.train(trained, "optim.steps=4", "train.checkpoint_every=1", setting)
    assert files_of(trained) == before  # metrics, checkpoints, the recipe of the run: all as they were


def test_a_checkpoint_of_other_groups_is_refused_naming_both(tiny, trained, tmp_path_factory):
    setting = write_groups(tmp_path_factory.mktemp("groups"), fingerprint=tiny.fingerprint)
    before, ours, theirs = files_of(trained), tiny.groups, setting.removeprefix("train.groups=")
    digests = [files.sha256(Path(folder) / "index.json")[:12] for folder in (ours, theirs)]
    said = f"step_00000002 was trained on the groups {digests[0]} in {ours}, {setting} now holds {digests[1]}: restore"
    with pytest.raises(ValueError, match=said):
        tiny.train(trained, setting, "optim.steps=4")
    assert files_of(trained) == before


def test_groups_that_moved_are_the_same_groups(tiny, trained, tmp_path_factory):
    moved = shutil.copytree(tiny.groups, tmp_path_factory.mktemp("groups") / "moved")
    tiny.train(trained, f"train.groups={moved}", "optim.steps=3")
    assert len(tiny.metrics(trained)) == 3


def test_the_other_experts_checkpoint_is_refused_naming_both(tiny, tmp_path):
    """The recipes of A14B give both experts one output: the second would go on from the first one's adapters."""
    pipeline = write_tiny_pipeline("wan22_t2v", tmp_path / "model")
    groups = write_groups(tmp_path / "groups", fingerprint=fingerprint("wan22_t2v", pipeline))
    run = (groups, f"backbone.path={pipeline}", "backbone.family=wan22_t2v", "optim.batch_size=1")
    tiny.train(tmp_path, *run, "backbone.expert=high_noise", "optim.steps=2")
    before = files_of(tmp_path)
    for steps in (2, 3):
        with pytest.raises(ValueError, match="trained on the expert high_noise, this run trains low_noise: set .*"):
            tiny.train(tmp_path, *run, "backbone.expert=low_noise", f"optim.steps={steps}")
    assert files_of(tmp_path) == before


def test_a_checkpoint_of_another_backbone_is_refused(tiny, trained, tmp_path_factory):
    other = write_tiny_pipeline("wan21", tmp_path_factory.mktemp("other"), seed=1)
    name = fingerprint("wan21", other)
    setting = write_groups(tmp_path_factory.mktemp("groups"), fingerprint=name)
    before = files_of(trained)
    with pytest.raises(ValueError, match=f"trained on backbone {tiny.fingerprint}, this backbone is {name}"):
        tiny.train(trained, setting, f"backbone.path={other}", "optim.steps=4")
    assert files_of(trained) == before


# ---- clips -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_validation_clips_compare_with_the_same_base(tiny, tmp_path, monkeypatch):
    pairs = []  # (base, tuned) frames in the order made: two prompts at steps 0, 2, 4 and 5
    side_by_side = train.validation.side_by_side
    monkeypatch.setattr(
        train.validation, "side_by_side", lambda clips, labels: pairs.append(clips) or side_by_side(clips, labels)
    )
    tiny.train(tmp_path, "optim.steps=5", "optim.lr=0.01", "validation.every=2", "sampler.steps=4", PROMPT)
    folder = tmp_path / "train" / "validation"
    assert sorted(path.name for path in folder.glob("step_*")) == [f"step_{step:08d}" for step in (0, 2, 4, 5)]
    for path in folder.glob("step_*"):
        assert sorted(file.name for file in path.iterdir()) == ["00-0.mp4", "01-0.mp4", "sheet.png"]
        assert all(file.stat().st_size > 0 for file in path.iterdir())
        with Image.open(path / "sheet.png") as sheet:
            assert sheet.size[0] > 64 and sheet.size[1] > 4 * 64  # a row for base and tuned of each prompt
    first, later = pairs[:2], [pairs[2:4], pairs[4:6], pairs[6:8]]
    assert len(pairs) == 8
    for base, tuned in first:
        assert base.shape == (17, 64, 64, 3) and torch.equal(base, tuned)  # an untrained policy is the reference
    assert not torch.equal(first[0][0], first[1][0])
    for step in later:
        for (base, tuned), (first_base, _) in zip(step, first, strict=True):
            assert torch.equal(base, first_base)
            assert not torch.equal(base, tuned)
    tiny.train(tmp_path, "optim.steps=7", "optim.lr=0.01", "validation.every=2", "sampler.steps=4", PROMPT)
    assert len(pairs) == 12 and torch.equal(pairs[-2][0], first[0][0])  # a resumed process makes the same base again
