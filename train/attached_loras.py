"""LoRAs of any tool on the networks that they are for, and the switch between with and without: for clips and scores,
not for training."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from train.backbones.lora_formats import NetworkLora
from train.lora_switch import SwitchState, adapt


class AttachedLoras:
    """Adapters stay beside the frozen weights, in float32; full differences, and adapters of layers that are not
    linear, are added to a copy of their parameters, in float32, and rounded to its dtype.

    networks: by name, each with its LoRA in `loras`. ValueError where one does not fit, naming `source`.
    """

    def __init__(self, networks: Mapping[str, nn.Module], loras: Mapping[str, NetworkLora], *, source: str):
        self.state = SwitchState(1.0, next(networks[next(iter(loras))].parameters()).device)  # B bears the scale
        self._changed: list[tuple[nn.Parameter, Tensor]] = []  # with what it is without the LoRA
        for name, lora in loras.items():
            self._attach(networks[name], lora, source)

    @torch.no_grad()
    def _attach(self, network: nn.Module, lora: NetworkLora, source: str) -> None:
        network.requires_grad_(False)
        parameters = dict(network.named_parameters())
        lora.check({key: tuple(parameter.shape) for key, parameter in parameters.items()}, source=source)
        whole = list(lora.differences)
        for layer in lora.pairs:
            module = network.get_submodule(layer)
            if type(module) is nn.Linear and f"{layer}.weight" not in lora.differences:
                adapt(module, *lora.matrices(layer), self.state)
            else:
                whole.append(f"{layer}.weight")
        for key in dict.fromkeys(whole):
            parameter = parameters[key]
            streamed = getattr(network, "streamed", None)
            base = streamed.stored(key) if streamed is not None and streamed.holds(key) else parameter.data
            self._changed.append((parameter, parameter.data))
            parameter.data = lora.add(key, base).to(parameter.dtype)

    @contextmanager
    def reference(self) -> Iterator[None]:
        """Every pass inside runs the networks without their LoRAs. Does not nest."""
        tuned = [parameter.data for parameter, _ in self._changed]
        self.state.turn(active=False)
        try:
            for parameter, base in self._changed:
                parameter.data = base
            yield
        finally:
            self.state.turn(active=True)
            for (parameter, _), data in zip(self._changed, tuned, strict=True):
                parameter.data = data
