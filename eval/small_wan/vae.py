"""Trains a small AutoencoderKLWan, 8x in space and 4x in time, on clips whose objects are known.

    loss = |x' - x| + SQUARE_WEIGHT |x' - x|^2 + w KL       both distances weighted per pixel

w rises from 0 to KL_WEIGHT once objects are drawn: with the full weight from the start the latents would carry
nothing. diffusers walks through a clip in chunks of four frames; `encode_whole` and `decode_whole` give the same in one
pass, which is several times faster where clips are small.

`write_vae` writes the VAE as a diffusers component in float16, its latents' statistics over held-out clips in the
config, training.json (settings and figures) and reconstructions.png (true and decoded clips, row by row).
"""

import json
import time
from collections.abc import Callable, Iterator, Sequence
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

from eval.small_wan.training import GRADIENT_NORM, Checkpoint, Settings, seeded
from train.clips import contact_sheet, from_pixels, to_pixels
from train.files import write_text

OBJECT_WEIGHT = 10.0  # of an object's pixel; the others weigh 1
BORDER = 2  # pixels around an object that weigh as much as it does
SQUARE_WEIGHT = 5.0  # L1 alone is slow to draw a first object, squares alone are blurred
KL_WEIGHT = 1e-4  # on the mean over latent values; the distances are means over pixel values in [-1, 1]
KL_BEGIN, KL_FULL = 0.2, 0.6  # shares of the steps between which the weight rises
FIRST_LOG_VARIANCE = -6.0  # of the posterior
WARMUP = 100  # steps

# From a generator on the device: frames (B, T, H, W, 3) uint8 of a step, and where objects are, (B, T, H, W) bool.
Draw = Callable[[torch.Generator], tuple[Tensor, Tensor]]


def architecture(base_dim: int, latent_channels: int) -> dict[str, Any]:
    """AutoencoderKLWan's arguments: 2x2 pixels are folded into channels, then two halvings of both space and time."""
    return {
        "is_residual": True,  # shortcuts past the resampling layers, as in Wan2.2: learns faster
        "patch_size": 2,
        "in_channels": 12,
        "out_channels": 12,
        "base_dim": base_dim,
        "dim_mult": [1, 2, 2],
        "temperal_downsample": [True, True],  # diffusers' spelling
        "num_res_blocks": 1,
        "z_dim": latent_channels,
        "latents_mean": [0.0] * latent_channels,
        "latents_std": [1.0] * latent_channels,
        "scale_factor_spatial": 8,
        "scale_factor_temporal": 4,
    }


def train_vae(
    settings: Settings,
    network: dict[str, Any],
    draw: Draw,
    device: torch.device | str,
    checkpoint: Checkpoint | None = None,
) -> AutoencoderKLWan | None:
    """A VAE trained by `settings`, in float32 and eval mode. network: `architecture`. With a checkpoint the training
    continues from it, and is None where it was asked to stop before its last step.

    The same seed, steps and device give the same weights, up to the order in which a GPU adds.
    """
    device, steps = torch.device(device), settings.steps
    vae = new_vae(network, settings.seed).to(device).train()
    optimizer = torch.optim.AdamW(vae.parameters(), lr=settings.learning_rate, betas=(0.9, 0.99), weight_decay=0.01)
    draws = torch.Generator(device).manual_seed(settings.seed)  # on the device: no step waits for a copy
    first = checkpoint.load(vae, optimizer, draws) if checkpoint else 0
    started = time.monotonic()
    with torch.backends.cudnn.flags(enabled=True, benchmark=True), whole_clips(vae):
        for step in range(first, steps):
            pixels, objects = draw(draws)
            frames = from_pixels(pixels)  # (B, 3, T, H, W)
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                posterior = encode_whole(vae, frames)
                noise = torch.randn(posterior.mean.shape, generator=draws, device=device)
                decoded = decode_whole(vae, posterior.mean + posterior.std * noise)
            kl_weight = KL_WEIGHT * min(1.0, max(0.0, (step / steps - KL_BEGIN) / (KL_FULL - KL_BEGIN)))
            loss = vae_loss(decoded.float(), frames, pixel_weights(objects), posterior, kl_weight=kl_weight)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(vae.parameters(), GRADIENT_NORM)
            for group in optimizer.param_groups:
                group["lr"] = settings.rate(step, warmup=WARMUP)
            optimizer.step()
            optimizer.zero_grad()
            if (step + 1) % 200 == 0 or step + 1 == steps:
                settings.show(step, f": loss {loss.item():.4f}", started, first=first)
            if checkpoint and checkpoint.due(step + 1, steps):
                checkpoint.save(step + 1, vae, optimizer, draws)
                if checkpoint.stopping:
                    return None
    return vae.eval().requires_grad_(False)


def new_vae(network: dict[str, Any], seed: int) -> AutoencoderKLWan:
    """An untrained VAE, whose first latents are not drowned in noise, and whose residual blocks begin as identities."""
    with seeded(seed):
        vae = AutoencoderKLWan(**network)
    with torch.no_grad():
        vae.quant_conv.bias[network["z_dim"] :] = FIRST_LOG_VARIANCE
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


def pixel_weights(objects: Tensor) -> Tensor:
    """objects (B, T, H, W) bool -> weights (B, 1, T, H, W) float32: OBJECT_WEIGHT on them and their border."""
    near = F.max_pool2d(objects.float(), 2 * BORDER + 1, stride=1, padding=BORDER)
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
def measure(vae: AutoencoderKLWan, clips: Tensor, objects: Tensor, *, batch: int = 32) -> tuple[dict[str, Any], Tensor]:
    """Figures over clips (N, T, H, W, 3) uint8, and the decoded clips, the same on the CPU. objects (N, T, H, W) bool.

    Figures: psnr (dB, all pixels), psnr_objects (dB, objects' pixels), latents_mean and latents_std (each a list of C
    numbers, of the posterior's mode), posterior_std (mean, in units of latents_std).
    """
    squares = torch.zeros(2, dtype=torch.float64)  # of all pixels, of objects' pixels
    counts = torch.zeros(2, dtype=torch.float64)
    latents, spreads, decoded = [], [], []
    for first in range(0, len(clips), batch):
        frames = from_pixels(clips[first : first + batch])
        shown = objects[first : first + batch].float()
        posterior = vae.encode(frames).latent_dist
        output = vae.decode(posterior.mode()).sample.clamp(-1, 1)
        error = ((output - frames) / 2).square().mean(dim=1)  # (B, T, H, W), of values in [0, 1]
        squares += torch.stack([error.sum(), (error * shown).sum()]).double().cpu()
        counts += torch.tensor([error.numel(), float(shown.sum())], dtype=torch.float64)
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


def write_vae(
    folder: Path,
    settings: Settings,
    vae: AutoencoderKLWan,
    clips: Tensor,
    objects: Tensor,
    labels: Sequence[str],
    *,
    started: float,
) -> dict[str, Any]:
    """Measure on held-out clips what float16 keeps of a trained VAE and write the folder, training.json last; returns
    the figures. started: when the command began, by time.monotonic()."""
    device = vae.device.type
    vae = vae.half().float()  # the figures are of what the file holds
    figures, decoded = measure(vae, clips, objects)
    vae.register_to_config(latents_mean=figures["latents_mean"], latents_std=figures["latents_std"])
    vae.half().save_pretrained(folder)
    rows = []
    for label, clip, again in zip(labels[:5], clips, decoded, strict=False):
        rows += [(label, clip.cpu()), ("decoded", again)]
    contact_sheet(folder / "reconstructions.png", rows)
    figures |= {"seconds": time.monotonic() - started, "parameters": sum(p.numel() for p in vae.parameters())}
    report = {"settings": vars(settings), "device": device, **figures}
    write_text(folder / "training.json", json.dumps(report, indent=2) + "\n")
    return figures


def describe(folder: Path, figures: dict[str, Any]) -> str:
    """One line for who waits at the command."""
    return (
        f"{folder}: {figures['parameters'] / 1e6:.2f}M parameters, PSNR {figures['psnr']:.1f} dB over all pixels and"
        f" {figures['psnr_objects']:.1f} dB over objects, posterior std {figures['posterior_std']:.2f} of the latents',"
        f" {figures['seconds']:.0f} s"
    )
