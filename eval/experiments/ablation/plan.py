"""What the ablation runs: each row's commands, where they write, and digests of all that determines them."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, make_dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import recipes
from eval.experiments.ablation.rows import CORRUPTED, GROUPS, SUITES, Row, Suite
from train.files import digest, sha256

RECIPE = "sandbox"
SCORES = ("physical", "semantic")
# Sections that each command reads.
TRAINED = ("backbone", "video", "lora", "objective", "physics", "targets", "self_score", "optim", "sampler")
TRAINED += ("validation", "train")
READS = {
    "data_pipeline.build": ("backbone", "video", "sampler", "pipeline", "vlm", "judge", "raters", "targets"),
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
OWN_KEYS = ("output", "seed", "recipe", "dry_run", "pipeline.groups", "pipeline.losers.count", "train.groups")
OWN_KEYS += ("targets.tracks", "targets.rule", "train.folder", "run.lora", "run.folder", "run.sandbox.clips")
OWN_KEYS += ("run.sandbox.seed", "run.seeds", "benchmarks")

SECTIONS = tuple(dict.fromkeys(chain.from_iterable(READS.values())))
# The recipe with the command line's overrides, unchecked: the commands check what they read.
Sections = make_dataclass("Sections", [(name, dict[str, Any], field(default_factory=dict)) for name in SECTIONS])


def read_recipe(overrides: Sequence[str]) -> dict[str, dict[str, Any]]:
    return asdict(recipes.load(Sections, [f"recipe={RECIPE}", *overrides]))


def read_result(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


@dataclass(frozen=True)
class Plan:
    folder: Path
    seeds: tuple[int, ...]
    suite: str = "preference"  # a key of SUITES
    clips: int = 512  # held-out prompts per seed
    overrides: tuple[str, ...] = ()  # of every run, from --set
    model: str = ""  # fingerprint of the base model
    torch: str = ""  # version
    device: str = ""  # name
    on_gpu: bool = False

    def place(self, name: str, seed: int) -> Path:
        """Of a row, or of a group set."""
        return self.folder / f"{name}-{seed}"

    def make_suite(self) -> Suite:
        return SUITES[self.suite](read_recipe(self.overrides))

    def arguments(self, module: str, *own: str) -> list[str]:
        """`module`'s arguments, the later winning: recipe, device, --set where the command reads it, `own`."""
        chosen = [pair for pair in self.overrides if pair.split(".")[0] in READS[module]]
        device = ON_GPU.get(module, ()) if self.on_gpu else ()
        return [f"recipe={RECIPE}", *device, *chosen, *own]

    def build_command(self, name: str, seed: int) -> tuple[str, list[str]]:
        """Module and arguments that make a group set."""
        place = self.place(name, seed)
        if name == CORRUPTED:
            return "eval.experiments.ablation.corrupted", [str(self.place("groups", seed)), str(place), str(seed)]
        own = (f"output={place}", f"pipeline.groups={place}", *GROUPS[name])
        return "data_pipeline.build", self.arguments("data_pipeline.build", *own, f"seed={seed}")

    def train_arguments(self, row: Row, seed: int) -> list[str]:
        own = (f"output={self.place(row.name, seed)}", f"seed={seed}", f"train.groups={self.place(row.groups, seed)}")
        return self.arguments(row.trainer, *self.filled(row, seed, *row.overrides, *row.base), *own)

    def filled(self, row: Row, seed: int, *overrides: str) -> list[str]:
        """Overrides with the training folder of the row that this one starts from."""
        return [pair.replace("{start}", str(self.place(row.start, seed) / "train")) for pair in overrides]

    def eval_arguments(self, row: Row, seed: int) -> list[str]:
        place = self.place(row.name, seed)
        own = [f"output={place}", f"run.sandbox.clips={self.clips}", f"run.sandbox.seed={seed}"]
        own += [f"run.seeds=[{seed}]", "benchmarks=[sandbox]"]
        lora = [f"run.lora={place / 'train'}"] if row.trainer else []
        return self.arguments("eval.run", *self.filled(row, seed, *row.base), *own, *lora)

    def digests(self, row: Row, seed: int) -> dict[str, str]:
        """Of everything that determines the run, but not of how fast it goes on a device: `training` of what comes
        before the evaluation, `settings` of all, and `groups` of the group set's index, "" where there is none."""
        sections = read_recipe([*self.overrides, *row.overrides, *row.base])
        # Results of earlier versions have these sections below `pipeline`, and so have all digests.
        moved = ("vlm", "judge", "raters", "targets")
        sections["pipeline"] |= {name: found for name in moved if (found := sections.pop(name))}

        def settings(*modules: str) -> dict[str, Any]:
            return {name: sections[name] for module in modules for name in READS[module] if name in sections}

        groups = [f"pipeline.{text.removeprefix('pipeline.')}" for text in GROUPS[row.groups]]
        kind = [row.trainer, groups, seed, self.model]
        if row.start:
            kind.append(self.digests(self.make_suite().rows[row.start], seed)["training"])
        training = digest([kind, settings("data_pipeline.build", row.trainer)]) if row.trainer else ""
        index = self.place(row.groups, seed) / "index.json"
        return {
            "training": training,
            "settings": digest([training, settings("eval.run"), seed, self.clips, self.model]),
            "groups": sha256(index) if row.trainer and index.exists() else "",
        }

    def result(self, row: Row, seed: int) -> dict[str, Any] | None:
        """The finished run's result, if it was made with today's settings; its groups need not be there any more."""
        result, today = read_result(self.place(row.name, seed) / "result.json"), self.digests(row, seed)
        if result and today["groups"] in ("", result["groups"]) and today["settings"] == result["settings"]:
            return result
        return None


def check_overrides(overrides: Sequence[str]) -> None:
    """ValueError for an override that is no key=value, that no command reads, or that tells the runs apart."""
    for pair in overrides:
        key, equals, _ = pair.partition("=")
        if not equals:
            raise ValueError(f"--set {pair}: {key} is no key=value")
        if key in OWN_KEYS:
            raise ValueError(f"--set {pair}: {key} is set for each run by the ablation itself (see --clips, --seeds)")
        if key.split(".")[0] not in SECTIONS:
            raise ValueError(f"--set {pair}: no command reads it; sections: {', '.join(sorted(SECTIONS))}")
