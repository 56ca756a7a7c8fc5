"""Files that appear whole or not at all, locks on output folders, digests, seeds, and JSON of a known shape.

Every file that a run leaves behind is written here: into a temporary file of its own beside the target, synced, then
renamed. A process killed at any moment leaves the earlier file as it was. Two processes that write the same path do
not meet in one temporary file, and no link that somebody planted is followed. `lock` keeps a second run out of an
output folder, and removes what killed ones left there.
"""

import errno
import fcntl
import hashlib
import json
import os
import re
import secrets
import shutil
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError
from typing_extensions import TypedDict

LOCK = ".lock"
TEMPORARY = re.compile(r"\..+\.[0-9a-f]{12}\.tmp")  # names that `temporary` gives
FULL = (errno.ENOSPC, errno.EDQUOT)
SETTLED = 2.0  # seconds since a file's last change; file systems' clocks tick less often than processors'
_held: set[Path] = set()  # folders that this process has locked
_digests: dict[tuple[int, ...], str] = {}  # of files, by device, inode, size and times

T = TypeVar("T")


class Holder(TypedDict):
    """What a lock file says of the process that holds it."""

    host: str
    process: int
    since: str


# ---- writing ---------------------------------------------------------------------------------------------------------


def temporary(path: Path) -> Path:
    """A name beside `path` that no other process uses."""
    return path.with_name(f".{path.name}.{secrets.token_hex(6)}.tmp")


@contextmanager
def atomic(path: str | Path) -> Iterator[Path]:
    """A temporary file beside `path`; what is written there takes its place when the block ends without an error.

    The file that appears has the mode that the user's umask gives, whatever wrote it. Folders on the way are made.
    Raises OSError (ENOSPC) with path and free bytes when the disk or quota is full, whatever library met it.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = temporary(path)
    try:
        with explain_full_disk(path):
            # Exclusive: fails on anything of that name, a link too.
            descriptor = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
            mode = os.fstat(descriptor).st_mode & 0o777
            os.close(descriptor)
            yield aside
            with aside.open("rb+") as file:
                if os.fstat(file.fileno()).st_mode & 0o777 != mode:  # safetensors replaces the file by one of 0600
                    os.fchmod(file.fileno(), mode)
                os.fsync(file.fileno())
            os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def write_bytes(path: str | Path, data: Any) -> None:
    """Write `data` (bytes or a buffer) atomically."""
    with atomic(path) as aside:
        aside.write_bytes(data)


def write_text(path: str | Path, text: str) -> None:
    """Write a UTF-8 file atomically, line ends as they are."""
    write_bytes(path, text.encode("utf-8"))


def render(template: str | Path, **values: Any) -> str:
    """A page of HTML from a jinja2 template's file. Every value is escaped; one that is missing is an error."""
    import jinja2  # here, for most that write files write no page

    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.from_string(Path(template).read_text(encoding="utf-8")).render(**values)


@contextmanager
def explain_full_disk(path: Path) -> Iterator[None]:
    """Say of a full disk which file could not be written and what is free; other errors pass."""
    try:
        yield
    except Exception as error:  # safetensors and PyAV have types of their own
        if getattr(error, "errno", None) not in FULL and "No space left on device" not in str(error):
            raise
        free = shutil.disk_usage(path.parent).free
        message = f"the disk or quota is full: {path} could not be written whole, {free} bytes are free. Make room"
        raise OSError(errno.ENOSPC, f"{message} and run the same command again") from error


# ---- locks -----------------------------------------------------------------------------------------------------------


@contextmanager
def lock(folder: str | Path, *, task: str = "") -> Iterator[None]:
    """Hold `folder` for this process: of two runs in one folder the second is refused. Call on the main process.

    task: a name for one of several processes that share the folder on purpose; equal names exclude each other, and
    any task excludes a run without one. The system releases a lock when its process ends, however it ends; children
    do not inherit it. A process that holds a folder may take it again, to no effect. Without a task, what killed
    processes left below the folder under temporary names is removed, but for folders below that have a lock of their
    own: another run may be writing there.

    Raises ValueError naming host and process of the holder, and since when. On a file system without locks it warns
    and goes on.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    name = folder.resolve()
    if name in _held:  # closing a second descriptor of its file would give the lock away
        yield
        return
    held = [_acquire(folder, LOCK, shared=bool(task))]
    _held.add(name)
    try:
        if task:
            with suppress(PermissionError):
                os.truncate(folder / LOCK, 0)  # the name of a run before, not of these tasks
            held.append(_acquire(folder, f"{LOCK}-{task}", shared=False))
        else:
            _remove_temporary(folder)
        yield
    finally:
        _held.discard(name)
        for descriptor in held:
            os.close(descriptor)


def _remove_temporary(folder: Path) -> None:
    for parent, folders, names in os.walk(folder):
        if Path(parent) != folder and LOCK in names:
            folders.clear()
            continue
        left = [name for name in (*folders, *names) if TEMPORARY.fullmatch(name)]
        folders[:] = [name for name in folders if name not in left]
        for path in (Path(parent, name) for name in left):
            if path.is_dir() and not path.is_symlink():  # of a checkpoint, or of a network's files
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)


def _acquire(folder: Path, name: str, *, shared: bool) -> int:
    path = folder / name
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
    except PermissionError:  # another user's, of a run before: a shared lock keeps others out as well
        descriptor, shared = os.open(path, os.O_RDONLY | os.O_NOFOLLOW), True
    try:
        fcntl.lockf(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EAGAIN):
            print(f"warning: {folder} cannot be locked ({error.strerror}): start no second run there", flush=True)
            return descriptor
        holder = os.pread(descriptor, 1000, 0)
        os.close(descriptor)
        raise ValueError(
            f"{folder} is in use by {_described(holder)}: wait for it, stop it, or choose another output folder"
        ) from None
    if not shared:
        now = datetime.now().astimezone().isoformat(sep=" ", timespec="seconds")
        content: Holder = {"host": socket.gethostname(), "process": os.getpid(), "since": now}
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(content).encode("utf-8"), 0)
    return descriptor


def _described(holder: bytes) -> str:
    try:
        found = _adapter(Holder).validate_json(holder)
    except ValidationError:  # tasks that share a folder leave no name there
        return "another run"
    return f"process {found['process']} on {found['host']} since {found['since']}"


# ---- reading ---------------------------------------------------------------------------------------------------------


def seed_of(*parts: Any) -> int:
    """A 63-bit seed from a hash of `parts`' texts: the same on every machine, whatever was drawn before."""
    name = "\0".join(map(str, parts)).encode("utf-8")
    return int.from_bytes(hashlib.sha256(name).digest()[:8], "big") >> 1


def sha256(content: str | Path | bytes | memoryview) -> str:
    """In hexadecimal, of the file at a path, or of bytes in hand.

    A process reads a file once: its digest is remembered until size, inode or times change, unless these are so young
    that another change might not show in them.
    """
    if not isinstance(content, str | Path):
        return hashlib.sha256(content).hexdigest()
    with Path(content).open("rb") as file:
        state = os.fstat(file.fileno())
        name = state.st_dev, state.st_ino, state.st_size, state.st_mtime_ns, state.st_ctime_ns
        if name in _digests:
            return _digests[name]
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if time.time() - state.st_ctime > SETTLED:
        _digests[name] = found
    return found


def digest(content: Any) -> str:
    """SHA-256 of a value that JSON can hold."""
    return sha256(json.dumps(content, sort_keys=True).encode("utf-8"))


def read_json(path: str | Path, kind: type[T], *, remedy: str) -> T:
    """The JSON value in a file, as a `kind`: a dataclass, TypedDict, or what else pydantic reads.

    Types are strict ("1" is no number); keys of a TypedDict that it does not name are left out. Raises ValueError with
    path, place, problem and `remedy` ("delete it and run the build again") for a file that is missing, is no JSON, or
    holds something else.
    """
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}); {remedy}") from error
    return parse_json(data, kind, name=str(path), remedy=remedy)


def parse_json(data: bytes | str, kind: type[T], *, name: str, remedy: str) -> T:
    """`read_json` of bytes in hand; `name` says in messages where they are from."""
    try:
        return _adapter(kind).validate_json(data, strict=True)
    except ValidationError as error:
        problems = error.errors(include_url=False, include_input=False)
        place = ".".join(map(str, problems[0]["loc"]))
        more = f" and {len(problems) - 1} more" if len(problems) > 1 else ""
        problem = problems[0]["msg"].removeprefix("Value error, ")
        raise ValueError(f"{name} is damaged ({f'{place}: ' if place else ''}{problem}{more}); {remedy}") from None


@cache
def _adapter(kind: Any) -> TypeAdapter:
    return TypeAdapter(kind)
