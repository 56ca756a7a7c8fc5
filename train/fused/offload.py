"""What blocks keep for backward, on its way to host memory and back while other blocks compute.

A block's kept activations are written once and read once, seconds later: over PCIe both copies hide behind the blocks
between, where recomputing them would cost as much time as the block's products. `HostStore.send` starts the copy out,
which has until the next one to end; `fetch` waits for the copy back, which `prefetch` has started one block earlier.
What was sent last is still there when backward begins, and is not copied back.
"""

import os
import warnings
import weakref
from pathlib import Path

import psutil
import torch
from torch import Tensor

from train.backbones.host_weights import lock_pages
from train.fused.memory import GIB

ALIGNMENT = 4096  # bytes
HOST_SHARE = 0.8  # of the host's memory that all of its processes may lock together


def host_memory(groups: Path = Path("/proc/self/cgroup"), mount: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes that this host's processes of this job may use: the machine's memory, or the least limit of a control group
    that they are in, as Slurm's --mem and a pod's limit set it."""
    limits = [psutil.virtual_memory().total]
    for line in groups.read_text(encoding="utf-8").splitlines() if groups.is_file() else []:
        _, kinds, place = line.split(":", 2)
        names = {"": ("", "memory.max"), "memory": ("memory", "memory.limit_in_bytes")}.get(kinds)  # versions 2 and 1
        if names is None:
            continue
        folder = mount / names[0] / place.lstrip("/")
        for path in (folder, *folder.parents):  # a group is within its parents' limits
            text = (path / names[1]).read_text(encoding="utf-8").strip() if (path / names[1]).is_file() else "max"
            limits += [] if text == "max" else [int(text)]
    return min(limits)


def affordable(gib: float) -> float:
    """At most `gib` GiB for this process, for the host's share HOST_SHARE of its memory; warns where that is less."""
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    share = HOST_SHARE * host_memory() / GIB / processes
    if gib <= share:
        return gib
    warnings.warn(
        f"train.offload_gib={gib:g} for each of {processes} processes is more than this job may have here:"
        f" {share:.0f} GiB each are used, and steps recompute more",
        stacklevel=2,
    )
    return share


class HostStore:
    """Page-locked host memory of at most `capacity` bytes, for tensors of one GPU; regions are used again."""

    def __init__(self, capacity: int, device: torch.device):
        self.device = device
        self.stream = torch.cuda.Stream(device)
        self.memory = torch.empty(capacity, dtype=torch.uint8)
        lock_pages(self.memory)
        self.free: dict[int, list[int]] = {}  # offsets by size
        self.used = 0
        self.last: weakref.ref[Parcel] | None = None

    def send(self, tensors: list[Tensor]) -> "Parcel | None":
        """Start the copy to the host; None where the memory is used up."""
        regions = []
        for tensor in tensors:
            region = self._take(tensor.nbytes)
            if region is None:
                self._give_back(regions)
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
        """(offset, rounded size) of a free region."""
        size = -(-size // ALIGNMENT) * ALIGNMENT
        if self.free.get(size):
            return self.free[size].pop(), size
        if self.used + size > self.memory.numel():
            return None
        self.used += size
        return self.used - size, size

    def _give_back(self, regions: list[tuple[int, int]]) -> None:
        for offset, size in regions:
            self.free.setdefault(size, []).append(offset)


class Parcel:
    """Tensors of one block in the host's memory."""

    def __init__(self, store: HostStore, tensors: list[Tensor], regions: list[tuple[int, int]]):
        self.store, self.regions = store, regions
        self.leaving: list[Tensor] = tensors
        self.like = [(tensor.shape, tensor.stride(), tensor.dtype) for tensor in tensors]
        self.arrived: list[Tensor] | None = None
        store.stream.wait_stream(torch.cuda.current_stream(store.device))
        with torch.cuda.stream(store.stream):
            for tensor, (offset, _) in zip(tensors, regions, strict=True):
                self._host(offset, tensor).copy_(tensor, non_blocking=True)
            self.event = store.stream.record_event()

    def _host(self, offset: int, tensor: Tensor) -> Tensor:
        """The region as a tensor laid out as `tensor` is, so that a copy is one piece."""
        flat = self.store.memory[offset : offset + tensor.nbytes].view(tensor.dtype)
        return flat.as_strided(tensor.shape, tensor.stride())

    def leave(self) -> None:
        """Let go of the device's tensors once they are copied; work queued from here on may use their memory."""
        if self.leaving:
            torch.cuda.current_stream(self.store.device).wait_event(self.event)
            self.leaving = []

    def prefetch(self) -> None:
        """Start the copy back, behind the work that is queued now; none for what has not left."""
        if self.arrived is not None:
            return
        if self.leaving:
            self.arrived, self.leaving = self.leaving, []
            return
        device = self.store.device
        self.arrived = [torch.empty_strided(*like[:2], dtype=like[2], device=device) for like in self.like]
        self.store.stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(self.store.stream):
            for tensor, (offset, _) in zip(self.arrived, self.regions, strict=True):
                tensor.copy_(self._host(offset, tensor), non_blocking=True)
            self.event = self.store.stream.record_event()

    def fetch(self) -> list[Tensor]:
        """The tensors on the device, for work queued from here on."""
        self.prefetch()
        torch.cuda.current_stream(self.store.device).wait_event(self.event)
        return self.arrived

    def __del__(self):
        self.store._give_back(self.regions)
