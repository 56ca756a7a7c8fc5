"""Trains the sandbox's VAE on simulated clips, see `eval.small_wan.vae`.

    python -m eval.sandbox.vae --folder runs/sandbox/vae --steps 3000 --batch 64 --seed 0 --device cuda

A plain backdrop fills most of a clip, so the pixels of objects and rods, and a border around them, weigh more.
"""

import time

import torch
from torch import Tensor

from eval.sandbox.clips import simulate
from eval.sandbox.world import FIRST_OBJECT, ROD
from eval.small_wan.training import Settings, command_line
from eval.small_wan.vae import Draw, architecture, describe, train_vae, write_vae
from train import entry

DEFAULTS = Settings(steps=1600, batch=64, pool=6000, learning_rate=3e-4)  # 5e-4 and more draw objects later
HELD_OUT = 512  # clips for the statistics and figures, at most as many as train
ARCHITECTURE = architecture(base_dim=32, latent_channels=8)


def moving(layers: Tensor) -> Tensor:
    """layers (B, T, H, W) uint8 -> where objects and rods are, bool."""
    return (layers >= FIRST_OBJECT) | (layers == ROD)


def draw_from_pool(settings: Settings, device: str) -> Draw:
    """Batches of `settings.pool` simulated clips."""
    started, generator = time.monotonic(), torch.Generator().manual_seed(settings.seed)
    clips = simulate("mixed", settings.pool, generator, device=device)
    print(f"{settings.pool} clips simulated in {time.monotonic() - started:.1f} s", flush=True)

    def draw(draws: torch.Generator) -> tuple[Tensor, Tensor]:
        chosen = torch.randint(settings.pool, (settings.batch,), generator=draws, device=draws.device)
        return clips.frames[chosen], moving(clips.layers[chosen])

    return draw


def main(argv: list[str] | None = None) -> None:
    folder, settings, device = command_line(__doc__, "folder", DEFAULTS, argv)
    started = time.monotonic()
    vae = train_vae(settings, ARCHITECTURE, draw_from_pool(settings, device), device)
    generator = torch.Generator().manual_seed(settings.seed + 1)
    held_out = simulate("mixed", min(HELD_OUT, settings.pool), generator, device=device)
    figures = write_vae(folder, settings, vae, held_out.frames, held_out.masks > 0, held_out.scenes, started=started)
    print(describe(folder, figures))


if __name__ == "__main__":
    entry.run(main)
