"""Checkpoints: only what training changes, whole or not at all.

    <folder>/step_00000500/   lora.safetensors   adapter weights, float32, with rank, alpha, targets, expert and
                              fingerprint as metadata; of both experts, names begin with transformer or transformer_2
                              heads.safetensors   the physics terms' heads, where there are any (train/terms/physics.py)
                              optimizer.safetensors   AdamW moments by weight name
                              state.json   step, samples seen, counters, what the run was (`State`), and the size and
                              sha256 of the other files

A checkpoint is written into a sibling folder, synced to disk and renamed: a process killed at any moment leaves the
earlier ones as they were. There is no generator or sampler state beyond `seed` and `samples_seen`: every draw is a
function of those two. Nothing is pickled, and no frozen weight is stored. Equal contents are equal bytes.
"""

import json
import os
import shutil
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NotRequired

import torch
from pydantic import NonNegativeInt, PositiveInt
from torch import Tensor, nn
from typing_extensions import TypedDict  # pydantic reads typing's from Python 3.12 on

from train import files
from train.experts import BOTH, EXPERT_FOLDERS, as_one
from train.full_parameters import FullParameters
from train.lora_switch import LoraSwitch, adapter_shapes, check_shapes
from train.weight_files import (
    Trainable,
    lora_config,
    read_header,
    read_ours,
    read_tensors,
    write_tensors,
)

OPTIMIZER_FILE = "optimizer.safetensors"
HEADS_FILE = "heads.safetensors"
STATE_FILE = "state.json"


class Groups(TypedDict):
    """The groups that a run trained on."""

    folder: str
    digest: str  # GroupSet.digest


class FileRecord(TypedDict):
    bytes: NonNegativeInt
    sha256: str


class State(TypedDict):
    """What state.json holds. Checkpoints of earlier versions lack the last three."""

    step: PositiveInt
    samples_seen: NonNegativeInt
    skipped: NonNegativeInt  # steps
    seed: int
    files: dict[str, FileRecord]  # of the checkpoint, by name
    groups: NotRequired[Groups]
    settings: NotRequired[dict[str, bool | int | float | str]]  # of the recipe: train.resume.settings
    digest: NotRequired[str]  # of all the others


def save(
    folder: Path,
    step: int,
    *,
    switch: Trainable,
    optimizer: torch.optim.AdamW,
    state: dict[str, Any],
    metadata: dict[str, str],
    keep: int,
    heads: nn.Module | None = None,
) -> Path:
    """Write checkpoint `step` under `folder`, then delete all but the newest `keep`. Returns its path. Call on one
    rank.

    Raises ValueError with the path and the size needed when the disk is full; earlier checkpoints stay intact.
    """
    folder.mkdir(parents=True, exist_ok=True)
    final = folder / f"step_{step:08d}"
    aside = files.temporary(final)
    tensors = {
        switch.file: (switch.state_dict(), metadata),
        OPTIMIZER_FILE: (_optimizer_tensors(_trained(switch, heads), optimizer), None),
    }
    if heads is not None:
        state_of_heads = {name: weight.detach().cpu().clone() for name, weight in heads.named_parameters()}
        tensors[HEADS_FILE] = (state_of_heads, None)
    try:
        aside.mkdir()
        for name, (content, header) in tensors.items():
            write_tensors(content, aside / name, header)
        records = {
            name: {"bytes": (aside / name).stat().st_size, "sha256": files.sha256(aside / name)} for name in tensors
        }
        state = {**state, "step": step, "files": records}
        state["digest"] = files.digest(state)
        files.write_text(aside / STATE_FILE, json.dumps(state, indent=1))
        _sync(aside)
        if final.exists():  # left by a run that went back to an earlier step
            shutil.rmtree(final)
        os.rename(aside, final)
        _sync(folder)
    except Exception as error:  # safetensors raises its own type for a failed write
        shutil.rmtree(aside, ignore_errors=True)
        needed = sum(t.numel() * t.element_size() for content, _ in tensors.values() for t in content.values())
        free = shutil.disk_usage(folder).free
        raise ValueError(
            f"checkpoint {final} could not be written ({error.__cause__ or error}): it needs {needed / 2**20:.1f} MiB"
            f" and the disk has {free / 2**20:.1f} MiB free. Free space or point `output` elsewhere, then start again:"
            f" it resumes from the last whole checkpoint ({(latest(folder) or Path('none')).name})."
        ) from error
    upto = [path for path in _steps(folder) if path <= final]  # a later one is damaged: the run went back behind it
    for old in upto[:-keep]:
        shutil.rmtree(old)
    return final


def latest(folder: Path) -> Path | None:
    """The newest checkpoint under `folder` whose files are whole; damaged ones are passed over with a warning. None
    where there is none."""
    for path in reversed(_steps(folder)):
        try:
            check_whole(path)
        except ValueError as error:
            warnings.warn(f"checkpoint {path} is passed over: {error}", stacklevel=2)
        else:
            return path
    return None


def check_whole(path: Path) -> State:
    """The state of checkpoint folder `path`; ValueError where anything in it is not as it was written."""
    state = read_state(path)
    if path.name != f"step_{state['step']:08d}":
        raise ValueError(f"{STATE_FILE} is of step {state['step']}")
    kinds = {LoraSwitch.file, FullParameters.file} & state["files"].keys()
    if len(kinds) != 1 or state["files"].keys() - kinds - {HEADS_FILE} != {OPTIMIZER_FILE}:
        raise ValueError(f"{STATE_FILE} lists other files than a checkpoint has: {', '.join(state['files'])}")
    for name, expected in state["files"].items():
        file = path / name
        if not file.is_file():
            raise ValueError(f"{name} is missing")
        if file.stat().st_size != expected["bytes"] or files.sha256(file) != expected["sha256"]:
            raise ValueError(f"{name} is damaged")
        read_header(file)
    read_ours(path / kinds.pop())
    return state


def read_state(path: Path) -> State:
    """State of checkpoint folder `path`; ValueError where it has another form, or is not what was written."""
    state = files.read_json(path / STATE_FILE, State, remedy="delete this checkpoint to do without it")
    written = {key: value for key, value in state.items() if key != "digest"}
    if "digest" in state or "settings" in state or "groups" in state:  # earlier versions had none of the three
        if state.get("digest") != files.digest(written):
            raise ValueError(f"{STATE_FILE} is not as it was written")
    return state


def load(
    path: Path,
    *,
    switch: Trainable,
    optimizer: torch.optim.AdamW,
    fingerprint: str,
    expert: str,
    heads: nn.Module | None = None,
) -> State:
    """Restore weights and optimizer from checkpoint `path`; returns its state. Call on every rank.

    Raises ValueError when the checkpoint belongs to another backbone, expert or adapter shape, naming both, and where
    its heads or moments are not those of this run.
    """
    state = read_state(path)
    if switch.file not in state["files"]:
        raise ValueError(
            f"checkpoint {path} holds {', '.join(state['files'])}, this recipe trains {switch.file}: restore"
            " train.parameters, or choose another output folder to train anew"
        )
    load_weights(path / switch.file, switch, fingerprint=fingerprint, expert=expert)
    load_heads(path, heads)
    moments, trained = read_tensors(path / OPTIMIZER_FILE), _trained(switch, heads)
    moved = {_network(name) for name in moments}  # no other has moments: its steps so far, if any, were skipped
    trained = {name: weight for name, weight in trained.items() if _network(name) in moved}
    wanted = {f"{name}.step": torch.Size() for name in trained}
    wanted |= {f"{name}.{key}": weight.shape for name, weight in trained.items() for key in ("exp_avg", "exp_avg_sq")}
    found = {name: tensor.shape for name, tensor in moments.items()}
    wrong = [name for name in sorted(wanted.keys() | found.keys()) if wanted.get(name) != found.get(name)]
    wrong += [name for name, tensor in moments.items() if tensor.dtype != torch.float32]
    if wrong:
        raise ValueError(
            f"{path / OPTIMIZER_FILE} does not hold the moments of this run's weights (first: {wrong[0]}): delete"
            f" {path} to resume from the checkpoint before it"
        )
    for name, weight in trained.items():
        optimizer.state[weight] = {
            "step": moments[f"{name}.step"].clone().to(weight.device if weight.is_cuda else "cpu"),
            "exp_avg": moments[f"{name}.exp_avg"].to(weight.device),
            "exp_avg_sq": moments[f"{name}.exp_avg_sq"].to(weight.device),
        }
    return state


def load_heads(path: Path, heads: nn.Module | None) -> None:
    """Load the heads of checkpoint folder `path`; ValueError unless it has just those of `heads`."""
    file = path / HEADS_FILE
    if heads is None and not file.exists():
        return
    found = read_tensors(file) if file.exists() else {}
    wanted = {} if heads is None else dict(heads.named_parameters())
    shapes = [{name: tuple(tensor.shape) for name, tensor in tensors.items()} for tensors in (found, wanted)]
    if shapes[0] != shapes[1]:
        said = [", ".join(f"{n} {shape}" for n, shape in one.items()) or "none" for one in shapes]
        raise ValueError(
            f"checkpoint {path} holds heads of physics terms: {said[0]}; this recipe has: {said[1]}. Restore"
            " physics.trajectory, physics.relational and the widths that it was trained with, or choose another output"
            " folder to train anew."
        )
    with torch.no_grad():
        for name, weight in wanted.items():
            weight.copy_(found[name])


def weights_metadata(switch: Trainable, *, fingerprint: str, expert: str) -> dict[str, str]:
    """What a weight file says of itself. `expert` is transformer | high_noise | low_noise | both."""
    return {**switch.describe(), "fingerprint": fingerprint, "expert": expert}


def load_weights(path: Path, switch: Trainable, *, fingerprint: str, expert: str) -> None:
    """Load a weight file; ValueError when it differs from `switch` in kind, backbone, expert, rank, alpha or layers."""
    metadata, ours = read_ours(path), switch.describe()
    if metadata["format"] != ours["format"]:
        raise ValueError(f"{path} is a {metadata['format']} file, this run trains {ours['format']}")
    if metadata["fingerprint"] != fingerprint:
        raise ValueError(
            f"LoRA {path} was trained on backbone {metadata['fingerprint']}, this backbone is {fingerprint}."
            " Use the backbone.path and backbone.loras that it was trained with."
        )
    if metadata["expert"] != expert:
        raise ValueError(
            f"LoRA {path} was trained on the expert {metadata['expert']}, this run trains {expert}: set"
            f" backbone.expert={metadata['expert']}, or give each expert an output folder of its own"
        )
    for key in ("rank", "alpha"):
        if key in ours and float(metadata[key]) != float(ours[key]):
            raise ValueError(
                f"LoRA {path} has {key} {metadata[key]}, the recipe says lora.{key}={ours[key]}."
                f" Set lora.{key}={metadata[key]}, or choose another output folder to train anew."
            )
    switch.load_state_dict(read_tensors(path), source=str(path))


def attach_trained(path: Path | str, experts: Mapping[str, nn.Module], *, fingerprint: str) -> Trainable:
    """Load what training wrote, a LoRA or full weights, onto the expert that it belongs to, or onto both.

    `reference()` of the result runs the untrained network. `path` as for `weights_path`. Raises ValueError as
    `load_weights` does, and for an expert that is not there.
    """
    path = weights_path(path)
    metadata = read_ours(path)
    full, expert = metadata["format"] == FullParameters.format, metadata["expert"]
    needed = tuple(EXPERT_FOLDERS) if expert == BOTH else (expert,)
    if lacking := [name for name in needed if name not in experts]:
        raise ValueError(f"LoRA {path} is for the network {lacking[0]!r}, this backbone has: {', '.join(experts)}")
    network = as_one(experts) if expert == BOTH else experts[expert]
    switch: Trainable
    if full:
        switch = FullParameters(network, keep_reference=True)
    else:
        config = lora_config(metadata)  # the file's word: nothing is made of it before it fits file and network
        check_shapes(read_header(path)[1], adapter_shapes(network, config), source=f"LoRA {path}")
        switch = LoraSwitch(network, config)
    load_weights(path, switch, fingerprint=fingerprint, expert=expert)
    return switch


def weights_path(path: Path | str, names: Sequence[str] = (LoraSwitch.file, FullParameters.file)) -> Path:
    """The weight file that `path` names: itself, or the one in a checkpoint folder, or in the newest checkpoint of a
    run's folder; `names` are the files that will do."""
    path = Path(path)
    if path.is_dir():
        folders = [path, latest(path), latest(path / "checkpoints")]
        found = [folder / name for folder in folders if folder for name in names if (folder / name).exists()]
        if not found:
            raise ValueError(
                f"no checkpoint in {path}: give a LoRA file, a checkpoint folder, or a training output folder"
            )
        path = found[0]
    if not path.exists():
        raise ValueError(
            f"LoRA {path} does not exist: give a LoRA file, a checkpoint folder, or a training output folder"
        )
    if (path.parent / STATE_FILE).exists():
        record = read_state(path.parent)["files"].get(path.name)
        if record and record["sha256"] != files.sha256(path):
            raise ValueError(
                f"LoRA {path} is damaged: its checksum is not that in {STATE_FILE}; use another checkpoint"
            )
    return path


def find_lora(path: Path | str) -> tuple[Path, dict[str, str]]:
    """The LoRA that `path` names (see `weights_path`) and its metadata; ValueError when it is missing, not one of
    ours, or describes other adapters than it holds."""
    file = weights_path(path, (LoraSwitch.file,))
    return file, read_ours(file, (LoraSwitch.format,))


def _network(name: str) -> str:
    """Which network of two a weight of `_trained` or its moment belongs to; "" where one trains."""
    first = name.removeprefix("heads.").partition(".")[0]
    return first if first in EXPERT_FOLDERS.values() else ""


def _trained(switch: Trainable, heads: nn.Module | None) -> dict[str, nn.Parameter]:
    """Everything that the optimizer has moments of, by name."""
    own = {} if heads is None else {f"heads.{name}": weight for name, weight in heads.named_parameters()}
    return switch.weights | own


def _optimizer_tensors(weights: Mapping[str, nn.Parameter], optimizer: torch.optim.AdamW) -> dict[str, Tensor]:
    tensors = {}
    for name, weight in weights.items():
        for key, value in optimizer.state.get(weight, {}).items():
            tensors[f"{name}.{key}"] = value.detach().cpu().clone()
    return tensors


def _steps(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("step_*") if path.is_dir())


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
