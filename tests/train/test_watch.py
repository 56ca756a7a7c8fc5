"""Two ranks over gloo, one of which hangs or works for long. As a script: one rank, test_watch.py WHAT FOLDER."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
import torch
import torch.distributed as dist

from train import parallel, watch

MINUTES = 0.1


def hang(seconds: float = -1) -> None:
    lock = threading.Lock()
    lock.acquire()
    lock.acquire(timeout=seconds)


def rank(what: str, folder: Path) -> None:
    parallel.build_accelerator()
    (folder / f"rank-{dist.get_rank()}").touch()
    if dist.get_rank() == 0 and what == "work":  # in many short calls, for more than twice as long as a rank may hang
        for _ in range(150):
            time.sleep(MINUTES)
    elif dist.get_rank() == 0 and what == "child":  # in one call, while another process computes
        code = f"import time\nend = time.time() + {150 * MINUTES}\nwhile time.time() < end: sum(range(10**6))"
        subprocess.run([sys.executable, "-c", code], check=True)
    elif dist.get_rank() == 1 and what == "hang":
        hang()
    elif what == "stop":
        for _ in range(10**6):
            dist.all_reduce(torch.ones(1))
            time.sleep(0.01)
    dist.all_reduce(torch.ones(1))
    if dist.get_rank() == 0 and what == "alone":  # the others have left, as in an evaluation that is scored
        hang(4 * 60 * MINUTES)


@pytest.fixture
def ranks(request, tmp_path):
    """Two ranks that are connected and about to do what the test's parameter says."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    environment |= {"PHYSALIGN_TIMEOUT_MINUTES": str(MINUTES), "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, __file__, request.param, str(tmp_path)]
    both = [
        subprocess.Popen(
            command, env=environment | {"RANK": number, "LOCAL_RANK": number}, stderr=subprocess.PIPE, text=True
        )
        for number in "01"
    ]
    try:
        while not all((tmp_path / f"rank-{number}").exists() for number in range(2)):
            assert all(process.poll() is None for process in both)
            time.sleep(0.05)
        yield both
    finally:
        for process in both:
            process.kill()
            process.communicate()


@pytest.mark.slow
@pytest.mark.parametrize("ranks", ["stop"], indirect=True)
@pytest.mark.parametrize(("stopped", "named"), [(1, "rank 1 (host "), (0, "127.0.0.1, where rank 0 is")])
def test_a_stopped_rank_ends_the_job_and_is_named(ranks, stopped, named):
    ranks[stopped].send_signal(signal.SIGSTOP)
    _, message = ranks[1 - stopped].communicate(timeout=120)
    assert ranks[1 - stopped].returncode == 1
    assert named in message and f"for {MINUTES:g} minutes" in message and "run the same command again" in message
    assert stopped == 0 or f"process {ranks[1].pid}) at " in message


@pytest.mark.slow
@pytest.mark.parametrize("ranks", ["hang"], indirect=True)
def test_a_rank_that_waits_for_ever_ends_the_job_and_its_place_is_named(ranks):
    messages = [process.communicate(timeout=120)[1] for process in ranks]
    assert [process.returncode for process in ranks] == [1, 1]
    message = "".join(messages)  # of the second as well: the first had the store
    assert "no rank has got on" in message and f"{ranks[1].pid}) at tests/train/test_watch.py:" in message


@pytest.mark.slow
@pytest.mark.parametrize("ranks", ["work", "child", "alone"], indirect=True)
def test_a_rank_that_works_or_is_alone_is_left_alone(ranks):
    for process in ranks:
        _, message = process.communicate(timeout=240)
        assert process.returncode == 0, message


class Lost:
    """A store whose connection is gone."""

    def set(self, *_):
        raise RuntimeError("Broken pipe")


def test_a_rank_whose_connection_is_lost_ends_when_it_no_longer_gets_on(monkeypatch):
    one, said = object.__new__(watch.Watch), []
    one.looks = one.idle = 0
    one.lost = False
    one.store, one.name, one.minutes, one.main = Lost(), "rank 1", MINUTES, threading.get_ident()
    working = iter([True] * 50)  # for more looks than a rank may hang
    one._sleep, one._end = lambda: False, said.append
    one._tell = lambda: one.store.set("0", "{}")
    monkeypatch.setattr(one, "_measure", lambda: setattr(one, "idle", 0 if next(working, False) else one.idle + 1))
    one._watch()
    assert next(working, None) is None and one.idle == watch.LOOKS
    assert said[0].startswith("rank 1 at ") and said[0].endswith("for 0.1 minutes, without a connection")
    one._guard()
    assert len(said) == 1


def test_no_thread_is_in_the_store_when_the_process_ends():
    """It would abort the process: see `Watch._leave`."""
    one, said, inside = object.__new__(watch.Watch), [], threading.Event()

    class Slow:
        def set(self, key, value):
            inside.set()
            time.sleep(0.2)
            said.append(value)

    one.leaving, one.store, one.rank, one.minutes = threading.Event(), Slow(), 0, MINUTES
    one._tell = lambda: one.store.set("0", "{}")
    one.threads = [threading.Thread(target=one._watch, daemon=True)]
    one.threads[0].start()
    inside.wait()
    one._leave()
    assert said == ["{}", '{"left": true}'] and not one.threads[0].is_alive()


def test_what_looking_reads_does_not_count_as_work(tmp_path, monkeypatch):
    """The list of children is found in a file of every process: megabytes on a machine of thousands."""
    (tmp_path / "proc").write_bytes(bytes(3 << 20))
    one = object.__new__(watch.Watch)
    one.process, one.scanned, one.minutes = psutil.Process(), 0, MINUTES
    monkeypatch.setattr(one.process, "children", lambda **_: (tmp_path / "proc").read_bytes()[:0] or [])
    before = one._effort()[0]
    assert one._effort()[0] - before < 1
    (tmp_path / "proc").read_bytes()  # by the main thread
    assert one._effort()[0] - before > 3


@pytest.mark.parametrize("value", ["0", "-3", "soon"])
def test_the_minutes_are_a_positive_number(value, monkeypatch):
    monkeypatch.setenv("PHYSALIGN_TIMEOUT_MINUTES", value)
    with pytest.raises(ValueError, match=f"PHYSALIGN_TIMEOUT_MINUTES='{value}': give the minutes"):
        watch.timeout_minutes()


if __name__ == "__main__":
    rank(sys.argv[1], Path(sys.argv[2]))
