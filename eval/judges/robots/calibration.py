"""What the robots' judge makes of true, softened and violating clips.

python -m eval.judges.robots.calibration               the table: scores, and how well each violation is told apart
python -m eval.judges.robots.calibration --fit         measure true clips and write tolerances.json
"""

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from eval.judges.robots import judge
from eval.judges.robots.laws import errors
from eval.judges.robots.vision import observe, track_errors
from eval.robots.demonstrations import Listed, list_demonstrations
from eval.robots.simulators import shared
from eval.robots.tasks import TASKS
from eval.robots.violations import VIOLATIONS
from eval.sandbox.render import degrade
from train import entry
from train.clips import VideoConfig
from train.files import write_text

VIDEO = VideoConfig(height=128, width=128, num_frames=33, fps=20.0)
FIT_SEED, SEED = 1, 2
QUANTILE = 0.98  # of the errors of a task's true clips, the tolerance
LEAST = {"background": 0.001}  # tolerances below which nothing is resolved; of all other laws OTHERS
OTHERS = 0.02


@dataclass(frozen=True)
class CalibrationRow:
    kind: str  # "true", "true, softened" or a violation
    physical: Tensor  # (N,) scores
    semantic: Tensor  # (N,)
    gripper_error: Tensor  # (N,) frame heights, against the true clip
    object_error: Tensor  # (N,)


def auc(high: Tensor, low: Tensor) -> float:
    """The chance that one of `high` is greater than one of `low`; ties count half."""
    difference = high[:, None] - low[None]
    return float((difference > 0).float().mean() + 0.5 * (difference == 0).float().mean())


def clips(listed: list[Listed], violation: str | None = None, severity: float = 1.0) -> tuple[Tensor, Tensor]:
    """(N, T, H, W, 3) uint8, and whether the robot succeeded (N,)."""
    options = {"violation": violation, "severity": severity} if violation else {}
    made = [
        shared().get(one, VIDEO, then=listed[number + 1 : number + 4], **options) for number, one in enumerate(listed)
    ]
    frames = torch.stack([torch.from_numpy(one.frames) for one in made])
    return frames, torch.tensor([bool(one.success) for one in made])


def fit(count: int, tasks: list[str]) -> dict[str, dict[str, float]]:
    """Tolerances from `count` true clips of each task, half with failures. `done`: nine successes in ten do better."""
    found = {}
    for task in tasks:
        listed = [
            one
            for split in ("train", "pool")
            for one in list_demonstrations([task], split, FIT_SEED, range(count // 2))
        ]
        frames, success = clips(listed)
        measured: dict[str, list[Tensor]] = {}
        for one, clip in zip(listed, frames, strict=True):
            seen = observe(clip[None], [one.colour])
            for name, value in (errors(seen) | {"done": judge.done(seen, [task])}).items():
                measured.setdefault(name, []).append(value)
        values = {name: torch.cat(parts) for name, parts in measured.items()}
        done = values.pop("done")[success]
        found[task] = {
            name: round(max(float(value.quantile(QUANTILE)), LEAST.get(name, OTHERS)), 4)
            for name, value in values.items()
        }
        found[task]["done"] = round(float(done.quantile(0.9 if TASKS[task].shows_goal else 0.1)), 4)
        print(task, found[task], flush=True)
    return found


def calibrate(count: int, tasks: list[str], severity: float = 1.0) -> Iterator[CalibrationRow]:
    """The judge on held-out clips: true ones, softened ones, and every violation."""
    score = judge.build("cpu")
    listed = list_demonstrations(tasks, "heldout", SEED, range(count))
    prompts, colours = [one.prompt for one in listed], [one.colour for one in listed]
    true, _ = clips(listed)

    def row(kind: str, frames: Tensor) -> CalibrationRow:
        scores = score(frames, prompts)
        parts = [slice(start, start + judge.BATCH_SIZE) for start in range(0, count, judge.BATCH_SIZE)]
        tracks = [track_errors(*(observe(of[part], colours[part]) for of in (frames, true))) for part in parts]
        joined = {name: torch.cat([one[name] for one in tracks]) for name in tracks[0]}
        return CalibrationRow(kind, scores.physical, scores.semantic, **joined)

    yield row("true", true)
    yield row("true, softened", degrade(true, torch.Generator(), factor=2, noise=0))
    for kind in VIOLATIONS:
        yield row(kind, clips(listed, kind, severity)[0])


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, default=100, help="of each kind; with --fit of each task")
    parser.add_argument("--severity", type=float, default=1.0, help="of the violations")
    parser.add_argument("--tasks", default=",".join(TASKS), help="a,b,...; default: all")
    parser.add_argument("--fit", action="store_true", help=f"write tolerances into {judge.TOLERANCES.name} instead")
    given = parser.parse_args(argv)
    tasks = given.tasks.split(",")
    if unknown := set(tasks) - TASKS.keys():
        raise ValueError(f"--tasks {', '.join(sorted(unknown))}: choose out of {', '.join(TASKS)}")
    if given.fit:
        found = judge.tolerances() | fit(given.clips, tasks)
        write_text(judge.TOLERANCES, json.dumps(found, indent=1) + "\n")
        return
    print(f"{'kind':<16}{'physical':>10}{'5th pct':>9}{'AUC':>7}{'semantic':>10}{'gripper':>9}{'object':>8}")
    true = None
    for row in calibrate(given.clips, tasks, given.severity):
        true = row if true is None else true
        print(
            f"{row.kind:<16}{row.physical.mean():>10.3f}{row.physical.quantile(0.05):>9.3f}"
            f"{auc(true.physical, row.physical):>7.3f}{row.semantic.mean():>10.3f}"
            f"{row.gripper_error.mean():>9.4f}{row.object_error.mean():>8.4f}",
            flush=True,
        )
    listed = list_demonstrations(tasks, "pool", SEED, range(given.clips))
    frames, success = clips(listed)
    semantic = judge.build("cpu")(frames, [one.prompt for one in listed]).semantic
    told = auc(semantic[success], semantic[~success])
    print(f"semantic score of {int(success.sum())} successes and {int((~success).sum())} failures: AUC {told:.3f}")


if __name__ == "__main__":
    entry.run(main)
