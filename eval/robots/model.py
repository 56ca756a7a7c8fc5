"""The robots' base model: what it is made of, and the training of its VAE and of the inverse dynamics model.

A small Wan of the family wan22_ti2v, whose first frame is given: a VAE trained on demonstrations (`train_vae_on`), a
DiT trained by `train/sft.py`, a frozen text encoder and a tokenizer that knows the instructions' words
(`eval.small_wan`). `eval.experiments.robots_model.run` makes all of it.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from eval.robots import inverse_dynamics
from eval.robots.demonstrations import Listed, list_demonstrations
from eval.robots.recordings import Recordings, load_all
from eval.robots.tasks import TASKS
from eval.small_wan import vae
from eval.small_wan.training import Checkpoint, Settings
from train.backbones.wan22_ti2v import Wan22TI2V
from train.clips import VideoConfig

NETWORK = Wan22TI2V.architectures["robots"]["transformer"]
TEXTS = " ".join(text.replace("{colour}", "") for task in TASKS.values() for text in task.wordings)
WORDS = " ".join(sorted(set(re.findall("[a-z]+", TEXTS))))
VAE_NETWORK = vae.architecture(base_dim=24, latent_channels=16)
WINDOW = 17  # frames of a clip that the VAE's training sees at once, or all of a shorter one
COLOURED = 64  # of 255 between a pixel's strongest and weakest channel: robot, object and mark, all else is grey
STREAM, NOISY, HELD_OUT = "anytime", "pool", "heldout"  # of demonstrations: the model's, the inverse dynamics' besides


@dataclass(frozen=True)
class Size:
    """How much is recorded and trained."""

    clips: int  # demonstrations that the DiT learns from
    pool: int  # noisy ones that the inverse dynamics model sees besides
    held_out: int  # of the figures
    vae: Settings  # its pool: the first of the clips
    inverse_dynamics: inverse_dynamics.Settings
    video: VideoConfig = field(default_factory=lambda: VideoConfig(height=96, width=96, num_frames=33, fps=20.0))
    vae_network: dict[str, Any] = field(default_factory=lambda: VAE_NETWORK)
    overrides: tuple[str, ...] = ()  # of the recipe robots_base, for build and training
    evaluation: tuple[str, ...] = ()  # of the recipe robots
    episodes: int = 20  # of each task, of the planners' bounds

    @property
    def manifest(self) -> str:
        return f"robots:mixed:{self.clips}:{STREAM}"

    def demonstrations(self, stream: str, count: int) -> list[Listed]:
        return list_demonstrations(list(TASKS), stream, 0, range(count))


FULL = Size(
    clips=6000,
    pool=1500,
    held_out=200,
    vae=Settings(steps=2500, batch=32, pool=1000, learning_rate=3e-4),
    inverse_dynamics=inverse_dynamics.Settings(steps=15_000, batch=256),
)
SMALL = Size(
    clips=4,
    pool=2,
    held_out=2,
    vae=Settings(steps=2, batch=1, pool=4, learning_rate=3e-4),
    inverse_dynamics=inverse_dynamics.Settings(steps=2, batch=4),
    video=VideoConfig(height=32, width=32, num_frames=9, fps=20.0),
    vae_network=vae.architecture(base_dim=8, latent_channels=16),
    overrides=(
        *("video.height=32", "video.width=32", "video.num_frames=9", "backbone.compile=false", "train.num_workers=0"),
        *("optim.steps=2", "optim.batch_size=2", "train.pairs_per_pass=2", "pipeline.unit_size=4"),
        "pipeline.encode_batch=2",
    ),
    evaluation=(
        *("video.height=32", "video.width=32", "video.num_frames=9", "run.robots.clips=1", "run.planner.episodes=1"),
        *("run.planner.tasks=[reach]", "sampler.steps=1"),
    ),
    episodes=1,
)


def choose(*, small: bool, clips: int) -> Size:
    """clips: 0 for the usual number."""
    size = SMALL if small else FULL
    return replace(size, clips=clips) if clips else size


def coloured(frames: Tensor) -> Tensor:
    """frames (..., 3) uint8 -> where robot, object and mark are, (...) bool."""
    return frames.amax(dim=-1) - frames.amin(dim=-1) > COLOURED


def train_vae_on(recorded: Recordings, size: Size, device: str, checkpoint: Checkpoint) -> Any:
    """The VAE, as `eval.small_wan.vae.train_vae`, on random windows of the first recordings."""
    settings = size.vae
    clips = torch.from_numpy(recorded.frames(range(min(settings.pool, len(recorded.listed))))).to(device)
    length = min(WINDOW, clips.shape[1])

    def draw(draws: torch.Generator) -> tuple[Tensor, Tensor]:
        chosen, first = (
            torch.randint(bound, (settings.batch, 1), generator=draws, device=draws.device)
            for bound in (len(clips), clips.shape[1] - length + 1)
        )
        frames = clips[chosen, first + torch.arange(length, device=draws.device)]  # (B, L, H, W, 3)
        return frames, coloured(frames)

    return vae.train_vae(settings, size.vae_network, draw, device, checkpoint)


def train_inverse_dynamics(
    recorded: Sequence[Recordings], held_out: Recordings, size: Size, device: str, path: Path
) -> dict[str, float]:
    """Train the inverse dynamics model on all recordings and write it; its squared error on held-out ones."""
    frames, actions = load_all(recorded)
    model = inverse_dynamics.train(frames.to(device), actions, size.inverse_dynamics, seed=0, device=device)
    errors = []
    for place in range(len(held_out.listed)):
        clip, wanted = held_out.load(place)
        wanted = wanted.reshape(len(clip) - 1, -1, 4).mean(axis=1)
        errors.append(((model.decode(clip) - wanted) ** 2).mean(axis=0))
    error = np.stack(errors).mean(axis=0)
    inverse_dynamics.write(path, model, size.video, list(TASKS))
    return dict(zip(("x", "y", "z", "grip"), error.tolist(), strict=True))
