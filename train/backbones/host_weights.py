"""Networks that take turns on one device: all in host memory, one of them on the device as well.

Frozen weights never change, so nothing is ever copied back: the device has one network's worth of memory, which the
weights of the network that is asked for fill. Over PCIe that takes about a second for 14B parameters in bfloat16.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from train.host_memory import local_processes, locked, reserve

ALIGNMENT = 64  # bytes


class HostWeights:
    """The weights of `count` networks of the same shapes, page-locked for a GPU. `made` gives them by name, on the
    device; each goes to host memory before the next is asked for."""

    def __init__(self, made: Iterable[tuple[str, nn.Module]], device: torch.device, *, count: int):
        self.networks: dict[str, nn.Module] = {}
        self.host: dict[str, list[Tensor]] = {}
        self.memory: list[Tensor] = []  # one piece for each network
        self.here = ""
        for name, network in made:
            size = count * sum(weight.nbytes for weight in network.parameters())
            network.locked_bytes = reserve("backbone.expert=both", size, local_processes())
            self.networks[name], self.host[name] = network, self._move(network, device)
        first = next(iter(self.networks))
        self.device = [torch.empty_like(weight, device=device) for weight in self.host[first]]
        self.bring(first)

    def _move(self, network: nn.Module, device: torch.device) -> list[Tensor]:
        """Put the network's weights into one piece of memory, and its buffers on the device."""
        for module in network.modules():
            for key, buffer in module.named_buffers(recurse=False):
                setattr(module, key, buffer.to(device))
        weights = list(network.parameters())
        sizes = [-(-weight.nbytes // ALIGNMENT) * ALIGNMENT for weight in weights]
        self.memory.append(locked(sum(sizes), device))
        for weight, part in zip(weights, self.memory[-1].split(sizes), strict=True):  # one tensor is there twice
            weight.data = part[: weight.nbytes].view(weight.dtype).view(weight.shape).copy_(weight.data)
        return [weight.data for weight in weights]

    def bring(self, name: str) -> None:
        """Have the weights of network `name` on the device; those of the one that was there are on the CPU again."""
        if name == self.here:
            return
        if self.here:
            for weight, data in zip(self.networks[self.here].parameters(), self.host[self.here], strict=True):
                weight.data = data
        for weight, data, place in zip(self.networks[name].parameters(), self.host[name], self.device, strict=True):
            weight.data = place.copy_(data, non_blocking=True)
        self.here = name
