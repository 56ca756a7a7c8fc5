"""Which GPU memory a recipe's step needs, with its frozen weights on the GPU and streamed from host memory.

    python -m train.tools.what_fits recipe=wan14b
    python -m train.tools.what_fits recipe=wan22_5b backbone.compile=true train.offload_gib=30

Predicted without weights, by `train.plan`, for cards of SIZES whose budget leaves a sixteenth to CUDA and to fragments.
With the self-score on, its steps, in which two passes wait at once, must fit too. A line's first words are what to add
to the command.
"""

from dataclasses import replace
from typing import Any

import recipes
from train import entry, gdpo
from train.host_memory import GIB
from train.plan import BlockPlan, plan_blocks, streamed_bytes

SIZES = (16, 24, 32, 40, 48, 80, 141)  # GB of a card; as if they were GiB, the budget takes off a sixteenth


def table(config: gdpo.Config) -> list[str]:
    """A line for each card, with streaming only where the step fits no other way."""
    lines = []
    for size in SIZES:
        budget = size * 15 / 16
        for stream in (False, True):
            found = dearest(with_memory(config, budget, stream=stream))
            if found.peak <= budget * GIB:
                break
        else:
            lines.append(
                f"{size:3} GB  does not fit, with train.offload_gib={config.train.offload_gib:g}:"
                f" {found.peak / GIB:.1f} GiB of {budget:g}"
            )
            continue
        arguments = f"backbone.stream={str(stream).lower()} train.memory_budget_gib={budget:g}"
        host = (found.host + stream * streamed_bytes(config)) / GIB
        lines.append(
            f"{size:3} GB  {arguments}: {found.peak / GIB:.1f} GiB, {host:.1f} of host memory; blocks keep {found}"
        )
    return lines


def with_memory(config: gdpo.Config, budget: float, *, stream: bool) -> gdpo.Config:
    train, backbone = replace(config.train, memory_budget_gib=budget), replace(config.backbone, stream=stream)
    return replace(config, train=train, backbone=backbone)


def dearest(config: Any) -> BlockPlan:
    """The plan of the recipe's step with the highest peak."""
    passes = (1, 2) if config.self_score.strength > 0 else (1,)
    return max((plan_blocks(config, passes=count) for count in passes), key=lambda found: found.peak)


def main(argv: list[str] | None = None) -> None:
    config = recipes.load(gdpo.Config, argv)
    gdpo.check(config)
    if not config.backbone.compile or config.train.parameters != "lora":
        raise ValueError(
            f"backbone.compile={str(config.backbone.compile).lower()}, train.parameters={config.train.parameters}: only"
            " compiled blocks with LoRA keep to a memory budget; set true and lora"
        )
    video, backbone = config.video, config.backbone
    print(f"{backbone.family} {backbone.architecture}, {video.height}x{video.width}x{video.num_frames}, one GPU")
    print(*table(config), sep="\n")


if __name__ == "__main__":
    entry.run(main)
