"""Recipes: one YAML file holds one experiment, from data to report, in sections.

Each entry point reads the sections that its `Config` names:

    config = load(Config, ["recipe=wan14b", "optim.steps=100", "--dry-run"])

Layers, later over earlier: dataclass defaults, the recipe, its preset (`objective.preset`), `key=value` arguments.
`--some-flag` is short for `some_flag=true`. A section that no entry point knows, and a key that its dataclass does not
have, are errors with a suggestion.
"""

import dataclasses
import difflib
import functools
import re
import sys
import typing
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

FOLDER = Path(__file__).parent
PRESETS = FOLDER / "presets"
CONTENT = "sections (name: {key: value})"  # of a recipe
PRESET = "objective.preset"  # the one key that every command reads
DEFAULT_PRESET = "recipe"  # as it stands
BASES = {"released": "paper"}  # a preset that is laid over another one

# Every section a recipe may hold. An entry point's Config names those that it reads.
SECTIONS = {
    "backbone": "which Wan, from where, in which precision",
    "video": "size, length and frame rate of every clip",
    "lora": "the adapters",
    "objective": "the preference loss",
    "physics": "PhysisForcing's terms on a block's features",
    "self_score": "the generator's own opinion as a regulariser",
    "optim": "optimizer, schedule, batch, steps",
    "train": "checkpoints, memory, logging",
    "targets": "tracks, depth and features of the winners, for the physics terms",
    "vlm": "the vision-language model that filters, judges and rewrites",
    "judge": "who scores a clip",
    "raters": "where the raters of others are installed",
    "sampler": "how clips are sampled",
    "validation": "fixed-seed clips during training",
    "pipeline": "from raw clips to preference groups",
    "generate": "from prompts to clips and comparisons",
    "run": "what eval.run generates and scores",
    "search": "candidates, scorers and what becomes of them",
    "search_experiment": "prompts and scorers that eval.experiments.search.run compares",
    "refine_prompts": "prompts that a vision-language model refines round by round",
    "benchmark": "what train.tools.benchmark measures",
    "search_benchmark": "what eval.experiments.search.benchmark measures",
    "inspect": "what train.tools.inspect_targets draws",
}
# Keys that moved, with the place where they are now; a key below a moved one moved with it.
MOVED: dict[str, str] = {
    "benchmark": "search_benchmark",  # of eval.experiments.search.benchmark alone
    "physics.targets": "targets",
    "physics.hidden_width": "the constant train.terms.physics.HIDDEN_WIDTH",
    "physics.pix_width": "the constant train.terms.physics.PIX_WIDTH",
    "objective.w_fm": "objective.anchor, in units of the preference loss's slope, M beta (w_fm=200 at 4 x 50 is 1)",
    "physics.w_pix": "physics.trajectory, in train/gdpo.py in units of the preference loss's slope, M beta",
    "physics.w_sem": "physics.relational, in train/gdpo.py in units of the preference loss's slope, M beta",
    "self_score.weight": "self_score.strength, in train/gdpo.py in units of the preference loss's slope, M beta",
    "objective.logit_mean": "always 0",
    "objective.logit_std": "always 1",
    "inspect.t": "always 0.5",
    "inspect.image": "always <output>/targets.png",
    "search_benchmark.fused": "backbone.compile",
    "search_benchmark.repeats": "the constant eval.experiments.search.benchmark.REPEATS",
    "optim.betas": "a constant, (0.9, 0.999),",
    "optim.eps": "a constant, 1e-8,",
    "train.compile": "backbone.compile",
    "generate.fused": "backbone.compile",
    "train.resume": "always true (for a run of its own, name another output)",
    "train.max_nonfinite": "the constant train.loop.MAX_NONFINITE",
    "pipeline.num_losers": "pipeline.losers.count",
    "pipeline.filter.vlm": "vlm (and pipeline.filter.enabled=true)",
    "pipeline.judge": "judge, and for its settings vlm and raters,",
    "pipeline.targets": "targets",
    "pipeline.table_rows": "the constant data_pipeline.tables.TABLE_ROWS",
    "pipeline.filter.max_prompt_chars": "the constant data_pipeline.stages.filter.MAX_PROMPT_CHARS",
    "pipeline.cluster.batch_size": "the constant data_pipeline.stages.cluster.BATCH",
    "search.judge": "judge, and for its settings vlm and raters,",
    "search.vlm": "vlm (the scorer is judge, with judge.name=vlm)",
    "search.folder": "search_experiment.folder",
    "search.share": "search_experiment.share",
    "search.lora": "search_experiment.lora",
    "search.scorers": "search_experiment.scorers",
    "search.shown": "the constant eval.experiments.search.work.SHOWN",
    "search_experiment.shown": "the constant eval.experiments.search.work.SHOWN",
    "search.sandbox": "search_experiment (keys clips and seed)",
    "vlm.give_up": "the constant eval.vlm.backend.GIVE_UP",
    "vlm.retries": "the constant eval.vlm.client.RETRIES",
    "search.race": "the constant eval.search.racing.CONFIDENCE",
    "search.residuals.batch_size": "search.batch_size",
    "search.residuals.seed": "the constant eval.search.residuals.SEED",
    "search.prune.draws": "the constant eval.search.searcher.EARLY_DRAWS",
    "search.surprise.frames": "the constant eval.search.world_model.FRAMES",
    "search.refine.batch_size": "search.batch_size",
    "search.refine.clip": "the constant eval.search.noise_refinement.CLIP",
    "search.refine.kl_weight": "the constant eval.search.noise_refinement.KL_WEIGHT",
    "search.refine.score": "always hybrid",
    "search.refine.weighting": "the constant eval.search.noise_refinement.WEIGHTING",
    "search.refine.seed": "always 0",
    "search.guidance.batch_size": "search.batch_size",
    "search.guidance.t_min": "always 0",
    "search.guidance.t_max": "always 1",
    "search.guidance.through_network": "always true",
    "refine_prompts.vlm": "vlm",
    "refine_prompts.similarity": "the constant eval.prompt_refinement.prompts.SAME",
    "refine_prompts.encoder": "the constant eval.prompt_refinement.prompts.ENCODER",
    "refine_prompts.llm": "vlm (one model sees and writes)",
    "run.phygenbench.judge": "vlm",
    "run.pai_bench.judge": "vlm",
    "run.ezs_bench.judge": "vlm",
    "run.r_bench.judge": "vlm",
    "run.likephys.residuals": "run.batch_size for residuals.batch_size, the others are constants,",
    "run.likephys.batch_size": "run.batch_size",
    "run.likephys.source": "run.likephys.folder (empty: simulated scenes)",
    "run.pai_bench.domain": "the constant eval.benchmarks.vqa.DOMAIN",
    "run.r_bench.dimensions": "a constant, all nine,",
    "run.videophy2.split": "a constant, all prompts (the figures hard_* are over the hard ones),",
    "run.physics_iq.descriptions": "descriptions.csv in run.physics_iq.folder",
    "run.vbench.python": "raters.vbench.python",
    **{
        f"run.{benchmark}.{key}": f"raters.{rater}.{key}"
        for benchmark, rater in (("videophy", "videocon_physics"), ("videophy2", "videophy2"))
        for key in ("checkout", "python", "checkpoint")
    },
    **{
        f"{tool}.timeout": "the constant eval.judges.external_tool.SILENCE"
        for tool in ("raters.videocon_physics", "raters.videophy2", "raters.vbench")
        + ("run.videophy", "run.videophy2", "run.vbench")
    },
}
# Keys beside the sections.
KEYS = ("recipe", "output", "seed", "dry_run", "ranks", "benchmarks", "list")

C = TypeVar("C")

# A class's defaults, the dearest part of a load, are made once: a merge copies them.
_defaults = functools.cache(OmegaConf.structured)


def load(config_class: type[C], argv: list[str] | None = None, *, partial: bool = False) -> C:
    """Build `config_class` from defaults, the recipe named by `recipe=`, and the command line (default: sys.argv).

    partial: `config_class` has some of a command's keys, which are checked there; all others are passed over.

    A dry run may read keys of other commands as well, for its bill: those of `config_class.bill`, where it has one.

    Raises ValueError naming the key, the value and the remedy: unknown recipe, section or key, a value of the wrong
    type, a missing value.
    """
    arguments = _parse(sys.argv[1:] if argv is None else argv)
    name = arguments.get("recipe", "")
    layers = [("the command line", arguments)]
    if name:
        path = _find(str(name))
        layers.insert(0, (str(path), read_yaml(path, CONTENT)))
    objectives = [layer["objective"] for _, layer in reversed(layers) if isinstance(layer.get("objective"), dict)]
    preset = next((objective["preset"] for objective in objectives if "preset" in objective), DEFAULT_PRESET)
    if preset != DEFAULT_PRESET:
        known = [DEFAULT_PRESET, *sorted(path.stem for path in PRESETS.glob("*.yaml"))]
        if preset not in known:
            raise ValueError(f"objective.preset={preset!r} is not known; {suggest(preset, known)}")
        for part in filter(None, (BASES.get(preset), preset)):
            source, layer = str(PRESETS / f"{part}.yaml"), read_yaml(PRESETS / f"{part}.yaml", CONTENT)
            if name and "preset" in (layers[0][1].get("objective") or {}):
                _warn_of_hidden(*layers[0], layer, preset)
            layers.insert(len(layers) - 1, (source, layer))
        own, fields = layers[1 if name else 0 : -1], _fields(config_class)
        read = any(section in fields for _, layer in own for section in layer)
        if not read and not partial and "preset" in objectives[0] and objectives[0] is arguments.get("objective"):
            print(f"warning: objective.preset={preset} sets nothing that this command reads", file=sys.stderr)

    merged = _defaults(config_class)
    try:
        for source, layer in layers:
            known = _cut(config_class, layer) if partial else _known(config_class, layer, source)
            merged = OmegaConf.merge(merged, known)
        source = f"recipe {name!r}" if name else "the command line"
        return OmegaConf.to_object(merged)  # resolves ${...} and makes the dataclasses
    except OmegaConfBaseException as error:
        raise ValueError(redacted(f"{source}: {error.full_key or ''}: {str(error).splitlines()[0]}")) from error


def _warn_of_hidden(path: str, recipe: dict[str, Any], preset: dict[str, Any], name: str) -> None:
    """Say which of a recipe's own values the preset that it names replaces."""
    for section, values in preset.items():
        own = recipe.get(section)
        for key in values.keys() & own.keys() if isinstance(own, dict) else ():
            if own[key] != values[key]:
                said = f"objective.preset={name} replaces its own {section}.{key}={own[key]} by {values[key]}"
                print(f"warning: {path}: {said}", file=sys.stderr)


def _known(config_class: type, layer: dict[str, Any], source: str) -> dict[str, Any]:
    """What of a layer `config_class` reads. ValueError for what nothing reads; for other commands' keys in an argument,
    a warning."""
    fields, kept = _fields(config_class), {}
    read = {key: value for key, value in layer.items() if key in fields}
    if len(moved := [key for key in _unread(config_class, read) if key in MOVED]) > 1:  # a recipe of an earlier version
        places = "; ".join(f"{key}: {MOVED[key]}" for key in moved)
        raise ValueError(f"{source}: {len(moved)} keys are elsewhere now, so delete or rename them: {places}")
    for key, value in layer.items():
        if key in fields:
            _check_keys(fields[key], key, value, source)
            kept[key] = value
        elif key not in SECTIONS and key not in KEYS:
            raise ValueError(f"{source}: unknown section {key!r}; {suggest(key, [*SECTIONS, *fields])}")
        elif source == "the command line" and MOVED.get(key) in fields:
            raise ValueError(f"{source}: {key} is not read by this command; it is {MOVED[key]} now")
        elif source == "the command line" and key != "recipe":
            bill = getattr(config_class, "bill", None) if layer.get("dry_run") else None
            inner = [f"{key}.{name}" for name in value] if isinstance(value, dict) else [key]
            for name in _unread(bill, {key: value}) if bill else inner:
                if name != PRESET:
                    print(f"warning: {name} is not read by this command: ignored", file=sys.stderr)
    return kept


def _unread(config_class: type, layer: dict[str, Any]) -> Iterator[str]:
    """What of a layer `config_class` has no key for, at any depth."""
    fields = _fields(config_class)
    for key, value in layer.items():
        if key not in fields:
            yield key
        elif isinstance(value, dict) and dataclasses.is_dataclass(fields[key]):
            yield from (f"{key}.{inner}" for inner in _unread(fields[key], value))


def _cut(config_class: type, layer: dict[str, Any]) -> dict[str, Any]:
    """What of a layer `config_class` has a key for, at any depth."""
    fields = _fields(config_class)
    return {
        key: _cut(fields[key], value) if isinstance(value, dict) and dataclasses.is_dataclass(fields[key]) else value
        for key, value in layer.items()
        if key in fields
    }


def to_yaml(config: Any) -> str:
    """The resolved config as a recipe that gives the same config: a run's folder says with it how it was made.

    A preset stands in it only as a comment: its values are there, and it would be laid over what the command line set.
    Credentials in addresses are left out, see `redacted`.
    """
    tree, comment = redacted(OmegaConf.to_container(OmegaConf.structured(config))), ""
    preset = tree.get("objective", {}).get("preset", DEFAULT_PRESET)
    if preset != DEFAULT_PRESET:
        tree["objective"]["preset"], comment = DEFAULT_PRESET, f"# Made with objective.preset={preset}.\n"
    return comment + OmegaConf.to_yaml(OmegaConf.create(tree))


def redacted(value: Any) -> Any:
    """The value, texts at any depth of lists and dicts without the credentials of their addresses: *** instead of user
    and password, and instead of a query, where tokens stand. For whatever is written down or printed."""
    if isinstance(value, str):
        return re.sub(r"(\w://[^\s?#]*\?)[^\s#'\"]+", r"\1***", re.sub(r"(\w://)[^\s/?#]*@", r"\1***@", value))
    if isinstance(value, dict):
        return {redacted(key): redacted(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [redacted(item) for item in value]
    return value


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The one of `known` that seems to be meant by `name`, if any does."""
    return next(iter(difflib.get_close_matches(name, list(known), n=1)), None)


def suggest(name: str, known: Iterable[str]) -> str:
    """The end of a refusal of `name`: what seems to be meant, else all that is known."""
    near = nearest(name, known)
    return f"did you mean {near!r}?" if near else f"known: {', '.join(known)}"


def without(settings: Mapping[str, Any], keys: Collection[str]) -> dict[str, Any]:
    """`settings` without these keys, at any depth."""
    return {
        key: without(value, keys) if isinstance(value, Mapping) else value
        for key, value in settings.items()
        if key not in keys
    }


def available() -> list[str]:
    """Names of the recipes that come with the project."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def _parse(argv: list[str]) -> dict[str, Any]:
    pairs = []
    for argument in argv:
        if argument.startswith("--") and "=" not in argument:
            pairs.append(argument[2:].replace("-", "_") + "=true")
        elif "=" in argument:
            pairs.append(argument.removeprefix("--"))
        else:
            raise ValueError(f"argument {argument!r} is not of the form key=value (or --flag)")
    layer = OmegaConf.create()
    for pair in pairs:
        try:
            layer.merge_with_dotlist([pair])
        except Exception as error:  # OmegaConf's own, its grammar's, yaml's
            detail = " ".join(str(error).split())
            raise ValueError(
                redacted(f"argument {pair!r} cannot be read ({detail}): quote lists and texts, as 'key=[a, b]'")
            ) from None
    return OmegaConf.to_container(layer)


def _find(name: str) -> Path:
    path = FOLDER / f"{name}.yaml"
    if path.exists():
        return path
    if name.endswith((".yaml", ".yml")) and Path(name).exists():
        return Path(name)
    raise ValueError(
        f"recipe={name!r} is neither a recipe ({', '.join(available())}) nor a YAML file; {suggest(name, available())}"
    )


def read_yaml(path: Path, what: str) -> dict[Any, Any]:
    """A YAML file's tree, ${...} unresolved. ValueError where it is not valid, or does not hold `what` at its top."""
    try:
        layer = OmegaConf.load(path)
    except Exception as error:  # yaml's errors carry line and column
        raise ValueError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(layer, DictConfig):
        raise ValueError(f"{path} must hold {what}, found {type(layer).__name__}")
    return OmegaConf.to_container(layer)


def _fields(config_class: type) -> dict[str, Any]:
    """Field names and their types."""
    types = typing.get_type_hints(config_class)
    return {field.name: types[field.name] for field in dataclasses.fields(config_class)}


def _check_keys(section_class: Any, section: str, value: Any, source: str) -> None:
    if not dataclasses.is_dataclass(section_class):
        return
    if not isinstance(value, dict):
        raise ValueError(f"{source}: section {section!r} must hold keys, found {value!r}")
    known = _fields(section_class)
    for key, inner in value.items():
        if key not in known:
            path = f"{section}.{key}"
            remedy = f"it is {MOVED[path]} now" if path in MOVED else suggest(key, known)
            raise ValueError(f"{source}: unknown key {path}; {remedy}")
        if typing.get_origin(known[key]) is list and not str(inner).startswith("${"):
            _check_list(*typing.get_args(known[key]), f"{section}.{key}", inner, source)
        _check_keys(known[key], f"{section}.{key}", inner, source)


def _check_list(entry_class: Any, name: str, value: Any, source: str) -> None:
    """ValueError unless the value is a list and, of dataclasses, its entries hold their keys."""
    form = "{}"
    if sections := dataclasses.is_dataclass(entry_class):
        form = "{{" + dataclasses.fields(entry_class)[0].name + ": {}}}"
    if not isinstance(value, list):
        entry = value if isinstance(value, dict) else form.format(value)
        raise ValueError(f"{source}: {name}={value!r} must be a list: {name}=[{entry}]")
    for number, entry in enumerate(value if sections else ()):
        if not isinstance(entry, dict):
            raise ValueError(f"{source}: {name}[{number}]={entry!r} must hold keys: {name}=[{form.format(entry)}]")
        _check_keys(entry_class, f"{name}[{number}]", entry, source)
