"""What attention does in a pass of Wan's network, for the self-score's masks (`eval.search.masks`).

Of the middle third of the blocks, averaged over them and over heads; q and k are the normalised projections before
rotation, heads side by side. Affinities are formed for a few query tokens at a time, so memory does not grow with the
clip.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

QUERIES = 1024  # tokens whose affinities exist at once
EPSILON = 1e-8  # of the cosine's norms


@contextmanager
def observed(network: nn.Module, prompt: Tensor, grid: list[int]) -> Iterator[dict[str, Tensor]]:
    """While it is open, passes of a WanTransformer3DModel leave their affinities behind, (B, F, H', W') each, averaged
    over the middle third of the blocks: "text", attention paid to the prompt; "attention", eq. 17.

    prompt (B, L) bool: tokens of the prompt. grid: (F, H', W') of the tokens.
    """
    volumes: dict[str, Tensor] = {}
    number = len(network.blocks)
    layers = network.blocks[number // 3 : max(number // 3 + 1, 2 * number // 3)]

    def watch(kind: str, volume: Callable[[nn.Module, tuple], Tensor]) -> Callable:
        def hook(module: nn.Module, inputs: tuple) -> None:
            volumes[kind] = volumes.get(kind, 0) + volume(module, inputs).unflatten(1, grid) / len(layers)

        return hook

    handles, fused = [], [(block, block.__dict__.pop("forward", None)) for block in layers]  # those call no submodule
    for block in layers:
        text = watch("text", lambda module, inputs: prompt_affinity(module, inputs[0], inputs[1], prompt))
        own = watch("attention", lambda module, inputs: key_change(module, inputs[0], grid))
        handles += [block.attn2.register_forward_pre_hook(text), block.attn1.register_forward_pre_hook(own)]
    try:
        yield volumes
    finally:
        for handle in handles:
            handle.remove()
        for block, forward in fused:
            if forward is not None:
                block.forward = forward


def prompt_affinity(attention: nn.Module, hidden: Tensor, text: Tensor, prompt: Tensor) -> Tensor:
    """Cross-attention's probability on the prompt's tokens, averaged over them and over heads: (B, N) float32.

    hidden (B, N, D) latent tokens, text (B, L, D) text tokens, prompt (B, L) bool.
    """
    key = attention.norm_k(attention.to_k(text)).unflatten(2, (attention.heads, -1)).float()  # (B, L, heads, d)
    share = prompt.float() / prompt.sum(dim=1, keepdim=True).clamp(min=1)
    parts = []
    for tokens in hidden.split(QUERIES, dim=1):
        query = attention.norm_q(attention.to_q(tokens)).unflatten(2, (attention.heads, -1)).float()
        logits = torch.einsum("bnhd,blhd->bhnl", query, key) * query.shape[-1] ** -0.5
        parts.append(torch.einsum("bhnl,bl->bn", logits.softmax(dim=-1), share) / attention.heads)
    return torch.cat(parts, dim=1)


def key_change(attention: nn.Module, hidden: Tensor, grid: list[int]) -> Tensor:
    """ReLU(1 - cos(q_t, k_{t-1})) at each place, the first frame as the second: (B, N) float32; 0 for one frame."""
    frames, places = grid[0], grid[1] * grid[2]
    tokens = hidden.unflatten(1, (frames, places))  # (B, F, H'W', D)
    parts = []
    for frame in range(1, frames):
        query = attention.norm_q(attention.to_q(tokens[:, frame])).float()
        key = attention.norm_k(attention.to_k(tokens[:, frame - 1])).float()
        parts.append((1 - nn.functional.cosine_similarity(query, key, dim=-1, eps=EPSILON)).clamp(min=0))
    if not parts:
        return torch.zeros(hidden.shape[:2], device=hidden.device)
    return torch.stack([parts[0], *parts], dim=1).flatten(1)
