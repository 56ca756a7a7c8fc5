"""The reference's flow errors, kept for later runs on the same groups: half of a pair step's forward passes.

A sample's clips, time and noise follow from the seed and its position in the stream, and the reference does not train.
So a run with another beta, learning rate, anchor or rank meets the same errors, bit for bit where its passes run the
same kernels (on a GPU with backbone.compile, memory decides what a block keeps, and last bits may differ with it):

    <folder>/settings.json         what the errors depend on
    <folder>/errors-*.bin          a file per run and rank that computed any: records of a position and its errors

A later run reads the steps that all ranks find there whole, and computes and adds the others. 10,000 steps of 8 pairs
take 1.3 MB.
"""

import json
import uuid
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from train import parallel
from train.files import read_json, write_text
from train.groups import GroupSet
from train.timesteps import Turns

# Keys of a recipe, by section, that errors depend on: all of the bits, as rounding goes with the kernels.
DRAWN = ("loss", "winner", "noise", "timesteps", "timestep_shift", "t_min", "t_max")
KEYS = {
    "objective": DRAWN,
    "backbone": ("dtype", "text_length", "attention", "expert", "compile"),
    "train": (
        "parameters",
        "pairs_per_pass",
        "activation_checkpointing",
        "float8",
        "memory_budget_gib",
        "offload_gib",
    ),
    "optim": ("batch_size",),
}


def dependencies(
    config: Any, groups: GroupSet, backbone: str, device: torch.device, ranks: int, turns: Turns | None = None
) -> dict[str, Any]:
    """What the reference's errors depend on, flat."""
    found = {f"{name}.{key}": asdict(getattr(config, name))[key] for name, keys in KEYS.items() for key in keys}
    found["self_score"] = config.self_score.every if config.self_score.strength > 0 else 0
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    made = {"seed": config.seed, "ranks": ranks, "groups": groups.digest, "backbone": backbone}
    made |= {} if turns is None else turns.settings()
    return found | made | {"device": name, "torch": torch.__version__}


class ReferenceCache:
    """Errors (B, 1 + M') float32 by position, of the reference with the fingerprint `backbone`; 1 + M' is the same in
    every group. `turns`: those of two experts.

    ValueError where the folder holds errors that depend on other settings, naming them. Call on every rank.
    """

    def __init__(
        self, config: Any, groups: GroupSet, backbone: str, accelerator: Accelerator, turns: Turns | None = None
    ):
        self.folder, device = Path(config.train.reference_cache), accelerator.device
        clips = config.objective.clips_per_group(groups.num_losers(0))
        self.record = np.dtype([("position", "<i8"), ("errors", "<f4", (clips,))])
        path, ranks = self.folder / "settings.json", accelerator.num_processes
        own = dependencies(config, groups, backbone, device, ranks, turns)
        with parallel.together(device):
            if self.folder.exists() and not self.folder.is_dir():
                raise ValueError(f"train.reference_cache={self.folder} is a file: name a folder")
            if accelerator.is_main_process and not path.exists():
                self.folder.mkdir(parents=True, exist_ok=True)
                write_text(path, json.dumps(own, indent=1) + "\n")
        with parallel.together(device):
            remedy = "delete the folder, or name another one in train.reference_cache"
            found = read_json(path, dict[str, Any], remedy=remedy)
            if found != own:
                keys = [key for key in own | found if found.get(key) != own.get(key)]
                other = [f"{key}={found.get(key)} (here {own.get(key)})" for key in keys]
                said = f"train.reference_cache={self.folder}: its errors were made with {', '.join(other)}"
                raise ValueError(f"{said}: name another folder")
            self.known = self._read()
        self.batch = config.optim.batch_size
        found = Counter(position // self.batch for position in self.known)
        whole = {step for step, count in found.items() if count == self.batch}
        self.steps = set.intersection(*gather_object([whole]))
        accelerator.print(f"reference cache: {len(self.steps)} steps known, {self.folder}")
        self.device, self.file = device, None

    def _read(self) -> dict[int, np.ndarray]:
        known = {}
        for path in sorted(self.folder.glob("errors-*.bin")):
            content = path.read_bytes()  # the last record of a run that was killed may be torn
            records = np.frombuffer(content[: len(content) // self.record.itemsize * self.record.itemsize], self.record)
            known |= dict(zip(records["position"].tolist(), records["errors"], strict=True))
        return known

    def read(self, positions: Tensor) -> Tensor | None:
        """Errors (B, 1 + M') of these positions (B,); None where their step is not known to every rank."""
        wanted = positions.tolist()
        if not self.steps.issuperset(position // self.batch for position in wanted):
            return None
        return torch.from_numpy(np.stack([self.known[position] for position in wanted])).to(self.device)

    def write(self, positions: Tensor, errors: Tensor) -> None:
        records = np.empty(len(positions), self.record)
        records["position"], records["errors"] = positions.cpu().numpy(), errors.cpu().numpy()
        if self.file is None:
            self.file = open(self.folder / f"errors-{uuid.uuid4().hex}.bin", "wb", buffering=0)
        self.file.write(records.tobytes())
