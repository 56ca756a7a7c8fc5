"""Tiny random pipelines: whole diffusers folders of each family, a few MB each, made in a second without a download.

    python -m train.backbones.tiny --folder runs/tiny/model --family wan21

Every part is the real class (transformer, VAE, text encoder, a fast tokenizer), only small: for tests and as the start
of the sandbox.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKLHunyuanVideo15,
    AutoencoderKLWan,
    ClassifierFreeGuidance,
    Cosmos2_5_PredictBasePipeline,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideo15ImageToVideoPipeline,
    HunyuanVideo15Pipeline,
    UniPCMultistepScheduler,
    WanImageToVideoPipeline,
    WanPipeline,
)
from torch import nn
from transformers import ByT5Tokenizer, Qwen2_5_VLForConditionalGeneration, SiglipVisionModel, UMT5EncoderModel

from train import entry
from train.backbones import BACKBONES, cosmos25
from train.backbones.base import Backbone
from train.backbones.hunyuan15 import TEMPLATE, random_encoders
from train.backbones.hunyuan15_i2v import image_processor, vision_config
from train.backbones.loading import random_transformer
from train.backbones.tokenizer import build_tokenizer
from train.backbones.wan import text_config


def write_tiny_pipeline(family: str, folder: str | Path, *, seed: int = 0) -> Path:
    """Writes a tiny pipeline of `family` to `folder` and returns it; the same seed gives the same weights.

    Loads through `load_backbone` and through diffusers' own pipelines. Global random generators are left alone.
    """
    if family not in BACKBONES:
        raise ValueError(f"family={family!r} is unknown: use one of {', '.join(BACKBONES)}")
    backbone = BACKBONES[family]
    architecture = backbone.architectures["tiny"]
    transformers = {
        name: random_transformer(architecture, device="cpu", dtype=torch.float32, seed=seed + index)
        for index, name in enumerate(backbone.expert_folders.values())
    }
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would also reseed every GPU
        pipeline = WRITERS.get(family, _wan)(backbone, architecture, transformers)
    pipeline.save_pretrained(folder)
    if family not in WRITERS:
        # As Wan's encoders have it, whose files hold shared.weight alone; transformers itself writes true.
        config = Path(folder) / "text_encoder" / "config.json"
        untied = json.loads(config.read_text(encoding="utf-8")) | {"tie_word_embeddings": False}
        config.write_text(json.dumps(untied, indent=2) + "\n", encoding="utf-8")
    return Path(folder)


def _wan(
    backbone: type[Backbone], architecture: dict[str, Any], transformers: dict[str, nn.Module]
) -> DiffusionPipeline:
    tokenizer = build_tokenizer()
    vae = _tiny_vae(backbone.vae_config(architecture))
    text_encoder = UMT5EncoderModel(text_config(architecture["transformer"]["text_dim"], len(tokenizer))).eval()
    pipeline_class = WanImageToVideoPipeline if backbone.first_frame == (True,) else WanPipeline
    return pipeline_class(
        tokenizer=tokenizer,
        text_encoder=text_encoder,
        vae=vae,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        **transformers,
        boundary_ratio=backbone.default_boundary,
        expand_timesteps=backbone.expand_timesteps,
    )


def _hunyuan15(
    backbone: type[Backbone], architecture: dict[str, Any], transformers: dict[str, nn.Module]
) -> DiffusionPipeline:
    tokenizer = build_tokenizer()
    tokenizer.chat_template = TEMPLATE
    vae = AutoencoderKLHunyuanVideo15(**backbone.vae_config(architecture)).eval()
    encoders = random_encoders(architecture, len(tokenizer))
    pipeline_class, more = HunyuanVideo15Pipeline, {}
    if True in backbone.first_frame:
        config = vision_config(architecture["transformer"]["image_embed_dim"])
        encoders |= {"image_encoder": SiglipVisionModel(config)}
        pipeline_class, more = HunyuanVideo15ImageToVideoPipeline, {"feature_extractor": image_processor(config)}
    return pipeline_class(
        **{name: model.eval() for name, model in encoders.items()},
        **more,
        tokenizer=tokenizer,
        tokenizer_2=ByT5Tokenizer(),
        vae=vae,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=5.0),
        guider=ClassifierFreeGuidance(guidance_scale=6.0),
        **transformers,
    )


def _cosmos25(
    backbone: type[Backbone], architecture: dict[str, Any], transformers: dict[str, nn.Module]
) -> DiffusionPipeline:
    tokenizer = build_tokenizer()
    tokenizer.chat_template = cosmos25.TEMPLATE
    vae = _tiny_vae(backbone.vae_config(architecture))
    text_encoder = Qwen2_5_VLForConditionalGeneration(cosmos25.encoder_config(architecture, len(tokenizer))).eval()
    # The noise levels of the checkpoints' scheduler. Of the guardrail a pipeline's folder holds nothing.
    karras = {"use_karras_sigmas": True, "sigma_max": 200.0, "sigma_min": 0.01}
    return Cosmos2_5_PredictBasePipeline(
        tokenizer=tokenizer,
        text_encoder=text_encoder,
        vae=vae,
        scheduler=UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction", **karras),
        safety_checker=lambda *_: None,
        **transformers,
    )


WRITERS = {
    "hunyuan15": _hunyuan15,
    "hunyuan15_i2v": _hunyuan15,
    "cosmos25": _cosmos25,
}  # not Wan's


def _tiny_vae(config: dict[str, Any]) -> AutoencoderKLWan:
    """A small VAE of the family's kind, drawn from the global generator."""
    vae = AutoencoderKLWan(**config).eval()
    # Latents of a trained VAE are normalised by their statistics over videos; here over a few smooth random ones.
    coarse = torch.rand(4, 3, 3, 4, 4) * 2 - 1
    with torch.no_grad():
        videos = torch.nn.functional.interpolate(coarse, size=(9, 64, 64), mode="trilinear", align_corners=True)
        latents = vae.encode(videos).latent_dist.mode()
    std, mean = torch.std_mean(latents, dim=(0, 2, 3, 4))
    vae.register_to_config(latents_mean=mean.tolist(), latents_std=std.tolist())
    return vae


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Write a tiny random pipeline, a diffusers folder.")
    parser.add_argument("--folder", required=True)
    parser.add_argument("--family", default="wan21", choices=sorted(BACKBONES))
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(argv)
    print(f"wrote {write_tiny_pipeline(arguments.family, arguments.folder, seed=arguments.seed)}")


if __name__ == "__main__":
    entry.run(main)
