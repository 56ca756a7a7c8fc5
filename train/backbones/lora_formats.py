"""LoRA files of any tool, read into one form: for each network the adapters of its layers, and full differences.

    tool                             a key of its files
    this project                     blocks.0.attn1.to_q.lora_A.weight (of both experts: transformer. or transformer_2.
                                     before it); rank and alpha in the metadata
    diffusers                        transformer.blocks.0.attn1.to_q.lora_A.weight; alpha in lora_adapter_metadata
    peft                             base_model.model.blocks.0.attn1.to_q.lora_A.weight; alpha in adapter_config.json
    ComfyUI, our export for it       diffusion_model.blocks.0.self_attn.q.lora_down.weight, .alpha
    LightX2V                         likewise, and .diff, .diff_b, .diff_m: full differences of a weight, of a bias and
                                     of a modulation table, blocks.0.diff_m
    DiffSynth-Studio                 blocks.0.self_attn.q.lora_A.default.weight
    musubi-tuner, kohya              lora_unet_blocks_0_self_attn_q.lora_down.weight, .alpha

An adapter's difference is (alpha / rank) B A; a file that states no alpha means alpha = rank. Names of Wan's own code
become diffusers' by diffusers' table for whole checkpoints. Its converters of LoRA files are not used: they drop
differences of norms, and fail on LoRAs of some layers, on alphas outside the blocks and on biases alone. DoRA, LoKr and
LoHa are refused, as is whatever else is not named here. Only headers are read until a tensor is asked for.
"""

import itertools
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft.utils.other import get_pattern_key
from safetensors import safe_open
from torch import Tensor

from train import files
from train.backbones.wan_layers import to_diffusers, unflattened
from train.checkpoint import weights_path
from train.experts import BOTH, EXPERT_FOLDERS
from train.full_parameters import FullParameters
from train.lora_switch import LoraSwitch
from train.weight_files import read_header, read_ours

ADAPTER_CONFIG = "adapter_config.json"  # peft's, beside its file
FOLDER_FILES = ("adapter_model.safetensors", "pytorch_lora_weights.safetensors")  # as peft and diffusers name them
EXPERTS = {folder: expert for expert, folder in EXPERT_FOLDERS.items()}  # of a file of both, by prefix

_PREFIX = re.compile(
    r"(?:base_model\.model\.|(?:model\.)?diffusion_model\.|pipe\.|dit\.|(?P<network>transformer(?:_2)?)\.)*"
)
_KEY = re.compile(
    r"(?P<layer>.+?)\.(?:lora[_.](?P<side>A|B|down|up)(?:\.\w+)?\.(?P<kind>weight|bias)|(?P<plain>alpha|diff|diff_b|diff_m))"
)
_SLOTS = {"A": "down", "down": "down", "B": "up", "up": "up"}

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Pair:
    """An adapter of one layer: keys of A (rank, in) and B (out, rank), and alpha / rank. A convolution's A has its
    kernel's axes behind those."""

    down: str
    up: str
    scale: float


@dataclass(frozen=True)
class Difference:
    """A full difference of one parameter: its key, and what it is multiplied by."""

    key: str
    scale: float


@dataclass(frozen=True)
class NetworkLora:
    """What a file holds for one network: adapters by layer, differences by parameter, both by diffusers' names."""

    path: Path
    shapes: Shapes  # of the file's tensors, by key
    pairs: dict[str, Pair]
    differences: dict[str, Difference]

    def rank(self, layer: str) -> int:
        return self.shapes[self.pairs[layer].down][0]

    def describe(self) -> str:
        """Its ranks, and whether there are differences, for people."""
        ranks = sorted({self.rank(layer) for layer in self.pairs})
        said = [f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}"] if ranks else []
        return ", ".join(said + ([f"{len(self.differences)} full differences"] if self.differences else []))

    def check(self, wanted: Shapes, *, source: str) -> None:
        """ValueError naming `source` and what does not fit a network whose parameters are `wanted`."""
        problems = []
        for layer, pair in self.pairs.items():
            down, up, weight = self.shapes[pair.down], self.shapes[pair.up], wanted.get(f"{layer}.weight")
            if weight is None or len(weight) < 2:
                problems.append(f"{layer}, which is no layer there")
            elif (up[0], math.prod(down[1:])) != (weight[0], math.prod(weight[1:])):
                problems.append(f"{layer} (A {down}, B {up}) for a weight of {tuple(weight)}")
        for name, difference in self.differences.items():
            if name not in wanted:
                problems.append(f"{name}, which is no parameter there")
            elif self.shapes[difference.key] != tuple(wanted[name]):
                problems.append(f"{name} {self.shapes[difference.key]} for one of {tuple(wanted[name])}")
        if problems:
            count = len(self.pairs) + len(self.differences)
            raise ValueError(
                f"{source} does not fit this network in {len(problems)} of {count} entries: {_first(problems)}. Use it"
                " with the model that it was made for"
            )

    def same_as(self, other: "NetworkLora") -> bool:
        """Whether both are one training's, of whatever format: told by the names, and the first and last adapter."""
        if self.differences or other.differences or self.pairs.keys() != other.pairs.keys():
            return False
        ends = sorted(self.pairs)[:: max(1, len(self.pairs) - 1)]
        own, its = (list(itertools.chain(*map(lora.matrices, ends))) for lora in (self, other))
        return all(map(torch.equal, own, its))

    def tensor(self, key: str) -> Tensor:
        """float32, on the CPU. ValueError where it is not finite, or of another kind than floats."""
        with safe_open(self.path, framework="pt") as file:
            tensor = file.get_tensor(key)
        if not tensor.is_floating_point():
            raise ValueError(f"LoRA {self.path}: {key} is quantised ({tensor.dtype}): use the file in 16 bits")
        if not torch.isfinite(tensor := tensor.float()).all():
            raise ValueError(f"LoRA {self.path}: {key} is not finite: the file is damaged, use another one")
        return tensor

    def matrices(self, layer: str) -> tuple[Tensor, Tensor]:
        """A (rank, in) and B (out, rank), which bears the scale."""
        pair = self.pairs[layer]
        return self.tensor(pair.down).flatten(1), pair.scale * self.tensor(pair.up).flatten(1)

    def add(self, name: str, weight: Tensor, *, strength: float = 1.0) -> Tensor:
        """Parameter `name` with `strength` times this file's difference added, in float32; as it is where there is
        none."""
        if (layer := name.removesuffix(".weight")) != name and layer in self.pairs:
            pair = self.pairs[layer]
            down, up = (self.tensor(key).flatten(1).to(weight.device) for key in (pair.down, pair.up))
            weight = weight.float() + strength * pair.scale * (up @ down).view_as(weight)
        if name in self.differences:
            difference = self.differences[name]
            weight = weight.float() + strength * difference.scale * self.tensor(difference.key).to(weight.device)
        return weight


@dataclass(frozen=True)
class LoraFile:
    """A file's LoRAs by network: "transformer" and "transformer_2" where keys have such a prefix, else ""."""

    path: Path
    sha256: str  # of the file; where alpha stands beside it, of both files
    networks: dict[str, NetworkLora]
    fingerprint: str  # of the backbone that it was trained on; empty: the file does not say
    expert: str  # the network that it is for, where metadata or keys say so

    def by_expert(
        self, experts: Sequence[str], *, expert: str = "", source: str, remedy: str = ""
    ) -> dict[str, NetworkLora]:
        """The LoRAs by the backbone's network that each is for, of `experts`; `expert` is what the recipe says, and
        `remedy` how it would say that, if not by a mapping.

        ValueError naming `source` where that is not one of them, contradicts the file, or cannot be known.
        """
        if expert and expert not in experts:
            raise ValueError(f"{source} is given for the network {expert!r}, this backbone has: {', '.join(experts)}")
        if len(self.networks) > 1:
            found = {EXPERTS[name]: lora for name, lora in self.networks.items()}
            if expert or not found.keys() <= set(experts):
                raise ValueError(
                    f"{source} is for both experts, high_noise and low_noise: give it alone, to a backbone with both"
                )
            return found
        (lora,) = self.networks.values()
        if expert and self.expert and self.expert != expert:
            raise ValueError(
                f"{source} is given for the expert {expert}, but the file says that it is for {self.expert}"
            )
        name = expert or self.expert or (experts[0] if len(experts) == 1 else "")
        if not name:
            remedy = remedy or f"name it, as in '{source.partition('=')[0]}={{{experts[0]}: {self.path}}}'"
            raise ValueError(f"{source} does not say which of {', '.join(experts)} it is for: {remedy}")
        if name not in experts:
            raise ValueError(f"{source} is for the network {name!r}, this backbone has: {', '.join(experts)}")
        return {name: lora}


def find(path: Path | str) -> Path:
    """The file that `path` names: itself, that of a folder as peft and diffusers write it, or as `weights_path`."""
    for name in FOLDER_FILES:
        if (Path(path) / name).is_file():
            return Path(path) / name
    return weights_path(path)


def is_ours(path: Path) -> bool:
    """Whether this project's training wrote the file, a LoRA or full weights. ValueError where it cannot be read."""
    return read_header(path)[0].get("format") in (LoraSwitch.format, FullParameters.format)


def read(path: Path | str) -> LoraFile:
    """The LoRA that `path` names. ValueError for what is none, is damaged or has parts that nothing here reads."""
    path = find(path)
    metadata, shapes = read_header(path)
    metadata = dict(metadata)
    if metadata.get("format") == FullParameters.format:
        raise ValueError(f"{path} holds all weights of a network, which is no LoRA")
    if metadata.get("format") == LoraSwitch.format:
        read_ours(path)
    sha256, config = files.sha256(path), _adapter_config(path, metadata, shapes)
    if config.pop("beside", False):
        sha256 = files.digest([sha256, files.sha256(path.parent / ADAPTER_CONFIG)])
    networks = {
        name: _network(path, shapes, parts, config, prefix=name) for name, parts in _slots(path, shapes).items()
    }
    if len(networks) > 1 and networks.keys() != EXPERTS.keys():
        known, found = (
            " and ".join(f"{name}." if name else "no network" for name in names) for names in (EXPERTS, networks)
        )
        raise ValueError(f"LoRA {path} has keys of {found}: a file of one network has one of these, of two {known}")
    expert = metadata.get("expert") or ("low_noise" if networks.keys() == {EXPERT_FOLDERS["low_noise"]} else "")
    return LoraFile(path, sha256, networks, metadata.get("fingerprint", ""), "" if expert == BOTH else expert)


# Keys


def _slots(path: Path, keys: Iterable[str]) -> dict[str, dict[str, dict[str, str]]]:
    """{network: {layer: {down | up | bias | alpha | diff | diff_b: key}}}, layers by diffusers' names."""
    found: dict[str, dict[str, dict[str, str]]] = {}
    unknown = []
    for key in sorted(keys):
        prefix = _PREFIX.match(key)
        match = _KEY.fullmatch(key[prefix.end() :])
        slot = None if match is None else match["plain"] or _SLOTS[match["side"]]
        if slot in ("down", "up") and match["kind"] == "bias":
            slot = "bias" if slot == "up" else None
        layer = None if slot is None else unflattened(match["layer"])
        if layer and slot == "diff_m":
            layer, slot = f"{layer}.modulation", "diff"
        here = found.setdefault(prefix["network"] or "", {}).setdefault(layer, {}) if layer else {}
        if layer is None or slot in here:
            unknown.append(key)
        here[slot] = key
    if unknown:
        raise ValueError(
            f"LoRA {path} has keys that nothing here reads ({_first(unknown)}): LoRAs and differences of weights,"
            " biases and modulation (diff, diff_b, diff_m) of Wan's network are read, DoRA, LoKr, LoHa and text"
            " encoders are not"
        )
    if not found:
        raise ValueError(f"LoRA {path} holds no tensors")
    return {network: to_diffusers(layers) for network, layers in found.items()}


def _network(
    path: Path, shapes: Shapes, layers: Mapping[str, dict[str, str]], config: dict[str, Any], *, prefix: str
) -> NetworkLora:
    """ValueError for half a pair and for matrices that do not go together."""
    pairs, differences = {}, {}
    for layer, slots in layers.items():
        if ("down" in slots) != ("up" in slots) or not slots.keys() - {"alpha"}:
            key, lacks = next(iter(slots.values())), "B (up)" if "down" in slots else "A (down)"
            raise ValueError(f"LoRA {path} has {key} without its {lacks}: the file is not whole")
        if "down" in slots:
            down, up = shapes[slots["down"]], shapes[slots["up"]]
            if len(down) < 2 or len(up) < 2 or down[0] != math.prod(up[1:]) or not down[0]:
                raise ValueError(f"LoRA {path}: {layer} has A {down} and B {up}, whose ranks differ")
            scale = _scale(path, layer, slots, config, prefix=prefix, rank=down[0])
            pairs[layer] = Pair(slots["down"], slots["up"], scale)
        bias = [Difference(slots["bias"], pairs[layer].scale)] if "bias" in slots and layer in pairs else []
        bias += [Difference(slots["diff_b"], 1.0)] if "diff_b" in slots else []
        if len(bias) > 1 or ("bias" in slots and not bias):
            raise ValueError(f"LoRA {path}: {layer} has a bias that stands alone, or two of them")
        if bias:
            differences[f"{layer}.bias"] = bias[0]
        if "diff" in slots:
            name = layer if layer.endswith("scale_shift_table") else f"{layer}.weight"
            differences[name] = Difference(slots["diff"], 1.0)
    return NetworkLora(path, shapes, pairs, differences)


# Alpha


def _adapter_config(path: Path, metadata: Mapping[str, str], shapes: Iterable[str]) -> dict[str, Any]:
    """rank and alpha as peft names them: ours, diffusers' (by network) or peft's own. `beside`: from another file."""
    if metadata.get("format") == LoraSwitch.format:
        return {"r": int(metadata["rank"]), "lora_alpha": float(metadata["alpha"])}
    beside = path.parent / ADAPTER_CONFIG
    try:
        if "lora_adapter_metadata" in metadata:
            config = json.loads(metadata["lora_adapter_metadata"])
        elif beside.is_file() and any(key.startswith("base_model.model.") for key in shapes):
            config = json.loads(beside.read_text(encoding="utf-8")) | {"beside": True}
        else:
            return {}
        assert isinstance(config, dict)
    except (AssertionError, TypeError, ValueError) as error:
        raise ValueError(f"LoRA {path}: what states its alpha is damaged ({error})") from error
    if any(value for key, value in config.items() if key.rpartition(".")[2] in ("use_dora", "fan_in_fan_out")):
        raise ValueError(f"LoRA {path} was trained with use_dora or fan_in_fan_out, which nothing here reads")
    return config


def _scale(
    path: Path, layer: str, slots: Mapping[str, str], config: Mapping[str, Any], *, prefix: str, rank: int
) -> float:
    """alpha / rank of one layer; rank-stabilised LoRA (use_rslora) divides by the root."""
    try:
        if "alpha" in slots:
            with safe_open(path, framework="pt") as file:
                scale = file.get_tensor(slots["alpha"]).item() / rank
        else:
            own = {key.removeprefix(f"{prefix or 'transformer'}."): value for key, value in config.items()}
            ranks, alphas = (own.get(f"{name}_pattern") or {} for name in ("rank", "alpha"))
            stated = ranks.get(get_pattern_key(ranks, layer), own.get("r", rank))
            if stated != rank:
                raise ValueError(f"rank {stated} is stated, but A has rank {rank}")
            alpha = float(alphas.get(get_pattern_key(alphas, layer), own.get("lora_alpha", rank)))
            scale = alpha / (math.sqrt(rank) if own.get("use_rslora") else rank)
        if not math.isfinite(scale):
            raise ValueError(f"alpha / rank is {scale}")
    except (AttributeError, TypeError, ValueError, RuntimeError, re.error) as error:
        raise ValueError(f"LoRA {path} is damaged at the alpha of {layer}: {error}") from error
    return scale


def _first(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
