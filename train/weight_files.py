"""Files of trained weights: a LoRA or a whole network in safetensors, with metadata that say what it is.

A LoRA's metadata hold format, rank, alpha and targets (`LoraSwitch.describe`), those of full weights the format alone;
both hold the backbone's fingerprint and the expert. Equal contents are equal bytes.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from pydantic import FiniteFloat, Json, PositiveInt, TypeAdapter, ValidationError
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from typing_extensions import TypedDict  # pydantic reads typing's from Python 3.12 on

from train import files
from train.experts import BOTH, EXPERT_FOLDERS
from train.full_parameters import FullParameters
from train.lora_switch import LoraConfig, LoraSwitch

# What such a file holds, and what a run trains: the LoRA switch, or all weights beside a copy that is the reference.
Trainable = LoraSwitch | FullParameters


class Adapters(TypedDict):
    """What the metadata of a LoRA say of its shape, once their text is read."""

    rank: PositiveInt
    alpha: FiniteFloat
    targets: Json[list[str]]


def write_tensors(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file atomically, equal bytes for equal contents: the library orders metadata at random."""
    with files.atomic(path) as aside:
        save_file(tensors, aside, metadata=metadata)
        if not metadata:
            return
        with aside.open("r+b") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
            header["__metadata__"] = dict(sorted(metadata.items()))
            ordered = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
            assert len(ordered) <= length, "another order is not longer"
            file.seek(8)
            file.write(ordered.ljust(length))


def read_header(path: Path) -> tuple[dict[str, str], dict[str, tuple[int, ...]]]:
    """Metadata and the tensors' shapes of a safetensors file, no tensor of which is read."""
    try:
        with safe_open(path, framework="pt") as file:
            return file.metadata() or {}, {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
    except Exception as error:  # safetensors raises its own type
        raise ValueError(f"LoRA {path} cannot be read ({error}): the file is damaged or not safetensors") from error


def read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except Exception as error:  # safetensors raises its own type
        raise ValueError(f"{path} cannot be read ({error}): the file is damaged or not safetensors") from error


def read_ours(path: Path, formats: Sequence[str] = (LoraSwitch.format, FullParameters.format)) -> dict[str, str]:
    metadata, shapes = read_header(path)
    if metadata.get("format") not in formats:
        raise ValueError(
            f"LoRA {path} carries no physalign metadata: give a checkpoint folder or its {LoraSwitch.file}"
        )
    if missing := {"fingerprint", "expert"} - metadata.keys():
        raise ValueError(f"LoRA {path} is damaged: its metadata lack {', '.join(sorted(missing))}")
    if metadata["format"] == LoraSwitch.format:
        try:
            rank = lora_config(metadata).rank
        except ValueError as error:
            raise ValueError(f"LoRA {path} is damaged: {error}") from None
        _check_pairs(path, rank, shapes)
        networks = {name.partition(".")[0] for name in shapes}
        if metadata["expert"] == BOTH and networks != set(EXPERT_FOLDERS.values()):
            raise ValueError(f"LoRA {path} is damaged: its metadata say both experts, but its tensors are not of both")
    return metadata


def by_expert(path: Path, metadata: Mapping[str, str]) -> dict[str, dict[str, Tensor]]:
    """A LoRA file's tensors by the expert that they are for, named as within its network."""
    tensors = read_tensors(path)
    if metadata["expert"] != BOTH:
        return {metadata["expert"]: tensors}
    return {
        expert: {key.removeprefix(f"{folder}."): tensors[key] for key in tensors if key.startswith(f"{folder}.")}
        for expert, folder in EXPERT_FOLDERS.items()
    }


def _check_pairs(path: Path, rank: int, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """ValueError unless `shapes` are pairs of A (rank, in) and B (out, rank)."""
    layers = {name.rpartition(".lora_")[0] for name in shapes}
    pairs = {f"{layer}.lora_{matrix}.weight" for layer in layers for matrix in "AB"}
    if not shapes or shapes.keys() != pairs:
        raise ValueError(f"LoRA {path} is damaged: it holds other tensors than pairs of lora_A and lora_B")
    for name, shape in shapes.items():
        if len(shape) != 2 or shape[name.endswith(".lora_B.weight")] != rank:
            raise ValueError(f"LoRA {path} is damaged: its metadata say rank {rank}, but {name} has shape {shape}")


def lora_config(metadata: Mapping[str, str]) -> LoraConfig:
    """The shape of the adapters that a LoRA file's metadata describe; ValueError for what describes none."""
    try:
        return LoraConfig(**TypeAdapter(Adapters).validate_python(metadata))
    except ValidationError as error:
        problem = error.errors(include_url=False, include_input=False)[0]
        raise ValueError(f"its {'.'.join(map(str, problem['loc']))}: {problem['msg']}") from None
