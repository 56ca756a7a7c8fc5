"""Frozen weights in host memory, whose blocks visit the device one by one: the next is copied while this one computes.

    host     one flat, page-locked buffer for each block
    device   a ring of SLOTS flat buffers; the parameters of block i are views of buffer i mod SLOTS, for good

So a block's parameters never move: compiled graphs, the LoRA switch and hooks meet ordinary parameters on the device,
which hold the block's numbers from `StreamedBlocks.fetch` until its buffer is filled with another block's. Nothing is
rounded, unless `float8` asks for it: then the host has a block's matrices in 8 bits, and the copy is unpacked into the
slot (`train.backbones.quantize`). A block's forward pass fetches it (a hook, or `fused.fused_block` itself), and so
does its backward pass, which computes it anew: a streamed network comes with activation checkpointing. Whoever meant to
use weights that were overwritten meanwhile meets autograd's own error, because all views of a buffer count its changes.

With D bytes of a block's weights and copies of B bytes a second, copies hide where a block computes for D / B seconds:
0.65 GiB of Wan 14B's in bfloat16 take 28 ms at 25 GB/s.
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn

from train.backbones.architecture import NetworkKind
from train.backbones.quantize import quantize, restore
from train.host_memory import Copier, leads_host, local_processes, locked, reserve

SLOTS = 2  # blocks on the device at once
ALIGNMENT = 256  # bytes, of each parameter


class Layout:
    """Where named tensors lie in a flat buffer of `size` bytes."""

    def __init__(self):
        self.places: dict[str, tuple[int, torch.Size, torch.dtype]] = {}  # offset, shape, dtype by name
        self.size = 0

    def add(self, name: str, shape: torch.Size, dtype: torch.dtype) -> None:
        self.places[name] = (self.size, shape, dtype)
        self.size += -(-shape.numel() * dtype.itemsize // ALIGNMENT) * ALIGNMENT

    def view(self, buffer: Tensor, name: str) -> Tensor:
        offset, shape, dtype = self.places[name]
        return buffer[offset : offset + shape.numel() * dtype.itemsize].view(dtype).view(shape)


class BlockLayout:
    """How a block's parameters lie on the device and on the host; `network` may be on the meta device. With `float8`
    the host has matrices in 8 bits, and the scales of their rows."""

    def __init__(self, kind: NetworkKind, network: nn.Module, dtype: torch.dtype, *, float8: bool = False):
        self.device, self.host, self.scales = Layout(), Layout(), {}
        for name, parameter in kind.blocks_of(network)[0].named_parameters():
            kept = kind.parameter_dtype(name, dtype)
            self.device.add(name, parameter.shape, kept)
            if float8 and kind.in_8_bits(name, parameter, dtype):
                self.scales[name] = f"{name} scales"
                self.host.add(name, parameter.shape, torch.float8_e4m3fn)
                self.host.add(self.scales[name], torch.Size([len(parameter), 1]), torch.float32)
            else:
                self.host.add(name, parameter.shape, kept)

    @torch.no_grad()
    def pack(self, block: Tensor, host: Tensor) -> None:
        """From the device's layout to the host's."""
        if not self.scales:
            host.copy_(block)
            return
        for name in self.device.places:
            values = self.device.view(block, name)
            if name in self.scales:
                values, scales = quantize(values)
                self.host.view(host, self.scales[name]).copy_(scales)
            self.host.view(host, name).copy_(values)

    @torch.no_grad()
    def unpack(self, host: Tensor, block: Tensor) -> None:
        """From the host's layout to the device's, both on the device."""
        for name in self.device.places:
            self.read(host, name, self.device.view(block, name))

    def read(self, host: Tensor, name: str, to: Tensor) -> None:
        """Write the parameter `name` of a buffer in the host's layout."""
        values = self.host.view(host, name)
        if name in self.scales:
            restore(values, self.host.view(host, self.scales[name]), to)
        else:
            to.copy_(values)


class Slot:
    """One buffer of the ring: what it holds, a buffer of the host, and what marks the end of its copy."""

    def __init__(self, size: int, device: torch.device):
        self.memory = torch.empty(size, dtype=torch.uint8, device=device)
        self.holds: Tensor | None = None
        self.ready: torch.cuda.Event | None = None


class Ring:
    """The device's memory for blocks, shared by all networks of a backbone (`count`), whose blocks are of one layout.

    together: all processes of the launch load at once, and those of one host keep one copy there.
    """

    def __init__(self, device: torch.device, *, count: int, together: bool = False):
        self.device, self.count, self.together = device, count, together and local_processes() > 1
        self.copier, self.slots, self.taken = Copier(device), [], 0
        self.layout: BlockLayout | None = None
        self.arrived: Tensor | None = None  # a block as it is on the host, where that is not as in a slot

    def reserve(self, layout: BlockLayout, blocks: int) -> None:
        """Make the slots, for the first network. ValueError where the host has no room for the weights of all."""
        if self.layout is not None:
            assert self.layout.device.places == layout.device.places, "the experts' blocks differ in layout"
            return
        copies = 1 if self.together else local_processes()
        self.taken = reserve("backbone.stream=true", self.count * blocks * layout.host.size, copies)
        self.layout, self.slots = layout, [Slot(layout.device.size, self.device) for _ in range(SLOTS)]
        if layout.scales:
            self.arrived = torch.empty(layout.host.size, dtype=torch.uint8, device=self.device)

    def fill(self, slot: Slot, host: Tensor) -> None:
        """Start the copy, behind the work that is queued now, unless the slot holds it."""
        if slot.holds is host:
            return
        if self.arrived is None:
            slot.holds, slot.ready = host, self.copier.copy([(slot.memory, host)])
        else:
            unpack = partial(self.layout.unpack, self.arrived, slot.memory)
            slot.holds, slot.ready = host, self.copier.copy([(self.arrived, host)], then=unpack)


class StreamedBlocks:
    """The blocks of one network without storage. They are filled one after another, through `parameter`, until `attach`
    makes this the network's attribute `streamed`."""

    def __init__(self, ring: Ring, kind: NetworkKind, network: nn.Module, dtype: torch.dtype, *, float8: bool = False):
        self.ring, self.layout, self.network = ring, BlockLayout(kind, network, dtype, float8=float8), network
        self.blocks, self._prefix = kind.blocks_of(network), f"{kind.blocks}."
        self.last = len(self.blocks) - 1
        ring.reserve(self.layout, self.last + 1)
        size = self.layout.host.size
        self._memory = locked((self.last + 1) * size, ring.device, together=ring.together)
        self.hosts = list(self._memory.view(self.last + 1, size))
        self.before = -1  # the block that was filled or fetched before
        self.fused = False  # whether what replaces the blocks' forward calls `fetch` itself

    def holds(self, key: str) -> bool:
        """Whether a parameter of that name is a block's."""
        return key.startswith(self._prefix)

    def slot(self, index: int) -> Slot:
        return self.ring.slots[index % SLOTS]

    def parameter(self, key: str) -> Tensor:
        """The memory on the device of the parameter <blocks>.<index>.<name>. What is written there is kept once it is
        the next block's turn."""
        _, index, name = key.split(".", 2)
        if int(index) != self.before:
            self._store()
            self.before = int(index)
            self.slot(self.before).holds = None
        return self.layout.device.view(self.slot(self.before).memory, name)

    def stored(self, key: str) -> Tensor:
        """A copy, on the device, of the parameter <blocks>.<index>.<name>."""
        _, index, name = key.split(".", 2)
        _, shape, dtype = self.layout.device.places[name]
        parameter = torch.empty(shape, dtype=dtype, device=self.ring.device)
        self.layout.read(self.hosts[int(index)].to(self.ring.device), name, parameter)
        return parameter

    def attach(self) -> None:
        """Every block fetches itself when it is called. Once all are filled, on all ranks."""
        self._store()
        if self.ring.together:
            dist.barrier()
        self.network.streamed, self.network.locked_bytes = self, self.ring.taken
        self.network.enable_gradient_checkpointing()  # for gradients to the latents: refinement, guidance
        for index, block in enumerate(self.blocks):
            block.register_forward_pre_hook(self._fetch_when_called(index))

    def _store(self) -> None:
        """Keep what was written to the block that is being filled."""
        if self.before >= 0 and (leads_host() or not self.ring.together):
            self.layout.pack(self.slot(self.before).memory, self.hosts[self.before])

    def fetch(self, index: int) -> None:
        """Block `index` is in its slot for work queued from here on, and the copy of the one after it has started."""
        self.ring.fill(self.slot(index), self.hosts[index])
        self.ring.copier.wait(self.slot(index).ready)
        following = self._following(index)
        if self.slot(following) is not self.slot(index):  # as with an odd number of blocks, from the last to the first
            self.ring.fill(self.slot(following), self.hosts[following])
        self.before = index

    def _following(self, index: int) -> int:
        """Which block is likely to be next: passes go up, backward passes down. A wrong guess only costs time."""
        down = index < self.before or (index == self.last and (self.before == index or torch.is_grad_enabled()))
        if index == 0:
            return min(1, self.last)  # from where a backward pass ended, too: the next one begins there
        if down:
            return index - 1
        return index + 1 if index < self.last else 0  # a pass without gradients is followed by another

    def _fetch_when_called(self, index: int) -> Callable[..., None]:
        def fetch(block: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            if self.fused and "forward" in block.__dict__:  # else someone has put diffusers' own back for a while
                return
            if torch.is_grad_enabled() and inputs[0].requires_grad and not self.network.gradient_checkpointing:
                raise ValueError(
                    "backbone.stream=true keeps no block's weights for its backward pass: set"
                    " train.activation_checkpointing=true"
                )
            self.fetch(index)

        return fetch
