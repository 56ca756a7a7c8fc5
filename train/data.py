"""Preference groups on their way into training: the order of the stream, loader processes, batches.

Training draws from a stream that is a pure function of one integer, the global sample position (`assignment`): it is
the same on any number of ranks and workers, and resuming needs only that integer.
"""

import atexit
import hashlib
import itertools
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from multiprocessing.sharedctypes import RawValue
from multiprocessing.util import Finalize
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from train import entry, parallel
from train.groups import Group, GroupSet
from train.timesteps import Share, Turns
from train.watch import timeout_minutes

Tensors = dict[str, Tensor]


@dataclass(eq=False)
class Sample:
    position: int  # in the global stream
    group: Group
    loser_index: int  # the loser of this pair, in range(len(group.losers)); -1 in a group without losers
    share: Share | None = None  # of the expert that serves its step, where both train


# ---- the stream ------------------------------------------------------------------------------------------------------


def assignment(position: int, num_losers: Sequence[int], seed: int) -> tuple[int, int]:
    """(group index, loser index) that the global sample `position` trains on. A pure function.

    num_losers: M of every group; where it is 0 the loser index is -1. Epoch e = position // N visits the N groups in an
    order of its own, and gives group g the loser at place e % M_g of a permutation drawn anew every M_g epochs (a
    cycle): g meets every loser once a cycle.
    """
    epoch, place = divmod(position, len(num_losers))
    group = int(_epoch_order(len(num_losers), seed, epoch)[place])
    if num_losers[group] == 0:
        return group, -1
    cycle, turn = divmod(epoch, num_losers[group])
    return group, int(_permutation(num_losers[group], f"losers {seed} {group} {cycle}")[turn])


@lru_cache(maxsize=4)  # a stream stays in one epoch for N positions
def _epoch_order(num_groups: int, seed: int, epoch: int) -> np.ndarray:
    return _permutation(num_groups, f"groups {seed} {epoch}")


def _permutation(length: int, name: str) -> np.ndarray:
    """A permutation of range(length) that `name` alone decides. It sorts raw PCG64 output, which numpy promises to
    keep, unlike `Generator.permutation`: a run resumed under another numpy continues the same stream."""
    seed = int.from_bytes(hashlib.sha256(name.encode("utf-8")).digest(), "big")  # 256 bits, `seed_of` has 63
    return np.argsort(np.random.PCG64(seed).random_raw(length), kind="stable")


def positions(start: int, rank: int, world: int) -> Iterator[int]:
    """The endless global positions of one rank: start + rank, start + rank + world, ...

    start: samples already consumed by all ranks together (0 in a new run); the only state that resuming needs.
    """
    return itertools.count(start + rank, world)


class GroupStream(torch.utils.data.Dataset):
    """The endless stream of training samples, indexed by global position:

        DataLoader(GroupStream(groups, seed), sampler=positions(start, rank, world), batch_size=None, num_workers=k)

    yields `Sample`s in order for any k (collation is the caller's). It has no length.

    seed: of the order. winner: "real", or "generated" for the baseline of `generated_winner`, for which every group
    needs two losers (ValueError naming the first that has not).
    """

    def __init__(self, groups: GroupSet, seed: int, *, winner: str = "real"):
        self.groups, self.seed, self.winner = groups, seed, winner
        taken = 1 if winner == "generated" else 0
        self._num_losers = [groups.num_losers(index) - taken for index in range(len(groups))]
        if taken and min(self._num_losers) < 1:
            index = self._num_losers.index(min(self._num_losers))
            raise ValueError(
                f"winner 'generated' needs at least 2 losers a group, but group {groups.key(index)!r} in "
                f"{groups.folder} has {groups.num_losers(index)}; generate more losers or use winner 'real'"
            )

    def __getitem__(self, position: int) -> Sample:
        group_index, loser_index = assignment(position, self._num_losers, self.seed)
        group = self.groups[group_index]
        return Sample(position, generated_winner(group) if self.winner == "generated" else group, loser_index)

    def key(self, position: int) -> str:
        """Of the group that `position` trains on; nothing is read."""
        return self.groups.key(assignment(position, self._num_losers, self.seed)[0])


def generated_winner(group: Group) -> Group:
    """The group with its best loser (mean of both scores, the first on ties) as the winner, no longer among the losers.

    This is VideoDPO's setting: all clips come from the model. `extra` is dropped, for it describes the real winner.
    """
    infos = group.losers_info
    best = max(range(len(infos)), key=lambda number: infos[number].semantic + infos[number].physical)
    rest = [number for number in range(len(infos)) if number != best]
    return replace(
        group,
        source=f"generated, seed {infos[best].seed}",
        winner=group.losers[best],
        losers=group.losers[rest],
        losers_info=[infos[number] for number in rest],
        extra={},
    )


# ---- loading ---------------------------------------------------------------------------------------------------------


class Prepared(Dataset):
    """The prepared group of every position, or the error for which there is none."""

    def __init__(
        self, config: Any, stream: GroupStream, prepare: Callable[[Any, Sample], Tensors], turns: Turns | None = None
    ):
        self.config, self.stream, self.prepare, self.turns = config, stream, prepare, turns

    def __getitem__(self, position: int) -> Tensors | Exception:
        try:
            sample = self.stream[position]
            if self.turns is not None:
                sample.share = self.turns.of_sample(position)
            return self.prepare(self.config, sample)
        except (ValueError, OSError) as error:
            if not entry.is_worded(error):
                raise  # a fault in the code, whose place only its traceback says
            return error  # raised by `Batches`: from a loader's process PyTorch would hand on a page of text


def _collate(samples: list[Tensors | Exception]) -> Tensors | Exception:
    return next((sample for sample in samples if isinstance(sample, Exception)), None) or default_collate(samples)


def build_loader(
    config: Any,
    groups: GroupSet,
    prepare: Callable[[Any, Sample], Tensors],
    turns: Turns | None = None,
    *,
    start: int,
    rank: int,
    world: int,
) -> DataLoader:
    """Endless loader of this rank's prepared groups from global position `start` on, in order; `turns` where both
    experts train."""
    stream = GroupStream(groups, config.seed, winner=config.objective.winner)
    leaving = RawValue("b", 0)  # shared with the loader's processes
    # Set at exit, before multiprocessing ends the processes by SIGTERM.
    Finalize(None, setattr, args=(leaving, "value", 1), exitpriority=0)
    return DataLoader(
        Prepared(config, stream, prepare, turns),
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
