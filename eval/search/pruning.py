"""Early pruning (ours): look at the predicted clean latents part-way through sampling and finish the promising ones.

After step k of a sampler the line of the last velocity points at clean latents (`train.sampling.Stepper.clean`), for no
further pass. A scorer ranks these predictions, the best `keep` go on, the others stop.

    partial = advance(stepper, begin(stepper, noise), stop=4)
    chosen = promising(scorer(candidates of partial.clean), keep=4)
    latents = advance(a stepper of the chosen, partial.select(chosen), stop=sampler.steps).latents

A clip that is finished is the clip that `train.sampling.sample_clips` makes from its seed.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from train.sampling import Stepper, remembered


@dataclass(frozen=True)
class Partial:
    """Clips after the first `step` steps: latents (N, C, F, H, W) then, the clean ones that they point at, and the
    scheduler of a multistep solver, which remembers the steps."""

    step: int
    latents: Tensor
    clean: Tensor
    scheduler: Any = None

    def select(self, chosen: Sequence[int]) -> "Partial":
        return Partial._change([self], lambda parts: parts[0][list(chosen)])

    @staticmethod
    def cat(parts: Sequence["Partial"]) -> "Partial":
        """Those of several batches, after the same step."""
        return Partial._change(parts, torch.cat)

    @staticmethod
    def _change(parts: Sequence["Partial"], change: Callable[[Sequence[Tensor]], Tensor]) -> "Partial":
        latents, clean = change([part.latents for part in parts]), change([part.clean for part in parts])
        return Partial(parts[0].step, latents, clean, remembered([part.scheduler for part in parts], change))


def begin(stepper: Stepper, noise: Tensor) -> Partial:
    """The clips of that noise (N, C, F, H, W) before the first step."""
    start = stepper.start(noise)
    return Partial(0, start, start)


@torch.no_grad()
def advance(stepper: Stepper, partial: Partial, stop: int) -> Partial:
    """From wherever the clips are to the end of step `stop`."""
    latents, clean = partial.latents, partial.clean
    if partial.step:  # a copy: what the caller holds can be continued again
        stepper.scheduler = remembered([partial.scheduler], lambda parts: parts[0])
    for step in range(partial.step, stop):
        velocity = stepper.velocity(latents, step)
        clean = stepper.clean(latents, velocity, step)
        latents = stepper.after(latents, velocity, step)
    return Partial(stop, latents, clean, stepper.scheduler)


def promising(values: Tensor, keep: int) -> list[int]:
    """Numbers of the `keep` lowest values (N,), ascending."""
    return sorted(values.argsort(stable=True)[:keep].tolist())
