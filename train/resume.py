"""What a run finds in its folder, and whether it may go on there: the lock, the newest checkpoint, the recipes.

A checkpoint records its expert, its groups and its settings. Another expert, other groups or another seed are refused;
other settings are listed in one line, and the recipe of every start is kept.
"""

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

import recipes
from train import checkpoint, files, parallel
from train.groups import GroupSet
from train.terms.self_score import check_resume
from train.tracking import flatten

# What of a recipe decides how weights change; paths, clips and logs do not.
SETTINGS = ("backbone.", "video.", "lora.", "objective.", "physics.", "self_score.", "optim.", "train.float8")


@contextmanager
def claimed(folder: Path, accelerator: Accelerator) -> Iterator[None]:
    """Hold the output folder `folder` for this run. Where another run holds it, the main process raises ValueError
    and the other ranks end. Call on every rank."""
    with ExitStack() as held:
        problem = None
        try:
            if accelerator.is_main_process:
                held.enter_context(files.lock(folder))
        except (ValueError, OSError) as error:
            problem = error
        parallel.stop_together(problem, accelerator.device)
        yield


def newest(config: Any, accelerator: Accelerator) -> Path | None:
    """The newest whole checkpoint of the run's folder, or None. ValueError where there may be none, or ranks see
    different ones."""
    folder = checkpoint_folder(config)
    found = checkpoint.latest(folder)
    if not parallel.same_on_all_ranks(int(found.name[-8:]) if found else 0, accelerator.device):
        raise ValueError(
            f"the newest checkpoint in {folder} is {found.name if found else 'none'} here and another one for other"
            f" ranks: output={config.output} must lie on one file system that all nodes share"
        )
    if found is not None and not config.train.resume:
        raise ValueError(f"{folder} already holds {found.name} and train.resume is false: choose another output folder")
    return found


def checkpoint_folder(config: Any) -> Path:
    return Path(config.train.folder) / "checkpoints"


def identity(config: Any, groups: GroupSet) -> dict[str, Any]:
    """What a checkpoint says of the run that wrote it (`State`)."""
    where = {"folder": str(groups.folder), "digest": groups.digest}
    return {"seed": config.seed, "groups": where, "settings": settings(config)}


def settings(config: Any) -> dict[str, bool | int | float | str]:
    """The recipe's keys that decide how weights change, flat."""
    return {key: value for key, value in flatten(asdict(config)).items() if key.startswith(SETTINGS)}


def restore(
    config: Any,
    path: Path | None,
    policy: Any,
    optimizer: torch.optim.AdamW,
    groups: GroupSet,
    accelerator: Accelerator,
) -> tuple[int, dict[str, Any]]:
    """Load checkpoint `path`, if any, into the loop's `Policy` and the optimizer, and note the recipe of this start.

    Returns the step that comes next and the state that checkpoints save beside it. Raises ValueError, and leaves the
    folder as it is, where the checkpoint is of another run. Call on every rank.
    """
    start, state = 0, {"samples_seen": 0, "skipped": 0}
    if path is not None:
        backbone = policy.backbone
        ours = {"fingerprint": backbone.fingerprint, "expert": backbone.expert, "heads": policy.heads}
        loaded = checkpoint.load(path, switch=policy.switch, optimizer=optimizer, **ours)
        check(config, path, loaded, groups, accelerator)
        start, state = loaded["step"], {key: loaded[key] for key in state}
    if start >= config.optim.steps:
        accelerator.print(f"step {start} of optim.steps={config.optim.steps}: nothing to train")
    elif accelerator.is_main_process:
        keep_recipe(config, start)
    if config.optim.batch_size > len(groups):
        accelerator.print(
            f"optim.batch_size={config.optim.batch_size} is more than the {len(groups)} groups there are: every step"
            " meets some of them more than once"
        )
    return start, state | identity(config, groups)


def check(config: Any, path: Path, state: checkpoint.State, groups: GroupSet, accelerator: Accelerator) -> None:
    """Print what differs between this run and that of checkpoint `path` with its `state`; ValueError where it cannot go
    on from there. Backbone, expert, adapters and heads are checked by `checkpoint.load`."""
    ours = identity(config, groups)
    if state["seed"] != config.seed:
        raise ValueError(
            f"{path} was trained with seed={state['seed']}, the recipe says seed={config.seed}: restore the seed"
        )
    check_resume(config.self_score, samples_seen=state["samples_seen"], batch_size=config.optim.batch_size)
    theirs, before = state.get("groups"), state.get("settings", {})
    if theirs is not None and theirs["digest"] != groups.digest:
        raise ValueError(
            f"{path} was trained on the groups {theirs['digest'][:12]} in {theirs['folder']}, train.groups="
            f"{groups.folder} now holds {groups.digest[:12]}: restore those groups, or choose another output folder"
            " to train anew"
        )
    accelerator.print(f"resuming from {path}: step {state['step']}, {state['samples_seen']} groups seen")
    if theirs is None:
        accelerator.print("that checkpoint does not say which groups and settings it was trained with: unchecked")
    changed = {key: value for key, value in ours["settings"].items() if before.get(key, value) != value}
    if changed:
        listed = ", ".join(f"{key} {before[key]} -> {value}" for key, value in changed.items())
        accelerator.print(f"resuming with other settings: {listed}")


def keep_recipe(config: Any, start: int) -> None:
    """Write recipe.yaml, and for a start whose recipe is not that of the start before, recipe-from-<step>.yaml."""
    folder, text = Path(config.train.folder), recipes.to_yaml(config)
    current, first = folder / "recipe.yaml", folder / "recipe-from-00000000.yaml"
    if start and current.exists() and not first.exists():  # of an earlier version
        os.replace(current, first)
    files.write_text(current, text)
    kept = sorted(folder.glob("recipe-from-*.yaml"))
    name = f"recipe-from-{start:08d}.yaml"
    before = [path for path in kept if path.name < name]
    for path in kept[len(before) :]:  # of starts behind which this one goes back
        path.unlink()
    if not before or before[-1].read_text(encoding="utf-8") != text:
        files.write_text(folder / name, text)
