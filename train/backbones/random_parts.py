"""Text encoder and VAE from configs alone: the real sizes for runs that measure time and memory, small ones for tests.

Facts from the public configs of Wan-AI's checkpoints in diffusers' format.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import AutoencoderKLWan
from torch import Tensor, nn
from transformers import UMT5Config, UMT5EncoderModel

# By the width that the transformer reads: UMT5-XXL.
TEXT = {4096: {"vocab_size": 256_384, "d_kv": 64, "d_ff": 10_240, "num_layers": 24, "num_heads": 64}}
# By latent channels: Wan2.1's VAE, and the one of TI2V-5B.
VAE = {
    16: {"base_dim": 96},
    48: {"base_dim": 160, "decoder_base_dim": 256},
}


def text_config(width: int, vocabulary: int) -> UMT5Config:
    """The encoder's config; of a width that no checkpoint has, two layers and `vocabulary` entries."""
    small = {"vocab_size": vocabulary, "d_kv": 16, "d_ff": 2 * width, "num_layers": 2, "num_heads": width // 16}
    return UMT5Config(d_model=width, feed_forward_proj="gated-gelu", **TEXT.get(width, small))


def vae_config(architecture: dict[str, Any]) -> dict[str, Any]:
    """AutoencoderKLWan's arguments: of the Wan2.1 kind (8x) or of the Wan2.2 kind (16x: residual, 2x2 pixel patches); a
    small one beside a small text encoder. Latents' mean is 0 and their deviation 1."""
    z_dim, scale, real = (
        architecture["z_dim"],
        architecture["vae_scale"],
        architecture["transformer"]["text_dim"] in TEXT,
    )
    kind = {"is_residual": True, "patch_size": 2, "in_channels": 12, "out_channels": 12} if scale == 16 else {}
    size = VAE[z_dim] if real else {"base_dim": 8, "num_res_blocks": 1}
    moments = {"latents_mean": [0.0] * z_dim, "latents_std": [1.0] * z_dim}
    return {"z_dim": z_dim, "scale_factor_spatial": scale, **moments, **size, **kind}


def random_vae(architecture: dict[str, Any], device: torch.device) -> AutoencoderKLWan:
    """In float32."""
    with torch.device("meta"):
        model = AutoencoderKLWan(**vae_config(architecture))
    return fill(model, device, torch.float32)


def random_text(width: int, vocabulary: int, device: torch.device, dtype: torch.dtype) -> UMT5EncoderModel:
    with torch.device("meta"):
        model = UMT5EncoderModel(text_config(width, vocabulary))
    return fill(model, device, dtype)


@torch.no_grad()
def fill(model: nn.Module, device: torch.device, dtype: torch.dtype) -> Any:
    """Give a model without storage seeded weights on the device, frozen, in eval mode: see `draw`."""
    model = nn.Module.to(model, dtype).to_empty(device=device)
    generator = torch.Generator(device=device).manual_seed(0)
    for name, parameter in model.named_parameters():
        draw(name, parameter, generator)
    return model.eval().requires_grad_(False)


def draw(name: str, parameter: Tensor, generator: torch.Generator) -> None:
    """Matrices and kernels normal with variance 1 / fan-in, biases zero, the factors of norms one, and scale tables as
    in Wan's own initialisation, so that activations and outputs are of order one."""
    if name.endswith("scale_shift_table"):
        parameter.normal_(std=parameter.shape[-1] ** -0.5, generator=generator)
    elif parameter.squeeze().dim() > 1:
        parameter.normal_(std=parameter[0].numel() ** -0.5, generator=generator)
    else:
        parameter.fill_(0.0 if name.endswith("bias") else 1.0)
