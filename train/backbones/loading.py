"""Weights: from a diffusers pipeline folder or hub id, or seeded random ones; and the fingerprint of what was loaded.

Only safetensors are read, nothing is unpickled and no code comes with a checkpoint (no trust_remote_code).
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError
from safetensors import SafetensorError
from torch import nn
from transformers import AutoTokenizer, PreTrainedTokenizerBase, UMT5EncoderModel

from train.backbones.attention_kernels import attention_seconds

WEIGHT_FOLDERS = ("transformer", "transformer_2", "vae", "text_encoder")
SAMPLES, SAMPLE_BYTES = 16, 4096  # of each weight file, for the fingerprint


def resolve_folder(path: str) -> Path:
    """The local folder of a pipeline: `path` itself, or the snapshot of a hub id, downloaded when needed.

    Raises ValueError when the path is empty, neither a folder nor a reachable hub id, or no diffusers pipeline.
    """
    if not path.strip():
        raise ValueError(
            "backbone.path is empty: give a hub id or the folder of a diffusers Wan pipeline, "
            "or set backbone.random_weights=true"
        )
    folder = Path(path).expanduser()
    if not folder.is_dir():
        if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", path):
            raise ValueError(f"backbone.path={path!r} is no folder: give an existing one or a hub id (owner/name)")
        try:
            folder = Path(snapshot_download(path, allow_patterns=["*.json", "*.safetensors", "tokenizer/*"]))
        except (HfHubHTTPError, OSError, ValueError) as error:
            raise ValueError(
                f"backbone.path={path!r} is no folder here, and as a hub id it cannot be downloaded ({error}): "
                "check the name, the network and the licence's acceptance"
            ) from error
    if not (folder / "model_index.json").is_file():
        raise ValueError(
            f"backbone.path={path!r} is no diffusers pipeline (no model_index.json): give the pipeline's top folder"
        )
    return folder


def read_pipeline(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """(model_index.json, architecture as in the families' tables) of a pipeline folder; reads no weights.

    Two experts are of one architecture, so the first one's config is read. Raises ValueError when the pipeline is none
    of Wan's or lacks a component.
    """
    model_index = _read_json(folder / "model_index.json")
    kind = model_index.get("_class_name")
    if kind not in ("WanPipeline", "WanImageToVideoPipeline"):
        raise ValueError(f"backbone.path={folder} holds a {kind}: give a WanPipeline or a WanImageToVideoPipeline")
    transformer = _read_config(folder, "transformer")
    vae = _read_config(folder, "vae")
    # Absent keys mean the defaults of diffusers' classes: the first Wan2.1 configs are older than some keys.
    transformer = {"patch_size": (1, 2, 2), "in_channels": 16, "text_dim": 512, **transformer}
    architecture = {
        "transformer": {"out_channels": transformer["in_channels"], **transformer},
        "z_dim": vae.get("z_dim", 16),
        "vae_scale": vae.get("scale_factor_spatial", 8),
        "vae_scale_temporal": vae.get("scale_factor_temporal", 4),
    }
    return model_index, architecture


def load_transformer(folder: Path, name: str, device: torch.device, dtype: torch.dtype) -> WanTransformer3DModel:
    """The transformer in the pipeline's subfolder `name`, read tensor by tensor onto the device; frozen, eval mode.

    Modules that must stay float32 (norms, time embedder, scale tables) do, whatever `dtype` is.
    """
    return _load(WanTransformer3DModel, folder, name, device, torch_dtype=dtype)


def load_vae(folder: Path, device: torch.device) -> AutoencoderKLWan:
    """The VAE, always in float32."""
    return _load(AutoencoderKLWan, folder, "vae", device, torch_dtype=torch.float32)


def load_text(folder: Path, device: torch.device, dtype: torch.dtype, text_dim: int) -> UMT5EncoderModel:
    """The text encoder; ValueError when its width is not the one the transformer reads."""
    width = _read_config(folder, "text_encoder").get("d_model")
    if width != text_dim:
        raise ValueError(
            f"backbone.path={folder}: the text encoder has width {width}, but the transformer reads {text_dim}: "
            "the two belong to different pipelines"
        )
    return _load(UMT5EncoderModel, folder, "text_encoder", device, dtype=dtype)


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    if not (folder / "tokenizer").is_dir():
        raise ValueError(f"backbone.path={folder} lacks the component tokenizer: complete the folder")
    return AutoTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True)


def random_transformer(
    architecture: dict[str, Any], *, device: torch.device | str, dtype: torch.dtype, seed: int
) -> WanTransformer3DModel:
    """A transformer of `architecture` with seeded random weights, made on the device, frozen and in eval mode.

    Matrices are normal with variance 1 / fan-in, norms are one, biases zero and scale tables as in Wan's own
    initialisation, so that activations and outputs are of order one. Modules that from_pretrained keeps in float32
    are float32 here as well. The same seed gives other weights on another kind of device.
    """
    with torch.device("meta"):
        model = WanTransformer3DModel(**architecture["transformer"])
    keep = set(model._keep_in_fp32_modules)
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.to(torch.float32 if keep & set(name.split(".")) else dtype)
    model.to_empty(device=device)
    # Position tables are buffers that no checkpoint holds, and to_empty has emptied them: computed anew, in float32.
    rope = model.rope
    model.rope = type(rope)(rope.attention_head_dim, rope.patch_size, rope.max_seq_len).to(device)

    generator = torch.Generator(device=device).manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("scale_shift_table"):
                parameter.normal_(std=parameter.shape[-1] ** -0.5, generator=generator)
            elif parameter.dim() > 1:
                parameter.normal_(std=parameter[0].numel() ** -0.5, generator=generator)
            else:
                parameter.fill_(0.0 if name.endswith("bias") else 1.0)
    return _frozen(model)


def choose_attention(network: WanTransformer3DModel, name: str, device: torch.device) -> None:
    """Set the attention kernel: a diffusers backend by name, or with "auto" the fastest here for bfloat16 on a GPU.

    "auto" also measures kernels that diffusers does not have; `network.self_attention` is the key of
    `attention_kernels.KERNELS` that fused blocks use for self-attention. Raises ValueError for a name that diffusers
    does not know or cannot use here.
    """
    if name == "auto":
        attention = network.blocks[0].attn1
        half = attention.to_q.weight.dtype == torch.bfloat16  # cuDNN's kernel takes nothing wider
        if device.type != "cuda" or not half:
            return
        seconds = attention_seconds(attention.heads, attention.inner_dim // attention.heads, device)
        if seconds:
            network.self_attention = min(seconds, key=seconds.get)
        if seconds.get("cudnn", math.inf) >= seconds.get("flash", math.inf):
            return
        name = "_native_cudnn"
    try:
        network.set_attention_backend(name)
    except (ValueError, RuntimeError) as error:
        raise ValueError(f"backbone.attention={name!r} cannot be used: {error}; use auto, native or flash") from error


def fingerprint(family: str, folder: Path) -> str:
    """A pipeline folder's name, <family>-<12 hex>: its configs and each weight file's name, size and 16 samples.

    The same for any dtype, device and choice of loaded parts, but it covers the whole folder: a folder that lacks a
    component gives another fingerprint. Keys that begin with "_" (library versions, paths) do not count.
    """
    digest = hashlib.sha256(family.encode())
    for name in WEIGHT_FOLDERS:
        if not (folder / name / "config.json").is_file():
            continue
        config = json.dumps(_read_config(folder, name), sort_keys=True)
        digest.update(f"\0{name}\0{config}".encode())
        for file in sorted((folder / name).glob("*.safetensors")):
            size = file.stat().st_size
            digest.update(f"\0{file.name}\0{size}\0".encode())
            with file.open("rb") as stream:
                for index in range(SAMPLES):
                    stream.seek(max(0, size - SAMPLE_BYTES) * index // (SAMPLES - 1))
                    digest.update(stream.read(SAMPLE_BYTES))
    return f"{family}-{digest.hexdigest()[:12]}"


def _read_config(folder: Path, name: str) -> dict[str, Any]:
    """A component's config.json without the keys that begin with "_"; ValueError when the component is missing."""
    file = folder / name / "config.json"
    if not file.is_file():
        raise ValueError(
            f"backbone.path={folder} lacks the component {name} (no {name}/config.json): complete the folder"
        )
    return {key: value for key, value in _read_json(file).items() if not key.startswith("_")}


def _read_json(file: Path) -> dict[str, Any]:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"backbone.path: {file} is damaged ({error}): download it again") from error


def _load(model_class: type, folder: Path, name: str, device: torch.device, **dtype: torch.dtype) -> Any:
    """A component with its weights on the device; ValueError when they are missing, unreadable or of another config."""
    _read_config(folder, name)
    if not any((folder / name).glob("*.safetensors")):
        raise ValueError(
            f"backbone.path={folder} has no safetensors weights for the component {name}: "
            "download them, or convert pickled ones with save_pretrained"
        )
    try:
        with torch.random.fork_rng(devices=[]):  # diffusers draws initial values before it reads the real ones
            model, info = model_class.from_pretrained(
                folder / name,
                device_map={"": device},
                use_safetensors=True,
                local_files_only=True,
                output_loading_info=True,
                **dtype,
            )
    except torch.OutOfMemoryError:
        raise
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ValueError(
            f"backbone.path={folder}: the component {name} cannot be loaded onto {device}; if its weights are damaged "
            f"or do not fit its config.json, download it again: {error}"
        ) from error
    if info["missing_keys"]:
        missing = ", ".join(sorted(info["missing_keys"])[:3])
        raise ValueError(f"backbone.path={folder}: the component {name} lacks weights ({missing}): download it again")
    return _frozen(model)


def _frozen(model: nn.Module) -> nn.Module:
    return model.eval().requires_grad_(False)
