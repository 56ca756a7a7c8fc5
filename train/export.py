"""From a checkpoint to files that other programs load.

    python -m train.export runs/wan14b/train out/                               # for pipe.load_lora_weights("out")
    python -m train.export runs/wan14b/train out/lora.safetensors --to comfyui  # ComfyUI's key names
    python -m train.export runs/wan14b/train out/ --to merged --base Wan-AI/Wan2.1-T2V-14B-Diffusers   # full weights

The first argument is a LoRA file, a checkpoint folder, or a training folder (its newest checkpoint). The two experts of
A14B are trained and exported one by one, and a file's metadata say which it is for; load a low-noise one with
`load_lora_weights(..., load_into_transformer_2=True)`. Merged weights are rounded to bfloat16 unless `--dtype float32`
is given: on a small network rounding moves the output by more than a short training does.
"""

import argparse
import json
import os
import re
import shutil
from pathlib import Path

import torch
from diffusers import WanPipeline
from safetensors import safe_open
from torch import Tensor, nn

from train import entry, files
from train.backbones.loading import fingerprint, load_transformer, resolve_folder
from train.checkpoint import attach_trained, find_lora
from train.lora_switch import SwitchedLinear
from train.weight_files import read_tensors, write_tensors

DIFFUSERS_FILE = "pytorch_lora_weights.safetensors"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
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
    path, metadata = find_lora(source)
    adapter = {
        "r": int(metadata["rank"]),
        "lora_alpha": float(metadata["alpha"]),
        "target_modules": json.loads(metadata["targets"]),
        "peft_type": "LORA",
    }
    with files.atomic(target) as aside:
        WanPipeline.save_lora_weights(
            aside.parent,
            transformer_lora_layers=read_tensors(path),
            transformer_lora_adapter_metadata=adapter,
            weight_name=aside.name,
        )
        with safe_open(aside, framework="pt") as file:
            header = file.metadata()
        write_tensors(read_tensors(aside), aside, header | _origin(metadata))
    return target


def to_comfyui(source: Path, target: Path) -> Path:
    """Write the LoRA with ComfyUI's names (`diffusion_model.`, Wan's own layer names, lora_down, lora_up, alpha).

    ValueError for a layer that has no name there.
    """
    path, metadata = find_lora(source)
    tensors: dict[str, Tensor] = {}
    for name, weight in read_tensors(path).items():
        layer, matrix = re.fullmatch(r"(.+)\.lora_([AB])\.weight", name).groups()
        in_block = re.fullmatch(r"(blocks\.\d+)\.(.+)", layer)
        if in_block is None or in_block[2] not in ORIGINAL_NAMES:
            raise ValueError(f"layer {layer} has no ComfyUI name: known are {', '.join(ORIGINAL_NAMES)} of each block")
        key = f"diffusion_model.{in_block[1]}.{ORIGINAL_NAMES[in_block[2]]}"
        tensors[f"{key}.lora_{'down' if matrix == 'A' else 'up'}.weight"] = weight.contiguous()
        tensors[f"{key}.alpha"] = torch.tensor(float(metadata["alpha"]))
    write_tensors(tensors, target, {"format": "pt"} | _origin(metadata))
    return target


def _origin(metadata: dict[str, str]) -> dict[str, str]:
    """What an exported LoRA says of itself beyond its format: the backbone and, of two experts, the one it is for."""
    return {key: metadata[key] for key in ("fingerprint", "expert")}


def to_merged(source: Path, target: Path, *, base: str, dtype: torch.dtype = torch.bfloat16) -> Path:
    """Write the transformer of pipeline `base` with W + (alpha / rank) B A merged in, as a diffusers model folder.

    The sum is made in float32 and then rounded to `dtype`. ValueError when `base` is not the backbone that the LoRA was
    trained on.
    """
    path, metadata = find_lora(source)
    scale = float(metadata["alpha"]) / float(metadata["rank"])
    pipeline = resolve_folder(base)
    found = fingerprint(metadata["fingerprint"].partition("-")[0], pipeline)
    if found != metadata["fingerprint"]:
        raise ValueError(
            f"LoRA {path} was trained on backbone {metadata['fingerprint']}, {base} is {found}."
            " Merge into the pipeline that it was trained on."
        )
    name = {"transformer": "transformer", "high_noise": "transformer", "low_noise": "transformer_2"}[metadata["expert"]]
    network = load_transformer(pipeline, name, torch.device("cpu"), dtype)
    attach_trained(path, {metadata["expert"]: network}, fingerprint=found)
    with torch.no_grad():
        for layer in network.modules():
            if isinstance(layer, SwitchedLinear):
                layer.weight.copy_(layer.weight.float() + scale * (layer.lora_up @ layer.lora_down))
    return save_network(network, target)


def save_network(network: nn.Module, folder: Path) -> Path:
    """`network.save_pretrained`, each file whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    aside = files.temporary(folder / "network")
    try:
        with files.explain_full_disk(aside):
            network.save_pretrained(aside)
        for file in sorted(aside.iterdir()):  # the index of the shards comes after them
            with files.atomic(folder / file.name) as whole:
                os.replace(file, whole)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return folder


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="LoRA file, checkpoint folder or training folder")
    parser.add_argument("target", type=Path, help="file (diffusers, comfyui) or folder (diffusers, merged) to write")
    parser.add_argument("--to", choices=("diffusers", "comfyui", "merged"), default="diffusers")
    parser.add_argument("--base", help="pipeline to merge into: hub id or folder")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="of merged weights (default: bfloat16)")
    arguments = parser.parse_args(argv)
    if arguments.to == "merged":
        if not arguments.base:
            parser.error("--to merged needs --base, the pipeline that the LoRA was trained on")
        dtype = DTYPES[arguments.dtype]
        written = to_merged(arguments.source, arguments.target, base=arguments.base, dtype=dtype)
    elif arguments.to == "comfyui":
        written = to_comfyui(arguments.source, arguments.target)
    else:
        is_file = arguments.target.suffix == ".safetensors"
        written = to_diffusers(arguments.source, arguments.target if is_file else arguments.target / DIFFUSERS_FILE)
    expert = find_lora(arguments.source)[1]["expert"]
    print(f"wrote {written}" + ("" if expert == "transformer" else f", for the {expert} expert"))


if __name__ == "__main__":
    entry.run(main)
