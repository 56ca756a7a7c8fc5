"""Cosmos-Predict 2.5 (2B, 14B): text, and optionally first frames, to video; with Qwen2.5-VL and Wan2.1's VAE.

diffusers calls it Cosmos2_5_PredictBasePipeline. A prompt stands in a conversation, padded to `text_length` tokens; the
states of all layers of Qwen2.5-VL, each normalised, side by side are the text: 28 x 3584 numbers a token, which the
network projects to 1024. diffusers tells neither encoder nor network which tokens are padding, so theirs are no zeros,
and a text takes 103 MB in bfloat16 at 512 tokens, in groups too. The network is told t itself, in [0, 1], and predicts
noise - clean. Beside the noisy latents it reads which frames are given, and a padding mask, here zeros.

With an image the first latent frame is the image's latent, at t = 0.0001, as in that pipeline; with a prefix the first
k are (video to world: k = 2, of 5 frames). Without either all frames are at t, so the network is given one timestep per
clip: the same function as equal ones per frame, whose modulation is computed per token. Guidance there is v + g (v -
v_negative), so its g is `guidance` - 1 here. Its sampler is UniPC over Karras' noise levels:
`sampler.solver=unipc_karras`.

Facts from diffusers' conversion of nvidia/Cosmos-Predict2.5-{2B,14B}. Deviations: NVIDIA's guardrail is not run here
(see the licence of the weights).
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import AutoencoderKLWan, Cosmos2_5_PredictBasePipeline, CosmosTransformer3DModel
from diffusers.models.transformers import transformer_cosmos
from diffusers.utils import is_torchvision_available
from torch import Tensor, nn
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from train.backbones import loading
from train.backbones.architecture import NetworkKind, Shape, defaults_of
from train.backbones.base import Conditioning
from train.backbones.held_frame import HeldFrame
from train.backbones.qwen25 import LAYERS, SMALL_LAYERS, WIDTH, make_positions, text_sizes
from train.backbones.tokenizer import build_tokenizer
from train.backbones.wan import VAE_FACTS, WanBackbone, transformer_flops, vae_sizes

# diffusers' network uses torchvision for one thing: to bring the padding mask to the latents' size, by nearest cells.
if not is_torchvision_available():
    transformer_cosmos.transforms = SimpleNamespace(
        functional=SimpleNamespace(resize=lambda mask, size, interpolation: nn.functional.interpolate(mask, size)),
        InterpolationMode=SimpleNamespace(NEAREST="nearest"),
    )

encode_prompts = Cosmos2_5_PredictBasePipeline._get_prompt_embeds
INSTRUCTION = "You are a helpful assistant who will provide prompts to an image generator."  # as diffusers has it
HELD_TIME = 1e-4  # t of a given frame; diffusers before 0.39 has 0.1
# How a small model's tokenizer writes a conversation: the prompt alone, for its own tokens are letters.
TEMPLATE = "{{ ' ' + messages[-1]['content'][0]['text'] }}"
DEFAULTS = defaults_of(CosmosTransformer3DModel)
TINY = {"num_attention_heads": 2, "attention_head_dim": 32, "num_layers": 3, "adaln_lora_dim": 16}
TINY |= {"crossattn_proj_in_channels": SMALL_LAYERS * 64, "encoder_hidden_states_channels": 48, "text_embed_dim": 48}


def shape(config: Mapping[str, Any]) -> Shape:
    heads = config["num_attention_heads"]
    width = heads * config["attention_head_dim"]
    return Shape(config["num_layers"], heads, width, int(width * config["mlp_ratio"]), tuple(config["patch_size"]))


KIND = NetworkKind(
    model=CosmosTransformer3DModel,
    shape=shape,
    # Left out: the modulation, which with a first frame is per token, 11% of 2B's matrix products and 4% of 14B's.
    flops=lambda own, tokens, text: transformer_flops(tokens, text, own.width, own.ffn, own.layers),
    blocks="transformer_blocks",
)


def cosmos25_architecture(z_dim: int, **network: Any) -> dict[str, Any]:
    """An entry of the family's architectures, of what differs from the defaults of diffusers' class."""
    own = {"in_channels": z_dim + 1, "out_channels": z_dim, "rope_scale": (1.0, 3.0, 3.0), "extra_pos_embed_type": None}
    own |= {"use_crossattn_projection": True, "crossattn_proj_in_channels": LAYERS * WIDTH}
    facts = {"z_dim": z_dim, "vae_scale": 8, "vae_scale_temporal": 4}
    return {"kind": KIND, "transformer": DEFAULTS | own | network, **facts}


class Cosmos25(HeldFrame):
    kind = KIND
    vae_class, vae_facts = AutoencoderKLWan, VAE_FACTS
    network_defaults = DEFAULTS
    encoder_classes = {"text_encoder": Qwen2_5_VLForConditionalGeneration}
    tokenizers = {"tokenizer": partial(build_tokenizer, chat_template=TEMPLATE)}
    pipelines = ("Cosmos2_5_PredictBasePipeline",)
    timescale = 1.0
    architectures = {
        "tiny": cosmos25_architecture(4, **TINY),
        "2B": cosmos25_architecture(16, num_attention_heads=16),
        "14B": cosmos25_architecture(16, num_attention_heads=40, num_layers=36),
    }

    @classmethod
    def input_channels(cls, architecture: dict[str, Any]) -> int:
        return architecture["z_dim"] + 1

    # Conditioning

    @staticmethod
    def text_width(architecture: dict[str, Any]) -> int:
        network = architecture["transformer"]
        return network["crossattn_proj_in_channels" if network["use_crossattn_projection"] else "text_embed_dim"]

    def text_shapes(self) -> dict[str, tuple[int, int]]:
        return {"text": (self.text_length, self.text_width(self.architecture))}

    @classmethod
    def check_text(cls, folder: Path, architecture: dict[str, Any]) -> None:
        """ValueError when the encoder's layers together are not as wide as what the transformer reads."""
        text = Qwen2_5_VLConfig.from_dict(loading.read_config(folder, "text_encoder")).text_config
        layers, width, wanted = text.num_hidden_layers, text.hidden_size, cls.text_width(architecture)
        if layers * width != wanted:
            raise ValueError(
                f"backbone.path={folder}: the text encoder has {layers} layers of width {width}, but the transformer"
                f" reads {wanted} numbers a token: the two belong to different pipelines"
            )

    @classmethod
    def random_encoders(cls, architecture: dict[str, Any], words: int) -> dict[str, Any]:
        """Qwen2.5-VL, whose eyes are not used."""
        total = cls.text_width(architecture)
        real = total == LAYERS * WIDTH
        text = text_sizes(WIDTH if real else total // SMALL_LAYERS, words)
        small = {"depth": 1, "hidden_size": 32, "num_heads": 2, "intermediate_size": 32, "fullatt_block_indexes": [0]}
        vision = {**({"hidden_size": 1280} if real else small), "out_hidden_size": text["hidden_size"]}
        config = Qwen2_5_VLConfig(text_config=text, vision_config=vision)
        return {"text_encoder": Qwen2_5_VLForConditionalGeneration(config)}

    @classmethod
    def fill_buffers(cls, encoders: dict[str, Any], device: torch.device) -> None:
        make_positions(encoders["text_encoder"].model.language_model, device)

    @classmethod
    def vae_config(cls, architecture: dict[str, Any]) -> dict[str, Any]:
        real = cls.text_width(architecture) == LAYERS * WIDTH
        return vae_sizes(architecture["z_dim"], architecture["vae_scale"], real=real)

    @torch.no_grad()
    def encode_texts(self, prompts: list[str]) -> Conditioning:
        """Prompts -> text (B, text_length, layers x width) in the encoder's dtype; rows of padding are no zeros."""
        self.check_prompts(prompts)
        return Conditioning(encode_prompts(self, prompts, max_sequence_length=self.text_length, device=self.device))

    def count_tokens(self, prompts: list[str]) -> list[int]:
        """With the instruction before them, as much as counts."""
        talks = [(("system", INSTRUCTION), ("user", prompt)) for prompt in prompts]
        told = [[{"role": role, "content": [{"type": "text", "text": text}]} for role, text in one] for one in talks]
        return [len(ids) for ids in self.tokenizer.apply_chat_template(told, return_dict=True)["input_ids"]]

    # Latents and the network

    latent_moments = WanBackbone.latent_moments

    def network_arguments(
        self, latents: Tensor, timestep: Tensor, conditioning: Conditioning, dtype: torch.dtype
    ) -> dict[str, Tensor]:
        if not conditioning.text[:, -1].any(dim=-1).all():
            raise ValueError(
                "the text ends in rows of zeros, but Cosmos reads padding as its encoder has it: build the groups with"
                " the backbone.text_length that the training has"
            )
        given = torch.zeros_like(latents[:, :1])  # (B, 1, F, H, W)
        if conditioning.image is not None:
            latents = self.start(latents, conditioning)
            given[:, :, : conditioning.image.shape[2]] = 1
            frames = given[..., :1, :1]  # (B, 1, F, 1, 1)
            timestep = frames * HELD_TIME + (1 - frames) * timestep.view(-1, 1, 1, 1, 1)
        return {
            "hidden_states": latents.to(dtype),
            "condition_mask": given.to(dtype),
            "padding_mask": torch.zeros_like(given[:1, :, 0], dtype=dtype),
            "timestep": timestep,
            "encoder_hidden_states": conditioning.text.to(latents.device, dtype),
        }
