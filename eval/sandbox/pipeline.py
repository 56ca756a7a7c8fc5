"""Assembles the sandbox's pipeline: a trained VAE, a small Wan DiT, a small frozen text encoder and a tokenizer.

    python -m eval.sandbox.pipeline --vae runs/sandbox/vae --folder runs/sandbox/start --seed 0
    python -m eval.sandbox.pipeline --vae runs/sandbox/vae --folder model --transformer runs/sandbox/trained/transformer

The folder is a standard diffusers WanPipeline. The DiT is freshly initialised, to be trained by `train/sft.py`, or with
--transformer a trained one. Weights are stored in 16 bits, which keeps the folder below 20 MB.

The text encoder is never trained. A random one would do for the words, but says little about their order, on which it
depends which ball hits which: so each of its heads looks at one fixed offset (the word before, the one after, ...).
"""

import argparse
import json
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel
from tokenizers import normalizers
from torch import nn
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from eval.sandbox.training import seeded
from train import entry
from train.backbones.tokenizer import build_tokenizer
from train.backbones.wan import wan_architecture

TEXT_WIDTH = 128
# Words that a head of the text encoder looks at, relative to its own; None: all that are 8 or more words away.
BEFORE, AFTER = (-1, -2, -3, None), (1, 2, 3, None)
ATTENTION_BIAS = 8.0  # of those words' logits, against content logits of order 1
EXACT_BUCKETS = 8  # UMT5's relative positions: offsets 0 to 7 have a bucket each, farther ones share 8
BUCKETS = 16  # of each direction


def write_pipeline(
    vae_folder: str | Path, folder: str | Path, *, seed: int = 0, transformer_folder: str | Path | None = None
) -> Path:
    """Write the pipeline and return its folder. The same seed gives the same weights.

    Raises ValueError where the VAE is missing, or has another number of channels than the trained transformer.
    """
    for place, key in ((vae_folder, "--vae"), (transformer_folder, "--transformer")):
        if place is not None and not (Path(place) / "config.json").is_file():
            raise ValueError(f"{key} {place} holds no model (no config.json): give the folder that training wrote")
    vae = AutoencoderKLWan.from_pretrained(vae_folder, torch_dtype=torch.float16)
    if transformer_folder is None:
        transformer = new_transformer(vae.config.z_dim, seed=seed)
    else:
        transformer = WanTransformer3DModel.from_pretrained(transformer_folder)
        if transformer.config.in_channels != vae.config.z_dim:
            raise ValueError(
                f"--transformer {transformer_folder} reads {transformer.config.in_channels} channels, but --vae "
                f"{vae_folder} has {vae.config.z_dim}: the two belong to different pipelines"
            )
    for parameter in transformer.parameters():  # `to` would warn of those that from_pretrained makes float32 again
        parameter.data = parameter.data.to(torch.bfloat16)
    tokenizer = sandbox_tokenizer()
    pipeline = WanPipeline(
        tokenizer=tokenizer,
        text_encoder=sandbox_text_encoder(len(tokenizer), seed=seed).to(torch.bfloat16),
        vae=vae,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        transformer=transformer,
    )
    pipeline.save_pretrained(folder)
    for config in Path(folder).glob("*/config.json"):  # the folders that the parts came from do not belong in the model
        settings = json.loads(config.read_text(encoding="utf-8"))
        settings.pop("_name_or_path", None)
        config.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return Path(folder)


def new_transformer(latent_channels: int, *, seed: int) -> WanTransformer3DModel:
    """A DiT of 7M parameters to train from scratch, initialised as Wan does: Xavier matrices, a head of zeros."""
    architecture = wan_architecture(heads=4, head_dim=64, ffn=896, layers=6, z_dim=latent_channels, text_dim=TEXT_WIDTH)
    with seeded(seed):
        model = WanTransformer3DModel(**architecture["transformer"])
        for module in model.modules():
            if isinstance(module, (nn.Linear, nn.Conv3d)):
                nn.init.xavier_uniform_(module.weight.flatten(1))
                nn.init.zeros_(module.bias)
        nn.init.zeros_(model.proj_out.weight)
    return model.eval()


def sandbox_tokenizer() -> PreTrainedTokenizerFast:
    """The tiny pipelines' tokenizer, which knows the sandbox's words; capitals are read as small letters."""
    tokenizer = build_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    return tokenizer


def sandbox_text_encoder(vocabulary: int, *, seed: int) -> UMT5EncoderModel:
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


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vae", required=True, help="folder that eval.sandbox.vae wrote")
    parser.add_argument("--folder", required=True)
    parser.add_argument("--transformer", default=None, help="folder of a trained transformer (default: a fresh one)")
    parser.add_argument("--seed", type=int, default=0, help="of the fresh transformer and of the text encoder")
    options = parser.parse_args(argv)
    folder = write_pipeline(options.vae, options.folder, seed=options.seed, transformer_folder=options.transformer)
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    print(f"wrote {folder}, {size / 1e6:.1f} MB")


if __name__ == "__main__":
    entry.run(main)
