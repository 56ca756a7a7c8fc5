"""The frames of rows, and what tells their clips from others. A row is a record of the pool's table (POOL) or a later
one.

Frames come from files, members of shards, or a simulator. A stage that needs pixels decodes a clip once; one that
needs its first frame decodes that alone, and one that needs none only looks whether the container holds the clip.
"""

import errno
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data_pipeline.tables import TableRow
from eval.robots import recordings, simulators
from eval.robots.demonstrations import Demonstration, Listed, list_demonstrations
from eval.sandbox.clips import Clips
from eval.sandbox.splits import simulate_block
from train.clips import ClipError, VideoConfig, check_clip, read_clip, read_first_frames
from train.files import digest, explain_full_disk, sha256

SIMULATED = ("sandbox", "robots")  # sources without files
AHEAD = 4  # robots' clips that may be made while the asked one is
IDENTITY_BYTES = 1 << 14  # at a clip's begin and end, that tell whether the file is the same
COPY_BYTES = 1 << 22  # of a shard's member at a time
MACHINE = (errno.ENOSPC, errno.EDQUOT, errno.EMFILE, errno.ENFILE, errno.ENOMEM)  # errors that no clip is to blame for


def clip_identity(row: TableRow) -> str:
    """What tells a clip from another at the same place, empty where there is none: a clip may move or be replaced."""
    place = json.loads(row["place"])
    if row["source"] == "sandbox":
        del place["row"]
        return digest(place)
    if row["source"] == "robots":
        return digest(row["clip"])
    try:
        return file_identity(Path(row["path"]), place.get("offset", 0), place.get("size"))
    except (OSError, ValueError):  # ValueError: a zero byte in the name
        return ""


def file_identity(path: Path, offset: int = 0, size: int | None = None) -> str:
    """Digest of a file's size, begin and end, or of those of a part of it."""
    if not path.is_file():  # opening a pipe would wait
        raise FileNotFoundError(path)
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size if size is None else size
        file.seek(offset)
        begin = file.read(min(IDENTITY_BYTES, size))
        file.seek(offset + max(0, size - IDENTITY_BYTES))
        return sha256(b"%d %b %b" % (size, begin, file.read(min(IDENTITY_BYTES, size))))


class FrameReader:
    """Reads the clips of rows at the size and rate of `video`. The last simulated block is kept, for rows follow it.

    device: where simulated clips are drawn. recorded: folder of robots' demonstrations that need not be simulated again
    where they are in it (`eval.robots.recordings`). All methods raise ClipError where the clip cannot be used, and
    OSError where it is the machine that fails: a full disk must not cost rows.
    """

    def __init__(self, video: VideoConfig, device: torch.device | str, recorded: Path | None = None):
        self.video, self.device, self.recorded = video, device, recorded
        self._block: tuple[object, Clips | None] = (None, None)

    def read(self, row: TableRow) -> Tensor:
        """All frames: (T, H, W, 3) uint8."""
        if row["source"] == "sandbox":
            clips, index = self.simulated(row)
            return clips.frames[index]
        if row["source"] == "robots":
            return torch.from_numpy(self._robot_frames(row))
        return self._from_file(row, read_clip)

    def read_first(self, row: TableRow, count: int = 1) -> Tensor:
        """The first frames of `read`: (count, H, W, 3) uint8."""
        if row["source"] == "robots":
            drawn = "first" if count == 1 else "frames"
            return torch.from_numpy(self.demonstration(row, drawn=drawn).frames[:count])
        if row["source"] == "sandbox":
            return self.read(row)[:count]
        return self._from_file(row, partial(read_first_frames, count=count))

    def check(self, row: TableRow) -> None:
        """See that the file holds the clip, without decoding it."""
        if row["source"] not in SIMULATED:
            self._from_file(row, check_clip)

    def simulated(self, row: TableRow) -> tuple[Clips, int]:
        """A simulated row's block with the truth behind the pixels, and the row's index in it."""
        place = json.loads(row["place"])
        name = (place["scene"], place["split"], place["seed"], place["block"])
        block = self._block  # threads may share the reader
        if block[0] != name:
            block = self._block = name, simulate_block(*name, self.video, device=self.device)
        return block[1], place["index"]

    def demonstration(self, row: TableRow, *, drawn: str = "frames") -> Demonstration:
        """A robot's clip, see `eval.robots.demonstrations.demonstrate`. Those that follow it in its source are begun
        meanwhile."""
        first, *then = self._listed(row, AHEAD)
        try:
            return simulators.shared().get(first, self.video, drawn=drawn, then=then)
        except simulators.SimulatorError as error:
            raise ClipError(Path(row["clip"]), "simulator failed", str(error)) from error

    def _robot_frames(self, row: TableRow) -> np.ndarray:
        """(T, H, W, 3) uint8."""
        if self.recorded and (found := recordings.read(self.recorded, *self._listed(row, 1), self.video)):
            return found[0]
        return self.demonstration(row).frames

    def _listed(self, row: TableRow, count: int) -> list[Listed]:
        """A robot's clip and those that follow it in its source."""
        place = json.loads(row["place"])
        numbers = range(place["number"], place["number"] + count)
        return list_demonstrations(place["tasks"], place["split"], place["seed"], numbers)

    def _from_file(self, row: TableRow, read: Callable[..., Any]) -> Any:
        try:
            if row["source"] != "webdataset":
                return read(row["path"], self.video, start=row["start"])
            with _member(row) as copy:
                try:
                    return read(copy, self.video, start=row["start"])
                except ClipError as error:
                    detail = str(error).removeprefix(f"{copy}: {error.reason}: ")
                    raise ClipError(Path(row["clip"]), error.reason, detail) from error
        except OSError as error:  # a name that is too long, a file that may not be read
            if error.errno in MACHINE:
                raise
            raise ClipError(Path(row["clip"]), "missing", error.strerror or str(error)) from error


@contextmanager
def _member(row: TableRow) -> Iterator[Path]:
    """A copy of a shard's member, found by its offset."""
    place = json.loads(row["place"])
    with open(row["path"], "rb") as shard, tempfile.TemporaryDirectory(prefix="clip-") as folder:
        if place["offset"] + place["size"] > os.fstat(shard.fileno()).st_size:
            raise ClipError(Path(row["clip"]), "truncated", "the shard ends before this member does")
        shard.seek(place["offset"])
        copy, left = Path(folder) / "clip", place["size"]
        with explain_full_disk(copy), copy.open("wb") as file:
            while left and (data := shard.read(min(left, COPY_BYTES))):
                file.write(data)
                left -= len(data)
        yield copy
