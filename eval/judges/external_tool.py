"""Judges that live in a checkout and an environment of the user's own: run as a subprocess, spoken to by CSV and mp4.

Nothing of a caption reaches a command line or a file name: the tool gets an argument list, clips are called by number,
captions stand only in CSV fields, all quoted. What the tool prints goes to a log file, of which the last line is shown
as progress, and the last lines are part of every error.
"""

import csv
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from eval.judges.scores import Judge, Scores, Unjudged, check_clips
from train.clips import write_clip

POLL_SECONDS = 0.5  # between two looks at the tool
REPORT_SECONDS = 30.0  # between two lines of progress
TAIL_BYTES = 8192  # of the tool's output that are read for a message
TAIL_LINES = 15  # of them that are shown
SILENCE = 1800.0  # seconds without output after which a tool is stopped; loading weights is silent too
# Becomes the tool, after asking Linux to kill it with its parent: a build that is killed itself must not leave a model
# on the GPU. prctl(PR_SET_PDEATHSIG, SIGKILL).
LAUNCH = "import ctypes, os, sys; ctypes.CDLL(None).prctl(1, 9, 0, 0, 0); os.execv(sys.argv[1], sys.argv[1:])"


@dataclass
class EnvironmentConfig:
    """An environment of the user's own, with a program that this project starts."""

    python: str = ""  # its interpreter


@dataclass
class InstallationConfig(EnvironmentConfig):
    """A rater of VideoPhy's authors; its environment is the one that their README describes (transformers 4.28)."""

    checkout: str = ""  # folder of a clone of github.com/Hritikbansal/videophy
    checkpoint: str = ""  # folder of the rater's weights


@dataclass
class RatersConfig:
    """The recipe's section `raters`: where the raters of other projects are installed."""

    videocon_physics: InstallationConfig = field(default_factory=InstallationConfig)  # of VideoPhy
    videophy2: InstallationConfig = field(default_factory=InstallationConfig)  # VideoPhy2-AutoRater
    vbench: EnvironmentConfig = field(default_factory=EnvironmentConfig)  # with the package vbench


class ToolError(RuntimeError):
    """The tool as a whole failed: it crashed, fell silent, or wrote what is no table of scores."""


@dataclass(frozen=True)
class Tool:
    """A checked installation, ready to run."""

    name: str  # for messages
    python: str
    checkout: Path
    checkpoint: Path
    environment: dict[str, str]

    def run(self, script: str, arguments: Sequence[str], folder: Path, *, where: str = ".") -> None:
        """Run a script of the checkout, in its subfolder `where`; `folder` takes the log.

        Raises ToolError, with the end of the tool's output, when it exits with another code than 0 or prints nothing
        for SILENCE seconds. The tool and whatever it started are stopped then, and when this process is interrupted.
        """
        log = folder / "tool.log"
        command = [self.python, str(self.checkout / script), *arguments]
        started = heard = reported = time.monotonic()
        size = 0
        with log.open("wb") as output:
            try:
                process = subprocess.Popen(
                    tied(command),
                    cwd=self.checkout / where,
                    env=self.environment,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,  # a process group of its own, to be stopped as a whole
                )
            except OSError as error:
                raise ToolError(f"{self.name}: {command[0]} does not start: {error}") from error
        try:
            while True:
                with suppress(subprocess.TimeoutExpired):
                    code = process.wait(POLL_SECONDS)
                    break
                now, written = time.monotonic(), log.stat().st_size
                if written != size:
                    size, heard = written, now
                if now - heard > SILENCE:
                    raise ToolError(
                        f"{self.name}: {script} printed nothing for {SILENCE:g} s and was stopped after"
                        f" {now - started:.0f} s; if it only needs longer, raise {__name__}.SILENCE.{_tail(log)}"
                    )
                if now - reported > REPORT_SECONDS:
                    reported = now
                    last = (_last_lines(log) or ["no output yet"])[-1]
                    print(f"{self.name}: {script} {now - started:.0f} s: {last[:120]}", file=sys.stderr, flush=True)
        finally:
            if process.poll() is None:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        if code:
            how = f"was ended by signal {-code}" if code < 0 else f"exited with code {code}"
            raise ToolError(f"{self.name}: {script} {how} after {time.monotonic() - started:.0f} s.{_tail(log)}")
        print(f"{self.name}: {script} took {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)

    def read_table(self, path: Path, script: str, folder: Path) -> list[list[str]]:
        """Rows of a CSV that `script` wrote; ToolError when there is no such file or it is no CSV in UTF-8."""
        if not path.is_file():
            raise ToolError(f"{self.name}: {script} ended well, but wrote no {path.name}.{_tail(folder / 'tool.log')}")
        try:
            with path.open(encoding="utf-8", newline="") as file:
                return [row for row in csv.reader(file, strict=True) if row]
        except (csv.Error, UnicodeDecodeError) as error:
            raise ToolError(f"{self.name}: {script} wrote {path.name}, which is no CSV in UTF-8: {error}") from error


def tool_settings(environment: EnvironmentConfig) -> dict[str, Any]:
    """The settings as digests of finished work hold them: the time of silence had a key of its own."""
    return asdict(environment) | {"timeout": 1800.0}


def find_tool(name: str, config: InstallationConfig, device: torch.device | str, scripts: Sequence[str]) -> Tool:
    """Check the installation `raters.<name>`, before any work; ValueError names the key to correct."""
    key = f"raters.{name}"
    for part in ("checkout", "python", "checkpoint"):
        if not getattr(config, part):
            raise ValueError(f"{key}.{part} is empty; {name} runs in its own checkout and environment, give all three")
    checkout, checkpoint = (Path(path).expanduser().absolute() for path in (config.checkout, config.checkpoint))
    for script in scripts:
        if not (checkout / script).is_file():
            raise ValueError(f"{key}.checkout={config.checkout} has no {script}; give a clone of Hritikbansal/videophy")
    if not (python := find_python(config)):
        raise ValueError(f"{key}.python={config.python} is no executable; give the interpreter of {name}'s environment")
    if not checkpoint.is_dir():
        raise ValueError(f"{key}.checkpoint={config.checkpoint} is no folder; give the one of {name}'s weights")
    environment = tool_environment(os.environ, torch.device(device))
    return Tool(name, python, checkout, checkpoint, environment)


def find_python(environment: EnvironmentConfig) -> str:
    """The interpreter's path, links not followed: that of a virtual environment is one, and finds its packages by its
    own place. Empty: there is none."""
    found = shutil.which(os.path.expanduser(environment.python)) if environment.python else None
    return os.path.abspath(found) if found else ""


def tied(command: list[str]) -> list[str]:
    """The command, to end with the process that starts it however that ends; on Linux, elsewhere it is as it was."""
    return [sys.executable, "-I", "-c", LAUNCH, *command] if sys.platform == "linux" else command


def tool_environment(own: Mapping[str, str], device: torch.device) -> dict[str, str]:
    """This process's environment for a tool with other packages, which takes the first GPU it sees.

    A device "cuda:1" becomes the second of CUDA_VISIBLE_DEVICES; any other leaves the choice as it is.
    """
    environment = {name: value for name, value in own.items() if not name.startswith("PYTHON")}
    environment |= {"PYTHONUTF8": "1", "PYTHONUNBUFFERED": "1"}  # its tables in UTF-8, its progress at once
    if device.type == "cuda" and device.index is not None:
        visible = [entry.strip() for entry in own.get("CUDA_VISIBLE_DEVICES", "").split(",") if entry.strip()]
        known = device.index < len(visible)
        environment["CUDA_VISIBLE_DEVICES"] = visible[device.index] if known else str(device.index)
    return environment


def build(rater: ModuleType, raters: RatersConfig, fps: float, device: torch.device | str) -> Judge:
    """The judge of clips of `fps` frames a second. Raises ValueError, before any work, for an installation that is not
    there.

    rater, a module of a program that reads files: NAME and PROGRAMS; refuse: why a caption cannot be asked about, None
    where it can; rate_files: of the tool, paths by clip number, all prompts and a new folder, ratings by name and clip
    number, and why clips have none; make_scores: of the ratings by name.
    """
    tool = find_tool(rater.NAME, getattr(raters, rater.NAME), device, rater.PROGRAMS)
    return partial(_rate_clips, rater, tool, fps)


def _rate_clips(rater: ModuleType, tool: Tool, fps: float, clips: Tensor, prompts: Sequence[str]) -> Scores:
    """The scores of clips (N, T, H, W, 3) uint8. Raises ValueError for clips of another form, `Unjudged` where some
    have no score, and ToolError where the tool fails or writes what is not its table."""
    check_clips(clips, prompts)
    failures = {clip: reason for clip, prompt in enumerate(prompts) if (reason := rater.refuse(prompt))}
    chosen = [clip for clip in range(len(prompts)) if clip not in failures]
    found: dict[str, dict[int, Any]] = {name: {} for name in ("semantic", "physical")}
    if chosen:
        with tempfile.TemporaryDirectory(prefix="judge-") as temporary:
            folder = Path(temporary)
            paths = {clip: str(folder / f"clip-{clip:05d}.mp4") for clip in chosen}
            for clip, path in paths.items():
                write_clip(path, clips[clip], fps)
            found, unrated = rater.rate_files(tool, paths, prompts, folder)
            failures |= unrated
    judged = [clip for clip in chosen if clip not in failures]
    scores = rater.make_scores({name: [values[clip] for clip in judged] for name, values in found.items()})
    if failures:
        raise Unjudged(failures, prompts, scores)
    return scores


def write_table(path: Path, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A CSV as the tools read theirs; every field quoted, so that none is taken for anything but text."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n", quoting=csv.QUOTE_ALL)
        writer.writerow(header)
        writer.writerows(rows)


def _last_lines(log: Path) -> list[str]:
    """The end of the tool's output, without control characters; a progress bar's updates count as lines."""
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - TAIL_BYTES))
        text = file.read().decode("utf-8", errors="replace")
    lines = ("".join(letter for letter in line if letter.isprintable()).strip() for line in text.splitlines())
    return [line for line in lines if line][-TAIL_LINES:]


def _tail(log: Path) -> str:
    lines = _last_lines(log)
    return " The end of its output:\n  " + "\n  ".join(lines) if lines else " It printed nothing"
