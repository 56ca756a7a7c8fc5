"""What a search keeps: the candidates of each prompt, made once for all scorers, and what each scorer said.

    <folder>/candidates/<key>.safetensors   latents (N,C,F,H,W), text (1,L,D) and clean-<step> (N,C,F,H,W) of each
                                            pruning step; metadata: digest of what they depend on, and seconds
    <folder>/candidates/<key>-<strategy>.safetensors   latents of the clips that a strategy made for the prompt
    <folder>/prompts/<key>.json             one record a prompt: seeds, truth, each scorer's values and cost

Both appear whole or not at all. A file of other settings is made again; a record of other candidates is begun anew.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from train.files import atomic, write_text


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
    except (OSError, SafetensorError):
        return None


def read_record(path: Path, settings_digest: str) -> dict[str, Any]:
    """The prompt's record; empty where there is none of these candidates."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        for part in (record, *[value for value in record.values() if isinstance(value, dict)]):
            for found in part.get("scorers", {}).values():
                found["values"] = [math.inf if value is None else value for value in found["values"]]
        return record if record["candidates"] == settings_digest else {}
    except (OSError, ValueError, KeyError, TypeError):
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
