"""What the stages are made of: the settings of a build, and each stage with its part of them."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

import recipes
from data_pipeline import resample
from data_pipeline.cluster import ActionMatcher, ClusterConfig, match_settings
from data_pipeline.cot_filter import CotFilter, FilterConfig
from data_pipeline.difficulty import Difficulty
from data_pipeline.encode import Encode, takes_first_frame
from data_pipeline.generate import Generate, LoserMaker, losers_of
from data_pipeline.judge import JudgeLosers, Scores, read_scores
from data_pipeline.resample import ResampleConfig
from data_pipeline.selection import Cluster, Filter, Resample
from data_pipeline.sources import FrameReader, Pool, Source, open_sources
from data_pipeline.store import Store
from data_pipeline.tables import PassThrough, Stage
from data_pipeline.target_stage import Targets
from data_pipeline.targets import TargetMaker, TargetsConfig
from eval.judges import JudgeConfig, build_judge
from eval.judges.scores import Judge
from train.backbones import BACKBONES, load_backbone
from train.backbones.base import Backbone, BackboneConfig
from train.clips import VideoConfig
from train.sampling import SamplerConfig

STAGES = ("pool", "filter", "cluster", "difficulty", "resample", "generate", "judge", "targets", "encode")
OPERATIONAL = {  # settings of servers and tools that do not change an answer
    "api_key_env",
    "backoff",
    "base_url",
    "batch_size",
    "cache",
    "checkout",
    "concurrency",
    "python",
    "retries",
    "timeout",
    "timeout_s",
}


@dataclass
class PipelineConfig:
    manifest: Any = ""  # where the clips come from, see sources.py; several joined with commas, or a list
    groups: str = "${output}/groups"  # folder of the preference groups
    stage: str = "all"  # one stage, a range like filter..resample, or all
    table_rows: int = 10_000  # rows a unit of the stages before generate
    # Whether groups hold their clip's first frame and losers begin with it (image-to-video). A choice of wan22_ti2v;
    # null: the family's own way, with it for wan22_i2v and from text alone for all others.
    first_frame: bool | None = None
    num_losers: int = 4  # M, generated clips a group; 0 for supervised training, which needs no transformer here
    unit_size: int = 16  # rows a unit from generate on: one shard; its losers are judged together
    batch_size: int = 1  # losers sampled together, per GPU; an interruption costs at most these
    encode_batch: int = 1  # clips encoded or decoded together, per GPU
    filter: FilterConfig = field(default_factory=FilterConfig)  # without filter.vlm.model all rows pass
    cluster: ClusterConfig = field(default_factory=ClusterConfig)  # without cluster.model rows keep their actions
    resample: ResampleConfig = field(default_factory=ResampleConfig)  # without resample.budget all rows stay
    targets: TargetsConfig = field(default_factory=TargetsConfig)  # without targets.tracks there are none
    judge: JudgeConfig = field(default_factory=JudgeConfig)  # of difficulty, and of the losers that have no scores
    scores: str = ""  # CSV with the columns key, loser, semantic, physical; goes before the manifest's own scores
    save_losers: bool = False  # also write every loser as <output>/losers/<key>-<loser>.mp4
    array_index: int = 0  # this process is one of array_count independent ones, see launch/build_array.sbatch
    array_count: int = 1


@dataclass
class Config:
    recipe: str = ""  # name or path of a recipe
    output: str = "runs/default"  # everything goes below this folder
    seed: int = 0  # of every draw
    dry_run: bool = False  # print the derived numbers and stop
    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    video: VideoConfig = field(default_factory=VideoConfig)
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    pipeline: PipelineConfig = field(default_factory=PipelineConfig)


class Stages:
    """Makes the stages of a build; weights are loaded when a stage first needs them."""

    def __init__(self, config: Config, device: torch.device):
        self.config, self.device = config, device
        self.folder = Path(config.output) / "pipeline"

    def make(self, name: str) -> Stage:
        return getattr(self, f"_{name}")(self.folder / name)

    def check(self, chosen: Sequence[str]) -> None:
        """ValueError for what would stop one of the chosen stages, before any work."""
        sources_of(self.config)
        if STAGES.index(chosen[-1]) >= STAGES.index("difficulty" if self.tries_the_model else "generate"):
            assert self.winner_settings and self.scores is not None
        if self.config.pipeline.judge.name:
            self.build_judge()
        if "filter" in chosen and self.config.pipeline.filter.vlm.model:
            CotFilter(self.config.pipeline.filter)
        if "cluster" in chosen and self.config.pipeline.cluster.model:
            ActionMatcher(self.config.pipeline.cluster, self.device)
        resample.check(self.config.pipeline.resample)
        if self.tries_the_model and not self.config.pipeline.judge.name:
            raise ValueError(
                f"pipeline.resample.tau={self.config.pipeline.resample.tau:g} needs a judge of the model's own clips:"
                " set pipeline.judge.name, or tau=0 to take all actions alike"
            )
        if "targets" in chosen:
            TargetMaker(self.config.pipeline.targets, self.config.video, self.device)

    def load(self, parts: Sequence[str]) -> Backbone:
        return load_backbone(self.config.backbone, self.device, parts=tuple(parts))

    def build_judge(self) -> Judge:
        return build_judge(self.config.pipeline.judge, self.config.video.fps, self.device)

    @property
    def judge_settings(self) -> Any:
        """What a judge's scores depend on, beside the clips."""
        judge = self.config.pipeline.judge
        return [judge.name, outcome_settings(getattr(judge, judge.name))] if judge.name else None

    @cached_property
    def scores(self) -> Scores:
        return read_scores(self.config.pipeline.scores) if self.config.pipeline.scores else {}

    @cached_property
    def winner_settings(self) -> dict[str, Any]:
        """What the encoded winners depend on, beside their rows."""
        config = self.config
        shell = load_backbone(config.backbone, "cpu", parts=())
        shell.latent_shape(config.video.height, config.video.width, config.video.num_frames)
        settings = {
            "fingerprint": shell.fingerprint,
            "dtype": config.backbone.dtype,
            "text_length": config.backbone.text_length,
            "video": asdict(config.video),
        }
        first_frame = {"first_frame": self.first_frame}
        return settings | first_frame if len(shell.first_frame) > 1 else settings  # it says nothing of other families

    @property
    def first_frame(self) -> bool:
        return takes_first_frame(BACKBONES[self.config.backbone.family], self.config.pipeline.first_frame)

    @property
    def loser_settings(self) -> dict[str, Any]:
        return self._settings_of(self.config.pipeline.num_losers)

    def _settings_of(self, num_losers: int) -> dict[str, Any]:
        """What generated clips depend on, beside their rows."""
        config = self.config
        more = {"sampler": asdict(config.sampler), "seed": config.seed, "num_losers": num_losers}
        return self.winner_settings | more

    def _loser_maker(self, store: Store, *, num_losers: int) -> LoserMaker:
        config = self.config
        return LoserMaker(
            store,
            self.load,
            self._settings_of(num_losers),
            config.video,
            config.sampler,
            self.device,
            seed=config.seed,
            num_losers=num_losers,
            first_frame=self.first_frame,
            batch_size=config.pipeline.batch_size,
        )

    def _pool(self, folder: Path) -> Stage:
        settings = self.config.pipeline
        return Pool(folder, sources_of(self.config), num_losers=settings.num_losers, table_rows=settings.table_rows)

    def _filter(self, folder: Path) -> Stage:
        settings = self.config.pipeline.filter
        if not settings.vlm.model:
            return PassThrough(folder, "filter")
        reader = FrameReader(self.config.video, self.device)
        # Without a cache of its own, so that a build that is killed asks nothing twice.
        cache = settings.vlm.cache or str(folder / "answers")
        settings = replace(settings, vlm=replace(settings.vlm, cache=cache))
        return Filter(folder, settings, outcome_settings(settings), reader)

    def _cluster(self, folder: Path) -> Stage:
        settings = self.config.pipeline.cluster
        if not settings.model:
            return PassThrough(folder, "cluster")
        return Cluster(folder, settings, match_settings(settings), self.device)

    @property
    def tries_the_model(self) -> bool:
        """Whether resampling asks how well the model does each action."""
        return self.config.pipeline.resample.budget > 0 and self.config.pipeline.resample.tau > 0

    def _difficulty(self, folder: Path) -> Stage:
        if not self.tries_the_model:
            return PassThrough(folder, "difficulty")
        return Difficulty(
            folder,
            self._loser_maker(Store(folder / "clips"), num_losers=1),
            self.build_judge,
            self.judge_settings,
            representatives=self.config.pipeline.resample.representatives,
            decode_batch=self.config.pipeline.encode_batch,
        )

    def _resample(self, folder: Path) -> Stage:
        config, settings = self.config, self.config.pipeline.resample
        if not settings.budget:
            return PassThrough(folder, "resample")
        return Resample(folder, settings, seed=config.seed, part_rows=config.pipeline.table_rows)

    def _targets(self, folder: Path) -> Stage:
        if not self.config.pipeline.targets.tracks:
            return PassThrough(folder, "targets")
        return self._make_targets(folder)

    def _make_targets(self, folder: Path) -> Targets:
        config = self.config
        return Targets(folder, config.pipeline.targets, self.target_settings, config.video, self.device)

    @property
    def target_settings(self) -> dict[str, Any]:
        """What the targets depend on, beside their rows."""
        return {"targets": outcome_settings(self.config.pipeline.targets), "video": asdict(self.config.video)}

    def _generate(self, folder: Path) -> Stage:
        settings = self.config.pipeline
        maker = self._loser_maker(losers_of(folder), num_losers=settings.num_losers)
        return Generate(folder, maker, unit_size=settings.unit_size)

    def _judge(self, folder: Path) -> Stage:
        config, settings = self.config, self.config.pipeline
        return JudgeLosers(
            folder,
            self.load,
            self.build_judge if settings.judge.name else None,
            self.judge_settings,
            self.scores,
            losers=losers_of(self.folder / "generate"),
            loser_settings=self.loser_settings,
            num_losers=settings.num_losers,
            decode_batch=settings.encode_batch,
            save_to=Path(config.output) / "losers" if settings.save_losers else None,
            fps=config.video.fps,
        )

    def _encode(self, folder: Path) -> Stage:
        settings = self.config.pipeline
        return Encode(
            folder,
            Path(settings.groups),
            self.load,
            self.winner_settings,
            self.config.video,
            self.device,
            losers=losers_of(self.folder / "generate"),
            loser_settings=self.loser_settings,
            extras=self._make_targets(self.folder / "targets").load if settings.targets.tracks else None,
            extra_settings=self.target_settings if settings.targets.tracks else None,
            num_losers=settings.num_losers,
            first_frame=self.first_frame,
            encode_batch=settings.encode_batch,
        )


def sources_of(config: Config) -> list[Source]:
    settings = config.pipeline
    return open_sources(settings.manifest, num_losers=settings.num_losers, video=config.video, seed=config.seed)


def outcome_settings(settings: Any) -> dict[str, Any]:
    """A section of settings without those that say how fast, not what: their change makes nothing outdated."""
    return recipes.without(asdict(settings), OPERATIONAL)
