"""How experiments end the commands that they started."""

import subprocess
import time
from collections.abc import Sequence

GRACE = 30.0  # seconds in which a command that was asked to stop saves what it has


def end(processes: Sequence[subprocess.Popen], grace: float = GRACE) -> None:
    """SIGTERM, and SIGKILL for those that are not over after `grace` seconds."""
    for process in processes:
        process.terminate()
    until = time.monotonic() + grace
    for process in processes:
        try:
            process.wait(max(0.0, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
