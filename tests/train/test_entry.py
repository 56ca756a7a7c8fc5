import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from accelerate import DistributedType

from train import entry, gdpo

ROOT = Path(__file__).parents[2]


def raised(call):
    with pytest.raises(Exception) as caught:
        call()
    return caught.value


def test_a_users_mistake_is_one_line_and_status_1():
    command = [sys.executable, "-m", "train.gdpo", "recipe=tiny", "optim.step=3"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "error: the command line: unknown key optim.step; did you mean 'steps'?\n"


def test_the_traceback_is_there_on_demand(monkeypatch):
    monkeypatch.setenv("PHYSALIGN_TRACEBACK", "1")
    with pytest.raises(ValueError, match="unknown key optim.step"):
        entry.run(lambda: gdpo.main(["recipe=tiny", "optim.step=3"]))


def test_a_rank_says_which_it_is(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "8")
    with pytest.raises(SystemExit) as ended:
        entry.run(lambda: gdpo.main(["seed=["]))
    said = capsys.readouterr().err
    assert ended.value.code == 1
    assert said.startswith("rank 3: error: argument 'seed=[' cannot be read")
    assert said.count("\n") == 1


def test_a_fault_in_the_code_keeps_its_traceback():
    assert not entry.is_worded(raised(lambda: int("x")))  # a ValueError that nobody worded
    assert not entry.is_worded(raised(lambda: {}["x"]))


def test_a_file_that_cannot_be_written_is_worded_by_the_system(tmp_path):
    assert entry.is_worded(raised(lambda: (tmp_path / "none" / "x").write_text("")))


def test_every_command_ends_through_the_launcher():
    """Of every file that can be started."""
    for package in entry.PACKAGES:
        for path in (ROOT / package).rglob("*.py"):
            tail = path.read_text(encoding="utf-8").partition('\nif __name__ == "__main__":')[2]
            assert not tail or "    entry.run(" in tail, path


def test_a_command_that_holds_whole_models_refuses_deepspeed():
    sharded = SimpleNamespace(distributed_type=DistributedType.DEEPSPEED)
    with pytest.raises(ValueError, match="a build gives each GPU a whole model: launch it with launch/ddp.yaml"):
        entry.refuse_sharding(sharded, "a build")
    entry.refuse_sharding(SimpleNamespace(distributed_type=DistributedType.NO), "a build")
