"""The JSON in a folder of groups, and what must hold of it before a byte of a shard is read: see train/groups.py."""

import json
import tarfile
from collections import Counter
from collections.abc import Mapping
from typing import Annotated, Any, Literal, NotRequired

from pydantic import AfterValidator, Field, NonNegativeInt, PositiveInt
from typing_extensions import TypedDict  # pydantic reads typing's from Python 3.12 on

from train import files

SCHEMA = 1
END = bytes(2 * tarfile.BLOCKSIZE)  # of an archive

Shape = Annotated[list[PositiveInt], Field(min_length=4, max_length=4)]
Dtype = Literal["bfloat16", "float16", "float32", "float64"]


class Versioned(TypedDict):
    schema: int


class SampleRecord(TypedDict):
    """Where one group lies in its shard."""

    key: str
    offset: NonNegativeInt
    bytes: PositiveInt
    sha256: str
    num_losers: NonNegativeInt


class ShardRecord(TypedDict):
    """One shard in the index."""

    file: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]+\.tar\z", max_length=255)]  # beside the index
    bytes: NonNegativeInt
    sha256: str
    samples: list[SampleRecord]


class Common(TypedDict):
    """What all groups of a folder share."""

    fingerprint: str  # of the encoders; in groups of earlier versions, of the whole pipeline
    latent_shape: Shape
    latent_dtype: Dtype
    network: NotRequired[str]  # fingerprint of what made the losers, where it is another one


class Marker(ShardRecord):
    schema: int
    fingerprint: NotRequired[str]  # an empty shard has nothing in common with others
    latent_shape: NotRequired[Shape]
    latent_dtype: NotRequired[Dtype]
    network: NotRequired[str]


class Index(Common):
    schema: int
    video: dict[str, Any]  # the clips' VideoConfig
    num_groups: PositiveInt
    total_bytes: PositiveInt
    shards: list[ShardRecord]


def _check_shard(shard: ShardRecord) -> None:
    """Samples follow each other without a gap up to the end of the archive."""
    end = 0
    for sample in shard["samples"]:
        if sample["offset"] != end:
            raise ValueError(f"group {sample['key']!r} of {shard['file']} is at offset {sample['offset']}, not {end}")
        end += sample["bytes"]
    if shard["bytes"] != end + len(END):
        raise ValueError(
            f"{shard['file']} has {shard['bytes']} bytes, but its samples and the end take {end + len(END)}"
        )


def _check_marker(marker: Marker) -> Marker:
    """Samples that fit the size of the archive, and what they have in common."""
    _check_shard(marker)
    if lacking := [name for name in Common.__required_keys__ if marker["samples"] and name not in marker]:
        raise ValueError(f"{', '.join(lacking)} of the samples is missing")
    return marker


def _check_index(index: Index) -> Index:
    """Shards as in `_check_marker`, no key twice, and the right sums."""
    for shard in index["shards"]:
        _check_shard(shard)
    count = Counter(sample["key"] for shard in index["shards"] for sample in shard["samples"])
    for key, times in count.most_common(1):
        if times > 1:
            raise ValueError(f"group {key!r} is there {times} times")
    for name, found in (("num_groups", len(count)), ("total_bytes", sum(shard["bytes"] for shard in index["shards"]))):
        if index[name] != found:
            raise ValueError(f"{name} is {index[name]}, but the shards have {found}")
    return index


CheckedMarker = Annotated[Marker, AfterValidator(_check_marker)]
CheckedIndex = Annotated[Index, AfterValidator(_check_index)]


def parse_json(data: bytes, kind: Any, *, name: str, remedy: str) -> Any:
    """`files.parse_json` of this schema; another one is named as such, for it differs in the rest as well."""
    found = files.parse_json(data, Versioned, name=name, remedy=remedy)["schema"]
    if found != SCHEMA:
        raise ValueError(f"{name} has schema {found}, this version reads schema {SCHEMA}; {remedy}")
    return files.parse_json(data, kind, name=name, remedy=remedy)


def json_bytes(content: Mapping[str, Any]) -> bytes:
    return json.dumps(content, ensure_ascii=False, allow_nan=False, sort_keys=True).encode("utf-8")
