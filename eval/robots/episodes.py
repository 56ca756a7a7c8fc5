"""Episodes in processes of their own, step by step: a simulator that crashes or hangs costs one episode.

    with processes(8) as simulators:
        simulators[0].begin("open", task="push", seed=3, colour="red", height=96, width=96)
        simulators[0].result()

The commands are the methods of `eval.robots.serve.Episode`.
"""

import json
import selectors
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from eval.robots.simulators import COMMAND, TIMEOUT, SimulatorError, SimulatorProcess


class EpisodeProcess:
    """One simulator, for one episode after another; a process that failed is replaced. timeout: seconds a command, the
    start of the process included."""

    def __init__(self, command: Sequence[str] = COMMAND, timeout: float = TIMEOUT):
        self.command, self.timeout = command, timeout
        self._process: SimulatorProcess | None = None

    def begin(self, command: str, **given: Any) -> None:
        """Give a command, so that several processes can be at work. `result` waits for its answer."""
        self._process = self._process or SimulatorProcess(self.command)
        self._process.begin(json.dumps({"command": command, **given}), self.timeout)

    def result(self) -> dict[str, np.ndarray]:
        """Raises SimulatorError where the command failed, its process ended, or its time is over."""
        assert self._process is not None, "nothing was begun"
        try:
            arrays = self._wait(self._process)
        except EOFError as error:
            self.close()
            raise SimulatorError(str(error)) from error
        if "error" in arrays:
            raise SimulatorError(str(arrays["error"]))
        return arrays

    def _wait(self, process: SimulatorProcess) -> dict[str, np.ndarray]:
        with selectors.DefaultSelector() as selector:
            selector.register(process.process.stdout, selectors.EVENT_READ)
            # A second at least: an answer may lie there since long, or the half of it that a pipe holds.
            while selector.select(max(1.0, process.deadline - time.monotonic())):
                if (arrays := process.receive()) is not None:
                    return arrays
        raise EOFError(f"it was not done after {self.timeout:g} s")

    def close(self) -> None:
        if self._process is not None:
            self._process.end()
            self._process = None


@contextmanager
def processes(count: int) -> Iterator[list[EpisodeProcess]]:
    """Started when they are needed; they end with the block."""
    made = [EpisodeProcess() for _ in range(count)]
    try:
        yield made
    finally:
        for process in made:
            process.close()
