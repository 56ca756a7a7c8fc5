"""Does a world model know the sandbox's physics? Its surprise at true clips against clips with a planted violation.

    python -m eval.experiments.world_model.report --model eval/sandbox/world_model --pairs 256

Prints, for each kind of violation, the share of (true, violated) clips of the same scene in which the violated one
surprises more: over all of them (AUC) and over pairs with the same parameters and look. 0.5 is chance. Figures are
means over the scenes that know the kind. The clips have a seed of their own; none is of the training stream.
"""

import argparse

import torch
from torch import Tensor

from eval.sandbox.clips import SCENES, simulate
from eval.sandbox.world import VIOLATIONS
from eval.search.world_model import SurpriseConfig, WorldModel
from losses.surprise import AXES
from train import entry
from train.files import seed_of


def make_pairs(
    kind: str, pairs: int, severity: float, seed: int, device: torch.device | str = "cpu"
) -> list[tuple[Tensor, Tensor]]:
    """(true, violated) frames (n,T,H,W,3) uint8 of each scene that knows the kind, `pairs` or a few more in all."""
    scenes = [name for name in SCENES if kind in SCENES[name].violations]
    found = []
    for scene in scenes:
        both = []
        for violation in (None, kind):  # the same state of the generator gives the same parameters and look
            generator = torch.Generator().manual_seed(seed_of("world model", kind, scene, seed))
            count = -(-pairs // len(scenes))
            clips = simulate(scene, count, generator, violation=violation, severity=severity, device=device)
            both.append(clips.frames)
        found.append((both[0], both[1]))
    return found


def paired(low: Tensor, high: Tensor) -> float:
    """The share of places with high above low; ties count half."""
    return ((high > low).double() + 0.5 * (high == low).double()).mean().item()


def auc(low: Tensor, high: Tensor) -> float:
    """The share of pairs (N,), (M,) with high above low; ties count half."""
    return paired(low[:, None], high[None, :])


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of the world model")
    parser.add_argument("--pairs", type=int, default=256, help="of each kind")
    parser.add_argument("--severity", type=float, default=1.0, help="of the violations")
    parser.add_argument("--window", type=int, default=16, help="frames")
    parser.add_argument("--context", type=int, default=4, help="frames")
    parser.add_argument("--stride", type=int, default=1, help="frames")
    parser.add_argument("--seed", type=int, default=1, help="of the scenes")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cuda or cpu")
    options = parser.parse_args(argv)
    model = WorldModel(options.model, options.device)
    titles = [f"{title}, {axis}" for axis in AXES for title in ("AUC", "paired")]
    print(f"| violation | pairs | {' | '.join(titles)} |\n|{' --- |' * (len(titles) + 2)}")
    for kind in VIOLATIONS:
        scenes = make_pairs(kind, options.pairs, options.severity, options.seed, options.device)
        figures = []
        for axis in AXES:
            config = SurpriseConfig("", options.window, options.context, options.stride, axis)
            scores = [tuple(model.surprise(clips, config, batch=128).cpu() for clips in both) for both in scenes]
            figures += [sum(rate(*both) for both in scores) / len(scores) for rate in (auc, paired)]
        count = sum(len(true) for true, _ in scenes)
        print(f"| {kind} | {count} | " + " | ".join(f"{figure:.3f}" for figure in figures) + " |", flush=True)


if __name__ == "__main__":
    entry.run(main)
