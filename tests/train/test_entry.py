import os
import subprocess
import sys
from pathlib import Path

import pytest

from train import entry

ROOT = Path(__file__).parents[2]


def command(*arguments, **variables):
    return subprocess.run(
        [sys.executable, "-m", *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), **variables},
    )


def raised(call):
    with pytest.raises(Exception) as caught:
        call()
    return caught.value


def test_a_users_mistake_is_one_line_and_status_1():
    done = command("train.gdpo", "recipe=tiny", "optim.step=3")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "error: the command line: unknown key optim.step; did you mean 'steps'?\n"


def test_the_traceback_is_there_on_demand():
    done = command("train.gdpo", "recipe=tiny", "optim.step=3", PHYSALIGN_TRACEBACK="1")
    assert done.returncode == 1
    assert "Traceback" in done.stderr


def test_a_rank_says_which_it_is():
    done = command("train.gdpo", "seed=[", RANK="3", WORLD_SIZE="8")
    assert done.returncode == 1
    assert done.stderr.startswith("rank 3: error: argument 'seed=[' cannot be read")
    assert done.stderr.count("\n") == 1


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
