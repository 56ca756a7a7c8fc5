"""Which action lies between two frames: a small network, trained on demonstrations, shared by all that are compared.

    model = train(frames, actions, settings, seed=0)
    actions = model.decode(frames)          (T, H, W, 3) uint8 -> (T - 1, 4): each is repeated until the next frame

Mean squared error of the mean action of the control steps between two frames, each part in [-1, 1]. The hand follows
its actions late, so the network sees the frame after these two as well: given the hand's true places instead of
pictures, a network of two moments solved 39 of 50 episodes, one of three 47, and one of the moment before as well 37,
for it then goes on as before. The camera does not move, so the network may know places: its last layers are fully
connected.
"""

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from eval.small_wan.training import seeded
from train.clips import VideoConfig
from train.files import atomic

MOMENTS = 3  # frames that the network sees


@dataclass(frozen=True)
class Settings:
    steps: int = 5000
    batch: int = 64  # pairs of frames a step
    learning_rate: float = 1e-3  # peak; one cycle


class InverseDynamics(nn.Module):
    def __init__(self, height: int, width: int):
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(9, 32, 8, stride=4, padding=2),
            nn.ReLU(),
            nn.Conv2d(32, 64, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(64, 64, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Flatten(),
        )
        size = self.features(torch.zeros(1, 9, height, width)).shape[1]
        self.head = nn.Sequential(nn.Linear(size, 256), nn.ReLU(), nn.Linear(256, 4), nn.Tanh())

    def forward(self, now: Tensor, then: Tensor, later: Tensor) -> Tensor:
        """Three frames in a row, each (B, H, W, 3) uint8 -> the actions (B, 4) in [-1, 1] between the first two."""
        first, second, third = (frames.movedim(-1, 1).float() / 127.5 - 1 for frames in (now, then, later))
        return self.head(self.features(torch.cat([first, 4 * (second - first), 4 * (third - second)], dim=1)))

    @torch.no_grad()
    def decode(self, frames: np.ndarray) -> np.ndarray:
        """Behind the last frame the picture stands still: give a frame more than actions are needed."""
        clip = torch.from_numpy(frames).to(next(self.parameters()).device)
        return self(clip[:-1], clip[1:], torch.cat([clip[2:], clip[-1:]])).cpu().numpy()


def train(frames: Tensor, actions: Tensor, settings: Settings, *, seed: int, device: str = "cpu") -> InverseDynamics:
    """frames (N, T, H, W, 3) uint8; actions (N, (T - 1) * skip, 4)."""
    count, num_frames, height, width = frames.shape[:4]
    wanted = actions.unflatten(1, (num_frames - 1, -1)).mean(dim=2)  # (N, T - 1, 4)
    generator = torch.Generator().manual_seed(seed)
    with seeded(seed):
        model = InverseDynamics(height, width).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.learning_rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, settings.learning_rate, settings.steps)
    started = time.monotonic()
    for step in range(settings.steps):
        clip = torch.randint(count, (settings.batch,), generator=generator)
        moment = torch.randint(num_frames - 1, (settings.batch,), generator=generator)
        places = (moment, moment + 1, (moment + 2).clamp(max=num_frames - 1))
        predicted = model(*(frames[clip, place].to(device) for place in places))
        loss = (predicted - wanted[clip, moment].to(device)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if (step + 1) % 500 == 0:
            seconds = time.monotonic() - started
            print(f"step {step + 1} of {settings.steps}, loss {loss.item():.4f}, {seconds:.0f} s", flush=True)
    return model.eval()


def write(path: Path, model: InverseDynamics, video: VideoConfig, tasks: Sequence[str]) -> None:
    """In 16 bits, with the tasks and the size and rate of the clips that it was trained on."""
    weights = {name: weight.half().cpu() for name, weight in model.state_dict().items()}
    with atomic(path) as aside:
        save_file(weights, aside, metadata={"video": json.dumps(_size(video)), "tasks": json.dumps(list(tasks))})


def read(path: Path, video: VideoConfig, tasks: Sequence[str]) -> InverseDynamics | None:
    """The model of a file, or None where there is none for such clips and all these tasks."""
    if not path.exists():
        return None
    with safe_open(path, "pt") as file:
        made_for = {name: json.loads(text) for name, text in file.metadata().items()}
    if made_for["video"] != _size(video) or not set(tasks) <= set(made_for["tasks"]):
        return None
    model = InverseDynamics(video.height, video.width)
    model.load_state_dict(load_file(path))
    return model.eval()


def _size(video: VideoConfig) -> list[float]:
    return [video.height, video.width, video.fps]
