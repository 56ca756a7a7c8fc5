"""One preference group, what must hold of it, and its bytes: two members of a webdataset tar.

`<key>.json` holds the prompt, judge scores and origin, `<key>.safetensors` the latents, the text embedding and optional
physics targets. Nothing is pickled.
"""

import io
import math
import re
import tarfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NotRequired

import safetensors.torch
import torch
import webdataset
from torch import Tensor
from typing_extensions import TypedDict  # pydantic reads typing's from Python 3.12 on

from train.shard_records import SCHEMA, Common, json_bytes, parse_json

# The largest magnitude of what the network reads. Normalised latents are close to a standard normal and embeddings come
# out of a normalisation; 1e30 is finite as well, but its square is not, and one such value costs a batch each visit.
LARGEST = 1.0e4
EXTRA, MORE = "extra.", "conditioning."  # what the names of those tensors begin with in a shard
DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)  # of floating point tensors


@dataclass
class Loser:
    seed: int  # of the noise it was generated from
    semantic: float  # judge's semantic adherence in [0, 1], 0.5 neutral
    physical: float  # judge's physical plausibility in [0, 1], 0.5 neutral


class Description(TypedDict):
    """The JSON member of a sample."""

    schema: int
    key: str
    prompt: str
    action: str
    physics_richness: float | None
    source: str
    losers: list[Loser]
    fingerprint: str
    network: NotRequired[str]


@dataclass(eq=False)
class Group:
    key: str  # unique in the folder; letters, digits, _ and -
    prompt: str
    action: str  # action cluster, used for balancing
    physics_richness: float | None  # difficulty that the filter gave the clip; None if not filtered
    source: str  # the winner's origin: path and start time
    losers_info: list[Loser]  # one for each of `losers`
    fingerprint: str  # of the encoders that made latents and text; in earlier versions, of the whole pipeline
    winner: Tensor  # (C, F, H, W) normalised latent
    losers: Tensor  # (M, C, F, H, W), the winner's dtype; M = 0 serves supervised training only
    text: Tensor  # (L', D) text embedding without padding
    condition: Tensor | None = None  # image condition latents of I2V families
    extra: dict[str, Tensor] = field(default_factory=dict)  # of the winner: tracks, visibility, keep, ...
    network: str = ""  # fingerprint of the backbone that made the losers; empty: that is `fingerprint`
    # What else the network is told (`Conditioning.more`), by name, texts among it without padding; Wan's have nothing.
    conditioning: dict[str, Tensor] = field(default_factory=dict)


def check_group(group: Group) -> None:
    """ValueError, naming the group and the value, if training could not use `group`.

    One pass over the tensors: milliseconds a group of 14B's size with four losers, a seventh of what reading it takes.
    """

    def refuse(reason: str) -> None:
        raise ValueError(f"group {group.key!r}: {reason}")

    if not re.fullmatch(r"[A-Za-z0-9_-]{1,80}", group.key):  # with ".safetensors" within a tar header's 100 characters
        refuse("a key has 1 to 80 characters out of A-Z a-z 0-9 _ -")
    if not group.prompt.strip():
        refuse("the prompt is empty")
    if not group.fingerprint:
        refuse("the backbone fingerprint is empty")
    if group.physics_richness is not None and not math.isfinite(group.physics_richness):
        refuse(f"physics_richness is {group.physics_richness}, not a finite number or None")
    if group.winner.ndim != 4 or not group.winner.is_floating_point() or group.winner.numel() == 0:
        refuse(f"the winner must be a float latent (C, F, H, W), not {_describe(group.winner)}")
    if group.losers.shape[1:] != group.winner.shape or group.losers.dtype != group.winner.dtype:
        refuse(f"the losers {_describe(group.losers)} must be a stack of the winner's {_describe(group.winner)}")
    if len(group.losers_info) != len(group.losers):
        refuse(f"{len(group.losers_info)} loser records for {len(group.losers)} loser latents")
    for number, loser in enumerate(group.losers_info):
        for name in ("semantic", "physical"):
            score = getattr(loser, name)
            if not 0 <= score <= 1:  # false for NaN too
                refuse(f"loser {number} has {name} score {score}; judge scores lie in [0, 1]")
        if torch.equal(group.losers[number], group.winner):
            refuse(f"loser {number} is the winner itself, so that there is nothing to prefer")
    if group.text.ndim != 2 or not group.text.is_floating_point() or group.text.numel() == 0:
        refuse(f"the text embedding must be float (L', D) with L' > 0, not {_describe(group.text)}")
    if group.condition is not None and (group.condition.ndim != 4 or not group.condition.is_floating_point()):
        refuse(f"the condition must be a float latent (C', F, H, W), not {_describe(group.condition)}")
    for name, tensor in group.conditioning.items():
        if not tensor.is_floating_point() or (name.startswith("text") and tensor.ndim != 2):
            refuse(f"the conditioning {name} must be float, and of a text (L', D), not {_describe(tensor)}")
    for name, tensor in tensors_of(group).items():
        if not tensor.is_floating_point() or tensor.numel() == 0:
            continue
        if tensor.dtype not in DTYPES:
            refuse(f"tensor {name!r} is {_describe(tensor)}; use {', '.join(map(dtype_name, DTYPES))}")
        low, high = (value.item() for value in torch.aminmax(tensor))  # NaN if any is; isfinite takes ten times as long
        if not (math.isfinite(low) and math.isfinite(high)):
            refuse(f"tensor {name!r} has values that are not finite")
        if not name.startswith(EXTRA) and max(-low, high) > LARGEST:
            refuse(f"tensor {name!r} has values up to {max(-low, high):.3g}, far beyond a latent's or an embedding's")


def tensors_of(group: Group) -> dict[str, Tensor]:
    """Its tensors by the names that they have in a shard."""
    extra = {f"{EXTRA}{name}": tensor for name, tensor in group.extra.items()}
    return {"winner": group.winner, "losers": group.losers, **told(group), **extra}


def told(group: Group) -> dict[str, Tensor]:
    """What the network is told of the clips, by the names that they have in a shard: as `Conditioning.named`."""
    condition = {} if group.condition is None else {"condition": group.condition}
    more = {f"{MORE}{name}": tensor for name, tensor in group.conditioning.items()}
    return {"text": group.text, **condition, **more}


def common(group: Group) -> Common:
    latent = {"latent_shape": list(group.winner.shape), "latent_dtype": dtype_name(group.winner.dtype)}
    return {"fingerprint": group.fingerprint, **latent, **_network(group)}


def _network(group: Group) -> dict[str, str]:
    return {"network": group.network} if group.network else {}


def sample_bytes(group: Group) -> memoryview:
    """Both tar members with their headers, without the end-of-archive blocks."""
    description = {
        "schema": SCHEMA,
        "key": group.key,
        "prompt": group.prompt,
        "action": group.action,
        "physics_richness": None if group.physics_richness is None else float(group.physics_richness),
        "source": group.source,
        "losers": [
            {"seed": int(loser.seed), "semantic": float(loser.semantic), "physical": float(loser.physical)}
            for loser in group.losers_info
        ],
        "fingerprint": group.fingerprint,
        **_network(group),
    }
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors_of(group).items()}
    buffer = io.BytesIO()
    with webdataset.TarWriter(buffer, mtime=0, user="", group="", encoder=False) as tar:
        members = {"json": json_bytes(description), "safetensors": safetensors.torch.save(tensors)}
        tar.write({"__key__": group.key, **members})
        end = tar.tarstream.offset
    return buffer.getbuffer()[:end]


def parse_sample(data: bytes, *, name: str, remedy: str) -> Group:
    """The group in the bytes of its tar members. ValueError with `name` and `remedy` if there is none."""
    try:
        members = _members(data)
        tensors = safetensors.torch.load(members.get("safetensors", b""))
    except (ValueError, TypeError, RuntimeError, KeyError, tarfile.TarError, safetensors.SafetensorError) as error:
        raise ValueError(f"{name} cannot be read ({error}); {remedy}") from error
    if lacking := [tensor for tensor in ("winner", "losers", "text") if tensor not in tensors]:
        raise ValueError(f"{name} lacks tensor {', '.join(lacking)}; {remedy}")
    description = parse_json(members.get("json", b""), Description, name=name, remedy=remedy)
    plain = ("key", "prompt", "action", "physics_richness", "source", "fingerprint")
    return Group(
        **{field_name: description[field_name] for field_name in plain},
        losers_info=description["losers"],
        network=description.get("network", ""),
        **{tensor: tensors[tensor] for tensor in ("winner", "losers", "text")},
        condition=tensors.get("condition"),
        extra=beginning(EXTRA, tensors),
        conditioning=beginning(MORE, tensors),
    )


def beginning(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Those whose names begin with `prefix`, without it."""
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def _members(data: bytes) -> dict[str, bytes]:
    """The files in a sample by their suffix. It takes plain members only, as written: archives of other kinds may
    declare more bytes than there are."""
    members, start = {}, 0
    while start < len(data):
        header = tarfile.TarInfo.frombuf(data[start : start + tarfile.BLOCKSIZE], "utf-8", "strict")
        start += tarfile.BLOCKSIZE
        if header.type != tarfile.REGTYPE or not 0 <= header.size <= len(data) - start:
            raise ValueError(f"{header.name!r} is no plain file of at most {len(data) - start} bytes")
        members[header.name.partition(".")[2]] = data[start : start + header.size]
        start += -(-header.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
    return members


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _describe(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} {dtype_name(tensor.dtype)}"
