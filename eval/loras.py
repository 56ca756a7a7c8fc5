"""Trained weights of a clip's model: what the recipe names, checked before any weights are loaded, and put on."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from train.attached_loras import AttachedLoras
from train.backbones import lora_formats
from train.backbones.architecture import parameter_shapes
from train.backbones.base import Backbone
from train.backbones.lora_formats import FOLDER_FILES, NetworkLora
from train.checkpoint import Trainable, attach_trained, lora_config, read_ours, weights_path
from train.files import sha256


@dataclass(frozen=True)
class Lora:
    """Trained weights: a LoRA of any tool, one for each of two experts or, of ours, all weights of a network."""

    path: str  # of the file, of several joined with commas
    sha256: Any  # of the file; of a pair {expert: sha256}
    expert: str  # the network that it is for, of several joined with commas
    shape: dict[str, Any] | str  # for people: rank, alpha and targets of ours, else in words
    trained: str = ""  # fingerprint that ours was trained on; empty: `files` are read instead
    files: Mapping[str, NetworkLora] | None = None  # by network

    def describe(self) -> str:
        """Its shape in a line."""
        return self.shape if isinstance(self.shape, str) else "rank {rank}, alpha {alpha:g}".format(**self.shape)


def read_lora(value: Any, shell: Backbone, *, key: str, check: bool = True) -> Lora | None:
    """What trained weights say of themselves, None for an empty value; `key` is the recipe's, for messages.

    value: a file or folder, or {expert: file or folder} for LoRAs of two experts. `shell`: the backbone, which needs no
    weights; where not `check`, only its family counts. ValueError where there are none at a path, they belong to
    another backbone, or do not fit its networks.
    """
    if not value:
        return None
    if isinstance(value, Mapping):
        for name, path in value.items():
            if not (path and isinstance(path, str | Path)):
                raise ValueError(f"{key}.{name}={path!r}: give the path of a LoRA, or leave it out")
        found = {name: _foreign(path, shell, f"{key}={path}", check, str(name)) for name, path in value.items()}
        path, expert, shape = (
            ", ".join(dict.fromkeys(texts))
            for texts in zip(*((one.path, one.expert, one.describe()) for one in found.values()), strict=True)
        )
        files = {name: lora for one in found.values() for name, lora in one.files.items()}
        return Lora(path, {name: one.sha256 for name, one in found.items()}, expert, shape, files=files)
    if not isinstance(value, str | Path):
        raise ValueError(f"{key}={value!r}: give a path, or for two experts {{high_noise: path, low_noise: path}}")
    source = f"{key}={value}"
    ours = _ours(value, source)
    if ours is None:
        return _foreign(value, shell, source, check, "")
    file = weights_path(value)
    if check:
        _check_trained_on(ours["fingerprint"], shell, source)
    shape = "all weights"
    if "rank" in ours:
        shape = {name: value for name, value in asdict(lora_config(ours)).items() if name != "start"}
    return Lora(str(file), sha256(file), ours["expert"], shape, trained=ours["fingerprint"])


def attach(lora: Lora, backbone: Backbone) -> Trainable | AttachedLoras:
    """Put weights on the networks that they are for; inside the result's `reference()` these are the base's. ValueError
    as `read_lora`, and for a network that is not there."""
    if lora.trained:
        return attach_trained(lora.path, backbone.experts, fingerprint=lora.trained)
    return AttachedLoras(backbone.experts, lora.files, source=f"LoRA {lora.path}")


def _ours(value: str | Path, source: str) -> dict[str, str] | None:
    """The metadata of what our training wrote; None for other files. ValueError where there is nothing."""
    if any((Path(value) / name).is_file() for name in FOLDER_FILES):
        return None
    try:
        file = weights_path(value)
        return read_ours(file) if lora_formats.is_ours(file) else None
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None


def _foreign(value: str | Path, shell: Backbone, source: str, check: bool, expert: str) -> Lora:
    try:
        file = lora_formats.read(value)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None
    found = file.by_expert(list(shell.expert_folders), expert=expert, source=source)
    if check:
        if file.fingerprint:
            _check_trained_on(file.fingerprint, shell, source)
        shapes = parameter_shapes(shell.architecture)
        for lora in found.values():
            lora.check(shapes, source=source)
    shapes = ", ".join(dict.fromkeys(lora.describe() for lora in found.values()))
    return Lora(str(file.path), file.sha256, ", ".join(found), shapes, files=found)


def _check_trained_on(fingerprint: str, shell: Backbone, source: str) -> None:
    """A LoRA also suits its backbone with more LoRAs merged behind those that it was trained with."""
    if fingerprint not in shell.fingerprints:
        raise ValueError(
            f"{source} was trained on backbone {fingerprint}, but backbone.path is {shell.fingerprint}: use the"
            " backbone it was trained on; after a + a fingerprint counts backbone.loras"
        )
