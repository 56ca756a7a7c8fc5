"""Action clustering: the physical action that a prompt speaks of (PhyGDPO, arXiv 2512.24551, section 2.1, figure 2 d).

    matches = ActionMatcher(config, device).match(prompts)

"Action Clustering via Semantics Matching": a sentence transformer embeds the original prompt and a list of K_a actions,
and the nearest action by cosine is the cluster of the clip. The number of clips in each is the histogram H_f, which the
difficulty resampling starts from. Deviations: the paper prints neither its list nor its model, so both are ours to
choose (actions.yaml, `pipeline.cluster.model`); and a prompt that is near to no action goes to `other` instead of the
least bad one.

Equal embeddings give equal results whatever else is in the batch: vectors are rounded so that their products add up
exactly in any order. What is left is the encoder itself, whose rounding may depend on batch, padding and device.
"""

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from safetensors import SafetensorError

import recipes
from data_pipeline.config import ClusterConfig, Setup
from data_pipeline.contract import Stage
from data_pipeline.histogram import write_histogram
from data_pipeline.tables import Advance, Made, Table, Unit, add_columns, dropped_table
from train.entry import first_line
from train.files import digest
from train.teachers.weights import check_path

SHIPPED = Path(__file__).parents[1] / "actions.yaml"
OTHER = "other"  # action and category of what matches nothing
KEY = "pipeline.cluster"
EXAMPLE = "sentence-transformers/all-MiniLM-L6-v2"
BATCH = 256  # prompts encoded together, per GPU
CHUNK = 8192  # prompts encoded and compared at once; bounds the memory
GRID = 2.0**20  # embeddings are multiples of 1 / GRID
DIGITS = 4  # of a score

Encoder = Callable[[list[str]], np.ndarray]  # N texts -> (N, D), of any length


@dataclass(frozen=True)
class Action:
    name: str  # lower-case letters, digits and _
    category: str  # the same
    phrase: str  # what a caption says, in English


class Cluster(Stage):
    """Gives each row the action that its prompt tells of."""

    name = "cluster"

    def __init__(self, setup: Setup):
        super().__init__(setup)
        self.config = setup.pipeline.cluster

    def check(self) -> None:
        ActionMatcher(self.config, self.setup.device)

    @cached_property
    def matcher(self) -> "ActionMatcher":
        return ActionMatcher(self.config, self.setup.device)

    def plan(self, before: Table) -> list[Unit]:
        settings = match_settings(self.config)
        return before.units(lambda number: settings)

    def build(self, unit: Unit, rows: pa.Table, advance: Advance) -> Made:
        return add_columns(rows, self.name, self.matcher.match(rows["prompt"].to_pylist())), dropped_table()

    def conclude(self, table: Table) -> None:
        rows = table.columns(("action", "category"))
        actions = rows["action"].to_pylist()
        counts, categories = Counter(actions), dict(zip(actions, rows["category"].to_pylist(), strict=True))
        columns = {"action": [*counts], "category": [categories[name] for name in counts], "count": [*counts.values()]}
        write_histogram(self.folder / "actions", columns, ("count",))
        print(f"actions: {self.folder / 'actions.png'}")


class ActionMatcher:
    """Finds the actions of prompts. The model is loaded when it is first needed.

    encoder: instead of the sentence transformer. Raises ValueError for settings that cannot work.
    """

    def __init__(self, config: ClusterConfig, device: torch.device | str, encoder: Encoder | None = None):
        if encoder is None:
            check_path(f"{KEY}.model", config.model, EXAMPLE)
        self.config, self.device, self._given = config, device, encoder
        self.actions = load_actions(config.actions)

    @cached_property
    def encoder(self) -> Encoder:
        return self._given or load_encoder(self.config, self.device)

    @cached_property
    def phrases(self) -> np.ndarray:
        """(A, D): the embedded actions."""
        return self._embed([action.phrase for action in self.actions])

    def match(self, prompts: Sequence[str]) -> dict[str, Any]:
        """The best action of each of N prompts, as columns; the first of the list among equally good ones.

        action, category: N names, `other` below the threshold. action_score: (N,) float64, the cosine with the best
        action, to four decimals, also where that is `other`.
        Equal prompts are encoded once. Raises ValueError for a prompt whose embedding is not finite.
        """
        texts = list(dict.fromkeys(prompts))
        best, scores = np.empty(len(texts), np.int64), np.empty(len(texts))
        for first in range(0, len(texts), CHUNK):
            part = slice(first, first + CHUNK)
            cosines = self._embed(texts[part]) @ self.phrases.T  # (n, A)
            np.rint(cosines * 10**DIGITS, out=cosines)  # before the comparison, so that what reads equal is a tie
            best[part] = cosines.argmax(axis=1)
            scores[part] = cosines.max(axis=1) / 10**DIGITS
        best[scores < self.config.threshold] = len(self.actions)
        place = {text: number for number, text in enumerate(texts)}
        rows = np.fromiter(map(place.__getitem__, prompts), np.int64, len(prompts))
        names = np.array([action.name for action in self.actions] + [OTHER], object)
        categories = np.array([action.category for action in self.actions] + [OTHER], object)
        found = best[rows]
        return {"action": names[found].tolist(), "category": categories[found].tolist(), "action_score": scores[rows]}

    def _embed(self, texts: list[str]) -> np.ndarray:
        vectors = np.asarray(self.encoder(texts), np.float64)  # (n, D)
        assert vectors.ndim == 2 and len(vectors) == len(texts), vectors.shape
        if not np.isfinite(vectors).all():
            text = texts[np.flatnonzero(~np.isfinite(vectors).all(axis=1))[0]]
            raise ValueError(
                f"{KEY}.model={self.config.model!r} gives an embedding that is not finite for {text[:200]!r}: "
                "check its weights, or give another model"
            )
        return on_grid(vectors)


def on_grid(vectors: np.ndarray) -> np.ndarray:
    """Rows of length one, each component rounded to a multiple of 2^-20; rows of zeros stay. vectors (N, D) float64.

    A product of two components is a multiple of 2^-40, and by Cauchy-Schwarz no partial sum of them exceeds about 1.
    So all partial sums are exact in float64, and a matrix product is the same in any order, on any machine. The cosine
    is off by less than 2^-20 sqrt(D), in practice 1e-6.
    """
    lengths = np.sqrt(np.square(vectors).sum(axis=1, keepdims=True))
    return np.rint(vectors / np.where(lengths > 0, lengths, 1) * GRID) / GRID


def load_encoder(config: ClusterConfig, device: torch.device | str) -> Encoder:
    """The sentence transformer of the settings, in float32; safetensors only, no code of a checkpoint's own.

    Raises ValueError when the package is missing or the model cannot be loaded.
    """
    key = f"{KEY}.model={config.model!r}"
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError as error:
        raise ValueError(
            f"{key} needs the package sentence-transformers, which comes with physalign: pip install -e . "
            f"({first_line(error)})"
        ) from error
    folder = Path(config.model).expanduser()
    try:
        model = SentenceTransformer(
            str(folder) if folder.is_dir() else config.model,
            device=str(device),
            trust_remote_code=False,
            model_kwargs={"use_safetensors": True, "dtype": torch.float32},
        )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise ValueError(
            f"{key} cannot be loaded ({first_line(error)}): "
            f"give the folder or the hub id of a sentence-transformers model with *.safetensors, such as {EXAMPLE}"
        ) from error
    return partial(model.eval().encode, batch_size=BATCH, show_progress_bar=False, convert_to_numpy=True)


# ---- the list of actions ---------------------------------------------------------------------------------------------


def load_actions(path: str | Path | None = None) -> list[Action]:
    """The actions of a YAML file, or the shipped ones, in the order of the file.

    Raises ValueError for a file of another form, an empty one, and names or phrases that come twice; two phrases of
    the same words count as one.
    """
    path = Path(path).expanduser() if path else SHIPPED
    if not path.is_file():
        raise ValueError(f"{KEY}.actions: there is no file {path}; leave it empty for the shipped list")
    tree = recipes.read_yaml(path, "categories (name: {action: phrase})")
    actions: list[Action] = []
    names: set[str] = {OTHER}
    phrases: dict[tuple[str, ...], str] = {}
    for category, entries in tree.items():
        _check_name(path, "category", category)
        if category == OTHER:
            raise ValueError(f"{path}: category {OTHER!r} is for what matches no action, choose another name")
        if not isinstance(entries, dict) or not entries:
            raise ValueError(f"{path}: category {category!r} must hold actions (name: phrase), found {entries!r}")
        for name, phrase in entries.items():
            _check_name(path, "action", name)
            words = bag_of_words(phrase) if isinstance(phrase, str) else ()
            if not words:
                raise ValueError(f"{path}: action {name!r} needs a phrase in words, found {phrase!r}")
            if name in names:
                raise ValueError(f"{path}: action {name!r} comes twice or is {OTHER!r}, choose another name")
            if words in phrases:
                raise ValueError(f"{path}: actions {phrases[words]!r} and {name!r} have the same words, remove one")
            names.add(name)
            phrases[words] = name
            actions.append(Action(name, category, phrase.strip()))
    if not actions:
        raise ValueError(f"{path} holds no actions: write category, then name: phrase below it")
    return actions


def bag_of_words(text: str) -> tuple[str, ...]:
    """The words of a text, sorted, without case and punctuation."""
    return tuple(sorted(re.findall(r"\w+", text.casefold())))


def match_settings(config: ClusterConfig) -> dict[str, Any]:
    """What the matches depend on, beside the prompts: plain values. A model's folder counts by its name, a list of
    actions by what it says, without comments and layout."""
    actions = digest([astuple(action) for action in load_actions(config.actions)])
    return {"model": config.model, "threshold": config.threshold, "actions": actions}


def _check_name(path: Path, kind: str, name: Any) -> None:
    if not isinstance(name, str) or not re.fullmatch(r"[a-z0-9_]+", name):
        raise ValueError(f"{path}: {kind} {name!r} must be a name of lower-case letters, digits and _ (quote numbers)")
