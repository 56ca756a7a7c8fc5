"""Demonstrations from processes of their own: a simulator that crashes or hangs costs one clip.

    simulators = shared()
    simulators.get(listed, video, then=[...])      a Demonstration; those named in `then` are begun meanwhile

Raises SimulatorError for a demonstration that failed; the process is replaced, and the next one is made as ever.
"""

import atexit
import io
import json
import os
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from functools import cache
from multiprocessing.connection import wait
from pathlib import Path

import numpy as np

from eval.robots.demonstrations import Demonstration, Listed
from train.clips import VideoConfig

TIMEOUT = 120.0  # seconds for one demonstration, the start of the process included
COMMAND = (sys.executable, "-m", "eval.robots.serve")
KEPT = 4  # finished demonstrations for each process that nobody has asked for yet


class SimulatorError(RuntimeError):
    """What the process of a demonstration said or did."""


class SimulatorProcess:
    """One simulator. Its pipe is read when it has something, so that several can be waited for."""

    def __init__(self, command: Sequence[str]):
        root = str(Path(__file__).parents[2])
        paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
        threads = {"OMP_NUM_THREADS": "1", "LP_NUM_THREADS": "1"}  # the second of Mesa's software renderer
        environment = {**os.environ, **threads, "PYTHONPATH": os.pathsep.join(paths)}
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, env=environment)
        self.job, self.deadline, self._received = "", 0.0, bytearray()

    def begin(self, job: str, timeout: float) -> None:
        self.job, self.deadline, self._received = job, time.monotonic() + timeout, bytearray()
        try:
            self.process.stdin.write(job.encode() + b"\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # it has died: `receive` finds the end of its output

    def receive(self) -> dict[str, np.ndarray] | None:
        """What it answers, once it is there; None before. Raises EOFError where the process has ended."""
        part = os.read(self.process.stdout.fileno(), 1 << 20)
        if not part:
            raise EOFError(f"its process ended with status {self.process.wait()}")
        self._received += part
        if len(self._received) < 8 or len(self._received) < 8 + struct.unpack_from("<Q", self._received)[0]:
            return None
        with np.load(io.BytesIO(bytes(self._received[8:]))) as arrays:
            return dict(arrays)

    def end(self) -> None:
        self.process.kill()
        self.process.wait()
        with suppress(BrokenPipeError):  # of a job that it did not live to read
            self.process.stdin.close()
        self.process.stdout.close()


class Simulators:
    """`count` processes, started when they are needed. command: of one, as `eval.robots.serve`."""

    def __init__(self, count: int, *, command: Sequence[str] = COMMAND, timeout: float = TIMEOUT):
        self.count, self.command, self.timeout = count, command, timeout
        self._processes: list[SimulatorProcess] = []
        self._done: dict[str, dict[str, np.ndarray] | SimulatorError] = {}  # by job, the oldest first
        self._lock = threading.Lock()

    def get(
        self, listed: Listed, video: VideoConfig, *, then: Sequence[Listed] = (), **options: str | float
    ) -> Demonstration:
        """options: of `demonstrate`."""
        wanted, *others = (
            json.dumps({"listed": asdict(one), "video": asdict(video), "options": options}) for one in (listed, *then)
        )
        return Demonstration(**self.result(wanted, others))

    def begin(self, job: str) -> None:
        """Give a job, so that several processes can be at work. `result` waits for its answer."""
        with self._lock:
            self._begin(job)

    def result(self, job: str, others: Sequence[str] = ()) -> dict[str, np.ndarray]:
        """What a process answers to a job; others are begun meanwhile. Raises SimulatorError where the job failed, its
        process ended, or its time is over."""
        with self._lock:
            while job not in self._done:
                for one in (job, *others):
                    self._begin(one)
                self._wait()
            found = self._done.pop(job)
            for one in list(self._done)[: -KEPT * self.count]:
                del self._done[one]
        if isinstance(found, SimulatorError):
            raise found
        return found

    def close(self) -> None:
        with self._lock:
            for process in self._processes:
                process.end()
            self._processes.clear()

    def _begin(self, job: str) -> None:
        """Give a job to an idle process, unless it is at work or done; or leave it."""
        if job in self._done or any(process.job == job for process in self._processes):
            return
        idle = next((process for process in self._processes if not process.job), None)
        if idle is None and len(self._processes) < self.count:
            idle = SimulatorProcess(self.command)
            self._processes.append(idle)
        if idle is not None:
            idle.begin(job, self.timeout)

    def _wait(self) -> None:
        """Until one of the processes has something to say or its time is over."""
        at_work = [process for process in self._processes if process.job]
        first = min(process.deadline for process in at_work)
        # A second at least: an answer may lie there since long, or the half of it that a pipe holds.
        ready = wait([process.process.stdout for process in at_work], max(1.0, first - time.monotonic()))
        for process in at_work:
            try:
                if process.process.stdout in ready:
                    arrays = process.receive()
                    if arrays is not None:
                        self._finish(process, arrays)
                elif process.deadline <= time.monotonic():
                    raise EOFError(f"it was not done after {self.timeout:g} s")
            except EOFError as error:
                self._processes.remove(process)
                process.end()
                self._finish(process, {"error": np.array(str(error))})

    def _finish(self, process: SimulatorProcess, arrays: dict[str, np.ndarray]) -> None:
        job, process.job = process.job, ""
        self._done[job] = SimulatorError(str(arrays["error"])) if "error" in arrays else arrays


@cache
def shared() -> Simulators:
    """This process's simulators, one per core."""
    simulators = Simulators(os.cpu_count() or 1)
    atexit.register(simulators.close)
    return simulators
