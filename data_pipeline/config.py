"""The settings of a build, and what its stages are made from."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch

import recipes
from data_pipeline.scores import Scores, read_scores
from data_pipeline.sources import Source, open_sources
from data_pipeline.store import Store
from eval.judges import JudgeConfig, Judging, build_judge, judge_settings
from eval.judges.external_tool import RatersConfig
from eval.judges.scores import Judge
from eval.vlm.client import VlmConfig
from train.backbones import BACKBONES, load_backbone
from train.backbones.base import Backbone, BackboneConfig
from train.clips import VideoConfig
from train.cost import Job
from train.sampling import LosersConfig, SamplerConfig
from train.teachers.targets import TargetsConfig

# Settings of servers and tools that do not change an answer: their change makes nothing outdated.
OPERATIONAL = {"api_key_env", "backoff", "base_url", "cache", "concurrency", "retries", "timeout_s"}
OPERATIONAL |= {"batch_size", "checkout", "python", "timeout"}


@dataclass
class FilterConfig:
    enabled: bool = False  # ask the recipe's `vlm` about every row; else all rows pass
    threshold: float = 0.6  # physics_richness from which a clip counts as physics-rich; PhyGDPO, algorithm 1, step 4

    def __post_init__(self) -> None:
        if not 0 <= self.threshold <= 1:
            raise ValueError(f"pipeline.filter.threshold={self.threshold} does not lie in [0, 1]; the paper has 0.6")


@dataclass
class ClusterConfig:
    model: str = ""  # sentence-transformers model: hub id or folder; empty: no clustering, all rows pass as they are
    threshold: float = 0.3  # cosine below which a prompt's action is `other`
    actions: str = ""  # YAML file, category -> {name: phrase}, instead of the shipped list

    def __post_init__(self) -> None:
        if not -1 <= self.threshold <= 1:
            raise ValueError(
                f"pipeline.cluster.threshold={self.threshold} is no cosine: give a number from -1 to 1, such as 0.3"
            )


@dataclass
class ResampleConfig:
    budget: int = 0  # N, clips taken in all, at most; 0: all. Paper: 20000, of which the caps left 17K
    tau: float = 3.0  # how much the difficult is preferred; 0: all actions alike, and nothing has to be generated
    representatives: int = 8  # n_c, prompts of each action that the model is tried on
    redistribute: bool = False  # give what actions with too few clips leave over to the others

    def __post_init__(self) -> None:
        if self.budget < 0:
            raise ValueError(f"pipeline.resample.budget={self.budget}: use 0 (all clips) or more")
        if not 0 <= self.tau < float("inf"):
            raise ValueError(f"pipeline.resample.tau={self.tau}: use 0 (all actions alike) or more, such as 3")
        if self.representatives < 1:
            raise ValueError(f"pipeline.resample.representatives={self.representatives}: use 1 or more")

    @property
    def tries_the_model(self) -> bool:
        """Whether it matters how well the model does each action."""
        return self.budget > 0 and self.tau > 0


@dataclass
class PipelineConfig:
    manifest: Any = ""  # where the clips come from, see sources.py; several joined with commas, or a list
    groups: str = "${output}/groups"  # folder of the preference groups
    stage: str = "all"  # one stage, a range like filter..resample, or all
    # Whether groups hold their clip's first frame (backbone.prefix_frames of them) and losers begin with it: image to
    # video, or video to video. A choice of wan22_ti2v and cosmos25; null: the family's own way, with it for those
    # called _i2v and from text alone for all others.
    first_frame: bool | None = None
    losers: LosersConfig = field(default_factory=LosersConfig)
    unit_size: int = 16  # rows per unit from generate on: one shard; its losers are judged together
    batch_size: int = 1  # losers sampled together, per GPU; an interruption costs at most these
    encode_batch: int = 1  # clips encoded or decoded together, per GPU
    filter: FilterConfig = field(default_factory=FilterConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)  # without cluster.model rows keep their actions
    resample: ResampleConfig = field(default_factory=ResampleConfig)  # without resample.budget all rows stay
    scores: str = ""  # CSV with the columns key, loser, semantic, physical; goes before the manifest's own scores
    groups_planned: int = 0  # for the bill of a dry run, where there are no rows or groups yet to be counted
    save_losers: bool = False  # also write every loser as <output>/losers/<key>-<loser>.mp4
    array_index: int = 0  # this process is one of array_count independent ones, see launch/build_array.sbatch
    array_count: int = 1

    def __post_init__(self) -> None:
        least = {"unit_size": 1, "batch_size": 1, "encode_batch": 1, "array_count": 1, "groups_planned": 0}
        for name, bound in least.items():
            if getattr(self, name) < bound:
                raise ValueError(f"pipeline.{name}={getattr(self, name)}: use {bound} or more")
        if not 0 <= self.array_index < self.array_count:
            raise ValueError(
                f"pipeline.array_index={self.array_index}: use 0 ... array_count - 1 = {self.array_count - 1}"
            )


@dataclass
class Config:
    bill: ClassVar[type] = Job  # what a dry run reads besides
    recipe: str = ""  # name or path of a recipe
    output: str = "runs/default"  # everything goes below this folder
    seed: int = 0  # of every draw
    dry_run: bool = False  # print the derived numbers and stop
    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    video: VideoConfig = field(default_factory=VideoConfig)
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    vlm: VlmConfig = field(default_factory=VlmConfig)  # of the filter, where it is enabled, and of the judge "vlm"
    judge: JudgeConfig = field(default_factory=JudgeConfig)  # of difficulty, and of the losers that have no scores
    raters: RatersConfig = field(default_factory=RatersConfig)
    targets: TargetsConfig = field(default_factory=TargetsConfig)  # without targets.tracks there are none
    pipeline: PipelineConfig = field(default_factory=PipelineConfig)


class Setup:
    """What the stages of one build are made from. `*_settings` are plain values that finished work depends on, beside
    its rows: they go into digests, so their form stays as it is."""

    def __init__(self, config: Config, device: torch.device | str):
        self.config, self.pipeline, self.video, self.device = config, config.pipeline, config.video, device
        self.folder = Path(config.output) / "pipeline"

    @property
    def left_out(self) -> set[str]:
        """The stages that are not configured: they pass all rows on as they are."""
        resample = self.pipeline.resample
        wanted = {
            "filter": self.pipeline.filter.enabled,
            "cluster": self.pipeline.cluster.model,
            "difficulty": resample.tries_the_model,
            "resample": resample.budget,
            "targets": self.config.targets.tracks,
        }
        return {name for name, value in wanted.items() if not value}

    def sources(self) -> list[Source]:
        return open_sources(
            self.pipeline.manifest, num_losers=self.pipeline.losers.count, video=self.video, seed=self.config.seed
        )

    def load(self, parts: Sequence[str]) -> Backbone:
        return load_backbone(self.config.backbone, self.device, parts=tuple(parts))

    def build_judge(self) -> Judge:
        return build_judge(Judging.of(self.config), self.video.fps, self.device)

    @property
    def judge_settings(self) -> Any:
        name = self.config.judge.name
        return [name, recipes.without(judge_settings(Judging.of(self.config))[name], OPERATIONAL)] if name else None

    @cached_property
    def scores(self) -> Scores:
        return read_scores(self.pipeline.scores) if self.pipeline.scores else {}

    @property
    def first_frame(self) -> bool:
        """Whether groups hold their clip's first frame. ValueError where the family has no such way, and for a prefix
        that they do not hold."""
        family, asked = BACKBONES[self.config.backbone.family], self.pipeline.first_frame
        family.check_prefix(self.prefix_frames, "backbone.prefix_frames", self.video.num_frames)
        if self.prefix_frames > 1 and not asked:
            raise ValueError(f"backbone.prefix_frames={self.prefix_frames}: set pipeline.first_frame=true, or it to 1")
        if asked is None:
            return family.first_frame[0]
        if asked not in family.first_frame:
            key = f"pipeline.first_frame={str(asked).lower()}"
            way = "begins every clip with an image" if family.first_frame[0] else "generates from text alone"
            raise ValueError(f"{key}: this backbone.family {way}; leave the key out")
        return asked

    @property
    def prefix_frames(self) -> int:
        """Video frames that groups hold and losers begin with, where they do."""
        return self.config.backbone.prefix_frames

    @cached_property
    def shell(self) -> Backbone:
        """The backbone without weights."""
        return load_backbone(self.config.backbone, "cpu", parts=())

    @cached_property
    def winner_settings(self) -> dict[str, Any]:
        """Of encoded winners, which know nothing of backbone.loras."""
        config, shell = self.config, self.shell
        shell.latent_shape(config.video.height, config.video.width, config.video.num_frames)
        settings = {
            "fingerprint": shell.fingerprints[0],
            "dtype": config.backbone.dtype,
            "text_length": config.backbone.text_length,
            "video": asdict(config.video),
        }
        first_frame: dict[str, Any] = {"first_frame": self.first_frame}
        if self.prefix_frames > 1:
            first_frame["prefix_frames"] = self.prefix_frames
        return settings | first_frame if len(shell.first_frame) > 1 else settings  # it says nothing of other families

    def clip_settings(self, sampler: SamplerConfig, count: int) -> dict[str, Any]:
        """Of the model's own clips, `count` per row."""
        more = {"sampler": sampler.settings(), "seed": self.config.seed, "num_losers": count}
        loras = {"network": self.shell.fingerprint} if self.config.backbone.loras else {}
        return self.winner_settings | more | loras

    @cached_property
    def loser_sampler(self) -> SamplerConfig:
        return self.pipeline.losers.sampler(self.config.sampler)

    @property
    def loser_settings(self) -> dict[str, Any]:
        losers = self.pipeline.losers
        start = {"start_time": losers.start_time} if losers.start_time < 1 else {}
        return self.clip_settings(self.loser_sampler, losers.count) | start

    @property
    def losers(self) -> Store:
        """The losers that the generate stage keeps: {"losers": (M, C, F, H, W) bfloat16} per row."""
        return Store(self.folder / "generate" / "losers", self.loser_settings)

    @property
    def targets(self) -> Store:
        """The tensors that the targets stage keeps."""
        settings = {"targets": recipes.without(asdict(self.config.targets), OPERATIONAL), "video": asdict(self.video)}
        return Store(self.folder / "targets" / "tensors", settings)
