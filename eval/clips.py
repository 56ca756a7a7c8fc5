"""Clips as files: what each was made from, and which are missing.

    <folder>/<model>/<key>-<seed>.mp4    a clip, and beside it <key>-<seed>.json, its sidecar: all that its frames
                                         depend on, with a digest, and what making it took; written last

A clip whose sidecar shows the same settings is finished: a run that was stopped continues.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, FiniteFloat
from torch import Tensor
from typing_extensions import TypedDict

from train.clips import motion_energy, write_clip
from train.files import digest, read_json, write_text


class Sidecar(TypedDict):
    """What is kept of a clip beside the settings that it was made with, which stand among these."""

    __pydantic_config__ = ConfigDict(extra="allow")
    which: str  # the folder's name
    path: str  # below the folder of all models
    motion: FiniteFloat  # energy
    seconds: FiniteFloat  # that making it took
    passes: FiniteFloat  # of the network
    bytes: int  # of the clip
    digest: str  # of the settings


@dataclass(frozen=True)
class Clip:
    """A file that is wanted. `settings` is all that its frames depend on, as plain JSON values."""

    which: str  # the folder's name
    path: Path
    settings: dict[str, Any]
    lossless: bool = False

    @property
    def digest(self) -> str:
        return digest(self.settings)

    def record(self) -> Sidecar | None:
        """The sidecar of the clip that lies at `path`, made with whatever settings; None where either is not whole."""
        try:
            record = read_json(self.path.with_suffix(".json"), Sidecar, remedy="the clip is made again")
            return record if record["bytes"] == self.path.stat().st_size else None
        except (OSError, ValueError):
            return None

    def is_finished(self) -> bool:
        """Whether the clip that lies at `path` was made with these settings; a sidecar edited since says nothing."""
        record = self.record()
        if record is None or record["digest"] != self.digest:
            return False
        return digest({name: record.get(name) for name in self.settings}) == self.digest

    def write(self, frames: Tensor, fps: float, facts: Mapping[str, Any]) -> None:
        """Write frames (T, H, W, 3) uint8, then the sidecar: `settings` and `facts`."""
        sidecar = self.path.with_suffix(".json")
        sidecar.unlink(missing_ok=True)  # a kill between clip and sidecar must not leave new frames under old settings
        write_clip(self.path, frames, fps, lossless=self.lossless)
        place = f"{self.which}/{self.path.name}"
        record = {"which": self.which, "path": place} | dict(facts) | self.settings
        record |= {"motion": round(motion_energy(frames), 7)}
        record |= {"bytes": self.path.stat().st_size, "digest": self.digest}
        write_text(sidecar, json.dumps(record, ensure_ascii=False, indent=1) + "\n")


def warn_of_outdated(clips: Iterable[Clip], folder: Path) -> None:
    """Print how many of the unfinished `clips` lie there, made with other settings, and what is other."""
    found = [(clip, record) for clip in clips if (record := clip.record())]
    if found:
        clip, record = found[0]
        changed = ", ".join(name for name, value in clip.settings.items() if record.get(name) != value)
        print(
            f"{len(found)} clips in {folder} were made with other settings and are made again, the first is"
            f" {clip.path} (other: {changed})"
        )
