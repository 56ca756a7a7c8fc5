"""VBench (Huang et al., CVPR 2024, arXiv 2311.17982): does the picture stay good? Six dimensions, for any prompts.

The five of Proprio's Table 6 (subject and background consistency, motion smoothness, aesthetic and imaging quality) and
dynamic degree, without which a model that stands still looks best. None of them looks at the prompt's words, so VBench
takes clips of any prompts ("custom_input").

VBench (github.com/Vchitect/VBench, 0.1.5) runs in an environment of its own, that of `raters.vbench.python`:

    python <package>/launch/evaluate.py --mode custom_input --videos_path <folder> --dimension <six names>
        --prompt_file prompts.json --output_path <folder>

It writes results_<time>_eval_results.json: for each dimension [mean, [{"video_path", "video_results"}, ...]]. A clip's
`video_results` is the row's value, except that imaging quality is out of 100 there and, as in VBench's mean, out of 1
here; dynamic degree is true or false. Figures are means over clips. So are VBench's own, but that on one GPU the two
consistencies are means over frames: the same where all clips have equally many.

VBench needs a GPU, at least two frames a clip, and the network when it first loads a dimension's weights.
"""

import json
import math
import os
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch.distributed.elastic.utils.distributed import get_free_port

from eval.benchmarks.base import Benchmark, Requirement, Row, Sample, Task, read_published
from eval.benchmarks.official_files import place_all
from eval.judges.external_tool import Tool, ToolError, find_python, tool_environment, tool_settings
from eval.prompts import PromptsConfig, read_prompts
from train.clips import ClipError, read_clip
from train.files import write_text

PROGRAM = "launch/evaluate.py"  # of the package
DEVICE = "cuda"  # VBench knows no CPU; CUDA_VISIBLE_DEVICES chooses among several
DIMENSIONS = (
    "subject_consistency",
    "background_consistency",
    "motion_smoothness",
    "aesthetic_quality",
    "imaging_quality",
    "dynamic_degree",
)
SCALE = {"imaging_quality": 100.0}  # of a clip's value; 1 elsewhere
# Where the package lies, without importing it; the folder that one happens to be in does not count.
FIND = (
    "import importlib.util, sys; sys.path.pop(0); found = importlib.util.find_spec('vbench');"
    " print(list(found.submodule_search_locations)[0] if found else '')"
)
FIND_SECONDS = 60.0
# Of `accelerate launch`: with them the tool would wait for ranks that are not its own.
OF_OUR_RANKS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass
class VBenchConfig:
    prompts_file: str = ""  # .txt, one prompt per line; .csv or .jsonl, columns prompt [image] [key]


class VBench(Benchmark):
    name = "vbench"
    columns = DIMENSIONS
    figures = DIMENSIONS
    clips_a_call = 128  # scored together, and lost together if the run is stopped
    published = read_published("vbench")

    @property
    def recorded(self) -> dict[str, Any]:
        return super().recorded | tool_settings(self.raters.vbench) | {"device": DEVICE}

    def requirements(self) -> list[Requirement]:
        file = "name a file of prompts in run.vbench.prompts_file, as for generate.prompts_file"
        return [
            self.needs("prompts_file", "prompts of your own", "yours", file),
            Requirement(
                "VBench and a GPU",
                "Apache 2.0; the weights that it downloads have licences of their own",
                f"raters.vbench.python={self.raters.vbench.python}",
                self._package is not None,
                "make an environment with a CUDA build of PyTorch, `pip install vbench` there, and name its interpreter"
                " in raters.vbench.python; VBENCH_CACHE_DIR may say where its weights go",
            ),
        ]

    def prompts(self) -> list[Task]:
        """One task per prompt, in the order of the file."""
        self.path("prompts_file", self.requirements()[0].remedy)
        found = read_prompts(PromptsConfig(prompts_file=self.settings.prompts_file), "run.vbench")
        return [Task(one.key, one.text, image=one.image) for one in found]

    def layout(self, samples: Sequence[Sample], folder: Path) -> Path:
        """`videos/<key>-<seed>.mp4`, and prompts.json as VBench's --prompt_file reads it."""
        place_all(samples, folder / "videos", _name)
        prompts = {_name(sample): sample.task.text for sample in samples if sample.path.is_file()}
        write_text(folder / "prompts.json", json.dumps(prompts, ensure_ascii=False, indent=1) + "\n")
        return folder

    def score(self, samples: Sequence[Sample], folder: Path) -> Iterator[Row]:
        """Rows by `clips_a_call`. ToolError, with the end of its output, where VBench fails as a whole."""
        tool = self._tool()
        for start in range(0, len(samples), self.clips_a_call):
            readable = []
            for sample in samples[start : start + self.clips_a_call]:
                try:
                    read_clip(sample.path, self.model_video)
                    readable.append(sample)
                except ClipError as error:  # one of them would stop VBench for all
                    yield Row.of(sample, error=str(error))
            if readable:
                yield from self._call(tool, readable, folder)

    def _call(self, tool: Tool, samples: Sequence[Sample], folder: Path) -> Iterator[Row]:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.absolute()) as temporary:
            laid_out, results = self.layout(samples, Path(temporary)), Path(temporary) / "results"
            arguments = ["--mode", "custom_input", "--videos_path", str(laid_out / "videos")]
            arguments += ["--prompt_file", str(laid_out / "prompts.json"), "--output_path", str(results)]
            arguments += ["--full_json_dir", str(tool.checkout / "VBench_full_info.json")]
            tool.run(PROGRAM, [*arguments, "--dimension", *DIMENSIONS], laid_out)
            values = read_results(results)
        for sample in samples:
            own = values.get(_name(sample), {})
            if lacking := [name for name in DIMENSIONS if name not in own]:
                yield Row.of(sample, error=f"{sample.path}: VBench gave no {', '.join(lacking)}")
            else:
                yield Row.of(sample, own)

    def _tool(self) -> Tool:
        """VBench, ready to run; ValueError where the interpreter has no such package."""
        if self._package is None:
            needed = self.requirements()[1]
            raise ValueError(f"{needed.where} has no package vbench: {needed.remedy}")
        own = {name: value for name, value in os.environ.items() if name not in OF_OUR_RANKS}
        environment = tool_environment(own, torch.device(DEVICE))
        environment["MASTER_PORT"] = str(get_free_port())
        # In place of a checkpoint the package again: VBench keeps its weights in a cache of its own.
        return Tool(self.name, find_python(self.raters.vbench), self._package, self._package, environment)

    @cached_property
    def _package(self) -> Path | None:
        """The folder of the package vbench in the user's environment."""
        if not (python := find_python(self.raters.vbench)):
            return None
        environment = tool_environment(os.environ, torch.device("cpu"))
        try:
            found = subprocess.run(
                [python, "-c", FIND], env=environment, capture_output=True, text=True, timeout=FIND_SECONDS
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        package = found.stdout.strip()
        return Path(package) if package and found.returncode == 0 and (Path(package) / PROGRAM).is_file() else None


def read_results(folder: Path) -> dict[str, dict[str, float]]:
    """File name -> dimension -> value, of what VBench wrote; ToolError where that is no results file."""
    files = sorted(folder.glob("*_eval_results.json"))
    if len(files) != 1:
        raise ToolError(f"vbench: it ended well, but wrote {len(files)} files *_eval_results.json instead of one")
    try:
        results = json.loads(files[0].read_text(encoding="utf-8"))
        found: dict[str, dict[str, float]] = {}
        for dimension in DIMENSIONS:
            for entry in results.get(dimension, (None, ()))[1]:  # one that is not there is missing in every row
                value = float(entry["video_results"]) / SCALE.get(dimension, 1.0)
                if math.isfinite(value):
                    found.setdefault(Path(entry["video_path"]).name, {})[dimension] = value
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise ToolError(f"vbench: {files[0].name} is none of VBench 0.1.5's results ({error!r})") from error
    return found


def _name(sample: Sample) -> str:
    return f"{sample.task.key}-{sample.seed}.mp4"
