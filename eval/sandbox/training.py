"""What the trainings of the sandbox's networks share: settings, the course of the learning rate, the command line."""

import argparse
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path

import torch

GRADIENT_NORM = 1.0  # gradients are clipped to it


@dataclass(frozen=True)
class Settings:
    """Raises ValueError for numbers below 1."""

    steps: int
    batch: int  # clips a step
    pool: int  # simulated clips to draw from, made before the first step
    learning_rate: float  # peak; linear warm-up, then cosine to 0
    seed: int = 0

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

    def show(self, step: int, text: str, started: float) -> None:
        """Print how far it is after step `step` (0-based). started: of the first, by time.monotonic()."""
        seconds = time.monotonic() - started
        left = seconds / (step + 1) * (self.steps - step - 1)
        print(f"step {step + 1} of {self.steps}{text}, {seconds:.0f} s, {left:.0f} s left", flush=True)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Inside, initial weights are drawn from `seed`; no generator is changed afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would also reseed every GPU
        yield


def command_line(doc: str, folder: str, defaults: Settings, argv: list[str] | None) -> tuple[Path, Settings, str]:
    """The option --<folder>, settings and device of a training's command."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(f"--{folder}", type=Path, required=True)
    for field in fields(Settings):
        default = getattr(defaults, field.name)
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=field.type, default=default)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    given = vars(parser.parse_args(argv))
    place, device = given.pop(folder), given.pop("device")
    return place, Settings(**given), device
