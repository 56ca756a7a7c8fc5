"""Which GPU memory a recipe's step needs, with its frozen weights on the GPU and streamed from host memory.

    python -m train.tools.what_fits recipe=wan14b
    python -m train.tools.what_fits recipe=wan22_5b train.offload_gib=30
    python -m train.tools.benchmark recipe=wan14b benchmark.parts=[fits] benchmark.repeats=1  # measured, on a large GPU

Predicted without weights, by `train.plan`, for each of its CARDS. With the self-score on, its steps, in which two
passes wait at once, must fit too. A line's first words are what to add to the command.
"""

import recipes
from train import entry, gdpo
from train.host_memory import GIB
from train.plan import CARDS, card_arguments, dearest_blocks, on_card, weights_on_host


def row(config: gdpo.Config, size: int) -> str:
    """The line of a card of `size` GB."""
    chosen = on_card(config, size)
    found, budget = dearest_blocks(chosen), chosen.train.memory_budget_gib
    peak = found.peak / GIB
    if peak > budget:
        return f"does not fit, with train.offload_gib={config.train.offload_gib:g}: {peak:.1f} GiB of {budget:g}"
    host = (found.host + weights_on_host(chosen)) / GIB
    return f"{card_arguments(chosen)}: {peak:.1f} GiB, {host:.1f} of host memory; blocks keep {found}"


def main(argv: list[str] | None = None) -> None:
    config = recipes.load(gdpo.Config, argv)
    gdpo.check(config)
    video, backbone = config.video, config.backbone
    print(f"{backbone.family} {backbone.architecture}, {video.height}x{video.width}x{video.num_frames}, one GPU")
    for size in CARDS:
        print(f"{size:3} GB  {row(config, size)}")


if __name__ == "__main__":
    entry.run(main)
