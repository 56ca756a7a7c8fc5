"""The ablations on the sandbox: the objectives of the papers' comparisons, measured on simulated physics.

    python -m eval.experiments.ablation.run --folder runs/ablation --jobs 6   # run or continue all, then the table
    python -m eval.experiments.ablation.run --folder runs/ablation --rows base,sft,gdpo --seeds 0 --set optim.steps=100
    python -m eval.experiments.ablation.run --suite physics --folder runs/physics --jobs 6        # the physics terms
    python -m eval.experiments.ablation.run --show eval/experiments/ablation/ablation.json   # an earlier run's table

Every step is one of the project's own commands with recipe=sandbox, as a user would run it:

    <folder>/groups-<seed>/, ...               data_pipeline.build: the sets of ablation_rows.GROUPS that rows need
    <folder>/<row>-<seed>/train/               train.gdpo or train.sft
    <folder>/<row>-<seed>/eval/                eval.run on prompts that no training set holds, other ones for each seed
    <folder>/<row>-<seed>/log.txt              what these printed
    <folder>/<row>-<seed>/result.json          written last: scores of every clip, seconds, digest of all settings
    <folder>/ablation.json, ablation.png       the table's numbers, and the figure

A run with a result of the same settings, model and groups is not repeated, one that was stopped continues from its
checkpoint, and one whose training would differ is moved to <folder>/replaced and starts anew. A failed run is reported
and does not stop the others. --jobs runs several side by side: the model is small, so one GPU serves several.

Intervals are 95% bootstrap intervals over the clips of all seeds. Gains over the base model and differences to another
row are paired: same prompt, same initial noise. They say how sure the mean over prompts is for these trained models;
how much another training seed changes it is seen in the seeds' own means, in ablation.json.
"""

import argparse
import json
import os
import platform
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

import recipes
from eval.experiments.ablation.report import draw, table
from eval.experiments.ablation.rows import GROUPS, METHODS, SUITES, Row, Suite, paper_figures
from eval.report.intervals import bootstrap_mean
from train import entry
from train.files import digest, sha256, write_text

RECIPE = "sandbox"
SCORES = ("physical", "semantic")
# Sections that each command reads.
TRAINED = ("backbone", "video", "lora", "objective", "physics", "self_score", "optim", "sampler", "validation", "train")
READS = {
    "data_pipeline.build": ("backbone", "video", "sampler", "pipeline", "vlm", "judge", "targets"),
    "train.gdpo": TRAINED,
    "train.sft": TRAINED,
    "eval.run": ("backbone", "video", "sampler", "run"),
}
# Speed alone. A unit of the recipe has 32 groups, and clips are sampled together within one.
ON_GPU = {
    "data_pipeline.build": ("pipeline.batch_size=128", "pipeline.encode_batch=32"),
    "eval.run": ("run.batch_size=128",),
}
# Keys that tell one run from another: set here for each, and not by --set.
OWN_KEYS = ("output", "seed", "recipe", "dry_run", "pipeline.groups", "pipeline.num_losers", "train.groups")
OWN_KEYS += ("targets.tracks", "targets.rule")
OWN_KEYS += ("train.folder", "run.lora", "run.folder", "run.sandbox.clips", "run.sandbox.seed")
OWN_KEYS += ("run.seeds", "benchmarks")

# ---- what is run -----------------------------------------------------------------------------------------------------


@dataclass
class Sections:
    """The recipe with the command line's overrides, unchecked: the commands check what they read."""

    backbone: dict[str, Any] = field(default_factory=dict)
    video: dict[str, Any] = field(default_factory=dict)
    lora: dict[str, Any] = field(default_factory=dict)
    objective: dict[str, Any] = field(default_factory=dict)
    physics: dict[str, Any] = field(default_factory=dict)
    self_score: dict[str, Any] = field(default_factory=dict)
    optim: dict[str, Any] = field(default_factory=dict)
    train: dict[str, Any] = field(default_factory=dict)
    sampler: dict[str, Any] = field(default_factory=dict)
    validation: dict[str, Any] = field(default_factory=dict)
    pipeline: dict[str, Any] = field(default_factory=dict)
    vlm: dict[str, Any] = field(default_factory=dict)
    judge: dict[str, Any] = field(default_factory=dict)
    targets: dict[str, Any] = field(default_factory=dict)
    run: dict[str, Any] = field(default_factory=dict)


def read_recipe(overrides: Sequence[str]) -> dict[str, dict[str, Any]]:
    return asdict(recipes.load(Sections, [f"recipe={RECIPE}", *overrides]))


@dataclass(frozen=True)
class Plan:
    folder: Path
    seeds: tuple[int, ...]
    suite: str = "preference"  # a key of SUITES
    clips: int = 512  # held-out prompts a seed
    overrides: tuple[str, ...] = ()  # of every run, from --set
    model: str = ""  # fingerprint of the base model
    torch: str = ""  # version
    device: str = ""  # name
    on_gpu: bool = False

    def place(self, row: Row, seed: int) -> Path:
        return self.folder / f"{row.name}-{seed}"

    def groups(self, name: str, seed: int) -> Path:
        return self.folder / f"{name}-{seed}"

    def make_suite(self) -> Suite:
        return SUITES[self.suite](read_recipe(self.overrides))

    def arguments(self, module: str, *own: str) -> list[str]:
        """`module`'s arguments, the later winning: recipe, device, --set where the command reads it, `own`."""
        chosen = [pair for pair in self.overrides if pair.split(".")[0] in READS[module]]
        device = ON_GPU.get(module, ()) if self.on_gpu else ()
        return [f"recipe={RECIPE}", *device, *chosen, *own]

    def build_arguments(self, name: str, seed: int) -> list[str]:
        place = self.groups(name, seed)
        own = (f"output={place}", f"pipeline.groups={place}", *GROUPS[name])
        return self.arguments("data_pipeline.build", *own, f"seed={seed}")

    def train_arguments(self, row: Row, seed: int) -> list[str]:
        own = (f"output={self.place(row, seed)}", f"seed={seed}", f"train.groups={self.groups(row.groups, seed)}")
        return self.arguments(row.trainer, *row.overrides, *own)

    def eval_arguments(self, row: Row, seed: int) -> list[str]:
        own = [f"output={self.place(row, seed)}", f"run.sandbox.clips={self.clips}", f"run.sandbox.seed={seed}"]
        own += [f"run.seeds=[{seed}]", "benchmarks=[sandbox]"]
        lora = [f"run.lora={self.place(row, seed) / 'train'}"] if row.trainer else []
        return self.arguments("eval.run", *own, *lora)

    def digests(self, row: Row, seed: int) -> dict[str, str]:
        """Of everything that determines the run, but not of how fast it goes on a device: `training` of what comes
        before the evaluation, `settings` of all, and `groups` of the group set, "" where there is none."""
        sections = read_recipe([*self.overrides, *row.overrides])
        # Results of earlier versions have these sections below `pipeline`, and so have all digests.
        sections["pipeline"] |= {name: found for name in ("vlm", "judge", "targets") if (found := sections.pop(name))}

        def settings(*modules: str) -> dict[str, Any]:
            return {name: sections[name] for module in modules for name in READS[module] if name in sections}

        groups = [f"pipeline.{text.removeprefix('pipeline.')}" for text in GROUPS[row.groups]]
        kind = [row.trainer, groups, seed, self.model]
        training = digest([kind, settings("data_pipeline.build", row.trainer)]) if row.trainer else ""
        return {
            "training": training,
            "settings": digest([training, settings("eval.run"), seed, self.clips, self.model]),
            "groups": self.groups_digest(row, seed),
        }

    def groups_digest(self, row: Row, seed: int) -> str:
        """Of the group set that the run trains on, "" where there is none."""
        index = self.groups(row.groups, seed) / "index.json"
        return sha256(index) if row.trainer and index.exists() else ""

    def result(self, row: Row, seed: int) -> dict[str, Any] | None:
        """The finished run's result, if it was made with today's settings. Groups that are gone are not missed."""
        result = _read_json(self.place(row, seed) / "result.json")
        if result is None:
            return None
        today = self.digests(row, seed)
        same_groups = today["groups"] in ("", result["groups"])
        return result if same_groups and today["settings"] == result["settings"] else None


class StepFailed(RuntimeError):
    """A command failed; the message ends with the tail of its log."""


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
        """SIGTERM: a trainer saves a checkpoint and ends."""
        with self._lock:
            self._stopped = True
            for process in list(self._running):
                process.terminate()


def run_row(plan: Plan, row: Row, seed: int, run: Run, groups: Future | None) -> None:
    """Train and evaluate one row with one seed, from where it stands. Raises StepFailed."""
    if groups is not None and groups.exception() is not None:  # waits for the build
        raise StepFailed(f"its groups failed: {plan.groups(row.groups, seed)}")
    place = plan.place(row, seed)
    digests = plan.digests(row, seed)
    started = _read_json(place / "started.json") or {}
    if place.exists() and any(started.get(key) != digests[key] for key in ("training", "groups")):
        _set_aside(place, plan.folder / "replaced" / f"{place.name}-{digest(started)[:8]}")
        started = {}
    started = {**digests, "seconds": started.get("seconds", {})}
    _write_json(place / "started.json", started)

    def timed(name: str, module: str, arguments: list[str]) -> None:
        begin, before = time.perf_counter(), started["seconds"].get(name, 0.0)
        try:
            run(module, arguments, place / "log.txt")
        finally:  # a stopped run's time counts as well
            started["seconds"][name] = round(before + time.perf_counter() - begin, 1)
            _write_json(place / "started.json", started)

    if row.trainer and not _is_trained(place):
        timed("train", row.trainer, plan.train_arguments(row, seed))
        if not _is_trained(place):  # a trainer that was asked to stop ends without an error
            raise StepFailed(f"{row.trainer} stopped before its last step: run the same command to continue")
    _share_base_clips(plan, seed, place)
    timed("evaluate", "eval.run", plan.eval_arguments(row, seed))
    scores = read_scores(place / "eval" / "scores.jsonl", plan.clips)
    made_with = {"torch": plan.torch, "device": plan.device}
    own = {"row": row.name, "seed": seed, "overrides": [*plan.overrides, *row.overrides]}
    _write_json(place / "result.json", {**own, **started, **made_with, "scores": scores})


def _is_trained(place: Path) -> bool:
    exported = place / "train" / "lora" / "pytorch_lora_weights.safetensors"
    return exported.exists() or (place / "train" / "transformer").is_dir()


def _set_aside(place: Path, target: Path) -> None:
    shutil.rmtree(target, ignore_errors=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    place.rename(target)


def _share_base_clips(plan: Plan, seed: int, place: Path) -> None:
    """Give the run the base row's clips of this seed, so that eval.run, which checks what they were made with, samples
    the base model once a seed."""
    name = Path("eval", "sandbox", "clips", "base")
    source, target = plan.place(METHODS[0], seed) / name, place / name
    if source.exists() and source != target:
        with suppress(OSError):  # where there are no links they are sampled again
            shutil.copytree(source, target, copy_function=_link, dirs_exist_ok=True)


def _link(source: str, target: str) -> None:
    """A hard link in place of what is there: eval.run replaces such a file and never writes into it."""
    Path(target).unlink(missing_ok=True)
    os.link(source, target)


def read_scores(path: Path, clips: int) -> dict[str, dict[str, list[float]]]:
    """Scores of base and tuned, by clip, from eval.run's rows. ValueError where a model has another number of clips."""
    scores: dict[str, dict[str, list[float]]] = {}
    for row in map(json.loads, path.read_text(encoding="utf-8").splitlines()):
        if row["model"] != "true":
            columns = scores.setdefault(row["model"], {name: [] for name in SCORES})
            if row["error"]:
                raise ValueError(f"{path}: clip {row['clip']} of {row['model']} has no score: {row['error']}")
            if row["clip"] != len(columns[SCORES[0]]):
                raise ValueError(f"{path}: clip {row['clip']} of {row['model']} is out of order: evaluate again")
            for name in SCORES:
                columns[name].append(row["values"][name])
    if any(len(columns[SCORES[0]]) != clips for columns in scores.values()) or "base" not in scores:
        raise ValueError(f"{path} does not hold {clips} clips of each model: delete its folder and evaluate again")
    return scores


def run_all(plan: Plan, rows: Sequence[Row], run: Run, stop: Callable[[], None], jobs: int) -> dict[str, str]:
    """Run what is not finished, `jobs` at a time; returns what failed, by name, and why."""
    runs = [(row, seed) for seed in plan.seeds for row in rows]
    todo = [pair for pair in runs if plan.result(*pair) is None]
    failed: dict[str, str] = {}
    progress = tqdm(total=len(runs), initial=len(runs) - len(todo), unit="run", desc="ablation")
    with progress, ThreadPoolExecutor(jobs) as pool:
        names, builds = {}, {}
        for name, seed in dict.fromkeys((row.groups, seed) for row, seed in todo if row.trainer):
            place = plan.groups(name, seed)
            arguments = ("data_pipeline.build", plan.build_arguments(name, seed), place / "log.txt")
            builds[name, seed] = pool.submit(run, *arguments)
            names[builds[name, seed]] = place.name
        # Threads take them in this order: builds, which wait for nothing, before the rows that wait for them.
        for row, seed in sorted(todo, key=lambda pair: pair[0].trainer != ""):
            build = builds[row.groups, seed] if row.trainer else None
            names[pool.submit(run_row, plan, row, seed, run, build)] = plan.place(row, seed).name
        try:
            for future in as_completed(names):
                if error := future.exception():
                    failed[names[future]] = f"{error}" if isinstance(error, StepFailed) else repr(error)
                    progress.write(f"{names[future]} failed: {failed[names[future]]}")
                if future not in builds.values():
                    progress.update()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            stop()
            raise
    return failed


# ---- what came out ---------------------------------------------------------------------------------------------------


def collect(plan: Plan, command: str) -> dict[str, Any]:
    """Means and intervals of every finished row, by today's settings."""
    suite = plan.make_suite()
    runs = {
        name: {seed: found for seed in plan.seeds if (found := plan.result(row, seed))}
        for name, row in suite.rows.items()
    }
    finished = [result for by_seed in runs.values() for result in by_seed.values()]
    return {
        "command": command,
        "recipe": RECIPE,
        "overrides": list(plan.overrides),
        "suite": plan.suite,
        "defaults": suite.defaults,
        "middle": suite.middle,
        "seeds": list(plan.seeds),
        "clips": plan.clips,
        "torch": sorted({result["torch"] for result in finished}),
        "device": sorted({result["device"] for result in finished}),
        "rows": [summarize(suite.rows[name], runs) for name, by_seed in runs.items() if by_seed],
    }


def summarize(row: Row, results: dict[str, dict[int, dict[str, Any]]]) -> dict[str, Any]:
    """One row of the table from all results by row and seed; gains and differences are None where there is nothing to
    pair."""
    runs, others = results[row.name], results[row.against]

    def own(result: dict[str, Any], name: str) -> np.ndarray:  # (clips,)
        return np.array(result["scores"].get("tuned", result["scores"]["base"])[name])

    def estimate(parts: list[np.ndarray]) -> dict[str, float] | None:
        return asdict(bootstrap_mean(np.concatenate(parts))) if parts else None

    gain, against = {}, {}
    for name in SCORES:
        gain[name] = estimate([own(r, name) - r["scores"]["base"][name] for r in runs.values() if row.trainer])
        shared = [seed for seed in runs if seed in others and row.name != row.against]
        against[name] = estimate([own(runs[seed], name) - own(others[seed], name) for seed in shared])
    return {
        "name": row.name,
        "label": row.label,
        "trainer": row.trainer,
        "overrides": list(row.overrides),
        "sweep": dict(zip(("key", "value"), row.sweep, strict=True)) if row.sweep else None,
        "seeds": {
            str(seed): {name: float(own(r, name).mean()) for name in SCORES} | {"seconds": r["seconds"]}
            for seed, r in runs.items()
        },
        **{name: estimate([own(result, name) for result in runs.values()]) for name in SCORES},
        "gain": gain,
        "against": {"row": row.against, **against},
        "paper": paper_figures(row),
    }


# ---- files and the command line --------------------------------------------------------------------------------------


def _read_json(path: Path) -> dict[str, Any] | None:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def _write_json(path: Path, content: dict[str, Any], indent: int | None = None) -> None:
    write_text(path, json.dumps(content, indent=indent) + "\n")


def check_overrides(overrides: Sequence[str]) -> None:
    """ValueError for an override that is no key=value, that no command reads, or that tells the runs apart."""
    sections = sorted(set(chain.from_iterable(READS.values())))
    for pair in overrides:
        key, equals, _ = pair.partition("=")
        if not equals or key in OWN_KEYS:
            reason = (
                "is set for each run by the ablation itself (see --clips, --seeds)" if equals else "is no key=value"
            )
            raise ValueError(f"--set {pair}: {key} {reason}")
        if key.split(".")[0] not in sections:
            raise ValueError(f"--set {pair}: no command reads it; sections: {', '.join(sections)}")


def make_plan(options: argparse.Namespace) -> Plan:
    import torch

    from train.backbones.loading import fingerprint

    check_overrides(options.set)
    if options.clips < 1 or options.jobs < 1 or not options.seeds:
        raise ValueError(f"--clips {options.clips} --jobs {options.jobs} --seeds: each must be 1 or more")
    backbone = read_recipe(options.set)["backbone"]
    on_gpu = torch.cuda.is_available()
    return Plan(
        folder=options.folder,
        seeds=tuple(dict.fromkeys(options.seeds)),
        suite=options.suite,
        clips=options.clips,
        overrides=tuple(options.set),
        model=fingerprint(backbone["family"], Path(backbone["path"])),
        torch=torch.__version__,
        device=torch.cuda.get_device_name() if on_gpu else f"CPU {platform.machine()}",
        on_gpu=on_gpu,
    )


def choose_rows(rows: dict[str, Row], names: Sequence[str]) -> list[Row]:
    """The named rows, all where no name is given. ValueError for a name that is none."""
    if unknown := [name for name in names if name not in rows]:
        raise ValueError(f"--rows {','.join(unknown)}: not known; known: {', '.join(rows)}")
    return [row for name, row in rows.items() if not names or name in names]


def main(argv: list[str] | None = None, run: Run | None = None) -> int:
    """The command line; returns the exit status. `run` stands in for the subprocesses."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="of all runs; one that was begun is continued")
    parser.add_argument("--suite", choices=SUITES, default="preference", help="which rows")
    parser.add_argument("--jobs", type=int, default=1, help="runs side by side")
    parser.add_argument("--rows", type=lambda text: text.split(","), default=[], help="a,b,...; default: all")
    parser.add_argument("--seeds", type=lambda text: [int(part) for part in text.split(",")], default=[0, 1, 2])
    parser.add_argument("--clips", type=int, default=512, help="held-out prompts a seed")
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="in every run")
    parser.add_argument("--show", type=Path, help="only print and draw this ablation.json")
    arguments = sys.argv[1:] if argv is None else argv
    options = parser.parse_args(arguments)
    if options.show:
        results, failed = json.loads(options.show.read_text(encoding="utf-8")), {}
        place = options.show
    elif options.folder:
        plan = make_plan(options)
        processes = Processes(options.jobs)
        chosen = choose_rows(plan.make_suite().rows, options.rows)
        try:
            failed = run_all(plan, chosen, run or processes.run, processes.stop, options.jobs)
        except KeyboardInterrupt:
            print("stopped; run the same command to continue", file=sys.stderr)
            return 130
        results = collect(plan, f"python -m eval.experiments.ablation.run {shlex.join(arguments)}")
        place = plan.folder / "ablation.json"
        _write_json(place, results, indent=1)
    else:
        raise ValueError("give --folder to run the ablation, or --show with an ablation.json")
    print(table(results))
    if any(row["trainer"] for row in results["rows"]):
        draw(results, place.with_suffix(".png"))
        print(f"results  {place}\nfigure   {place.with_suffix('.png')}")
    for name, why in failed.items():
        print(f"FAILED   {name}: {why.splitlines()[0]}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a scheduler's stop: trainers save their step
    entry.run(lambda: sys.exit(main()))
