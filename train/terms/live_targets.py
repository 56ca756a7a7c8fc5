"""Physics targets made while training, for groups that were built without any (`physics.on_the_fly`).

The winner is decoded from its latent by the VAE, and the teachers look at its pixels: every time that a group comes up,
as PhysisForcing does. A build that makes the targets once is the cheaper way; the log says what this one costs. Every
rank works for its own groups and waits for none.
"""

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from train.backbones.base import Backbone
from train.clips import to_pixels
from train.teachers.targets import TargetMaker
from train.terms.physics import target_tensors


class LiveTargets:
    """Completes batches on `device`. Raises ValueError, before weights are loaded, for teachers that cannot work."""

    def __init__(self, config: Any, device: torch.device, say: Callable[[str], None] = print):
        self.config, self.device, self.say = config, device, say
        self.maker = TargetMaker(config.targets, config.video, device)
        self.said = False

    def complete(self, batch: dict[str, Tensor], backbone: Backbone) -> dict[str, Tensor]:
        """The batch with the targets of its winners, (B,C,F,H,W), unless it has them."""
        if "tracks" in batch or "relation_tokens" in batch:
            return batch
        start = time.perf_counter()
        backbone.vae.to(self.device)  # validation leaves it on the CPU
        winners = batch["winner"]
        with torch.no_grad():
            made = [self.maker.make(to_pixels(backbone.decode_latents(winner[None]))[0].cpu()) for winner in winners]
        sizes = {"num_frames": winners.shape[2], "max_tokens": self.config.targets.max_tokens}
        tensors = [target_tensors(self.config.physics, extra, **sizes) for extra in made]
        if not self.said:
            self.said = True
            seconds = (time.perf_counter() - start) / len(winners)
            self.say(
                f"physics.on_the_fly: the groups hold no targets; making them took {seconds:.2f} s per group, the"
                " teachers' loading included. A build with the same section `targets` makes them once."
            )
        return batch | {name: torch.stack([one[name] for one in tensors]) for name in tensors[0]}
