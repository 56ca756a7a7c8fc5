"""Where the self-score looks: the three masks of Proprio (appendix D), each (N, F, H, W) float32 in [0, 1].

    motion      change of the latents from frame to frame (eq. 14; `losses.self_score.motion_mask`)
    text        change of the attention that a place pays to the prompt's tokens (eqs. 15-16)
    attention   ReLU(1 - cos(q_t, k_{t-1})) of self-attention's queries and keys at one place (eq. 17)

The paper leaves the layers, the probe's time and the normalisation open. Here: the middle third of the blocks, one pass
at the lowest noise level of the residuals with their first draw; affinities average over heads and the prompt's own
tokens (padding takes part in the softmax, as it does in the network); q and k are the normalised projections before
rotation, heads side by side; the first frame takes the second's value, as in the motion mask; each clip is divided by
its largest value. Affinities are formed for a few query tokens at a time, so memory does not grow with the clip.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from eval.search.candidates import Candidates
from eval.search.residuals import Residuals, flow_residual
from losses.self_score import motion_mask

MASKS = ("motion", "text", "attention")
QUERIES = 1024  # tokens whose affinities exist at once
EPSILON = 1e-8  # of the cosine's norms


def mask_of(kind: str, candidates: Candidates, residuals: Residuals) -> Tensor:
    """The mask of that kind for all candidates, (N, F, H, W) on the CPU; one network pass per clip for text and
    attention together, the first time. Raises ValueError for another kind."""
    if kind not in MASKS:
        raise ValueError(f"mask {kind!r} is unknown: use one of {', '.join(MASKS)}")
    if kind == "motion":
        return candidates.shared("motion mask", lambda: (motion_mask(candidates.latents), 0))
    name = ("attention masks", residuals.times[0])
    return candidates.shared(name, lambda: (attention_masks(candidates, residuals), len(candidates)))[kind]


@torch.no_grad()
def attention_masks(candidates: Candidates, residuals: Residuals) -> dict[str, Tensor]:
    """The masks "text" and "attention" of all candidates, from one pass of each."""
    backbone, t = residuals.backbone, residuals.times[0]
    noise = residuals.noise(candidates, 0, 0).to(backbone.device)
    patch = backbone.architecture["transformer"]["patch_size"]
    grid = [n // p for n, p in zip(candidates.latents.shape[2:], patch, strict=True)]
    found: dict[str, list[Tensor]] = {"text": [], "attention": []}
    for latents in candidates.latents.split(residuals.config.batch_size):
        conditioning = candidates.conditioning.expand(len(latents)).to(backbone.device)
        latents = latents.to(backbone.device)
        prompt = conditioning.text.ne(0).any(dim=-1)  # (B, L), False at padding
        with observed(backbone.expert_serving(t), prompt, grid) as volumes:
            flow_residual(backbone, latents, noise.expand_as(latents), t, conditioning)
        found["text"].append(normalised(change(volumes["text"]), patch))
        found["attention"].append(normalised(volumes["attention"], patch))
    return {kind: torch.cat(parts).cpu() for kind, parts in found.items()}


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


def change(volume: Tensor) -> Tensor:
    """|A_t - A_{t-1}| of (B, F, H', W'), eq. 16; the first frame takes the second's value; 0 for one frame."""
    if volume.shape[1] == 1:
        return torch.zeros_like(volume)
    difference = volume.diff(dim=1).abs()
    return torch.cat([difference[:, :1], difference], dim=1)


def normalised(volume: Tensor, patch: tuple[int, int, int] | list[int]) -> Tensor:
    """Tokens (B, F', H', W') to latent cells (B, F, H, W), each clip divided by its largest value."""
    for axis, size in enumerate(patch, start=1):
        volume = volume.repeat_interleave(size, dim=axis)
    largest = volume.amax(dim=(1, 2, 3), keepdim=True)
    return torch.where(largest > 0, volume / largest.clamp(min=torch.finfo(torch.float32).tiny), 0.0)
