"""Fixtures of the training tests: one tiny Wan pipeline and its preference groups a session, and short runs on them."""

import gc
import getpass
import json
import multiprocessing
import os
import signal
import tempfile
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file

import recipes
from tests.synthetic_groups import write_synthetic_groups
from tests.train.two_process_worker import train
from train import gdpo
from train.backbones.loading import fingerprint
from train.backbones.tiny import write_tiny_pipeline

# Compiled code of the tests: theirs alone, and kept from run to run and for every checkout, for it takes minutes.
COMPILED = Path(tempfile.gettempdir()) / f"physalign-tests-{getpass.getuser()}"
os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(COMPILED / "inductor")
os.environ["TORCH_EXTENSIONS_DIR"] = str(COMPILED / "extensions")

# The networks here are tiny: more threads only wait for each other. Also of the processes that tests start.
torch.set_num_threads(int(os.environ.setdefault("OMP_NUM_THREADS", "1")))

LATENT_SHAPE = (16, 5, 8, 8)  # (C, F, H, W) of the tiny recipe: 64x64 pixels, 17 frames
TEXT_SHAPE = (12, 64)  # (L', D)
# Metrics that differ from run to run.
CLOCK = {"seconds", "data_seconds", "tokens_per_second", "tflops_per_device", "memory_gib", "eta_seconds"}


def pytest_collection_finish() -> None:
    """What the tests import stays for good: collecting garbage, as a build does after every stage, skips it."""
    gc.collect()
    gc.freeze()


@dataclass
class Tiny:
    """The tiny recipe on a pipeline `model` and a folder of `groups`: two groups a step, no clips, no loaders."""

    model: Path
    groups: Path
    fingerprint: str

    def arguments(self, folder: Path, *more: str) -> list[str]:
        """Command line of a run below `folder`; later arguments win."""
        return [
            "recipe=tiny",
            f"output={folder}",
            f"backbone.path={self.model}",
            f"train.groups={self.groups}",
            "train.num_workers=0",
            "optim.batch_size=2",
            "validation.prompts=[]",
            "objective.preset=paper",  # what most tests say by hand
            *more,
        ]

    def config(self, folder: Path, *more: str, entry: ModuleType = gdpo):
        return recipes.load(entry.Config, self.arguments(folder, *more))

    def train(self, folder: Path, *more: str, entry: ModuleType = gdpo) -> Path:
        """Train in this process; returns the run's folder of checkpoints."""
        before = signal.getsignal(signal.SIGTERM)
        try:
            entry.main(self.arguments(folder, *more))
        finally:
            signal.signal(signal.SIGTERM, before)
        return folder / "train" / "checkpoints"

    def process(self, folder: Path, *more: str, entry: ModuleType = gdpo) -> multiprocessing.Process:
        """A process of its own that trains, already started; a fork server spares it the seconds of imports."""
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["train.gdpo", "train.sft"])
        process = context.Process(target=train, args=(entry.__name__, self.arguments(folder, *more)))
        process.start()
        return process

    def metrics(self, folder: Path) -> list[dict[str, float]]:
        """Lines of metrics.jsonl of the run below `folder`, without what a clock gave."""
        lines = (folder / "train" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        return [{key: value for key, value in json.loads(line).items() if key not in CLOCK} for line in lines]

    def weights(self, path: Path) -> dict[str, torch.Tensor]:
        """What trains and the optimizer's moments, out of checkpoint folder `path`."""
        return {name: tensor for file in path.glob("*.safetensors") for name, tensor in load_file(file).items()}


@pytest.fixture(scope="session")
def tiny_pipeline(tmp_path_factory) -> Path:
    return write_tiny_pipeline("wan21", tmp_path_factory.mktemp("pipeline"))


def make_tiny(pipeline: Path, groups: Path, *, targets: bool) -> Tiny:
    name = fingerprint("wan21", pipeline)
    shapes = {"latent_shape": LATENT_SHAPE, "text_shape": TEXT_SHAPE}
    write_synthetic_groups(groups, num_groups=8, num_losers=4, **shapes, fingerprint=name, targets=targets)
    return Tiny(pipeline, groups, name)


@pytest.fixture(scope="session")
def tiny(tiny_pipeline, tmp_path_factory) -> Tiny:
    """8 groups of 4 losers each, of the tiny pipeline."""
    return make_tiny(tiny_pipeline, tmp_path_factory.mktemp("groups"), targets=False)


@pytest.fixture(scope="session")
def tiny_targets(tiny_pipeline, tmp_path_factory) -> Tiny:
    """The same groups with random physics targets."""
    return make_tiny(tiny_pipeline, tmp_path_factory.mktemp("groups_with_targets"), targets=True)


@pytest.fixture(autouse=True)
def no_long_waits(monkeypatch):
    """Servers that fail in tests are asked again at once."""
    monkeypatch.setattr("eval.vlm.client.BACKOFF", 0.01)


@pytest.fixture
def two_tries(monkeypatch):
    """A question without an answer is asked once more."""
    monkeypatch.setattr("eval.vlm.client.RETRIES", 1)
