"""A run that stops, in any way, and goes on equals the run that never stopped, bit for bit."""

import json
import os
import random
import shutil
import signal
import socket
import time
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from train import checkpoint, files, gdpo, resume, sft
from train.data import build_loader
from train.groups import GroupSet

SIX = ("optim.steps=6", "train.checkpoint_every=3")
EXPORTS = ("lora", "transformer")  # what a finished run leaves, below its folder
MANY = ("optim.steps=12", "train.checkpoint_every=1", "train.keep_checkpoints=2", "train.num_workers=1")


def assert_equal_runs(tiny, folder, other, *, step):
    """Metrics, weights, moments, counters and what is exported are the same; each step stands in the metrics once."""
    assert [line["step"] for line in tiny.metrics(folder)] == list(range(step))
    assert tiny.metrics(folder) == tiny.metrics(other)
    left, right = (at / "train" / "checkpoints" / f"step_{step:08d}" for at in (folder, other))
    assert_equal_tensors(tiny.weights(left), tiny.weights(right))
    (name,) = (name for name in EXPORTS if (folder / "train" / name).is_dir())
    for one, two in ((left, right), (folder / "train" / name, other / "train" / name)):
        assert {path.name: path.read_bytes() for path in one.iterdir()} == {
            path.name: path.read_bytes() for path in two.iterdir()
        }


def assert_equal_tensors(left, right):
    assert left.keys() == right.keys()
    for name in left:
        assert torch.equal(left[name], right[name]), name


@pytest.fixture(scope="module")
def twelve_steps(tiny, tmp_path_factory):
    """An uninterrupted run of MANY."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    tiny.train(folder, *MANY)
    return folder


def test_two_runs_are_the_same(tiny, tmp_path):
    for name in ("one", "two"):
        torch.manual_seed(len(name) + ord(name[0]))  # the global generator is not read
        tiny.train(tmp_path / name, "optim.steps=3")
    assert_equal_runs(tiny, tmp_path / "one", tmp_path / "two", step=3)


@pytest.mark.parametrize(
    ("entry", "more"),
    [
        pytest.param(gdpo, (), id="bound"),
        pytest.param(
            gdpo,
            ("objective.loss=plackett_luce", "objective.noise=independent"),
            id="plackett_luce",
            marks=pytest.mark.slow,
        ),
        pytest.param(gdpo, ("train.pairs_per_pass=2", "train.num_workers=2"), id="batched"),
        pytest.param(gdpo, ("train.parameters=full", "objective.anchor=10"), id="full_copy", marks=pytest.mark.slow),
        pytest.param(sft, (), id="sft"),
        pytest.param(sft, ("train.parameters=full",), id="full"),
    ],
)
def test_three_steps_and_three_equal_six(tiny, tmp_path, entry, more):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    tiny.train(whole, *SIX, *more, entry=entry)
    # The second run finds what a machine that failed in step 6 leaves: checkpoint 3, two more lines of metrics, a half.
    shutil.copytree(
        whole / "train" / "checkpoints" / "step_00000003", parts / "train" / "checkpoints" / "step_00000003"
    )
    lines = (whole / "train" / "metrics.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (parts / "train" / "metrics.jsonl").write_text("".join(lines[:5]) + lines[5][:40], encoding="utf-8")
    tiny.train(parts, *SIX, *more, entry=entry)
    assert_equal_runs(tiny, parts, whole, step=6)


def contents(folder):
    """Bytes of every file below `folder` but the lock, which names the last process."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != files.LOCK}


def test_a_finished_run_is_left_as_it_is(tiny, tmp_path, capsys):
    tiny.train(tmp_path, *SIX)
    before = contents(tmp_path)
    capsys.readouterr()
    tiny.train(tmp_path, *SIX)
    assert contents(tmp_path) == before
    assert "step 6 of optim.steps=6: nothing to train" in capsys.readouterr().out


def test_a_run_with_nothing_to_do_exports_what_there_is(tiny, tmp_path, capsys):
    """Checkpoints of a stopped run, and fewer steps than it made, as one ends a run early."""
    checkpoints = tiny.train(tmp_path / "whole", "optim.steps=3", "train.checkpoint_every=1")
    early = tmp_path / "early" / "train"
    shutil.copytree(checkpoints, early / "checkpoints")
    capsys.readouterr()
    tiny.train(tmp_path / "early", "optim.steps=1")
    said = capsys.readouterr().out
    assert "step 3 of optim.steps=1: nothing to train" in said
    for line in said.splitlines():
        if line.startswith(("weights  ", "metrics  ", "clips    ")):
            assert Path(line[9:]).exists(), line
    name = "lora/pytorch_lora_weights.safetensors"
    assert (early / name).read_bytes() == (tmp_path / "whole" / "train" / name).read_bytes()
    assert not (early / "recipe.yaml").exists()  # that of this call made nothing


def recipes_of(folder):
    """beta by file of the recipes that a run left."""
    found = {path.name: OmegaConf.load(path) for path in (folder / "train").glob("recipe*.yaml")}
    return {name: content.objective.beta for name, content in found.items()}


def test_keys_of_another_version_are_listed_too(tiny, tmp_path, capsys, monkeypatch):
    """A weight that has another name and unit now must not change in silence."""
    run, settings = ("train.checkpoint_every=1", "optim.schedule=constant"), resume.settings

    def earlier(config):
        return {k: v for k, v in settings(config).items() if k != "objective.anchor"} | {"objective.w_fm": 200}

    monkeypatch.setattr(resume, "settings", earlier)
    tiny.train(tmp_path, "optim.steps=1", *run)
    monkeypatch.undo()
    tiny.train(tmp_path, "optim.steps=2", *run)
    said = capsys.readouterr().out
    assert "objective.w_fm 200 -> no such key" in said and "objective.anchor not set -> 0" in said


def test_other_settings_are_listed_in_one_line_and_every_recipe_is_kept(tiny, tmp_path, capsys):
    run = ("train.checkpoint_every=1", "optim.schedule=constant")
    tiny.train(tmp_path, "optim.steps=2", *run)
    assert recipes_of(tmp_path) == {"recipe.yaml": 1000, "recipe-from-00000000.yaml": 1000}
    capsys.readouterr()
    tiny.train(tmp_path, "optim.steps=3", *run, "optim.lr=0.01", "objective.beta=5")
    (said,) = [line for line in capsys.readouterr().out.splitlines() if "other settings" in line]
    assert said == (
        "resuming with other settings: objective.beta 1000.0 -> 5.0, optim.steps 2 -> 3, optim.lr 0.001 -> 0.01"
    )
    earlier = {"recipe-from-00000000.yaml": 1000, "recipe-from-00000002.yaml": 5}
    assert recipes_of(tmp_path) == {"recipe.yaml": 5} | earlier
    tiny.train(tmp_path, "optim.steps=4", *run, "optim.lr=0.01", "objective.beta=7")
    shutil.rmtree(tmp_path / "train" / "checkpoints" / "step_00000004")
    tiny.train(tmp_path, "optim.steps=4", *run, "optim.lr=0.01", "objective.beta=8")  # the fourth step once more
    assert recipes_of(tmp_path) == {"recipe.yaml": 8, "recipe-from-00000003.yaml": 8} | earlier


def test_an_earlier_versions_checkpoint_goes_on_and_says_what_is_unchecked(tiny, tmp_path, capsys):
    checkpoints = tiny.train(tmp_path, "optim.steps=1")
    path = checkpoints / "step_00000001" / checkpoint.STATE_FILE
    state = json.loads(path.read_text(encoding="utf-8"))
    for key in ("groups", "settings", "digest"):
        del state[key]
    path.write_text(json.dumps(state), encoding="utf-8")
    (tmp_path / "train" / "recipe-from-00000000.yaml").unlink()
    tiny.train(tmp_path, "optim.steps=2", "objective.beta=5")
    said = capsys.readouterr().out
    assert "does not say which groups and settings it was trained with: unchecked" in said
    assert "other settings" not in said
    assert recipes_of(tmp_path) == {
        "recipe.yaml": 5,
        "recipe-from-00000000.yaml": 1000,
        "recipe-from-00000001.yaml": 5,
    }


@pytest.mark.slow
def test_a_second_run_in_the_folder_is_refused_until_the_first_dies(tiny, tmp_path):
    run = ("optim.steps=300", "train.checkpoint_every=1", "train.num_workers=1")
    first = tiny.process(tmp_path, *run)
    checkpoints = tmp_path / "train" / "checkpoints"
    try:
        while first.is_alive() and checkpoint.latest(checkpoints) is None:
            time.sleep(0.01)
        said = rf"train is in use by process {first.pid} on {socket.gethostname()} since \d{{4}}-.* output folder"
        with pytest.raises(ValueError, match=said):
            tiny.train(tmp_path, *run)
        assert first.is_alive()
    finally:
        first.kill()
        first.join()
    steps = int(checkpoint.latest(checkpoints).name[-8:]) + 1
    tiny.train(tmp_path, f"optim.steps={steps}")  # at once, though the dead one's loader may still live
    assert [line["step"] for line in tiny.metrics(tmp_path)] == list(range(steps))
    assert not list((tmp_path / "train").rglob(".*.tmp"))


@pytest.mark.slow
def test_clips_of_a_validation_that_was_killed_are_made_on_resume(tiny, tmp_path):
    clips = ("validation.prompts=[a ball]", "validation.every=2", "sampler.steps=1", "video.fps=8")
    run = ("optim.batch_size=1", "train.checkpoint_every=1", *clips)
    folder = tmp_path / "train" / "validation"
    tiny.train(tmp_path, "optim.steps=2", *run)
    first = {path: path.read_bytes() for path in (folder / "step_00000000").iterdir()}
    (folder / "step_00000002" / "sheet.png").unlink()  # killed before the last file of the last step's validation
    tiny.train(tmp_path, "optim.steps=2", *run)
    assert {path.name for path in (folder / "step_00000002").iterdir()} == {"00-0.mp4", "sheet.png"}
    shutil.rmtree(folder / "step_00000002")  # in the midst of a run: step 2 of 3
    tiny.train(tmp_path, "optim.steps=3", *run)
    for step in (2, 3):
        assert {path.name for path in (folder / f"step_0000000{step}").iterdir()} == {"00-0.mp4", "sheet.png"}
    made = {path: path.stat().st_mtime_ns for path in folder.rglob("*.mp4")}
    tiny.train(tmp_path, "optim.steps=3", *run)
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*.mp4")} == made
    assert {path: path.read_bytes() for path in first} == first


@pytest.mark.parametrize("world", [2, 3])
def test_other_ranks_go_on_with_the_same_stream(tiny, tmp_path, world):
    """What one rank would read from position 7 on, `world` ranks read together."""
    config = tiny.config(tmp_path)
    groups = GroupSet(config.train.groups)

    def times(rank, ranks, count):
        loader = iter(build_loader(config, groups, gdpo.prepare, start=7, rank=rank, world=ranks))
        return [next(loader)["t"].item() for _ in range(count)]

    one = times(0, 1, 4 * world)
    assert [t for round_ in zip(*(times(rank, world, 4) for rank in range(world)), strict=True) for t in round_] == one


@pytest.mark.slow
def test_killed_again_and_again(tiny, tmp_path, twelve_steps):
    """SIGKILL at seeded moments, each time past the start of the loop; every step writes a checkpoint."""
    delays, kills = random.Random(0), 0
    metrics = tmp_path / "train" / "metrics.jsonl"
    for _ in range(5):
        process, seen = tiny.process(tmp_path, *MANY), len(metrics.read_bytes()) if metrics.exists() else 0
        while process.is_alive() and not (metrics.exists() and len(metrics.read_bytes()) != seen):
            time.sleep(0.01)
        process.join(delays.uniform(0, 0.3))
        kills += process.is_alive()
        process.kill()
        process.join()
    assert kills >= 2
    tiny.train(tmp_path, *MANY)
    assert_equal_runs(tiny, tmp_path, twelve_steps, step=12)
    names = sorted(path.name for path in (tmp_path / "train" / "checkpoints").iterdir())
    assert names == ["step_00000011", "step_00000012"]  # what a kill left aside is gone


@pytest.mark.slow
@pytest.mark.parametrize("everyone", [False, True])
def test_preempted(tiny, tmp_path, twelve_steps, everyone):
    """SIGTERM, to the trainer alone or as a scheduler sends it, to its loader processes too: saved, exit code 0."""
    more = ("train.checkpoint_every=100", "train.num_workers=2")
    process = tiny.process(tmp_path, *MANY, *more)
    metrics = tmp_path / "train" / "metrics.jsonl"
    while process.is_alive() and not (metrics.exists() and metrics.read_text(encoding="utf-8").count("\n") >= 2):
        time.sleep(0.01)
    if everyone:
        for child in children(process.pid):
            os.kill(child, signal.SIGTERM)
    process.terminate()
    process.join(600)
    assert process.exitcode == 0
    done = len(tiny.metrics(tmp_path))
    assert 2 <= done < 12
    newest = checkpoint.latest(tmp_path / "train" / "checkpoints")
    assert newest.name == f"step_{done:08d}"  # of the step under way, not an earlier one
    tiny.train(tmp_path, *MANY, *more)
    assert_equal_runs(tiny, tmp_path, twelve_steps, step=12)


def interrupt(patch, owner, name, call, error=None):
    """Send this process SIGTERM after the `call`-th call of `owner.name`, and then raise `error`, if any."""
    original, calls = getattr(owner, name), iter(range(1, 100))

    def interrupted(*args, **options):
        result = original(*args, **options)
        if next(calls) == call:
            os.kill(os.getpid(), signal.SIGTERM)
            if error:
                raise error
        return result

    patch.setattr(owner, name, interrupted)


@pytest.mark.slow
def test_preempted_while_saving(tiny, tmp_path, monkeypatch, twelve_steps):
    with monkeypatch.context() as patch:
        interrupt(patch, checkpoint, "save", 3)
        with pytest.raises(SystemExit, match="0"):
            tiny.train(tmp_path, *MANY, "train.num_workers=0")
    reached = len(tiny.metrics(tmp_path))
    assert 3 <= reached <= 4
    assert checkpoint.latest(tmp_path / "train" / "checkpoints").name == f"step_{reached:08d}"
    tiny.train(tmp_path, *MANY)
    assert_equal_runs(tiny, tmp_path, twelve_steps, step=12)


class Killed(BaseException):
    """Passes every `except Exception`, as SIGKILL does."""


@pytest.mark.parametrize(
    ("owner", "name", "call", "saved"),
    [
        pytest.param(gdpo, "step", 10, 4, id="in a pass of step 5: what was done is saved"),
        pytest.param(torch.optim.AdamW, "step", 5, 3, id="between new weights and counters: what is saved fits"),
    ],
)
def test_preempted_and_killed_at_once(tiny, tmp_path, monkeypatch, twelve_steps, owner, name, call, saved):
    """A launcher may kill seconds after SIGTERM, long before a large step ends."""
    run = (*MANY, "train.num_workers=0", "train.checkpoint_every=3")
    with monkeypatch.context() as patch:
        interrupt(patch, owner, name, call, Killed())
        with pytest.raises(Killed):
            tiny.train(tmp_path, *run)
    assert checkpoint.latest(tmp_path / "train" / "checkpoints").name == f"step_{saved:08d}"
    tiny.train(tmp_path, *run)
    assert_equal_runs(tiny, tmp_path, twelve_steps, step=12)


def children(pid):
    """Process ids of the children of process `pid`, from /proc."""
    with open(f"/proc/{pid}/task/{pid}/children", encoding="utf-8") as file:
        return [int(child) for child in file.read().split()]
