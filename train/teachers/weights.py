"""Frozen teachers of transformers: from a folder or a hub id, safetensors only, no code of a checkpoint's own."""

import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from train.entry import first_line


def check_path(key: str, path: str, example: str) -> None:
    """ValueError for a path that is neither a folder nor in the form of a hub id. Opens nothing."""
    remedy = f"give the folder of a checkpoint or a hub id such as {example}"
    if not path.strip():
        raise ValueError(f"{key} is empty: {remedy}")
    if not Path(path).expanduser().is_dir() and not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", path):
        raise ValueError(f"{key}={path!r} is no folder: {remedy}")


def read_config(key: str, path: str, kind: str) -> Any:
    """The transformers config at a path; reads no weights. Of a hub id it downloads one small file when needed.

    kind: the `model_type` that it must have. Raises ValueError when it has another or cannot be read.
    """
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(_place(path), trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ValueError(f"{key}={path!r}: no config can be read there ({first_line(error)}); {REMEDY}") from error
    if config.model_type != kind:
        raise ValueError(f"{key}={path!r} holds a {config.model_type} model, not a {kind} one: give another checkpoint")
    return config


def load_model(key: str, path: str, model_class: type[nn.Module], config: Any, device: torch.device | str) -> nn.Module:
    """The model at a path, in float32, frozen. Raises ValueError when its weights are missing or incomplete."""
    try:
        model, report = model_class.from_pretrained(
            _place(path), config=config, dtype=torch.float32, use_safetensors=True, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"{key}={path!r}: its weights cannot be read ({first_line(error)}); {REMEDY}") from error
    if report["missing_keys"]:  # transformers would leave them random
        first = min(report["missing_keys"])
        raise ValueError(f"{key}={path!r} lacks {len(report['missing_keys'])} tensors, {first} among them: {REMEDY}")
    return model.to(device).eval().requires_grad_(False)


REMEDY = "check the name, the network, and that config.json and *.safetensors are complete"


def _place(path: str) -> str:
    folder = Path(path).expanduser()
    return str(folder) if folder.is_dir() else path


def normalise(images: Tensor) -> Tensor:
    """RGB images (..., 3, H, W) in [0, 1] by ImageNet's mean and standard deviation."""
    from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

    mean, std = (images.new_tensor(values)[:, None, None] for values in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD))
    return (images - mean) / std
