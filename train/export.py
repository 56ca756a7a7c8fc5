"""From a checkpoint to files that other programs load.

    python -m train.export runs/wan14b/train out/                               # for pipe.load_lora_weights("out/")
    python -m train.export runs/wan14b/train out/lora.safetensors --to comfyui  # ComfyUI's key names
    python -m train.export runs/wan14b/train out/ --to merged --base Wan-AI/Wan2.1-T2V-14B-Diffusers   # full weights

The first argument is a LoRA file, a checkpoint folder, or a training folder (its newest checkpoint). Merged weights are
rounded to bfloat16 unless `--dtype float32` is given: on a small network rounding moves the output by more than a short
training does.

Of the two experts of A14B a file's metadata say which it is for. One of both is written as one file for diffusers, as
two for ComfyUI (..._high_noise, ..._low_noise) and as two folders of full weights (transformer, transformer_2). In
diffusers 0.42 `load_lora_weights` reads the keys that begin with `transformer.`, and no others, also where
load_into_transformer_2=True puts them into the low-noise network. That is how a low-noise expert's own file is loaded;
of a file of both it would load the wrong half:

    pipe.load_lora_weights("out/")
    pipe.transformer_2.load_lora_adapter("out/", prefix="transformer_2", use_safetensors=True)
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
from train.backbones.base import BOTH
from train.backbones.loading import fingerprint, load_transformer, resolve_folder
from train.backbones.wan22_a14b import Wan22T2V
from train.checkpoint import attach_trained, find_lora
from train.lora_switch import SwitchedLinear
from train.weight_files import by_expert, read_tensors, write_tensors

DIFFUSERS_FILE = "pytorch_lora_weights.safetensors"
ADAPTERS = "lora_adapter_metadata"  # diffusers' key
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
FOLDERS = {"transformer": "transformer", **Wan22T2V.expert_folders}  # of each expert, in a pipeline
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
    parts = by_expert(path, metadata)
    adapter = {
        "r": int(metadata["rank"]),
        "lora_alpha": float(metadata["alpha"]),
        "target_modules": json.loads(metadata["targets"]),
        "peft_type": "LORA",
    }
    tensors: dict[str, Tensor] = {}
    header: dict[str, str] = {}
    with files.atomic(target) as aside:
        for expert, layers in parts.items():
            pipeline = _Second if len(parts) == 2 and FOLDERS[expert] == "transformer_2" else WanPipeline
            pipeline.save_lora_weights(
                aside.parent,
                transformer_lora_layers=layers,
                transformer_lora_adapter_metadata=adapter,
                weight_name=aside.name,
            )
            with safe_open(aside, framework="pt") as file:
                header = _joined(header, file.metadata())
            tensors |= read_tensors(aside)
        write_tensors(tensors, aside, header | _origin(metadata))
    return target


class _Second(WanPipeline):
    """Names keys as those of the second network."""

    transformer_name = "transformer_2"


def _joined(one: dict[str, str], other: dict[str, str]) -> dict[str, str]:
    """Metadata of two files that diffusers wrote: the adapters' descriptions, JSON whose keys name the network, as
    one."""
    if not one:
        return other
    return other | {ADAPTERS: json.dumps(json.loads(one[ADAPTERS]) | json.loads(other[ADAPTERS]), indent=2)}


def to_comfyui(source: Path, target: Path) -> Path:
    """Write the LoRA with ComfyUI's names (`diffusion_model.`, Wan's own layer names, lora_down, lora_up, alpha) to
    file `target`, of both experts to the two files of `comfyui_files`. Returns the first.

    ValueError for a layer that has no name there.
    """
    path, metadata = find_lora(source)
    parts = by_expert(path, metadata)
    renamed = {expert: _comfyui(layers, float(metadata["alpha"])) for expert, layers in parts.items()}
    written = comfyui_files(target, metadata["expert"])
    for path, (expert, tensors) in zip(written, renamed.items(), strict=True):
        write_tensors(tensors, path, {"format": "pt"} | _origin(metadata | {"expert": expert}))
    return written[0]


def comfyui_files(target: Path, expert: str) -> list[Path]:
    """`target`, or of both experts a file for each, whose name ends with the expert's."""
    if expert != BOTH:
        return [target]
    return [target.with_stem(f"{target.stem}_{name}") for name in Wan22T2V.expert_folders]


def _comfyui(layers: dict[str, Tensor], alpha: float) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for name, weight in layers.items():
        layer, matrix = re.fullmatch(r"(.+)\.lora_([AB])\.weight", name).groups()
        in_block = re.fullmatch(r"(blocks\.\d+)\.(.+)", layer)
        if in_block is None or in_block[2] not in ORIGINAL_NAMES:
            raise ValueError(f"layer {layer} has no ComfyUI name: known are {', '.join(ORIGINAL_NAMES)} of each block")
        key = f"diffusion_model.{in_block[1]}.{ORIGINAL_NAMES[in_block[2]]}"
        tensors[f"{key}.lora_{'down' if matrix == 'A' else 'up'}.weight"] = weight.contiguous()
        tensors[f"{key}.alpha"] = torch.tensor(alpha)
    return tensors


def _origin(metadata: dict[str, str]) -> dict[str, str]:
    """What an exported LoRA says of itself beyond its format: the backbone and, of two experts, the one it is for."""
    return {key: metadata[key] for key in ("fingerprint", "expert")}


def to_merged(source: Path, target: Path, *, base: str, dtype: torch.dtype = torch.bfloat16) -> Path:
    """Write the transformer of pipeline `base` with W + (alpha / rank) B A merged in, as a diffusers model folder; of
    both experts two, by their names in the pipeline, below `target`.

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
    both = metadata["expert"] == BOTH
    names = Wan22T2V.expert_folders if both else {metadata["expert"]: FOLDERS[metadata["expert"]]}
    cpu = torch.device("cpu")
    networks = {expert: load_transformer(pipeline, name, cpu, dtype) for expert, name in names.items()}
    attach_trained(path, networks, fingerprint=found)
    with torch.no_grad():
        for layer in (layer for network in networks.values() for layer in network.modules()):
            if isinstance(layer, SwitchedLinear):
                layer.weight.copy_(layer.weight.float() + scale * (layer.lora_up @ layer.lora_down))
    for expert, network in networks.items():
        save_network(network, target / names[expert] if both else target)
    return target


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
        to_comfyui(arguments.source, arguments.target)
        written = " and ".join(map(str, comfyui_files(arguments.target, find_lora(arguments.source)[1]["expert"])))
    else:
        is_file = arguments.target.suffix == ".safetensors"
        written = to_diffusers(arguments.source, arguments.target if is_file else arguments.target / DIFFUSERS_FILE)
    expert = find_lora(arguments.source)[1]["expert"]
    experts = "both experts" if expert == BOTH else f"the {expert} expert"
    print(f"wrote {written}" + ("" if expert == "transformer" else f", for {experts}"))


if __name__ == "__main__":
    entry.run(main)
