"""A run that stops, in any way, and goes on equals the run that never stopped, bit for bit."""

import json
import os
import random
import shutil
import signal
import time

import pytest
import torch

from train import checkpoint, gdpo, sft
from train.groups import GroupSet
from train.loop import build_loader

SIX = ("optim.steps=6", "train.checkpoint_every=3")
EXPORTS = ("lora", "transformer")  # what a finished run leaves, below its folder
MANY = ("optim.steps=12", "train.checkpoint_every=1", "train.keep_checkpoints=2", "train.num_workers=1")


def assert_equal_runs(tiny, folder, other, *, step):
    """Metrics, weights, moments, counters and what is exported are the same; each step stands in the metrics once."""
    assert [line["step"] for line in tiny.metrics(folder)] == list(range(step))
    assert tiny.metrics(folder) == tiny.metrics(other)
    left, right = (at / "train" / "checkpoints" / f"step_{step:08d}" for at in (folder, other))
    assert_equal_tensors(tiny.weights(left), tiny.weights(right))
    states = [json.loads((path / checkpoint.STATE_FILE).read_text(encoding="utf-8")) for path in (left, right)]
    for state in states:
        del state["files"]  # checksums: safetensors orders the metadata at random
    assert states[0] == states[1]
    (name,) = (name for name in EXPORTS if (folder / "train" / name).is_dir())
    assert_equal_tensors(tiny.weights(folder / "train" / name), tiny.weights(other / "train" / name))


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
        pytest.param(gdpo, ("objective.loss=plackett_luce", "objective.noise=independent"), id="plackett_luce"),
        pytest.param(gdpo, ("train.pairs_per_pass=2", "train.num_workers=2"), id="batched"),
        pytest.param(gdpo, ("train.parameters=full", "objective.w_fm=10"), id="full_copy"),
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


def test_a_finished_run_is_left_as_it_is(tiny, tmp_path):
    tiny.train(tmp_path, *SIX)
    files = [path for path in (tmp_path / "train").rglob("*") if path.is_file() and path.parent.name != "lora"]
    before = {path: path.read_bytes() for path in files}
    tiny.train(tmp_path, *SIX)
    assert {path: path.read_bytes() for path in files} == before


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
