"""How a network runs during training: activation checkpointing, compilation, fused blocks with a memory plan."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from train import compile_cache
from train.backbones import BACKBONES, kind_of
from train.backbones.fused import float8, memory
from train.backbones.fused.fused_block import fuse_blocks, unfit
from train.backbones.fused.offload import HostStore, affordable


def fuses(config: Any) -> bool:
    """Whether a recipe's blocks are fused, as far as it says: these alone keep to a memory budget."""
    kind = BACKBONES[config.backbone.family].kind
    return config.backbone.compile and config.train.parameters == "lora" and kind.fused


def prepare_network(
    network: nn.Module, switch: Any, config: Any, *, gradients: int = 2, others: Sequence[nn.Module] = ()
) -> str:
    """Switch on activation checkpointing and compilation, as a recipe's train section and backbone.compile say.
    `switch` holds what trains (`train.policy.Reference`), `gradients` counts the sets of the adapters' gradients that a
    step holds at once, for the memory plan. `others` are networks of the same architecture that train in other steps.
    Returns why blocks are not fused where backbone.compile asks for it, else "".

    Raises ValueError for negative memory, and for float8 where blocks cannot be fused.
    """
    compiled, config = config.backbone.compile, config.train
    memory.check(config)
    reason = unfit(network, switch) if compiled else "backbone.compile is false"
    if not reason:
        adapters = switch.parameters()
        device = adapters[0].device
        taken = getattr(network, "locked_bytes", 0)
        config = replace(config, offload_gib=affordable(config.offload_gib, taken) if device.type == "cuda" else 0.0)
        plan = memory.plan(network, adapters, config, gradients=gradients / (1 + len(others)))  # of one network's
        if config.float8:
            float8.check(device)
        store = HostStore(int(config.offload_gib * memory.GIB), device) if config.offload_gib else None
        fuse_blocks(network, switch, plan, store=store, float8=config.float8, others=others)
        return ""
    if config.float8:
        raise ValueError(f"train.float8 needs compiled blocks with LoRA, but {reason}: set it to false")
    if compiled:
        compile_cache.heal()
        switch.share_graph()
    for one in (network, *others):
        if config.activation_checkpointing:
            one.enable_gradient_checkpointing(gradient_checkpointing_func=switch.checkpoint)
        else:
            one.disable_gradient_checkpointing()  # streamed networks come with it
        # The forward, not the module: hooks (features, ZeRO-3) stay outside the graph, and all blocks share one graph
        # per mode.
        for block in kind_of(one).blocks_of(one) if compiled else ():
            block.forward = torch.compile(block.forward, dynamic=False)
    return reason if compiled else ""
