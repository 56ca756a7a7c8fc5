"""Build preference groups from raw clips: the stages of data_pipeline/stages/, each of which leaves a table behind and
can run alone.

    accelerate launch data_pipeline/build.py recipe=tiny pipeline.manifest=clips.csv
    python -m data_pipeline.build recipe=tiny pipeline.manifest=clips.csv --dry-run      # print the numbers and stop
    python -m data_pipeline.build recipe=tiny pipeline.manifest=sandbox:mixed:100        # simulated clips, no files
    python -m data_pipeline.build recipe=wan14b pipeline.stage=pool..resample            # choose; the GPUs come later

A stage is cut into units, shared over the ranks. A unit that is complete and whose inputs are unchanged is skipped, so
a build that was stopped continues when run again, on any number of ranks; the result is the same byte for byte. Of two
builds in one folder at the same time the second is refused; the tasks of an array share it.

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
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch

import recipes
from data_pipeline.config import Config, Setup
from data_pipeline.contract import PassThrough, Stage
from data_pipeline.stages import STAGES
from data_pipeline.stages.filter import NO_PHYSICS
from data_pipeline.stages.pool import read_pool
from data_pipeline.stages.resample import NOT_CHOSEN
from data_pipeline.stages.targets import TargetMaker
from data_pipeline.tables import TABLE_ROWS, Table, read_dropped, read_summary
from data_pipeline.workers import Team, conclude_stage, plan_stage, run_stage
from train import entry, files
from train.backbones import BACKBONES, find_architecture, load_backbone
from train.backbones.base import BackboneConfig, latent_shape, num_tokens
from train.cost import bill
from train.files import lock, write_text

ORDER = tuple(STAGES)
CHOICES = (NO_PHYSICS, NOT_CHOSEN)  # reasons that say nothing bad of a row: they are not quarantined


def main(argv: list[str] | None = None) -> None:
    config = recipes.load(Config, argv)
    check(config)
    if config.dry_run:
        print(plan(config, argv))
        return
    build(config)


def check(config: Config) -> None:
    """ValueError for settings that cannot work, before any work."""
    settings = config.pipeline
    config.sampler.check()
    settings.losers.sampler(config.sampler)
    if config.backbone.family in BACKBONES:
        Setup(config, "cpu").first_frame  # noqa: B018
    chosen = selected(settings.stage)
    if settings.array_count > 1 and len(chosen) > 1:
        raise ValueError(
            f"pipeline.stage={settings.stage} with array_count={settings.array_count}: the tasks of an array do not "
            "wait for each other; run one array per stage, as launch/build_array.sbatch does"
        )


def selected(stage: str) -> tuple[str, ...]:
    """The stages that `pipeline.stage` names: all, one, or first..last."""
    first, dots, last = stage.partition("..")
    if stage == "all":
        return ORDER
    last = last if dots else first
    for name in (first, last):
        if name not in STAGES:
            raise ValueError(
                f"pipeline.stage={stage}: {name!r} is no stage; use all, one of {', '.join(ORDER)}, or a..b"
            )
    chosen = ORDER[ORDER.index(first) : ORDER.index(last) + 1]
    if not chosen:
        raise ValueError(f"pipeline.stage={stage}: {last} comes before {first}; the order is {', '.join(ORDER)}")
    return chosen


def plan(config: Config, argv: list[str] | None) -> str:
    """The derived numbers and the bill of the job (`train.cost`), without weights, and without a manifest where
    pipeline.groups_planned is set. Raises ValueError where the video size does not suit the backbone."""
    video, settings, architecture = config.video, config.pipeline, _architecture(config.backbone)
    size, lines, most = (video.height, video.width, video.num_frames), {}, settings.groups_planned
    if settings.manifest or not most:
        pieces = [(len(kept), len(dropped)) for kept, dropped in read_pool(Setup(config, "cpu").sources(), TABLE_ROWS)]
        usable = sum(kept for kept, _ in pieces)
        most = min(usable, settings.resample.budget or usable)
        lines["rows"] = f"{sum(map(sum, pieces))}, of which {usable} usable before their clips are read"
    lines |= {
        "groups": f"{most} at most",
        "units": f"{-(-most // settings.unit_size)} of {settings.unit_size} rows",
        "video": f"{video.num_frames} frames of {video.height}x{video.width} at {video.fps:g} fps",
        "latent shape": str(latent_shape(architecture, *size)),
        "tokens": f"{num_tokens(architecture, *size)} per clip",
    }
    targets = TargetMaker(config.targets, video, "cpu").describe()
    listed = [f"{name:<16}{value}" for name, value in lines.items()]
    return "\n".join([*listed, targets, *bill(argv, groups=most, architecture=architecture)])


def _architecture(backbone: BackboneConfig) -> dict[str, Any]:
    """Of the local pipeline folder if there is one, else of the family's table: a dry run downloads nothing."""
    if not backbone.random_weights and Path(backbone.path).expanduser().is_dir() and backbone.path:
        return load_backbone(backbone, "cpu", parts=()).architecture
    return find_architecture(backbone)


def build(config: Config) -> None:
    """Run the selected stages. Raises ValueError where an earlier stage is not finished, where no row is left, and when
    another build is at work in the same folders."""
    settings = config.pipeline
    team = Team(settings.array_index, settings.array_count)
    with ExitStack() as held:
        if team.is_main:
            folders = [Path(config.output) / "pipeline", Path(settings.groups)]
            folders += [Path(config.output) / "losers"] if settings.save_losers else []
            task = f"task-{settings.array_index}" if settings.array_count > 1 else ""
            for folder in folders:
                held.enter_context(lock(folder, task=task))
        _run_stages(config, team)


def _run_stages(config: Config, team: Team) -> None:
    settings, chosen = config.pipeline, selected(config.pipeline.stage)
    setup = Setup(config, team.device)
    if team.is_first:
        _check_stages(setup, chosen)
        files.write_text(Path(settings.groups) / "build" / "recipe.yaml", recipes.to_yaml(config))
    before: Table | None = None
    for name in ORDER[: ORDER.index(chosen[-1]) + 1]:
        stage, selected_now = _stage(setup, name), name in chosen
        units, todo = team.decide(partial(plan_stage, stage, before, retry=selected_now))
        if selected_now:
            table = run_stage(stage, units, todo, before, team)
        elif todo:
            raise ValueError(
                f"pipeline.stage={settings.stage} needs the table of {name}, of which {len(todo)} of {len(units)} units"
                f" are missing or do not fit the settings: run pipeline.stage={name} first"
            )
        else:
            table = stage.table(units)
        if table is None:
            return
        if team.is_first:
            conclude_stage(stage, units, table, show=selected_now)
            if not len(table):
                listing, _ = _write_quarantine(config, name)
                reasons = ", ".join(f"{reason} {count}" for reason, count in _reasons(config, name).items())
                raise ValueError(f"no row of {settings.manifest} is usable ({reasons}): see {listing}")
            if selected_now:
                stage.conclude(table)
        before = table
        del stage  # and its weights, before the next stage loads its own
        gc.collect()
        torch.cuda.empty_cache()
    if team.is_first:
        listing, count = _write_quarantine(config, chosen[-1])
        if count:
            print(f"quarantine: {listing}, {count} rows that could not be used, each with its reason")
        if "encode" in chosen and (warning := _cut_prompts(config, table)):
            print(warning)


def _stage(setup: Setup, name: str) -> Stage:
    return PassThrough(setup, name) if name in setup.left_out else STAGES[name](setup)


def _check_stages(setup: Setup, chosen: Sequence[str]) -> None:
    """ValueError for what would stop one of the chosen stages, before any work."""
    judge, resample = setup.config.judge, setup.pipeline.resample
    setup.sources()
    for name in chosen:
        _stage(setup, name).check()
    if judge.name:
        setup.build_judge()
    if resample.tries_the_model and not judge.name:
        raise ValueError(
            f"pipeline.resample.tau={resample.tau:g} needs a judge of the model's own clips: set judge.name, or tau=0"
            " to take all actions alike"
        )


def _cut_prompts(config: Config, table: Table) -> str:
    """A warning of prompts that the text encoder does not read to their end; empty where there is none."""
    rows = table.columns(("clip", "key", "prompt")).to_pylist()
    backbone = load_backbone(config.backbone, "cpu", parts=("tokenizer",))
    return backbone.cut_prompts({f"that of {row['clip']} (key {row['key']})": row["prompt"] for row in rows})


def _reasons(config: Config, last: str) -> dict[str, int]:
    """Why rows were dropped, in all stages up to `last`."""
    total: Counter[str] = Counter()
    for name in ORDER[: ORDER.index(last) + 1]:
        total.update(read_summary(Path(config.output) / "pipeline" / name)["dropped"])
    return dict(total.most_common())


def _write_quarantine(config: Config, last: str) -> tuple[Path, int]:
    """List the rows that could not be used in the stages up to `last`, in order; the file and their number."""
    lines = []
    for name in ORDER[: ORDER.index(last) + 1]:
        folder = Path(config.output) / "pipeline" / name
        for number in range(read_summary(folder)["units"]):
            for row in read_dropped(folder, number).to_pylist():
                if row["reason"] not in CHOICES:
                    place = json.loads(row["place"])
                    row = {"stage": name, "row": place["row"], **row, "place": place}
                    lines.append(json.dumps(row, ensure_ascii=False) + "\n")
    path = Path(config.pipeline.groups) / "build" / "quarantine.jsonl"
    write_text(path, "".join(lines))
    return path, len(lines)


if __name__ == "__main__":
    entry.run(main)
