"""Wan's transformer block as stages of plain tensor functions, compiled whole, with a backward pass of our own.

    norm, modulation -> q, k, v -> rotary -> attention -> out -> gate -> cross-attention -> feed-forward -> gate

Why not diffusers' block under `torch.compile` and `torch.utils.checkpoint`: that recomputes the whole block, attention
and the last product included, runs the reference in grad mode, and keeps either nothing or everything. Here

- the forward pass is one graph without autograd, whatever the grad mode: policy and reference share it bit for bit;
- the backward pass is one graph too: it recomputes only what was not kept and what a gradient needs (never the last
  product of the feed-forward). Products and attention are differentiated by hand, the rest by `torch.func.vjp`;
- what a block keeps is a level of LEVELS, chosen for each block (`memory.py`), least memory for most time first.

Both graphs take weights and adapters as arguments, so that one compilation serves all blocks. The adapters' gate is an
argument as well and is remembered with the pass: backward recomputes with the switch as it stood in forward.

The arithmetic is that of diffusers' WanTransformerBlock (0.42): norms, modulation and gates in float32, products in
the weights' dtype. Two roundings to that dtype are left out, after the norm of queries and keys and before each gate,
where one kernel holds the float32 value. Gradients flow to the hidden states and the adapters; text and timestep
embeddings get none, and there is no second derivative.
"""

from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from train import compile_cache
from train.backbones import kind_of
from train.backbones.attention_kernels import KERNELS
from train.backbones.fused import float8
from train.backbones.fused.memory import INPUT_OFFLOADED, OFFLOADED, passes_waiting
from train.backbones.fused.offload import HostStore
from train.backbones.fused.stages import (
    Frozen,
    Settings,
    cross_attend,
    cross_norm,
    gated,
    gelu,
    heads,
    modulated_norm,
    rotate,
)
from train.full_parameters import FullParameters
from train.lora_switch import LoraSwitch, SwitchedLinear

Adapters = dict[str, tuple[Tensor, Tensor]]  # layer name -> (down (rank, in), up (out, rank))

# What a block keeps for backward beside its input, most seconds saved per byte first; each includes those before it.
# OFFLOADED keeps as much as the one before, in host memory; INPUT_OFFLOADED as little as the first, its input there.
ATTENTION = ("attended", "logsumexp")
HIDDEN = (*ATTENTION, "after_self", "cross_query", "after_cross")
EVERYTHING = (*HIDDEN, "query", "key", "value", "wide")
LEVELS: tuple[tuple[str, ...], ...] = ((), ATTENTION, HIDDEN, EVERYTHING, EVERYTHING, ())


# Products: a frozen linear layer and, where it has one, its gated adapter.


def _products(settings: Settings, frozen: Frozen, adapters: Adapters, layers: tuple[str, ...], x: Tensor):
    """What the layers make of one input, a tuple of (B, N, out); the adapters read it once."""
    outputs = {}
    for name in layers:
        weight, bias = frozen[f"{name}.weight"], frozen[f"{name}.bias"]
        outputs[name] = float8.linear(x, weight) + bias if settings.float8 else F.linear(x, weight, bias)
    for name, down in _down(adapters, layers, x).items():
        outputs[name] = outputs[name] + F.linear(down, (adapters[name][1] * frozen["gate"]).to(x.dtype))
    return tuple(outputs.values())


def _down(adapters: Adapters, layers: tuple[str, ...], x: Tensor) -> dict[str, Tensor]:
    """The adapted layers' down-projections of x, (B, N, R) each."""
    names = [name for name in layers if name in adapters]
    if not names:
        return {}
    stacked = F.linear(x, torch.cat([adapters[name][0] for name in names]).to(x.dtype))
    return dict(zip(names, stacked.split([adapters[name][0].shape[0] for name in names], dim=-1), strict=True))


def _products_backward(
    settings: Settings, frozen: Frozen, adapters: Adapters, layers: tuple[str, ...], x: Tensor, grads: list[Tensor]
) -> tuple[Tensor, Adapters]:
    """Gradients of x and of the layers' adapters, from those of the layers' outputs."""
    x_grad, dtype = None, x.dtype
    for name, grad in zip(layers, grads, strict=True):
        weight = frozen[f"{name}.weight"]
        part = float8.linear(grad, weight.t()) if settings.float8 else grad @ weight
        x_grad = part if x_grad is None else x_grad + part
    downs = _down(adapters, layers, x)
    if not downs:
        return x_grad, {}
    given = dict(zip(layers, grads, strict=True))
    down_grads = [given[name] @ (adapters[name][1] * frozen["gate"]).to(dtype) for name in downs]  # (B, N, R) each
    stacked = torch.cat(down_grads, dim=-1)
    x_grad = x_grad + stacked @ torch.cat([adapters[name][0] for name in downs]).to(dtype)
    first = (stacked.flatten(0, 1).t() @ x.flatten(0, 1)).float().split([grad.shape[-1] for grad in down_grads])
    own = {}
    for (name, down), down_weight in zip(downs.items(), first, strict=True):
        up_weight = (given[name].flatten(0, 1).t() @ down.flatten(0, 1)).float() * frozen["gate"]
        own[name] = (down_weight, up_weight)
    return x_grad, own


class Between(NamedTuple):
    """A stage that `torch.func.vjp` differentiates: norms, gates, rotary, cross-attention."""

    run: Callable[..., Tensor]
    inputs: tuple[str, ...]
    output: str


class Products(NamedTuple):
    layers: tuple[str, ...]
    input: str
    outputs: tuple[str, ...]


class Attention(NamedTuple):
    """Self-attention; its output is (B, N, D)."""

    inputs: tuple[str, ...]
    outputs: tuple[str, str]


STAGES = (
    Between(partial(modulated_norm, 0), ("hidden",), "self_input"),
    Products(("attn1.to_q", "attn1.to_k", "attn1.to_v"), "self_input", ("query", "key", "value")),
    Between(partial(rotate, "attn1.norm_q.weight"), ("query",), "query_heads"),
    Between(partial(rotate, "attn1.norm_k.weight"), ("key",), "key_heads"),
    Between(lambda settings, frozen, value: heads(settings, value), ("value",), "value_heads"),
    Attention(("query_heads", "key_heads", "value_heads"), ("attended", "logsumexp")),
    Products(("attn1.to_out.0",), "attended", ("self_output",)),
    Between(partial(gated, 2), ("hidden", "self_output"), "after_self"),
    Between(cross_norm, ("after_self",), "cross_input"),
    Products(("attn2.to_q",), "cross_input", ("cross_query",)),
    Products(("attn2.to_k", "attn2.to_v"), "text", ("text_key", "text_value")),
    Between(cross_attend, ("cross_query", "text_key", "text_value"), "cross_attended"),
    Products(("attn2.to_out.0",), "cross_attended", ("cross_output",)),
    Between(lambda settings, frozen, hidden, out: hidden + out, ("after_self", "cross_output"), "after_cross"),
    Between(partial(modulated_norm, 3), ("after_cross",), "wide_input"),
    Products(("ffn.net.0.proj",), "wide_input", ("wide",)),
    Between(gelu, ("wide",), "activated"),
    Products(("ffn.net.2",), "activated", ("narrow",)),
    Between(partial(gated, 5), ("after_cross", "narrow"), "output"),
)
LAYERS = frozenset(layer for stage in STAGES if isinstance(stage, Products) for layer in stage.layers)


def _compute(
    stage: Products | Attention, settings: Settings, frozen: Frozen, adapters: Adapters, values: dict[str, Tensor]
) -> None:
    """Put the stage's outputs into `values`."""
    if isinstance(stage, Products):
        outputs = _products(settings, frozen, adapters, stage.layers, values[stage.input])
    else:
        attended, logsumexp = settings.kernel.forward(*(values[name] for name in stage.inputs))
        outputs = attended.transpose(1, 2).flatten(2), logsumexp  # a view: kernels lay the output out as the query
    values.update(zip(stage.outputs, outputs, strict=True))


def forward(
    settings: Settings, keep: tuple[str, ...], frozen: Frozen, adapters: Adapters, hidden: Tensor
) -> tuple[Tensor, list[Tensor]]:
    """The block's output (B, N, D) and what `keep` names."""
    values = {"hidden": hidden, "text": frozen["text"]}
    for stage in STAGES:
        if isinstance(stage, Between):
            values[stage.output] = stage.run(settings, frozen, *(values[name] for name in stage.inputs))
        else:
            _compute(stage, settings, frozen, adapters, values)
    return values["output"], [values[name] for name in keep]


def backward(
    settings: Settings,
    keep: tuple[str, ...],
    frozen: Frozen,
    adapters: Adapters,
    hidden: Tensor,
    kept: list[Tensor],
    grad: Tensor,
) -> tuple[Tensor, Adapters]:
    """Gradients of the hidden states (B, N, D) and of the adapters, from the output's.

    Outputs of stages that were kept are not computed again; the compiler drops stages whose outputs are then unused.
    """
    values = {"hidden": hidden, "text": frozen["text"]} | dict(zip(keep, kept, strict=True))
    pullbacks = {}
    for stage in STAGES:
        if isinstance(stage, Between):
            run = partial(stage.run, settings, frozen)
            output, pullbacks[stage.output] = torch.func.vjp(run, *(values[name] for name in stage.inputs))
            values.setdefault(stage.output, output)
        elif stage.outputs[0] not in values:
            _compute(stage, settings, frozen, adapters, values)

    grads: dict[str, Tensor] = {"output": grad}
    adapter_grads: Adapters = {}

    def give(name: str, value: Tensor) -> None:
        grads[name] = grads[name] + value if name in grads else value

    for stage in reversed(STAGES):
        if isinstance(stage, Between):
            for name, value in zip(stage.inputs, pullbacks[stage.output](grads[stage.output]), strict=True):
                give(name, value)
        elif isinstance(stage, Products):
            outputs = [grads[name] for name in stage.outputs]
            x_grad, own = _products_backward(settings, frozen, adapters, stage.layers, values[stage.input], outputs)
            give(stage.input, x_grad)
            adapter_grads.update(own)
        else:
            attended, logsumexp = (values[name] for name in stage.outputs)
            inputs = [values[name] for name in stage.inputs]
            out_grad, out = heads(settings, grads["attended"]), heads(settings, attended)
            input_grads = settings.kernel.backward(out_grad, *inputs, out, logsumexp)
            for name, value in zip(stage.inputs, input_grads, strict=True):
                give(name, value)
    return grads["hidden"], adapter_grads


class Graphs:
    """`forward` and `backward` for one level; all blocks of the level share them."""

    def __init__(self, settings: Settings, level: int, compiled: bool):
        keep = LEVELS[level]
        self.stays = {OFFLOADED: 1, INPUT_OFFLOADED: 0}.get(level)  # how many of input and kept, if others do not

        def run_forward(frozen, adapters, hidden):
            return forward(settings, keep, frozen, adapters, hidden)

        def run_backward(frozen, adapters, hidden, kept, grad):
            return backward(settings, keep, frozen, adapters, hidden, kept, grad)

        wrap = partial(torch.compile, dynamic=False) if compiled else lambda function: function
        self.forward, self.backward = wrap(run_forward), wrap(run_backward)


class FusedBlock:
    """Stands in for one block's `forward`; what it computes with are the block's own parameters.

    Called as diffusers calls a block. Under ZeRO-3 the block's hooks gather it as a whole before either pass; `fetch`
    is called before either pass of a block whose weights wait in host memory.
    """

    def __init__(
        self,
        block: nn.Module,
        switch: LoraSwitch,
        choose: Callable[[torch.Size, int], Graphs],
        store: HostStore | None = None,
        fetch: Callable[[], None] = lambda: None,
    ):
        self.parameters = dict(block.named_parameters())
        self.state = switch.state
        layers = {name: layer for name, layer in block.named_modules() if isinstance(layer, SwitchedLinear)}
        self.adapters = {name: (layer.lora_down, layer.lora_up) for name, layer in layers.items()}
        self.choose, self.store, self.fetch = choose, store, fetch

    def __call__(self, hidden: Tensor, text: Tensor, temb: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
        flat = [weight for pair in self.adapters.values() for weight in pair]
        graphs = self.choose(hidden.shape, passes_waiting())
        store = self.store if torch.is_grad_enabled() else None  # inside the function grad mode is always off
        self.fetch()
        return _BlockFunction.apply(self, graphs, store, self.state.gate, hidden, text, temb, *rotary, *flat)

    def frozen(self, text: Tensor, temb: Tensor, cos: Tensor, sin: Tensor, gate: Tensor) -> Frozen:
        return self.parameters | {"text": text, "temb": temb, "cos": cos, "sin": sin, "gate": gate}

    def pairs(self, flat: tuple[Tensor, ...]) -> Adapters:
        flat = tuple(weight.detach() for weight in flat)
        return dict(zip(self.adapters, zip(flat[::2], flat[1::2], strict=True), strict=True))


class _BlockFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, block: FusedBlock, graphs: Graphs, store: HostStore | None, gate, hidden, text, temb, cos, sin, *flat
    ) -> Tensor:
        frozen = block.frozen(text, temb, cos, sin, gate)
        # Detached: whether an input requires a gradient is part of what a graph is compiled for.
        output, kept = graphs.forward(frozen, block.pairs(flat), hidden.detach())
        ctx.block, ctx.graphs = block, graphs
        ctx.earlier = None if store is None else store.newest()
        saved, ctx.parcel = [hidden, *kept], None
        if store is not None and graphs.stays is not None:
            ctx.parcel = store.send([tensor.detach() for tensor in saved[graphs.stays :]])
        if ctx.parcel is not None:
            saved = saved[: graphs.stays]
        ctx.save_for_backward(gate, text, temb, cos, sin, *flat, *saved)
        return output

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        block = ctx.block
        gate, text, temb, cos, sin, *rest = ctx.saved_tensors
        count = 2 * len(block.adapters)
        hidden, *kept = [*rest[count:], *([] if ctx.parcel is None else ctx.parcel.fetch())]
        if ctx.earlier is not None:
            ctx.earlier.prefetch()
        ctx.earlier = ctx.parcel = None  # this function outlives the pass, its parcel's memory must not
        block.fetch()
        frozen = block.frozen(text, temb, cos, sin, gate)
        hidden_grad, adapter_grads = ctx.graphs.backward(
            frozen, block.pairs(rest[:count]), hidden.detach(), kept, grad.contiguous()
        )
        flat = [weight for name in block.adapters for weight in adapter_grads[name]]
        return None, None, None, None, hidden_grad, None, None, None, None, *flat


def kernel_name(network: nn.Module) -> str | None:
    """Key of KERNELS for the diffusers backend that `train.backbones.loading.choose_attention` set; None: no such."""
    attention = network.blocks[0].attn1
    backend, weight = attention.processor._attention_backend, attention.to_q.weight
    name = None if backend is None else getattr(backend, "value", backend)
    if weight.device.type == "cpu":
        return "cpu" if name in (None, "native") else None
    if weight.dtype != torch.bfloat16:
        return None
    return {"_native_cudnn": "cudnn", None: "flash", "native": "flash", "_native_flash": "flash"}.get(name)


def unfit(network: nn.Module, switch: Any = None) -> str:
    """Why this network's blocks cannot be fused, for a message; empty when they can. switch: what was attached, if
    anything was."""
    if isinstance(switch, FullParameters):
        return "all weights train"
    adapted = [name.split(".", 2) for name, layer in network.named_modules() if isinstance(layer, SwitchedLinear)]
    if not kind_of(network).fused:
        return f"there are no fused blocks for {type(network).__name__}"
    if any(parts[0] != "blocks" or parts[2] not in LAYERS for parts in adapted):
        return "an adapter lies outside the blocks' linear layers"
    if network.blocks[0].attn2.add_k_proj is not None:
        return "the blocks attend to image embeddings"
    if kernel_name(network) is None:
        return "the attention kernel gives no logsumexp"
    return ""


def fuse_blocks(
    network: nn.Module,
    switch: LoraSwitch,
    plan: Callable[[torch.Size, int], list[int]],
    *,
    store: HostStore | None = None,
    float8: bool = False,
    compiled: bool = True,
    others: Sequence[nn.Module] = (),
) -> None:
    """Replace every block's forward. Hooks stay outside the graphs.

    `plan` gives each block's index of LEVELS, for hidden states of shape (B, N, D) and a number of passes that wait for
    their backward at once (`memory.waiting`); it is asked once. `store` is for blocks that are OFFLOADED; without it,
    or where it is full, they keep everything on the device. `others`: networks of the same architecture, which share
    the graphs. Weights in host memory (`network.streamed`) are fetched by the blocks themselves.
    """
    if compiled:
        compile_cache.heal()
    block = network.blocks[0]
    name = kernel_name(network)
    kernel = KERNELS[getattr(network, "self_attention", name)]
    settings = Settings(block.attn1.heads, block.norm1.eps, kernel, KERNELS[name], float8)
    graphs = [Graphs(settings, level, compiled) for level in range(len(LEVELS))]
    plan = cache(plan)
    for one in (network, *others):
        streamed = getattr(one, "streamed", None)
        if streamed is not None:
            streamed.fused = True
            one.disable_gradient_checkpointing()  # fused blocks compute themselves anew
        for index, block in enumerate(one.blocks):
            fetch = {} if streamed is None else {"fetch": partial(streamed.fetch, index)}
            choose = partial(lambda index, *key: graphs[plan(*key)[index]], index)
            block.forward = FusedBlock(block, switch, choose, store, **fetch)
