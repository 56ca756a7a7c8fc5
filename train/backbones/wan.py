"""What Wan's families share: the network, its conditioning, its encoders' configs.

One text of UMT5, zero-padded to `text_length` tokens, to which the network attends with its padding. Latents are
normalised by the VAE's latents_mean and latents_std.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from diffusers.pipelines.wan.pipeline_wan import prompt_clean
from torch import Tensor, nn
from transformers import UMT5Config, UMT5EncoderModel

from train.backbones import loading
from train.backbones.architecture import NetworkKind, Shape
from train.backbones.base import Backbone, Conditioning
from train.backbones.wan_attention import observed
from train.backbones.wan_layers import ORIGINAL_NAMES

# The real encoders' sizes, from the public configs of Wan-AI's checkpoints in diffusers' format. By the width that the
# transformer reads: UMT5-XXL.
TEXT = {4096: {"vocab_size": 256_384, "d_kv": 64, "d_ff": 10_240, "num_layers": 24, "num_heads": 64}}
# By latent channels: Wan2.1's VAE, and the one of TI2V-5B.
VAE = {
    16: {"base_dim": 96},
    48: {"base_dim": 160, "decoder_base_dim": 256},
}
# `Backbone.vae_facts` of AutoencoderKLWan.
VAE_FACTS = {
    "z_dim": ("z_dim", 16),
    "vae_scale": ("scale_factor_spatial", 8),
    "vae_scale_temporal": ("scale_factor_temporal", 4),
}


def shape(config: Mapping[str, Any]) -> Shape:
    heads = config["num_attention_heads"]
    width = heads * config["attention_head_dim"]
    return Shape(config["num_layers"], heads, width, config["ffn_dim"], tuple(config["patch_size"]))


def transformer_flops(tokens: int, text_tokens: int, width: int, ffn: int, layers: int) -> tuple[float, float]:
    """Floating-point operations of one forward pass of one sample: (matrix products, attention).

        matrix = 2 L n (6 d^2 + 2 d ffn),  attention = 4 L (L + text) d n

    L tokens, n layers, width d; the text's own key and value products are left out as small. A backward pass with
    frozen weights costs the matrix part once (input gradients only) and 2.5 times the attention.

    By hand: L = 2, text 1, d = 3, ffn = 4, n = 1: 2*2*(6*9 + 2*3*4) = 312 and 4*2*(2 + 1)*3 = 72.
    """
    matrix = 2.0 * tokens * layers * (6 * width**2 + 2 * width * ffn)
    attention = 4.0 * tokens * (tokens + text_tokens) * width * layers
    return matrix, attention


def _fill_buffers(network: nn.Module, device: torch.device | str) -> None:
    """Position tables are buffers that no checkpoint holds: computed anew, in float32."""
    rope = network.rope
    network.rope = type(rope)(rope.attention_head_dim, rope.patch_size, rope.max_seq_len).to(device)


WAN = NetworkKind(
    model=WanTransformer3DModel,
    shape=shape,
    flops=lambda own, tokens, text: transformer_flops(tokens, text, own.width, own.ffn, own.layers),
    fill_buffers=_fill_buffers,
    cached=True,
    fused=True,
    original_names=ORIGINAL_NAMES,
    observe=observed,
)


def wan_architecture(
    *,
    heads: int,
    ffn: int,
    layers: int,
    z_dim: int = 16,
    in_channels: int | None = None,
    vae_scale: int = 8,
    head_dim: int = 128,
    text_dim: int = 4096,
) -> dict[str, Any]:
    """One entry of a family's architectures: the transformer's keyword arguments and the VAE facts that shapes need."""
    transformer = {
        "patch_size": (1, 2, 2),
        "num_attention_heads": heads,
        "attention_head_dim": head_dim,
        "in_channels": in_channels or z_dim,
        "out_channels": z_dim,
        "text_dim": text_dim,
        "freq_dim": 256,
        "ffn_dim": ffn,
        "num_layers": layers,
    }
    facts = {"z_dim": z_dim, "vae_scale": vae_scale, "vae_scale_temporal": 4}
    return {"kind": WAN, "transformer": transformer, **facts}


class WanBackbone(Backbone):
    kind = WAN
    vae_class, vae_facts = AutoencoderKLWan, VAE_FACTS
    # Absent keys mean the defaults of diffusers' classes: the first Wan2.1 configs are older than some keys.
    network_defaults = {"patch_size": (1, 2, 2), "in_channels": 16, "text_dim": 512}
    encoder_classes = {"text_encoder": UMT5EncoderModel}
    pipelines = ("WanPipeline", "WanImageToVideoPipeline")
    expand_timesteps: ClassVar[bool] = False  # the pipeline's own flag: timesteps per token

    @classmethod
    def whole_config(cls, config: dict[str, Any]) -> dict[str, Any]:
        config = super().whole_config(config)
        return {"out_channels": config["in_channels"], **config}

    @classmethod
    def mismatch(cls, model_index: dict[str, Any], architecture: dict[str, Any]) -> str:
        transformer = architecture["transformer"]
        per_token = bool(model_index.get("expand_timesteps"))
        lacks_boundary = cls.default_boundary is not None and model_index.get("boundary_ratio") is None
        problems = {
            f"model_index.json has expand_timesteps={per_token}": per_token != cls.expand_timesteps,
            "the transformer needs a CLIP image encoder (Wan2.1 I2V), which no family here has": (
                transformer.get("image_dim") is not None
            ),
            "model_index.json has no boundary_ratio": lacks_boundary,
        }
        found = [
            super().mismatch(model_index, architecture),
            *(problem for problem, is_so in problems.items() if is_so),
        ]
        return "; ".join(filter(None, found))

    # Conditioning

    def text_shapes(self) -> dict[str, tuple[int, int]]:
        return {"text": (self.text_length, self.architecture["transformer"]["text_dim"])}

    @classmethod
    def check_text(cls, folder: Path, architecture: dict[str, Any]) -> None:
        """ValueError when the encoder's width is not the one the transformer reads."""
        width = loading.read_config(folder, "text_encoder").get("d_model")
        if width != (text_dim := architecture["transformer"]["text_dim"]):
            raise ValueError(
                f"backbone.path={folder}: the text encoder has width {width}, but the transformer reads {text_dim}: "
                "the two belong to different pipelines"
            )

    @classmethod
    def random_encoders(cls, architecture: dict[str, Any], words: int) -> dict[str, Any]:
        return {"text_encoder": UMT5EncoderModel(text_config(architecture["transformer"]["text_dim"], words))}

    @classmethod
    def vae_config(cls, architecture: dict[str, Any]) -> dict[str, Any]:
        """A small VAE beside a small text encoder."""
        real = architecture["transformer"]["text_dim"] in TEXT
        return vae_sizes(architecture["z_dim"], architecture["vae_scale"], real=real)

    @torch.no_grad()
    def encode_text(self, prompts: list[str]) -> Tensor:
        """Prompts -> (B, text_length, D) in the text encoder's dtype, zero beyond each prompt's tokens.

        Cleaned, tokenised and encoded as diffusers' Wan pipelines do; an empty prompt is its end token alone.
        """
        self.check_prompts(prompts)
        tokens = self.tokenizer(
            [prompt_clean(prompt) for prompt in prompts],
            padding="max_length",
            max_length=self.text_length,
            truncation=True,
            return_attention_mask=True,
            return_tensors="pt",
        ).to(self.device)
        embeddings = self.text_encoder(tokens.input_ids, tokens.attention_mask).last_hidden_state  # (B, L, D)
        return embeddings.masked_fill(tokens.attention_mask.unsqueeze(-1) == 0, 0)

    def encode_texts(self, prompts: list[str]) -> Conditioning:
        return Conditioning(self.encode_text(prompts))

    def count_tokens(self, prompts: list[str]) -> list[int]:
        texts = [prompt_clean(prompt) for prompt in prompts]
        return [len(ids) for ids in self.tokenizer(texts, max_length=self.text_length + 1, truncation=True).input_ids]

    # Latents and the network

    def latent_moments(self) -> tuple[Tensor, Tensor]:
        config = self.vae.config
        mean, std = (
            torch.tensor(values, device=self.device).view(1, -1, 1, 1, 1)
            for values in (config.latents_mean, config.latents_std)
        )
        return mean, std

    def network_arguments(
        self, latents: Tensor, timestep: Tensor, conditioning: Conditioning, dtype: torch.dtype
    ) -> dict[str, Tensor]:
        hidden_states, timestep = self._network_input(latents, timestep, conditioning)
        return {
            "hidden_states": hidden_states.to(dtype),
            "timestep": timestep,
            "encoder_hidden_states": conditioning.text.to(latents.device, dtype),
        }

    def _network_input(self, latents: Tensor, timestep: Tensor, conditioning: Conditioning) -> tuple[Tensor, Tensor]:
        """Latents, timestep (B,) in [0, 1000] -> the network's input (B, C', F, H, W), timestep (B,) or (B, tokens)."""
        return latents, timestep


# Encoders from configs alone: the real sizes for runs that measure time and memory, small ones for tests.


def text_config(width: int, vocabulary: int) -> UMT5Config:
    """The encoder's config; of a width that no checkpoint has, two layers and `vocabulary` entries."""
    small = {"vocab_size": vocabulary, "d_kv": 16, "d_ff": 2 * width, "num_layers": 2, "num_heads": width // 16}
    return UMT5Config(d_model=width, feed_forward_proj="gated-gelu", **TEXT.get(width, small))


def vae_sizes(z_dim: int, scale: int, *, real: bool) -> dict[str, Any]:
    """AutoencoderKLWan's arguments: of the Wan2.1 kind (8x) or of the Wan2.2 kind (16x: residual, 2x2 pixel patches),
    with the checkpoints' sizes or small. Latents' mean is 0 and their deviation 1."""
    kind = {"is_residual": True, "patch_size": 2, "in_channels": 12, "out_channels": 12} if scale == 16 else {}
    size = VAE[z_dim] if real else {"base_dim": 8, "num_res_blocks": 1}
    moments = {"latents_mean": [0.0] * z_dim, "latents_std": [1.0] * z_dim}
    return {"z_dim": z_dim, "scale_factor_spatial": scale, **moments, **size, **kind}
