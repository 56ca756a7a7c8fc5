"""The robots' base model from scratch, with its figures: one command, stopped and continued as often as one likes.

    python -m eval.experiments.robots_model.run --folder runs/robots_base --minutes 9    # again until it is done
    python -m eval.experiments.robots_model.run --folder runs/robots_small --small       # hardly anything

    <folder>/demonstrations/     recorded once for all trainings
    <folder>/vae/                its figures and pictures as well
    <folder>/groups/, train/     latents of the demonstrations; the DiT's training by train/sft.py
    <folder>/model/              the pipeline, and the inverse dynamics model that planners share
    <folder>/eval/, bounds/      the benchmarks robots and planner; what planners can reach
    <folder>/log/                what each step printed
    <folder>/steps.json          the seconds of each
    <folder>/results.json        all figures, written last

Each step is a command of its own and is not repeated once it is done. When the minutes are over, the one under way is
asked to stop (SIGTERM): trainings save a checkpoint, recordings, builds and evaluations keep what they have. Exit
status: 0 all is done, 1 a step failed, 75 the minutes were over before.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eval.experiments.processes import add_minutes, deadline, end, unfinished
from eval.report.intervals import wilson
from eval.robots.model import Size, choose
from train import entry
from train.files import digest, lock, write_text

SHOWN = 15.0  # seconds between two lines about how far it is
TF32 = (("TORCH_ALLOW_TF32_CUBLAS_OVERRIDE", "1"),)  # float32 products with 10 bits of mantissa, several times as fast

Variables = tuple[tuple[str, str], ...]  # of a process's environment


@dataclass(frozen=True)
class Step:
    name: str
    command: tuple[str, ...]  # module and arguments
    product: str  # in the folder, without which the step is not done
    environment: Variables = ()  # variables besides this process's own


def build_steps(folder: Path, size: Size, *, small: bool) -> list[list[Step]]:
    """Those of one list run side by side."""

    def own(name: str, product: str) -> Step:
        module = "eval.experiments.robots_model.steps"
        options = (f"--folder={folder}", f"--clips={size.clips}", *(["--small"] if small else []))
        return Step(name, (module, name, *options), product)

    def of_recipe(name: str, module: str, product: str, *arguments: str, environment: Variables = ()) -> Step:
        return Step(name, (module, *arguments, f"output={folder}"), product, environment)

    base = ("recipe=robots_base", f"pipeline.manifest={size.manifest}", *size.overrides)
    evaluated = ("recipe=robots", f"backbone.path={folder}/model", *size.evaluation)
    bounds = ("eval.experiments.planner.bounds", f"--folder={folder}/bounds", f"--episodes={size.episodes}")
    return [
        [own("begin", "demonstrations")],
        [own("vae", "start/model_index.json"), own("record", "demonstrations")],
        [of_recipe("build", "data_pipeline.build", "groups/index.json", *base)],
        [
            of_recipe("train", "train.sft", "train/transformer/config.json", *base, environment=TF32),
            own("inverse_dynamics", "inverse_dynamics.json"),
        ],
        [own("model", "flow.json")],
        [
            of_recipe("evaluate", "eval.run", "eval/results.json", *evaluated),
            *([] if small else [Step("bounds", bounds, "bounds/episodes.jsonl")]),
        ],
    ]


class Runner:
    """Runs steps until `deadline`, by time.monotonic()."""

    def __init__(self, folder: Path, deadline: float):
        self.folder, self.deadline = folder, deadline
        self.path = folder / "steps.json"
        self.done: dict[str, Any] = json.loads(self.path.read_text("utf-8")) if self.path.exists() else {}

    def is_done(self, step: Step) -> bool:
        known, product = self.done.get(step.name, {}), self.folder / step.product
        return known.get("digest") == digest(step.command) and product.exists() and not self.problem(step)

    def problem(self, step: Step) -> str:
        """Of an evaluation in which a benchmark failed: others may have run, so that its command ended well."""
        if step.command[0] != "eval.run":
            return ""
        found = json.loads((self.folder / step.product).read_text("utf-8"))["benchmarks"]
        return "; ".join(f"benchmark {name}: {one['problem']}" for name, one in found.items() if one["problem"])

    def run(self, steps: list[Step]) -> bool:
        """Run those that are not done; False where the time was over before. ValueError where one failed."""
        todo = [step for step in steps if not self.is_done(step)]
        if todo and time.monotonic() > self.deadline:
            return False
        running = {step: self._start(step) for step in todo}
        began = shown = time.monotonic()
        try:
            while any(process.poll() is None for process in running.values()):
                time.sleep(0.2)
                now = time.monotonic()
                if now > self.deadline or any(process.poll() for process in running.values()):
                    break
                if now > shown + SHOWN:
                    shown = now
                    for step, process in running.items():
                        if process.poll() is None:
                            print(f"{step.name} {now - began:.0f} s: {self._last_line(step)}", flush=True)
        finally:
            failed = [step for step, process in running.items() if process.poll()]  # by a signal, too
            end(list(running.values()))
        for step, process in running.items():
            self._conclude(step, process, time.monotonic() - began)
        for step, process in running.items():
            if step in failed or process.returncode > 0:
                tail = "\n  ".join(self._log(step).read_text("utf-8", errors="replace").splitlines()[-12:])
                status = process.returncode
                raise ValueError(f"{step.name} ended with status {status}, see {self._log(step)}:\n  {tail}")
            if process.returncode == 0 and (problem := self.problem(step)):
                raise ValueError(f"{problem}; mend it and run the same command again")
        return all(map(self.is_done, todo))

    def _start(self, step: Step) -> subprocess.Popen:
        log = self._log(step)
        log.parent.mkdir(parents=True, exist_ok=True)
        environment = {**os.environ, "PYTHONUNBUFFERED": "1", **dict(step.environment)}
        with log.open("a", encoding="utf-8") as file:
            command = [sys.executable, "-m", *step.command]
            return subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environment)

    def _conclude(self, step: Step, process: subprocess.Popen, seconds: float) -> None:
        known = self.done.setdefault(step.name, {"seconds": 0.0})
        known["seconds"] = round(known["seconds"] + seconds, 1)  # of the slowest of those side by side
        if process.returncode == 0 and (self.folder / step.product).exists():
            known["digest"] = digest(step.command)
        if process.returncode == 0 and self.is_done(step):
            print(f"{step.name} done, {known['seconds']:.0f} s: {self._last_line(step)}", flush=True)
        write_text(self.path, json.dumps(self.done, indent=2) + "\n")

    def _log(self, step: Step) -> Path:
        return self.folder / "log" / f"{step.name}.txt"

    def _last_line(self, step: Step) -> str:
        lines = self._log(step).read_bytes()[-2000:].decode("utf-8", errors="replace").replace("\r", "\n").split("\n")
        return next((line.strip()[:160] for line in reversed(lines) if line.strip()), "")


def collect(folder: Path) -> dict[str, Any]:
    """All figures of a finished folder."""

    def read(name: str) -> Any:
        path = folder / name
        return json.loads(path.read_text("utf-8")) if path.exists() else None

    path = folder / "bounds" / "episodes.jsonl"
    rows = list(map(json.loads, path.read_text("utf-8").splitlines())) if path.exists() else []
    reached: dict[str, list[bool]] = {}
    for row in rows:
        reached.setdefault(row["planner"], []).append(bool(row["success"]))
    return {
        "seconds": {name: step["seconds"] for name, step in read("steps.json").items()},
        "vae": read("vae/training.json"),
        "inverse_dynamics": read("inverse_dynamics.json"),
        "flow": read("flow.json"),
        "bounds": {planner: str(wilson(sum(found), len(found))) for planner, found in reached.items()},
        "benchmarks": read("eval/results.json"),
    }


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    started = time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="of all steps; one that was begun is continued")
    add_minutes(parser)
    parser.add_argument("--small", action="store_true", help="hardly anything, to see that all parts fit")
    parser.add_argument("--clips", type=int, default=0, help="demonstrations that the DiT learns from; 0: as usual")
    given = parser.parse_args(argv)
    until = deadline(started, given.minutes)
    size = choose(small=given.small, clips=given.clips)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # which ends the steps under way
    with lock(given.folder):
        runner = Runner(given.folder, until)
        for steps in build_steps(given.folder, size, small=given.small):
            if not runner.run(steps):
                return unfinished(started)
        figures = collect(given.folder)
        write_text(given.folder / "results.json", json.dumps(figures, indent=2) + "\n")
        shown = {name: part for name, part in figures.items() if name not in ("vae", "benchmarks")}
        print(json.dumps(shown, indent=2))
        print((given.folder / "eval" / "report.md").read_text("utf-8"))
    return 0


if __name__ == "__main__":
    entry.run(lambda: sys.exit(main()))
