"""Units of work: which rows make a shard, whether it is done, and what of older shards can be used again.

A unit is a run of manifest rows and becomes one shard. Beside the shard's own marker it has a record,
build/<name>.json, with two kinds of digest: one of all that the shard shows (the unit is done while it is unchanged),
and for each group one of what its tensors depend on (not the scores, not the place in the manifest).

A shard that does not fit any more is not deleted but moved to retired/<name>-<checksum>, a group set of its own, from
which new shards take the groups whose digest is still asked for. It is deleted when nothing is left to take.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from data_pipeline.sources import Quarantined, Row
from train.groups import GroupSet, shard_record, write_index

IDENTITY_BYTES = 1 << 14  # at a clip's begin and end, that tell whether the file is the same


@dataclass(frozen=True)
class Task:
    row: Row
    scores: list[tuple[float, float] | None]  # (semantic, physical) of each loser, None for the judge to find
    digest: str  # of what the group's tensors depend on


@dataclass(frozen=True)
class Unit:
    name: str  # of the shard
    tasks: list[Task]
    quarantined: list[Quarantined]  # rows that the manifest's check refused
    digest: str  # of all of this, and the state of the clips


def split(
    rows: list[Row | Quarantined],
    scores: Mapping[str, list[tuple[float, float] | None]],
    *,
    unit_size: int,
    settings: Mapping[str, Any],
    judge: str,
) -> list[Unit]:
    """The units of a manifest, in order. scores: by key. settings: plain values that the groups' tensors depend on.
    judge: what scores the losers without scores."""
    units = []
    for first in range(0, len(rows), unit_size):
        members = rows[first : first + unit_size]
        tasks = []
        for row in members:
            if isinstance(row, Row):
                identity = [settings, row.key, row.prompt, row.start, _clip_identity(row.path)]
                tasks.append(Task(row, scores[row.key], _digest(identity)))
        bad = [row for row in members if isinstance(row, Quarantined)]
        shown = [
            [t.digest, t.row.clip, t.row.action, t.row.physics_richness, t.row.number, t.scores] for t in tasks
        ] + [asdict(row) for row in bad]
        if any(score is None for task in tasks for score in task.scores):
            shown.append(judge)
        units.append(Unit(f"unit-{len(units):05d}", tasks, bad, _digest(shown)))
    return units


def _clip_identity(path: Path) -> str | None:
    """Digest of a file's size, begin and end, None where there is none: a clip may move, and may be replaced."""
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            begin = file.read(IDENTITY_BYTES)
            file.seek(max(0, size - IDENTITY_BYTES))
            return hashlib.sha256(b"%d %b %b" % (size, begin, file.read(IDENTITY_BYTES))).hexdigest()
    except (OSError, ValueError):  # ValueError: a zero byte in the name
        return None


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode("utf-8")).hexdigest()


def write_record(groups: Path, unit: Unit, digests: Mapping[str, str], quarantined: list[Quarantined]) -> None:
    """Write a unit's record, before the shard's marker. digests: of the groups by key, in the shard's order."""
    record = {
        "digest": unit.digest,
        "groups": list(digests.items()),
        "quarantined": [asdict(row) for row in quarantined],
    }
    write_text(_record_path(groups, unit.name), json.dumps(record, ensure_ascii=False))


def read_record(groups: Path, name: str) -> dict[str, Any] | None:
    """The record of a unit, None where it is missing or damaged."""
    try:
        return json.loads(_record_path(groups, name).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def is_finished(groups: Path, unit: Unit) -> bool:
    """Whether the unit's shard is complete and shows what the unit asks for."""
    record = read_record(groups, unit.name)
    return record is not None and record["digest"] == unit.digest and shard_record(groups, unit.name) is not None


def retire(groups: Path, keep: Collection[str]) -> list[str]:
    """Move every unit's shard but those in `keep` out of the way; returns the names of those that hold groups."""
    files = [*groups.glob("unit-*.tar"), *groups.glob("unit-*.json"), *groups.glob("build/unit-*.json")]
    names = {path.stem for path in files if re.fullmatch(r"unit-\d{5,}", path.stem)} - set(keep)
    moved = []
    for name in sorted(names):
        marker = shard_record(groups, name)
        places = [groups / f"{name}.tar", groups / f"{name}.json", _record_path(groups, name)]
        if marker is None or not marker["samples"] or read_record(groups, name) is None:
            for path in places:
                path.unlink(missing_ok=True)
            continue
        folder = groups / "retired" / f"{name}-{marker['sha256'][:12]}"
        for path in places:
            target = folder / path.relative_to(groups)
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(path, target)
        write_index(folder, fingerprint=marker["fingerprint"], video={})
        moved.append(name)
    return moved


def retired_groups(groups: Path) -> dict[str, tuple[GroupSet, int]]:
    """Where the tensors of each digest lie in retired shards: (group set, index)."""
    found: dict[str, tuple[GroupSet, int]] = {}
    for folder, digests in _retired(groups):
        try:
            group_set = GroupSet(folder)
        except ValueError as error:
            print(f"warning: nothing is used again from {folder}: {error}")
            continue
        found |= {digest: (group_set, index) for index, digest in enumerate(digests)}
    return found


def discard_retired(groups: Path, wanted: Collection[str]) -> list[Path]:
    """Delete the retired shards that hold only `wanted` digests, which are in new shards now; returns the others."""
    kept = []
    for folder, digests in _retired(groups):
        if set(digests) <= set(wanted):
            shutil.rmtree(folder)
        else:
            kept.append(folder)
    return kept


def _retired(groups: Path) -> list[tuple[Path, list[str]]]:
    """(folder, digests of its groups in order) of every retired shard."""
    folders = sorted(groups.glob("retired/unit-*"))
    records = [read_record(folder, folder.name.rpartition("-")[0]) for folder in folders]
    return [
        (folder, [digest for _, digest in record["groups"]])
        for folder, record in zip(folders, records, strict=True)
        if record
    ]


def _record_path(groups: Path, name: str) -> Path:
    return groups / "build" / f"{name}.json"


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 file atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("w", encoding="utf-8", newline="") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
