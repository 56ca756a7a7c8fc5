"""Runs the ablation's commands, several at a time: each row with each seed from where it stands."""

import json
import os
import shlex
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from contextlib import suppress
from pathlib import Path
from typing import Any

from tqdm import tqdm

from eval.experiments.ablation.plan import Plan, read_result
from eval.experiments.ablation.rows import CORRUPTED, METHODS
from eval.experiments.ablation.suite import Row, World
from eval.experiments.processes import GRACE, end
from train.files import digest, sha256, write_text


class StepFailed(RuntimeError):
    """A command failed; the message ends with the tail of its log."""


class OutOfTime(TimeoutError):
    """The time was over before all was done; `failed` as `run_all` returns it."""

    def __init__(self, failed: dict[str, str]):
        super().__init__("the time is over")
        self.failed = failed


Run = Callable[[str, list[str], Path], None]  # module, arguments, log file; raises StepFailed


class Processes:
    """Runs the commands, with the processor's cores shared between `jobs` of them. `stop` ends all that are running."""

    def __init__(self, jobs: int):
        threads = str(max(1, (os.cpu_count() or 1) // jobs))
        self.environment = {"OMP_NUM_THREADS": threads, **os.environ, "PYTHONUNBUFFERED": "1"}
        self._running: set[subprocess.Popen] = set()
        self._lock, self._stopped = threading.Lock(), False

    def run(self, module: str, arguments: list[str], log: Path) -> None:
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("a", encoding="utf-8") as file:
            file.write(f"\n$ python -m {module} {shlex.join(arguments)}\n")
            file.flush()
            with self._lock:
                if self._stopped:
                    raise StepFailed("stopped")
                command = [sys.executable, "-m", module, *arguments]
                process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=self.environment)
                self._running.add(process)
            status = process.wait()
            self._running.discard(process)
        if status:
            tail = log.read_bytes()[-8000:].decode("utf-8", errors="replace").splitlines()[-12:]
            raise StepFailed(f"{module} ended with status {status}, see {log}:\n  " + "\n  ".join(tail))

    def stop(self) -> None:
        """SIGTERM, upon which a trainer saves a checkpoint and ends; what is not over after GRACE is killed."""
        with self._lock:
            self._stopped = True
            running = list(self._running)
        end(running, GRACE)


def run_all(
    plan: Plan, rows: Sequence[Row], run: Run, stop: Callable[[], None], jobs: int, seconds: float
) -> dict[str, str]:
    """Run what is not finished, `jobs` at a time; returns what failed, by name, and why. OutOfTime where `seconds`
    are over before; what runs then is asked to stop."""
    runs = [(row, seed) for seed in plan.seeds for row in rows]
    todo = [pair for pair in runs if plan.result(*pair) is None]
    failed: dict[str, str] = {}
    progress = tqdm(total=len(runs), initial=len(runs) - len(todo), unit="run", desc="ablation")
    with progress, ThreadPoolExecutor(jobs) as pool:
        # Threads take them in this order: the base models, whose clips the other rows of the seed use; builds, which
        # wait for nothing; rows, which wait for both; and those that start from another row.
        names, builds, started = {}, {}, {}
        needed: list[Future] = []  # by builds and searches

        def submit(row: Row, seed: int) -> None:
            before = [builds[row.groups, seed]] if row.trainer else [*needed] if row.search else []
            before += [started[row.start, seed]] if (row.start, seed) in started else []
            base = started.get((METHODS[0].name, seed))
            future = started[row.name, seed] = pool.submit(run_row, plan, row, seed, run, before, base)
            names[future] = plan.place(row.name, seed).name

        for row, seed in todo:
            if row.model == "base":
                submit(row, seed)
        if plan.world.world_model and any(row.model != "base" for row, _ in todo):
            needed = [pool.submit(run_world_model, plan, run)]
            names[needed[0]] = plan.world_model.name
        wanted = [(row.groups, seed) for row, seed in todo if row.trainer]
        sources = [("groups", seed) for name, seed in wanted if name == CORRUPTED]
        for name, seed in dict.fromkeys([*sources, *wanted]):
            log = plan.place(name, seed) / "log.txt"
            sources = [builds["groups", seed]] if name == CORRUPTED else needed
            builds[name, seed] = pool.submit(run_build, run, plan.build_command(name, seed), log, sources)
            names[builds[name, seed]] = log.parent.name
        for row, seed in sorted(todo, key=lambda pair: pair[0].start != ""):
            if row.model != "base":
                submit(row, seed)
        try:
            for future in as_completed(names, seconds):
                if error := future.exception():
                    failed[names[future]] = f"{error}" if isinstance(error, StepFailed) else repr(error)
                    progress.write(f"{names[future]} failed: {failed[names[future]]}")
                if future not in (*builds.values(), *needed):
                    progress.update()
        except BaseException as error:
            pool.shutdown(wait=False, cancel_futures=True)
            stop()
            if isinstance(error, TimeoutError):
                raise OutOfTime(failed) from error
            raise
    return failed


def run_world_model(plan: Plan, run: Run) -> None:
    """Train the suite's own world model, where that is not done."""
    weights = plan.world_model / "model.safetensors"
    if not weights.exists():
        run(*plan.world_model_command(), plan.world_model / "log.txt")
        if not weights.exists():  # a training that was asked to stop ends without an error
            raise StepFailed(f"the training of {plan.world_model} stopped: run the same command to continue")


def run_build(run: Run, command: tuple[str, list[str]], log: Path, sources: Sequence[Future]) -> None:
    """Make a group set, once that is made which it is made of."""
    if any(source.exception() is not None for source in sources):  # waits
        raise StepFailed(f"what {log.parent} is made of failed")
    run(*command, log)


def run_row(plan: Plan, row: Row, seed: int, run: Run, before: Sequence[Future], base: Future | None) -> None:
    """Train and evaluate one row with one seed, from where it stands, with the clips of `base` where that is run, too.
    Raises StepFailed."""
    if any(future.exception() is not None for future in before):  # waits for them
        needed = [plan.place(name, seed) for name in (row.groups, row.start) if name]
        raise StepFailed(f"what it needs failed: {' or '.join(map(str, needed))}")
    place = plan.place(row.name, seed)
    digests = plan.digests(row, seed)
    started = read_result(place / "started.json")
    if place.exists() and any(started.get(key) != digests[key] for key in ("training", "groups")):
        target = plan.folder / "replaced" / f"{place.name}-{digest(started)[:8]}"
        shutil.rmtree(target, ignore_errors=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        place.rename(target)
        started = {}
    started = {**digests, "seconds": started.get("seconds", {})}

    def timed(name: str, module: str, arguments: list[str]) -> None:
        begin, before = time.perf_counter(), started["seconds"].get(name, 0.0)
        try:
            run(module, arguments, place / "log.txt")
        finally:  # a stopped run's time counts as well
            started["seconds"][name] = round(before + time.perf_counter() - begin, 1)
            _write(place / "started.json", started)

    def is_trained() -> bool:
        exported = place / "train" / "lora" / "pytorch_lora_weights.safetensors"
        return exported.exists() or (place / "train" / "transformer").is_dir()

    _write(place / "started.json", started)
    if row.trainer and not is_trained():
        timed("train", row.trainer, plan.train_arguments(row, seed))
        if not is_trained():  # a trainer that was asked to stop ends without an error
            raise StepFailed(f"{row.trainer} stopped before its last step: run the same command to continue")
    if base is not None:
        base.exception()  # waits; a row whose base failed makes its clips itself
    _give(plan, place)
    _share(plan, plan.place(METHODS[0].name, seed), place, "base")
    if row.search:
        _share(plan, plan.place(row.start, seed), place, "tuned")
    timed("evaluate", "eval.run", plan.eval_arguments(row, seed))
    scores = read_scores(place / "eval" / "scores.jsonl", plan.world, plan.clips, plan.benchmarks(row))
    scores = {"base": scores["base"]} | ({"tuned": scores[row.model]} if row.model != "base" else {})
    own = {"row": row.name, "seed": seed, "overrides": [*plan.overrides, *row.overrides]}
    _write(place / "result.json", {**own, **started, "torch": plan.torch, "device": plan.device, "scores": scores})


def _write(path: Path, content: dict[str, Any]) -> None:
    write_text(path, json.dumps(content) + "\n")


def _give(plan: Plan, place: Path) -> None:
    """Lay what benchmarks score with where they look for it; what was scored with another file is scored again."""
    for (benchmark, name), known in plan.given.items():
        target = place / "eval" / benchmark / "scoring" / name
        if target.exists() and sha256(target) != known:
            shutil.rmtree(place / "eval" / benchmark)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(plan.model_folder / name, target)


def _share(plan: Plan, other: Path, place: Path, model: str) -> None:
    """Give the run what another row of its seed has of a model: its clips, the true ones, and their scores. So
    eval.run, which checks what they were made with, samples and scores them once per seed."""
    for benchmark in plan.world.benchmarks:
        source, target = (folder / "eval" / benchmark for folder in (other, place))
        files = [(source / "scoring" / name, known) for (one, name), known in plan.given.items() if one == benchmark]
        if source == target or not source.exists():
            continue
        if any(not file.exists() or sha256(file) != known for file, known in files):  # other scores than this row's
            continue
        with suppress(OSError):  # where there are no links they are made again
            for name in (f"clips/{model}", "references"):
                if (source / name).exists():
                    shutil.copytree(source / name, target / name, copy_function=_link, dirs_exist_ok=True)
            for name in (f"rows-{model}.jsonl", "rows-true.jsonl"):
                if (source / name).exists() and not (target / name).exists():
                    target.mkdir(parents=True, exist_ok=True)
                    shutil.copy2(source / name, target / name)


def _link(source: str, target: str) -> None:
    """A hard link instead of what is there: eval.run replaces such a file and never writes into it."""
    Path(target).unlink(missing_ok=True)
    os.link(source, target)


def read_scores(path: Path, world: World, clips: int, benchmarks: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Scores of base and tuned, by column, from eval.run's rows: a list in the clips' order; or by key, None without a
    score, in a world that may fail. ValueError where scores are missing that have to be there."""
    for name, found in read_result(path.with_name("results.json")).get("benchmarks", {}).items():
        if found["problem"]:
            raise ValueError(f"{path.parent}: the benchmark {name} did not run to its end: {found['problem']}")
    rows = [row for row in map(json.loads, path.read_text(encoding="utf-8").splitlines()) if row["model"] != "true"]
    if not world.may_fail:
        return _in_order(path, rows, list(world.columns), clips)
    columns = {name: column.benchmark for name, column in world.columns.items() if column.benchmark in benchmarks}
    scores: dict[str, dict[str, Any]] = {}
    for row in rows:
        own = scores.setdefault(row["model"], {name: {} for name in columns})
        for name in (name for name, benchmark in columns.items() if benchmark == row["benchmark"]):
            own[name][row["key"]] = None if row["error"] else row["values"][name]
    for model, own in scores.items():
        for name, values in own.items():
            if all(value is None for value in values.values()):
                why = next((row["error"] for row in rows if row["error"]), "no row")
                raise ValueError(f"{path}: {model} has no {name} at all: {why}")
    return scores


def _in_order(path: Path, rows: Sequence[dict[str, Any]], names: Sequence[str], clips: int) -> dict[str, Any]:
    """Every clip's scores as lists. ValueError where a model has another number of clips."""
    scores: dict[str, dict[str, list[float]]] = {}
    for row in rows:
        columns = scores.setdefault(row["model"], {name: [] for name in names})
        if row["error"]:
            raise ValueError(f"{path}: clip {row['clip']} of {row['model']} has no score: {row['error']}")
        if row["clip"] != len(columns[names[0]]):
            raise ValueError(f"{path}: clip {row['clip']} of {row['model']} is out of order: evaluate again")
        for name in names:
            columns[name].append(row["values"][name])
    if any(len(columns[names[0]]) != clips for columns in scores.values()) or "base" not in scores:
        raise ValueError(f"{path} does not hold {clips} clips of each model: delete its folder and evaluate again")
    return scores
