"""Where clips come from.

`pipeline.manifest` names a source, several joined with commas, or a list of them:

    clips.csv, .jsonl, .parquet     a manifest, see manifests.py
    folder/                         clips with a caption beside each: name.mp4 with name.txt, or name.json with `prompt`
                                    (or `caption`) and the optional columns of a manifest
    shards/*.tar, {000..127}.tar    webdataset shards of clips: members <key>.mp4 and <key>.txt or .json next to each
                                    other; the clips stay in the shard and are read from there. A key is a member's name
                                    up to its last dot: webdataset's own ends at the first one, and 0.5.mp4 has two
    sandbox:<scene>:<count>[:<split>]    clips that are simulated when they are needed, see eval/sandbox/splits.py
    robots:<task>[,<task>...]:<count>[:<split>]    demonstrations of a robot, see eval/robots/README.md

Every file and member whose name ends like a video's (VIDEOS) becomes a row or is listed with its name and the reason.

What is read is hostile: no name out of a caption, a manifest or a shard becomes part of a path that is written, and a
member of a shard is found by its offset.
"""

import glob
import hashlib
import json
import os
import re
import tarfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from braceexpand import UnbalancedBracesError, braceexpand

from data_pipeline.frames import file_identity
from data_pipeline.manifests import Row, checked, read_manifest
from data_pipeline.tables import Dropped
from eval.records import BadRow, Record, not_local, printable
from eval.robots import world
from eval.robots.demonstrations import SPLITS as STREAMS
from eval.robots.demonstrations import check_video, list_demonstrations
from eval.robots.tasks import TASKS
from eval.sandbox.clips import SCENES
from eval.sandbox.splits import SPLITS, list_clips
from recipes import redacted
from train.clips import VideoConfig
from train.files import sha256

VIDEOS = (  # suffixes of a clip; those that PyAV does not read after all are listed as such
    *(".mp4", ".m4v", ".mov", ".qt", ".mkv", ".mk3d", ".webm", ".avi", ".divx", ".gif", ".apng", ".wmv", ".asf"),
    *(".mpg", ".mpeg", ".mpe", ".m1v", ".m2v", ".vob", ".ts", ".mts", ".m2ts", ".m2t", ".3gp", ".3g2", ".flv", ".f4v"),
    *(".ogv", ".ogm", ".mxf", ".dv", ".mj2", ".nut", ".y4m", ".rm", ".rmvb", ".wtv", ".amv", ".swf", ".ismv"),
    *(".h264", ".264", ".h265", ".265", ".hevc", ".ivf", ".obu", ".av1", ".mjpeg", ".mjpg"),
)
CAPTIONS = (".txt", ".json")
SEPARATOR = re.compile(r",(?![^{]*\})(?![a-z,-]+:\d)")  # of sources; not of names in braces, nor of a robot's tasks
SYSTEM_FOLDERS = ("@eaDir", "__MACOSX")  # of a NAS, and of archives made on a Mac: no clips of the user's
SIDECAR_BYTES = 1 << 20  # of a caption file that are read


@dataclass(frozen=True)
class Source:
    identity: Callable[[], Any]  # JSON value that changes when the rows may have changed
    rows: Callable[[], Iterator[Row | Dropped]]


def open_sources(manifest: Any, *, num_losers: int, video: VideoConfig, seed: int) -> list[Source]:
    """The sources that `pipeline.manifest` names. Raises ValueError for one that does not exist or cannot be read."""
    if isinstance(manifest, str):
        # A file's name may hold a comma, and so may braces.
        whole = [manifest] if os.path.exists(manifest) else SEPARATOR.split(manifest)
    else:
        whole = [str(name) for name in manifest or []]
    names = [name.strip() for name in whole if name.strip()]
    if not names:
        raise ValueError(
            "pipeline.manifest is empty: give a .csv, .jsonl or .parquet with the columns clip and prompt, a folder of"
            " clips with captions, *.tar shards, sandbox:<scene>:<count> or robots:<task>:<count>"
        )
    return [source for name in names for source in _open(name, num_losers, video, seed)]


def _open(name: str, num_losers: int, video: VideoConfig, seed: int) -> list[Source]:
    if name.startswith(("sandbox:", "robots:")):
        return [_open_simulator(name, video, seed)]
    if why := not_local(name):
        raise ValueError(redacted(f"pipeline.manifest={name} {why}"))
    sources = []
    for path in _find(name):
        if path.is_dir():
            identity, rows = _folder_identity, partial(_folder, path)
        elif path.suffix.lower() == ".tar":
            identity, rows = file_identity, partial(_shard, path)
        elif path.suffix.lower() in VIDEOS:
            remedy = f"give its folder, with the prompt in {path.with_suffix('.txt').name}, or a CSV that names it"
            raise ValueError(f"pipeline.manifest={path} is a single clip: {remedy}")
        else:
            identity, rows = sha256, partial(read_manifest, path, num_losers=num_losers)
        sources.append(Source(partial(_located, path, identity), rows))
    return sources


def _find(name: str) -> list[Path]:
    """The files or folders that a source's name stands for; those of {000..127} and * in order."""
    expanded = os.path.expanduser(name)
    if os.path.exists(expanded):
        return [Path(expanded)]
    try:
        names = list(braceexpand(expanded)) if "{" in name else [expanded]
    except UnbalancedBracesError as error:
        raise ValueError(f"pipeline.manifest={name}: {error}: close the braces") from error
    found = []
    for part in names:
        matches = sorted(glob.glob(part, recursive=True)) if glob.has_magic(part) else [part]
        if not matches or not os.path.exists(matches[0]):
            of = f" ({part})" if len(names) > 1 else ""
            raise ValueError(f"pipeline.manifest={name}: no such file{of}; give one with the columns clip and prompt")
        found += map(Path, matches)
    return found


def _located(path: Path, identity: Callable[[Path], Any]) -> Any:
    return [str(path.absolute()), identity(path)]  # clips are relative to the place


# ---- kinds of sources ------------------------------------------------------------------------------------------------


def _open_simulator(name: str, video: VideoConfig, seed: int) -> Source:
    """ValueError for clips that the simulator does not make."""
    kind, _, wanted = name.partition(":")
    asked, count, split = (*wanted.split(":"), "train")[:3] if ":" in wanted else ("", "", "")
    if kind == "sandbox":
        known, rows = asked in ("mixed", *SCENES), lambda: _simulated(asked, int(count), split, seed, video)
        form = "sandbox:<scene>:<count>[:<split>] with a scene out of mixed, "
        form += f"{', '.join(SCENES)} and a split out of {', '.join(SPLITS)}"
    else:
        tasks = list(TASKS) if asked == "mixed" else list(dict.fromkeys(asked.split(",")))
        known, rows = set(tasks) <= TASKS.keys(), lambda: _demonstrated(tasks, int(count), split, seed)
        known &= split in STREAMS
        form = "robots:<task>[,<task>...]:<count>[:<split>] with tasks out of "
        form += f"{', '.join(TASKS)}, or mixed for all, and a split out of {', '.join(STREAMS)}"
    if not known or not count.isdecimal() or int(count) < 1 or name.count(":") > 3:
        raise ValueError(f"pipeline.manifest={name}: use {form}")
    if kind == "robots":
        check_video(video)
        world.load()
    size = [video.height, video.width, video.num_frames, video.fps]
    return Source(lambda: [name, size, seed], rows)


def _simulated(scene: str, count: int, split: str, seed: int, video: VideoConfig) -> Iterator[Row]:
    """Keys like projectile-000123; the action is the scene."""
    for number, clip in enumerate(list_clips(scene, split, seed, count, video)):
        name = f"sandbox:{scene}:{split}:{clip.block}:{clip.index}"
        place = {"scene": scene, "split": split, "seed": seed, "block": clip.block, "index": clip.index}
        yield _made(f"{clip.shown}-{number:06d}", name, clip.prompt, clip.shown, {**place, "row": number + 1})


def _made(key: str, name: str, prompt: str, action: str, place: dict[str, Any]) -> Row:
    """A clip that a simulator makes, whose name begins with its source's."""
    return Row(
        key=key,
        clip=name,
        path=name,
        prompt=prompt,
        start=0.0,
        action=action,
        physics_richness=None,
        scores=None,
        source=name.partition(":")[0],
        place=json.dumps(place),
    )


def _demonstrated(tasks: list[str], count: int, split: str, seed: int) -> Iterator[Row]:
    """Keys like drawer-open-000123; the action is the task."""
    for number, listed in enumerate(list_demonstrations(tasks, split, seed, range(count))):
        place = {"tasks": tasks, "split": split, "seed": seed, "number": number, "row": number + 1}
        yield _made(f"{listed.task}-{number:06d}", listed.name, listed.prompt, listed.task, place)


def _folder_files(folder: Path) -> Iterator[tuple[Path, BadRow | None]]:
    """All files below `folder` in a fixed order, links to folders, which are not followed, and at the end folders that
    cannot be read, such as a disk's lost+found; why one is no clip. Raises ValueError where `folder` itself is one."""
    closed: list[OSError] = []
    for parent, folders, files in os.walk(folder, onerror=closed.append):
        folders.sort()
        for path in (Path(parent, name) for name in folders):
            if path.is_symlink():
                remedy = "a link to a folder is not followed: name that folder in pipeline.manifest as well"
                yield path, BadRow("not supported", remedy, str(path.relative_to(folder)))
        for path in (Path(parent, name) for name in sorted(files, key=_clips_order)):
            yield path, _hidden(str(path.relative_to(folder)))
    for error in closed:
        path = Path(error.filename)
        if path == folder:
            raise ValueError(f"pipeline.manifest={folder} cannot be read ({error.strerror})") from error
        remedy = f"this folder cannot be read ({error.strerror}): let yourself read it if clips are in it"
        yield path, BadRow("unreadable", remedy, str(path.relative_to(folder)))


def _clips_order(name: str) -> tuple[str, int, str]:
    """By name; of one name, with which they share caption and key, an .mp4 comes before the .gif made of it."""
    stem, _, suffix = name.rpartition(".")
    suffix = f".{suffix.lower()}"
    return stem, VIDEOS.index(suffix) if suffix in VIDEOS else -1, name


def _hidden(name: str) -> BadRow | None:
    """What keeps a name from being a clip's that systems leave beside clips."""
    for part in name.split("/"):
        if part.startswith(".") and part not in (".", "..") or part in SYSTEM_FOLDERS:
            what = f"names that begin with a dot, and what lies in {' and '.join(SYSTEM_FOLDERS)}, are skipped"
            return BadRow("hidden", f"{what}: rename it if it is a clip", name)
    return None


def _folder_identity(folder: Path) -> Any:
    listing = hashlib.sha256()
    for path, _ in _folder_files(folder):
        if path.suffix.lower() in (*VIDEOS, *CAPTIONS) or path.is_dir():
            state = path.lstat()
            listing.update(os.fsencode(path.relative_to(folder)) + b"\0%d %d\0" % (state.st_size, state.st_mtime_ns))
    return listing.hexdigest()


def _folder(folder: Path) -> Iterator[Row | Dropped]:
    number = 0
    for path, bad in _folder_files(folder):
        if path.suffix.lower() not in VIDEOS and not path.is_dir():
            continue
        number += 1
        name = path.relative_to(folder)
        record = bad or _captioned(str(name), str(name.with_suffix("")), partial(_sidecar, path))
        place = {"folder": printable(folder), "row": number}
        yield checked(record, folder.absolute(), 0, "folder", place)
    if not number:
        tars = any(folder.glob("*.tar"))
        remedy = f"give {folder}/*.tar for its shards" if tars else f"clips end in {', '.join(VIDEOS)}"
        raise ValueError(f"pipeline.manifest={folder}: no clip in this folder; {remedy}")


def _sidecar(path: Path, suffix: str) -> bytes | None:
    caption = path.with_suffix(suffix)
    if not caption.is_file():
        return None
    with caption.open("rb") as file:
        return file.read(SIDECAR_BYTES + 1)


def _captioned(clip: str, key: str, read: Callable[[str], bytes | None]) -> Record:
    """A clip with what is written beside it, as a manifest's row. read: the caption file's bytes by suffix."""
    record: dict[str, Any] = {}
    try:
        for suffix in CAPTIONS:
            data = read(suffix)
            if data is None:
                continue
            if len(data) > SIDECAR_BYTES:
                return BadRow("too long", f"the caption's {suffix} file has more than {SIDECAR_BYTES} bytes", clip)
            text = data.decode("utf-8-sig")
            if suffix == ".txt":
                record["prompt"] = text
            else:
                found = json.loads(text)
                if not isinstance(found, dict):
                    kind = type(found).__name__
                    return BadRow("malformed row", f"the caption's JSON is no object but {kind}", clip)
                record = {"prompt": found.get("caption"), **record, **found}
    except UnicodeDecodeError:
        return BadRow("not UTF-8", "the caption is not UTF-8; save it as such", clip)
    except (ValueError, RecursionError) as error:
        return BadRow("malformed row", f"the caption's JSON cannot be read: {error}", clip)
    except OSError as error:
        return BadRow("malformed row", f"the caption cannot be read: {error.strerror}", clip)
    if not record:
        name = Path(clip.rpartition("::")[2]).stem
        return BadRow("no caption", f"there is no {' or '.join(name + suffix for suffix in CAPTIONS)} beside it", clip)
    record.pop("scores", None)  # only a manifest has a pair per loser
    return {"key": key, **record, "clip": clip}


def _shard(path: Path) -> Iterator[Row | Dropped]:
    """The clips of one webdataset shard, with the captions next to them: members of one name but for the suffix."""
    number = 0

    def place(**more: int) -> dict[str, Any]:
        nonlocal number
        number += 1
        return {"tar": printable(path), "row": number, **more}

    def finish(key: str, clips: Sequence[tarfile.TarInfo], captions: Mapping[str, bytes]) -> Iterator[Row | Dropped]:
        for clip in sorted(clips, key=lambda clip: _clips_order(clip.name)):
            name = f"{path}::{clip.name}"
            if not clip.isreg() or clip.issparse():
                remedy = "it is a link, a device or sparse: pack the file itself"
                record = BadRow("not supported", remedy, name)
            elif record := _hidden(clip.name):
                record.clip = name
            else:
                record = _captioned(name, key, captions.get)
            row = checked(record, Path(), 0, "webdataset", place(offset=clip.offset_data, size=clip.size))
            if isinstance(row, Row):  # the file that holds the clip is the shard: no member's name is a path
                row = replace(row, path=str(path.absolute()))
            yield row

    key, clips, captions = "", [], {}
    error: Exception | None = None
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                tar.members = []  # else it keeps them all
                name, _, suffix = member.name.rpartition(".")
                suffix = f".{suffix.lower()}"
                if member.isdir() or suffix not in (*VIDEOS, *CAPTIONS):
                    continue
                if name != key:
                    yield from finish(key, clips, captions)
                    key, clips, captions = name, [], {}
                if suffix in VIDEOS:
                    clips.append(member)
                elif member.isreg() and not member.issparse():
                    captions[suffix] = tar.extractfile(member).read(SIDECAR_BYTES + 1)
    # MemoryError and OverflowError: a header may declare more bytes than any machine has.
    except (tarfile.TarError, OSError, ValueError, MemoryError, OverflowError) as found:
        error = found
    yield from finish(key, clips, captions)
    if error is not None:
        why = str(error) or "a header declares more bytes than there can be"
        detail = f"no uncompressed tar, or cut short: nothing behind its row {number} can be read ({why})"
        yield Dropped("", printable(path), json.dumps(place()), "truncated", detail)
