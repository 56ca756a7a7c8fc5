"""How experiments end: the commands that they started, and they themselves when their --minutes are over."""

import argparse
import math
import subprocess
import time
from collections.abc import Sequence

GRACE = 30.0  # seconds in which a command that was asked to stop saves what it has
UNFINISHED = 75  # exit status where the time was over before the work was done: EX_TEMPFAIL of sysexits.h
OPTION = f"stop after so many; exit status {UNFINISHED}: not finished, run the same command again"


def add_minutes(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--minutes", type=float, default=math.inf, help=OPTION)


def deadline(began: float, minutes: float) -> float:
    """When to stop, by time.monotonic(). ValueError for minutes in which nothing could be done."""
    if minutes <= 1:
        raise ValueError(f"--minutes={minutes:g}: give more than 1, for half a minute is kept for stopping")
    return began + 60 * minutes - GRACE


def unfinished(began: float) -> int:
    """Say that the time was over before the work was done; returns the exit status."""
    minutes = (time.monotonic() - began) / 60
    print(f"stopped after {minutes:.1f} min, not finished: run the same command again")
    return UNFINISHED


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
