"""Who does what: the processes that share a stage's units, and the way of a unit from planned to finished."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list
from tqdm import tqdm

from data_pipeline.contract import Stage
from data_pipeline.tables import (
    SUMMARY,
    Table,
    Unit,
    read_marker,
    read_summary,
    remove_units,
    write_summary,
    write_unit,
)
from train import entry
from train.files import digest
from train.parallel import build_accelerator


class Team:
    """The processes that share the work: ranks of one launch, or tasks of an array that know nothing of each other."""

    def __init__(self, array_index: int, array_count: int):
        self.accelerator = build_accelerator()
        entry.refuse_sharding(self.accelerator, "a build")
        self.array_index, self.array_count = array_index, array_count
        self.device = self.accelerator.device
        self.is_main = self.accelerator.is_main_process  # of its launch: each task of an array has one
        self.is_first = self.is_main and array_index == 0  # of all: it alone writes what is the stage's

    def decide(self, question: Callable[[], Any]) -> Any:
        """The main process's answer, on all ranks."""
        answer = [question() if self.is_main else None]
        broadcast_object_list(answer)
        return answer[0]

    def share(self, stage: Stage, units: Sequence[Unit], todo: Sequence[Unit]) -> list[Unit]:
        """This process's part of what is to be done; no two processes have the same."""
        if stage.whole:
            return list(todo) if self.is_first else []
        numbers = {unit.number for unit in units[self.array_index :: self.array_count]}
        mine = [unit for unit in todo if unit.number in numbers]
        return mine[self.accelerator.process_index :: self.accelerator.num_processes]

    def wait(self) -> None:
        self.accelerator.wait_for_everyone()


# ---- a stage ---------------------------------------------------------------------------------------------------------


def plan_stage(stage: Stage, before: Table | None, *, retry: bool) -> tuple[list[Unit], list[Unit]]:
    """All units of a stage, and those that are not done; with `retry` also those that may come out better now."""
    units = stage.plan(before)
    todo = _unfinished(stage, units)
    if retry and not stage.whole:
        done = set(units) - set(todo)
        again = {unit for unit in done if stage.is_worth_a_retry(read_marker(stage.folder, unit.number))}
        todo = [unit for unit in units if unit not in done or unit in again]
    return units, todo


def _unfinished(stage: Stage, units: list[Unit]) -> list[Unit]:
    if not stage.whole:
        return [unit for unit in units if not stage.is_done(unit)]
    return [] if _is_whole(stage.folder, units[0].digest) else units


def _is_whole(folder: Path, wanted: str) -> bool:
    """Whether all units of a stage with `whole` are there and of one plan."""
    summary, kept = read_summary(folder), 0
    if summary is None or summary["digest"] != wanted:
        return False
    for number in range(summary["units"]):
        marker = read_marker(folder, number)
        if marker is None or marker["digest"] != wanted:
            return False
        kept += marker["rows"]
    return kept == summary["kept"]


def stage_table(stage: Stage, units: Sequence[Unit]) -> Table:
    return Table(stage.folder, read_summary(stage.folder)["units"] if stage.whole else len(units))


def run_stage(stage: Stage, units: list[Unit], todo: list[Unit], before: Table | None, team: Team) -> Table | None:
    """Build this process's units and wait for the other ranks'; the table, None while other tasks of an array work."""
    mine = team.share(stage, units, todo)
    total = sum(unit.count for unit in mine)
    with tqdm(total=total or None, desc=stage.name, unit="row", disable=not (team.is_main and stage.shown)) as bar:
        for unit in mine:
            (_build_whole if stage.whole else _build_unit)(stage, unit, before, bar)
    team.wait()
    left = team.decide(lambda: len(_unfinished(stage, units)))
    if left:
        if team.is_main:
            print(f"{stage.name}: this task's part is done; {left} of {len(units)} units are other tasks' work")
        return None
    return stage_table(stage, units)


def conclude_stage(stage: Stage, units: Sequence[Unit], table: Table, *, show: bool) -> None:
    remove_units(stage.folder, len(table.markers))
    summary = write_summary(table, units[0].digest if stage.whole else digest([unit.digest for unit in units]))
    if show and stage.shown:
        reasons = ", ".join(f"{reason} {count}" for reason, count in summary["dropped"].items())
        print(
            f"{stage.name:<12}{summary['in']} in, {summary['kept']} kept, {summary['in'] - summary['kept']} dropped"
            f"{f' ({reasons})' if reasons else ''}, {summary['seconds']} s"
        )


def _build_unit(stage: Stage, unit: Unit, before: Table, bar: tqdm) -> None:
    started, shown = time.monotonic(), bar.n
    made = stage.build(unit, before.rows(unit.first, unit.count), bar.update)
    write_unit(stage.folder, unit.number, unit.digest, made, time.monotonic() - started, stage.notes(unit))
    bar.update(unit.count - (bar.n - shown))


def _build_whole(stage: Stage, unit: Unit, before: Table | None, bar: tqdm) -> None:
    (stage.folder / SUMMARY).unlink(missing_ok=True)  # first: it says how many units there are
    number, started = -1, time.monotonic()
    for number, made in enumerate(stage.parts(before)):
        write_unit(stage.folder, number, unit.digest, made, time.monotonic() - started)
        bar.update(sum(map(len, made)))
        started = time.monotonic()
    write_summary(Table(stage.folder, number + 1), unit.digest)
