"""Full fine-tuning: every weight of the network trains. What `train/sft.py` attaches with `train.parameters=full`.

It stands where a `LoraSwitch` stands for the loop and the checkpoints, but has no reference to switch to.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


class FullParameters:
    """All weights of one network, made trainable in place; `weights` maps their names to them.

    Raises ValueError where weights are not float32: AdamW's small updates vanish in bfloat16.
    """

    file = "transformer.safetensors"  # in a checkpoint

    def __init__(self, network: nn.Module):
        network.requires_grad_(True)
        self.weights: dict[str, nn.Parameter] = dict(network.named_parameters())
        if any(weight.dtype != torch.float32 for weight in self.weights.values()):
            raise ValueError("train.parameters=full needs backbone.dtype=float32: updates are lost in bfloat16")

    def parameters(self) -> list[nn.Parameter]:
        return list(self.weights.values())

    def describe(self) -> dict[str, str]:
        """What a weight file says of itself."""
        return {"format": "physalign-full-1"}

    def state_dict(self) -> dict[str, Tensor]:
        """Copies of the weights on the CPU."""
        return {name: weight.detach().cpu().clone() for name, weight in self.weights.items()}

    def load_state_dict(self, state: dict[str, Tensor], *, source: str = "the checkpoint") -> None:
        """Load weights made by `state_dict`; ValueError naming `source` where names or shapes differ."""
        if {name: weight.shape for name, weight in self.weights.items()} != {n: t.shape for n, t in state.items()}:
            raise ValueError(f"{source} holds the weights of another architecture: use the backbone it was made with")
        with torch.no_grad():
            for name, weight in self.weights.items():
                weight.copy_(state[name])

    def share_graph(self) -> None:
        """Nothing to share: there is no reference."""

    @contextmanager
    def reference(self) -> Iterator[None]:
        """Refused: the untrained weights are not kept."""
        raise ValueError("train.parameters=full keeps no reference: set validation.prompts=[], or train a LoRA")
        yield

    @staticmethod
    def checkpoint(function: Callable, *args):
        """`torch.utils.checkpoint`, non-reentrant."""
        return checkpoint(function, *args, use_reentrant=False)
