"""Assembles a small Wan pipeline: a trained VAE, a small Wan DiT, a small frozen text encoder and a tokenizer.

The folder is a standard diffusers WanPipeline. The DiT is freshly initialised, to be trained by `train/sft.py`, or a
trained one. Weights are stored in 16 bits.

The text encoder is never trained. A random one would do for the words, but says little about their order, on which it
depends which ball hits which: so each of its heads looks at one fixed offset (the word before, the one after, ...).
"""

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel
from tokenizers import normalizers
from torch import nn
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from eval.small_wan.training import seeded
from train.backbones.tokenizer import build_tokenizer

TEXT_WIDTH = 128
# Words that a head of the text encoder looks at, relative to its own; None: all that are 8 or more words away.
BEFORE, AFTER = (-1, -2, -3, None), (1, 2, 3, None)
ATTENTION_BIAS = 8.0  # of those words' logits, against content logits of order 1
EXACT_BUCKETS = 8  # UMT5's relative positions: offsets 0 to 7 have a bucket each, farther ones share 8
BUCKETS = 16  # of each direction


def write_pipeline(
    vae_folder: str | Path,
    folder: str | Path,
    network: dict[str, Any],
    *,
    seed: int = 0,
    transformer_folder: str | Path | None = None,
    words: str = "",
    first_frame: bool = False,
) -> Path:
    """Write the pipeline and return its folder. The same seed gives the same weights.

    network: WanTransformer3DModel's arguments, of a fresh one. words: that are one token each besides the tokenizer's
    own. first_frame: whether one may be given, as of the family wan22_ti2v.

    Raises ValueError where the VAE is missing, or has another number of channels than the trained transformer.
    """
    for place, key in ((vae_folder, "--vae"), (transformer_folder, "--transformer")):
        if place is not None and not (Path(place) / "config.json").is_file():
            raise ValueError(f"{key} {place} holds no model (no config.json): give the folder that training wrote")
    vae = AutoencoderKLWan.from_pretrained(vae_folder, torch_dtype=torch.float16)
    if transformer_folder is None:
        transformer = new_transformer(
            network | {"in_channels": vae.config.z_dim, "out_channels": vae.config.z_dim}, seed=seed
        )
    else:
        transformer = WanTransformer3DModel.from_pretrained(transformer_folder)
        if transformer.config.in_channels != vae.config.z_dim:
            raise ValueError(
                f"--transformer {transformer_folder} reads {transformer.config.in_channels} channels, but --vae "
                f"{vae_folder} has {vae.config.z_dim}: the two belong to different pipelines"
            )
    for parameter in transformer.parameters():  # `to` would warn of those that from_pretrained makes float32 again
        parameter.data = parameter.data.to(torch.bfloat16)
    tokenizer = small_tokenizer(words)
    pipeline = WanPipeline(
        tokenizer=tokenizer,
        text_encoder=small_text_encoder(len(tokenizer), seed=seed).to(torch.bfloat16),
        vae=vae,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        transformer=transformer,
        expand_timesteps=first_frame,
    )
    pipeline.save_pretrained(folder)
    for config in Path(folder).glob("*/config.json"):  # the folders that the parts came from do not belong in the model
        settings = json.loads(config.read_text(encoding="utf-8"))
        settings.pop("_name_or_path", None)
        config.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return Path(folder)


def new_transformer(network: dict[str, Any], *, seed: int) -> WanTransformer3DModel:
    """A DiT to train from scratch, initialised as Wan does: Xavier matrices, a head of zeros."""
    with seeded(seed):
        model = WanTransformer3DModel(**network)
        for module in model.modules():
            if isinstance(module, (nn.Linear, nn.Conv3d)):
                nn.init.xavier_uniform_(module.weight.flatten(1))
                nn.init.zeros_(module.bias)
        nn.init.zeros_(model.proj_out.weight)
    return model.eval()


def small_tokenizer(words: str = "") -> PreTrainedTokenizerFast:
    """The tiny pipelines' tokenizer, with more `words`; capitals are read as small letters."""
    tokenizer = build_tokenizer(words)
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    return tokenizer


def small_text_encoder(vocabulary: int, *, seed: int) -> UMT5EncoderModel:
    """A UMT5 encoder of two layers with random weights, whose heads look at the offsets BEFORE and AFTER."""
    offsets = (*BEFORE, *AFTER)
    config = UMT5Config(
        vocab_size=vocabulary,
        d_model=TEXT_WIDTH,
        d_kv=TEXT_WIDTH // len(offsets),
        d_ff=2 * TEXT_WIDTH,
        num_layers=2,
        num_heads=len(offsets),
        relative_attention_num_buckets=2 * BUCKETS,
        feed_forward_proj="gated-gelu",
    )
    with seeded(seed):
        encoder = UMT5EncoderModel(config).eval().requires_grad_(False)
    bias = torch.zeros(2 * BUCKETS, len(offsets))
    for head, offset in enumerate(offsets):
        first = 0 if head < len(BEFORE) else BUCKETS
        if offset is None:
            bias[first + EXACT_BUCKETS : first + BUCKETS, head] = ATTENTION_BIAS
        else:
            bias[first + abs(offset), head] = ATTENTION_BIAS
    for block in encoder.encoder.block:
        block.layer[0].SelfAttention.relative_attention_bias.weight.copy_(bias)
    return encoder
