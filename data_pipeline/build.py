"""Build preference groups from raw clips: eight stages, each of which leaves a table behind and can run alone.

    accelerate launch data_pipeline/build.py recipe=tiny pipeline.manifest=clips.csv
    python -m data_pipeline.build recipe=tiny pipeline.manifest=clips.csv --dry-run      # print the numbers and stop
    python -m data_pipeline.build recipe=tiny pipeline.manifest=sandbox:mixed:100        # simulated clips, no files
    python -m data_pipeline.build recipe=wan14b pipeline.stage=pool..resample            # choose; the GPUs come later

    pool       all clips of all sources, with their prompts                        sources.py
    filter     a language model keeps the physics-rich ones                        cot_filter.py
    cluster    an action for each                                                  cluster.py
    resample   as many of each action as its difficulty asks for                   resample.py
    generate   the losers: the model's own clips                                   generate.py
    judge      scores of the losers                                                judge.py
    targets    tracks and other references of the winners                          targets.py
    encode     latents and text embeddings, all of it into shards                  encode.py

A stage is cut into units, shared over the ranks. A unit that is complete and whose inputs are unchanged is skipped, so
a build that was stopped continues when run again, on any number of ranks; the result is the same byte for byte.

    <output>/pipeline/<stage>/        tables, see tables.py; summary.json
    <groups>/unit-00000.tar, .json    a shard and its marker (train/groups.py)
    <groups>/index.json               written last
    <groups>/build/quarantine.jsonl   the rows that could not be used, with the reason
    <output>/losers/                  with pipeline.save_losers: the losers as mp4, and losers.csv for a judge
"""

import gc
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch

import recipes
from data_pipeline.cot_filter import CotFilter, FilterConfig
from data_pipeline.encode import Encode
from data_pipeline.generate import Generate, losers_of
from data_pipeline.judge import JudgeLosers, Scores, read_scores
from data_pipeline.selection import Filter
from data_pipeline.sources import FrameReader, Pool, Source, open_sources, read_pool
from data_pipeline.tables import PassThrough, Stage, Table, read_dropped, read_summary, write_text
from data_pipeline.target_stage import Targets
from data_pipeline.targets import TargetMaker, TargetsConfig
from data_pipeline.workers import Team, conclude_stage, plan_stage, run_stage, stage_table
from eval.judges import JudgeConfig, build_judge
from eval.judges.scores import Judge
from train.backbones import BACKBONES, find_architecture, load_backbone
from train.backbones.base import Backbone, BackboneConfig, latent_shape, num_tokens
from train.clips import VideoConfig
from train.sampling import SamplerConfig

STAGES = ("pool", "filter", "cluster", "resample", "generate", "judge", "targets", "encode")
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
CHOICES = ("no physics", "not chosen")  # reasons that say nothing bad of a row: they are not quarantined


@dataclass
class PipelineConfig:
    manifest: Any = ""  # where the clips come from, see sources.py; several joined with commas, or a list
    groups: str = "${output}/groups"  # folder of the preference groups
    stage: str = "all"  # one stage, a range like filter..resample, or all
    table_rows: int = 10_000  # rows a unit of the stages before generate
    num_losers: int = 4  # M, generated clips a group; 0 for supervised training, which needs no transformer here
    unit_size: int = 16  # rows a unit from generate on: one shard; its losers are judged together
    batch_size: int = 1  # losers sampled together, per GPU; an interruption costs at most these
    encode_batch: int = 1  # clips encoded or decoded together, per GPU
    filter: FilterConfig = field(default_factory=FilterConfig)  # without filter.vlm.model all rows pass
    targets: TargetsConfig = field(default_factory=TargetsConfig)  # without targets.tracks there are none
    judge: JudgeConfig = field(default_factory=JudgeConfig)  # of the losers that have no scores, and of resample
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


def main(argv: list[str] | None = None) -> None:
    config = recipes.load(Config, argv)
    check(config)
    if config.dry_run:
        print(plan(config))
        return
    build(config)


def check(config: Config) -> None:
    """ValueError for settings that cannot work, before any work."""
    settings = config.pipeline
    least = {"num_losers": 0, "unit_size": 1, "table_rows": 1, "batch_size": 1, "encode_batch": 1, "array_count": 1}
    for name, bound in least.items():
        if getattr(settings, name) < bound:
            raise ValueError(f"pipeline.{name}={getattr(settings, name)}: use {bound} or more")
    if not 0 <= settings.array_index < settings.array_count:
        raise ValueError(
            f"pipeline.array_index={settings.array_index}: use 0 ... array_count - 1 = {settings.array_count - 1}"
        )
    chosen = selected(settings.stage)
    if settings.array_count > 1 and len(chosen) > 1:
        raise ValueError(
            f"pipeline.stage={settings.stage} with array_count={settings.array_count}: the tasks of an array do not "
            "wait for each other; run one array a stage, as launch/build_array.sbatch does"
        )


def selected(stage: str) -> tuple[str, ...]:
    """The stages that `pipeline.stage` names: all, one, or first..last."""
    first, dots, last = stage.partition("..")
    if stage == "all":
        return STAGES
    last = last if dots else first
    for name in (first, last):
        if name not in STAGES:
            raise ValueError(
                f"pipeline.stage={stage}: {name!r} is no stage; use all, one of {', '.join(STAGES)}, or a..b"
            )
    chosen = STAGES[STAGES.index(first) : STAGES.index(last) + 1]
    if not chosen:
        raise ValueError(f"pipeline.stage={stage}: {last} comes before {first}; the order is {', '.join(STAGES)}")
    return chosen


def plan(config: Config) -> str:
    """The derived numbers, without weights. Raises ValueError where the video size does not suit the backbone."""
    video, settings, losers = config.video, config.pipeline, config.pipeline.num_losers
    architecture = _architecture(config.backbone)
    size = (video.height, video.width, video.num_frames)
    channels, frames, rows, columns = latent_shape(architecture, *size)
    family = BACKBONES[config.backbone.family]
    # Image-to-video families keep image latents: stacked on the input they are a whole video, else the first frame.
    stacked = family.input_channels(architecture) > channels
    image = frames if stacked else 1 if family.expand_timesteps else 0
    clip_bytes = 2 * channels * frames * rows * columns  # bfloat16
    group_bytes = (1 + losers) * clip_bytes + clip_bytes // frames * image
    text_bytes = 2 * config.backbone.text_length * architecture["transformer"]["text_dim"]
    pieces = [(len(kept), len(dropped)) for kept, dropped in read_pool(_sources(config), settings.table_rows)]
    usable = sum(kept for kept, _ in pieces)
    most = usable
    lines = {
        "rows": f"{sum(map(sum, pieces))}, of which {usable} usable before their clips are read",
        "groups": f"{most} at most",
        "units": f"{-(-most // settings.unit_size)} of {settings.unit_size} rows",
        "losers to generate": f"{most * losers} clips, {losers} a group, {config.sampler.steps} steps each",
        "video": f"{video.num_frames} frames of {video.height}x{video.width} at {video.fps:g} fps",
        "latent shape": f"({channels}, {frames}, {rows}, {columns})",
        "tokens": f"{num_tokens(architecture, *size)} a clip",
        "bytes a group": f"{group_bytes} and at most {text_bytes} of text",
        "bytes in all": f"{most * group_bytes / 1e9:.3f} GB and at most {most * text_bytes / 1e9:.3f} GB of text; "
        "kept twice, in the pipeline's folder and in shards",
    }
    lines = [f"{name:<20}{value}" for name, value in lines.items()]
    return "\n".join([*lines, TargetMaker(settings.targets, video, "cpu").describe()])


def _architecture(backbone: BackboneConfig) -> dict[str, Any]:
    """Of the local pipeline folder if there is one, else of the family's table: a dry run downloads nothing."""
    if not backbone.random_weights and Path(backbone.path).expanduser().is_dir() and backbone.path:
        return load_backbone(backbone, "cpu", parts=()).architecture
    return find_architecture(backbone)


def _sources(config: Config) -> list[Source]:
    settings = config.pipeline
    return open_sources(settings.manifest, num_losers=settings.num_losers, video=config.video, seed=config.seed)


def outcome_settings(settings: Any) -> dict[str, Any]:
    """A section of settings without those that say how fast, not what: their change makes nothing outdated."""
    plain = asdict(settings)

    def without(tree: Any) -> Any:
        if not isinstance(tree, dict):
            return tree
        return {key: without(value) for key, value in tree.items() if key not in OPERATIONAL}

    return without(plain)


# ---- the stages ------------------------------------------------------------------------------------------------------


class Stages:
    """Makes the stages of a build; weights are loaded when a stage first needs them."""

    def __init__(self, config: Config, device: torch.device):
        self.config, self.device = config, device
        self.folder = Path(config.output) / "pipeline"

    def make(self, name: str) -> Stage:
        return getattr(self, f"_{name}")(self.folder / name)

    def check(self, chosen: Sequence[str]) -> None:
        """ValueError for what would stop one of the chosen stages, before any work."""
        _sources(self.config)
        if STAGES.index(chosen[-1]) >= STAGES.index("generate"):
            assert self.winner_settings and self.scores is not None
        if self.config.pipeline.judge.name:
            self.build_judge()
        if "filter" in chosen and self.config.pipeline.filter.vlm.model:
            CotFilter(self.config.pipeline.filter)
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
        return {
            "fingerprint": shell.fingerprint,
            "dtype": config.backbone.dtype,
            "text_length": config.backbone.text_length,
            "video": asdict(config.video),
        }

    @cached_property
    def loser_settings(self) -> dict[str, Any]:
        """What the losers depend on, beside their rows."""
        config = self.config
        more = {"sampler": asdict(config.sampler), "seed": config.seed, "num_losers": config.pipeline.num_losers}
        return self.winner_settings | more

    def _pool(self, folder: Path) -> Stage:
        settings = self.config.pipeline
        return Pool(folder, _sources(self.config), num_losers=settings.num_losers, table_rows=settings.table_rows)

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
        return PassThrough(folder, "cluster")

    def _resample(self, folder: Path) -> Stage:
        return PassThrough(folder, "resample")

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
        config, settings = self.config, self.config.pipeline
        return Generate(
            folder,
            self.load,
            self.loser_settings,
            config.video,
            config.sampler,
            self.device,
            seed=config.seed,
            num_losers=settings.num_losers,
            unit_size=settings.unit_size,
            batch_size=settings.batch_size,
        )

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
            encode_batch=settings.encode_batch,
        )


# ---- running them ----------------------------------------------------------------------------------------------------


def build(config: Config) -> None:
    """Run the selected stages. Raises ValueError where an earlier stage is not finished, and where no row is left."""
    settings, chosen = config.pipeline, selected(config.pipeline.stage)
    team = Team(settings.array_index, settings.array_count)
    stages = Stages(config, team.device)
    if team.is_first:
        stages.check(chosen)
        recipes.save(config, Path(settings.groups) / "build" / "recipe.yaml")
    before: Table | None = None
    for name in STAGES[: STAGES.index(chosen[-1]) + 1]:
        stage, selected_now = stages.make(name), name in chosen
        units, todo = team.decide(partial(plan_stage, stage, before, retry=selected_now))
        if selected_now:
            table = run_stage(stage, units, todo, before, team)
        elif todo:
            raise ValueError(
                f"pipeline.stage={settings.stage} needs the table of {name}, of which {len(todo)} of {len(units)} units"
                f" are missing or do not fit the settings: run pipeline.stage={name} first"
            )
        else:
            table = stage_table(stage, units)
        if table is None:
            return
        if team.is_first:
            conclude_stage(stage, units, table, show=selected_now)
            if not len(table):
                listing = _write_quarantine(config, name)
                raise ValueError(f"no row of {settings.manifest} is usable: {_reasons(config, name)}; see {listing}")
            if selected_now:
                stage.conclude(table)
        before = table
        del stage  # and its weights, before the next stage loads its own
        gc.collect()
        torch.cuda.empty_cache()
    if team.is_first:
        _write_quarantine(config, chosen[-1])


def _reasons(config: Config, last: str) -> dict[str, int]:
    """Why rows were dropped, in all stages up to `last`."""
    total: Counter[str] = Counter()
    for name in STAGES[: STAGES.index(last) + 1]:
        total.update(read_summary(Path(config.output) / "pipeline" / name)["dropped"])
    return dict(total.most_common())


def _write_quarantine(config: Config, last: str) -> Path:
    """List the rows that could not be used in the stages up to `last`, in order."""
    lines = []
    for name in STAGES[: STAGES.index(last) + 1]:
        folder = Path(config.output) / "pipeline" / name
        for number in range(read_summary(folder)["units"]):
            for row in read_dropped(folder, number).to_pylist():
                if row["reason"] not in CHOICES:
                    place = json.loads(row["place"])
                    row = {"stage": name, "row": place["row"], **row, "place": place}
                    lines.append(json.dumps(row, ensure_ascii=False) + "\n")
    path = Path(config.pipeline.groups) / "build" / "quarantine.jsonl"
    write_text(path, "".join(lines))
    return path


if __name__ == "__main__":
    main()
