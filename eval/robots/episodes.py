"""Episodes in processes of their own, step by step: a simulator that crashes or hangs costs one episode.

    with processes(8) as simulators:
        simulators[0].begin("open", task="push", seed=3, colour="red", height=96, width=96)
        simulators[0].result()

The commands are the methods of `eval.robots.serve.Episode`.
"""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from eval.robots.simulators import COMMAND, TIMEOUT, Simulators


class EpisodeProcess:
    """One simulator, for one episode after another; a process that failed is replaced. timeout: seconds a command, the
    start of the process included."""

    def __init__(self, command: Sequence[str] = COMMAND, timeout: float = TIMEOUT):
        self._simulators, self._job = Simulators(1, command=command, timeout=timeout), ""

    def begin(self, command: str, **given: Any) -> None:
        """Give a command, so that several processes can be at work. `result` waits for its answer."""
        self._job = json.dumps({"command": command, **given})
        self._simulators.begin(self._job)

    def result(self) -> dict[str, np.ndarray]:
        """Raises SimulatorError where the command failed, its process ended, or its time is over."""
        assert self._job, "nothing was begun"
        return self._simulators.result(self._job)

    def close(self) -> None:
        self._simulators.close()


@contextmanager
def processes(count: int) -> Iterator[list[EpisodeProcess]]:
    """Started when they are needed; they end with the block."""
    made = [EpisodeProcess() for _ in range(count)]
    try:
        yield made
    finally:
        for process in made:
            process.close()
