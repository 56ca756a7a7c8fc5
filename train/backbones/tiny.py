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

import diffusers
import torch
from diffusers import AutoencoderKLWan, ClassifierFreeGuidance, FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler
from torch import nn

from train import entry
from train.backbones import BACKBONES
from train.backbones.base import Backbone
from train.backbones.cosmos25 import Cosmos25
from train.backbones.hunyuan15 import Hunyuan15
from train.backbones.loading import random_transformer
from train.backbones.wan import WanBackbone


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
    tokenizers = {name: make() for name, make in backbone.tokenizers.items()}
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would also reseed every GPU
        vae = _tiny_vae(backbone.vae_class(**backbone.vae_config(architecture)).eval())
        encoders = backbone.random_encoders(architecture, len(tokenizers["tokenizer"]))
    for name in backbone.encoder_classes:
        encoders[name].eval()
    pipeline_class = getattr(diffusers, backbone.pipelines[-1 if backbone.first_frame == (True,) else 0])
    pipeline_class(vae=vae, **tokenizers, **encoders, **transformers, **_others(backbone)).save_pretrained(folder)
    if issubclass(backbone, WanBackbone):
        # As Wan's encoders have it, whose files hold shared.weight alone; transformers itself writes true.
        config = Path(folder) / "text_encoder" / "config.json"
        untied = json.loads(config.read_text(encoding="utf-8")) | {"tie_word_embeddings": False}
        config.write_text(json.dumps(untied, indent=2) + "\n", encoding="utf-8")
    return Path(folder)


def _others(backbone: type[Backbone]) -> dict[str, Any]:
    """What else a pipeline of the family has."""
    if issubclass(backbone, Hunyuan15):
        guider = ClassifierFreeGuidance(guidance_scale=6.0)
        return {"scheduler": FlowMatchEulerDiscreteScheduler(shift=5.0), "guider": guider}
    if issubclass(backbone, Cosmos25):
        # The noise levels of the checkpoints' scheduler. Of the guardrail a pipeline's folder holds nothing.
        karras = {"use_karras_sigmas": True, "sigma_max": 200.0, "sigma_min": 0.01}
        scheduler = UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction", **karras)
        return {"scheduler": scheduler, "safety_checker": lambda *_: None}
    flags = {"boundary_ratio": backbone.default_boundary, "expand_timesteps": backbone.expand_timesteps}
    return {"scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0), **flags}


def _tiny_vae(vae: nn.Module) -> nn.Module:
    """A small random VAE; one of Wan's with its latents' statistics, over a few smooth videos from the global generator
    instead of those of its training."""
    if not isinstance(vae, AutoencoderKLWan):
        return vae
    coarse = torch.rand(4, 3, 3, 4, 4) * 2 - 1
    with torch.no_grad():
        videos = torch.nn.functional.interpolate(coarse, size=(9, 64, 64), mode="trilinear", align_corners=True)
        latents = vae.encode(videos).latent_dist.mode()
    std, mean = torch.std_mean(latents, dim=(0, 2, 3, 4))
    vae.register_to_config(latents_mean=mean.tolist(), latents_std=std.tolist())
    return vae


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Write a tiny random pipeline, a diffusers folder.")
    parser.add_argument("--folder", required=True, help="of the pipeline that is written")
    parser.add_argument("--family", default="wan21", choices=sorted(BACKBONES), help="of the network")
    parser.add_argument("--seed", type=int, default=0, help="of the weights")
    arguments = parser.parse_args(argv)
    print(f"wrote {write_tiny_pipeline(arguments.family, arguments.folder, seed=arguments.seed)}")


if __name__ == "__main__":
    entry.run(main)
