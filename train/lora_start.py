"""`lora.start`: a policy that begins with the adapters of another run, or of any LoRA of the same rank and layers."""

from typing import Any

from train.backbones import lora_formats
from train.backbones.base import Backbone
from train.backbones.lora_formats import LoraFile
from train.experts import BOTH
from train.lora_switch import LoraSwitch
from train.weight_files import Trainable


def read_start(config: Any) -> LoraFile:
    """The LoRA that `lora.start` names, its header alone. ValueError, naming the key, for what is none, holds what
    adapters do not, or is of another rank than the recipe's."""
    path, rank = config.lora.start, config.lora.rank
    source, remedy = f"lora.start={path}", f"merge it with backbone.loras=[{{path: {path}}}]"
    if config.train.parameters != "lora":
        raise ValueError(f"{source} needs train.parameters=lora: {remedy}")
    try:
        file = lora_formats.read(path)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error
    for lora in file.networks.values():
        if lora.differences:
            count = len(lora.differences)
            raise ValueError(f"{source} holds {count} full differences, which adapters cannot start from: {remedy}")
        if other := [layer for layer in lora.pairs if lora.rank(layer) != rank]:
            found = lora.rank(other[0])
            raise ValueError(
                f"{source} has rank {found} at {other[0]}, the recipe says lora.rank={rank}: set lora.rank={found}, or"
                f" {remedy}"
            )
    return file


def start_from(config: Any, backbone: Backbone, switch: Trainable) -> str:
    """Copy the LoRA that `lora.start` names into the adapters of `switch`; returns a line on what the policy is then.

    The recipe's alpha / rank stays, and B bears what the file's is more than that, so that the policy is the LoRA as
    its tool would apply it, up to rounding where the two differ. ValueError as `read_start` raises it, and where the
    file is of another backbone, expert or set of layers.
    """
    file, source = read_start(config), f"lora.start={config.lora.start}"
    if file.fingerprint and file.fingerprint != backbone.fingerprint:
        raise ValueError(
            f"{source} was trained on backbone {file.fingerprint}, this one is {backbone.fingerprint}: use the"
            " backbone.path and backbone.loras that it was trained with"
        )
    assert isinstance(switch, LoraSwitch)
    trained, both = backbone.trained, backbone.trained == BOTH
    says = both or file.expert or len(file.networks) > 1
    remedy = "a run of both starts from one of both: set backbone.expert to the one that it is for"
    found = file.by_expert(list(backbone.expert_folders), expert="" if says else trained, source=source, remedy=remedy)
    needed = tuple(backbone.expert_folders) if both else (trained,)
    if any(name not in found for name in needed):
        name = ", ".join(found)
        raise ValueError(f"{source} is for {name}, this run trains {trained}: set backbone.expert={name}")
    scale, state = config.lora.alpha / config.lora.rank, {}
    for name in needed:
        prefix, lora = f"{backbone.expert_folders[name]}." if both else "", found[name]
        for layer, pair in lora.pairs.items():
            state[f"{prefix}{layer}.lora_A.weight"] = lora.tensor(pair.down)
            state[f"{prefix}{layer}.lora_B.weight"] = lora.tensor(pair.up) * (pair.scale / scale)
    switch.load_state_dict(state, source=source)
    return f"the policy starts from {file.path}, the reference is {backbone.fingerprint} without it"
