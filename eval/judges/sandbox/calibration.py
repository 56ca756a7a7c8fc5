"""What the sandbox judge makes of true, degraded and violating clips.

python -m eval.judges.sandbox.calibration
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from eval.judges.sandbox.judge import SandboxJudgeConfig, build
from eval.sandbox.clips import simulate
from eval.sandbox.render import degrade
from eval.sandbox.world import VIOLATIONS
from train import entry

CAUGHT_BELOW = 0.5  # physical score below which a clip counts as a violation


@dataclass(frozen=True)
class CalibrationRow:
    kind: str  # "true", "true, degraded" or a violation
    severity: float  # 0 for true clips
    physical: float  # mean physical score
    fifth_percentile: float  # of the physical scores
    caught: float  # share of clips below CAUGHT_BELOW
    semantic: float  # mean semantic score


def calibrate(
    count: int, seed: int, *, height: int = 64, width: int = 64, severities: tuple[float, ...] = (0.25, 0.5, 0.75, 1.0)
) -> list[CalibrationRow]:
    """The judge on held-out simulated clips: true ones, degraded ones, and every violation at every severity."""
    judge = build(SandboxJudgeConfig(), "cpu")

    def row(kind: str, severity: float, clips: Tensor, prompts: list[str]) -> CalibrationRow:
        scores = judge(clips, prompts)
        physical = scores.physical
        caught = (physical < CAUGHT_BELOW).float().mean()
        values = (physical.mean(), physical.quantile(0.05), caught, scores.semantic.mean())
        return CalibrationRow(kind, severity, *(float(value) for value in values))

    def draw(kind: str | None, severity: float) -> tuple[Tensor, list[str]]:
        generator = torch.Generator().manual_seed(seed)
        clips = simulate("mixed", count, generator, height=height, width=width, violation=kind, severity=severity)
        return clips.frames, clips.prompts

    frames, prompts = draw(None, 1.0)
    rows = [row("true", 0.0, frames, prompts)]
    rows.append(row("true, degraded", 0.0, degrade(frames, torch.Generator().manual_seed(seed)), prompts))
    rows += [row(kind, severity, *draw(kind, severity)) for kind in VIOLATIONS for severity in severities]
    return rows


def main() -> None:
    print(f"{'kind':<16}{'severity':>9}{'physical':>10}{'5th pct':>9}{'caught':>8}{'semantic':>10}")
    for row in calibrate(count=400, seed=20_000):
        print(
            f"{row.kind:<16}{row.severity:>9.2f}{row.physical:>10.3f}{row.fifth_percentile:>9.3f}"
            f"{row.caught:>8.1%}{row.semantic:>10.3f}"
        )


if __name__ == "__main__":
    entry.run(main)
