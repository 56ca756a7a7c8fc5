"""Preference groups on disk: the shard contract between `data_pipeline` and `train`.

A group is one real (winning) clip, the losing clips that the model generated for the same prompt, and what training
needs to know of them (`Group`, train/group_sample.py). Groups for supervised training have no losers. A folder holds

    <shard>.tar     the samples, byte-equal for equal groups; `webdataset.WebDataset` reads it
    <shard>.json    its marker, written after the tar: sizes, offsets and checksums. A shard with a marker is done
    index.json      all markers collected, written last: a folder without it is an unfinished build

and no other JSON or tar file. Nothing that such a folder says is taken on trust: what writing checks, reading checks
again, and a group that fails stops the run with the names of its shard and key. The folder is a local one; links to
shards that lie elsewhere are followed. The index gives random access to every sample.
"""

import hashlib
import os
import re
import stat
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, is_dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import torch

from train import files
from train.group_sample import Group, check_group, common, parse_sample, sample_bytes
from train.group_sample import Loser as Loser
from train.group_sample import dtype_name as dtype_name
from train.group_sample import tensors_of as tensors_of
from train.group_sample import told as told
from train.shard_records import (
    END,
    SCHEMA,
    CheckedIndex,
    CheckedMarker,
    Common,
    Index,
    Marker,
    SampleRecord,
    ShardRecord,
    json_bytes,
    parse_json,
)

INDEX = "index.json"
T = TypeVar("T")


# ---- writing ---------------------------------------------------------------------------------------------------------


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
        found = common(group)
        self._common = self._common or found
        for name in self._common | found:
            value, held = found.get(name), self._common.get(name)
            if value != held:
                raise ValueError(f"group {group.key!r} has {name} {value}, but {self.path} holds {held}")
        data = sample_bytes(group)
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
        files.write_bytes(marker, json_bytes(self.record))


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
        **{name: value for name, value in common.items() if value is not None},
        "video": asdict(video) if is_dataclass(video) else dict(video),
        "num_groups": len(shard_of_key),
        "total_bytes": sum(shard["bytes"] for shard in shards),
        "shards": shards,
    }
    files.write_bytes(folder / INDEX, json_bytes(index))
    return index


# ---- reading ---------------------------------------------------------------------------------------------------------


class GroupSet(torch.utils.data.Dataset):
    """Random access to the groups of a folder. It keeps no file open: forked and spawned DataLoader workers may use it.

    fingerprint: of the backbone that will train on the groups, or those that suit it; None skips that check.

    Attributes: fingerprint, network (of the backbone that made the losers, its fingerprint), video (dict), latent_shape
    (C, F, H, W), latent_dtype, total_bytes, digest (SHA-256 of index.json, which has the checksums of all groups: equal
    digests mean equal groups in the same order).

    Raises ValueError on opening for a URL, a missing or unreadable index, another schema, another fingerprint, a
    missing shard or one whose size is not the index's; on reading, with shard, key and remedy, for a group whose
    checksum is not the index's, that `check_group` refuses, or that the index describes otherwise.
    """

    def __init__(self, folder: str | Path, *, fingerprint: str | Sequence[str] | None = None):
        self.folder = local_folder(folder)
        self.index, self.digest = _read_index(self.folder)
        self.fingerprint: str = self.index["fingerprint"]
        self.network: str = self.index.get("network", self.fingerprint)
        known = [fingerprint] if isinstance(fingerprint, str) else fingerprint
        if known is not None and self.fingerprint not in known:
            raise ValueError(
                f"the groups in {self.folder} were built with backbone {self.fingerprint}, but training uses "
                f"{known[-1]}; train that backbone or build the groups again with this one"
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


def survey(
    folder: str | Path, see: Callable[[Group], T], advance: Callable[[int], Any] = lambda count: None
) -> tuple[list[T], list[str]]:
    """What `see` gives of every group that is whole, in order, and a line with the remedy for each problem.

    Checks every byte of every shard against the index, and every group as reading does. Shards are read in threads, for
    there may be terabytes. advance: told the bytes of each shard that is done.
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


def _checked_group(path: Path, index: Index, sample: SampleRecord, data: bytes) -> Group:
    """The group in `data`, which shard `path` holds at `sample`. ValueError, with shard, group and remedy, if the
    checksum differs, `check_group` refuses it, or the index describes another one."""
    where = f"group {sample['key']!r} at offset {sample['offset']}"
    if files.sha256(data) != sample["sha256"]:
        raise ValueError(f"{path} is damaged: {where} does not match its checksum; {_rebuild(path)}")
    group = parse_sample(data, name=f"{where} of {path}", remedy=_rebuild(path))
    try:
        check_group(group)
    except ValueError as error:
        raise ValueError(f"{path}: {error}; {_rebuild(path)}") from error
    found = {"key": group.key, "num_losers": len(group.losers), "network": None, **common(group)}
    listed = {"network": None, **index, **sample}
    for name, value in found.items():
        if value != listed[name]:
            raise ValueError(f"{path}: {where} has {name} {value}, but {INDEX} says {listed[name]}; {_rebuild(path)}")
    return group


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
