"""VBench through a program that stands in for it: it reads the official arguments and writes the official results."""

import json
import os
import sys
from pathlib import Path

import pytest
import torch

from eval.benchmarks import vbench
from eval.benchmarks.base import Sample, Task
from eval.benchmarks.vbench import DIMENSIONS, VBench, VBenchConfig, read_results
from eval.judges.external_tool import EnvironmentConfig, RatersConfig, ToolError
from train.clips import VideoConfig, write_clip

VIDEO = VideoConfig(16, 16, 5, 8.0)
# Takes the arguments that vbench/launch/evaluate.py takes, and lists clips as custom_input does.
PROGRAM = """
import argparse, json, os, sys
parser = argparse.ArgumentParser()
for name in ("output_path", "full_json_dir", "videos_path", "mode", "prompt_file"):
    parser.add_argument("--" + name, required=True)
parser.add_argument("--dimension", nargs="+", required=True)
arguments = parser.parse_args()
here = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
behaviour = json.load(open(os.path.join(here, "behaviour.json")))
prompts = json.load(open(arguments.prompt_file))
names = [name for name in os.listdir(arguments.videos_path) if name.endswith(".mp4")]
assert arguments.mode == "custom_input" and set(names) <= set(prompts)
with open(os.path.join(here, "calls.jsonl"), "a") as file:
    file.write(json.dumps({"prompts": prompts, "environment": dict(os.environ), "argv": sys.argv[1:]}) + chr(10))
if behaviour == "crash":
    print("RuntimeError: no NVIDIA driver", file=sys.stderr)
    sys.exit(1)
results = {}
for number, dimension in enumerate(arguments.dimension):
    clips = []
    for name in sorted(names):
        value = (number + 1) / 10 + len(prompts[name]) / 1000
        value = {"imaging_quality": 100 * value, "dynamic_degree": len(prompts[name]) % 2 == 0}.get(dimension, value)
        clips.append({"video_path": os.path.join(arguments.videos_path, name), "video_results": value})
        if dimension == "background_consistency":
            clips[-1] |= {"video_sim": 4 * value, "cnt_per_video": 4}
    if behaviour == "partial" and dimension == "motion_smoothness":
        clips = clips[1:]
    results[dimension] = [0.5, clips]
os.makedirs(arguments.output_path, exist_ok=True)
if behaviour != "silent":
    with open(os.path.join(arguments.output_path, "results_2026-01-01-00:00:00_eval_results.json"), "w") as file:
        json.dump(results, file)
"""


@pytest.fixture
def package(tmp_path):
    """A folder with the package vbench, and an interpreter that finds it: (interpreter, the package's folder)."""
    folder = tmp_path / "site" / "vbench"
    (folder / "launch").mkdir(parents=True)
    (folder / "__init__.py").write_text("raise ImportError('is never imported to be found')", encoding="utf-8")
    (folder / "launch" / "evaluate.py").write_text(PROGRAM, encoding="utf-8")
    (folder / "behaviour.json").write_text('""', encoding="utf-8")
    python = tmp_path / "python"  # stands in for an environment's
    python.write_text(f'#!/bin/sh\nPYTHONPATH={tmp_path / "site"} exec {sys.executable} "$@"\n', encoding="utf-8")
    python.chmod(0o755)
    return python, folder


def build(tmp_path, package):
    file = tmp_path / "prompts.txt"
    file.write_text("a ball falls\nwater, poured; $(touch pwned)\na third\n", encoding="utf-8")
    raters = RatersConfig(vbench=EnvironmentConfig(str(package[0])))
    return VBench(VBenchConfig(prompts_file=str(file)), VIDEO, None, raters)


def samples_of(benchmark, tmp_path, seeds=(0, 1)):
    made = []
    for task in benchmark.prompts():
        for seed in seeds:
            path = tmp_path / "clips" / f"{task.key}-{seed}.mp4"
            write_clip(path, torch.full((5, 16, 16, 3), 90, dtype=torch.uint8), 8.0)
            made.append(Sample(task, seed, path))
    return made


def calls(package):
    return [json.loads(line) for line in (package[1] / "calls.jsonl").read_text(encoding="utf-8").splitlines()]


def test_a_row_a_clip(tmp_path, package, monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "MASTER_PORT"):  # as of `accelerate launch`
        monkeypatch.setenv(name, "8")
    benchmark = build(tmp_path, package)
    benchmark.clips_a_call = 4
    assert all(needed.found for needed in benchmark.requirements())
    assert benchmark.recorded["timeout"] == 1800.0  # as in earlier runs, whose rows are found by it
    samples = samples_of(benchmark, tmp_path)
    samples[1].path.write_bytes(b"no clip")
    rows = {(row.key, row.seed): row for row in benchmark.score(samples, tmp_path / "work")}
    assert set(rows) == {(sample.task.key, sample.seed) for sample in samples}
    broken = rows.pop((samples[1].task.key, 1))
    assert str(samples[1].path) in broken.error and not broken.values
    for sample in samples:
        if (row := rows.get((sample.task.key, sample.seed))) is not None:
            length = len(sample.task.text)
            expected = {name: (number + 1) / 10 + length / 1000 for number, name in enumerate(DIMENSIONS)}
            assert row.values == pytest.approx(expected | {"dynamic_degree": float(length % 2 == 0)})
    first, second = calls(package)
    assert len(first["prompts"]) == 3 and len(second["prompts"]) == 2
    assert "water, poured; $(touch pwned)" in first["prompts"].values() and "pwned" not in str(first["argv"])
    environment = first["environment"]
    assert "RANK" not in environment and "WORLD_SIZE" not in environment and environment["MASTER_PORT"] != "8"
    assert [path.name for path in (tmp_path / "work").iterdir()] == []
    assert not (Path.cwd() / "pwned").exists()


def test_what_it_does_not_score_is_an_error(tmp_path, package):
    (package[1] / "behaviour.json").write_text('"partial"', encoding="utf-8")
    benchmark = build(tmp_path, package)
    rows = list(benchmark.score(samples_of(benchmark, tmp_path, seeds=(0,)), tmp_path / "work"))
    assert [bool(row.error) for row in rows].count(True) == 1
    assert "motion_smoothness" in next(row.error for row in rows if row.error)


@pytest.mark.parametrize(("behaviour", "message"), [("crash", "no NVIDIA driver"), ("silent", "0 files")])
def test_a_tool_that_fails_says_so(tmp_path, package, behaviour, message):
    (package[1] / "behaviour.json").write_text(json.dumps(behaviour), encoding="utf-8")
    benchmark = build(tmp_path, package)
    with pytest.raises(ToolError, match=message):
        list(benchmark.score(samples_of(benchmark, tmp_path, seeds=(0,)), tmp_path / "work"))


def test_results_of_another_form_are_refused(tmp_path):
    file = tmp_path / "results_now_eval_results.json"
    for text in ("[1", "[]", '{"subject_consistency": 0.5}', '{"subject_consistency": [0.5, [{"video_path": "a"}]]}'):
        file.write_text(text, encoding="utf-8")
        with pytest.raises(ToolError, match="none of VBench"):
            read_results(tmp_path)


def test_requirements_name_what_is_missing(tmp_path, package):
    prompts, program = VBench(VBenchConfig(), VIDEO).requirements()
    assert not prompts.found and "run.vbench.prompts_file" in prompts.remedy
    assert not program.found and "pip install vbench" in program.remedy and "Apache" in program.licence
    with pytest.raises(ValueError, match="run.vbench.prompts_file"):
        VBench(VBenchConfig(), VIDEO).prompts()
    without = VBench(VBenchConfig(), VIDEO, None, RatersConfig(vbench=EnvironmentConfig(sys.executable)))
    assert not without.requirements()[1].found
    task = Task("a", "a ball")
    with pytest.raises(ValueError, match="no package vbench"):
        list(without.score([Sample(task, 0, tmp_path / "a-0.mp4")], tmp_path))


def test_published_figures_are_of_five_dimensions():
    assert len(VBench.published) == 8
    assert all(set(one.values) == set(DIMENSIONS) - {"dynamic_degree"} for one in VBench.published)
    assert VBench.published[2].values["aesthetic_quality"] == 0.54 and "Table 6" in VBench.published[2].source
    assert os.path.basename(vbench.PROGRAM) == "evaluate.py"
