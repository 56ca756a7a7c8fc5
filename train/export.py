"""From a checkpoint to files that other programs load.

    python -m train.export runs/wan14b/train out/                               # for pipe.load_lora_weights("out/")
    python -m train.export runs/wan14b/train out/lora.safetensors --to comfyui  # ComfyUI's key names
    python -m train.export runs/wan14b/train out/ --to merged --base Wan-AI/Wan2.1-T2V-14B-Diffusers   # full weights
    python -m train.export high.safetensors out/ --low-noise low.safetensors    # two LoRAs, one for each expert of A14B

The first argument is a checkpoint folder, a training folder (its newest checkpoint), or a LoRA file of any tool
(train.backbones.lora_formats). Merged weights are rounded to bfloat16 unless `--dtype float32` is given: on a small
network rounding moves the output by more than a short training does.

Of the two experts of A14B a file's metadata say which it is for; where another tool's does not, `--expert` does. One of
both is written as one file for diffusers, as two for ComfyUI (..._high_noise, ..._low_noise) and as two folders of full
weights (transformer, transformer_2). In diffusers 0.42 `load_lora_weights` reads the keys that begin with
`transformer.`, and no others, also where load_into_transformer_2=True puts them into the low-noise network. That is how
a low-noise expert's own file is loaded; of a file of both it would load the wrong half:

    pipe.load_lora_weights("out/")
    pipe.transformer_2.load_lora_adapter("out/", prefix="transformer_2", use_safetensors=True)
"""

import argparse
import json
import math
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from diffusers.loaders.lora_base import LoraBaseMixin
from safetensors import safe_open
from torch import Tensor, nn

from train import entry, files
from train.backbones import BACKBONES, read_pipeline
from train.backbones.architecture import NetworkKind, parameter_shapes
from train.backbones.loading import fingerprint, load_transformer, resolve_folder
from train.backbones.lora_formats import FOLDER_FILES, is_ours, read
from train.checkpoint import find_lora, weights_path
from train.experts import BOTH, EXPERT_FOLDERS
from train.lora_switch import LoraSwitch
from train.weight_files import by_expert, read_ours, read_tensors, write_tensors

DIFFUSERS_FILE = "pytorch_lora_weights.safetensors"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
FOLDERS = {"transformer": "transformer", **EXPERT_FOLDERS}  # of each expert, in a pipeline


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
    # The low-noise expert's own file is for `load_lora_weights` too, which knows the first network's prefix alone.
    prefixes = {FOLDERS[expert] if len(parts) == 2 else "transformer": layers for expert, layers in parts.items()}
    with files.atomic(target) as aside:
        LoraBaseMixin._save_lora_weights(
            aside.parent, prefixes, dict.fromkeys(prefixes, adapter), weight_name=aside.name
        )
        with safe_open(aside, framework="pt") as file:
            header = file.metadata()
        write_tensors(read_tensors(aside), aside, header | _origin(metadata))
    return target


def to_comfyui(source: Path, target: Path) -> Path:
    """Write the LoRA with ComfyUI's names (`diffusion_model.`, Wan's own layer names, lora_down, lora_up, alpha) to
    file `target`, of both experts to the two files of `comfyui_files`. Returns the first.

    ValueError for a layer that has no name there.
    """
    path, metadata = find_lora(source)
    parts = by_expert(path, metadata)
    kind, alpha = _kind(metadata), float(metadata["alpha"])
    renamed = {expert: _comfyui(kind, layers, alpha) for expert, layers in parts.items()}
    written = comfyui_files(target, metadata["expert"])
    for path, (expert, tensors) in zip(written, renamed.items(), strict=True):
        write_tensors(tensors, path, {"format": "pt"} | _origin(metadata | {"expert": expert}))
    return written[0]


def comfyui_files(target: Path, expert: str) -> list[Path]:
    """`target`, or of both experts a file for each, whose name ends with the expert's."""
    if expert != BOTH:
        return [target]
    return [target.with_stem(f"{target.stem}_{name}") for name in EXPERT_FOLDERS]


def _kind(metadata: dict[str, str]) -> NetworkKind:
    """Of the backbone that a LoRA was trained on; of other tools' files, which do not say, the first family's."""
    family = metadata["fingerprint"].partition("-")[0]
    return BACKBONES.get(family, next(iter(BACKBONES.values()))).kind


def _comfyui(kind: NetworkKind, layers: dict[str, Tensor], alpha: float) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for name, weight in layers.items():
        layer, matrix = re.fullmatch(r"(.+)\.lora_([AB])\.weight", name).groups()
        names = kind.original_names
        in_block = re.fullmatch(rf"({kind.blocks}\.\d+)\.(.+)", layer)
        if in_block is None or in_block[2] not in names:
            known = (
                f"known are {', '.join(names)} of each block" if names else f"none of {kind.model.__name__} is known"
            )
            raise ValueError(f"layer {layer} has no ComfyUI name: {known}")
        key = f"diffusion_model.{in_block[1]}.{names[in_block[2]]}"
        tensors[f"{key}.lora_{'down' if matrix == 'A' else 'up'}.weight"] = weight.contiguous()
        tensors[f"{key}.alpha"] = torch.tensor(alpha)
    return tensors


def _origin(metadata: dict[str, str]) -> dict[str, str]:
    """What an exported LoRA says of itself beyond its format: the backbone and, of two experts, the one it is for."""
    return {key: metadata[key] for key in ("fingerprint", "expert")}


@torch.no_grad()
def to_merged(source: Path, target: Path, *, base: str, dtype: torch.dtype = torch.bfloat16) -> Path:
    """Write the transformer of pipeline `base` with W + (alpha / rank) B A merged in, as a diffusers model folder; of
    both experts two, by their names in the pipeline, below `target`.

    The sum is made in float32 and then rounded to `dtype`. ValueError when `base` is not the backbone that the LoRA was
    trained on, and before weights are read where it does not fit.
    """
    path, metadata = find_lora(source)
    pipeline, trained_on = resolve_folder(base), metadata["fingerprint"]
    found = fingerprint(trained_on.partition("-")[0], pipeline)
    if trained_on and trained_on != found:  # other tools' files do not say
        raise ValueError(
            f"LoRA {path} was trained on backbone {trained_on}, {base} is {found}."
            " Merge into the pipeline that it was trained on (after a + a fingerprint counts backbone.loras)."
        )
    both = metadata["expert"] == BOTH
    names = EXPERT_FOLDERS if both else {metadata["expert"]: FOLDERS[metadata["expert"]]}
    two = (pipeline / EXPERT_FOLDERS["low_noise"]).is_dir()
    if two and "transformer" in names:
        experts = " or ".join(f"--expert {name}" for name in EXPERT_FOLDERS)
        raise ValueError(f"LoRA {path} does not say which network of {base} it is for: say {experts}")
    if not two and "transformer" not in names:
        raise ValueError(f"LoRA {path} is for {metadata['expert']}, {base} has one network: use the model it is for")
    loras = read(path).by_expert(list(names), source=f"LoRA {path}")
    architecture = read_pipeline(pipeline)[1]
    kind, shapes = architecture["kind"], parameter_shapes(architecture)
    for lora in loras.values():
        lora.check(shapes, source=f"LoRA {path}")
    cpu = torch.device("cpu")
    networks = {expert: load_transformer(kind, pipeline, name, cpu, dtype) for expert, name in names.items()}
    for expert, network in networks.items():
        for name, weight in network.named_parameters():
            weight.copy_(loras[expert].add(name, weight))
    for expert, network in networks.items():
        save_network(network, target / names[expert] if both else target)
    return target


@contextmanager
def in_our_format(source: Path, expert: str = "", low_noise: Path | None = None) -> Iterator[Path]:
    """`source` itself where our training wrote it, else the LoRA of another tool, or an export of ours, as a file of
    ours that is gone afterwards: of the largest rank, other layers' filled up with zeros, and with alpha = rank.

    `expert`: the network that it is for where it does not say. `low_noise`: a LoRA that goes with it into one of both
    experts; `source` is the high-noise one's. ValueError for LoRAs with full differences, and of two backbones.
    """
    if low_noise is None and not any((source / name).is_file() for name in FOLDER_FILES):
        path = weights_path(source)
        if is_ours(path):
            if expert and expert != (says := read_ours(path)["expert"]):
                raise ValueError(f"--expert={expert}: LoRA {path} says that it is for {says}; leave it out")
            yield source
            return
    found = read(source)
    if low_noise is None:
        given = [expert or found.expert or "transformer"] if len(found.networks) == 1 else list(EXPERT_FOLDERS)
        parts = found.by_expert(given, expert=expert, source=f"LoRA {found.path}")
    else:
        given, parts = list(EXPERT_FOLDERS), {}
        for name, file in zip(given, (found, read(low_noise)), strict=True):
            parts |= file.by_expert([name], expert=name, source=f"LoRA {file.path}")
            if file.fingerprint != found.fingerprint:
                raise ValueError(
                    f"LoRA {found.path} was trained on backbone {found.fingerprint or '(unknown)'}, {file.path} on"
                    f" {file.fingerprint or '(unknown)'}: export each alone"
                )
    ranks = [lora.rank(layer) for lora in parts.values() for layer in lora.pairs]
    tensors = {}
    for name, lora in parts.items():
        convolution = any(math.prod(lora.shapes[pair.down][2:]) > 1 for pair in lora.pairs.values())
        if what := "full differences" if lora.differences else "a convolution's adapter" if convolution else "":
            raise ValueError(f"LoRA {lora.path} holds {what}, which no export has: use it as backbone.loras")
        prefix = f"{FOLDERS[name]}." if len(parts) > 1 else ""
        for layer in lora.pairs:
            down, up = lora.matrices(layer)
            more = max(ranks) - len(down)
            tensors[f"{prefix}{layer}.lora_A.weight"] = nn.functional.pad(down, (0, 0, 0, more))
            tensors[f"{prefix}{layer}.lora_B.weight"] = nn.functional.pad(up, (0, more))
    targets = sorted({layer for lora in parts.values() for layer in lora.pairs})
    metadata = {"format": LoraSwitch.format, "rank": str(max(ranks)), "alpha": str(float(max(ranks)))}
    metadata |= {"targets": json.dumps(targets), "fingerprint": found.fingerprint}
    metadata |= {"expert": given[0] if len(given) == 1 else BOTH}
    with TemporaryDirectory() as folder:
        file = Path(folder) / LoraSwitch.file
        write_tensors(tensors, file, metadata)
        try:
            yield file
        except ValueError as error:  # which names the file that is gone
            raise ValueError(str(error).replace(str(file), str(found.path))) from error


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
    parser.add_argument("source", type=Path, help="checkpoint folder, training folder, or LoRA file of any tool")
    parser.add_argument("target", type=Path, help="file (diffusers, comfyui) or folder (diffusers, merged) to write")
    forms = ("diffusers", "comfyui", "merged")
    parser.add_argument("--to", choices=forms, default="diffusers", help="who loads it (default: diffusers)")
    parser.add_argument("--base", help="pipeline to merge into: hub id or folder")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="of merged weights (default: bfloat16)")
    parser.add_argument(
        "--expert", choices=EXPERT_FOLDERS, default="", help="of A14B, where another tool's LoRA is for one"
    )
    parser.add_argument("--low-noise", type=Path, help="the low-noise expert's LoRA; source is the high-noise one's")
    arguments = parser.parse_args(argv)
    if arguments.to == "merged" and not arguments.base:
        parser.error("--to merged needs --base, the pipeline that the LoRA was trained on")
    if arguments.expert and arguments.low_noise:
        parser.error("--expert is for one LoRA, --low-noise for a pair")
    with in_our_format(arguments.source, arguments.expert, arguments.low_noise) as source:
        expert = find_lora(source)[1]["expert"]
        if arguments.to == "merged":
            dtype = DTYPES[arguments.dtype]
            written = to_merged(source, arguments.target, base=arguments.base, dtype=dtype)
        elif arguments.to == "comfyui":
            to_comfyui(source, arguments.target)
            written = " and ".join(map(str, comfyui_files(arguments.target, expert)))
        else:
            is_file = arguments.target.suffix == ".safetensors"
            written = to_diffusers(source, arguments.target if is_file else arguments.target / DIFFUSERS_FILE)
    experts = "both experts" if expert == BOTH else f"the {expert} expert"
    print(f"wrote {written}" + ("" if expert == "transformer" else f", for {experts}"))


if __name__ == "__main__":
    entry.run(main)
