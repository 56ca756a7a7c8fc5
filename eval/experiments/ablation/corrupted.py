"""A group set whose losers are its winners with their latent frames in another order: losers without a network pass.

python -m eval.experiments.ablation.corrupted SOURCE TARGET SEED
"""

import sys
from dataclasses import replace
from pathlib import Path

import torch

from train import entry
from train.files import seed_of
from train.groups import GroupSet, Loser, ShardWriter, write_index


def main(argv: list[str] | None = None) -> None:
    source, target, seed = sys.argv[1:] if argv is None else argv
    groups = GroupSet(Path(source))
    with ShardWriter(target, "unit-000000") as writer:
        for group in (groups[index] for index in range(len(groups))):
            generator = torch.Generator().manual_seed(seed_of(seed, group.key))
            frames = group.winner.shape[1]
            # All but the first frame, so that the scene stays the prompt's.
            orders = [1 + torch.randperm(frames - 1, generator=generator) for _ in group.losers]
            orders = [order if (order.diff() != 1).any() else order.flip(0) for order in orders]
            losers = torch.stack([torch.cat([group.winner[:, :1], group.winner[:, order]], dim=1) for order in orders])
            info = [Loser(one.seed, semantic=0.5, physical=0.5) for one in group.losers_info]
            writer.write(replace(group, losers=losers, losers_info=info))
    write_index(target, fingerprint=groups.fingerprint, video=groups.video)
    print(f"groups: {target}, {len(groups)} groups")


if __name__ == "__main__":
    entry.run(main)
