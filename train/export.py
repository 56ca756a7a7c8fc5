"""From a checkpoint to files that other programs load.

    python -m train.export runs/wan14b/train out/                               # for pipe.load_lora_weights("out")
    python -m train.export runs/wan14b/train out/lora.safetensors --to comfyui  # ComfyUI's key names
    python -m train.export runs/wan14b/train out/ --to merged --base Wan-AI/Wan2.1-T2V-14B-Diffusers   # full weights

The first argument is a LoRA file, a checkpoint folder, or a training folder (its newest checkpoint). The two experts of
A14B are trained and exported one by one; load a low-noise one with `load_lora_weights(...,
load_into_transformer_2=True)`.
"""

import argparse
import json
import os
import re
from pathlib import Path

import torch
from diffusers import WanPipeline
from safetensors.torch import load_file, save_file
from torch import Tensor

from train import entry
from train.backbones.loading import fingerprint, load_transformer, resolve_folder
from train.checkpoint import lora_path, read_lora_metadata

DIFFUSERS_FILE = "pytorch_lora_weights.safetensors"
# diffusers' layer names within a block, and those of Wan's own code, which ComfyUI uses.
ORIGINAL_NAMES = {
    "attn1.to_q": "self_attn.q",
    "attn1.to_k": "self_attn.k",
    "attn1.to_v": "self_attn.v",
    "attn1.to_out.0": "self_attn.o",
    "attn2.to_q": "cross_attn.q",
    "attn2.to_k": "cross_attn.k",
    "attn2.to_v": "cross_attn.v",
    "attn2.to_out.0": "cross_attn.o",
    "ffn.net.0.proj": "ffn.0",
    "ffn.net.2": "ffn.2",
}


def to_diffusers(source: Path, target: Path) -> Path:
    """Write the LoRA as diffusers and peft expect it, with rank, alpha and targets as metadata, to file `target`."""
    metadata = read_lora_metadata(source)
    adapter = {
        "r": int(metadata["rank"]),
        "lora_alpha": float(metadata["alpha"]),
        "target_modules": json.loads(metadata["targets"]),
        "peft_type": "LORA",
    }
    target.parent.mkdir(parents=True, exist_ok=True)
    aside = f".{target.name}.tmp"
    WanPipeline.save_lora_weights(
        target.parent,
        transformer_lora_layers=load_file(lora_path(source)),
        transformer_lora_adapter_metadata=adapter,
        weight_name=aside,
    )
    os.replace(target.parent / aside, target)
    return target


def to_comfyui(source: Path, target: Path) -> Path:
    """Write the LoRA with ComfyUI's names (`diffusion_model.`, Wan's own layer names, lora_down, lora_up, alpha).

    ValueError for a layer that has no name there.
    """
    metadata = read_lora_metadata(source)
    tensors: dict[str, Tensor] = {}
    for name, weight in load_file(lora_path(source)).items():
        layer, matrix = re.fullmatch(r"(.+)\.lora_([AB])\.weight", name).groups()
        in_block = re.fullmatch(r"(blocks\.\d+)\.(.+)", layer)
        if in_block is None or in_block[2] not in ORIGINAL_NAMES:
            raise ValueError(f"layer {layer} has no ComfyUI name: known are {', '.join(ORIGINAL_NAMES)} of each block")
        key = f"diffusion_model.{in_block[1]}.{ORIGINAL_NAMES[in_block[2]]}"
        tensors[f"{key}.lora_{'down' if matrix == 'A' else 'up'}.weight"] = weight.contiguous()
        tensors[f"{key}.alpha"] = torch.tensor(float(metadata["alpha"]))
    target.parent.mkdir(parents=True, exist_ok=True)
    aside = target.with_name(f".{target.name}.tmp")
    save_file(tensors, aside, metadata={"format": "pt"})
    os.replace(aside, target)
    return target


def to_merged(source: Path, target: Path, *, base: str, dtype: torch.dtype = torch.bfloat16) -> Path:
    """Write the transformer of pipeline `base` with W + (alpha / rank) B A merged in, as a diffusers model folder.

    The sum is made in float32 and then rounded to `dtype`. ValueError when `base` is not the backbone that the LoRA was
    trained on.
    """
    metadata = read_lora_metadata(source)
    scale = float(metadata["alpha"]) / float(metadata["rank"])
    pipeline = resolve_folder(base)
    found = fingerprint(metadata["fingerprint"].partition("-")[0], pipeline)
    if found != metadata["fingerprint"]:
        raise ValueError(
            f"LoRA {lora_path(source)} was trained on backbone {metadata['fingerprint']}, {base} is {found}."
            " Merge into the pipeline that it was trained on."
        )
    name = {"transformer": "transformer", "high_noise": "transformer", "low_noise": "transformer_2"}[metadata["expert"]]
    network = load_transformer(pipeline, name, torch.device("cpu"), dtype)
    adapters = load_file(lora_path(source))
    with torch.no_grad():
        for name in sorted(adapters):
            if name.endswith(".lora_A.weight"):
                layer = network.get_submodule(name.removesuffix(".lora_A.weight"))
                update = adapters[name.replace("lora_A", "lora_B")] @ adapters[name]
                layer.weight.copy_(layer.weight.float() + scale * update)
    aside = target / ".merged.tmp"
    network.save_pretrained(aside)
    for file in sorted(aside.iterdir()):  # the index of the shards comes after them
        os.replace(file, target / file.name)
    aside.rmdir()
    return target


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="LoRA file, checkpoint folder or training folder")
    parser.add_argument("target", type=Path, help="file (diffusers, comfyui) or folder (diffusers, merged) to write")
    parser.add_argument("--to", choices=("diffusers", "comfyui", "merged"), default="diffusers")
    parser.add_argument("--base", help="pipeline to merge into: hub id or folder")
    arguments = parser.parse_args(argv)
    if arguments.to == "merged":
        if not arguments.base:
            parser.error("--to merged needs --base, the pipeline that the LoRA was trained on")
        written = to_merged(arguments.source, arguments.target, base=arguments.base)
    elif arguments.to == "comfyui":
        written = to_comfyui(arguments.source, arguments.target)
    else:
        is_file = arguments.target.suffix == ".safetensors"
        written = to_diffusers(arguments.source, arguments.target if is_file else arguments.target / DIFFUSERS_FILE)
    print(f"wrote {written}")


if __name__ == "__main__":
    entry.run(main)
