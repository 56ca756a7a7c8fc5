"""Training's fused, compiled blocks for sampling and scoring: the same clip in less time, after a minute's compilation.

The blocks of `fused_block` at their leanest level: without gradients they keep nothing, and a gradient to the latents
(refinement, guidance) computes each block anew, as activation checkpointing would.
"""

from types import SimpleNamespace
from typing import Any

from train.backbones.base import Backbone
from train.backbones.fused.fused_block import fuse_blocks, unfit
from train.lora_switch import SwitchedLinear, SwitchState


def fuse(backbone: Backbone, switch: Any = None, *, compiled: bool = True) -> str:
    """Fuse the blocks of all loaded experts; `switch` is what was attached to one of them, or to both.

    Returns why some network stays as it is, "" where none does: float32 weights on a GPU, an attention kernel without
    logsumexp, adapters outside the blocks, full weights.
    """
    reasons = {}
    for network in backbone.experts.values():
        if reason := unfit(network, switch):
            reasons[reason] = None
            continue
        adapted = any(isinstance(layer, SwitchedLinear) for layer in network.modules())
        holder = switch if adapted else SimpleNamespace(state=SwitchState(1.0, backbone.device))
        levels = [0] * len(backbone.kind.blocks_of(network))
        fuse_blocks(network, holder, lambda *_, levels=levels: levels, compiled=compiled)
    return "; ".join(reasons)
