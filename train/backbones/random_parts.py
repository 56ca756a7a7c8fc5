"""Seeded random weights for a model without storage: for runs that measure time and memory, and for tests."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


@torch.no_grad()
def fill(model: nn.Module, device: torch.device, dtype: torch.dtype) -> Any:
    """Give a model without storage seeded weights on the device, frozen, in eval mode: see `draw`."""
    model = nn.Module.to(model, dtype).to_empty(device=device)
    generator = torch.Generator(device=device).manual_seed(0)
    for name, parameter in model.named_parameters():
        draw(name, parameter, generator)
    return model.eval().requires_grad_(False)


def draw(name: str, parameter: Tensor, generator: torch.Generator) -> None:
    """Matrices and kernels normal with variance 1 / fan-in, biases zero, the factors of norms one, and scale tables as
    diffusers initialises them, so that activations and outputs are of order one."""
    if name.endswith("scale_shift_table"):
        parameter.normal_(std=parameter.shape[-1] ** -0.5, generator=generator)
    elif parameter.squeeze().dim() > 1:
        parameter.normal_(std=parameter[0].numel() ** -0.5, generator=generator)
    else:
        parameter.fill_(0.0 if name.endswith("bias") else 1.0)
