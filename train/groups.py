"""Preference groups on disk and in training: the shard contract between `data_pipeline` and `train`.

A group is one real (winning) clip, the losing clips that the model generated for the same prompt, and what training
needs to know of them. Groups for supervised training have no losers. On disk it is one webdataset sample of two tar
members, `<key>.json` (prompt, judge scores, origin) and `<key>.safetensors` (latents, text embedding, optional physics
targets); nothing is pickled. A folder holds

    <shard>.tar     the samples, byte-equal for equal groups; `webdataset.WebDataset` reads it
    <shard>.json    its marker, written after the tar: sizes, offsets and checksums. A shard with a marker is done
    index.json      all markers collected, written last: a folder without it is an unfinished build

and no other JSON or tar file. Nothing that such a folder says is taken on trust: what writing checks, reading checks
again, and a group that fails stops the run with the names of its shard and key. The folder is a local one; links to
shards that lie elsewhere are followed.

The index gives random access to every sample, so training draws from a stream that is a pure function of one integer,
the global sample position (`assignment`): it is the same on any number of ranks and workers, and resuming needs only
that integer.
"""

import hashlib
import io
import itertools
import json
import math
import os
import re
import stat
import tarfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, is_dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import numpy as np
import safetensors.torch
import torch
import webdataset
from torch import Tensor

from train import files
from train.shard_records import (
    END,
    SCHEMA,
    CheckedIndex,
    CheckedMarker,
    Common,
    Description,
    Index,
    Loser,
    Marker,
    SampleRecord,
    ShardRecord,
    parse_json,
)

INDEX = "index.json"
T = TypeVar("T")
# The largest magnitude of what the network reads. Normalised latents are close to a standard normal and embeddings come
# out of a normalisation; 1e30 is finite as well, but its square is not, and one such value costs a batch each visit.
LARGEST = 1.0e4
DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)  # of floating point tensors


@dataclass(eq=False)
class Group:
    key: str  # unique in the folder; letters, digits, _ and -
    prompt: str
    action: str  # action cluster, used for balancing
    physics_richness: float | None  # difficulty that the filter gave the clip; None if not filtered
    source: str  # the winner's origin: path and start time
    losers_info: list[Loser]  # one for each of `losers`
    fingerprint: str  # of the backbone that encoded and generated it
    winner: Tensor  # (C, F, H, W) normalised latent
    losers: Tensor  # (M, C, F, H, W), the winner's dtype; M = 0 serves supervised training only
    text: Tensor  # (L', D) text embedding without padding
    condition: Tensor | None = None  # image condition latents of I2V families
    extra: dict[str, Tensor] = field(default_factory=dict)  # of the winner: tracks, visibility, keep, ...


@dataclass(eq=False)
class Sample:
    position: int  # in the global stream
    group: Group
    loser_index: int  # the loser of this pair, in range(len(group.losers)); -1 in a group without losers


# ---- writing ---------------------------------------------------------------------------------------------------------


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
    for name, tensor in _tensors(group).items():
        if not tensor.is_floating_point() or tensor.numel() == 0:
            continue
        if tensor.dtype not in DTYPES:
            refuse(f"tensor {name!r} is {_describe(tensor)}; use {', '.join(map(_dtype, DTYPES))}")
        low, high = (value.item() for value in torch.aminmax(tensor))  # NaN if any is; isfinite takes ten times as long
        if not (math.isfinite(low) and math.isfinite(high)):
            refuse(f"tensor {name!r} has values that are not finite")
        if not name.startswith("extra.") and max(-low, high) > LARGEST:
            refuse(f"tensor {name!r} has values up to {max(-low, high):.3g}, far beyond a latent's or an embedding's")


class ShardWriter:
    """Writes one shard; it appears, complete, when the `with` block ends without an error, and not at all otherwise.

        with ShardWriter(folder, "shard-00003") as writer:
            for group in groups: writer.write(group)
        writer.record  # what the marker holds

    An existing shard of that name is replaced. A shard may stay empty: its unit of work is then done and gave no group.
    Finishing a shard removes index.json, which does not describe the folder any more.

    Raises ValueError for a group that `check_group` refuses, a second group with the same key, or of another
    fingerprint or latent shape than the first; OSError (ENOSPC) as `train.files.atomic` when the disk is full.
    """

    def __init__(self, folder: str | Path, name: str):
        if not re.fullmatch(r"[A-Za-z0-9_-]+", name) or f"{name}.json" == INDEX:
            raise ValueError(f"shard name {name!r}: use letters, digits, _ and -, and not 'index'")
        self.folder, self.name = local_folder(folder), name
        self.path = self.folder / f"{name}.tar"
        self.record: dict[str, Any] = {}
        self._common: dict[str, Any] = {}  # what every group of the shard shares, set by the first
        self._samples: dict[str, dict[str, Any]] = {}
        self._num_bytes, self._digest = 0, hashlib.sha256()

    def __enter__(self) -> "ShardWriter":
        self._writing = self._opened()
        self._file = self._writing.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._writing.__exit__(*error)

    def write(self, group: Group) -> None:
        check_group(group)
        if group.key in self._samples:
            raise ValueError(f"group {group.key!r}: {self.path} already holds a group with this key")
        common = _common(group)
        self._common = self._common or common
        for name, value in common.items():
            if value != self._common[name]:
                raise ValueError(f"group {group.key!r} has {name} {value}, but {self.path} holds {self._common[name]}")
        data = _sample_bytes(group)
        self._samples[group.key] = {
            "key": group.key,
            "offset": self._num_bytes,
            "bytes": len(data),
            "sha256": files.sha256(data),
            "num_losers": len(group.losers),
        }
        self._append(data)

    def _append(self, data: bytes | memoryview) -> None:
        self._num_bytes += len(data)
        self._digest.update(data)
        self._file.write(data)

    @contextmanager
    def _opened(self) -> Iterator[BinaryIO]:
        """The tar while it is written; what follows the `yield` finishes the shard."""
        marker = self.folder / f"{self.name}.json"
        with files.atomic(self.path) as partial:
            with open(partial, "wb") as file:
                yield file
                self._append(END)
            for outdated in (self.folder / INDEX, marker):  # first, so that neither ever describes another tar
                outdated.unlink(missing_ok=True)
        self.record = {
            "schema": SCHEMA,
            "file": self.path.name,
            "bytes": self._num_bytes,
            "sha256": self._digest.hexdigest(),
            **self._common,
            "samples": list(self._samples.values()),
        }
        files.write_bytes(marker, _json_bytes(self.record))


def shard_record(folder: str | Path, name: str) -> Marker | None:
    """The marker of shard `name`, or None if it is still to be built: no marker, no tar, or a tar of another size.

    Raises ValueError for a marker that is no JSON, of another schema, or that describes no shard of this name.
    """
    marker, tar = Path(folder) / f"{name}.json", Path(folder) / f"{name}.tar"
    if not marker.exists() or not tar.exists():
        return None
    remedy = "delete it and run the build again"
    record = parse_json(_read(marker, remedy), CheckedMarker, name=str(marker), remedy=remedy)
    if record["file"] != tar.name:
        raise ValueError(f"{marker} describes {record['file']}; {remedy}")
    return record if tar.stat().st_size == record["bytes"] else None


def write_index(folder: str | Path, *, fingerprint: str, video: Any) -> dict[str, Any]:
    """Collects the shard markers, sorted by name, into index.json and returns it.

    fingerprint: of the backbone, which every shard must have. video: the clips' VideoConfig or a mapping.

    Raises ValueError for a shard without marker or a marker without its whole tar, a shard of another schema,
    fingerprint, latent shape or dtype, a key that two shards share, or no group at all.
    """
    folder = local_folder(folder)
    common, shards, shard_of_key = {"fingerprint": fingerprint}, [], {}
    names = {path.stem for pattern in ("*.tar", "*.json") for path in folder.glob(pattern)} - {Path(INDEX).stem}
    for name in sorted(names):
        record, rebuild = shard_record(folder, name), _rebuild(folder / f"{name}.tar")
        if record is None:
            raise ValueError(f"shard {name!r} in {folder} is not finished; {rebuild}")
        for field_name in Common.__annotations__ if record["samples"] else ():
            found = record.get(field_name)
            expected = common.setdefault(field_name, found)
            if found != expected:
                raise ValueError(
                    f"shard {name!r} in {folder} has {field_name} {found}, not {expected} as the others; {rebuild}"
                )
        for key in (sample["key"] for sample in record["samples"]):
            if key in shard_of_key:
                raise ValueError(f"group {key!r} is in shard {shard_of_key[key]!r} and in {name!r}; {rebuild}")
            shard_of_key[key] = name
        shards.append({entry: record[entry] for entry in ("file", "bytes", "sha256", "samples")})
    if not shard_of_key:
        raise ValueError(f"no preference group in {folder}: the build made no shard, or only empty ones")
    index = {
        "schema": SCHEMA,
        **common,
        "video": asdict(video) if is_dataclass(video) else dict(video),
        "num_groups": len(shard_of_key),
        "total_bytes": sum(shard["bytes"] for shard in shards),
        "shards": shards,
    }
    files.write_bytes(folder / INDEX, _json_bytes(index))
    return index


# ---- reading ---------------------------------------------------------------------------------------------------------


class GroupSet(torch.utils.data.Dataset):
    """Random access to the groups of a folder. It keeps no file open: forked and spawned DataLoader workers may use it.

    fingerprint: of the backbone that will train on the groups; None skips that check.

    Attributes: fingerprint, video (dict), latent_shape (C, F, H, W), latent_dtype, total_bytes, digest (SHA-256 of
    index.json, which has the checksums of all groups: equal digests mean equal groups in the same order).

    Raises ValueError on opening for a URL, a missing or unreadable index, another schema, another fingerprint, a
    missing shard or one whose size is not the index's; on reading, with shard, key and remedy, for a group whose
    checksum is not the index's, that `check_group` refuses, or that the index describes otherwise.
    """

    def __init__(self, folder: str | Path, *, fingerprint: str | None = None):
        self.folder = local_folder(folder)
        self.index, self.digest = _read_index(self.folder)
        self.fingerprint: str = self.index["fingerprint"]
        if fingerprint is not None and fingerprint != self.fingerprint:
            raise ValueError(
                f"the groups in {self.folder} were built with backbone {self.fingerprint}, but training uses "
                f"{fingerprint}; train that backbone or build the groups again with this one"
            )
        for shard in self.index["shards"]:
            if problem := _file_problem(self.folder, shard):
                raise ValueError(problem)
        self.video: dict[str, Any] = self.index["video"]
        self.latent_shape: tuple[int, ...] = tuple(self.index["latent_shape"])
        self.latent_dtype: torch.dtype = getattr(torch, self.index["latent_dtype"])
        self.total_bytes: int = self.index["total_bytes"]
        self._samples = [(shard["file"], sample) for shard in self.index["shards"] for sample in shard["samples"]]

    def __len__(self) -> int:
        return len(self._samples)

    def key(self, index: int) -> str:
        return self._samples[index][1]["key"]

    def num_losers(self, index: int) -> int:
        return self._samples[index][1]["num_losers"]

    def __getitem__(self, index: int) -> Group:
        file, sample = self._samples[index]
        with open(self.folder / file, "rb") as shard:
            shard.seek(sample["offset"])
            data = shard.read(sample["bytes"])
        return _checked_group(self.folder / file, self.index, sample, data)


def verify(folder: str | Path) -> list[str]:
    """Checks every byte of every shard against the index, and every group as reading does; returns one line, with the
    remedy, for each problem."""
    return survey(folder, lambda group: None)[1]


def survey(
    folder: str | Path, see: Callable[[Group], T], advance: Callable[[int], Any] = lambda count: None
) -> tuple[list[T], list[str]]:
    """What `see` gives of every group that is whole, in order, and the lines of `verify`, all in one pass.

    Shards are read in threads, for there may be terabytes. advance: told the bytes of each shard that is done.
    """
    try:
        folder = local_folder(folder)
        index, _ = _read_index(folder)
    except ValueError as error:
        return [], [str(error)]
    seen, problems = [], []
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # hashing and reading let go of Python's lock
        for entry, found in zip(
            index["shards"], pool.map(partial(_survey_shard, folder, index, see), index["shards"]), strict=True
        ):
            seen += found[0]
            problems += found[1]
            advance(entry["bytes"])
    return seen, problems


def _survey_shard(
    folder: Path, index: Index, see: Callable[[Group], T], entry: ShardRecord
) -> tuple[list[T], list[str]]:
    if problem := _file_problem(folder, entry):
        return [], [problem]
    path, digest, seen, damaged = folder / entry["file"], hashlib.sha256(), [], []
    with open(path, "rb") as shard:
        for sample in entry["samples"]:  # samples follow each other without a gap
            data = shard.read(sample["bytes"])
            digest.update(data)
            try:
                seen.append(see(_checked_group(path, index, sample, data)))
            except ValueError as error:
                damaged.append(str(error))
        digest.update(shard.read())  # end of archive
    if not damaged and digest.hexdigest() != entry["sha256"]:
        damaged = [f"{path} differs from its checksum outside its samples; {_rebuild(path)}"]
    return seen, damaged


# ---- the training stream ---------------------------------------------------------------------------------------------


def assignment(position: int, num_losers: Sequence[int], seed: int) -> tuple[int, int]:
    """(group index, loser index) that the global sample `position` trains on. A pure function.

    num_losers: M of every group; where it is 0 the loser index is -1. Epoch e = position // N visits the N groups in an
    order of its own, and gives group g the loser at place e % M_g of a permutation drawn anew every M_g epochs (a
    cycle): g meets every loser once a cycle.
    """
    epoch, place = divmod(position, len(num_losers))
    group = int(_epoch_order(len(num_losers), seed, epoch)[place])
    if num_losers[group] == 0:
        return group, -1
    cycle, turn = divmod(epoch, num_losers[group])
    return group, int(_permutation(num_losers[group], f"losers {seed} {group} {cycle}")[turn])


@lru_cache(maxsize=4)  # a stream stays in one epoch for N positions
def _epoch_order(num_groups: int, seed: int, epoch: int) -> np.ndarray:
    return _permutation(num_groups, f"groups {seed} {epoch}")


def _permutation(length: int, name: str) -> np.ndarray:
    """A permutation of range(length) that `name` alone decides. It sorts raw PCG64 output, which numpy promises to
    keep, unlike `Generator.permutation`: a run resumed under another numpy continues the same stream."""
    seed = int.from_bytes(hashlib.sha256(name.encode("utf-8")).digest(), "big")  # 256 bits, `seed_of` has 63
    return np.argsort(np.random.PCG64(seed).random_raw(length), kind="stable")


def positions(start: int, rank: int, world: int) -> Iterator[int]:
    """The endless global positions of one rank: start + rank, start + rank + world, ...

    start: samples already consumed by all ranks together (0 in a new run); the only state that resuming needs.
    """
    if start < 0 or not 0 <= rank < world:
        raise ValueError(f"positions need start >= 0 and 0 <= rank < world, not {start=}, {rank=}, {world=}")
    return itertools.count(start + rank, world)


class GroupStream(torch.utils.data.Dataset):
    """The endless stream of training samples, indexed by global position:

        DataLoader(GroupStream(groups, seed), sampler=positions(start, rank, world), batch_size=None, num_workers=k)

    yields `Sample`s in order for any k (collation is the caller's). It has no length.

    seed: of the order. winner: "real", or "generated" for the baseline of `generated_winner`, for which every group
    needs two losers (ValueError naming the first that has not).
    """

    def __init__(self, groups: GroupSet, seed: int, *, winner: str = "real"):
        if winner not in ("real", "generated"):
            raise ValueError(f"winner is {winner!r}; use 'real' or 'generated'")
        self.groups, self.seed, self.winner = groups, seed, winner
        taken = 1 if winner == "generated" else 0
        self._num_losers = [groups.num_losers(index) - taken for index in range(len(groups))]
        if taken and min(self._num_losers) < 1:
            index = self._num_losers.index(min(self._num_losers))
            raise ValueError(
                f"winner 'generated' needs at least 2 losers a group, but group {groups.key(index)!r} in "
                f"{groups.folder} has {groups.num_losers(index)}; generate more losers or use winner 'real'"
            )

    def __getitem__(self, position: int) -> Sample:
        group_index, loser_index = assignment(position, self._num_losers, self.seed)
        group = self.groups[group_index]
        return Sample(position, generated_winner(group) if self.winner == "generated" else group, loser_index)

    def key(self, position: int) -> str:
        """Of the group that `position` trains on; nothing is read."""
        return self.groups.key(assignment(position, self._num_losers, self.seed)[0])


def generated_winner(group: Group) -> Group:
    """The group with its best loser (mean of both scores, the first on ties) as the winner, no longer among the losers.

    This is VideoDPO's setting: all clips come from the model. `extra` is dropped, for it describes the real winner.
    Raises ValueError if there are fewer than two losers.
    """
    if len(group.losers) < 2:
        raise ValueError(f"group {group.key!r}: a generated winner needs at least 2 losers, it has {len(group.losers)}")
    infos = group.losers_info
    best = max(range(len(infos)), key=lambda number: infos[number].semantic + infos[number].physical)
    rest = [number for number in range(len(infos)) if number != best]
    return replace(
        group,
        source=f"generated, seed {infos[best].seed}",
        winner=group.losers[best],
        losers=group.losers[rest],
        losers_info=[infos[number] for number in rest],
        extra={},
    )


def pad_text(text: Tensor, length: int) -> Tensor:
    """text (L', D) -> (length, D), zeros behind the L' tokens. Raises ValueError if L' > length."""
    if len(text) > length:
        raise ValueError(
            f"a text embedding of {len(text)} tokens does not fit into {length}; raise backbone.text_length or build "
            "the groups again with the shorter one"
        )
    return torch.nn.functional.pad(text, (0, 0, 0, length - len(text)))


# ---- one sample in bytes ---------------------------------------------------------------------------------------------


def _tensors(group: Group) -> dict[str, Tensor]:
    condition = {} if group.condition is None else {"condition": group.condition}
    extra = {f"extra.{name}": tensor for name, tensor in group.extra.items()}
    return {"winner": group.winner, "losers": group.losers, "text": group.text, **condition, **extra}


def _common(group: Group) -> Common:
    latent = {"latent_shape": list(group.winner.shape), "latent_dtype": _dtype(group.winner.dtype)}
    return {"fingerprint": group.fingerprint, **latent}


def _sample_bytes(group: Group) -> memoryview:
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
    }
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in _tensors(group).items()}
    buffer = io.BytesIO()
    with webdataset.TarWriter(buffer, mtime=0, user="", group="", encoder=False) as tar:
        members = {"json": _json_bytes(description), "safetensors": safetensors.torch.save(tensors)}
        tar.write({"__key__": group.key, **members})
        end = tar.tarstream.offset
    return buffer.getbuffer()[:end]


def _checked_group(path: Path, index: Index, sample: SampleRecord, data: bytes) -> Group:
    """The group in `data`, which shard `path` holds at `sample`. ValueError, with shard, group and remedy, if the
    checksum differs, `check_group` refuses it, or the index describes another one."""
    where = f"group {sample['key']!r} at offset {sample['offset']}"
    if files.sha256(data) != sample["sha256"]:
        raise ValueError(f"{path} is damaged: {where} does not match its checksum; {_rebuild(path)}")
    group = _parse_sample(data, name=f"{where} of {path}", remedy=_rebuild(path))
    try:
        check_group(group)
    except ValueError as error:
        raise ValueError(f"{path}: {error}; {_rebuild(path)}") from error
    found = {"key": group.key, "num_losers": len(group.losers), **_common(group)}
    listed = {**index, **sample}
    for name, value in found.items():
        if value != listed[name]:
            raise ValueError(f"{path}: {where} has {name} {value}, but {INDEX} says {listed[name]}; {_rebuild(path)}")
    return group


def _parse_sample(data: bytes, *, name: str, remedy: str) -> Group:
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
        **{tensor: tensors[tensor] for tensor in ("winner", "losers", "text")},
        condition=tensors.get("condition"),
        extra={name.removeprefix("extra."): value for name, value in tensors.items() if name.startswith("extra.")},
    )


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


def _dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _describe(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} {_dtype(tensor.dtype)}"


# ---- files -----------------------------------------------------------------------------------------------------------


def local_folder(folder: str | Path) -> Path:
    """ValueError for a URL, from which no groups are read."""
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/", str(folder)):  # a Path keeps one slash only
        raise ValueError(f"{folder} is a URL, but groups are read and written in local folders: copy them to one")
    return Path(folder)


def _read_index(folder: Path) -> tuple[Index, str]:
    """index.json and the SHA-256 of its bytes."""
    path, remedy = folder / INDEX, "run the build again"
    if not path.exists():
        raise ValueError(f"no {INDEX} in {folder}: the groups are not built or the build did not finish; run the build")
    data = _read(path, remedy)
    index = parse_json(data, CheckedIndex, name=str(path), remedy=remedy)
    return index, files.sha256(data)


def _read(path: Path, remedy: str) -> bytes:
    if not path.is_file():  # a pipe is waited for, a device has no end
        raise ValueError(f"{path} is no regular file; {remedy}")
    return path.read_bytes()


def _file_problem(folder: Path, shard: ShardRecord) -> str | None:
    path = folder / shard["file"]
    if not path.exists():
        return f"{path} is missing; {_rebuild(path)}"
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        return f"{path} is no regular file; {_rebuild(path)}"
    if status.st_size != shard["bytes"]:
        return f"{path} is {status.st_size} bytes long, not {shard['bytes']}: truncated or replaced; {_rebuild(path)}"
    return None


def _rebuild(path: Path) -> str:
    return f"delete {path.name} and {path.stem}.json and run the build again"


def _json_bytes(content: Mapping[str, Any]) -> bytes:
    return json.dumps(content, ensure_ascii=False, allow_nan=False, sort_keys=True).encode("utf-8")
