"""Trains the sandbox's VAE: a small AutoencoderKLWan, 8x in space and 4x in time, on simulated clips.

    python -m eval.sandbox.vae --folder runs/sandbox/vae --steps 3000 --batch 64 --seed 0 --device cuda

    loss = |x' - x| + SQUARE_WEIGHT |x' - x|^2 + w KL       both distances weighted towards what moves

A plain backdrop fills most of a clip, so the pixels of objects and rods, and a border around them, weigh OBJECT_WEIGHT
times the others. w rises from 0 to KL_WEIGHT once objects are drawn: with the full weight from the start the latents
would carry nothing. diffusers walks through a clip in chunks of four frames; `encode_whole` and `decode_whole` give the
same in one pass, which is several times faster where clips are small.

Writes the VAE as a diffusers component in float16, its latents' statistics over held-out clips in the config,
training.json (settings and figures) and reconstructions.png (true and decoded clips, row by row).
"""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import WanResample, WanResidualBlock, patchify, unpatchify
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch import Tensor
from torch.nn import functional as F

from eval.sandbox.clips import Clips, simulate
from eval.sandbox.training import GRADIENT_NORM, Settings, command_line, seeded
from eval.sandbox.world import FIRST_OBJECT, ROD
from train import entry
from train.clips import contact_sheet, from_pixels, to_pixels

OBJECT_WEIGHT = 10.0  # of an object's pixel; the others weigh 1
BORDER = 2  # pixels around an object that weigh as much as it does
SQUARE_WEIGHT = 5.0  # L1 alone is slow to draw a first object, squares alone are blurred
KL_WEIGHT = 1e-4  # on the mean over latent values; the distances are means over pixel values in [-1, 1]
KL_BEGIN, KL_FULL = 0.2, 0.6  # shares of the steps between which the weight rises
FIRST_LOG_VARIANCE = -6.0  # of the posterior
WARMUP = 100  # steps
DEFAULTS = Settings(steps=1600, batch=64, pool=6000, learning_rate=3e-4)  # 5e-4 and more draw objects later
HELD_OUT = 512  # clips for the statistics and figures, at most as many as train
LATENT_CHANNELS = 8
ARCHITECTURE: dict[str, Any] = {
    # 2x2 pixels are folded into channels, then two halvings of both space and time.
    "is_residual": True,  # shortcuts past the resampling layers, as in Wan2.2: learns faster
    "patch_size": 2,
    "in_channels": 12,
    "out_channels": 12,
    "base_dim": 32,
    "dim_mult": [1, 2, 2],
    "temperal_downsample": [True, True],  # diffusers' spelling
    "num_res_blocks": 1,
    "z_dim": LATENT_CHANNELS,
    "latents_mean": [0.0] * LATENT_CHANNELS,
    "latents_std": [1.0] * LATENT_CHANNELS,
    "scale_factor_spatial": 8,
    "scale_factor_temporal": 4,
}


def train_vae(settings: Settings, device: torch.device | str) -> AutoencoderKLWan:
    """A VAE trained by `settings`, in float32 and eval mode.

    The same seed, steps and device give the same weights, up to the order in which a GPU adds.
    """
    device, started = torch.device(device), time.monotonic()
    generator = torch.Generator().manual_seed(settings.seed)
    clips = simulate("mixed", settings.pool, generator, device=device)
    print(f"{settings.pool} clips simulated in {time.monotonic() - started:.1f} s", flush=True)
    vae = new_vae(settings.seed).to(device).train()
    optimizer = torch.optim.AdamW(vae.parameters(), lr=settings.learning_rate, betas=(0.9, 0.99), weight_decay=0.01)
    draws = torch.Generator(device).manual_seed(settings.seed)  # on the device: no step waits for a copy

    started, steps = time.monotonic(), settings.steps
    with torch.backends.cudnn.flags(enabled=True, benchmark=True), whole_clips(vae):
        for step in range(steps):
            chosen = torch.randint(settings.pool, (settings.batch,), generator=draws, device=device)
            frames = from_pixels(clips.frames[chosen])  # (B, 3, T, H, W)
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                posterior = encode_whole(vae, frames)
                noise = torch.randn(posterior.mean.shape, generator=draws, device=device)
                decoded = decode_whole(vae, posterior.mean + posterior.std * noise)
            kl_weight = KL_WEIGHT * min(1.0, max(0.0, (step / steps - KL_BEGIN) / (KL_FULL - KL_BEGIN)))
            weights = pixel_weights(clips.layers[chosen])
            loss = vae_loss(decoded.float(), frames, weights, posterior, kl_weight=kl_weight)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(vae.parameters(), GRADIENT_NORM)
            for group in optimizer.param_groups:
                group["lr"] = settings.rate(step, warmup=WARMUP)
            optimizer.step()
            optimizer.zero_grad()
            if (step + 1) % 200 == 0 or step + 1 == steps:
                settings.show(step, f": loss {loss.item():.4f}", started)
    return vae.eval().requires_grad_(False)


def new_vae(seed: int) -> AutoencoderKLWan:
    """An untrained VAE, whose first latents are not drowned in noise, and whose residual blocks begin as identities."""
    with seeded(seed):
        vae = AutoencoderKLWan(**ARCHITECTURE)
    with torch.no_grad():
        vae.quant_conv.bias[LATENT_CHANNELS:] = FIRST_LOG_VARIANCE
        for module in vae.modules():
            if isinstance(module, WanResidualBlock):
                module.conv2.weight.zero_()
                module.conv2.bias.zero_()
    return vae


@contextmanager
def whole_clips(vae: AutoencoderKLWan) -> Iterator[None]:
    """Inside, the VAE's resampling layers take a whole clip at once, as `encode_whole` and `decode_whole` need it."""
    layers = [module for module in vae.modules() if isinstance(module, WanResample)]
    for layer in layers:
        layer.forward = partial(_resample_whole, layer)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def _resample_whole(layer: WanResample, hidden: Tensor, **_: Any) -> Tensor:
    """hidden (B, C, T, H, W). The first frame stands alone; those after it come in pairs, made from or into one."""
    if layer.mode == "upsample3d" and hidden.shape[2] > 1:
        pairs = layer.time_conv(hidden[:, :, 1:]).unflatten(1, (2, -1))  # (B, 2, C, T-1, H, W)
        hidden = torch.cat([hidden[:, :, :1], pairs.permute(0, 2, 3, 1, 4, 5).flatten(2, 3)], dim=2)
    frames = hidden.shape[2]
    hidden = layer.resample(hidden.transpose(1, 2).flatten(0, 1)).unflatten(0, (-1, frames)).transpose(1, 2)
    if layer.mode == "downsample3d" and frames > 1:
        hidden = torch.cat([hidden[:, :, :1], layer.time_conv(hidden)], dim=2)
    return hidden


def encode_whole(vae: AutoencoderKLWan, frames: Tensor) -> DiagonalGaussianDistribution:
    """`vae.encode(frames).latent_dist` inside `whole_clips`; frames (B, 3, T, H, W) in [-1, 1]."""
    hidden = vae.encoder(patchify(frames, vae.config.patch_size))
    return DiagonalGaussianDistribution(vae.quant_conv(hidden))


def decode_whole(vae: AutoencoderKLWan, latents: Tensor) -> Tensor:
    """`vae.decode(latents).sample` inside `whole_clips`, but not clamped, which would hide errors beyond the range."""
    return unpatchify(vae.decoder(vae.post_quant_conv(latents), first_chunk=True), vae.config.patch_size)


def pixel_weights(layers: Tensor) -> Tensor:
    """layers (B, T, H, W) uint8 -> weights (B, 1, T, H, W) float32: OBJECT_WEIGHT on objects, rods and their border."""
    shown = ((layers >= FIRST_OBJECT) | (layers == ROD)).float()
    near = F.max_pool2d(shown, 2 * BORDER + 1, stride=1, padding=BORDER)
    return (1 + (OBJECT_WEIGHT - 1) * near)[:, None]


def vae_loss(
    decoded: Tensor, frames: Tensor, weights: Tensor, posterior: DiagonalGaussianDistribution, *, kl_weight: float
) -> Tensor:
    """decoded and frames (B, 3, T, H, W), weights (B, 1, T, H, W), the latents' posterior -> loss ()."""
    difference = decoded - frames
    distance = _weighted_mean(difference.abs(), weights) + SQUARE_WEIGHT * _weighted_mean(difference.square(), weights)
    mean, log_variance = posterior.mean.float(), posterior.logvar.float()
    divergence = 0.5 * (mean**2 + log_variance.exp() - 1 - log_variance).mean()
    return distance + kl_weight * divergence


def _weighted_mean(values: Tensor, weights: Tensor) -> Tensor:
    return (values * weights).mean() / weights.mean()


@torch.no_grad()
def measure(vae: AutoencoderKLWan, clips: Clips, *, batch: int = 32) -> tuple[dict[str, Any], Tensor]:
    """Figures over clips, and the decoded clips (N, T, H, W, 3) uint8 on the CPU.

    Figures: psnr (dB, all pixels), psnr_objects (dB, objects' pixels), latents_mean and latents_std (each a list of C
    numbers, of the posterior's mode), posterior_std (mean, in units of latents_std).
    """
    squares = torch.zeros(2, dtype=torch.float64)  # of all pixels, of objects' pixels
    counts = torch.zeros(2, dtype=torch.float64)
    latents, spreads, decoded = [], [], []
    for first in range(0, len(clips), batch):
        part = clips[first : first + batch]
        frames = from_pixels(part.frames)
        posterior = vae.encode(frames).latent_dist
        output = vae.decode(posterior.mode()).sample.clamp(-1, 1)
        error = ((output - frames) / 2).square().mean(dim=1)  # (B, T, H, W), of values in [0, 1]
        objects = (part.masks > 0).float()
        squares += torch.stack([error.sum(), (error * objects).sum()]).double().cpu()
        counts += torch.tensor([error.numel(), float(objects.sum())], dtype=torch.float64)
        latents.append(posterior.mode().float().cpu())
        spreads.append(posterior.std.float().cpu())
        decoded.append(to_pixels(output).cpu())
    psnr, psnr_objects = (-10 * (squares / counts.clamp(min=1)).clamp(min=1e-10).log10()).tolist()
    std, mean = torch.std_mean(torch.cat(latents).double(), dim=(0, 2, 3, 4))
    spread = (torch.cat(spreads).double().mean(dim=(0, 2, 3, 4)) / std).mean().item()
    figures = {
        "psnr": psnr,
        "psnr_objects": psnr_objects,
        "latents_mean": mean.tolist(),
        "latents_std": std.tolist(),
        "posterior_std": spread,
    }
    return figures, torch.cat(decoded)


def write_vae(folder: Path, settings: Settings, device: torch.device | str) -> dict[str, Any]:
    """Train, measure what float16 keeps, write the folder; returns the figures."""
    started = time.monotonic()
    vae = train_vae(settings, device)
    vae = vae.half().float()  # the figures are of what the file holds
    generator = torch.Generator().manual_seed(settings.seed + 1)
    held_out = simulate("mixed", min(HELD_OUT, settings.pool), generator, device=device)
    figures, decoded = measure(vae, held_out)
    vae.register_to_config(latents_mean=figures["latents_mean"], latents_std=figures["latents_std"])
    vae.half().save_pretrained(folder)
    figures = figures | {"seconds": time.monotonic() - started, "parameters": sum(p.numel() for p in vae.parameters())}
    report = {"settings": vars(settings), "device": torch.device(device).type, **figures}
    (folder / "training.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    rows = []
    for number in range(min(5, len(held_out))):
        rows += [(held_out.scenes[number], held_out.frames[number].cpu()), ("decoded", decoded[number])]
    contact_sheet(folder / "reconstructions.png", rows)
    return figures


def main(argv: list[str] | None = None) -> None:
    folder, settings, device = command_line(__doc__, "folder", DEFAULTS, argv)
    figures = write_vae(folder, settings, device)
    print(
        f"{folder}: {figures['parameters'] / 1e6:.2f}M parameters, PSNR {figures['psnr']:.1f} dB over all "
        f"pixels and {figures['psnr_objects']:.1f} dB over objects, posterior std {figures['posterior_std']:.2f} of "
        f"the latents', {figures['seconds']:.0f} s"
    )


if __name__ == "__main__":
    entry.run(main)
