"""Trains the sandbox's world model: a small V-JEPA 2 (Assran et al., 2025) on simulated clips that obey physics.

    python -m eval.sandbox.train_world_model --output runs/world_model --seed 0

    loss = mean |predictor(encoder(x seen), ids hidden) - norm(teacher(x))[ids hidden]|

The encoder sees some tokens of a window, the predictor says what the teacher, a moving average of the encoder that sees
them all, finds at the hidden ones; norm is a layer norm without an affine part. Each step draws a window's length and
hides twice: blocks in space and time, and the future, which is what `eval.search.world_model` asks at test time.

Deviations from the paper: causal masks beside the blocks; all clips of a step share window and masks; the momentum of
the average rises. Clips are mirrored and their colour channels permuted, under which this world is symmetric.

Writes <output>/config.json and model.safetensors (float16), which `VJEPA2Model.from_pretrained` loads, with the
teacher as the encoder, and training.json (settings and figures).
"""

import argparse
import copy
import json
import math
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import VJEPA2Config, VJEPA2Model

from eval.sandbox.splits import is_held_out, simulate_block
from train.clips import VideoConfig
from train.teachers.vjepa2 import preprocess

VIDEO = VideoConfig(height=64, width=64, num_frames=17, fps=8.0)
ARCHITECTURE: dict[str, Any] = {
    "crop_size": VIDEO.height,
    "patch_size": 8,
    "frames_per_clip": 16,
    "tubelet_size": 2,
    "hidden_size": 96,
    "num_attention_heads": 4,
    "num_hidden_layers": 5,
    "pred_hidden_size": 96,
    "pred_num_attention_heads": 4,
    "pred_num_hidden_layers": 5,
    "pred_num_mask_tokens": 2,
    "initializer_range": 0.05,
}
LENGTHS = (8, 12, 16)  # frames of a window
BLOCKS = 4  # hidden at once, each 3 to 6 tokens high and wide and half the window or more long
MOMENTUM = (0.99, 0.999)  # of the teacher, at the first and the last step
WARMUP = 200  # steps
GRADIENT_NORM = 1.0  # gradients are clipped to it


@dataclass(frozen=True)
class Settings:
    steps: int = 8000
    batch: int = 256  # windows a step
    pool: int = 30_000  # simulated clips, made before the first step
    learning_rate: float = 1e-3  # peak; linear warm-up, then cosine to 0
    seed: int = 0


def make_pool(count: int, seed: int, device: torch.device | str) -> Tensor:
    """The first `count` clips of the stream `train`: (count,T,H,W,3) uint8 on `device`, none with a held-out prompt."""
    blocks: list[Tensor] = []
    while sum(map(len, blocks)) < count:
        clips = simulate_block("mixed", "train", seed, len(blocks), VIDEO, device=device)
        blocks.append(clips.frames[[index for index, prompt in enumerate(clips.prompts) if not is_held_out(prompt)]])
    return torch.cat(blocks)[:count]


def train_world_model(settings: Settings, device: torch.device | str) -> tuple[VJEPA2Model, dict[str, float]]:
    """A model trained by `settings` in eval mode, its encoder the teacher, and the last figures printed.

    The same seed, steps and device give the same weights, up to the order in which a GPU adds. Raises ValueError for
    numbers below 1.
    """
    for name in ("steps", "batch", "pool"):
        if getattr(settings, name) < 1:
            raise ValueError(f"--{name} is {getattr(settings, name)}: use 1 or more")
    device, started = torch.device(device), time.monotonic()
    pool = make_pool(settings.pool, settings.seed, device)
    print(f"{settings.pool} clips simulated in {time.monotonic() - started:.1f} s", flush=True)
    model = new_model(settings.seed).to(device).train()
    teacher = copy.deepcopy(model.encoder).requires_grad_(False)
    if device.type == "cuda":  # layer by layer: they are all alike, so this takes seconds
        for layer in (*model.encoder.layer, *model.predictor.layer, *teacher.layer):
            layer.compile(dynamic=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.learning_rate, betas=(0.9, 0.99), weight_decay=0.04)
    draws = torch.Generator().manual_seed(settings.seed)
    figures: dict[str, float] = {}

    started, steps = time.monotonic(), settings.steps
    for step in range(steps):
        pixels = draw_windows(pool, settings.batch, draws)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            losses, target = masked_losses(model, teacher, pixels, draws)
        sum(losses).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), GRADIENT_NORM)
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate * _rate(step, steps)
        optimizer.step()
        optimizer.zero_grad()
        momentum = MOMENTUM[0] + (MOMENTUM[1] - MOMENTUM[0]) * step / steps
        with torch.no_grad():
            torch._foreach_lerp_(list(teacher.parameters()), list(model.encoder.parameters()), 1 - momentum)
        if (step + 1) % 250 == 0 or step + 1 == steps:
            block, future = (loss.item() for loss in losses)
            # Of layer-normed features, over clips at the same token: 0 is a collapse, 1 the most.
            figures = {"loss_blocks": block, "loss_future": future, "feature_std": target.std(dim=0).mean().item()}
            seconds = time.monotonic() - started
            shown = ", ".join(f"{name} {value:.4f}" for name, value in figures.items())
            left = seconds / (step + 1) * (steps - step - 1)
            print(f"step {step + 1} of {steps}: {shown}, {seconds:.0f} s, {left:.0f} s left", flush=True)
    model.encoder.load_state_dict(teacher.state_dict())
    return model.eval().requires_grad_(False), figures


def new_model(seed: int) -> VJEPA2Model:
    """An untrained model."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would also reseed every GPU
        return VJEPA2Model(VJEPA2Config(**ARCHITECTURE))


def draw_windows(pool: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """`count` windows of one length from random clips, normalised: (count,L,3,H,W) float32."""
    length = LENGTHS[int(torch.randint(len(LENGTHS), (), generator=generator))]
    start = int(torch.randint(pool.shape[1] - length + 1, (), generator=generator))
    chosen = torch.randint(len(pool), (count,), generator=generator).to(pool.device)
    frames = pool[chosen, start : start + length][..., torch.randperm(3, generator=generator).to(pool.device)]
    if torch.rand((), generator=generator) < 0.5:
        frames = frames.flip(3)
    return preprocess(frames.flatten(0, 1), frames.shape[2]).unflatten(0, (count, length))


def masked_losses(
    model: VJEPA2Model, teacher: nn.Module, pixels: Tensor, generator: torch.Generator
) -> tuple[list[Tensor], Tensor]:
    """([loss of hidden blocks, loss of the hidden future], the teacher's normed tokens (B,N,D)) of windows."""
    patches = patchify(pixels, model.config.tubelet_size, model.config.patch_size)
    side = model.config.crop_size // model.config.patch_size
    grid = (pixels.shape[1] // model.config.tubelet_size, side, side)
    everything = torch.arange(math.prod(grid), device=pixels.device)
    with torch.no_grad():
        target = encode(teacher, patches, everything)
        target = F.layer_norm(target.float(), target.shape[-1:])
    losses = []
    for mask in (block_mask(grid, generator), future_mask(grid, generator)):
        mask = mask.flatten()
        seen, hidden = ((~mask).nonzero()[:, 0].to(pixels.device), mask.nonzero()[:, 0].to(pixels.device))
        predicted = predict(model.predictor, encode(model.encoder, patches[:, seen], seen), seen, hidden)
        losses.append(F.l1_loss(predicted.float(), target[:, hidden]))
    return losses, target


def block_mask(grid: tuple[int, int, int], generator: torch.Generator) -> Tensor:
    """(F,H,W) bool, true where hidden: the union of BLOCKS boxes; at least one token is seen."""
    mask = torch.zeros(grid, dtype=torch.bool)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=generator))

    for _ in range(BLOCKS):
        sizes = (
            draw((grid[0] + 1) // 2, grid[0]),
            draw(min(3, grid[1]), min(6, grid[1])),
            draw(min(3, grid[2]), min(6, grid[2])),
        )
        first = [draw(0, length - size) for length, size in zip(grid, sizes, strict=True)]
        mask[tuple(slice(start, start + size) for start, size in zip(first, sizes, strict=True))] = True
    if mask.all():
        mask[:, 0, 0] = False
    return mask


def future_mask(grid: tuple[int, int, int], generator: torch.Generator) -> Tensor:
    """(F,H,W) bool: the slices after the first few are hidden, at least one is seen and one hidden."""
    seen = int(torch.randint(1, grid[0], (), generator=generator))
    mask = torch.zeros(grid, dtype=torch.bool)
    mask[seen:] = True
    return mask


def patchify(pixels: Tensor, tubelet: int, patch: int) -> Tensor:
    """(B,T,3,H,W) -> (B,N,3 x tubelet x patch x patch), what the model's convolution multiplies with its weights."""
    boxes = pixels.unflatten(4, (-1, patch)).unflatten(3, (-1, patch)).unflatten(1, (-1, tubelet))
    return boxes.permute(0, 1, 4, 6, 3, 2, 5, 7).flatten(4).flatten(1, 3)  # (B,F,t,3,h,p,w,q) -> (B,F,h,w,3,t,p,q)


def encode(encoder: nn.Module, patches: Tensor, ids: Tensor) -> Tensor:
    """`encoder` on the tokens `ids` (N,) alone, whose patches (B,N,P) are given: (B,N,D).

    The model's own forward takes whole windows. The sums of the residual stream stay in float32.
    """
    embed = encoder.embeddings.patch_embeddings.proj
    hidden = F.linear(patches, embed.weight.flatten(1), embed.bias).float()
    for layer in encoder.layer:
        hidden = layer(hidden, ids[None])[0]
    return encoder.layernorm(hidden)


def predict(predictor: nn.Module, context: Tensor, seen: Tensor, hidden: Tensor) -> Tensor:
    """The tokens `hidden` (K,) from the context (B,N,D) at the tokens `seen` (N,): (B,K,D).

    Equals the predictor's own forward, which wants the tokens of the whole window and masks for each clip.
    """
    embeddings = predictor.embeddings
    query = embeddings.mask_tokens[1 % embeddings.num_mask_tokens]  # (1,1,D); its forward always takes this one
    tokens = torch.cat(
        [embeddings.predictor_embeddings(context).float(), query.expand(len(context), len(hidden), -1)], dim=1
    )
    positions = torch.cat([seen, hidden])[None]
    for layer in predictor.layer:
        tokens = layer(tokens, positions)[0]
    return predictor.proj(predictor.layernorm(tokens[:, len(seen) :]))


def _rate(step: int, steps: int) -> float:
    warmup = min(WARMUP, max(1, steps // 10))
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def write_world_model(output: Path, settings: Settings, device: torch.device | str) -> dict[str, Any]:
    """Train and write the folder, the weights last; returns the figures."""
    started = time.monotonic()
    model, figures = train_world_model(settings, device)
    report = figures | {
        "seconds": time.monotonic() - started,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
    }
    training = {"settings": vars(settings), "device": torch.device(device).type, **report}
    aside = output / ".tmp"
    model.half().save_pretrained(aside)
    (aside / "training.json").write_text(json.dumps(training, indent=2) + "\n", encoding="utf-8")
    for name in ("training.json", "config.json", "model.safetensors"):
        os.replace(aside / name, output / name)
    aside.rmdir()
    return report


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=Settings.steps)
    parser.add_argument("--batch", type=int, default=Settings.batch, help="windows a step")
    parser.add_argument("--pool", type=int, default=Settings.pool, help="simulated clips to draw from")
    parser.add_argument("--learning-rate", type=float, default=Settings.learning_rate)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args(argv)
    settings = Settings(options.steps, options.batch, options.pool, options.learning_rate, options.seed)
    figures = write_world_model(options.output, settings, options.device)
    print(
        f"{options.output}: {figures['parameters'] / 1e6:.2f}M parameters, loss of the future "
        f"{figures['loss_future']:.4f}, std of features {figures['feature_std']:.2f}, {figures['seconds']:.0f} s"
    )


if __name__ == "__main__":
    main()
