"""launch/job.sbatch as Slurm would run it: on nodes that are processes here, with stand-ins for Slurm's commands."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import recipes
from train import gdpo, sft
from train.loop import accumulation_steps

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "launch" / "job.sbatch"
SLURM = {
    "scontrol": "echo 127.0.0.1; echo other-node",
    "srun": """shift
for node in $(seq 0 $((SLURM_NNODES - 1))); do SLURM_NODEID=$node "$@" & jobs="${jobs:-} $!"; done
for job in $jobs; do wait $job || exit 1; done""",
}
EXAMPLE = r"^#   sbatch --nodes (\d+) launch/job.sbatch (\S+) (.*?)(?:  +.*)?$"
EXAMPLES = re.findall(EXAMPLE, SCRIPT.read_text("utf-8"), re.MULTILINE)


def submit(tmp_path, *arguments, commands=SLURM, **environment):
    for name, body in commands.items():
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{body}\n", encoding="utf-8")
        (tmp_path / name).chmod(0o755)
    variables = {"SLURM_NNODES": "2", "SLURM_JOB_NODELIST": "n[0-1]", "SLURM_JOB_ID": str(os.getpid())} | environment
    variables["PATH"] = os.pathsep.join([str(tmp_path), str(Path(sys.executable).parent), os.environ["PATH"]])
    return subprocess.run(
        ["bash", str(SCRIPT), *arguments], cwd=ROOT, env=os.environ | variables, capture_output=True, text=True
    )


@pytest.mark.parametrize(("nodes", "script", "arguments"), EXAMPLES)
def test_every_printed_example_launches_eight_ranks_a_node(tmp_path, nodes, script, arguments):
    commands = SLURM | {"accelerate": 'echo "$*"'}
    done = submit(tmp_path, script, *arguments.split(), commands=commands, SLURM_NNODES=nodes, SLURM_JOB_ID="20007")
    assert done.returncode == 0 and (ROOT / script).is_file(), done.stderr
    lines = sorted(done.stdout.splitlines())
    assert len(lines) == int(nodes)
    for number, line in enumerate(lines):
        zero3 = "launch/zero3.yaml --deepspeed_multinode_launcher standard"
        config = zero3 if script.startswith("train/") else "launch/ddp.yaml"
        assert line.strip() == (
            f"launch --machine_rank {number} --config_file {config} --num_machines {nodes} --num_processes"
            f" {8 * int(nodes)} --main_process_ip 127.0.0.1 --main_process_port 20007 {script} {arguments}"
        )


def test_the_examples_train_evaluate_and_generate():
    assert [script for _, script, _ in EXAMPLES] == ["train/gdpo.py", "train/sft.py", "eval/generate.py", "eval/run.py"]
    for (nodes, _, arguments), entry in zip(EXAMPLES, (gdpo, sft), strict=False):
        config = recipes.load(entry.Config, arguments.split())
        assert accumulation_steps(config, 8 * int(nodes)) == config.optim.batch_size / (8 * int(nodes))


def test_a_node_gives_all_its_memory_and_the_log_needs_no_folder():
    text = SCRIPT.read_text("utf-8")
    assert "#SBATCH --mem 0\n" in text and "#SBATCH --output slurm-%x-%j.log\n" in text


def test_a_failing_node_fails_the_job(tmp_path):
    commands = SLURM | {"accelerate": '[ "$3" != 1 ]'}
    assert submit(tmp_path, "train/gdpo.py", commands=commands).returncode != 0
    assert "the file to run" in submit(tmp_path, commands=commands).stderr


@pytest.mark.slow
def test_two_nodes_train(tiny, tmp_path):
    run = tiny.arguments(tmp_path / "run", "optim.steps=2")
    one_thread = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = submit(tmp_path, "train/gdpo.py", *run, SLURM_GPUS_ON_NODE="1", **one_thread)
    assert done.returncode == 0, done.stderr[-4000:]
    assert "DEEPSPEED: 2 ranks" in done.stdout and len(tiny.metrics(tmp_path / "run")) == 2
