"""Print what the sandbox judge makes of true, degraded and violating clips.

python -m eval.judges.sandbox.calibration
"""

from eval.judges.sandbox.judge import calibrate
from train import entry


def main() -> None:
    print(f"{'kind':<16}{'severity':>9}{'physical':>10}{'5th pct':>9}{'caught':>8}{'semantic':>10}")
    for row in calibrate(count=400, seed=20_000):
        print(
            f"{row.kind:<16}{row.severity:>9.2f}{row.physical:>10.3f}{row.fifth_percentile:>9.3f}"
            f"{row.caught:>8.1%}{row.semantic:>10.3f}"
        )


if __name__ == "__main__":
    entry.run(main)
