"""Backbones by family. A new one is a file with a `Backbone` subclass and a line in BACKBONES."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from train.backbones import base_loras, loading
from train.backbones.architecture import NetworkKind
from train.backbones.base import Backbone, BackboneConfig
from train.backbones.cosmos25 import Cosmos25
from train.backbones.host_weights import HostWeights
from train.backbones.hunyuan15 import Hunyuan15
from train.backbones.hunyuan15_i2v import Hunyuan15I2V
from train.backbones.random_parts import fill
from train.backbones.streaming import Ring
from train.backbones.wan21 import Wan21
from train.backbones.wan22_a14b import Wan22I2V, Wan22T2V
from train.backbones.wan22_ti2v import Wan22TI2V
from train.parallel import Sharding

BACKBONES: dict[str, type[Backbone]] = {
    "wan21": Wan21,
    "wan22_ti2v": Wan22TI2V,
    "wan22_t2v": Wan22T2V,
    "wan22_i2v": Wan22I2V,
    "hunyuan15": Hunyuan15,
    "hunyuan15_i2v": Hunyuan15I2V,
    "cosmos25": Cosmos25,
}
ARCHITECTURES = {family: backbone.architectures for family, backbone in BACKBONES.items()}

FLOAT8 = "float8"
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, FLOAT8: torch.bfloat16}
PARTS = ("text", "tokenizer", "vae", "transformer", "expert")


def kind_of(network: nn.Module) -> NetworkKind:
    """What is known of the network of some family."""
    kinds = {backbone.kind.model: backbone.kind for backbone in BACKBONES.values()}
    return next(kinds[base] for base in type(network).__mro__ if base in kinds)


def text_tokens(config: BackboneConfig) -> int:
    """Of all texts that the network reads of a prompt, with their padding, and of an image encoder."""
    family = BACKBONES[config.family]
    return sum(family.text_lengths(config.text_length).values()) + family.image_tokens


def find_architecture(config: BackboneConfig) -> dict[str, Any]:
    """The entry of ARCHITECTURES that `config` names, for shapes and sizes without weights; ValueError if unknown."""
    _check("family", config.family, ARCHITECTURES)
    _check("architecture", config.architecture, ARCHITECTURES[config.family])
    return ARCHITECTURES[config.family][config.architecture]


def load_backbone(
    config: BackboneConfig,
    device: torch.device | str,
    *,
    parts: Sequence[str] = ("text", "vae", "transformer"),
    sharding: Sharding | None = None,
    together: bool = False,
    host: bool = False,
) -> Backbone:
    """A backbone with the named parts on the device, in eval mode and frozen.

    Parts: "text" (encoder and tokenizer), "tokenizer" (alone), "vae", "transformer" (all experts), "expert" (only
    `config.expert` of a two-expert family, the first of both). With `sharding` (`train.parallel`) the transformers are
    spread over the ranks while they are made, so that no device ever holds one whole; with `host` they lie in host
    memory, and the one that is asked for is on the device, unless `config.stream` has them there block by block. With
    `together` all processes of the launch call at once, and those of a host keep one copy of what is streamed. Raises
    ValueError for an unknown key, a path that is no pipeline of a family or lacks a component, a pipeline of another
    family than `config.family`, LoRAs that cannot be merged into it, and streaming with `sharding` or without the host
    memory for it.
    """
    _check("family", config.family, BACKBONES)
    _check("dtype", config.dtype, DTYPES)
    for part in parts:
        _check("parts", part, PARTS)
    family, dtype, device = BACKBONES[config.family], DTYPES[config.dtype], torch.device(device)
    float8 = config.dtype == FLOAT8
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    expert = family.training_expert(config)
    wanted = list(family.expert_folders) if "transformer" in parts else [expert] if "expert" in parts else []

    if config.stream and wanted and sharding is not None:
        raise ValueError(
            "backbone.stream=true keeps the frozen network in host memory, and ZeRO-3 shards it over the GPUs: launch"
            " with launch/ddp.yaml, or set it to false"
        )
    ring = Ring(device, count=len(wanted), together=together) if config.stream and wanted else None
    host = host and not config.stream
    if config.random_weights:
        if config.path:
            warnings.warn(f"backbone.random_weights=true: backbone.path={config.path} is not read", stacklevel=2)
        if config.loras and wanted:
            raise ValueError("backbone.loras needs backbone.path: random weights have no LoRAs")
        architecture, boundary = find_architecture(config), family.default_boundary
        encoders = f"{config.family}-random-{config.architecture}"
        fingerprints = (encoders,)
        folder = None

        def make(name: str) -> nn.Module:
            options = {"device": device, "dtype": dtype, "sharding": sharding, "ring": ring, "float8": float8}
            seed = list(family.expert_folders).index(name)
            return loading.random_transformer(architecture, seed=seed, **options)

    else:
        folder, model_index, architecture = _open(config)
        fingerprint, boundary = loading.fingerprint(config.family, folder), model_index.get("boundary_ratio")
        encoders = loading.fingerprint(config.family, folder, loading.ENCODERS)
        fingerprints, loras = base_loras.read(config.loras, family.expert_folders, fingerprint, architecture)

        def make(name: str) -> nn.Module:
            place, added = family.expert_folders[name], loras.get(name, ())
            return loading.load_transformer(
                family.kind, folder, place, device, dtype, sharding, ring, added, float8=float8
            )

    loaded = _encoders(family, folder, architecture, parts, device, dtype)
    made = ((name, make(name)) for name in wanted)
    if host:  # a network leaves the device before the next is made there
        loaded["host"] = HostWeights(made, device, count=len(wanted))
    experts = loaded["host"].networks if host else dict(made)
    for network in experts.values():
        loading.choose_attention(family.kind, network, config.attention, device)
    return family(config, architecture, device, fingerprints, encoders, experts, boundary, **loaded)


def _encoders(
    family: type[Backbone],
    folder: Path | None,
    architecture: dict[str, Any],
    parts: Sequence[str],
    device: torch.device,
    dtype: torch.dtype,
) -> dict[str, Any]:
    """Text encoders, tokenizers and VAE by the backbone's fields, as far as `parts` name them: of a pipeline's folder,
    or with seeded random weights where there is none."""
    loaded: dict[str, Any] = {}
    if "text" in parts or "tokenizer" in parts:
        for name, make_small in family.tokenizers.items():
            loaded[name] = loading.load_tokenizer(folder, name) if folder else make_small()
    if "text" in parts and folder:
        family.check_text(folder, architecture)
        for name, model in family.encoder_classes.items():
            loaded[name] = loading.load_component(model, folder, name, device, dtype=dtype)
        for name, processor in family.processor_classes.items():
            loaded[name] = loading.load_processor(processor, folder, name)
    elif "text" in parts:
        with torch.device("meta"):
            loaded |= family.random_encoders(architecture, len(loaded["tokenizer"]))
        for name in family.encoder_classes:
            fill(loaded[name], device, dtype)
        family.fill_buffers(loaded, device)
    if "vae" in parts and folder:
        loaded["vae"] = loading.load_component(family.vae_class, folder, "vae", device, torch_dtype=torch.float32)
    elif "vae" in parts:
        with torch.device("meta"):
            loaded["vae"] = family.vae_class(**family.vae_config(architecture))
        fill(loaded["vae"], device, torch.float32)
    return loaded


def read_pipeline(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """(model_index.json, architecture as in the families' tables) of a pipeline folder; reads no weights.

    Two experts are of one architecture, so the first one's config is read. Raises ValueError when the pipeline is of no
    family or lacks a component.
    """
    model_index = loading.read_json(folder / "model_index.json")
    readers = {name: backbone for backbone in BACKBONES.values() for name in backbone.pipelines}
    if (name := model_index.get("_class_name")) not in readers:
        raise ValueError(f"backbone.path={folder} holds a {name}: give a {' or a '.join(readers)}")
    family = readers[name]
    transformer, vae = loading.read_config(folder, "transformer"), loading.read_config(folder, "vae")
    facts = {fact: vae.get(key, default) for fact, (key, default) in family.vae_facts.items()}
    return model_index, {"kind": family.kind, "transformer": family.whole_config(transformer), **facts}


def _open(config: BackboneConfig) -> tuple[Path, dict[str, Any], dict[str, Any]]:
    """Folder, model_index.json and architecture of the pipeline. ValueError where it is of another family."""
    folder = loading.resolve_folder(config.path, config.revision)
    model_index, architecture = read_pipeline(folder)
    if problem := BACKBONES[config.family].mismatch(model_index, architecture):
        fitting = [name for name, other in BACKBONES.items() if not other.mismatch(model_index, architecture)]
        remedy = f"set backbone.family={fitting[0]}" if fitting else "give a pipeline of that family"
        raise ValueError(
            f"backbone.family={config.family} does not fit backbone.path={config.path}: {problem}; {remedy}"
        )
    return folder, model_index, architecture


def _check(key: str, value: str, known: Iterable[str]) -> None:
    if value not in known:
        raise ValueError(f"backbone.{key}={value!r} is unknown: use one of {', '.join(known)}")
