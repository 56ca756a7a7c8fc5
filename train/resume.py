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
from accelerate.utils import gather_object

import recipes
from train import checkpoint, files, parallel
from train.backbones.base import BOTH
from train.groups import GroupSet
from train.lora_start import read_start, start_from
from train.policy import Policy
from train.tracking import flatten

# What of a recipe decides how weights change; paths, clips and logs do not.
SECTIONS = ("backbone", "video", "lora", "objective", "physics", "targets", "self_score", "optim")
SETTINGS = (*(f"{section}." for section in SECTIONS), "train.float8")


@contextmanager
def claimed(folder: Path, accelerator: Accelerator) -> Iterator[None]:
    """Hold the output folder `folder` for this run. Where another run holds it, the main process raises ValueError
    and the other ranks end. Call on every rank."""
    with ExitStack() as held:
        with parallel.together(accelerator.device):
            if accelerator.is_main_process:
                held.enter_context(files.lock(folder))
        yield


def newest(config: Any) -> Path | None:
    """The newest whole checkpoint of the run's folder, or None. ValueError where ranks see different ones, or
    `lora.start` cannot be what a run without one begins with."""
    folder = checkpoint_folder(config)
    found = checkpoint.latest(folder)
    if len(set(gather_object([found and found.name]))) > 1:
        raise ValueError(
            f"the newest checkpoint in {folder} is {found.name if found else 'none'} here and another one for other"
            f" ranks: output={config.output} must lie on one file system that all nodes share"
        )
    if found is None and config.lora.start:
        read_start(config)  # before any weights are
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


class Checkpoint:
    """What a run saves and goes on from: weights, moments, and where it stands.

    Attributes: policy, folder (of all checkpoints), step (steps made), samples_seen (groups), skipped (steps), and
    nonfinite (steps skipped in a row, which is not saved).
    """

    def __init__(
        self, config: Any, policy: Policy, optimizer: torch.optim.AdamW, groups: GroupSet, accelerator: Accelerator
    ):
        self.config, self.policy, self.optimizer, self.groups = config, policy, optimizer, groups
        self.accelerator, self.folder = accelerator, checkpoint_folder(config)
        self.step = self.samples_seen = self.skipped = self.nonfinite = self._saved = 0

    def load(self, path: Path | None) -> None:
        """Go on from checkpoint `path`, if any, and note the recipe of this start. Call on every rank.

        Raises ValueError, and leaves the folder as it is, where the checkpoint is of another run.
        """
        config, backbone, say = self.config, self.policy.backbone, self.accelerator.print
        if path is not None:
            ours = {"fingerprint": backbone.fingerprint, "expert": backbone.trained, "heads": self.policy.heads}
            state = checkpoint.load(path, switch=self.policy.switch, optimizer=self.optimizer, **ours)
            check(config, path, state, self.groups, self.accelerator)
            self.step = self._saved = state["step"]
            self.samples_seen, self.skipped = state["samples_seen"], state["skipped"]
        elif config.lora.start:  # once: a checkpoint holds what became of it
            say(start_from(config, backbone, self.policy.switch))
        if self.step >= config.optim.steps:
            say(f"step {self.step} of optim.steps={config.optim.steps}: nothing to train")
        elif self.accelerator.is_main_process:
            keep_recipe(config, self.step)
        if config.optim.batch_size > len(self.groups):
            say(
                f"optim.batch_size={config.optim.batch_size} is more than the {len(self.groups)} groups there are:"
                " every step meets some of them more than once"
            )
        meets_losers = config.objective.clips_per_group(self.groups.num_losers(0)) > 1
        if meets_losers and self.groups.network != backbone.fingerprint:
            say(f"the losers were made by {self.groups.network}, the reference is {backbone.fingerprint}")

    def advance(self, *, finite: bool) -> None:
        """Count a step; one that was not `finite` was skipped."""
        self.step += 1
        self.samples_seen += self.config.optim.batch_size
        self.skipped += not finite
        self.nonfinite = 0 if finite else self.nonfinite + 1

    def save(self) -> None:
        """Write the checkpoint of the steps made, unless it is written; other ranks than the first do nothing."""
        if not self.accelerator.is_main_process or self.step == self._saved:
            return
        backbone, switch = self.policy.backbone, self.policy.switch
        counted = {"samples_seen": self.samples_seen, "skipped": self.skipped}
        checkpoint.save(
            self.folder,
            self.step,
            switch=switch,
            optimizer=self.optimizer,
            state=counted | identity(self.config, self.groups),
            metadata=checkpoint.weights_metadata(switch, fingerprint=backbone.fingerprint, expert=backbone.trained),
            keep=self.config.train.keep_checkpoints,
            heads=self.policy.heads,
        )
        self._saved = self.step


def check(config: Any, path: Path, state: checkpoint.State, groups: GroupSet, accelerator: Accelerator) -> None:
    """Print what differs between this run and that of checkpoint `path` with its `state`; ValueError where it cannot go
    on from there. Backbone, expert, adapters and heads are checked by `checkpoint.load`."""
    ours = identity(config, groups)
    if state["seed"] != config.seed:
        raise ValueError(
            f"{path} was trained with seed={state['seed']}, the recipe says seed={config.seed}: restore the seed"
        )
    check_batch_size(config, state["samples_seen"])
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
    now = ours["settings"]
    changed = [key for key in before | now if before and before.get(key) != now.get(key)]
    if changed:  # a key of another version stands on one side alone
        listed = ", ".join(f"{key} {before.get(key, 'not set')} -> {now.get(key, 'no such key')}" for key in changed)
        accelerator.print(f"resuming with other settings: {listed}")


def check_batch_size(config: Any, samples_seen: int) -> None:
    """ValueError where a resumed run's steps would not begin at a multiple of the batch, and ranks would disagree on
    what is due in a step."""
    size = config.optim.batch_size
    due = {"backbone.expert=both": config.backbone.expert == BOTH, "self_score.every": config.self_score.strength > 0}
    counted = [key for key, counts in due.items() if counts]
    if counted and samples_seen % size:
        remedy = "" if counted[0].startswith("backbone") else ", or self_score.strength=0"
        raise ValueError(
            f"optim.batch_size={size} does not divide the {samples_seen} groups seen so far, by which {counted[0]}"
            f" counts: use one that does, as the run had before{remedy}"
        )


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
