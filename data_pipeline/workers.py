"""Who does what: the processes that share a stage's units, and the way of a unit from planned to finished."""

from collections.abc import Callable, Sequence
from typing import Any

from accelerate.utils import broadcast_object_list
from tqdm import tqdm

from data_pipeline.contract import Stage
from data_pipeline.tables import Table, Unit, read_marker, remove_units, write_summary
from train import entry
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

    def share(self, units: Sequence[Unit], todo: Sequence[Unit]) -> list[Unit]:
        """This process's part of what is to be done; no two processes have the same."""
        numbers = {unit.number for unit in units[self.array_index :: self.array_count]}
        mine = [unit for unit in todo if unit.number in numbers]
        return mine[self.accelerator.process_index :: self.accelerator.num_processes]


# ---- a stage ---------------------------------------------------------------------------------------------------------


def plan_stage(stage: Stage, before: Table | None, *, retry: bool) -> tuple[list[Unit], list[Unit]]:
    """All units of a stage, and those that are not done; with `retry` also those that may come out better now."""
    units = stage.plan(before)
    todo = [
        unit
        for unit in units
        if not stage.is_done(unit) or retry and stage.is_worth_a_retry(read_marker(stage.folder, unit.number))
    ]
    return units, todo


def run_stage(stage: Stage, units: list[Unit], todo: list[Unit], before: Table | None, team: Team) -> Table | None:
    """Build this process's units and wait for the other ranks'; the table, None while other tasks of an array work."""
    mine = team.share(units, todo)
    total = sum(unit.count for unit in mine)
    with tqdm(total=total or None, desc=stage.name, unit="row", disable=not (team.is_main and stage.shown)) as bar:
        for unit in mine:
            stage.work(unit, before, bar)
    team.accelerator.wait_for_everyone()
    left = team.decide(lambda: sum(not stage.is_done(unit) for unit in units))
    if left:
        if team.is_main:
            print(f"{stage.name}: this task's part is done; {left} of {len(units)} units are other tasks' work")
        return None
    return stage.table(units)


def conclude_stage(stage: Stage, units: Sequence[Unit], table: Table, *, show: bool) -> None:
    remove_units(stage.folder, len(table.markers))
    summary = write_summary(table, stage.digest_of(units))
    if show and stage.shown:
        reasons = ", ".join(f"{reason} {count}" for reason, count in summary["dropped"].items())
        print(
            f"{stage.name:<12}{summary['in']} in, {summary['kept']} kept, {summary['in'] - summary['kept']} dropped"
            f"{f' ({reasons})' if reasons else ''}, {summary['seconds']} s"
        )
