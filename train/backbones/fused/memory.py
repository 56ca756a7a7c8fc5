"""Which block keeps what for its backward pass, so that a step's peak stays within a budget.

Predicted in bytes, with u = batch x tokens x width x 2 (one bfloat16 hidden state) and w = u ffn / width:

    peak = resident + gathered + (2 + gradients) adapters + coming + (passes - 1) x (sum over blocks of kept + outside)
           + the largest, over blocks, of workspace(its level) + sum over the blocks up to it of kept

`resident` is what is allocated before the first step, `gathered` what ZeRO-3 adds in it; the adapters' bytes come again
for AdamW's two moments and for each set of gradients that waits, a clip's or the sum over earlier passes. Passes are
those whose activations wait for their backward at once, as `waiting` says: one, and two where the self-score's judge
looks at what the policy predicts (`train.policy`). Kept: a block's input, and by `fused_block.LEVELS` nothing,
attention (u and a logsumexp), three more hidden states (3 u), everything (3 u + w), or everything in host memory; or
not even its input, which waits there. The workspace is what one block's backward pass holds besides: it recomputes less
the more was kept. `coming` is what comes back from the host: one block's activations, and an input where inputs wait
there. Of two passes that wait, the first keeps `outside` bytes more outside of its blocks.

Workspace and outside are fitted to the peaks of 23 steps on an H200: 14B and 1.3B at 480x832x81, 5B at 704x1280x121,
budgets of 7 to 76 GiB, on the device and streamed, one and two passes. Each is predicted within 0.4 GiB.

Attention comes first, because it saves most time per byte. Then the last blocks are raised first, because the peak is
where the backward pass starts, and a block that kept more needs less workspace. Inputs go to host memory only with
backbone.stream, and only where they do not fit: those of the first blocks, which come back when the others' are gone.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from train.backbones import kind_of
from train.host_memory import GIB

OFFLOADED = 4  # the level of `fused_block` whose activations wait in host memory (`offload`)
INPUT_OFFLOADED = 5  # the level whose input waits there
WORKSPACE = ((12.5, 2.9), (14.5, 1.4), (15.4, 0.8), (14.2, 0.15))  # u and w, by level
OUTSIDE = 1.1  # hidden states u
GATHERED = 2  # blocks whole at once under ZeRO-3: the one that runs and one that is not freed yet
FLOAT8_WORKSPACE = 6.0  # hidden states u more with 8-bit products: their quantised operands

_passes: ContextVar[int] = ContextVar("passes whose activations wait for their backward at once", default=1)
passes_waiting = _passes.get  # () -> as the innermost `waiting` says


@contextmanager
def waiting(passes: int) -> Iterator[None]:
    """Activations of `passes` passes inside wait for their backward at the same time: fused blocks keep less."""
    before = _passes.set(passes)
    try:
        yield
    finally:
        _passes.reset(before)


@dataclass(frozen=True)
class Sizes:
    """What decides the bytes. `hidden_bytes` of one number; `tokens` of all clips in one pass."""

    tokens: int
    width: int
    ffn: int
    heads: int
    blocks: int
    hidden_bytes: int = 2

    @property
    def hidden(self) -> int:
        return self.tokens * self.width * self.hidden_bytes

    @property
    def wide(self) -> int:
        return self.tokens * self.ffn * self.hidden_bytes

    def kept(self, level: int) -> int:
        """Bytes that one block keeps on the device, its input included."""
        attention = self.hidden + 4 * self.tokens * self.heads
        everything = attention + 6 * self.hidden + self.wide
        return self.hidden + (0, attention, attention + 3 * self.hidden, everything, 0, -self.hidden)[level]

    @property
    def offloaded(self) -> int:
        """Bytes that one offloaded block keeps on the host."""
        return self.kept(3) - self.hidden

    def workspace(self, level: int) -> float:
        """Bytes that a block's backward pass holds beside what was kept."""
        hidden, wide = WORKSPACE[level]
        return hidden * self.hidden + wide * self.wide


def check(config: Any) -> None:
    """ValueError for memory, in the train section `config`, that is negative or no number."""
    for key in ("memory_budget_gib", "offload_gib"):
        if not 0 <= (value := getattr(config, key)) < math.inf:
            raise ValueError(f"train.{key}={value}: give GiB per GPU, or 0 for the default")


def predict(sizes: Sizes, levels: list[int], passes: int = 1) -> float:
    """Bytes of activations at the peak: in the backward pass of a block whose activations are on the device, while one
    block's come back."""
    kept = peak = 0.0
    for level in levels:
        kept += sizes.kept(level)
        if level < OFFLOADED:
            peak = max(peak, kept + sizes.workspace(level))
    coming = (OFFLOADED in levels) * sizes.offloaded + (INPUT_OFFLOADED in levels) * sizes.hidden
    return (passes - 1) * (kept + OUTSIDE * sizes.hidden) + peak + coming


def choose_levels(
    sizes: Sizes, available: float, host: float = 0.0, passes: int = 1, *, inputs: bool = False
) -> list[int]:
    """A level for each block whose predicted activations of all `passes` fit `available` bytes on the device and `host`
    bytes there.

    Blocks are offloaded, as many as the host has room for and what comes back fits, until the others keep everything;
    they are spread over the network so that copies have blocks to hide behind, and the last block never is. All levels
    are 0 where nothing fits. With `inputs` the inputs of as few blocks as it takes wait on the host before fewer blocks
    are offloaded.
    """
    most = min(int(host // (passes * sizes.offloaded)), sizes.blocks - 1)
    for count in range(most + 1):
        levels = _levels(sizes, available, passes, count)
        if min(levels) == 3:
            return levels
    for count in range(most, -1, -1):
        room = int((host / passes - count * sizes.offloaded) // sizes.hidden) if inputs else 0
        for first in range(min(room, sizes.blocks - 1 - count) + 1):
            levels = _levels(sizes, available, passes, count, first)
            if predict(sizes, levels, passes) <= available:
                return levels
    return levels  # the least there is


def _levels(sizes: Sizes, available: float, passes: int, count: int, first: int = 0) -> list[int]:
    """The levels with the inputs of the `first` blocks offloaded, and `count` of the others."""
    others = sizes.blocks - 1 - first
    offloaded = {first + (2 * n + 1) * others // (2 * count) for n in range(count)}
    levels = [OFFLOADED if index in offloaded else 0 for index in range(sizes.blocks)]
    levels[:first] = [INPUT_OFFLOADED] * first
    for level in (1, 2, 3):
        for index in reversed(range(sizes.blocks)):
            if levels[index] in (OFFLOADED, INPUT_OFFLOADED):
                continue
            raised = [*levels[:index], level, *levels[index + 1 :]]
            if predict(sizes, raised, passes) > available:
                return levels
            levels = raised
    return levels


def resident(network: nn.Module) -> int:
    """Bytes of a network's parameters where they are: streamed blocks share a ring's buffers."""
    storages = {weight.untyped_storage().data_ptr(): weight.untyped_storage() for weight in network.parameters()}
    return sum(storage.nbytes() for storage in storages.values())


def gathered(network: nn.Module) -> int:
    """Bytes of GATHERED blocks under ZeRO-3; else 0."""
    weights = kind_of(network).blocks_of(network)[0].parameters()
    return GATHERED * sum(getattr(weight, "ds_numel", 0) * weight.element_size() for weight in weights)


def plan(
    network: nn.Module, adapters: list[Tensor], config: Any, *, gradients: float = 2
) -> Callable[[torch.Size, int], list[int]]:
    """Levels of a network's fused blocks for hidden states (B, N, D) and waiting passes, by the train section `config`;
    `gradients`: sets of the adapters' gradients that a step holds at once.

    Call it when everything but the optimizer is in place: what is allocated now counts as resident.
    """
    device = adapters[0].device
    trained = sum(weight.numel() * weight.element_size() for weight in adapters)
    budget = config.memory_budget_gib * GIB
    if device.type == "cuda":
        total = torch.cuda.mem_get_info(device)[1]
        available = min(budget or 0.9 * total, 0.95 * total) - torch.cuda.memory_allocated(device)
    else:
        available = (budget or float("inf")) - resident(network) - trained
    available -= (2 + gradients) * trained + gathered(network)

    def levels(shape: torch.Size, passes: int) -> list[int]:
        own = kind_of(network).shape(network.config)
        sizes = Sizes(shape[0] * shape[1], shape[2], own.ffn, own.heads, own.layers, network.dtype.itemsize)
        if not config.activation_checkpointing:
            return [3] * own.layers
        room = available - FLOAT8_WORKSPACE * sizes.hidden * config.float8
        return choose_levels(sizes, room, config.offload_gib * GIB, passes, inputs=hasattr(network, "streamed"))

    return levels
