import errno
import json
import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from typing_extensions import TypedDict

from train import files


class Shard(TypedDict):
    file: str
    bytes: int


# Writing


def test_a_failed_write_leaves_the_file_as_it_was_and_nothing_beside_it(tmp_path):
    files.write_text(tmp_path / "a.txt", "whole")
    with pytest.raises(RuntimeError), files.atomic(tmp_path / "a.txt") as aside:
        aside.write_text("half")
        raise RuntimeError
    assert (tmp_path / "a.txt").read_text() == "whole"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_two_writers_of_one_path_do_not_meet(tmp_path):
    with files.atomic(tmp_path / "a") as first, files.atomic(tmp_path / "a") as second:
        first.write_text("first")
        second.write_text("second")
    assert first != second
    assert (tmp_path / "a").read_text() == "first"  # closed last


def test_a_link_at_the_target_is_replaced_not_followed(tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("mine")
    (tmp_path / "a").symlink_to(victim)
    files.write_text(tmp_path / "a", "new")
    assert victim.read_text() == "mine"
    assert not (tmp_path / "a").is_symlink()


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_what_safetensors_writes_has_the_umasks_mode(tmp_path, umask):
    before = os.umask(umask)
    try:
        with files.atomic(tmp_path / "deep" / "x.safetensors") as aside:
            save_file({"a": torch.ones(2)}, aside)
    finally:
        os.umask(before)
    written = tmp_path / "deep" / "x.safetensors"
    assert stat.S_IMODE(written.stat().st_mode) == 0o666 & ~umask
    assert load_file(written)["a"].tolist() == [1, 1]


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        RuntimeError("I/O error: No space left on device (os error 28)"),  # as safetensors words it
    ],
)
def test_a_full_disk_names_the_file(tmp_path, error):
    with pytest.raises(
        OSError, match=r"disk or quota is full: .*a\.bin could not be written whole, \d+ bytes are free"
    ):
        with files.atomic(tmp_path / "a.bin"):
            raise error
    assert os.listdir(tmp_path) == []


# Locks


def test_a_folder_in_use_is_refused_with_host_process_and_time(tmp_path):
    with files.lock(tmp_path):
        outcome = refused_elsewhere(tmp_path)
    assert f"process {os.getpid()} on " in outcome
    assert "since 20" in outcome
    assert "choose another output folder" in outcome
    assert refused_elsewhere(tmp_path) == "free"


def test_a_killed_process_leaves_no_lock(tmp_path):
    holder = python(HOLD, str(tmp_path))
    assert holder.stdout.readline() == "held\n"
    assert "in use by process" in refused_elsewhere(tmp_path)
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    holder.stdout.close()
    assert refused_elsewhere(tmp_path) == "free"


def test_tasks_share_a_folder_and_keep_a_single_run_out(tmp_path):
    with files.lock(tmp_path):
        pass
    with files.lock(tmp_path, task="0-of-4"):
        assert refused_elsewhere(tmp_path, "1-of-4") == "free"
        assert f"process {os.getpid()}" in refused_elsewhere(tmp_path, "0-of-4")
        assert "in use by another run" in refused_elsewhere(tmp_path)
    with files.lock(tmp_path):
        assert "in use by" in refused_elsewhere(tmp_path, "1-of-4")


def test_a_run_removes_what_killed_ones_left_and_nothing_else(tmp_path):
    left = files.temporary(tmp_path / "clips" / "a.mp4")
    left.parent.mkdir()
    left.write_text("half a clip")
    folder = files.temporary(tmp_path / "step_00000001")
    folder.mkdir()
    (folder / "lora.safetensors").write_text("half a checkpoint")
    for name in (".mine.tmp", "a.tmp", ".hidden"):
        (tmp_path / name).write_text("a user's")
    with files.lock(tmp_path, task="0-of-2"):
        assert left.exists()  # it may be another task's
    with files.lock(tmp_path):
        assert not left.exists() and not folder.exists()
    assert sorted(path.name for path in tmp_path.glob("*")) == [
        ".hidden",
        ".lock",
        ".lock-0-of-2",
        ".mine.tmp",
        "a.tmp",
        "clips",
    ]


def test_what_a_run_in_a_folder_below_is_writing_is_left_alone(tmp_path):
    training, below = files.temporary(tmp_path / "train" / "checkpoints" / "step_00000001"), tmp_path / "clips" / "a"
    left = files.temporary(below)
    below.parent.mkdir()
    left.write_text("half a clip")
    with files.lock(tmp_path / "train"):
        training.mkdir(parents=True)
        with files.lock(tmp_path):
            assert training.exists() and not left.exists()


def test_a_folder_taken_twice_by_one_process_stays_locked(tmp_path):
    with files.lock(tmp_path):
        writing = files.temporary(tmp_path / "a.mp4")
        writing.touch()
        with files.lock(tmp_path / "." / ""):
            assert writing.exists()
        assert f"process {os.getpid()}" in refused_elsewhere(tmp_path)
    assert refused_elsewhere(tmp_path) == "free"


def test_a_planted_link_is_no_lock_file(tmp_path):
    (tmp_path / "victim").write_text("mine")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / files.LOCK).symlink_to(tmp_path / "victim")
    with pytest.raises(OSError), files.lock(tmp_path / "run"):
        pass
    assert (tmp_path / "victim").read_text() == "mine"


HOLD = """
import sys, time
from train import files
with files.lock(sys.argv[1]):
    print("held", flush=True)
    time.sleep(600)
"""


TRY = """
import sys
from train import files
try:
    with files.lock(sys.argv[1], task=sys.argv[2]):
        print("free")
except ValueError as error:
    print(error)
"""


def python(code, *arguments):
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments], stdout=subprocess.PIPE, text=True, env=environment
    )


def refused_elsewhere(folder, task=""):
    """What another process meets that takes the folder's lock."""
    return python(TRY, str(folder), task).communicate()[0].strip()


# Reading


def test_json_of_the_right_shape_is_read(tmp_path):
    (tmp_path / "a.json").write_text('{"file": "x", "bytes": 3, "more": true}')
    assert files.read_json(tmp_path / "a.json", Shard, remedy="") == {"file": "x", "bytes": 3}


@pytest.mark.parametrize(
    ("content", "place"),
    [
        ('{"file": "x", "bytes": "3"}', "bytes: "),
        ('{"file": "x", "bytes": 1e400}', "bytes: "),
        ('{"file": null, "bytes": 3}', "file: "),
        ('{"file": "x"}', "bytes: Field required"),
        ("[]", ""),
        ("", "Invalid JSON"),
        ("[" * 100_000, "Invalid JSON"),
        ('{"file": "\\ud800", "bytes": 3}', "Invalid JSON"),
    ],
)
def test_json_of_another_shape_is_one_line_with_the_remedy(tmp_path, content, place):
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(ValueError) as raised:
        files.read_json(tmp_path / "a.json", Shard, remedy="run the build again")
    message = str(raised.value)
    assert message.startswith(f"{tmp_path / 'a.json'} is damaged ({place}")
    assert message.endswith("; run the build again")
    assert "\n" not in message


def test_a_missing_json_file_is_one_line(tmp_path):
    with pytest.raises(ValueError, match=r"a\.json cannot be read \(No such file or directory\); run it"):
        files.read_json(tmp_path / "a.json", Shard, remedy="run it")


def test_digests_are_of_content():
    assert files.digest({"b": 1, "a": [2]}) == files.digest(json.loads('{"a": [2], "b": 1}'))
    # printf abc | sha256sum
    assert files.digest("abc") != "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_a_settled_file_is_hashed_once_until_it_changes(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "SETTLED", -1.0)
    path = tmp_path / "a"
    path.write_bytes(b"abc")
    first = files.sha256(path)
    with monkeypatch.context() as unread:
        unread.delattr("hashlib.file_digest")
        assert files.sha256(path) == first
    path.write_bytes(b"abcd")
    assert files.sha256(path) == files.sha256(b"abcd")


def test_the_sha256_of_a_file_is_that_of_its_bytes(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    assert files.sha256(tmp_path / "a") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_a_seed_is_the_hash_of_its_parts_and_fits_a_generator():
    # printf 'losers\0007' | sha256sum | cut -c1-16
    assert files.seed_of("losers", 7) == 0x8E48A76BDDB32F7F >> 1 < 2**63
