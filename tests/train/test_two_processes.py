"""Two ranks on a CPU over gloo, launched with the shipped files: data parallelism and ZeRO-3 equal one process."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

from tests.train import two_process_worker
from train import checkpoint, files
from train.data import GroupStream
from train.groups import GroupSet

ROOT = Path(__file__).parents[2]
RUN = ("optim.batch_size=4", "optim.steps=6", "train.checkpoint_every=1", "train.keep_checkpoints=9")
RUN += (*two_process_worker.TERMS,)  # everything on, in every run here
CLIPS = ("validation.prompts=[a red ball falls,a box slides,a ramp]", "validation.every=4", "sampler.steps=2")


def launch(config, script, *arguments, tmp_path):
    """Start two ranks of `script` by `accelerate launch` and launch/<config>.yaml; their output goes to a file."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", f"launch/{config}.yaml"]
    command += ["--num_processes", "2", "--main_process_port", str(port), *script, *arguments]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    with open(tmp_path / "output.txt", "ab") as output:
        return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT)


def finish(process, tmp_path):
    """Wait for the launcher; its output is the message when it fails or hangs."""
    try:
        process.wait(600)
    except subprocess.TimeoutExpired:
        kill_all(process)
    assert process.returncode == 0, (tmp_path / "output.txt").read_text(encoding="utf-8", errors="replace")[-6000:]


def kill_all(process):
    """SIGKILL to the launcher and everything below it, as when a machine fails."""
    family = [process, *psutil.Process(process.pid).children(recursive=True)]
    for member in family:
        member.kill()
    process.wait()
    psutil.wait_procs(family[1:], timeout=120)


def wait_for_steps(process, folder, count):
    metrics, deadline = folder / "train" / "metrics.jsonl", time.monotonic() + 600
    while not (metrics.exists() and metrics.read_text(encoding="utf-8").count("\n") >= count):
        assert process.poll() is None and time.monotonic() < deadline, "the run ended or hangs before the step"
        time.sleep(0.02)


def distance(one, other):
    """Norm of the difference of two sets of tensors over the norm of the second."""
    assert one.keys() == other.keys()
    difference = sum((one[name].double() - other[name].double()).square().sum() for name in other)
    return float((difference / sum(tensor.double().square().sum() for tensor in other.values())).sqrt())


def assert_close_metrics(lines, others, tolerance):
    assert [line["step"] for line in lines] == [line["step"] for line in others]
    for line, other in zip(lines, others, strict=True):
        assert line.keys() == other.keys()
        for name, value in line.items():
            assert value == pytest.approx(other[name], rel=tolerance, abs=1e-5), f"{name} of step {line['step']}"


@pytest.fixture(scope="module")
def tiny(tiny_targets):
    return tiny_targets


@pytest.fixture(scope="module")
def one_process(tiny, tmp_path_factory):
    """Gradients by objective, and a folder with the run, of a single process with the same global batch."""
    folder = tmp_path_factory.mktemp("one")
    tiny.train(folder, *RUN)
    return two_process_worker.gradients(tiny.arguments(folder, *RUN))[0], folder


def measured_by(config, tiny, tmp_path, *more):
    """What two_process_worker.py leaves: gradients by objective, facts; the run is below tmp_path."""
    script = ("tests/train/two_process_worker.py", str(tmp_path / "gradients"))
    finish(launch(config, script, *tiny.arguments(tmp_path, *RUN, *more), tmp_path=tmp_path), tmp_path)
    facts = json.loads((tmp_path / "gradients" / "facts.json").read_text(encoding="utf-8"))
    names = two_process_worker.OBJECTIVES
    return {name: load_file(tmp_path / "gradients" / f"{name}.safetensors") for name in names}, facts


@pytest.mark.slow
def test_data_parallel_equals_one_process(tiny, tmp_path, one_process):
    expected, one = one_process
    gradients, facts = measured_by("ddp", tiny, tmp_path)
    assert facts == {"type": "MULTI_CPU", "ranks": 2}
    for name, tensors in gradients.items():
        loss, expected_loss = tensors.pop("loss"), expected[name]["loss"]
        assert loss.item() == pytest.approx(expected_loss.item(), rel=1e-6), name
        assert distance(tensors, {key: value for key, value in expected[name].items() if key != "loss"}) < 1e-6, name
    assert_close_metrics(tiny.metrics(tmp_path), tiny.metrics(one), 5e-4)
    two = checkpoint.latest(tmp_path / "train" / "checkpoints")
    assert distance(tiny.weights(two), tiny.weights(checkpoint.latest(one / "train" / "checkpoints"))) < 1e-4


@pytest.mark.slow
def test_processes_of_a_host_stream_from_one_copy(tiny, tmp_path, one_process):
    expected, one = one_process
    gradients, facts = measured_by("ddp", tiny, tmp_path, "backbone.stream=true")
    assert facts == {"type": "MULTI_CPU", "ranks": 2, "one copy": True}
    for name, tensors in gradients.items():
        assert distance(tensors, expected[name]) < 1e-6, name
    assert_close_metrics(tiny.metrics(tmp_path), tiny.metrics(one), 5e-4)
    assert "streamed from 0.0 GiB of host memory" in (tmp_path / "output.txt").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def zero3(tiny, tmp_path_factory):
    """Gradients, facts, and the folder with an uninterrupted run under ZeRO-3, with clips."""
    folder = tmp_path_factory.mktemp("zero3")
    return *measured_by("zero3", tiny, folder, *CLIPS), folder


@pytest.mark.slow
def test_zero3_shards_the_network_and_equals_one_process(tiny, one_process, zero3):
    expected, one = one_process
    gradients, facts, folder = zero3
    assert facts["type"] == "DEEPSPEED" and facts["stage"] == 3 and facts["ranks"] == 2
    assert all(facts[f"partitioned after {name}"] for name in gradients)
    assert facts["share"] == pytest.approx(facts["whole"] / 2, rel=0.01)
    for name, tensors in gradients.items():
        loss, expected_loss = tensors["loss"], expected[name]["loss"]
        assert loss.item() == pytest.approx(expected_loss.item(), rel=1e-6), name
        assert distance(tensors, expected[name]) < 1e-5, name
    assert_close_metrics(tiny.metrics(folder), tiny.metrics(one), 5e-4)
    for path in (folder / "train" / "validation").glob(
        "step_*"
    ):  # three clips by two ranks, each with a sheet of its own
        assert sorted(file.name for file in path.iterdir()) == [
            *(f"0{prompt}-0.mp4" for prompt in range(3)),
            "sheet-0.png",
            "sheet-1.png",
        ]


@pytest.mark.slow
def test_zero3_merges_loras_while_it_shards(tiny, tmp_path):
    """One rank reads, merges and shares out; the run is that of one process on the same merged base."""
    run = ("optim.batch_size=4", "optim.steps=2", "validation.prompts=[]", *two_process_worker.NO_TERMS)
    tiny.train(tmp_path / "plain", *run)
    loras = f"backbone.loras=[{{path: {tmp_path / 'plain' / 'train'}, weight: 30}}]"
    tiny.train(tmp_path / "one", *run, loras)
    finish(launch("zero3", ("-m", "train.gdpo"), *tiny.arguments(tmp_path, *run, loras), tmp_path=tmp_path), tmp_path)
    assert_close_metrics(tiny.metrics(tmp_path), tiny.metrics(tmp_path / "one"), 5e-4)
    errors = [tiny.metrics(folder)[0]["policy_winner"] for folder in (tmp_path, tmp_path / "plain")]
    assert errors[0] != pytest.approx(errors[1], rel=1e-3)


@pytest.mark.slow
def test_zero3_gathers_fused_blocks_for_both_passes(tiny, tmp_path, one_process, monkeypatch):
    monkeypatch.setenv("TORCH_COMPILE_DISABLE", "1")  # fused, but run as written
    expected, _ = one_process
    gradients, facts = measured_by("zero3", tiny, tmp_path, "backbone.compile=true", "train.memory_budget_gib=1e-9")
    assert all(facts[f"partitioned after {name}"] for name in gradients)
    for name, tensors in gradients.items():
        assert distance(tensors, expected[name]) < 1e-5, name


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["tiny", "hunyuan15", "cosmos25"])  # the last two with compiled blocks
def test_the_benchmark_measures_a_sharded_step_beside_a_whole_one(tmp_path, recipe):
    arguments = (f"recipe={recipe}", f"output={tmp_path}", "benchmark.repeats=1", "benchmark.parts=[ours,zero3]")
    if recipe != "tiny":
        size = ("video.height=64", "video.width=64", "video.num_frames=9")
        arguments += ("backbone.architecture=tiny", "backbone.dtype=float32", *size)
    finish(launch("zero3", ("train/tools/benchmark.py",), *arguments, tmp_path=tmp_path), tmp_path)
    results = json.loads((tmp_path / "benchmark.json").read_text(encoding="utf-8"))
    whole, sharded = results["ours"], results["zero3"]
    assert sharded["ranks"] == 2 and sharded["ratio"] == sharded["seconds"] / whole["seconds"]
    assert sharded["time"]["communication"] > 0 == whole["time"]["communication"]
    assert sharded["untrained_gap"] == 0
    assert (tmp_path / "benchmark.png").stat().st_size > 10_000
    output = (tmp_path / "output.txt").read_text(encoding="utf-8", errors="replace")
    assert output.count("zero3 seconds") == 1  # the first rank's figures only


@pytest.mark.slow
def test_zero3_killed_and_resumed_equals_the_uninterrupted_run(tiny, tmp_path, zero3):
    _, _, whole = zero3
    script, arguments = ("-m", "train.gdpo"), tiny.arguments(tmp_path, *RUN)
    killed = launch("zero3", script, *arguments, tmp_path=tmp_path)
    wait_for_steps(killed, tmp_path, 2)
    kill_all(killed)
    newest = checkpoint.latest(tmp_path / "train" / "checkpoints")
    assert newest is not None and newest.name < "step_00000006"
    finish(launch("zero3", script, *arguments, tmp_path=tmp_path), tmp_path)
    assert f"resuming from {newest}" in (tmp_path / "output.txt").read_text(encoding="utf-8", errors="replace")
    assert tiny.metrics(tmp_path) == tiny.metrics(whole)
    one, other = (tiny.weights(at / "train" / "checkpoints" / "step_00000006") for at in (tmp_path, whole))
    assert all(torch.equal(one[name], other[name]) for name in other)


@pytest.mark.slow
def test_one_process_goes_on_from_a_zero3_checkpoint(tiny, tmp_path, zero3):
    _, _, whole = zero3
    name = "train/checkpoints/step_00000003"
    shutil.copytree(whole / name, tmp_path / name)
    assert {file.name for file in (tmp_path / name).iterdir()} == {
        "heads.safetensors",
        "lora.safetensors",
        "optimizer.safetensors",
        "state.json",
    }
    tiny.train(tmp_path, *RUN)
    assert_close_metrics(tiny.metrics(tmp_path), tiny.metrics(whole)[3:], 5e-4)
    one, other = (tiny.weights(at / "train" / "checkpoints" / "step_00000006") for at in (tmp_path, whole))
    assert distance(one, other) < 1e-4


@pytest.mark.slow
def test_two_ranks_share_a_reference_cache(tiny, tmp_path):
    """A run that reads what another one left equals, to the bit, the run that computes it."""
    cache, script = f"train.reference_cache={tmp_path / 'cache'}", ("-m", "train.gdpo")
    other = ("optim.steps=3", "objective.beta=300")
    for name, more in {"plain": other, "first": ("optim.steps=2", cache), "second": (*other, cache)}.items():
        finish(launch("ddp", script, *tiny.arguments(tmp_path / name, *more), tmp_path=tmp_path), tmp_path)
    assert tiny.metrics(tmp_path / "second") == tiny.metrics(tmp_path / "plain")
    output = (tmp_path / "output.txt").read_text(encoding="utf-8")
    assert "reference cache: 0 steps known" in output and "reference cache: 2 steps known" in output


@pytest.mark.slow
def test_a_launcher_that_is_told_to_stop_leaves_a_checkpoint(tiny, tmp_path):
    """SIGTERM to `accelerate launch`, which passes it on; another number of ranks then finishes the run."""
    run = (*RUN, "train.checkpoint_every=100", "optim.steps=40", "train.num_workers=1")
    process = launch("ddp", ("-m", "train.gdpo"), *tiny.arguments(tmp_path, *run), tmp_path=tmp_path)
    wait_for_steps(process, tmp_path, 2)
    process.send_signal(signal.SIGTERM)
    process.wait(60)
    done = len(tiny.metrics(tmp_path))
    newest = checkpoint.latest(tmp_path / "train" / "checkpoints")
    assert 2 <= done < 40 and newest.name in (f"step_{done:08d}", f"step_{done - 1:08d}")
    step = int(newest.name[-8:])
    tiny.train(tmp_path, *run[:-2], f"optim.steps={step + 2}")
    assert [line["step"] for line in tiny.metrics(tmp_path)] == list(range(step + 2))


def failed(process, tmp_path):
    """Wait for the launcher; the lines of its output, which must not be a success."""
    process.wait(150)
    output = (tmp_path / "output.txt").read_text(encoding="utf-8", errors="replace")
    assert process.returncode != 0, output[-6000:]
    return output


@pytest.mark.slow
def test_ranks_that_see_different_checkpoints_stop_and_say_what_they_need(tiny, tmp_path):
    """As on nodes whose output is a local disk: one rank finds the first run's checkpoint, the other none."""
    tiny.train(tmp_path / "node-0", "optim.steps=1")
    arguments = tiny.arguments("${oc.env:NODE_DISK}-${oc.env:RANK}", *RUN)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NODE_DISK", str(tmp_path / "node"))
        output = failed(launch("ddp", ("-m", "train.gdpo"), *arguments, tmp_path=tmp_path), tmp_path)
    for rank, found in enumerate(("step_00000001", "none")):
        folder = tmp_path / f"node-{rank}"
        assert f"the newest checkpoint in {folder / 'train' / 'checkpoints'} is {found} here" in output
        assert f"output={folder} must lie on one file system that all nodes share" in output


@pytest.mark.slow
def test_a_second_launch_in_the_folder_ends_all_its_ranks_with_one_sentence(tiny, tmp_path):
    arguments = tiny.arguments(tmp_path, *RUN)
    with files.lock(tmp_path / "train"):
        output = failed(launch("ddp", ("-m", "train.gdpo"), *arguments, tmp_path=tmp_path), tmp_path)
    assert output.count(f"error: {tmp_path}/train is in use by process {os.getpid()} on ") == 1
    assert {path.name for path in (tmp_path / "train").iterdir()} == {files.LOCK}


@pytest.mark.slow
def test_a_damaged_group_of_one_rank_ends_both_and_loses_no_step(tiny, tmp_path):
    """Position 5 of the stream, in the second step, belongs to the second rank: the first saves what was done."""
    groups = tmp_path / "groups"
    shutil.copytree(tiny.groups, groups)
    damaged = GroupStream(GroupSet(groups), 0).key(5)
    for shard in json.loads((groups / "index.json").read_text(encoding="utf-8"))["shards"]:
        for sample in shard["samples"]:
            if sample["key"] == damaged:
                data = bytearray((groups / shard["file"]).read_bytes())
                data[sample["offset"] + sample["bytes"] // 2] ^= 1
                (groups / shard["file"]).write_bytes(data)
    run = (f"train.groups={groups}", *RUN, "train.checkpoint_every=100", "train.num_workers=1")
    output = failed(launch("ddp", ("-m", "train.gdpo"), *tiny.arguments(tmp_path, *run), tmp_path=tmp_path), tmp_path)
    (line,) = [line for line in output.splitlines() if "is damaged" in line]
    assert "rank 1: error: " in line and f"group {damaged!r}" in line  # behind the progress bar
    assert "DataLoader worker" not in output
    assert checkpoint.latest(tmp_path / "train" / "checkpoints").name == "step_00000001"
