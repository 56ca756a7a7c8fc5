"""Mends what a process that was killed while it compiled leaves in the caches of torch's compilers.

A C++ extension is built under a file `lock` that its builder keeps open; torch waits for such a file for ever. Inductor
passes over a library or a precompiled header that exists, whole or not. Whatever of these no process has open, and is
the same two seconds later, was abandoned: it is deleted, and made anew by whoever needs it.
"""

import fcntl
import os
import socket
import struct
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import psutil
import torch
from torch._inductor.runtime.cache_dir_utils import cache_dir

LOOK_AGAIN = 2.0  # seconds; whoever closes a file renames or removes it in less


def heal() -> None:
    """Delete abandoned locks of extensions and unfinished files of inductor, and name them on stderr. Call it before
    anything is compiled.

    Extensions get a folder for each host, for no host sees another's processes, and they are built for its processor.
    What cannot be deleted stays: it may be another user's.
    """
    from torch.utils.cpp_extension import get_default_build_root  # imports setuptools

    python, host = ".".join(map(str, sys.version_info[:2])), socket.gethostname()
    name = f"{host}-python{python}-torch{torch.__version__}"
    extensions = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())
    if extensions.name != name:  # else inherited
        extensions /= name
        os.environ["TORCH_EXTENSIONS_DIR"] = str(extensions)
    with _one_at_a_time(extensions):
        for path in _abandoned(extensions, Path(cache_dir())):
            try:
                path.unlink(missing_ok=True)
            except OSError as error:
                print(f"warning: {path} is unfinished and cannot be deleted ({error.strerror})", file=sys.stderr)
            else:
                print(f"deleted {path}, which a killed compilation left", file=sys.stderr)


@contextmanager
def _one_at_a_time(folder: Path) -> Iterator[None]:
    """Wait for other processes here; not where the folder cannot be written, or its file system has no locks."""
    with ExitStack() as held:
        with suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            fcntl.flock(held.enter_context((folder / ".healing").open("w")), fcntl.LOCK_EX)
        yield


def _abandoned(extensions: Path, inductor: Path) -> list[Path]:
    before = _suspects(extensions, inductor)
    if not before:
        return []
    time.sleep(LOOK_AGAIN)
    now = _suspects(extensions, inductor)
    same = [path for path, state in now.items() if before.get(path) == state]
    held = _open_files() if same else set()
    return [path for path in same if now[path][:2] not in held]


def _suspects(extensions: Path, inductor: Path) -> dict[Path, tuple[int, ...]]:
    """(device, inode, size, time) of every lock and every unfinished file."""
    found = {}
    kinds = {".so": _is_whole_library, ".gch": lambda file: file.read(4) == b"gpch"}  # gcc writes its mark last
    candidates = [*extensions.glob("*/lock"), *(file for kind in kinds for file in inductor.rglob(f"*{kind}"))]
    for path in candidates:
        try:
            with path.open("rb") as file:
                if path.suffix not in kinds or not kinds[path.suffix](file):
                    state = os.fstat(file.fileno())
                    found[path] = (state.st_dev, state.st_ino, state.st_size, state.st_mtime_ns)
        except OSError:  # removed meanwhile, or another user's
            continue
    return found


def _is_whole_library(file) -> bool:
    """Whether a library is as long as its header says: a linker writes the table of sections last."""
    header = file.read(64)
    if sys.platform != "linux":
        return bool(header)
    if len(header) < 64 or header[:4] != b"\x7fELF":
        return False
    (table,) = struct.unpack_from("=Q", header, 40)
    size, count = struct.unpack_from("=HH", header, 58)
    return os.fstat(file.fileno()).st_size >= table + size * count


def _open_files() -> set[tuple[int, int]]:
    """(device, inode) of every file that a process on this host has open, as far as this user may see."""
    found = set()
    for process in psutil.process_iter(["open_files"]):
        for entry in process.info["open_files"] or ():  # None of another user's process
            with suppress(OSError):
                state = os.stat(entry.path)
                found.add((state.st_dev, state.st_ino))
    return found
