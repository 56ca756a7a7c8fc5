"""How well the generator explains its own clips: squared flow residuals under shared noise (Proprio eqs. 2-5).

A clip is noised to each of a few levels in the middle of sampling with each of a few draws, the network predicts the
velocity, and the squared difference to noise - clip, averaged over channels, is kept cell by cell. Masks and
aggregation come later (`losses.self_score`, `eval.search.scorers.proprio`), so all variants of the score share the same
passes.

The same noise meets all candidates of a prompt: what it does to all of them cancels in their comparison. It depends on
the prompt's key, the level and the draw alone. Nothing is decoded.

Levels are shares of the sampling steps, as the paper's appendix E has them (0.3 to 0.6). On the sampler's grid that is
t from 0.88 down to 0.67 at shift 3, and 0.92 to 0.77 at shift 5. Section 3.1 speaks of scheduler timesteps, which could
also mean t itself from 0.3 to 0.6 (first=0.4 last=0.7 shift=1); the folder's README compares them.
"""

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from eval.search.candidates import Candidates
from losses.flow_matching import interpolate, velocity_target
from train.backbones.base import Backbone, Conditioning
from train.files import seed_of

SEED = 0  # of the noise


def flow_residual(backbone: Backbone, latents: Tensor, noise: Tensor, t: float, conditioning: Conditioning) -> Tensor:
    """v(z_t, t) - (noise - z_0) of clips and noise of one shape and device (N, C, F, H, W), eq. 4."""
    noisy = interpolate(latents, noise, torch.full((len(latents),), t, device=latents.device))
    velocity = backbone.velocity_at(backbone.start(noisy, conditioning), t, conditioning)
    return velocity - velocity_target(latents, noise)


@dataclass
class ResidualConfig:
    levels: int = 4  # noise levels, evenly spaced from first to last; appendix E
    first: float = 0.3  # the noisiest level: share of the sampling steps that come before it
    last: float = 0.6  # likewise, the cleanest
    shift: float = 3.0  # of the grid of these steps; in a recipe sampler.shift
    draws: int = 4  # of noise, at each level

    def settings(self) -> dict[str, Any]:
        """What residuals depend on beside clips and network, as plain JSON values."""
        return asdict(self) | {"seed": SEED}


def noise_levels(levels: int, first: float, last: float, shift: float) -> list[float]:
    """Times t in (0, 1), ascending, of `levels` shares of the sampling steps from `first` to `last`.

    By hand: after half of the steps u = 0.5 is left, and at shift 3 t = 3 u / (1 + 2 u) = 0.75.
    """
    if not 0 < first <= last < 1:
        raise ValueError(f"first={first} and last={last} are shares of the steps: both in (0, 1), in this order")
    if not shift > 0:
        raise ValueError(f"shift={shift} must be above 0: 1 leaves the steps evenly spaced in t")
    left = 1 - torch.linspace(last, first, levels, dtype=torch.float64)
    return (shift * left / (1 + (shift - 1) * left)).tolist()


class Residuals:
    """The probe of one backbone, `batch_size` clips a pass. With two experts each level is served by the expert that
    samples there."""

    def __init__(self, backbone: Backbone, config: ResidualConfig, batch_size: int = 1):
        if config.levels < 1 or config.draws < 1:
            raise ValueError(f"levels={config.levels}, draws={config.draws}: use 1 or more of both")
        self.backbone, self.config, self.batch_size = backbone, config, batch_size
        self.times = noise_levels(config.levels, config.first, config.last, config.shift)

    def maps(self, candidates: Candidates) -> Tensor:
        """Squared residuals of all candidates, (N, levels, draws, F, H, W) float32 on the CPU, made once."""

        def make() -> tuple[Tensor, int]:
            rounds = [self.round(candidates, number) for number in range(self.num_rounds)]
            stacked = torch.stack(rounds, dim=1).unflatten(1, (self.config.draws, self.config.levels))
            return stacked.transpose(1, 2), len(candidates) * self.num_rounds

        return candidates.shared(self._name, make)

    @property
    def _name(self) -> tuple:
        return "residuals", *self.times, self.config.draws

    @property
    def num_rounds(self) -> int:
        return self.config.levels * self.config.draws

    @torch.no_grad()
    def round(self, candidates: Candidates, number: int, chosen: list[int] | None = None) -> Tensor:
        """One pass of each candidate (or of the `chosen`): (n, F, H, W) float32 on the CPU.

        Rounds go through the levels first: round r is level r % levels, draw r // levels. Taken from `maps` where they
        have been made.
        """
        draw, level = divmod(number, self.config.levels)
        if candidates.has(self._name):
            maps = self.maps(candidates)[:, level, draw]
            return maps if chosen is None else maps[chosen]
        t, noise = self.times[level], self.noise(candidates, level, draw)
        latents = candidates.latents if chosen is None else candidates.latents[chosen]
        return torch.cat(
            [self.squared(part, noise, t, candidates.conditioning) for part in latents.split(self.batch_size)]
        ).cpu()

    def squared(self, latents: Tensor, noise: Tensor, t: float, conditioning: Conditioning) -> Tensor:
        """Squared residual, mean over channels: latents (N, C, F, H, W), noise (C, F, H, W) -> (N, F, H, W) float32.

        Frames that the family holds fixed (the image of wan22_ti2v) are 0: nothing is predicted there.
        """
        backbone = self.backbone
        latents, noise = latents.to(backbone.device), noise.to(backbone.device).expand_as(latents)
        conditioning = conditioning.expand(len(latents)).to(backbone.device)
        squared = flow_residual(backbone, latents, noise, t, conditioning).square().mean(dim=1)
        squared[:, : conditioning.held_frames(latents.shape[2])] = 0
        return squared

    def noise(self, candidates: Candidates, level: int, draw: int) -> Tensor:
        """(C, F, H, W) float32, from a CPU generator of its own."""
        name = f"{SEED}/{candidates.key}/{self.times[level]:.9g}/{draw}"
        generator = torch.Generator("cpu").manual_seed(seed_of(name))
        return torch.randn(candidates.latents.shape[1:], generator=generator)
