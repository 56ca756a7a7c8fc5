"""HunyuanVideo 1.5, text to video (8.3B): one transformer of double-stream blocks, two texts with masks.

The prompt is read by Qwen2.5-VL inside a fixed instruction, whose first 108 tokens are cut off again, and what stands
in it between quotation marks by ByT5, for letters in the picture; without quotation marks that text is empty. Both are
encoded by diffusers' own code. The network joins their tokens with the video's in every attention, where padding is
left out (`JointAttention`). Beside the noisy latents it reads those of given frames and their mask, here zeros. Latents
are multiplied by the VAE's scaling_factor.

Facts from diffusers' defaults for the classes, which are the public checkpoints' (hunyuanvideo-community/HunyuanVideo-
1.5-Diffusers-*); sizes of ByT5 from google/byt5-small. Deviation from diffusers' pipeline: it passes 729 image tokens
of zeros, which are masked; here there are none, which is the same function. In bfloat16 the network is told 1000 t in
bfloat16, as there: its time embedder has that dtype. Image to video: `train.backbones.hunyuan15_i2v`.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from diffusers import AutoencoderKLHunyuanVideo15, HunyuanVideo15Pipeline, HunyuanVideo15Transformer3DModel
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.transformers.transformer_hunyuan_video15 import HunyuanVideo15AttnProcessor2_0
from diffusers.pipelines.hunyuan_video1_5.pipeline_hunyuan_video1_5 import extract_glyph_texts, format_text_input
from torch import Tensor, nn
from transformers import (
    ByT5Tokenizer,
    PreTrainedTokenizerBase,
    Qwen2_5_VLTextConfig,
    Qwen2_5_VLTextModel,
    T5Config,
    T5EncoderModel,
)

from train.backbones.architecture import NetworkKind, Shape, defaults_of
from train.backbones.base import Backbone, Conditioning
from train.backbones.qwen25 import WIDTH, make_positions, text_sizes
from train.backbones.tokenizer import build_tokenizer

encode_prompts = HunyuanVideo15Pipeline._get_mllm_prompt_embeds
encode_letters = HunyuanVideo15Pipeline._get_byt5_prompt_embeds
INSTRUCTION = inspect.signature(encode_prompts).parameters["system_message"].default
CUT = inspect.signature(encode_prompts).parameters["crop_start"].default  # tokens of the instruction
# How a small model's tokenizer writes a conversation: CUT tokens in the instruction's place, for its own tokens are
# letters. The real one brings its own template.
TEMPLATE = (
    f"{{{{ '.' * {CUT - 1} }}}}{{% for one in messages %}}{{{{ ' ' + one['content'] if loop.last }}}}{{% endfor %}}"
)
DEFAULTS = defaults_of(HunyuanVideo15Transformer3DModel)
TINY = {"num_attention_heads": 2, "attention_head_dim": 32, "num_layers": 3, "rope_axes_dim": (8, 12, 12)}
TINY |= {"image_embed_dim": 32, "text_embed_dim": 64, "text_embed_2_dim": 48}


def shape(config: Mapping[str, Any]) -> Shape:
    heads = config["num_attention_heads"]
    width, side = heads * config["attention_head_dim"], config["patch_size"]
    patch = (config["patch_size_t"], side, side)
    return Shape(config["num_layers"], heads, width, int(width * config["mlp_ratio"]), patch)


def flops(own: Shape, tokens: int, text_tokens: int) -> tuple[float, float]:
    """matrix = 2 S n (4 d^2 + 2 d ffn), attention = 4 S^2 d n, with S video and text tokens: both have weights of their
    own, of the same sizes. The text's refiner is left out as small.

    By hand: S = 2 + 1, d = 3, ffn = 4, n = 1: 2*3*(4*9 + 2*3*4) = 360 and 4*9*3 = 108."""
    joined = tokens + text_tokens
    matrix = 2.0 * joined * own.layers * (4 * own.width**2 + 2 * own.width * own.ffn)
    return matrix, 4.0 * joined**2 * own.width * own.layers


class JointAttention(HunyuanVideo15AttnProcessor2_0):
    """A block's attention over the video's and the text's tokens without padding, instead of with a mask of all pairs
    of tokens: 2.5 GB for 121 frames of 480x848, with which no fast kernel runs. The same function for all tokens but
    padding, whose outputs nothing reads: they are zeros here."""

    def __call__(
        self,
        attn: nn.Module,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor,
        image_rotary_emb: Any,
    ) -> tuple[Tensor, Tensor]:  # diffusers' names
        """Video (B, N, D) and text (B, L, D), its padding last, and known (B, L) bool: where there is none."""
        video = (attn.to_q, attn.to_k, attn.to_v)
        text = (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
        query, key, value = (layer(hidden_states).unflatten(2, (attn.heads, -1)) for layer in video)
        query, key = (
            apply_rotary_emb(norm(one), image_rotary_emb, sequence_dim=1)
            for norm, one in ((attn.norm_q, query), (attn.norm_k, key))
        )
        query_2, key_2, value_2 = (layer(encoder_hidden_states).unflatten(2, (attn.heads, -1)) for layer in text)
        pairs = (query, attn.norm_added_q(query_2)), (key, attn.norm_added_k(key_2)), (value, value_2)
        joined = attend(*(torch.cat(pair, dim=1) for pair in pairs), attention_mask, self._attention_backend)
        hidden_states, encoder_hidden_states = joined.flatten(2).split(
            [hidden_states.shape[1], encoder_hidden_states.shape[1]], dim=1
        )
        return attn.to_out[1](attn.to_out[0](hidden_states)), attn.to_add_out(encoder_hidden_states)


@torch.compiler.disable  # lengths decide shapes
def attend(query: Tensor, key: Tensor, value: Tensor, known: Tensor, backend: Any) -> Tensor:
    """Attention (B, N, heads, size) without the tokens, of the last L, where `known` (B, L) is False: zeros there."""
    count, outputs = query.shape[1], []
    for number, length in enumerate((count - known.shape[1] + known.sum(dim=1)).tolist()):
        own = (one[number : number + 1, :length] for one in (query, key, value))
        output = dispatch_attention_fn(*own, backend=backend)
        outputs.append(nn.functional.pad(output, (0, 0, 0, 0, 0, count - length)))
    return torch.cat(outputs)


KIND = NetworkKind(HunyuanVideo15Transformer3DModel, shape, flops, "transformer_blocks", attention=JointAttention)


def hunyuan15_architecture(z_dim: int, scale: int, **network: Any) -> dict[str, Any]:
    """An entry of the family's architectures, of what differs from the defaults of diffusers' class."""
    transformer = DEFAULTS | {"in_channels": 2 * z_dim + 1, "out_channels": z_dim, "task_type": "t2v", **network}
    return {"kind": KIND, "transformer": transformer, "z_dim": z_dim, "vae_scale": scale, "vae_scale_temporal": 4}


@dataclass(eq=False, repr=False)
class Hunyuan15(Backbone):
    kind = KIND
    vae_class = AutoencoderKLHunyuanVideo15
    vae_facts = {
        "z_dim": ("latent_channels", 32),
        "vae_scale": ("spatial_compression_ratio", 16),
        "vae_scale_temporal": ("temporal_compression_ratio", 4),
    }
    network_defaults = DEFAULTS
    encoder_classes = {"text_encoder": Qwen2_5_VLTextModel, "text_encoder_2": T5EncoderModel}
    tokenizers = {"tokenizer": partial(build_tokenizer, chat_template=TEMPLATE), "tokenizer_2": ByT5Tokenizer}
    pipelines = ("HunyuanVideo15Pipeline",)
    more_texts = {"text_2": 256}
    architectures = {
        "tiny": hunyuan15_architecture(4, 8, **TINY),
        "8.3B": hunyuan15_architecture(32, 16),
    }

    text_encoder_2: nn.Module | None = None
    tokenizer_2: PreTrainedTokenizerBase | None = None

    @classmethod
    def input_channels(cls, architecture: dict[str, Any]) -> int:
        return 2 * architecture["z_dim"] + 1

    @classmethod
    def mismatch(cls, model_index: dict[str, Any], architecture: dict[str, Any]) -> str:
        meanflow = "the transformer reads a second time (use_meanflow), as the upsampling one does"
        found = super().mismatch(model_index, architecture)
        return found or (meanflow if architecture["transformer"].get("use_meanflow") else "")

    # Conditioning

    def text_shapes(self) -> dict[str, tuple[int, int]]:
        network, lengths = self.architecture["transformer"], self.text_lengths(self.text_length)
        widths = {"text": network["text_embed_dim"], "text_2": network["text_embed_2_dim"]}
        return {name: (lengths[name], width) for name, width in widths.items()}

    @classmethod
    def random_encoders(cls, architecture: dict[str, Any], words: int) -> dict[str, Any]:
        """Qwen2.5-VL's text model and ByT5's encoder."""
        network = architecture["transformer"]
        width, letters = network["text_embed_dim"], network["text_embed_2_dim"]
        text = Qwen2_5_VLTextConfig(**text_sizes(width, words))
        real = {"d_kv": 64, "d_ff": 3584, "num_layers": 12, "num_heads": 6}
        small = {"d_kv": 16, "d_ff": 2 * letters, "num_layers": 2, "num_heads": 3}
        sizes = {"d_model": letters, "vocab_size": 384, **(real if width == WIDTH else small)}
        letters_config = T5Config(feed_forward_proj="gated-gelu", **sizes)
        return {"text_encoder": Qwen2_5_VLTextModel(text), "text_encoder_2": T5EncoderModel(letters_config)}

    @classmethod
    def fill_buffers(cls, encoders: dict[str, Any], device: torch.device) -> None:
        make_positions(encoders["text_encoder"], device)

    @classmethod
    def vae_config(cls, architecture: dict[str, Any]) -> dict[str, Any]:
        z_dim, scale = architecture["z_dim"], architecture["vae_scale"]
        small = {"block_out_channels": (2 * z_dim,) * 4, "layers_per_block": 1} if scale < 16 else {}
        return {"latent_channels": z_dim, "spatial_compression_ratio": scale, **small}

    @torch.no_grad()
    def encode_texts(self, prompts: list[str]) -> Conditioning:
        """Prompts -> text (B, text_length, D) and text_2 (B, 256, D'), zero beyond their tokens, in their encoders'
        dtypes. What closes the prompt in its conversation counts among the first one's tokens."""
        self.check_prompts(prompts)
        length, texts = self.text_length, {}
        texts["text"] = encode_prompts(
            self.text_encoder, self.tokenizer, prompts, self.device, tokenizer_max_length=length
        )
        length = self.more_texts["text_2"]
        texts["text_2"] = encode_letters(self.tokenizer_2, self.text_encoder_2, prompts, self.device, length)
        padded = {name: text.masked_fill(mask.unsqueeze(-1) == 0, 0) for name, (text, mask) in texts.items()}
        return Conditioning(padded.pop("text"), more=padded)

    def count_tokens(self, prompts: list[str]) -> list[int]:
        told = format_text_input(prompts, INSTRUCTION)
        ids = self.tokenizer.apply_chat_template(told, add_generation_prompt=True, tokenize=True, return_dict=True)
        return [len(one) - CUT for one in ids["input_ids"]]

    def cut_prompts(self, prompts: Mapping[str, str]) -> str:
        """Likewise of what stands between quotation marks, which another encoder reads."""
        most, letters = self.more_texts["text_2"], {name: extract_glyph_texts(one) for name, one in prompts.items()}
        long = [name for name, one in letters.items() if one and len(self.tokenizer_2(one).input_ids) > most]
        reads = f"have more letters between quotation marks than the {most} that are read, and are cut there"
        warning = f"warning: {len(long)} prompts {reads}; the first is {long[0]}" if long else ""
        return "\n".join(filter(None, (super().cut_prompts(prompts), warning)))

    # Latents and the network. diffusers' VAE takes one clip at a time: its attention's mask has no batch axis.

    def encode_video(self, frames: Tensor, *, batch_size: int = 1) -> Tensor:
        return super().encode_video(frames)

    def decode_latents(self, latents: Tensor, *, batch_size: int = 1) -> Tensor:
        return super().decode_latents(latents)

    def latent_moments(self) -> tuple[Tensor, Tensor]:
        scale = torch.tensor(1 / self.vae.config.scaling_factor, device=self.device)
        return torch.zeros_like(scale), scale

    def network_arguments(
        self, latents: Tensor, timestep: Tensor, conditioning: Conditioning, dtype: torch.dtype
    ) -> dict[str, Tensor]:
        texts = {name: text.to(latents.device, dtype) for name, text in conditioning.texts().items()}
        masks = {name: text.ne(0).any(dim=-1) for name, text in texts.items()}
        given, image = self._given(latents, conditioning)
        return {
            "hidden_states": torch.cat([latents, given], dim=1).to(dtype),
            "timestep": timestep.to(dtype),
            "encoder_hidden_states": texts["text"],
            "encoder_attention_mask": masks["text"],
            "encoder_hidden_states_2": texts["text_2"],
            "encoder_attention_mask_2": masks["text_2"],
            "image_embeds": image.to(dtype),
        }

    def _given(self, latents: Tensor, conditioning: Conditioning) -> tuple[Tensor, Tensor]:
        """Latents of given frames and their mask (B, C + 1, F, H, W), and an image encoder's tokens (B, N, D)."""
        batch, channels, *size = latents.shape
        width = self.architecture["transformer"]["image_embed_dim"]
        return latents.new_zeros(batch, channels + 1, *size), latents.new_zeros(batch, 0, width)
