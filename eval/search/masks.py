"""Where the self-score looks: the three masks of Proprio (appendix D), each (N, F, H, W) float32 in [0, 1].

    motion      change of the latents from frame to frame (eq. 14; `losses.self_score.motion_mask`)
    text        change of the attention that a place pays to the prompt's tokens (eqs. 15-16)
    attention   ReLU(1 - cos(q_t, k_{t-1})) of self-attention's queries and keys at one place (eq. 17)

The paper leaves the layers, the probe's time and the normalisation open. Here: the middle third of the blocks, one pass
at the lowest noise level of the residuals with their first draw; affinities average over heads and the prompt's own
tokens (padding takes part in the softmax, as it does in the network); q and k are the normalised projections before
rotation, heads side by side; the first frame takes the second's value, as in the motion mask; each clip is divided by
its largest value. What observes a pass is the network's own matter (`NetworkKind.observe`).
"""

import torch
from torch import Tensor

from eval.search.candidates import Candidates
from eval.search.residuals import Residuals, flow_residual
from losses.self_score import motion_mask
from train.backbones.architecture import shape_of

MASKS = ("motion", "text", "attention")


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
    """The masks "text" and "attention" of all candidates, from one pass of each. ValueError for a network whose
    attention cannot be observed."""
    backbone, t = residuals.backbone, residuals.times[0]
    if (observe := backbone.kind.observe) is None:
        raise ValueError(f"{backbone.kind.model.__name__} shows no attention to text alone: use the mask motion")
    noise = residuals.noise(candidates, 0, 0).to(backbone.device)
    patch = shape_of(backbone.architecture).patch
    grid = [n // p for n, p in zip(candidates.latents.shape[2:], patch, strict=True)]
    found: dict[str, list[Tensor]] = {"text": [], "attention": []}
    for latents in candidates.latents.split(residuals.batch_size):
        conditioning = candidates.conditioning.expand(len(latents)).to(backbone.device)
        latents = latents.to(backbone.device)
        prompt = conditioning.text.ne(0).any(dim=-1)  # (B, L), False at padding
        with observe(backbone.expert_serving(t), prompt, grid) as volumes:
            flow_residual(backbone, latents, noise.expand_as(latents), t, conditioning)
        found["text"].append(normalised(change(volumes["text"]), patch))
        found["attention"].append(normalised(volumes["attention"], patch))
    return {kind: torch.cat(parts).cpu() for kind, parts in found.items()}


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
