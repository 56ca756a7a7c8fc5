"""LoRA-switch reference: one frozen network that is both policy and reference (PhyGDPO, arXiv 2512.24551, eq. 14).

    policy:     y = W x + b + (alpha / rank) B A x
    reference:  y = W x + b                                   inside `with switch.reference():`

Four properties are designed in, and tested:

- The low-rank weights live outside the network's module tree. Its state-dict keys, its DeepSpeed ZeRO-3 partitions
  and its compiled blocks stay those of the plain network; the adapters, a few megabytes, stay whole on every rank.
- Activation checkpointing recomputes a block during backward, when the switch may stand elsewhere. `switch.checkpoint`
  remembers how it stood in the forward pass and restores that for the recompute, so that a gradient may also flow
  through a pass of the reference.
- Switching turns one shared state: no `requires_grad` is touched, no weight is copied or merged.
- A compiled network runs one graph for both, so that their difference is the adapters' and not the compiler's rounding.
  Fused blocks (`train.backbones.fused`) take the gate as an argument and need no `share_graph`: their reference runs
  without grad mode.

Deviation from eq. 14: none. A starts Kaiming-uniform and B zero, so that an untrained policy equals its reference bit
for bit.
"""

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from recipes import suggest


@dataclass
class LoraConfig:
    rank: int = 48  # r of eq. 14
    alpha: float = 48.0  # scale is alpha / rank
    # Suffixes of the linear layers that get an adapter; the paper's: query, key, value and output of every self-
    # attention.
    targets: list[str] = field(default_factory=lambda: ["attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0"])
    # LoRA that the policy starts from, of this rank and these targets: a training or checkpoint folder, or a file of
    # any tool. The reference stays the base; for a LoRA under both see backbone.loras. Empty: B starts at zero.
    start: str = ""


class SwitchState:
    """How the switch stands; one object that all layers share.

    Eager layers branch on `active`. Compiled ones must not: two branches are two graphs, and their bfloat16 roundings
    differ by more than what a preference step measures. With `one_graph` every pass computes the low-rank update and
    multiplies it by `gate`, which is alpha / rank or 0.
    """

    def __init__(self, scale: float, device: torch.device):
        self.gates = {True: torch.tensor(scale, device=device), False: torch.tensor(0.0, device=device)}
        self.one_graph = False
        self.turn(active=True)

    def turn(self, *, active: bool) -> None:
        self.active, self.gate = active, self.gates[active]


class SwitchedLinear(nn.Linear):
    """A frozen linear layer plus a low-rank update that can be switched off. Made by `adapt`, by changing a layer's
    class in place."""

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x, self.weight, self.bias)
        state = self.lora_state
        if not (state.one_graph or state.active):
            return y
        down = F.linear(x, self.lora_down.to(x.dtype))  # (..., rank)
        return y + F.linear(down, (self.lora_up * state.gate).to(x.dtype))  # scaled in float32


def adapt(
    layer: nn.Linear, down: Tensor, up: Tensor, state: SwitchState, device: torch.device | None = None
) -> tuple[nn.Parameter, nn.Parameter]:
    """Give a layer an adapter of A (rank, in) and B (out, rank), which are returned as parameters on `device`, or else
    beside the layer."""
    place = device or layer.weight.device
    layer.__class__ = SwitchedLinear
    # Past nn.Module's __setattr__: these must not become parameters of the network.
    layer.__dict__["lora_down"] = nn.Parameter(down.to(place))
    layer.__dict__["lora_up"] = nn.Parameter(up.to(place))
    layer.__dict__["lora_state"] = state
    return layer.lora_down, layer.lora_up


class LoraSwitch:
    """The adapters of one network and the switch between policy and reference.

    `weights` maps `<layer>.lora_A.weight` (rank, in) and `<layer>.lora_B.weight` (out, rank), the key names of peft
    and diffusers, to float32 parameters on the network's device. The network's own parameters are frozen.

    `network` may hold several (`train.experts.as_one`): one switch turns all, and names begin with
    theirs. `device`: where the adapters are, if not beside their layers.

    Raises ValueError as `targeted_layers`.
    """

    file = "lora.safetensors"  # in a checkpoint
    format = "physalign-lora-1"  # in its metadata

    def __init__(self, network: nn.Module, config: LoraConfig, *, seed: int = 0, device: torch.device | None = None):
        layers = targeted_layers(network, config)
        self.config = config
        self.state = SwitchState(config.alpha / config.rank, device or next(network.parameters()).device)
        self.weights: dict[str, nn.Parameter] = {}
        network.requires_grad_(False)
        generator = torch.Generator().manual_seed(seed)
        for name, layer in layers:
            bound = 1 / math.sqrt(layer.in_features)  # Kaiming-uniform with a = sqrt(5)
            down = torch.empty(config.rank, layer.in_features).uniform_(-bound, bound, generator=generator)
            up = torch.zeros(layer.out_features, config.rank)
            pair = adapt(layer, down, up, self.state, device)
            self.weights[f"{name}.lora_A.weight"], self.weights[f"{name}.lora_B.weight"] = pair

    def parameters(self) -> list[nn.Parameter]:
        return list(self.weights.values())

    def describe(self) -> dict[str, str]:
        """What a LoRA file says of itself."""
        config = self.config
        return {
            "format": self.format,
            "rank": str(config.rank),
            "alpha": str(config.alpha),
            "targets": json.dumps(list(config.targets)),
        }

    def share_graph(self) -> None:
        """Make policy and reference run the same compiled graph. Call before the network is compiled."""
        self.state.one_graph = True

    def reference(self) -> AbstractContextManager[None]:
        """Every pass inside runs the frozen network alone. Nests, and lets gradients flow to the pass's inputs."""
        return self._as(active=False)

    @contextmanager
    def frozen_reference(self) -> Iterator[None]:
        """`reference()` for passes without gradients; detach what they give.

        Eager passes run without a graph. Compiled ones stay in grad mode, or they would run another graph than the
        policy does.
        """
        with self.reference(), torch.set_grad_enabled(self.state.one_graph and torch.is_grad_enabled()):
            yield

    @contextmanager
    def _as(self, *, active: bool) -> Iterator[None]:
        before = self.state.active
        self.state.turn(active=active)
        try:
            yield
        finally:
            self.state.turn(active=before)

    def checkpoint(self, function: Callable, *args):
        """`torch.utils.checkpoint` (non-reentrant) whose recompute sees the switch as it stands now, not as it stands
        during backward."""
        active = self.state.active

        def run(*inputs):
            with self._as(active=active):
                return function(*inputs)

        return checkpoint(run, *args, use_reentrant=False)

    def state_dict(self) -> dict[str, Tensor]:
        """Copies of the adapter weights on the CPU, float32."""
        return {name: weight.detach().cpu().clone() for name, weight in self.weights.items()}

    def load_state_dict(self, state: dict[str, Tensor], *, source: str = "the LoRA file") -> None:
        """Load weights made by `state_dict`. ValueError naming `source` where layers, ranks or shapes differ."""
        wanted = {name: tuple(weight.shape) for name, weight in self.weights.items()}
        check_shapes({name: tuple(tensor.shape) for name, tensor in state.items()}, wanted, source=source)
        for name, tensor in state.items():
            if not (tensor.is_floating_point() and torch.isfinite(tensor).all()):
                raise ValueError(f"{source}: {name} is no finite float tensor: the file is damaged, use another one")
        with torch.no_grad():
            for name, weight in self.weights.items():
                weight.copy_(state[name])


def adapter_shapes(network: nn.Module, config: LoraConfig) -> dict[str, tuple[int, int]]:
    """Shape of every adapter weight that `LoraSwitch(network, config)` makes, by its name; ValueError as there."""
    shapes = {}
    for name, layer in targeted_layers(network, config):
        shapes[f"{name}.lora_A.weight"] = (config.rank, layer.in_features)
        shapes[f"{name}.lora_B.weight"] = (layer.out_features, config.rank)
    return shapes


def check_shapes(found: Mapping[str, tuple[int, ...]], wanted: Mapping[str, tuple[int, ...]], *, source: str) -> None:
    """ValueError naming `source`, which holds `found`, unless these are the layers and shapes of `wanted`."""
    missing, unexpected = sorted(wanted.keys() - found.keys()), sorted(found.keys() - wanted.keys())
    if missing or unexpected:
        raise ValueError(
            f"{source} holds adapters for other layers: {len(missing)} of this recipe's are missing"
            f" (first: {missing[:1]}), {len(unexpected)} are unknown (first: {unexpected[:1]})."
            " Set lora.targets to what it was trained with."
        )
    for name, shape in wanted.items():
        if found[name] != shape:
            raise ValueError(
                f"{source}: {name} has shape {found[name]}, this recipe needs {shape}. Set lora.rank to the file's"
                " rank, use the backbone that it was trained on, or train anew."
            )


def targeted_layers(network: nn.Module, config: LoraConfig) -> list[tuple[str, nn.Linear]]:
    """Names and layers that `config.targets` (suffixes) choose; ValueError where there are none, for a suffix that
    matches no linear layer, and for a rank that is not positive."""
    if config.rank < 1:
        raise ValueError(f"lora.rank is {config.rank}: it must be at least 1")
    if not config.targets:
        raise ValueError("lora.targets is empty: name suffixes of linear layers, such as attn1.to_q")
    linears, targets = {name: one for name, one in network.named_modules() if type(one) is nn.Linear}, config.targets
    for target in targets:
        if not any(_matches(name, target) for name in linears):
            suffixes = sorted({found[1] for name in linears if (found := re.search(r"blocks\.\d+\.(.+)", name))})
            raise ValueError(f"lora.targets: {target!r} matches no linear layer; {suggest(target, suffixes)}")
    return [(name, layer) for name, layer in linears.items() if any(_matches(name, target) for target in targets)]


def _matches(name: str, target: str) -> bool:
    return name == target or name.endswith("." + target)
