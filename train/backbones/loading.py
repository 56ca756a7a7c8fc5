"""Weights: from a diffusers pipeline folder or hub id, or seeded random ones; and the fingerprint of what was loaded.

Only safetensors are read, nothing is unpickled and no code comes with a checkpoint (no trust_remote_code).
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from train.backbones.architecture import NetworkKind
from train.backbones.attention_kernels import attention_seconds
from train.backbones.lora_formats import NetworkLora
from train.backbones.quantize import round_matrix
from train.backbones.random_parts import draw
from train.backbones.streaming import Ring, StreamedBlocks
from train.entry import is_worded
from train.parallel import Sharding

ENCODERS = ("vae", "text_encoder", "text_encoder_2", "image_encoder")
WEIGHT_FOLDERS = ("transformer", "transformer_2", *ENCODERS)
SAMPLES, SAMPLE_BYTES = 16, 4096  # of each weight file, for the fingerprint
FLOATS = ("F64", "F32", "F16", "BF16")  # as safetensors names them


def resolve_folder(path: str, revision: str = "") -> Path:
    """The local folder of a pipeline: `path` itself, or the snapshot of a hub id (at the commit, tag or branch
    `revision`), downloaded when needed.

    Raises ValueError when the path is empty, neither a folder nor a reachable hub id, or no diffusers pipeline, and
    when a config says that weights are quantised: before any weights are downloaded.
    """
    if not path.strip():
        raise ValueError(
            "backbone.path is empty: give a hub id or the folder of a diffusers pipeline, "
            "or set backbone.random_weights=true"
        )
    folder = Path(path).expanduser()
    hub = not folder.is_dir()
    if hub:
        if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", path):
            raise ValueError(f"backbone.path={path!r} is no folder: give an existing one or a hub id (owner/name)")
        folder = _download(path, revision, "*.json", "tokenizer*/*")
    elif revision:
        raise ValueError(
            f"backbone.revision={revision!r} is for hub ids, but backbone.path={path} is a folder: set it to ''"
        )
    if not (folder / "model_index.json").is_file():
        raise ValueError(
            f"backbone.path={path!r} is no diffusers pipeline (no model_index.json): give the pipeline's top folder, or"
            " the hub id that ends in -Diffusers"
        )
    for name in WEIGHT_FOLDERS:
        if (folder / name / "config.json").is_file() and "quantization_config" in read_config(folder, name):
            raise ValueError(_quantised(folder, name, "its config.json has a quantization_config"))
    return _download(path, revision, "*.safetensors") if hub else folder


def _download(path: str, revision: str, *patterns: str) -> Path:
    """The snapshot of a hub id, with the files of `patterns`."""
    try:
        return Path(snapshot_download(path, revision=revision or None, allow_patterns=list(patterns)))
    except (HfHubHTTPError, OSError, ValueError) as error:
        at = f" at backbone.revision={revision}" if revision else ""
        raise ValueError(
            f"backbone.path={path!r} is no folder here, and as a hub id it cannot be downloaded{at} ({error}): "
            "check the name, the revision, the network and the licence's acceptance"
        ) from error


def _quantised(folder: Path, name: str, reason: str) -> str:
    return (
        f"backbone.path={folder}: the component {name} is quantised ({reason}), which nothing here reads: give the"
        " checkpoint in bfloat16 or float32"
    )


def load_transformer(
    kind: NetworkKind,
    folder: Path,
    name: str,
    device: torch.device,
    dtype: torch.dtype,
    sharding: Sharding | None = None,
    ring: Ring | None = None,
    loras: Sequence[tuple[NetworkLora, float]] = (),
    *,
    float8: bool = False,
) -> nn.Module:
    """The transformer in the pipeline's subfolder `name`, read tensor by tensor onto the device; frozen, eval mode.

    Modules that must stay float32 (norms, time embedder, scale tables) do, whatever `dtype` is. With `sharding` one
    rank reads, and a module's parameters are shared out before the next module's are there. With `ring` blocks go on to
    host memory and visit the device (`train.backbones.streaming`). `loras`, with the weight of each, are added to each
    tensor in float32, before it is rounded. With `float8` the blocks' matrices are rounded to 8 bits. ValueError where
    a LoRA does not fit.
    """
    stored = _stored(folder, name)
    with _named(folder, name), torch.device("meta"):
        model = kind.model.from_config(read_config(folder, name))
    wanted = {key: value.shape for key, value in model.state_dict().items()}
    ignored = model._keys_to_ignore_on_load_unexpected or []
    unexpected = [key for key in stored.keys() - wanted.keys() if not any(re.search(part, key) for part in ignored)]
    _check_keys(folder, name, missing=wanted.keys() - stored.keys(), unexpected=unexpected)
    for key, shape in wanted.items():
        if stored[key].shape != shape:
            raise ValueError(
                f"backbone.path={folder}: the component {name} does not fit its config.json ({key} has shape"
                f" {tuple(stored[key].shape)}, not {tuple(shape)}): download it again"
            )

    for lora, _ in loras:
        lora.check(wanted, source=f"LoRA {lora.path}")

    def read(key: str, parameter: Tensor) -> None:
        if sharding is None or sharding.reads:
            with safe_open(stored[key].file, "pt") as file:
                weight = file.get_tensor(key).to(device)  # there, casting costs nothing
            for lora, strength in loras:
                weight = lora.add(key, weight, strength=strength)
            parameter.copy_(weight)

    with _named(folder, name):
        return _fill(kind, model, device, dtype, read, sharding, ring, float8=float8)


def load_tokenizer(folder: Path, name: str = "tokenizer") -> PreTrainedTokenizerBase:
    if not (folder / name).is_dir():
        raise ValueError(f"backbone.path={folder} lacks the component {name}: complete the folder")
    return AutoTokenizer.from_pretrained(folder / name, local_files_only=True)


def load_processor(processor_class: type, folder: Path, name: str) -> Any:
    """What prepares pictures for an image encoder; ValueError when its config is missing or unreadable."""
    with _named(folder, name):
        return processor_class.from_pretrained(folder / name, local_files_only=True)


def random_transformer(
    architecture: dict[str, Any],
    *,
    device: torch.device | str,
    dtype: torch.dtype,
    seed: int,
    sharding: Sharding | None = None,
    ring: Ring | None = None,
    float8: bool = False,
) -> nn.Module:
    """A transformer of `architecture` with seeded random weights, made on the device, frozen and in eval mode.

    They are drawn as `random_parts.draw` says. Dtypes, `sharding`, `ring` and `float8` are as in
    `load_transformer`. The same seed gives other weights on another kind of device.
    """
    with torch.device("meta"):
        model = architecture["kind"].model(**architecture["transformer"])
    generator = torch.Generator(device=device).manual_seed(seed)
    write = partial(draw, generator=generator)
    return _fill(architecture["kind"], model, device, dtype, write, sharding, ring, float8=float8)


@torch.no_grad()
def _fill(
    kind: NetworkKind,
    model: nn.Module,
    device: torch.device | str,
    dtype: torch.dtype,
    write: Callable[[str, Tensor], None],
    sharding: Sharding | None,
    ring: Ring | None,
    *,
    float8: bool,
) -> nn.Module:
    """Give a model without storage parameters on the device, which `write` fills by name, module by module."""
    streamed = None if ring is None else StreamedBlocks(ring, kind, model, dtype, float8=float8)
    for prefix, module in model.named_modules():
        own = []
        for key, shape in list(module.named_parameters(prefix, recurse=False)):
            if streamed is not None and streamed.holds(key):
                memory = streamed.parameter(key)
            else:
                memory = torch.empty_like(shape, dtype=kind.parameter_dtype(key, dtype), device=device)
            own.append(nn.Parameter(memory, requires_grad=False))
            write(key, own[-1])
            if float8 and streamed is None and key.startswith(f"{kind.blocks}.") and kind.in_8_bits(key, shape, dtype):
                round_matrix(own[-1])
            setattr(module, key.rpartition(".")[2], own[-1])
        if sharding is not None and own:
            sharding.take(own)
    if streamed is not None:
        streamed.attach()
    if kind.fill_buffers is not None:
        kind.fill_buffers(model, device)
    return model.eval().requires_grad_(False)


def choose_attention(kind: NetworkKind, network: nn.Module, name: str, device: torch.device) -> None:
    """Set the attention kernel: a diffusers backend by name, or with "auto" the fastest here for bfloat16 on a GPU;
    and unless it is "native", all as diffusers has it, the kind's own attention.

    "auto" also measures kernels that diffusers does not have; `network.self_attention` is the key of
    `attention_kernels.KERNELS` that fused blocks use for self-attention. Raises ValueError for a name that diffusers
    does not know or cannot use here.
    """
    if kind.attention is not None and name != "native":
        for block in kind.blocks_of(network):
            block.attn.set_processor(kind.attention())
    if name == "auto":
        half = network.dtype == torch.bfloat16  # cuDNN's kernel takes nothing wider
        if device.type != "cuda" or not half or not (kind.fused or kind.attention):  # what is measured takes no mask
            return
        shape = kind.shape(network.config)
        seconds = attention_seconds(shape.heads, shape.width // shape.heads, device)
        if seconds and kind.fused:
            network.self_attention = min(seconds, key=seconds.get)
        if seconds.get("cudnn", math.inf) >= seconds.get("flash", math.inf):
            return
        name = "_native_cudnn"
    try:
        network.set_attention_backend(name)
    except (ValueError, RuntimeError) as error:
        raise ValueError(f"backbone.attention={name!r} cannot be used: {error}; use auto, native or flash") from error


def fingerprint(family: str, folder: Path, components: Sequence[str] = WEIGHT_FOLDERS) -> str:
    """A pipeline folder's name, <family>-<12 hex>: its configs and each weight file's name, size and 16 samples.

    The same for any dtype, device and choice of loaded parts, but it covers all of `components`: a folder that lacks
    one gives another fingerprint. Keys that begin with "_" (library versions, paths) do not count.
    """
    digest = hashlib.sha256(family.encode())
    for name in components:
        if not (folder / name / "config.json").is_file():
            continue
        config = json.dumps(read_config(folder, name), sort_keys=True)
        digest.update(f"\0{name}\0{config}".encode())
        for file in sorted((folder / name).glob("*.safetensors")):
            size = file.stat().st_size
            digest.update(f"\0{file.name}\0{size}\0".encode())
            with file.open("rb") as stream:
                for index in range(SAMPLES):
                    stream.seek(max(0, size - SAMPLE_BYTES) * index // (SAMPLES - 1))
                    digest.update(stream.read(SAMPLE_BYTES))
    return f"{family}-{digest.hexdigest()[:12]}"


def read_config(folder: Path, name: str) -> dict[str, Any]:
    """A component's config.json without the keys that begin with "_"; ValueError when the component is missing."""
    file = folder / name / "config.json"
    if not file.is_file():
        raise ValueError(
            f"backbone.path={folder} lacks the component {name} (no {name}/config.json): complete the folder"
        )
    return {key: value for key, value in read_json(file).items() if not key.startswith("_")}


def read_json(file: Path) -> dict[str, Any]:
    """A file of a pipeline; ValueError when it is damaged or holds something else."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError(f"it holds a {type(content).__name__}")
    except ValueError as error:
        raise ValueError(f"backbone.path: {file} is damaged ({error}): download it again") from error
    return content


class _Stored(NamedTuple):
    """A tensor in a file, unread."""

    file: Path
    dtype: str
    shape: torch.Size


def _stored(folder: Path, name: str) -> dict[str, _Stored]:
    """A component's stored tensors by name, from the files' headers.

    ValueError when there are none, files are missing or damaged, or the weights are quantised.
    """
    read_config(folder, name)
    if not any((folder / name).glob("*.safetensors")):
        raise ValueError(
            f"backbone.path={folder} has no safetensors weights for the component {name}: "
            "download them, or convert pickled ones with save_pretrained"
        )
    stem = "model" if name.startswith(("text_encoder", "image_encoder")) else "diffusion_pytorch_model"
    files, index = {f"{stem}.safetensors"}, folder / name / f"{stem}.safetensors.index.json"
    if index.is_file():
        files = {Path(file).name for file in read_json(index)["weight_map"].values()}
    stored: dict[str, _Stored] = {}
    for file in (folder / name / file for file in sorted(files)):
        with _named(folder, name), safe_open(file, "pt") as opened:
            for key in opened.keys():
                tensor = opened.get_slice(key)
                stored[key] = _Stored(file, tensor.get_dtype(), torch.Size(tensor.get_shape()))
    for key, tensor in stored.items():
        if tensor.dtype not in FLOATS:
            raise ValueError(_quantised(folder, name, f"{key} is stored as {tensor.dtype}"))
    return stored


def load_component(model_class: type, folder: Path, name: str, device: torch.device, **dtype: torch.dtype) -> Any:
    """A component with its weights on the device; ValueError when they are missing, unreadable or of another config."""
    _stored(folder, name)  # refuses what from_pretrained would load wrong
    with _named(folder, name), torch.random.fork_rng(devices=[]):  # initial values are drawn before the real are read
        model, info = model_class.from_pretrained(
            folder / name,
            device_map={"": device},
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
            **dtype,
        )
    _check_keys(folder, name, missing=info["missing_keys"], unexpected=info["unexpected_keys"])
    return model.eval().requires_grad_(False)


@contextmanager
def _named(folder: Path, name: str) -> Iterator[None]:
    """Errors of other packages inside as a ValueError that names the component."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (OSError, TypeError, ValueError, RuntimeError, SafetensorError) as error:
        if isinstance(error, ValueError) and is_worded(error):  # of a LoRA, say
            raise
        raise ValueError(
            f"backbone.path={folder}: the component {name} cannot be loaded; if its weights are damaged "
            f"or do not fit its config.json, download it again: {error}"
        ) from error


def _check_keys(folder: Path, name: str, *, missing: Iterable[str], unexpected: Iterable[str]) -> None:
    found = {"lacks weights": sorted(missing), "has weights that the model does not know": sorted(unexpected)}
    for problem, keys in found.items():
        if keys:
            named = ", ".join(keys[:3]) + (f" and {len(keys) - 3} more" if len(keys) > 3 else "")
            raise ValueError(f"backbone.path={folder}: the component {name} {problem} ({named}): download it again")
