"""Backbones by family. A new one is a file with a `Backbone` subclass and a line in BACKBONES."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan

from train.backbones import base_loras, loading
from train.backbones.base import Backbone, BackboneConfig
from train.backbones.host_weights import HostWeights
from train.backbones.random_parts import random_text, random_vae
from train.backbones.streaming import Ring
from train.backbones.tokenizer import build_tokenizer
from train.backbones.wan21 import Wan21
from train.backbones.wan22_a14b import Wan22I2V, Wan22T2V
from train.backbones.wan22_ti2v import Wan22TI2V
from train.parallel import Sharding

BACKBONES: dict[str, type[Backbone]] = {
    "wan21": Wan21,
    "wan22_ti2v": Wan22TI2V,
    "wan22_t2v": Wan22T2V,
    "wan22_i2v": Wan22I2V,
}
ARCHITECTURES = {family: backbone.architectures for family, backbone in BACKBONES.items()}

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
PARTS = ("text", "tokenizer", "vae", "transformer", "expert")


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
    ValueError for an unknown key, a path that is no Wan pipeline or lacks a component, a pipeline of another family
    than `config.family`, LoRAs that cannot be merged into it, and streaming with `sharding` or without the host memory
    for it.
    """
    _check("family", config.family, BACKBONES)
    _check("dtype", config.dtype, DTYPES)
    for part in parts:
        _check("parts", part, PARTS)
    family, dtype, device = BACKBONES[config.family], DTYPES[config.dtype], torch.device(device)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    expert = family.training_expert(config)
    wanted = list(family.expert_folders) if "transformer" in parts else [expert] if "expert" in parts else []

    ring = _ring(device, len(wanted), sharding, together) if config.stream and wanted else None
    loaded: dict[str, Any] = {}
    host = host and not config.stream
    place = torch.device("cpu") if host else device
    if config.random_weights:
        if config.path:
            warnings.warn(f"backbone.random_weights=true: backbone.path={config.path} is not read", stacklevel=2)
        if config.loras and wanted:
            raise ValueError("backbone.loras needs backbone.path: random weights have no LoRAs")
        architecture, boundary = find_architecture(config), family.default_boundary
        encoders = f"{config.family}-random-{config.architecture}"
        fingerprints = (encoders,)
        if "text" in parts or "tokenizer" in parts:
            loaded["tokenizer"] = build_tokenizer()
        if "text" in parts:
            width, words = architecture["transformer"]["text_dim"], len(loaded["tokenizer"])
            loaded["text_encoder"] = random_text(width, words, device, dtype)
        if "vae" in parts:
            loaded["vae"] = random_vae(architecture, device)
        experts = {
            name: loading.random_transformer(
                architecture, device=place, dtype=dtype, seed=seed, sharding=sharding, ring=ring
            )
            for seed, name in enumerate(family.expert_folders)
            if name in wanted
        }
    else:
        folder, model_index, architecture = _open(config)
        fingerprint, boundary = loading.fingerprint(config.family, folder), model_index.get("boundary_ratio")
        encoders = loading.fingerprint(config.family, folder, loading.ENCODERS)
        fingerprints, loras = base_loras.read(config.loras, family.expert_folders, fingerprint, architecture)
        if "text" in parts or "tokenizer" in parts:
            loaded["tokenizer"] = loading.load_tokenizer(folder)
        if "text" in parts:
            text_dim = architecture["transformer"]["text_dim"]
            loaded["text_encoder"] = loading.load_text(folder, device, dtype, text_dim)
        experts = {
            name: loading.load_transformer(
                folder, family.expert_folders[name], place, dtype, sharding, ring, loras.get(name, ())
            )
            for name in wanted
        }
        if "vae" in parts:
            loaded["vae"] = loading.load_component(AutoencoderKLWan, folder, "vae", device, torch_dtype=torch.float32)
    for network in experts.values():
        loading.choose_attention(network, config.attention, device)
    if host:
        loaded["host"] = HostWeights(experts, device)
    return family(config, architecture, device, fingerprints, encoders, experts, boundary, **loaded)


def _open(config: BackboneConfig) -> tuple[Path, dict[str, Any], dict[str, Any]]:
    """Folder, model_index.json and architecture of the pipeline. ValueError where it is of another family."""
    folder = loading.resolve_folder(config.path, config.revision)
    model_index, architecture = loading.read_pipeline(folder)
    if problem := BACKBONES[config.family].mismatch(model_index, architecture):
        fitting = [name for name, other in BACKBONES.items() if not other.mismatch(model_index, architecture)]
        remedy = f"set backbone.family={fitting[0]}" if fitting else "give a pipeline of that family"
        raise ValueError(
            f"backbone.family={config.family} does not fit backbone.path={config.path}: {problem}; {remedy}"
        )
    return folder, model_index, architecture


def _ring(device: torch.device, count: int, sharding: Sharding | None, together: bool) -> Ring:
    """For `count` networks. ValueError with `sharding`."""
    if sharding is not None:
        raise ValueError(
            "backbone.stream=true keeps the frozen network in host memory, and ZeRO-3 shards it over the GPUs: launch"
            " with launch/ddp.yaml, or set it to false"
        )
    return Ring(device, count=count, together=together)


def _check(key: str, value: str, known: Iterable[str]) -> None:
    if value not in known:
        raise ValueError(f"backbone.{key}={value!r} is unknown: use one of {', '.join(known)}")
