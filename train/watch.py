"""Ends a job that a rank holds up, and says which.

Ranks wait for each other without end: one may write clips, download weights or build for hours. So a thread of each
rank tells all others, by torch's store, whether its process gets on. It does where its main thread runs Python, or
it and its children read and write, or its children compute. The job ends when

- a rank is silent (its process is stopped, or its machine gone), or
- no rank gets on: all wait for one that does not come,

for PHYSALIGN_TIMEOUT_MINUTES (30). A rank that works keeps the others waiting as long as it takes. Time is counted in
looks of this process, so that a job that was suspended as a whole goes on.
"""

import atexit
import contextlib
import json
import os
import signal
import socket
import sys
import threading
from _thread import interrupt_main
from pathlib import Path

import psutil
import torch.distributed as dist

LOOKS = 20  # within the timeout
ROOT = Path(__file__).parents[1]


def timeout_minutes() -> float:
    """PHYSALIGN_TIMEOUT_MINUTES; ValueError unless it is a positive number."""
    text = os.environ.get("PHYSALIGN_TIMEOUT_MINUTES", "30")
    try:
        minutes = float(text)
    except ValueError:
        minutes = 0
    if not minutes > 0:
        raise ValueError(f"PHYSALIGN_TIMEOUT_MINUTES={text!r}: give the minutes that a rank may hang, such as 30")
    return minutes


def start() -> None:
    """Watch from now on, where several ranks were launched. Called on the main thread, once the ranks are connected."""
    minutes = timeout_minutes()
    if dist.is_initialized() and dist.get_world_size() > 1 and not Watch.started:
        Watch(minutes)


class Watch:
    started = False

    def __init__(self, minutes: float):
        Watch.started = True
        self.minutes, self.rank, self.world = minutes, dist.get_rank(), dist.get_world_size()
        # A connection of its own: operations on one wait for each other.
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = dist.TCPStore(address, port, is_master=False, wait_for_workers=False)
        self.store = dist.PrefixStore("watch", store)
        self.name = f"rank {self.rank} (host {socket.gethostname()}, process {os.getpid()})"
        self.process, self.main = psutil.Process(), threading.main_thread().ident
        self.looks = self.idle = self.scanned = 0
        self.moved, self.effort = False, self._effort()
        self.leaving, self.lost = threading.Event(), False
        self.last: list[str] = [""] * self.world  # what each rank said
        self.unchanged = [0] * self.world  # looks since a rank said anything new
        # Delivered to the main thread when it next runs Python, and ignored by everything else.
        signal.signal(signal.SIGURG, self._move)
        self.threads = [threading.Thread(target=target, daemon=True) for target in (self._watch, self._guard)]
        for thread in self.threads:
            thread.start()
        atexit.register(self._leave)

    def _move(self, *_) -> None:
        self.moved = True

    def _leave(self) -> None:
        """End the threads and tell the other ranks. A thread that returns from the store while the interpreter ends
        would abort the process (SIGABRT, "terminate called without an active exception")."""
        self.leaving.set()
        for thread in self.threads:
            thread.join(timeout=10)
        if not any(thread.is_alive() for thread in self.threads):  # else the store's machine is gone
            with contextlib.suppress(RuntimeError):  # the store may have gone with its host
                self.store.set(str(self.rank), json.dumps({"left": True}))

    def _sleep(self) -> bool:
        """Until the next look; whether this process is at its end."""
        return self.leaving.wait(60 * self.minutes / LOOKS)

    def _watch(self) -> None:
        with contextlib.suppress(RuntimeError):  # the store's host has ended, and with it the job, or cannot be reached
            while True:
                self._tell()
                if self._sleep():
                    return
                self._look()
                self.looks += 1
        self.lost = True  # from here on this rank sees itself alone
        while self.idle < LOOKS:
            if self._sleep():
                return
            self._measure()
        self._end(f"{self.name} at {self._place()} has not got on for {self.minutes:g} minutes, without a connection")

    def _guard(self) -> None:
        """The store itself may be on a machine that is gone: then the other thread waits for it."""
        before = silent = 0
        while silent < LOOKS:
            if self._sleep() or self.lost:
                return
            silent = silent + 1 if self.looks == before else 0
            before = self.looks
        self._end(f"{os.environ['MASTER_ADDR']}, where rank 0 is, has not answered for {self.minutes:g} minutes")

    def _measure(self) -> None:
        """Count the looks since this rank last got on."""
        effort = self._effort()
        working = any(now - before > 1 for now, before in zip(effort, self.effort, strict=True))
        self.idle = 0 if self.moved or working else self.idle + 1
        self.moved, self.effort = False, effort
        interrupt_main(signal.SIGURG)

    def _tell(self) -> None:
        self._measure()
        message = {"look": self.looks, "idle": self.idle, "name": self.name, "at": self._place()}
        self.store.set(str(self.rank), json.dumps(message))

    def _look(self) -> None:
        """Read what all ranks said; end the job where one is silent or none gets on."""
        keys = map(str, range(self.world))
        said = [self.store.get(key).decode() if self.store.check([key]) else "" for key in keys]
        self.unchanged = [
            count + 1 if now == before else 0
            for count, now, before in zip(self.unchanged, said, self.last, strict=True)
        ]
        self.last = said
        ranks = {rank: json.loads(text) for rank, text in enumerate(said) if text}
        here = {rank: state for rank, state in ranks.items() if "left" not in state}
        if set(ranks) == {*range(self.world)} and set(here) <= {self.rank}:
            return  # nobody waits any more
        silent = [r for r, count in enumerate(self.unchanged) if count >= LOOKS and (r in here or r not in ranks)]
        if silent:
            names = ", ".join(here[r]["name"] + f" at {here[r]['at']}" if r in here else f"rank {r}" for r in silent)
            self._end(f"{names}: stopped or cut off, not a sign of life for {self.minutes:g} minutes")
        if here and min(state["idle"] for state in here.values()) >= LOOKS:
            places: dict[str, list[dict]] = {}
            for state in here.values():
                places.setdefault(state["at"], []).append(state)
            parts = [
                states[0]["name"] + (f" and {len(states) - 1} more" if len(states) > 1 else "") + f" at {at}"
                for at, states in sorted(places.items(), key=lambda item: len(item[1]))
            ]
            self._end(f"no rank has got on for {self.minutes:g} minutes: {'; '.join(parts)}")

    def _end(self, reason: str) -> None:
        print(
            f"{reason}. The job ends here (PHYSALIGN_TIMEOUT_MINUTES={self.minutes:g}); run the same command again to"
            " continue.",
            file=sys.stderr,
            flush=True,
        )
        os._exit(1)

    def _place(self) -> str:
        """Where the main thread is in our code."""
        frame, place = sys._current_frames().get(self.main), "its end"
        while frame is not None:
            path = Path(frame.f_code.co_filename)
            if path.is_relative_to(ROOT) and "site-packages" not in path.parts:
                return f"{path.relative_to(ROOT)}:{frame.f_lineno} ({frame.f_code.co_name})"
            frame = frame.f_back
        return place

    def _effort(self) -> tuple[float, float]:
        """MiB that this process and its children have read and written, and tenths of a look that the children have
        computed. What is read here does not count: finding the children reads of every process on the machine."""
        own = self._bytes(self.process)
        moved, computed = float(own - self.scanned), 0.0
        for process in self.process.children(recursive=True):
            with contextlib.suppress(psutil.Error):
                moved += self._bytes(process)
                times = process.cpu_times()
                computed += times.user + times.system
        self.scanned += self._bytes(self.process) - own
        return moved / 2**20, computed / (6 * self.minutes / LOOKS)

    @staticmethod
    def _bytes(process: psutil.Process) -> int:
        """That it has read and written; 0 where the system does not count them, as some sandboxes' kernels do not."""
        if not psutil.LINUX or not hasattr(process, "io_counters"):
            return 0
        counters = process.io_counters()
        return counters.read_chars + counters.write_chars
