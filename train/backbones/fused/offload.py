"""What blocks keep for backward, on its way to host memory and back while other blocks compute.

A block's kept activations are written once and read once, seconds later: over PCIe both copies hide behind the blocks
between, where recomputing them would cost as much time as the block's products. `HostStore.send` starts the copy out,
which has until the next one to end; `fetch` waits for the copy back, which `prefetch` has started one block earlier.
What was sent last is still there when backward begins, and is not copied back.
"""

import warnings
import weakref

import torch
from torch import Tensor

from train.host_memory import GIB, HOST_SHARE, Copier, host_memory, local_processes, locked

ALIGNMENT = 4096  # bytes


def affordable(gib: float, taken: int = 0) -> float:
    """At most `gib` GiB for this process, for the host's share HOST_SHARE of its memory without the `taken` bytes that
    its processes have locked before; warns where that is less."""
    processes = local_processes()
    share = max(0.0, (HOST_SHARE * host_memory() - taken) / GIB / processes)
    if gib <= share:
        return gib
    warnings.warn(
        f"train.offload_gib={gib:g} for each of {processes} processes is more than this job may have here:"
        f" {share:.0f} GiB each are used, and steps recompute more",
        stacklevel=2,
    )
    return share


class HostStore:
    """Page-locked host memory of at most `capacity` bytes, for tensors of one GPU; what was given back is used again,
    for tensors of any size: passes of one step keep different things."""

    def __init__(self, capacity: int, device: torch.device):
        self.copier = Copier(device)
        self.memory = locked(capacity, device)
        self.free = [(0, self.memory.numel())]  # (start, end) of what is free, in order, with something between any two
        self.last: weakref.ref[Parcel] | None = None

    def send(self, tensors: list[Tensor]) -> "Parcel | None":
        """Start the copy to the host; None, with a warning, where the memory is used up."""
        regions = []
        for tensor in tensors:
            region = self._take(tensor.nbytes)
            if region is None:
                self._give_back(regions)
                warnings.warn("train.offload_gib is used up: blocks keep the rest on the device", stacklevel=2)
                return None
            regions.append(region)
        if (newest := self.newest()) is not None:
            newest.leave()
        parcel = Parcel(self, tensors, regions)
        self.last = weakref.ref(parcel)
        return parcel

    def newest(self) -> "Parcel | None":
        """What was sent last and is still wanted: what backward needs first."""
        return self.last() if self.last is not None else None

    def _take(self, size: int) -> tuple[int, int] | None:
        """(start, end) of the first free region of at least `size` bytes, cut to it."""
        size = -(-size // ALIGNMENT) * ALIGNMENT
        for index, (start, end) in enumerate(self.free):
            if start + size <= end:
                self.free[index : index + 1] = [(start + size, end)] if start + size < end else []
                return start, start + size
        return None

    def _give_back(self, regions: list[tuple[int, int]]) -> None:
        merged: list[tuple[int, int]] = []
        for start, end in sorted([*self.free, *regions]):
            if merged and merged[-1][1] == start:
                start = merged.pop()[0]
            merged.append((start, end))
        self.free = merged


class Parcel:
    """Tensors of one block in the host's memory."""

    def __init__(self, store: HostStore, tensors: list[Tensor], regions: list[tuple[int, int]]):
        self.store, self.regions = store, regions
        self.leaving: list[Tensor] = tensors
        self.like = [(tensor.shape, tensor.stride(), tensor.dtype) for tensor in tensors]
        self.arrived: list[Tensor] | None = None
        self.event = store.copier.copy(zip(self._regions(tensors), tensors, strict=True))

    def _regions(self, tensors: list[Tensor]) -> list[Tensor]:
        """The regions as tensors laid out as `tensors` are, so that each copy is one piece."""
        flat = [
            self.store.memory[start : start + tensor.nbytes].view(tensor.dtype)
            for tensor, (start, _) in zip(tensors, self.regions, strict=True)
        ]
        return [part.as_strided(like.shape, like.stride()) for part, like in zip(flat, tensors, strict=True)]

    def leave(self) -> None:
        """Let go of the device's tensors once they are copied; work queued from here on may use their memory."""
        if self.leaving:
            self.store.copier.wait(self.event)
            self.leaving = []

    def prefetch(self) -> None:
        """Start the copy back, behind the work that is queued now; none for what has not left."""
        if self.arrived is not None:
            return
        if self.leaving:
            self.arrived, self.leaving = self.leaving, []
            return
        copier = self.store.copier
        self.arrived = [torch.empty_strided(*like[:2], dtype=like[2], device=copier.device) for like in self.like]
        self.event = copier.copy(zip(self.arrived, self._regions(self.arrived), strict=True))

    def fetch(self) -> list[Tensor]:
        """The tensors on the device, for work queued from here on."""
        self.prefetch()
        self.store.copier.wait(self.event)
        return self.arrived

    def __del__(self):
        self.store._give_back(self.regions)
