"""Host memory that a GPU copies from and to while it computes: how much a job may have, page-locked pieces of it, and
the copies.

Where the device is a CPU the same calls make plain copies, at once.
"""

import mmap
import os
import weakref
from collections.abc import Callable, Iterable
from pathlib import Path

import psutil
import torch
import torch.distributed as dist
from torch import Tensor

GIB = 2**30
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


def reserve(key: str, size: int, copies: int) -> int:
    """The bytes of `copies` pieces of `size`, which the recipe's `key` keeps on this host. ValueError where that is
    more than may be locked."""
    taken, most = copies * size, HOST_SHARE * host_memory()
    if taken > most:
        each = "" if copies == 1 else f", {size / GIB:.1f} GiB for each of {copies} processes,"
        raise ValueError(
            f"{key} keeps {taken / GIB:.1f} GiB of weights{each} in page-locked host memory, but this job may lock"
            f" {most / GIB:.1f} GiB here (its memory limit times {HOST_SHARE:g}): give it more memory or fewer"
            " processes a host, or change the key"
        )
    return taken


def local_processes() -> int:
    """Processes of this launch on this host."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def locked(size: int, device: torch.device, *, together: bool = False) -> Tensor:
    """`size` bytes (uint8) of host memory, page-locked for a GPU until they are freed. With `together` all processes
    of the launch call at once, and those of one host get the same memory. Processes forked later, as a loader's workers
    are, do not have it: Linux would copy page-locked memory for each of them."""
    memory = _shared(size) if together and local_processes() > 1 else _private(size)
    if device.type == "cuda":  # PyTorch's own pinned tensors take the next power of two
        runtime, address = torch.cuda.cudart(), memory.data_ptr()
        torch.cuda.check_error(runtime.cudaHostRegister(address, memory.numel(), 0))
        weakref.finalize(memory, runtime.cudaHostUnregister, address)
    return memory


def _private(size: int) -> Tensor:
    """Memory of this process alone."""
    memory = mmap.mmap(-1, max(size, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_DONTFORK)
    return torch.frombuffer(memory, dtype=torch.uint8)[:size]


def _shared(size: int) -> Tensor:
    """Memory without a name that the host's first process makes and the others map through its file descriptor; unlike
    /dev/shm, nothing but the host's memory limits it."""
    leads, descriptor = leads_host(), -1
    if leads:
        descriptor = os.memfd_create("physalign")
        os.truncate(descriptor, size)
    places = [None] * dist.get_world_size()
    dist.all_gather_object(places, (os.getpid(), descriptor))
    process, file = places[dist.get_rank() - int(os.environ["LOCAL_RANK"])]  # a host's ranks follow each other
    memory = torch.from_file(f"/proc/{process}/fd/{file}", shared=True, size=size, dtype=torch.uint8)
    dist.barrier()
    if leads:
        os.close(descriptor)
    return memory


def leads_host() -> bool:
    """Whether this is the host's first process of the launch, which fills what they share."""
    return int(os.environ.get("LOCAL_RANK", "0")) == 0


class Copier:
    """Copies between a device and its host on a stream of their own."""

    def __init__(self, device: torch.device):
        self.device = device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def copy(
        self, pairs: Iterable[tuple[Tensor, Tensor]], then: Callable[[], None] = lambda: None
    ) -> torch.cuda.Event | None:
        """Start copies, (to, from) each, behind the work that is queued now, and `then` after them. Returns what marks
        the end."""
        if self.stream is None:
            for target, source in pairs:
                target.copy_(source)
            then()
            return None
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            for target, source in pairs:
                target.copy_(source, non_blocking=True)
            then()
            return self.stream.record_event()

    def wait(self, event: torch.cuda.Event | None) -> None:
        """Work queued from here on comes after the copies that `event` marks."""
        if event is not None:
            torch.cuda.current_stream(self.device).wait_event(event)
