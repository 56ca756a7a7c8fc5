"""What trainings of small networks share: settings, the course of the learning rate, checkpoints, the command line."""

import argparse
import json
import math
import random
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Generator, nn
from torch.optim import Optimizer

from train.files import atomic

CHECKPOINT_EVERY = 500  # steps
GRADIENT_NORM = 1.0  # gradients are clipped to it


@dataclass(frozen=True)
class Settings:
    """Raises ValueError for numbers below 1."""

    steps: int = field(metadata={"help": "of the training"})
    batch: int = field(metadata={"help": "clips a step"})
    pool: int = field(metadata={"help": "clips to draw from, there before the first step"})
    learning_rate: float = field(metadata={"help": "peak; linear warm-up, then cosine to 0"})
    seed: int = field(default=0, metadata={"help": "of clips, first weights and draws"})

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "pool"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} is {getattr(self, name)}: use 1 or more")

    def rate(self, step: int, *, warmup: int) -> float:
        """The learning rate of step `step` (0-based), after `warmup` steps, a tenth of all at most."""
        warmup = min(warmup, max(1, self.steps // 10))
        if step < warmup:
            return self.learning_rate * ((step + 1) / warmup)
        return self.learning_rate * (0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, self.steps - warmup))))

    def show(self, step: int, text: str, started: float, *, first: int = 0) -> None:
        """Print how far it is after step `step` (0-based). started: of step `first`, by time.monotonic()."""
        seconds = time.monotonic() - started
        left = seconds / (step + 1 - first) * (self.steps - step - 1)
        print(f"step {step + 1} of {self.steps}{text}, {seconds:.0f} s, {left:.0f} s left", flush=True)


class Checkpoint:
    """Where a training stands, in one file, which is gone once the training is done. SIGTERM asks to save and stop."""

    def __init__(self, path: Path, settings: Settings, **more: str):
        """more: what the training depends on besides."""
        self.path, self.settings, self.stopping = path, vars(settings) | more, False
        signal.signal(signal.SIGTERM, self._ask)

    def _ask(self, *_) -> None:
        self.stopping = True

    def due(self, step: int, last: int) -> bool:
        """Whether to save after `step` steps of `last`."""
        return step < last and (self.stopping or step % CHECKPOINT_EVERY == 0)

    def save(
        self,
        step: int,
        network: nn.Module,
        optimizer: Optimizer,
        draws: Generator,
        choices: random.Random | None = None,
    ) -> None:
        moments = optimizer.state_dict()["state"]
        tensors = {f"network.{name}": tensor for name, tensor in network.state_dict().items()}
        tensors |= {f"moments.{place}.{name}": tensor for place, own in moments.items() for name, tensor in own.items()}
        with atomic(self.path) as aside:
            made_by = {"settings": json.dumps(self.settings), "step": str(step)}
            made_by |= {"choices": json.dumps(choices.getstate())} if choices else {}
            save_file(tensors | {"draws": draws.get_state()}, aside, metadata=made_by)
        if self.stopping:
            print(f"stopped after step {step}; run the same command to continue", flush=True)

    def load(
        self, network: nn.Module, optimizer: Optimizer, draws: Generator, choices: random.Random | None = None
    ) -> int:
        """Steps that were made; 0 without a file. ValueError for one of other settings.

        Moments that are there keep their places, for a captured graph may write to them.
        """
        if not self.path.exists():
            return 0
        with safe_open(self.path, "pt") as file:
            made_by, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if json.loads(made_by["settings"]) != self.settings:
            was = made_by["settings"]
            raise ValueError(f"{self.path} is of a training with {was}: give these settings, or delete it")
        weights, moments = {}, {}
        for name, tensor in tensors.items():
            kind, _, rest = name.partition(".")
            if kind == "network":
                weights[rest] = tensor
            elif kind == "moments":
                place, _, of = rest.partition(".")
                moments.setdefault(int(place), {})[of] = tensor
        network.load_state_dict(weights)
        if there := optimizer.state_dict()["state"]:
            for place, own in there.items():
                for name, tensor in own.items():
                    tensor.copy_(moments[place][name])
        else:
            rates = [group["lr"] for group in optimizer.param_groups]
            optimizer.load_state_dict(optimizer.state_dict() | {"state": moments})
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate  # a tensor that the training fills would have been copied
        if choices:
            version, inner, last = json.loads(made_by["choices"])
            choices.setstate((version, tuple(inner), last))
        draws.set_state(tensors["draws"])
        return int(made_by["step"])


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Inside, initial weights are drawn from `seed`; no generator is changed afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would also reseed every GPU
        yield


def command_line(
    doc: str, folder: str, defaults: Settings, argv: list[str] | None, *more: argparse.ArgumentParser
) -> tuple[Path, Settings, str]:
    """The option --<folder>, settings and device of a training's command. more: parsers of its other options."""
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=doc, formatter_class=form, parents=more)
    parser.add_argument(f"--{folder}", type=Path, required=True, help="folder that is written")
    for one in fields(Settings):
        default, told = getattr(defaults, one.name), f"{one.metadata['help']} (default: %(default)s)"
        parser.add_argument(f"--{one.name.replace('_', '-')}", type=one.type, default=default, help=told)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=device, help="cuda or cpu (default: %(default)s)")
    given = parser.parse_args(argv)
    settings = Settings(**{one.name: getattr(given, one.name) for one in fields(Settings)})
    return getattr(given, folder), settings, given.device
