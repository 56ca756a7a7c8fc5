"""Build preference groups: decode and encode each clip of a manifest, generate its losers, score them, write shards.

    accelerate launch data_pipeline/build.py recipe=tiny pipeline.manifest=clips.csv
    python -m data_pipeline.build recipe=tiny pipeline.manifest=clips.csv --dry-run      # print the numbers and stop
    python -m data_pipeline.build recipe=tiny pipeline.manifest=sandbox:mixed:100        # simulated clips, no files

The manifest is cut into units of `pipeline.unit_size` rows, one shard each, shared over the ranks. A unit whose shard
is complete and whose inputs are unchanged is skipped, so a build that was stopped continues when run again. A changed
unit is rebuilt, but no clip is generated twice: groups whose own inputs are the same (the scores do not count) come
from the old shards, which wait in `retired/` until the new ones are written.

    <groups>/unit-00000.tar, .json    a shard and its marker (train/groups.py)
    <groups>/index.json               written last
    <groups>/build/report.json        counts of this build
    <groups>/build/quarantine.jsonl   the rows that were left out, with the reason
    <output>/losers/                  with pipeline.save_losers: the losers as mp4, and losers.csv for a judge
"""

import json
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import timedelta
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedType, InitProcessGroupKwargs
from accelerate.utils import broadcast_object_list
from torch import Tensor
from tqdm import tqdm

import recipes
from data_pipeline import units
from data_pipeline.encode import encode_clips, unpad
from data_pipeline.generate import generate_losers, loser_path, loser_seed, save_losers
from data_pipeline.judge import NEUTRAL, Judge, build_judge, check_judge, loser_scores, read_scores, write_table
from data_pipeline.sources import (
    FrameReader,
    Manifest,
    Quarantined,
    Row,
    is_simulated,
    read_manifest,
    simulated_manifest,
)
from data_pipeline.units import Task, Unit
from train.backbones import BACKBONES, find_architecture, load_backbone
from train.backbones.base import Backbone, BackboneConfig, Conditioning, latent_shape, num_tokens
from train.clips import ClipError, VideoConfig, to_pixels
from train.groups import Group, GroupSet, Loser, ShardWriter, write_index
from train.sampling import SamplerConfig

# Ranks meet only at the start and the end; the first to finish may wait for days.
TIMEOUT = timedelta(days=30)


@dataclass
class PipelineConfig:
    manifest: str = ""  # CSV or JSONL with the columns clip and prompt, or sandbox:<scene>:<count>; see sources.py
    groups: str = "${output}/groups"  # folder of the preference groups
    num_losers: int = 4  # M, generated clips a group; 0 for supervised training, which needs no transformer here
    unit_size: int = 16  # manifest rows a unit: one shard, and what an interruption costs at most per GPU
    batch_size: int = 1  # losers sampled together, per GPU; several groups' only within an encode_batch
    encode_batch: int = 1  # clips encoded or decoded together, per GPU
    judge: str = ""  # sandbox: scores every loser that has none | empty: they are neutral
    scores: str = ""  # CSV with the columns key, loser, semantic, physical; goes before the manifest's own scores
    save_losers: bool = False  # also write every loser as <output>/losers/<key>-<loser>.mp4


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
    for name, least in (("num_losers", 0), ("unit_size", 1), ("batch_size", 1), ("encode_batch", 1)):
        if getattr(config.pipeline, name) < least:
            raise ValueError(f"pipeline.{name}={getattr(config.pipeline, name)}: use {least} or more")
    check_judge(config.pipeline.judge)
    if not config.pipeline.manifest:
        raise ValueError("pipeline.manifest is empty: give a .csv or .jsonl with the columns clip and prompt")
    if config.dry_run:
        print(plan(config, _manifest(config)))
        return
    build(config)


def _manifest(config: Config) -> Manifest:
    path = config.pipeline.manifest
    if is_simulated(path):
        return simulated_manifest(path, config.video, seed=config.seed)
    return read_manifest(path, num_losers=config.pipeline.num_losers)


def plan(config: Config, manifest: Manifest) -> str:
    """The derived numbers, without weights. Raises ValueError where the video size does not suit the backbone."""
    video, losers = config.video, config.pipeline.num_losers
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
    usable = sum(isinstance(row, Row) for row in manifest.rows)
    lines = {
        "rows": f"{len(manifest.rows)}, of which {usable} usable before their clips are read",
        "units": f"{-(-len(manifest.rows) // config.pipeline.unit_size)} of {config.pipeline.unit_size} rows",
        "losers to generate": f"{usable * losers} clips, {losers} a group, {config.sampler.steps} steps each",
        "video": f"{video.num_frames} frames of {video.height}x{video.width} at {video.fps:g} fps",
        "latent shape": f"({channels}, {frames}, {rows}, {columns})",
        "tokens": f"{num_tokens(architecture, *size)} a clip",
        "bytes a group": f"{group_bytes} and at most {text_bytes} of text",
        "bytes in all": f"{usable * group_bytes / 1e9:.3f} GB and at most {usable * text_bytes / 1e9:.3f} GB of text",
    }
    return "\n".join(f"{name:<20}{value}" for name, value in lines.items())


def _architecture(backbone: BackboneConfig) -> dict[str, Any]:
    """Of the local pipeline folder if there is one, else of the family's table: a dry run downloads nothing."""
    if not backbone.random_weights and Path(backbone.path).expanduser().is_dir() and backbone.path:
        return load_backbone(backbone, "cpu", parts=()).architecture
    return find_architecture(backbone)


def build(config: Config) -> None:
    """Build all unfinished units on all ranks, then index the folder. Raises ValueError where no row is usable."""
    started = time.monotonic()
    handlers = [InitProcessGroupKwargs(timeout=TIMEOUT)]
    accelerator = Accelerator(cpu=not torch.cuda.is_available(), kwargs_handlers=handlers)
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        raise ValueError("a build gives each GPU a whole model: launch without DeepSpeed, as with launch/ddp.yaml")
    work = _prepare(config) if accelerator.is_main_process else None
    todo = [work.todo if work else None]
    broadcast_object_list(todo)  # the main process decides for all; old shards do not change from here on
    mine = todo[0][accelerator.process_index :: accelerator.num_processes]
    if mine:
        _build_units(config, mine, accelerator)
    accelerator.wait_for_everyone()
    if work:
        _conclude(config, work, started)
    accelerator.wait_for_everyone()


@dataclass(frozen=True)
class Work:
    """What there is to do: known to the main process only."""

    manifest: Manifest
    units: list[Unit]
    todo: list[Unit]  # those that are not finished
    fingerprint: str  # of the backbone


def _prepare(config: Config) -> Work:
    """Read the inputs, find out what is finished, and move outdated shards out of the way."""
    settings = config.pipeline
    shell = load_backbone(config.backbone, "cpu", parts=())
    shell.latent_shape(config.video.height, config.video.width, config.video.num_frames)
    manifest = _manifest(config)
    if manifest.unused_columns:
        print(f"warning: columns of {manifest.path} that are not read: {', '.join(manifest.unused_columns)}")
    scores = read_scores(settings.scores) if settings.scores else {}
    rows = [row for row in manifest.rows if isinstance(row, Row)]
    scores_by_key = {row.key: loser_scores(row, scores, settings.num_losers) for row in rows}
    if strangers := [place for place in scores if place[0] not in scores_by_key or place[1] >= settings.num_losers]:
        print(f"warning: {len(strangers)} lines of {settings.scores} name no loser here, the first: {strangers[0]}")
    depends_on = {
        "fingerprint": shell.fingerprint,
        "dtype": config.backbone.dtype,
        "text_length": config.backbone.text_length,
        "video": asdict(config.video),
        "sampler": asdict(config.sampler),
        "seed": config.seed,
        "num_losers": settings.num_losers,
    }
    if is_simulated(settings.manifest):  # there is no file to tell clips apart; the number of clips does not count
        _, scene, _, *split = settings.manifest.split(":")
        depends_on["simulated"] = [scene, *split]
    all_units = units.split(
        manifest.rows, scores_by_key, unit_size=settings.unit_size, settings=depends_on, judge=settings.judge
    )
    groups = Path(settings.groups)
    recipes.save(config, groups / "build" / "recipe.yaml")
    todo = [unit for unit in all_units if not (units.is_finished(groups, unit) and _has_clips(config, groups, unit))]
    retired = units.retire(groups, keep={unit.name for unit in all_units} - {unit.name for unit in todo})
    print(f"{len(all_units)} units of {len(manifest.rows)} rows: {len(todo)} to build")
    if retired:
        print(f"rows, scores or settings of {len(retired)} earlier shards changed: {', '.join(retired[:5])} ...")
    return Work(manifest, all_units, todo, shell.fingerprint)


def _has_clips(config: Config, groups: Path, unit: Unit) -> bool:
    """Whether the loser clips of a finished unit exist, if they are asked for."""
    if not config.pipeline.save_losers:
        return True
    keys = [key for key, _ in units.read_record(groups, unit.name)["groups"]]
    return all(path.exists() for key in keys for path in _loser_paths(config, key))


def _loser_paths(config: Config, key: str) -> list[Path]:
    return [loser_path(Path(config.output) / "losers", key, loser) for loser in range(config.pipeline.num_losers)]


def _build_units(config: Config, mine: list[Unit], accelerator: Accelerator) -> None:
    groups = Path(config.pipeline.groups)
    maker = GroupMaker(config, accelerator.device, units.retired_groups(groups))
    total = sum(len(unit.tasks) for unit in mine)
    progress = tqdm(total=total, desc="groups", unit="group", disable=not accelerator.is_main_process)
    for unit in mine:
        digests, quarantined = {}, list(unit.quarantined)
        with ShardWriter(groups, unit.name) as writer:
            for first in range(0, len(unit.tasks), config.pipeline.encode_batch):
                tasks = unit.tasks[first : first + config.pipeline.encode_batch]
                for task, made in zip(tasks, maker.make(tasks), strict=True):
                    if isinstance(made, ClipError):
                        row = task.row
                        quarantined.append(Quarantined(row.number, row.key, row.clip, made.reason, str(made)))
                    else:
                        writer.write(made)
                        digests[task.row.key] = task.digest
                progress.update(len(tasks))
            units.write_record(groups, unit, digests, sorted(quarantined, key=lambda row: row.row))
    progress.close()


class GroupMaker:
    """Makes groups, some at a time, on one device. Weights are loaded once, when first needed."""

    def __init__(self, config: Config, device: torch.device, retired: Mapping[str, tuple[GroupSet, int]]):
        self.config, self.device, self.retired = config, device, retired
        self.reader = FrameReader(config.video, device)

    @cached_property
    def backbone(self) -> Backbone:
        parts = ("text", "vae", "transformer") if self.config.pipeline.num_losers else ("text", "vae")
        return load_backbone(self.config.backbone, self.device, parts=parts)

    @cached_property
    def judge(self) -> Judge:
        return build_judge(self.config.pipeline.judge, self.config.video.fps, self.device)

    @cached_property
    def negative(self) -> Conditioning:
        return self.backbone.condition([self.config.sampler.negative_prompt])

    def make(self, tasks: Sequence[Task]) -> list[Group | ClipError]:
        """For each task its group: a retired group of the same digest with today's scores, or a new one.

        Where a clip cannot be used there is the reason instead.
        """
        made: list[Group | ClipError | None] = [self._retired(task) for task in tasks]
        frames: dict[int, Tensor] = {}  # by place in `tasks`
        for place, task in enumerate(tasks):
            if made[place] is None:
                try:
                    frames[place] = self.reader.read(task.row)
                except ClipError as error:
                    made[place] = error
        if frames:
            rows = [tasks[place].row for place in frames]
            for place, group in zip(frames, self._generate(rows, torch.stack(list(frames.values()))), strict=True):
                made[place] = group
        return [
            group if isinstance(group, ClipError) else self._complete(group, task)
            for group, task in zip(made, tasks, strict=True)
        ]

    def _retired(self, task: Task) -> Group | None:
        if task.digest not in self.retired:
            return None
        group_set, index = self.retired[task.digest]
        try:
            return group_set[index]
        except ValueError as error:
            print(f"warning: group {task.row.key} is generated anew: {error}")
            return None

    def _seeds(self, row: Row) -> list[int]:
        return [loser_seed(self.config.seed, row.key, loser) for loser in range(self.config.pipeline.num_losers)]

    def _complete(self, group: Group, task: Task) -> Group:
        """The group with what its tensors do not depend on; its losers are saved if they are asked for."""
        config, row = self.config, task.row
        paths = _loser_paths(config, row.key)
        if config.pipeline.save_losers and not all(path.exists() for path in paths):
            save_losers(self.backbone, group.losers, paths, config.video.fps)
        scored = zip(self._seeds(row), self._scores(group, task), strict=True)
        return replace(
            group,
            action=row.action,
            physics_richness=row.physics_richness,
            source=f"{row.clip} at {row.start:g} s",
            losers_info=[Loser(seed, *scores) for seed, scores in scored],
        )

    @torch.no_grad()
    def _scores(self, group: Group, task: Task) -> list[tuple[float, float]]:
        """(semantic, physical) of each loser: those that the task brings, the others from the judge."""
        missing = [loser for loser, score in enumerate(task.scores) if score is None]
        found = [NEUTRAL] * len(missing)
        if missing and self.config.pipeline.judge:
            size = self.config.pipeline.encode_batch
            clips = self.backbone.decode_latents(group.losers[missing], batch_size=size)
            found = self.judge(to_pixels(clips), [task.row.prompt] * len(missing))
        return [found.pop(0) if score is None else score for score in task.scores]

    def _generate(self, rows: Sequence[Row], frames: Tensor) -> Iterator[Group]:
        """New groups of rows with frames (B, T, H, W, 3); the clips are encoded together."""
        config = self.config
        winners, conditioning = encode_clips(self.backbone, frames, [row.prompt for row in rows])
        stored = conditioning.to("cpu", torch.bfloat16)
        stored_winners = winners.to(torch.bfloat16).cpu()
        losers = stored_winners[:, None][:, :0]  # (B,0,C,F,H,W)
        if config.pipeline.num_losers:
            seeds = [self._seeds(row) for row in rows]
            size = config.pipeline.batch_size
            losers = generate_losers(
                self.backbone, conditioning, self.negative, seeds, config.video, config.sampler, batch_size=size
            )
        for number, row in enumerate(rows):
            for path in _loser_paths(config, row.key):  # of other settings
                path.unlink(missing_ok=True)
            yield Group(
                key=row.key,
                prompt=row.prompt,
                action=row.action,
                physics_richness=row.physics_richness,
                source="",
                losers_info=[],
                fingerprint=self.backbone.fingerprint,
                winner=stored_winners[number],
                losers=losers[number],
                text=unpad(stored.text[number]),
                condition=None if stored.image is None else stored.image[number],
            )


def _conclude(config: Config, work: Work, started: float) -> None:
    """Report, index, and clear away: on the main process, when all units are done."""
    groups, manifest = Path(config.pipeline.groups), work.manifest
    records = [units.read_record(groups, unit.name) for unit in work.units]
    quarantined = [row for record in records for row in record["quarantined"]]
    digests = {key: digest for record in records for key, digest in record["groups"]}
    reasons = dict(Counter(row["reason"] for row in quarantined).most_common())
    report = {"rows": len(manifest.rows), "kept": len(digests), "quarantined": reasons}
    report["seconds"] = round(time.monotonic() - started, 1)
    listing = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in quarantined)
    units.write_text(groups / "build" / "quarantine.jsonl", listing)
    units.write_text(groups / "build" / "report.json", json.dumps(report, indent=2) + "\n")
    print(f"{report['rows']} rows: {report['kept']} kept, {len(quarantined)} quarantined {reasons or ''}")
    if not digests:
        raise ValueError(
            f"no row of {manifest.path} is usable: {reasons}; see {groups / 'build' / 'quarantine.jsonl'} for each row"
        )
    index = write_index(groups, fingerprint=work.fingerprint, video=config.video)
    if config.pipeline.save_losers:
        prompts = {row.key: row.prompt for row in manifest.rows if isinstance(row, Row)}
        table = Path(config.output) / "losers" / "losers.csv"
        lines = [(key, j, path, prompts[key]) for key in digests for j, path in enumerate(_loser_paths(config, key))]
        write_table(table, lines)
        print(f"loser clips and their table for a judge: {table}")
    if kept := units.discard_retired(groups, set(digests.values())):
        size = sum(file.stat().st_size for folder in kept for file in folder.glob("*.tar"))
        print(f"{size / 1e9:.3f} GB of earlier groups are not used any more: delete {groups / 'retired'} at will")
    count, total = index["num_groups"], index["total_bytes"]
    print(f"groups: {groups}, {count} groups, {total // count} bytes a group")


if __name__ == "__main__":
    main()
