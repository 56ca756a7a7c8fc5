"""Answers on disk, by the digest of the question: nothing is asked twice.

    <folder>/answers-<random>.jsonl      {"digest": ..., "text": ..., "first_token": [...], "check": ...} per line

Each process appends to a file of its own, an answer in one write. So writers do not meet, on one machine or on several
that share a file system without locks; one that is killed loses at most the line it was writing, which readers pass
over. A process sees what was there when it started and what it adds itself. The files can be joined, moved and deleted
by hand. `check` is the digest of the rest: an answer that has changed since counts as absent. Lines of earlier versions
have none, and are taken as they are.
"""

import json
import os
import uuid
from collections.abc import Sequence
from pathlib import Path

from eval.vlm.backend import Reply
from train.files import digest as digest_of

OPENING = b'{"digest": "'
DIGEST = slice(len(OPENING), len(OPENING) + 64)
Place = tuple[Path, int, int]  # file, offset, bytes


class Cache:
    """What `folder` holds; it is made where missing. A damaged line counts as absent."""

    def __init__(self, folder: Path):
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"vlm.cache={folder} cannot be made ({error.strerror}); name another folder") from error
        self.folder = folder
        self._places: dict[bytes, Place] = {}
        # The newest last: where a question was asked again, because its answer no longer passed, that one counts.
        for path in sorted(folder.glob("answers-*.jsonl"), key=lambda path: (path.stat().st_mtime_ns, path.name)):
            offset = 0
            with path.open("rb") as file:
                for line in file:
                    if line.startswith(OPENING) and line.endswith(b"}\n"):
                        self._places[line[DIGEST]] = (path, offset, len(line))
                    offset += len(line)
        self._path = folder / f"answers-{uuid.uuid4().hex}.jsonl"
        self._file = None
        self._size = 0

    def __len__(self) -> int:
        return len(self._places)

    def get(self, digest: str) -> Reply | None:
        place = self._places.get(digest.encode("ascii"))
        if place is None:
            return None
        path, offset, size = place
        try:
            with path.open("rb", buffering=0) as file:
                file.seek(offset)
                found = json.loads(file.read(size))
            checked = found.keys() != {"digest", "text", "first_token"}
            wrong = checked and found["check"] != _check(digest, found["text"], found["first_token"])
            if wrong or found["digest"] != digest:
                return None
            return Reply(str(found["text"]), tuple((str(token), float(value)) for token, value in found["first_token"]))
        except (OSError, ValueError, TypeError, KeyError, RecursionError):
            return None

    def put(self, digest: str, reply: Reply) -> None:
        """Raises OSError where the disk does not take it."""
        if self._file is None:
            self._file = self._path.open("xb", buffering=0)
        entry = {"digest": digest, "text": reply.text, "first_token": reply.first_token}
        entry["check"] = _check(digest, reply.text, reply.first_token)
        line = json.dumps(entry).encode("ascii") + b"\n"
        if self._file.write(line) != len(line):
            raise OSError(f"{self._path}: the disk took part of an answer only")
        self._places[digest.encode("ascii")] = (self._path, self._size, len(line))
        self._size += len(line)

    def sync(self) -> None:
        """Make what was put survive a crash of the machine; a killed process loses nothing anyway."""
        if self._file is not None:
            os.fsync(self._file.fileno())


def _check(digest: str, text: str, first_token: Sequence[tuple[str, float]]) -> str:
    return digest_of([digest, text, first_token])
