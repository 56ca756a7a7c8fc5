"""Full fine-tuning: every weight of the network trains. What a trainer attaches with `train.parameters=full`.

It stands where a `LoraSwitch` stands for the loop and the checkpoints. Its reference, for preference training and for
comparisons, is a whole second copy of the weights (PhyGDPO's Table 2d, "w/o LoRA-SR"); supervised training keeps none.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


class FullParameters:
    """All weights of one network, made trainable in place; `weights` maps their names to them. With `keep_reference`
    they are also copied, to be what `reference()` runs.

    Raises ValueError where weights are not float32 (AdamW's small updates vanish in bfloat16) or are streamed.
    """

    file = "transformer.safetensors"  # in a checkpoint
    format = "physalign-full-1"  # in its metadata

    def __init__(self, network: nn.Module, *, keep_reference: bool = False):
        if hasattr(network, "streamed"):
            raise ValueError("full weights do not stream: set backbone.stream=false, or train a LoRA")
        network.requires_grad_(True)
        self.weights: dict[str, nn.Parameter] = dict(network.named_parameters())
        if any(weight.dtype != torch.float32 for weight in self.weights.values()):
            raise ValueError("train.parameters=full needs backbone.dtype=float32: updates are lost in bfloat16")
        self._frozen = {name: w.detach().clone() for name, w in self.weights.items()} if keep_reference else {}

    def parameters(self) -> list[nn.Parameter]:
        return list(self.weights.values())

    def describe(self) -> dict[str, str]:
        """What a weight file says of itself."""
        return {"format": self.format}

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
        """Nothing to do: policy and reference are one graph with other weights."""

    @contextmanager
    def reference(self) -> Iterator[None]:
        """Every pass inside runs the copied weights. Differentiate passes of the policy before or after, not inside.

        Raises ValueError where none were kept.
        """
        if not self._frozen:
            raise ValueError("train.parameters=full keeps no reference: set validation.prompts=[], or train a LoRA")
        trained = {name: weight.data for name, weight in self.weights.items()}
        try:
            for name, weight in self.weights.items():
                weight.data = self._frozen[name]
            yield
        finally:
            for name, weight in self.weights.items():
                weight.data = trained[name]

    @contextmanager
    def frozen_reference(self) -> Iterator[None]:
        """`reference()` without gradients."""
        with self.reference(), torch.no_grad():
            yield

    @staticmethod
    def checkpoint(function: Callable, *args):
        """`torch.utils.checkpoint`, non-reentrant."""
        return checkpoint(function, *args, use_reentrant=False)
