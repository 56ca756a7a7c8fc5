"""`backbone.loras`: LoRAs that become part of a base, checked before any weights are read, and its fingerprint then."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import Any

from train import files
from train.backbones import lora_formats
from train.backbones.architecture import parameter_shapes
from train.backbones.base import BaseLora
from train.backbones.lora_formats import NetworkLora


def read(
    loras: Sequence[BaseLora], experts: Collection[str], folder: str, architecture: dict[str, Any]
) -> tuple[tuple[str, ...], dict[str, list[tuple[NetworkLora, float]]]]:
    """Fingerprints as in `Backbone.fingerprints`, `folder` first, and by network its LoRAs with their weights.

    A fingerprint is <folder>+<12 hex>: of the LoRAs' contents, weights and networks, in order. Raises ValueError,
    naming the entry, for a LoRA that is none, stands there twice for one network, fits no network of `experts`, or was
    trained on another base than the folder, with those LoRAs merged that come before it or some first ones of them;
    the last is not checked where the folder is not known, "".
    """
    fingerprints, made, found = [folder], [], {}
    shapes = parameter_shapes(architecture) if loras else {}
    for entry in loras:
        source = f"backbone.loras={entry.path}"
        if not entry.path:
            raise ValueError(
                "backbone.loras has an entry without a path: give each a LoRA, as in '[{path: lora.safetensors}]'"
            )
        if not math.isfinite(entry.weight):
            raise ValueError(f"{source}: weight={entry.weight} is no finite number")
        try:
            lora = lora_formats.read(entry.path)
        except ValueError as error:
            raise ValueError(f"{source}: {error}") from error
        if folder and lora.fingerprint and lora.fingerprint not in fingerprints:
            raise ValueError(
                f"{source} was trained on backbone {lora.fingerprint}, but it would be merged into {fingerprints[-1]}:"
                " use the backbone it was trained on; after a + a fingerprint counts the LoRAs of backbone.loras"
            )
        remedy = f"name it in its entry, as in '{{path: {entry.path}, expert: {next(iter(experts))}}}'"
        by_expert = lora.by_expert(list(experts), expert=entry.expert, source=source, remedy=remedy)
        twice = any(lora.sha256 == sha and set(names) & set(by_expert) for sha, _, names in made)
        if twice or any(one.same_as(other) for name, one in by_expert.items() for other, _ in found.get(name, ())):
            raise ValueError(f"{source} stands there twice: give it once, with the sum of its weights")
        for name, network in by_expert.items():
            network.check(shapes, source=source)
            found.setdefault(name, []).append((network, float(entry.weight)))
        made.append([lora.sha256, float(entry.weight), sorted(by_expert)])
        fingerprints.append(f"{folder}+{files.digest(made)[:12]}")
    return tuple(fingerprints), found
