"""Clips from a backbone: every sampler of the project takes its steps from `Stepper`.

Generation, validation and preference losers go through `sample_clips`. Search has loops of its own (pruning, guidance,
refinement of the noise) over the same steps, so that a loop that interferes nowhere gives the same clip bit for bit.

Shapes: B clips, C latent channels, F latent frames, H W latent rows and columns.
"""

import copy
import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from diffusers import DPMSolverMultistepScheduler, UniPCMultistepScheduler
from torch import Tensor
from tqdm import tqdm

from losses.flow_matching import interpolate
from train.backbones.base import TRAIN_TIMESTEPS, Backbone, Conditioning
from train.backbones.negative_prompt import NEGATIVE_PROMPT
from train.clips import VideoConfig
from train.files import seed_of
from train.residual_cache import residual_cache

# Euler's method is ours, over `sigma_grid`, and so are rCM's two samplers, over `rcm_grid`; the others are diffusers',
# over the grids that its Wan and Cosmos pipelines give them.
KARRAS = "unipc_karras"
KARRAS_SIGMA_MIN = 0.01  # the lowest noise over signal of Cosmos-Predict 2.5
MULTISTEP = {
    "unipc": UniPCMultistepScheduler,
    "dpm++": DPMSolverMultistepScheduler,
    KARRAS: UniPCMultistepScheduler,
}
RCM = ("rcm", "rcm_ode")
SOLVERS = ("euler", *MULTISTEP, *RCM)
RCM_ANGLES = (1.5, 1.4, 1.0)  # of TrigFlow, after the first step and so on, in TurboDiffusion's inference scripts


@dataclass
class SamplerConfig:
    """The defaults are Wan2.1's own for text to video, at 480p too. Wan2.2's own are in its recipes."""

    # unipc: what Wan ships with | dpm++ | euler: step-distilled students, too | unipc_karras: what Cosmos-Predict 2.5
    # ships with, over the noise levels of Karras et al. | rcm: students of rCM (TurboWan), which noises the clean
    # latents anew after each step | rcm_ode: Euler's method over rCM's times
    solver: str = "unipc"
    steps: int = 50
    guidance: float = 5.0  # classifier-free guidance scale; 1 leaves the negative pass out
    guidance_low: float | None = None  # of the low-noise expert of two-expert families; null: `guidance`
    guided: list[float] = field(default_factory=lambda: [0.0, 1.0])  # guidance is applied at t in [first, second]
    shift: float = 5.0  # of the time grid, applied once; rcm, rcm_ode and unipc_karras have grids of their own
    # Those three: noise over signal at the start; TurboWan2.1 80, TurboWan2.2 and Cosmos-Predict 2.5 200.
    sigma_max: float = 80.0
    # First Block Cache of diffusers: a pass ends after the first block where what that block adds differs by less than
    # this share from what it added in the last whole pass, and takes the other blocks' change from there. 0: every pass
    # is whole.
    cache: float = 0.0
    negative_prompt: str = NEGATIVE_PROMPT  # what guidance steers away from; Wan's own, in Chinese

    def check(self, section: str = "sampler") -> None:
        """ValueError naming key, value and remedy for settings that cannot work."""
        if self.solver not in SOLVERS:
            raise ValueError(f"{section}.solver={self.solver!r}: must be one of {', '.join(SOLVERS)}")
        if len(self.guided) != 2 or not 0 <= self.guided[0] <= self.guided[1] <= 1:
            raise ValueError(f"{section}.guided={self.guided}: give two times in [0, 1], the lower first")
        if not 0 <= self.cache < 1:
            raise ValueError(f"{section}.cache={self.cache}: give 0 (every pass is whole) or a share such as 0.1")
        for key in ("guidance", "guidance_low", "shift"):
            if (value := getattr(self, key)) is not None and not math.isfinite(value):
                raise ValueError(f"{section}.{key}={value}: give a finite number, such as Wan's own 5")
        sigma_grid(self.steps, self.shift)
        if self.solver == KARRAS and not KARRAS_SIGMA_MIN < self.sigma_max < math.inf:
            raise ValueError(f"{section}.sigma_max={self.sigma_max:g}: give a number above 0.01, as Cosmos' own 200")
        if self.solver not in RCM:
            return
        if self.steps > len(RCM_ANGLES) + 1:
            raise ValueError(f"{section}.steps={self.steps}: {self.solver} has a time grid for 1 to 4 steps")
        if not math.tan(RCM_ANGLES[0]) < self.sigma_max < math.inf:
            raise ValueError(f"{section}.sigma_max={self.sigma_max:g}: give a number above 14.1, as its authors' 80")
        for key in ("guidance", "guidance_low"):
            if (scale := getattr(self, key)) not in (1, None):
                raise ValueError(f"{section}.{key}={scale:g}: {self.solver}'s students hold guidance themselves; set 1")

    def settings(self) -> dict[str, Any]:
        """What clips depend on, for digests. What was added later is left out where it says what was always done."""
        found = asdict(self)
        if self.solver == "euler":
            del found["solver"]
        if list(self.guided) == [0, 1]:
            del found["guided"]
        if not self.cache:
            del found["cache"]
        del found["shift" if self.solver in (*RCM, KARRAS) else "sigma_max"]
        return found

    def guidance_at(self, backbone: Backbone, t: Tensor | float) -> float:
        """The guidance scale at time t, of the expert that serves it; 1 outside `guided`."""
        low, high = (TRAIN_TIMESTEPS * bound for bound in self.guided)
        # Compared on the network's clock: in float32 .9 itself lies below .9.
        if not low <= float(TRAIN_TIMESTEPS * torch.as_tensor(t, dtype=torch.float32)) <= high:
            return 1.0
        return backbone.guidance_at(t, self.guidance, self.guidance_low)


@dataclass
class LosersConfig:
    """How losers are sampled: as the section `sampler` says but for the keys that are set here. Null: as there.

    Cheap ones do: on the sandbox one loser of a third of the steps with half as much training again is better than four
    whole ones, at a thirteenth of their passes (eval/sandbox/README.md).
    """

    count: int = 4  # M, of each group; 0 for supervised training, which needs no transformer here
    solver: str | None = None
    steps: int | None = None
    guidance: float | None = None  # of both experts, where there are two
    guided: list[float] | None = None
    cache: float | None = None
    # The time t to begin at. 1: with noise; in (0, 1): with the winner, noised to it, such as 0.9 (on the sandbox
    # losers from 0.7 teach nothing).
    start_time: float = 1.0

    def __post_init__(self) -> None:
        if self.count < 0:
            raise ValueError(f"pipeline.losers.count={self.count}: use 0 or more")
        if not 0 < self.start_time <= 1:
            raise ValueError(
                f"pipeline.losers.start_time={self.start_time}: must lie in (0, 1), such as 0.9, or be 1: noise alone"
            )

    def sampler(self, evaluation: SamplerConfig) -> SamplerConfig:
        """ValueError for settings that cannot work."""
        own = {name: getattr(self, name) for name in ("solver", "steps", "guidance", "guided", "cache")}
        own = {name: value for name, value in own.items() if value is not None}
        if "guidance" in own:
            own["guidance_low"] = None  # the same of both experts
        found = replace(evaluation, **own)
        found.check("pipeline.losers")
        return found


def sigma_grid(steps: int, shift: float) -> Tensor:
    """Times of the Euler steps, (steps + 1,) float32 from 1 to 0: s u / (1 + (s - 1) u) over u = linspace(1, 0).

    The shift is applied once. diffusers' FlowMatchEuler applies it to an already shifted range, so its last step is
    nearly empty (4 steps, shift 3: 1, .858, .602, .009, 0 instead of 1, .9, .75, .5, 0).
    """
    if steps < 1 or shift <= 0:
        raise ValueError(f"steps={steps} and shift={shift} make no sigma grid: use steps >= 1 and shift > 0")
    u = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    return (shift * u / (1 + (shift - 1) * u)).float()


def rcm_grid(steps: int, sigma_max: float) -> Tensor:
    """Times of the steps of rCM's students, (steps + 1,) float32: TrigFlow's angles as sin / (sin + cos), then 0.

    The first angle is atan(sigma_max), so clips begin at sigma_max / (1 + sigma_max), with less than all of the noise:
    4 steps from 80 are .98765, .93378, .85289, .60898, 0 (TurboDiffusion, arXiv 2512.16093; rCM, arXiv 2510.08431).
    """
    angles = torch.tensor([math.atan(sigma_max), *RCM_ANGLES[: steps - 1], 0], dtype=torch.float64)
    return (angles.sin() / (angles.sin() + angles.cos())).float()


class Stepper:
    """The steps of one sampler for one batch, to be taken in order.

    conditioning: of B clips. negative: the encoded negative prompt, of 1 or B clips. start: the time to begin at, in
    (0, 1]: the whole grid is scaled to it, and the latents to begin with are noised to it. seeds: B, of the noise that
    the solver rcm draws after each step. ValueError where a step is guided and there is no negative, or there is to be
    noise and there are no seeds.
    """

    def __init__(
        self,
        backbone: Backbone,
        conditioning: Conditioning,
        sampler: SamplerConfig,
        negative: Conditioning | None = None,
        *,
        start: float = 1.0,
        seeds: Sequence[int] | None = None,
    ):
        self.backbone, self.conditioning = backbone, conditioning.to(backbone.device)
        self.solver, self.seeds = sampler.solver, seeds
        self.scheduler = multistep(sampler, start) if sampler.solver in MULTISTEP else None
        self.sigmas, self.times = grid(sampler, start)  # (steps + 1,) each, on the CPU
        self.scales = [sampler.guidance_at(backbone, t) for t in self.times[:-1]]
        self.negative = negative
        if negative is None and any(scale != 1 for scale in self.scales):
            raise ValueError(f"sampler.guidance={sampler.guidance:g} needs the encoded negative prompt: give negative")
        if sampler.solver == "rcm" and (seeds is None or len(seeds) != len(conditioning)):
            given, clips = "no" if seeds is None else len(seeds), len(conditioning)
            raise ValueError(f"sampler.solver=rcm draws noise by each clip's seed: {given} seeds for {clips} clips")

    def start(self, noise: Tensor, clean: Tensor | None = None) -> Tensor:
        """The latents before the first step, of initial noise and the clean clips to begin from, all (B, C, F, H, W);
        ValueError for noise of another shape."""
        if noise.dim() != 5 or len(noise) != len(self.conditioning):
            clips = len(self.conditioning)
            raise ValueError(
                f"noise of shape {tuple(noise.shape)} with {clips} conditionings: give (B,C,F,H,W), one each"
            )
        latents = noise.to(self.backbone.device, torch.float32)
        level = self.sigmas[0].to(latents.device)
        if clean is not None:
            latents = interpolate(clean.to(latents.device, torch.float32), latents, level.expand(len(latents)))
        elif self.solver in RCM:
            latents = level * latents
        return self.backbone.start(latents, self.conditioning)

    def velocity(self, latents: Tensor, step: int) -> Tensor:
        """(B, C, F, H, W), of the expert that serves the step's time, with classifier-free guidance. Differentiable."""
        scale = self.scales[step]
        return self.backbone.velocity_at(
            latents, self.times[step], self.conditioning, negative=self.negative, guidance=scale, guidance_low=scale
        )

    def clean(self, latents: Tensor, velocity: Tensor, step: int) -> Tensor:
        """The clean latents that the line of the step's velocity points at: x - t v."""
        return latents - self.sigmas[step].to(latents.device) * velocity

    def after(self, latents: Tensor, velocity: Tensor, step: int, *, move: Tensor | None = None) -> Tensor:
        """The latents after the step, plus `move`: x + (t' - t) v by Euler's method, (1 - t')(x - t v) + t' noise by
        rcm. A multistep solver reads the steps before from `scheduler`; its corrector, which would take the move back,
        is left out of the step that follows."""
        if self.solver == "rcm":
            level = self.sigmas[step + 1].to(latents.device)
            clean, noise = self.clean(latents, velocity, step), self.drawn(latents, step)
            latents = self.backbone.start(interpolate(clean, noise, level.expand(len(latents))), self.conditioning)
        elif self.scheduler is None:
            latents = latents + (self.sigmas[step + 1] - self.sigmas[step]).to(latents.device) * velocity
        else:
            if step == 0:
                self.scheduler = begun(self.scheduler)
            (latents,) = self.scheduler.step(velocity, self.scheduler.timesteps[step], latents, return_dict=False)
        if move is None:
            return latents
        if self.scheduler is not None:
            self.scheduler.last_sample = None
        return latents + move

    def drawn(self, latents: Tensor, step: int) -> Tensor:
        """The noise that rcm adds after a step, of the latents' shape (B, C, F, H, W): each clip's is a function of its
        seed and the step alone, whatever the device and the clips beside it."""
        generators = (torch.Generator("cpu").manual_seed(seed_of("rcm", seed, step)) for seed in self.seeds)
        return torch.stack([torch.randn(latents.shape[1:], generator=one) for one in generators]).to(latents.device)


def multistep(sampler: SamplerConfig, start: float = 1.0) -> Any:
    """diffusers' scheduler of the solver, with its grid, as its Wan or Cosmos pipelines set it up.

    The latter's levels, noise over signal, are Karras et al.'s (arXiv 2206.00364, eq. 5, rho = 7) from `sigma_max` to
    0.01; t = level / (1 + level). So clips begin with noise alone at t a little below 1.
    """
    own = {"flow_shift": sampler.shift}
    if sampler.solver == KARRAS:
        own = {"use_karras_sigmas": True, "sigma_max": sampler.sigma_max, "sigma_min": KARRAS_SIGMA_MIN}
    scheduler = MULTISTEP[sampler.solver](prediction_type="flow_prediction", use_flow_sigmas=True, **own)
    scheduler.set_timesteps(sampler.steps)
    if start != 1:
        scheduler.sigmas = start * scheduler.sigmas
        scheduler.timesteps = (TRAIN_TIMESTEPS * scheduler.sigmas[:-1]).long()
    return begun(scheduler)


def begun(scheduler: Any) -> Any:
    """A copy of a scheduler that has taken no step."""
    scheduler = copy.copy(scheduler)
    scheduler.model_outputs, scheduler.lower_order_nums = [None] * scheduler.config.solver_order, 0
    scheduler.last_sample, scheduler._step_index = None, None
    scheduler.set_begin_index(0)
    return scheduler


def remembered(schedulers: Sequence[Any], change: Callable[[Sequence[Tensor]], Tensor]) -> Any:
    """One scheduler whose memory of the steps before is `change` of the schedulers', (B, C, F, H, W) each; None where
    the solver has no memory. All must have taken the same steps."""
    if schedulers[0] is None:
        return None
    scheduler, parts = copy.copy(schedulers[0]), zip(*(one.model_outputs for one in schedulers), strict=True)
    scheduler.model_outputs = [None if part[0] is None else change(part) for part in parts]
    last = [getattr(one, "last_sample", None) for one in schedulers]
    scheduler.last_sample = None if last[0] is None else change(last)
    return scheduler


def grid(sampler: SamplerConfig, start: float = 1.0) -> tuple[Tensor, Tensor]:
    """Noise levels of the steps and the times that the network is told, (steps + 1,) float32 each, from `start` to 0.

    They are one for Euler's method and unipc_karras. diffusers' other solvers have grids of their own, a thousandth of
    the way from `sigma_grid`'s, and tell Wan whole thousandths: so do we, and make the pipelines' clips. rCM's students
    were trained, and are sampled by their authors, with times on the network's clock in bfloat16 (988, 932, 852, 608).
    """
    sampler.check()
    if sampler.solver in RCM:
        sigmas = start * rcm_grid(sampler.steps, sampler.sigma_max)
        return sigmas, (TRAIN_TIMESTEPS * sigmas).bfloat16().float() / TRAIN_TIMESTEPS
    if sampler.solver not in MULTISTEP:
        sigmas = start * sigma_grid(sampler.steps, sampler.shift)
        return sigmas, sigmas
    scheduler = multistep(sampler, start)
    if sampler.solver == KARRAS:
        return scheduler.sigmas, scheduler.sigmas
    return scheduler.sigmas, torch.cat([scheduler.timesteps / TRAIN_TIMESTEPS, torch.zeros(1)])


def is_guided(backbone: Backbone, sampler: SamplerConfig, start: float = 1.0) -> bool:
    """Whether some step has a negative pass."""
    return any(sampler.guidance_at(backbone, t) != 1 for t in grid(sampler, start)[1][:-1])


def sampling_passes(
    backbone: Backbone, sampler: SamplerConfig, first: int = 0, stop: int | None = None, *, start: float = 1.0
) -> int:
    """Network passes of one clip's steps `first` to `stop` (None: to the end): two where guidance is not 1."""
    times = grid(sampler, start)[1][:-1][first:stop]
    return sum(1 if sampler.guidance_at(backbone, t) == 1 else 2 for t in times)


def initial_noise(backbone: Backbone, video: VideoConfig, seeds: Sequence[int]) -> Tensor:
    """(B, C, F, H, W) float32 on the CPU, B = len(seeds). Each clip's comes from a generator of its own, so it depends
    on its seed alone, not on the device or on the clips beside it."""
    shape = backbone.latent_shape(video.height, video.width, video.num_frames)
    return torch.stack([torch.randn(shape, generator=torch.Generator("cpu").manual_seed(seed)) for seed in seeds])


@torch.no_grad()
def sample(
    backbone: Backbone,
    conditioning: Conditioning,
    noise: Tensor,
    sampler: SamplerConfig,
    *,
    negative: Conditioning | None = None,
    clean: Tensor | None = None,
    start: float = 1.0,
    seeds: Sequence[int] | None = None,
    progress: bool = True,
) -> Tensor:
    """Latents (B, C, F, H, W) float32 of generated clips, from initial noise of that shape.

    conditioning: of B clips. negative: `sampler.negative_prompt` already encoded; without it the text encoder must be
    loaded where a step is guided. clean: clips (B, C, F, H, W) to begin from, noised to time `start` in (0, 1). seeds:
    B, of the noise that the solver rcm draws between steps.
    """
    if negative is None and is_guided(backbone, sampler, start):
        negative = backbone.encode_texts([sampler.negative_prompt])
    if sampler.cache and len(noise) > 1:  # which passes end early is decided for each clip, not for a batch
        negatives = None if negative is None else negative.expand(len(noise))
        parts = [slice(number, number + 1) for number in range(len(noise))]
        made = [
            sample(
                backbone,
                conditioning[part],
                noise[part],
                sampler,
                negative=negatives and negatives[part],
                clean=None if clean is None else clean[part],
                start=start,
                seeds=None if seeds is None else seeds[part],
                progress=progress,
            )
            for part in parts
        ]
        return torch.cat(made)
    stepper = Stepper(backbone, conditioning, sampler, negative, start=start, seeds=seeds)
    latents = stepper.start(noise, clean)
    with residual_cache(backbone, sampler.cache) if sampler.cache else nullcontext():
        for step in tqdm(range(sampler.steps), desc="sampling", unit="step", disable=not progress):
            latents = stepper.after(latents, stepper.velocity(latents, step), step)
    return latents


def sample_clips(
    backbone: Backbone,
    conditioning: Conditioning,
    seeds: Sequence[int],
    video: VideoConfig,
    sampler: SamplerConfig,
    *,
    negative: Conditioning | None = None,
    clean: Tensor | None = None,
    start: float = 1.0,
    progress: bool = True,
) -> Tensor:
    """One clip per seed, generated together: latents (B, C, F, H, W) float32, B = len(seeds), as `sample` makes them.

    conditioning: of B clips, or of one for all.
    """
    noise = initial_noise(backbone, video, seeds)
    conditioning = conditioning.expand(len(seeds))
    given = {"negative": negative, "clean": clean, "start": start, "seeds": seeds, "progress": progress}
    return sample(backbone, conditioning, noise, sampler, **given)
