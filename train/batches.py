"""The groups of a run, prepared in loader processes, in the order of the global stream."""

import atexit
import os
import signal
import time
from collections.abc import Callable
from functools import partial
from multiprocessing.sharedctypes import RawValue
from multiprocessing.util import Finalize
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from train import entry, parallel
from train.groups import GroupSet, GroupStream, Sample, positions
from train.watch import timeout_minutes

Tensors = dict[str, Tensor]


class Prepared(Dataset):
    """The prepared group of every position, or the error for which there is none."""

    def __init__(self, config: Any, stream: GroupStream, prepare: Callable[[Any, Sample], Tensors]):
        self.config, self.stream, self.prepare = config, stream, prepare

    def __getitem__(self, position: int) -> Tensors | Exception:
        try:
            return self.prepare(self.config, self.stream[position])
        except (ValueError, OSError) as error:
            if not entry.is_worded(error):
                raise  # a fault in the code, whose place only its traceback says
            return error  # raised by `Batches`: from a loader's process PyTorch would hand on a page of text


def _collate(samples: list[Tensors | Exception]) -> Tensors | Exception:
    return next((sample for sample in samples if isinstance(sample, Exception)), None) or default_collate(samples)


def build_loader(
    config: Any, groups: GroupSet, prepare: Callable[[Any, Sample], Tensors], *, start: int, rank: int, world: int
) -> DataLoader:
    """Endless loader of this rank's prepared groups from global position `start` on, in order."""
    stream = GroupStream(groups, config.seed, winner=config.objective.winner)
    leaving = RawValue("b", 0)  # shared with the loader's processes
    # Set at exit, before multiprocessing ends the processes by SIGTERM.
    Finalize(None, setattr, args=(leaving, "value", 1), exitpriority=0)
    return DataLoader(
        Prepared(config, stream, prepare),
        sampler=positions(start, rank, world),
        batch_size=config.train.pairs_per_pass,
        collate_fn=_collate,
        num_workers=config.train.num_workers,
        pin_memory=torch.cuda.is_available(),
        persistent_workers=config.train.num_workers > 0,
        timeout=60 * timeout_minutes() if config.train.num_workers else 0,
        worker_init_fn=partial(_outlive_stop_signal, leaving),
    )


class Batches:
    """A loader's iterator that is closed at exit; else, after an error, PyTorch waits five seconds for each of its
    processes. `complete` may add to a batch what the loader's processes cannot. A group that one rank cannot read
    ends all of them."""

    def __init__(self, loader: DataLoader, device: torch.device, complete: Callable[[Tensors], Tensors] | None = None):
        self._iterator, self._device, self._complete = iter(loader), device, complete
        self._waited = 0.0
        atexit.register(self.close)  # runs before what PyTorch registered

    def __next__(self) -> Tensors:
        start = time.perf_counter()
        batch = next(self._iterator)
        self._waited += time.perf_counter() - start
        parallel.stop_together(batch if isinstance(batch, Exception) else None, self._device)
        return self._complete(batch) if self._complete else batch

    def waited(self) -> float:
        """Seconds that the trainer stood still for the loader since this was last asked."""
        seconds, self._waited = self._waited, 0.0
        return seconds

    def close(self) -> None:
        self._iterator = None


def _outlive_stop_signal(leaving: Any, _worker: int) -> None:
    """In a loader process: a scheduler signals every process, but the trainer's last step still needs its groups."""
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0) if leaving.value else None)
