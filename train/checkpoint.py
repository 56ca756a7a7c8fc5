"""Checkpoints: only what training changes, whole or not at all, and the LoRA file format.

    <folder>/step_00000500/   lora.safetensors   adapter weights, float32, with rank, alpha, targets and fingerprint
    as metadata
                              heads.safetensors   the physics terms' heads, where there are any (train/physics.py)
                              optimizer.safetensors   AdamW moments by weight name
                              state.json   step, samples seen, counters, and the size and sha256 of the other files

A checkpoint is written into a sibling folder, synced to disk and renamed: a process killed at any moment leaves the
earlier ones as they were. There is no generator or sampler state beyond `seed` and `samples_seen`: every draw is a
function of those two. Nothing is pickled, and no frozen weight is stored.
"""

import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from train.full_parameters import FullParameters
from train.lora_switch import LoraConfig, LoraSwitch

OPTIMIZER_FILE = "optimizer.safetensors"
HEADS_FILE = "heads.safetensors"
STATE_FILE = "state.json"

Trainable = LoraSwitch | FullParameters  # what a checkpoint holds: its `file`, `weights`, `describe()`, state dicts


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
    aside = folder / f".{final.name}.tmp"
    shutil.rmtree(aside, ignore_errors=True)
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
            save_file(content, aside / name, metadata=header)
        files = {name: {"bytes": (aside / name).stat().st_size, "sha256": _sha256(aside / name)} for name in tensors}
        (aside / STATE_FILE).write_text(json.dumps({**state, "step": step, "files": files}, indent=1), encoding="utf-8")
        for path in aside.iterdir():
            _sync(path)
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
            f"checkpoint {final} could not be written ({error}): it needs {needed / 2**20:.1f} MiB and the disk has"
            f" {free / 2**20:.1f} MiB free. Free space or point `output` elsewhere, then start again:"
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
        problem = _problem(path)
        if problem is None:
            return path
        warnings.warn(f"checkpoint {path} is passed over: {problem}", stacklevel=2)
    return None


def load(
    path: Path, *, switch: Trainable, optimizer: torch.optim.AdamW, fingerprint: str, heads: nn.Module | None = None
) -> dict[str, Any]:
    """Restore weights and optimizer from checkpoint `path`; returns its state. Call on every rank.

    Raises ValueError when the checkpoint belongs to another backbone or adapter shape, naming both, and where its heads
    are not those of this run.
    """
    load_weights(path / switch.file, switch, fingerprint=fingerprint)
    load_heads(path, heads)
    moments = load_file(path / OPTIMIZER_FILE)
    for name, weight in _trained(switch, heads).items():
        if f"{name}.step" in moments:
            optimizer.state[weight] = {
                "step": moments[f"{name}.step"].clone().to(weight.device if weight.is_cuda else "cpu"),
                "exp_avg": moments[f"{name}.exp_avg"].to(weight.device),
                "exp_avg_sq": moments[f"{name}.exp_avg_sq"].to(weight.device),
            }
    return json.loads((path / STATE_FILE).read_text(encoding="utf-8"))


def load_heads(path: Path, heads: nn.Module | None) -> None:
    """Load the heads of checkpoint folder `path`; ValueError unless it has just those of `heads`."""
    file = path / HEADS_FILE
    if heads is None and not file.exists():
        return
    found = load_file(file) if file.exists() else {}
    wanted = {} if heads is None else dict(heads.named_parameters())
    shapes = [{name: tuple(tensor.shape) for name, tensor in tensors.items()} for tensors in (found, wanted)]
    if shapes[0] != shapes[1]:
        said = [", ".join(f"{n} {shape}" for n, shape in one.items()) or "none" for one in shapes]
        raise ValueError(
            f"checkpoint {path} holds heads of physics terms: {said[0]}; this recipe has: {said[1]}. Restore"
            " physics.w_pix, physics.w_sem and the widths that it was trained with, or choose another output folder to"
            " train anew."
        )
    with torch.no_grad():
        for name, weight in wanted.items():
            weight.copy_(found[name])


def weights_metadata(switch: Trainable, *, fingerprint: str, expert: str) -> dict[str, str]:
    """What a weight file says of itself. `expert` is transformer | high_noise | low_noise."""
    return {**switch.describe(), "fingerprint": fingerprint, "expert": expert}


def read_lora_metadata(path: Path) -> dict[str, str]:
    """Metadata of the LoRA that `path` names (see `lora_path`); ValueError when it is missing or not one of ours."""
    return _read_ours(lora_path(path), ("physalign-lora-1",))


def read_weights_metadata(path: Path) -> dict[str, str]:
    """Metadata of the LoRA or full weights at `path` (see `weights_path`); ValueError as for a LoRA."""
    return _read_ours(weights_path(path), ("physalign-lora-1", FullParameters.format))


def _read_ours(path: Path, formats: Sequence[str]) -> dict[str, str]:
    metadata = _read_metadata(path)
    if metadata.get("format") not in formats:
        raise ValueError(
            f"LoRA {path} carries no physalign metadata: give a checkpoint folder or its {LoraSwitch.file}"
        )
    return metadata


def lora_config(metadata: dict[str, str]) -> LoraConfig:
    """The shape of the adapters that a LoRA file's metadata describe."""
    return LoraConfig(int(metadata["rank"]), float(metadata["alpha"]), json.loads(metadata["targets"]))


def load_lora(path: Path, switch: LoraSwitch, *, fingerprint: str) -> None:
    """Load the LoRA that `path` names (see `lora_path`) into `switch`; ValueError as for `load_weights`."""
    read_lora_metadata(path)
    load_weights(lora_path(path), switch, fingerprint=fingerprint)


def load_weights(path: Path, switch: Trainable, *, fingerprint: str) -> None:
    """Load a weight file; ValueError when it differs from `switch` in kind, backbone, rank, alpha or layers."""
    metadata, ours = _read_metadata(path), switch.describe()
    if metadata.get("format") != ours["format"]:
        raise ValueError(f"{path} is a {metadata.get('format')} file, this run trains {ours['format']}")
    if metadata["fingerprint"] != fingerprint:
        raise ValueError(
            f"LoRA {path} was trained on backbone {metadata['fingerprint']}, this backbone is {fingerprint}."
            " Use the backbone it was trained on."
        )
    for key in ("rank", "alpha"):
        if key in ours and float(metadata[key]) != float(ours[key]):
            raise ValueError(
                f"LoRA {path} has {key} {metadata[key]}, the recipe says lora.{key}={ours[key]}."
                f" Set lora.{key}={metadata[key]}, or choose another output folder to train anew."
            )
    switch.load_state_dict(load_file(path), source=str(path))


def attach_trained(path: Path | str, experts: Mapping[str, nn.Module], *, fingerprint: str) -> Trainable:
    """Load what training wrote, a LoRA or full weights, onto the expert that it belongs to.

    `reference()` of the result runs the untrained network. `path` as for `weights_path`. Raises ValueError as
    `load_weights` does, and for an expert that is not there.
    """
    path = weights_path(path)
    metadata = read_weights_metadata(path)
    full, expert = metadata["format"] == FullParameters.format, metadata["expert"]
    if expert not in experts:
        raise ValueError(f"LoRA {path} is for the network {expert!r}, this backbone has: {', '.join(experts)}")
    switch: Trainable
    if full:
        switch = FullParameters(experts[expert], keep_reference=True)
    else:
        switch = LoraSwitch(experts[expert], lora_config(metadata))
    load_weights(path, switch, fingerprint=fingerprint)
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
    return path


def lora_path(path: Path | str) -> Path:
    """`weights_path` of a LoRA."""
    return weights_path(path, (LoraSwitch.file,))


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


def _read_metadata(path: Path) -> dict[str, str]:
    try:
        with safe_open(path, framework="pt") as file:
            return file.metadata() or {}
    except Exception as error:  # safetensors raises its own type
        raise ValueError(f"LoRA {path} cannot be read ({error}): the file is damaged or not safetensors") from error


def _steps(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("step_*") if path.is_dir())


def _problem(path: Path) -> str | None:
    try:
        files = json.loads((path / STATE_FILE).read_text(encoding="utf-8"))["files"]
    except (OSError, ValueError, KeyError) as error:
        return f"{STATE_FILE} cannot be read ({error})"
    for name, expected in files.items():
        if not (path / name).exists():
            return f"{name} is missing"
        if (path / name).stat().st_size != expected["bytes"] or _sha256(path / name) != expected["sha256"]:
            return f"{name} is damaged"
    return None


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
