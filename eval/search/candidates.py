"""The candidates of one prompt, and the contract of a scorer.

A scorer is a function of `Candidates` that returns one value per clip, (N,) float32 on the CPU, lower is better:
infinity where it cannot score a clip, which is then never chosen. What several scorers need (pixels, residuals, masks)
is made once and kept with the candidates, with what it cost.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from train.backbones.base import Conditioning


@dataclass(frozen=True)
class Cost:
    """Compute: network passes (one clip once through the generator's network), seconds on the clock, and how many of
    the passes were followed by one backward."""

    passes: int = 0
    seconds: float = 0.0
    backward: int = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.passes + other.passes, self.seconds + other.seconds, self.backward + other.backward)


@dataclass
class Candidates:
    """N clips of one prompt.

    Shapes: N clips, C latent channels, F latent frames, H W latent rows and columns, T video frames.
    """

    key: str  # of the prompt: names files, and with a seed the noise that scorers draw
    prompt: str
    latents: Tensor  # (N, C, F, H, W) float32, CPU
    conditioning: Conditioning  # of one clip
    decode: Callable[[Tensor], Tensor]  # latents -> (N, T, H, W, 3) uint8, CPU
    fps: float  # of the clips
    _made: dict[Any, tuple[Any, Cost]] = field(default_factory=dict, repr=False)
    _reused: list[Cost] = field(default_factory=list, repr=False)

    def __len__(self) -> int:
        return len(self.latents)

    @property
    def clips(self) -> Tensor:
        """(N, T, H, W, 3) uint8, decoded at the first use."""
        return self.shared("clips", lambda: (self.decode(self.latents), 0))

    def shared(self, name: Any, make: Callable[[], tuple[Any, int]]) -> Any:
        """What `make` returns first, made once; the second value is the number of network passes that it took."""
        if name not in self._made:
            started = time.perf_counter()
            value, passes = make()
            self._made[name] = value, Cost(passes, time.perf_counter() - started)
            self._reused.append(Cost(passes))  # its seconds pass in the scorer's own time
        else:
            self._reused.append(self._made[name][1])
        return self._made[name][0]

    def has(self, name: Any) -> bool:
        """Whether that has been made."""
        return name in self._made

    def measure(self, scorer: Scorer) -> tuple[Tensor, Cost]:
        """A scorer's values and its cost, as if it were the only one: what others had made already counts as well."""
        self._reused.clear()
        started = time.perf_counter()
        values = scorer(self)
        cost = sum(self._reused, Cost(0, time.perf_counter() - started))
        if values.shape != (len(self),) or values.isnan().any():
            raise ValueError(f"a scorer gave {values} for {len(self)} clips: it must give one number each")
        return values.float().cpu(), cost


Scorer = Callable[[Candidates], Tensor]


def choose(values: Tensor) -> int:
    """Number of the best candidate by values (N,): the first of the lowest, so that equal ones never change places."""
    return int(values.argmin())
