"""Killing a build: at random moments, with kill -9, on one process and on several; the shards come out the same."""

import csv
import multiprocessing
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch

from tests.synthetic_groups import verify
from train.backbones.tiny import write_tiny_pipeline
from train.clips import write_clip

ROOT = Path(__file__).parents[2]
KILLS = 20


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    """A tiny model, and a manifest of twelve good clips and two bad ones."""
    folder = tmp_path_factory.mktemp("inputs")
    write_tiny_pipeline("wan21", folder / "model")
    rows = []
    for number in range(12):
        generator = torch.Generator().manual_seed(number)
        frames = torch.randint(0, 255, (9, 64, 64, 3), generator=generator).byte()
        write_clip(folder / f"{number}.mp4", frames, 8)
        rows.append((f"{number}.mp4", f"ball {number} falls", f"k{number}", "roll" if number % 3 else "fall"))
    rows.insert(3, ("none.mp4", "nothing", "none", "fall"))
    rows.insert(7, ("0.mp4", "", "empty", "fall"))
    with (folder / "clips.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["clip", "prompt", "key", "action"])
        writer.writerows(rows)
    return folder


def arguments(inputs: Path, output: Path) -> list[str]:
    settings = {
        "output": output,
        "backbone.path": inputs / "model",
        "backbone.architecture": "tiny",
        "backbone.dtype": "float32",
        "backbone.text_length": 32,
        "video.height": 64,
        "video.width": 64,
        "video.num_frames": 9,
        "video.fps": 8,
        "sampler.steps": 4,
        "sampler.guidance": 2,
        "pipeline.manifest": inputs / "clips.csv",
        "pipeline.losers.count": 2,
        "pipeline.unit_size": 5,
        "pipeline.batch_size": 4,  # two rows together: their last bits depend on each other
        "pipeline.encode_batch": 2,
        "judge.name": "sandbox",
        "pipeline.resample.budget": 11,
        "pipeline.resample.representatives": 2,
        "pipeline.save_losers": "true",
    }
    return [f"{key}={value}" for key, value in settings.items()]


def build(argv: list[str] | None = None) -> None:
    """In a process of its own, with several units in the first stages' tables too."""
    from data_pipeline import build, tables

    torch.set_num_threads(1)
    tables.TABLE_ROWS = 4
    build.main(argv)


def start(argv: list[str]) -> multiprocessing.Process:
    """A fork server spares each build the seconds of imports."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["data_pipeline.build"])
    process = context.Process(target=build, args=(argv,))
    process.start()
    return process


def results(output: Path) -> dict[str, bytes]:
    """What a build gives: shards, markers, index, and the losers for a judge."""
    folders = (output / "groups", output / "losers")
    found = [path for folder in folders for path in folder.iterdir()]
    files = [path for path in found if path.is_file() and not path.name.startswith(".lock")]
    return {str(path.relative_to(output)): path.read_bytes() for path in files}


@pytest.fixture(scope="module")
def whole(inputs, tmp_path_factory) -> dict[str, bytes]:
    """The results of a build that nothing disturbs."""
    output = tmp_path_factory.mktemp("whole")
    process = start(arguments(inputs, output))
    process.join(600)
    assert process.exitcode == 0
    return results(output)


def count_files(folder):
    return sum(len(files) for *_, files in os.walk(folder))


@pytest.mark.slow
def test_a_build_killed_at_twenty_random_moments_gives_the_same_bytes(inputs, whole, tmp_path):
    chance = random.Random(0)
    kills = finished = 0
    progress = set()
    while kills < KILLS:
        wanted = count_files(tmp_path) + chance.randint(0, 8)
        process = start(arguments(inputs, tmp_path / "out"))
        while process.is_alive() and count_files(tmp_path) < wanted:
            time.sleep(0.01)
        process.join(chance.uniform(0, 0.3))  # some way into what comes next
        if process.is_alive():
            os.kill(process.pid, signal.SIGKILL)
            process.join()
            kills += 1
            progress.add(count_files(tmp_path))
        else:  # done before its time: once more from the start
            assert process.exitcode == 0 and results(tmp_path / "out") == whole
            finished += 1
            (tmp_path / "out").rename(tmp_path / f"finished-{finished}")
    process = start(arguments(inputs, tmp_path / "out"))
    process.join(600)
    assert process.exitcode == 0
    assert results(tmp_path / "out") == whole
    assert verify(tmp_path / "out" / "groups") == []
    assert not list((tmp_path / "out").rglob("*.tmp"))
    assert len(progress) > 5  # the kills fell into many different moments


@pytest.mark.slow
def test_of_two_builds_at_once_one_is_refused_and_nothing_is_damaged(inputs, whole, tmp_path):
    both = [start(arguments(inputs, tmp_path / "out")) for _ in range(2)]
    for process in both:
        process.join(600)
    assert sorted(process.exitcode for process in both) in ([0, 1], [0, 0])  # or the second began afterwards
    assert results(tmp_path / "out") == whole


def launch(processes: int, argv: list[str]) -> subprocess.Popen:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", "launch/ddp.yaml"]
    command += ["--num_processes", str(processes), "--main_process_port", str(port)]
    command += ["--module", "tests.data_pipeline.test_kill", *argv]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)


@pytest.mark.slow
def test_two_ranks_killed_and_three_that_continue(inputs, whole, tmp_path):
    run = launch(2, arguments(inputs, tmp_path / "out"))
    first = tmp_path / "out" / "pipeline" / "generate" / "losers"
    deadline = time.monotonic() + 600
    while not list(first.glob("*/*.safetensors")):
        assert run.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    kill_all(run)
    assert not (tmp_path / "out" / "groups" / "index.json").exists()
    run = launch(3, arguments(inputs, tmp_path / "out"))
    try:
        _, errors = run.communicate(timeout=600)
    finally:
        if run.poll() is None:
            kill_all(run)
    assert run.returncode == 0, errors
    assert results(tmp_path / "out") == whole


def kill_all(launcher: subprocess.Popen) -> None:
    """SIGKILL to the launcher and its ranks, as when a machine fails."""
    family = [launcher, *psutil.Process(launcher.pid).children(recursive=True)]
    for member in family:
        member.kill()
    launcher.communicate()
    psutil.wait_procs(family[1:], timeout=120)


@pytest.mark.slow
def test_tasks_of_an_array_give_the_same_bytes(inputs, whole, tmp_path):
    """Each stage by two tasks that start together and know nothing of each other; one of them dies at first."""
    for stage in ("pool", "filter", "cluster", "difficulty", "resample", "generate", "judge", "targets", "encode"):
        common = [*arguments(inputs, tmp_path / "out"), f"pipeline.stage={stage}", "pipeline.array_count=2"]
        tasks = [start([*common, f"pipeline.array_index={index}"]) for index in range(2)]
        if stage == "generate":
            os.kill(tasks[1].pid, signal.SIGKILL)
            tasks[1].join()
            tasks[1] = start([*common, "pipeline.array_index=1"])
        for task in tasks:
            task.join(600)
            assert task.exitcode == 0
    last = start(arguments(inputs, tmp_path / "out"))  # finds everything done, and writes the index
    last.join(600)
    assert last.exitcode == 0
    assert results(tmp_path / "out") == whole


if __name__ == "__main__":
    build()
