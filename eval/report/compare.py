"""Several runs of eval.run side by side: figures, and paired differences where prompts and seeds agree.

    python -m eval.report.compare runs/sft runs/gdpo                    # Markdown
    python -m eval.report.compare runs/sft runs/gdpo --html compared.html

A run is its output folder or the folder with results.json. Differences are to the first run's last model: its tuned
one, or the base model. Runs whose benchmark settings differ are refused.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ConfigDict
from typing_extensions import TypedDict

from eval.benchmarks import BENCHMARKS, BenchmarkSettings
from eval.benchmarks.base import Benchmark
from eval.report import page, tables
from eval.report.results import TRUE, Score, differences
from train import entry
from train.clips import VideoConfig
from train.files import parse_json, read_json, write_text


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(prog="python -m eval.report.compare", description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", metavar="RUN", help="output folder of eval.run")
    parser.add_argument("--html", metavar="FILE", help="also write a page")
    arguments = parser.parse_args(argv)
    compared = compare([Run(path) for path in dict.fromkeys(arguments.runs)])
    print(tables.comparison_markdown(compared), end="")
    if arguments.html:
        write_text(Path(arguments.html), page.comparison_html(compared))
    return compared


class Cell(TypedDict):
    """A figure."""

    __pydantic_config__ = ConfigDict(extra="allow")
    mean: float
    low: float
    high: float
    clips: int


class OfModel(TypedDict):
    clips: int
    missing: int
    figures: dict[str, Cell | None]


class OfBenchmark(TypedDict):
    settings: dict[str, Any]
    figures: list[str]
    lower_is_better: list[str]
    models: dict[str, OfModel]


class Settings(TypedDict):
    run: dict[str, Any]
    video: VideoConfig


class Results(TypedDict):
    """What is read of results.json."""

    settings: Settings
    benchmarks: dict[str, OfBenchmark]


class Run:
    """A finished run; ValueError where there is none."""

    def __init__(self, path: str):
        self.name = path
        folders = [Path(path), Path(path) / "eval"]
        folder = next((folder for folder in folders if (folder / "results.json").is_file()), None)
        if folder is None:
            raise ValueError(f"{path} holds no results.json, nor does its folder eval: give a run of eval.run")
        again = "run eval.run with the same settings again, which keeps clips and rows"
        self.results = read_json(folder / "results.json", Results, remedy=again)
        for name, found in self.results["benchmarks"].items():
            for model, own in found["models"].items():
                if not found["figures"] or not own["figures"].keys() >= set(found["figures"]):
                    raise ValueError(f"{folder / 'results.json'} lacks figures of {name}, model {model}; {again}")
        path = folder / "scores.jsonl"
        if not path.is_file():
            raise ValueError(f"{path} is missing; {again}")
        self.scores = [
            parse_json(line, Score, name=f"{path}, line {number}", remedy=again)
            for number, line in enumerate(path.read_bytes().splitlines(), start=1)
        ]

    def rows(self, benchmark: str, model: str) -> list[Score]:
        return [score for score in self.scores if (score["benchmark"], score["model"]) == (benchmark, model)]

    def benchmark(self, name: str) -> Benchmark:
        """The benchmark as it was set; keys that it no longer has do not count."""
        kept, kind = json.dumps(self.results["settings"]["run"].get(name, {})), type(getattr(BenchmarkSettings(), name))
        settings = parse_json(kept, kind, name=f"{self.name}: run.{name}", remedy="run eval.run again")
        return BENCHMARKS[name](settings, self.results["settings"]["video"])


def compare(runs: Sequence[Run]) -> dict[str, Any]:
    """Figures and differences as plain JSON values. ValueError for runs that cannot be compared."""
    kept = [{name for name, own in run.results["benchmarks"].items() if own["models"]} for run in runs]
    names = [name for name in runs[0].results["benchmarks"] if all(name in own for own in kept)]
    if unknown := [name for name in names if name not in BENCHMARKS]:
        raise ValueError(f"{runs[0].name} has the benchmark {unknown[0]!r}: use one of {', '.join(BENCHMARKS)}")
    if not names:
        raise ValueError(f"{', '.join(run.name for run in runs)} have no benchmark in common")
    found: dict[str, Any] = {"runs": [run.name for run in runs], "benchmarks": {}}
    for name in names:
        for run in runs[1:]:
            check_settings(name, runs[0], run)
        found["benchmarks"][name] = compare_benchmark(name, runs)
    return found


def check_settings(name: str, first: Run, other: Run) -> None:
    """ValueError, naming key and values, unless both runs set the benchmark alike."""
    if first.results["benchmarks"][name]["figures"] != other.results["benchmarks"][name]["figures"]:
        raise ValueError(f"{first.name} and {other.name} have other figures of {name}: evaluate both with one version")
    ours, theirs = (flat(run.results["benchmarks"][name]["settings"]) for run in (first, other))
    for key in sorted(ours.keys() | theirs.keys()):
        if ours.get(key) != theirs.get(key):
            raise ValueError(
                f"run.{name}.{key} is {ours.get(key)!r} in {first.name} and {theirs.get(key)!r} in {other.name}:"
                " these are not comparable; evaluate both with the same"
            )


def flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings with dotted keys."""
    found: dict[str, Any] = {}
    for key, value in settings.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value}
    return found


def compare_benchmark(name: str, runs: Sequence[Run]) -> dict[str, Any]:
    """One benchmark: a row for every model of every run, the same base model once."""
    benchmark, first = runs[0].benchmark(name), runs[0].results["benchmarks"][name]
    models = list(first["models"])
    reference = runs[0].rows(name, models[-1])
    rows: list[dict[str, Any]] = []
    for run in runs:
        for model, one in run.results["benchmarks"][name]["models"].items():
            figures = one["figures"]
            if any(row["model"] == model and row["figures"] == figures for row in rows):
                continue  # the references, and a base model that several runs share
            row = {"run": run.name, "model": model, "clips": one["clips"], "missing": one["missing"]}
            row |= {"figures": figures, "difference": None}
            own = run.rows(name, model)
            if model != TRUE and (run, model) != (runs[0], models[-1]) and _pairs(own, reference):
                row["difference"] = differences(benchmark, own, reference)
            rows.append(row)
    figures = {"figures": first["figures"], "lower_is_better": first["lower_is_better"]}
    return {**figures, "reference": [runs[0].name, models[-1]], "rows": rows}


def _pairs(rows: Sequence[Score], others: Sequence[Score]) -> bool:
    """Whether any prompt and seed stands in both."""
    ours, theirs = ({(row["key"], row["seed"], row["prompt"]) for row in part} for part in (rows, others))
    return not ours.isdisjoint(theirs)


if __name__ == "__main__":
    entry.run(main)
