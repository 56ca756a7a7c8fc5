"""What a search keeps: the candidates of each prompt, made once for all scorers, and what each scorer said.

    <folder>/candidates/<key>.safetensors   latents (N,C,F,H,W), text (1,L,D) and clean-<step> (N,C,F,H,W) of each
                                            pruning step; metadata: digest of what they depend on, and seconds
    <folder>/candidates/<key>-<strategy>.safetensors   latents of the clips that a strategy made for the prompt
    <folder>/prompts/<key>.json             one record per prompt: seeds, truth, each scorer's values and cost

Both appear whole or not at all. A file of other settings is made again; a record of other candidates is begun anew.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ConfigDict
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from typing_extensions import TypedDict

from train.files import atomic, read_json, write_text


class Record(TypedDict):
    """What every prompt's record holds, beside what its parts found."""

    __pydantic_config__ = ConfigDict(extra="allow")
    candidates: str  # digest of what they depend on
    key: str
    prompt: str
    seeds: list[int]
    parts: dict[str, str]  # digests of their settings


def write_tensors(path: Path, tensors: Mapping[str, Tensor], settings_digest: str, facts: Mapping[str, Any]) -> None:
    """Write tensors with the digest of what they depend on and facts about them, atomically."""
    contiguous = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    with atomic(path) as aside:
        save_file(contiguous, aside, metadata={"digest": settings_digest, "facts": json.dumps(facts)})


def read_tensors(path: Path, settings_digest: str) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """Tensors and facts; None where there is no whole file of these settings."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("digest") != settings_digest:
                return None
            return {name: file.get_tensor(name) for name in file.keys()}, json.loads(metadata["facts"])  # noqa: SIM118
    except (OSError, SafetensorError, ValueError, KeyError):
        return None


def read_record(path: Path, settings_digest: str) -> dict[str, Any]:
    """The prompt's record; empty where there is none of these candidates."""
    try:
        record = read_json(path, Record, remedy="the prompt is scored again")
        for part in (record, *[value for value in record.values() if isinstance(value, dict)]):
            for found in part.get("scorers", {}).values():
                found["values"] = [math.inf if value is None else value for value in found["values"]]
        return record if record["candidates"] == settings_digest else {}
    except (ValueError, KeyError, TypeError, AttributeError):
        return {}


def write_record(path: Path, record: Mapping[str, Any]) -> None:
    """Write a record; infinity, which JSON has not, becomes null."""
    write_text(path, json.dumps(_finite(record), ensure_ascii=False, indent=1) + "\n")


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
