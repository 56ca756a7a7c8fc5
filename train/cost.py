"""The bill of a whole job before it runs: network passes, hours of one GPU and disk, stage by stage.

    python -m data_pipeline.build recipe=wan14b pipeline.groups_planned=17295 --dry-run
    python -m train.gdpo recipe=wan14b pipeline.groups_planned=17295 --dry-run

Seconds are counted work over the rate at which a GPU did such work (`Rates`). Work is in operations of a matrix
product; attention takes longer for each of its own, by the factors of flash-attn-4 on an H200:

    F = matrix + 1.2 attention             a forward pass: one pass of a sampler
    B = matrix + 1.3 * 2.5 attention       a backward pass through frozen weights
    training, per clip = F + B, and F more for its reference

The rates are those of <output>/rates.json, which `python -m data_pipeline.benchmark recipe=...`, and for training
train.tools.benchmark, measure on your GPU, or else the H200's of train/rates.json. Full fine-tuning takes one more
matrix share in B, for the weights' own gradients. Not counted: a filter, the judge itself, clips for validation, text
and its 8 kB per token on disk (200 kB of cosmos25, of padding too).
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NotRequired

from typing_extensions import TypedDict  # pydantic reads typing's from Python 3.12 on

import recipes
from train.backbones import BACKBONES, find_architecture, load_backbone, text_tokens
from train.backbones.architecture import forward_flops, latent_shape, num_tokens, parameter_count
from train.backbones.base import BackboneConfig
from train.backbones.conditioning import CONDITION
from train.clips import VideoConfig
from train.files import read_json, write_text
from train.optimizer import OptimConfig, learning_rate
from train.sampling import LosersConfig, SamplerConfig, sampling_passes
from train.teachers.targets import TargetsConfig
from train.terms import self_score
from train.terms.self_score import SelfScoreConfig

SHIPPED = Path(__file__).parent / "rates.json"
FORWARD, BACKWARD = 1.2, 3.25  # what an operation of attention's forward pass costs, and its backward pass
SMALLEST = 1e9  # parameters of a network for which the shipped rates hold; smaller ones wait for launches


@dataclass
class Rates:
    """What a GPU does per second."""

    device: str
    sampling: float  # 1e12 operations of fused sampling passes
    training: float  # 1e12 operations of preference steps
    encode: dict[str, float]  # 1e6 pixels (rows x columns x frames) of the VAE, by its latent channels
    decode: dict[str, float]
    targets: float | None = None  # clips, by the recipe's teachers; null: not measured
    own: bool = False  # whether they were measured in the job's folder


class MeasuredRates(TypedDict):
    """A file of them: what was measured in a folder."""

    device: str
    sampling: NotRequired[float]
    training: NotRequired[float]
    encode: NotRequired[dict[str, float]]
    decode: NotRequired[dict[str, float]]
    targets: NotRequired[float]


# What the bill reads of a recipe, with the defaults of the commands' own sections, which check it.


@dataclass
class Resample:
    budget: int = 0
    tau: float = 3.0
    representatives: int = 8


@dataclass
class Pipeline:
    losers: LosersConfig = field(default_factory=LosersConfig)
    groups_planned: int = 0
    first_frame: bool | None = None
    resample: Resample = field(default_factory=Resample)

    def __post_init__(self) -> None:
        if self.groups_planned < 0:
            raise ValueError(f"pipeline.groups_planned={self.groups_planned}: use 0 or more")


@dataclass
class Objective:
    loss: str = "bound"
    winner: str = "real"


@dataclass
class Judge:
    name: str = ""


@dataclass
class Train:
    parameters: str = "lora"


@dataclass
class Job:
    output: str = "runs/default"
    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    video: VideoConfig = field(default_factory=VideoConfig)
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    judge: Judge = field(default_factory=Judge)
    targets: TargetsConfig = field(default_factory=TargetsConfig)
    pipeline: Pipeline = field(default_factory=Pipeline)
    objective: Objective = field(default_factory=Objective)
    self_score: SelfScoreConfig = field(default_factory=SelfScoreConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: Train = field(default_factory=Train)


@dataclass(frozen=True)
class Stage:
    name: str
    work: str
    seconds: float | None  # of one GPU; None: not known
    disk: float = 0  # bytes


def read_rates(output: str) -> tuple[Rates, str]:
    """The rates that hold for a job, and where they are from: those measured in its folder, else the shipped ones."""
    shipped, own = _read(SHIPPED), Path(output) / "rates.json"
    if not own.exists():
        return Rates(**shipped), "the project measured (train/rates.json)"
    found = _read(own)
    missing = [key for key in ("sampling", "training", "encode", "decode") if key not in found]
    more = f"; {', '.join(missing)} as on one {shipped['device']}" if missing else ""
    return Rates(**(shipped | {"targets": None} | found), own=True), f"{own} holds{more}"


def save_rates(output: str, device: str, rates: Mapping[str, Any]) -> Path:
    """Write measured rates to the folder, beside others that were measured there on such a device."""
    path = Path(output) / "rates.json"
    before = _read(path) if path.exists() else {}
    before = before if before.get("device") == device else {}
    write_text(path, json.dumps(before | {"device": device} | rates, indent=1) + "\n")
    return path


def _read(path: Path) -> MeasuredRates:
    return read_json(path, MeasuredRates, remedy="delete it, or measure anew by data_pipeline.benchmark")


def clips_per_group(loss: str, winner: str, num_losers: int) -> int:
    """Clips that pass through the network in a preference step for a group of `num_losers` losers."""
    taken = 1 if winner == "generated" else 0
    return 2 if loss == "bound" else 1 + num_losers - taken


def operations(
    architecture: dict[str, Any], video: VideoConfig, text_tokens: int, *, full: bool = False
) -> tuple[float, float]:
    """(F, B) of one clip, in 1e12 operations of a matrix product. full: B gives gradients of all weights."""
    tokens = num_tokens(architecture, video.height, video.width, video.num_frames)
    matrix, attention = forward_flops(architecture, tokens, text_tokens)
    return (matrix + FORWARD * attention) / 1e12, ((1 + full) * matrix + BACKWARD * attention) / 1e12


def megapixels(video: VideoConfig) -> float:
    """Of all frames of a clip."""
    return video.height * video.width * video.num_frames / 1e6


class Bill:
    """The stages of a job, and what each takes. architecture: as `find_architecture` gives it. supervised: training on
    winners alone."""

    def __init__(self, job: Job, rates: Rates, architecture: dict[str, Any], *, supervised: bool = False):
        self.job, self.rates, self.architecture, self.supervised = job, rates, architecture, supervised
        size, full = (job.video, text_tokens(job.backbone)), job.train.parameters == "full"
        self.forward, self.judged = operations(architecture, *size)  # backward passes: through frozen weights,
        _, self.backward = operations(architecture, *size, full=full)  # and of those that train
        self.known = rates.own or parameter_count(architecture) >= SMALLEST
        size = latent_shape(architecture, job.video.height, job.video.width, job.video.num_frames)
        self.channels, self.frames = size[:2]
        self.clip_bytes = 2 * math.prod(size)  # of latents in bfloat16
        given = self._first_frame_shapes(size)
        self.image_bytes = 2 * sum(map(math.prod, given.values()))
        self.stacked = given.get(CONDITION) == size  # the VAE reads a whole clip for its first frame
        self.group_bytes = (1 + job.pipeline.losers.count) * self.clip_bytes + self.image_bytes

    def stages(self, groups: int) -> list[Stage]:
        """From clips to a trained model; for 0 groups, training alone."""
        losers = self.job.pipeline.losers
        made, found = groups * losers.count, []
        if self.job.pipeline.resample.budget and self.job.pipeline.resample.tau:
            found.append(self._difficulty())
        if made:
            sampler = losers.sampler(self.job.sampler)
            passes = self.passes(sampler, losers.start_time)
            seconds, disk = self._seconds(made * passes * self.forward, self.rates.sampling), made * self.clip_bytes
            more = ", as if cache ended none early" if sampler.cache else ""
            found.append(Stage("losers", f"{made:,} clips of {passes} passes{more}", seconds, disk))
        if made and self.job.judge.name:
            found.append(Stage("judge", f"{made:,} clips decoded", self._vae(self.rates.decode, made)))
        if groups and self.job.targets.tracks:
            seconds = groups / self.rates.targets if self.rates.targets else None
            found.append(Stage("targets", f"of {groups:,} clips", seconds))
        if groups:
            twice = 2 * self.group_bytes - losers.count * self.clip_bytes  # in the stage's folder and in shards
            clips = f"{groups:,} clips and as many first frames" if self.stacked else f"{groups:,} clips"
            words = f"{clips}; {self.group_bytes:,} bytes per group, without its text"
            found.append(
                Stage("encode", words, self._vae(self.rates.encode, groups * (1 + self.stacked)), groups * twice)
            )
        return [*found, self._training()]

    def passes(self, sampler: SamplerConfig, start: float = 1.0) -> int:
        """Network passes of a clip."""
        config = replace(self.job.backbone, path="", random_weights=True)
        return sampling_passes(load_backbone(config, "cpu", parts=()), sampler, start=start)

    def _seconds(self, work: float, rate: float) -> float | None:
        return work / rate if self.known else None

    def _vae(self, rates: dict[str, float], clips: int) -> float | None:
        rate = rates.get(str(self.channels))
        return clips * megapixels(self.job.video) / rate if rate else None

    def _difficulty(self) -> Stage:
        clips, passes = self.job.pipeline.resample.representatives, self.passes(self.job.sampler)
        seconds = self._seconds(clips * passes * self.forward, self.rates.sampling)
        hours = "" if seconds is None else f": {seconds / 3600:.2f} h per action"
        return Stage(
            "difficulty", f"{clips} clips of {passes} passes per action, as many as the rows have{hours}", None
        )

    def _training(self) -> Stage:
        job, losers = self.job, self.job.pipeline.losers.count
        clips = 1 if self.supervised else clips_per_group(job.objective.loss, job.objective.winner, losers)
        work = clips * (self.forward + self.backward) + (0 if self.supervised else clips * self.forward)
        words = "winners alone" if self.supervised else f"{clips} clips of each and their reference"
        if job.self_score.strength > 0:  # the winner's score, the prediction's, and back through that
            work += (2 * self.forward + self.judged) / job.self_score.every
            every = "" if job.self_score.every == 1 else f" every {job.self_score.every} steps"
            words += f", the self-score{every}"
        steps, batch = job.optim.steps, job.optim.batch_size
        seconds = self._seconds(steps * batch * work, self.rates.training)
        return Stage("training", f"{steps:,} steps of {batch} groups, {words}", seconds)

    def _first_frame_shapes(self, clip: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        """Of what a group holds of its clip's first frame, if anything; clip: of the latents (C, F, H, W)."""
        family, asked = BACKBONES[self.job.backbone.family], self.job.pipeline.first_frame
        wanted = family.first_frame[0] if asked is None else asked
        frames = self.job.backbone.prefix_frames
        return family.first_frame_shapes(self.architecture, clip, frames) if wanted else {}


def bill(
    argv: list[str] | None,
    *,
    groups: int = 0,
    architecture: dict[str, Any] | None = None,
    supervised: bool = False,
) -> list[str]:
    """The bill's lines for a command's arguments. groups: where their number is known; else pipeline.groups_planned.
    architecture: of the pipeline in use, else the family's table has it. Raises ValueError for what cannot be
    counted."""
    job = recipes.load(Job, argv, partial=True)
    self_score.check(job)
    learning_rate(job.optim, 0)
    rates, source = read_rates(job.output)
    groups = groups or job.pipeline.groups_planned
    architecture = architecture or find_architecture(job.backbone)
    supervised = supervised or job.pipeline.losers.count == 0
    stages = Bill(job, rates, architecture, supervised=supervised).stages(groups)
    lines = [f"the bill        hours of one {rates.device} at the rates that {source}"]
    lines += [_line(stage.name, stage.seconds, stage.disk, stage.work) for stage in stages]
    if groups:
        seconds = [stage.seconds for stage in stages]
        more = "and what is not known" if None in seconds else ""
        lines.append(_line("in all", sum(filter(None, seconds)), sum(stage.disk for stage in stages), more))
    else:
        lines.append("  building the groups: pipeline.groups_planned=N counts it for N groups")
    return lines


def _line(name: str, seconds: float | None, disk: float, work: str) -> str:
    hours = "not known" if seconds is None else f"{seconds / 3600:,.1f} h"
    return f"  {name:<14}{hours:>11}{f'{disk / 1e9:,.0f} GB' if disk else '':>10}  {work}".rstrip()
