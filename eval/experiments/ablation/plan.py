"""What the ablation runs: each row's commands, where they write, and digests of all that determines them."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, make_dataclass
from functools import cached_property, partial
from itertools import chain
from pathlib import Path
from typing import Any

import recipes
from eval.experiments.ablation.rows import CORRUPTED, GROUPS, SUITES
from eval.experiments.ablation.suite import START, WORLD_MODEL, Row, Suite, World
from eval.robots.recordings import FOLDER
from train.files import digest, sha256

# Sections that each command reads.
TRAINED = ("backbone", "video", "lora", "objective", "physics", "targets", "self_score", "optim", "sampler")
TRAINED += ("validation", "train")
READS = {
    "data_pipeline.build": ("backbone", "video", "sampler", "pipeline", "vlm", "judge", "raters", "targets"),
    "train.gdpo": TRAINED,
    "train.sft": TRAINED,
    "eval.run": ("backbone", "video", "sampler", "run"),
}
# Keys that tell one run from another: set here for each, and not by --set.
OWN_KEYS = ("output", "seed", "recipe", "dry_run", "pipeline.groups", "pipeline.losers.count", "train.groups")
OWN_KEYS += ("targets.tracks", "targets.rule", "train.folder", "run.lora", "run.folder", "run.seeds", "benchmarks")

SECTIONS = tuple(dict.fromkeys(chain.from_iterable(READS.values())))
# The recipe with the command line's overrides, unchecked: the commands check what they read.
Sections = make_dataclass("Sections", [(name, dict[str, Any], field(default_factory=dict)) for name in SECTIONS])


def read_recipe(overrides: Sequence[str], world: World) -> dict[str, dict[str, Any]]:
    return asdict(recipes.load(Sections, [f"recipe={world.recipe}", *overrides]))


def make_suite(name: str, overrides: Sequence[str]) -> Suite:
    """A suite around the values of its world's recipe."""
    return SUITES[name](partial(read_recipe, overrides))


def read_result(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


@dataclass(frozen=True)
class Plan:
    folder: Path
    seeds: tuple[int, ...]
    suite: str = "preference"  # a key of SUITES
    clips: int = 512  # held-out prompts per seed
    episodes: int = 20  # of each task, where there is a planner
    overrides: tuple[str, ...] = ()  # of every run, from --set
    model: str = ""  # fingerprint of the base model
    torch: str = ""  # version
    device: str = ""  # name
    on_gpu: bool = False

    @cached_property
    def content(self) -> Suite:
        return make_suite(self.suite, self.overrides)

    @property
    def world(self) -> World:
        return self.content.world

    def place(self, name: str, seed: int) -> Path:
        """Of a row, or of a group set."""
        return self.folder / f"{name}-{seed}"

    @cached_property
    def model_folder(self) -> Path:
        return Path(read_recipe(self.overrides, self.world)["backbone"]["path"]).expanduser()

    @property
    def world_model(self) -> Path:
        """The folder of the suite's own world model."""
        return self.folder / "world_model"

    def world_model_command(self) -> tuple[str, list[str]]:
        """Module and arguments that train it, on clips that were recorded for the base model where they lie beside."""
        module, *arguments = self.world.world_model
        beside = self.model_folder.parent / FOLDER
        recordings = str(beside if beside.is_dir() else self.folder / FOLDER)
        return module, self._with_world_model([argument.replace("{recordings}", recordings) for argument in arguments])

    @cached_property
    def given(self) -> dict[tuple[str, str], str]:
        """The digest of each file of the model's folder that a benchmark scores with, where it is there."""
        paths = {one: self.model_folder / one[1] for one in self.world.given}
        return {one: sha256(path) for one, path in paths.items() if path.exists()}

    def arguments(self, module: str, *own: str) -> list[str]:
        """`module`'s arguments, the later winning: recipe, device, --set where the command reads it, `own`."""
        chosen = [pair for pair in self.overrides if pair.split(".")[0] in READS[module]]
        device = self.world.on_gpu.get(module, ()) if self.on_gpu else ()
        return [f"recipe={self.world.recipe}", *device, *chosen, *own]

    def build_command(self, name: str, seed: int) -> tuple[str, list[str]]:
        """Module and arguments that make a group set."""
        place = self.place(name, seed)
        if name == CORRUPTED:
            return "eval.experiments.ablation.corrupted", [str(self.place("groups", seed)), str(place), str(seed)]
        own = (f"output={place}", f"pipeline.groups={place}", *self._with_world_model(GROUPS[name]))
        return "data_pipeline.build", self.arguments("data_pipeline.build", *own, f"seed={seed}")

    def train_arguments(self, row: Row, seed: int) -> list[str]:
        own = (f"output={self.place(row.name, seed)}", f"seed={seed}", f"train.groups={self.place(row.groups, seed)}")
        return self.arguments(row.trainer, *self.filled(row, seed, *row.overrides, *row.base), *own)

    def filled(self, row: Row, seed: int, *overrides: str) -> list[str]:
        """Overrides with the training folder of the row that this one starts from."""
        return [pair.replace(START, str(self.place(row.start, seed) / "train")) for pair in overrides]

    def _with_world_model(self, arguments: Sequence[str]) -> list[str]:
        return [argument.replace(WORLD_MODEL, str(self.world_model)) for argument in arguments]

    def eval_arguments(self, row: Row, seed: int) -> list[str]:
        place, weights = self.place(row.name, seed), self.place(self.trained(row).name, seed) / "train"
        counts = {"clips": self.clips, "episodes": self.episodes, "seed": seed}
        own = [f"output={place}", *(argument.format(**counts) for argument in self.world.evaluation)]
        own += [f"benchmarks=[{','.join(self.benchmarks(row))}]"]
        lora = [f"run.lora={weights}"] if row.model != "base" else []
        return self.arguments(
            "eval.run", *self.filled(row, seed, *row.base), *own, *lora, *self._with_world_model(self._search(row))
        )

    def trained(self, row: Row) -> Row:
        """The row whose weights `row` measures."""
        return self.content.rows[row.start] if row.search else row

    def benchmarks(self, row: Row) -> list[str]:
        """A search makes single clips, so those that have clips made measure it."""
        return self.world.benchmarks[:1] if row.search else self.world.benchmarks

    def _search(self, row: Row) -> tuple[str, ...]:
        return (*self.world.search, f"search.chosen_by={row.search}") if row.search else ()

    def _world_model_digest(self) -> str:
        """Of its weights, which may have been laid there; "" before they are."""
        weights = self.world_model / "model.safetensors"
        return sha256(weights) if weights.exists() else ""

    def digests(self, row: Row, seed: int) -> dict[str, str]:
        """Of everything that determines the run, but not of how fast it goes on a device: `training` of what comes
        before the evaluation, `settings` of all, and `groups` of the group set's index, "" where there is none."""
        if row.search:
            source = self.digests(self.trained(row), seed)
            return source | {"settings": digest([source["settings"], self._search(row), self._world_model_digest()])}
        sections = read_recipe([*self.overrides, *row.overrides, *row.base], self.world)
        # Results of earlier versions have these sections below `pipeline`, and so have all digests.
        moved = ("vlm", "judge", "raters", "targets")
        sections["pipeline"] |= {name: found for name in moved if (found := sections.pop(name))}

        def settings(*modules: str) -> dict[str, Any]:
            return {name: sections[name] for module in modules for name in READS[module] if name in sections}

        groups = [f"pipeline.{text.removeprefix('pipeline.')}" for text in GROUPS[row.groups]]
        kind = [row.trainer, groups, seed, self.model]
        if row.start:
            kind.append(self.digests(self.content.rows[row.start], seed)["training"])
        if self.world.world_model:
            kind.append([*self.world.world_model, self._world_model_digest()])
        training = digest([kind, settings("data_pipeline.build", row.trainer)]) if row.trainer else ""
        measured = [training, settings("eval.run"), seed, self.clips, self.model]
        if self.world.given:
            measured += [self.episodes, list(self.given.values())]
        index = self.place(row.groups, seed) / "index.json"
        return {
            "training": training,
            "settings": digest(measured),
            "groups": sha256(index) if row.trainer and index.exists() else "",
        }

    def result(self, row: Row, seed: int) -> dict[str, Any] | None:
        """The finished run's result, if it was made with today's settings; its groups need not be there any more."""
        result, today = read_result(self.place(row.name, seed) / "result.json"), self.digests(row, seed)
        if result and today["groups"] in ("", result["groups"]) and today["settings"] == result["settings"]:
            return result
        return None


def check_overrides(overrides: Sequence[str], world: World) -> None:
    """ValueError for an override that is no key=value, that no command reads, or that tells the runs apart."""
    own = {*OWN_KEYS, *(argument.partition("=")[0] for argument in world.evaluation)}
    for pair in overrides:
        key, equals, _ = pair.partition("=")
        if not equals:
            raise ValueError(f"--set {pair}: {key} is no key=value")
        if key in own:
            raise ValueError(f"--set {pair}: {key} is set for each run by the ablation itself (see --clips, --seeds)")
        if key.split(".")[0] not in SECTIONS:
            raise ValueError(f"--set {pair}: no command reads it; sections: {', '.join(sorted(SECTIONS))}")
