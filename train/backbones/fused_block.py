"""Wan's transformer block as seven stages of plain tensor functions, compiled whole, with a backward pass of our own.

    modulated norm -> q, k, v -> rotary -> attention -> out, gate -> cross-attention -> feed-forward, gate

Why not diffusers' block under `torch.compile` and `torch.utils.checkpoint`: that recomputes the whole block, attention
and the last product included, runs the reference in grad mode, and keeps either nothing or everything. Here

- the forward pass is one graph without autograd, whatever the grad mode: policy and reference share it bit for bit;
- the backward pass is one graph too: it recomputes only what was not kept and what a gradient needs (never the last
  product of the feed-forward), stage by stage with `torch.func.vjp`;
- what a block keeps is a level of LEVELS, chosen for each block (`train.memory`), least memory for most time first.

Both graphs take weights and adapters as arguments, so that one compilation serves all blocks. The adapters' gate is an
argument as well and is remembered with the pass: backward recomputes with the switch as it stood in forward.

The arithmetic is that of diffusers' WanTransformerBlock (0.42): norms, modulation and gates in float32, products in
the weights' dtype. Two roundings to that dtype are left out, after the norm of queries and keys and after each product
that is gated, which are float32 inside one kernel here. Gradients flow to the hidden states and the adapters; text and
timestep embeddings get none, and there is no second derivative.
"""

from collections.abc import Callable
from functools import cache, partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from train.lora_switch import LoraSwitch, SwitchedLinear

Frozen = dict[str, Tensor]  # the block's weights by name, and text, temb, cos, sin, gate
Adapters = dict[str, tuple[Tensor, Tensor]]  # layer name -> (down (rank, in), up (out, rank))

# What a block keeps for backward beside its input, cheapest second per byte first; each includes those before it.
LEVELS: tuple[tuple[str, ...], ...] = (
    (),
    ("attended", "logsumexp"),
    ("attended", "logsumexp", "after_self", "cross_query", "after_cross"),
    ("attended", "logsumexp", "after_self", "cross_query", "after_cross", "query", "key", "value", "wide"),
)


class Kernel(NamedTuple):
    """An attention kernel: forward (q, k, v) -> (out, logsumexp), and its backward."""

    forward: Callable[..., tuple[Tensor, Tensor]]
    backward: Callable[..., tuple[Tensor, Tensor, Tensor]]


def _cudnn(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    return torch.ops.aten._scaled_dot_product_cudnn_attention(query, key, value, None, True)[:2]


def _cudnn_backward(grad, query, key, value, out, logsumexp):
    unused = torch.zeros((), dtype=torch.int64, device=grad.device)  # random state: there is no dropout
    lengths = None, None, query.shape[2], key.shape[2]
    backward = torch.ops.aten._scaled_dot_product_cudnn_attention_backward
    return backward(grad, query, key, value, out, logsumexp, unused, unused, None, *lengths, 0.0, False)


def _flash(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    return torch.ops.aten._scaled_dot_product_flash_attention(query, key, value)[:2]


def _flash_backward(grad, query, key, value, out, logsumexp):
    unused = torch.zeros(2, dtype=torch.uint64, device=grad.device)
    lengths = None, None, query.shape[2], key.shape[2]
    backward = torch.ops.aten._scaled_dot_product_flash_attention_backward
    return backward(grad, query, key, value, out, logsumexp, *lengths, 0.0, False, unused, unused)


def _cpu(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, key, value)


def _cpu_backward(grad, query, key, value, out, logsumexp):
    backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    return backward(grad, query, key, value, out, logsumexp, 0.0, False)


KERNELS = {"cudnn": Kernel(_cudnn, _cudnn_backward), "flash": Kernel(_flash, _flash_backward)}
KERNELS["cpu"] = Kernel(_cpu, _cpu_backward)


class Settings(NamedTuple):
    """What is the same for all blocks and constant in their graphs."""

    heads: int
    eps: float
    kernel: Kernel


# Stages. Hidden states are (B, N, D); B batch, N tokens, D width, L text tokens, R rank.


def _linear(frozen: Frozen, adapters: Adapters, name: str, x: Tensor) -> Tensor:
    y = F.linear(x, frozen[f"{name}.weight"], frozen[f"{name}.bias"])
    if name not in adapters:
        return y
    down, up = adapters[name]
    return y + F.linear(F.linear(x, down.to(x.dtype)), (up * frozen["gate"]).to(x.dtype))


def _modulation(frozen: Frozen, index: int) -> Tensor:
    """Row `index` of shift, scale, gate (self-attention, then feed-forward): float32 (B, 1, D) or (B, N, D)."""
    temb = frozen["temb"]  # (B, 6, D) or (B, N, 6, D)
    row = temb[..., index, :].float() + frozen["scale_shift_table"][:, index]
    return row.unsqueeze(1) if temb.ndim == 3 else row


def _norm(settings: Settings, x: Tensor) -> Tensor:
    return F.layer_norm(x.float(), x.shape[-1:], eps=settings.eps)


def _heads(settings: Settings, x: Tensor) -> Tensor:
    """(B, N, D) -> (B, heads, N, D / heads), a view."""
    return x.unflatten(2, (settings.heads, -1)).transpose(1, 2)


def _root_mean_square_norm(settings: Settings, x: Tensor, weight: Tensor) -> Tensor:
    """Over all heads together, float32."""
    x = x.float()
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + settings.eps) * weight.float()


def _project(settings: Settings, frozen: Frozen, adapters: Adapters, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    x = (_norm(settings, hidden) * (1 + _modulation(frozen, 1)) + _modulation(frozen, 0)).to(hidden.dtype)
    names = ("attn1.to_q", "attn1.to_k", "attn1.to_v")
    outputs = {n: F.linear(x, frozen[f"{n}.weight"], frozen[f"{n}.bias"]) for n in names}
    adapted = [name for name in names if name in adapters]
    if adapted:  # one reading of x for all down-projections
        downs = F.linear(x, torch.cat([adapters[name][0] for name in adapted]).to(x.dtype))  # (B, N, sum of R)
        parts = downs.split([adapters[name][0].shape[0] for name in adapted], dim=-1)
        for name, part in zip(adapted, parts, strict=True):
            outputs[name] = outputs[name] + F.linear(part, (adapters[name][1] * frozen["gate"]).to(x.dtype))
    return tuple(outputs[name] for name in names)


def _rotate(settings: Settings, frozen: Frozen, adapters: Adapters, query: Tensor, key: Tensor, value: Tensor):
    """(B, heads, N, D / heads) each; query and key normed over all heads, channel pairs (2i, 2i + 1) rotated."""
    cos, sin = frozen["cos"], frozen["sin"]  # (1, N, 1, D / heads), each pair's value twice
    sign = torch.tensor([-1.0, 1.0], device=sin.device).repeat(sin.shape[-1] // 2)

    def rotate(x: Tensor, weight: Tensor) -> Tensor:
        x32 = _root_mean_square_norm(settings, x, weight).unflatten(2, (settings.heads, -1))  # (B, N, heads, D / heads)
        swapped = x32.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
        return (x32 * cos + swapped * (sin * sign)).to(x.dtype).transpose(1, 2)

    query, key = rotate(query, frozen["attn1.norm_q.weight"]), rotate(key, frozen["attn1.norm_k.weight"])
    return query, key, _heads(settings, value)


def _self_output(settings: Settings, frozen: Frozen, adapters: Adapters, hidden: Tensor, attended: Tensor):
    out = _linear(frozen, adapters, "attn1.to_out.0", attended.transpose(1, 2).flatten(2))
    return ((hidden.float() + out * _modulation(frozen, 2)).to(hidden.dtype),)


def _cross_query(settings: Settings, frozen: Frozen, adapters: Adapters, after_self: Tensor):
    x = after_self
    if "norm2.weight" in frozen:
        x = F.layer_norm(x.float(), x.shape[-1:], frozen["norm2.weight"], frozen["norm2.bias"], settings.eps)
    return (_linear(frozen, adapters, "attn2.to_q", x.to(after_self.dtype)),)


def _cross_output(settings: Settings, frozen: Frozen, adapters: Adapters, after_self: Tensor, cross_query: Tensor):
    text, dtype = frozen["text"], after_self.dtype  # (B, L, D)
    query = _root_mean_square_norm(settings, cross_query, frozen["attn2.norm_q.weight"]).to(dtype)
    key = _linear(frozen, adapters, "attn2.to_k", text)
    key = _root_mean_square_norm(settings, key, frozen["attn2.norm_k.weight"]).to(dtype)
    value = _linear(frozen, adapters, "attn2.to_v", text)
    attended, _ = settings.kernel.forward(*(_heads(settings, x) for x in (query, key, value)))
    return (after_self + _linear(frozen, adapters, "attn2.to_out.0", attended.transpose(1, 2).flatten(2)),)


def _widen(settings: Settings, frozen: Frozen, adapters: Adapters, after_cross: Tensor):
    x = _norm(settings, after_cross) * (1 + _modulation(frozen, 4)) + _modulation(frozen, 3)
    return (_linear(frozen, adapters, "ffn.net.0.proj", x.to(after_cross.dtype)),)


def _narrow(settings: Settings, frozen: Frozen, adapters: Adapters, after_cross: Tensor, wide: Tensor):
    out = _linear(frozen, adapters, "ffn.net.2", F.gelu(wide, approximate="tanh"))
    return ((after_cross.float() + out.float() * _modulation(frozen, 5)).to(after_cross.dtype),)


class Stage(NamedTuple):
    run: Callable[..., tuple[Tensor, ...]]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    layers: tuple[str, ...] = ()  # the linear layers inside, which may have adapters


ATTEND = Stage(lambda *_: (), ("query_heads", "key_heads", "value_heads"), ("attended", "logsumexp"))
STAGES = (
    Stage(_project, ("hidden",), ("query", "key", "value"), ("attn1.to_q", "attn1.to_k", "attn1.to_v")),
    Stage(_rotate, ("query", "key", "value"), ("query_heads", "key_heads", "value_heads")),
    ATTEND,
    Stage(_self_output, ("hidden", "attended"), ("after_self",), ("attn1.to_out.0",)),
    Stage(_cross_query, ("after_self",), ("cross_query",), ("attn2.to_q",)),
    Stage(
        _cross_output,
        ("after_self", "cross_query"),
        ("after_cross",),
        ("attn2.to_k", "attn2.to_v", "attn2.to_out.0"),
    ),
    Stage(_widen, ("after_cross",), ("wide",), ("ffn.net.0.proj",)),
    Stage(_narrow, ("after_cross", "wide"), ("output",), ("ffn.net.2",)),
)
LAYERS = frozenset(layer for stage in STAGES for layer in stage.layers)


def forward(
    settings: Settings, keep: tuple[str, ...], frozen: Frozen, adapters: Adapters, hidden: Tensor
) -> tuple[Tensor, list[Tensor]]:
    """The block's output (B, N, D) and what `keep` names."""
    values = {"hidden": hidden}
    for stage in STAGES:
        inputs = [values[name] for name in stage.inputs]
        if stage is ATTEND:
            outputs = settings.kernel.forward(*inputs)
        else:
            outputs = stage.run(settings, frozen, adapters, *inputs)
        values |= zip(stage.outputs, outputs, strict=True)
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

    What was kept stands in for what the stages give, whose computation then has no use and is dropped when compiled.
    """
    values = {"hidden": hidden} | dict(zip(keep, kept, strict=True))
    pullbacks = []
    for stage in STAGES:
        inputs = tuple(values[name] for name in stage.inputs)
        if stage is ATTEND:
            if "attended" not in values:
                values |= zip(stage.outputs, settings.kernel.forward(*inputs), strict=True)
            pullbacks.append(None)
            continue
        own = {name: adapters[name] for name in stage.layers if name in adapters}
        run = partial(_apply, stage, settings, frozen)
        outputs, pullback = torch.func.vjp(run, inputs, own)
        pullbacks.append(pullback)
        values = dict(zip(stage.outputs, outputs, strict=True)) | values

    grads: dict[str, Tensor] = {"output": grad}
    adapter_grads: Adapters = {}
    for stage, pullback in zip(reversed(STAGES), reversed(pullbacks), strict=True):
        if stage is ATTEND:
            inputs = [values[name] for name in stage.inputs]
            out_grad, out, logsumexp = grads["attended"], values["attended"], values["logsumexp"]
            given = settings.kernel.backward(out_grad, *inputs, out, logsumexp)
        else:
            given, own = pullback(tuple(grads[name] for name in stage.outputs))
            adapter_grads |= own
        for name, value in zip(stage.inputs, given, strict=True):
            grads[name] = grads[name] + value if name in grads else value
    return grads["hidden"], adapter_grads


def _apply(stage: Stage, settings: Settings, frozen: Frozen, inputs: tuple[Tensor, ...], adapters: Adapters):
    return stage.run(settings, frozen, adapters, *inputs)


class Graphs:
    """`forward` and `backward` for one level; all blocks of the level share them."""

    def __init__(self, settings: Settings, keep: tuple[str, ...], compiled: bool):
        def run_forward(frozen, adapters, hidden):
            return forward(settings, keep, frozen, adapters, hidden)

        def run_backward(frozen, adapters, hidden, kept, grad):
            return backward(settings, keep, frozen, adapters, hidden, kept, grad)

        wrap = partial(torch.compile, dynamic=False) if compiled else lambda function: function
        self.forward, self.backward = wrap(run_forward), wrap(run_backward)


class FusedBlock:
    """Stands in for one block's `forward`; what it computes with are the block's own parameters.

    Called as diffusers calls a block. Under ZeRO-3 the block's hooks gather it as a whole before either pass.
    """

    def __init__(self, block: nn.Module, switch: LoraSwitch, choose: Callable[[torch.Size], Graphs]):
        self.parameters = dict(block.named_parameters())
        self.state = switch.state
        layers = {name: layer for name, layer in block.named_modules() if isinstance(layer, SwitchedLinear)}
        self.adapters = {name: (layer.lora_down, layer.lora_up) for name, layer in layers.items()}
        self.choose = choose

    def __call__(self, hidden: Tensor, text: Tensor, temb: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
        flat = [weight for pair in self.adapters.values() for weight in pair]
        graphs = self.choose(hidden.shape)
        return _BlockFunction.apply(self, graphs, self.state.gate, hidden, text, temb, *rotary, *flat)

    def frozen(self, text: Tensor, temb: Tensor, cos: Tensor, sin: Tensor, gate: Tensor) -> Frozen:
        return self.parameters | {"text": text, "temb": temb, "cos": cos, "sin": sin, "gate": gate}

    def pairs(self, flat: tuple[Tensor, ...]) -> Adapters:
        flat = tuple(weight.detach() for weight in flat)
        return dict(zip(self.adapters, zip(flat[::2], flat[1::2], strict=True), strict=True))


class _BlockFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, block: FusedBlock, graphs: Graphs, gate, hidden, text, temb, cos, sin, *flat) -> Tensor:
        frozen = block.frozen(text, temb, cos, sin, gate)
        # Detached: whether an input requires a gradient is part of what a graph is compiled for.
        output, kept = graphs.forward(frozen, block.pairs(flat), hidden.detach())
        ctx.block, ctx.graphs = block, graphs
        ctx.save_for_backward(gate, hidden, text, temb, cos, sin, *flat, *kept)
        return output

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        block = ctx.block
        gate, hidden, text, temb, cos, sin, *rest = ctx.saved_tensors
        count = 2 * len(block.adapters)
        frozen = block.frozen(text, temb, cos, sin, gate)
        hidden_grad, adapter_grads = ctx.graphs.backward(
            frozen, block.pairs(rest[:count]), hidden.detach(), list(rest[count:]), grad.contiguous()
        )
        flat = [weight for name in block.adapters for weight in adapter_grads[name]]
        return None, None, None, hidden_grad, None, None, None, None, *flat


def unfit(network: nn.Module, switch: Any) -> str:
    """Why this network's blocks cannot be fused, for a message; empty when they can."""
    if not isinstance(switch, LoraSwitch):
        return "all weights train"
    inside = [name.removesuffix(".lora_A.weight").split(".", 2) for name in switch.weights if ".lora_A." in name]
    if any(parts[0] != "blocks" or parts[2] not in LAYERS for parts in inside):
        return "an adapter lies outside the blocks' linear layers"
    if network.blocks[0].attn2.add_k_proj is not None:
        return "the blocks attend to image embeddings"
    if kernel_name(network) is None:
        return "the attention kernel gives no logsumexp"
    return ""


def kernel_name(network: nn.Module) -> str | None:
    """Key of KERNELS for the kernel that `train.backbones.loading.choose_attention` set, or None: another one."""
    attention = network.blocks[0].attn1
    backend, weight = attention.processor._attention_backend, attention.to_q.weight
    name = None if backend is None else getattr(backend, "value", backend)
    if weight.device.type == "cpu":
        return "cpu" if name in (None, "native") else None
    if weight.dtype != torch.bfloat16:
        return None
    return {"_native_cudnn": "cudnn", None: "flash", "native": "flash", "_native_flash": "flash"}.get(name)


def fuse_blocks(
    network: nn.Module, switch: LoraSwitch, plan: Callable[[torch.Size], list[int]], *, compiled: bool = True
) -> None:
    """Replace every block's forward. Hooks stay outside the graphs.

    `plan` gives, for hidden states of shape (B, N, D), each block's index of LEVELS: asked once a shape.
    """
    block = network.blocks[0]
    settings = Settings(block.attn1.heads, block.norm1.eps, KERNELS[kernel_name(network)])
    graphs = [Graphs(settings, keep, compiled) for keep in LEVELS]
    plan = cache(plan)
    for index, block in enumerate(network.blocks):
        block.forward = FusedBlock(block, switch, lambda shape, index=index: graphs[plan(shape)[index]])
