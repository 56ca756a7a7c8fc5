"""Which action lies between two frames: a small network, trained on demonstrations, shared by all that are compared.

    model = train(frames, actions, settings, seed=0)
    actions = model.decode(frames)          (T, H, W, 3) uint8 -> (T - 1, 4): each is repeated until the next frame

Mean squared error of the mean action of the control steps between two frames, each part in [-1, 1]. The camera does
not move, so the network may know places: its last layers are fully connected.
"""

import time
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Settings:
    steps: int = 3000
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

    def forward(self, before: Tensor, after: Tensor) -> Tensor:
        """(B, H, W, 3) uint8 twice -> (B, 4) in [-1, 1]."""
        first, second = (frames.movedim(-1, 1).float() / 127.5 - 1 for frames in (before, after))
        return self.head(self.features(torch.cat([first, second, 4 * (second - first)], dim=1)))

    @torch.no_grad()
    def decode(self, frames: np.ndarray) -> np.ndarray:
        clip = torch.from_numpy(frames).to(next(self.parameters()).device)
        return self(clip[:-1], clip[1:]).cpu().numpy()


def train(frames: Tensor, actions: Tensor, settings: Settings, *, seed: int, device: str = "cpu") -> InverseDynamics:
    """frames (N, T, H, W, 3) uint8; actions (N, (T - 1) * skip, 4)."""
    count, num_frames, height, width = frames.shape[:4]
    wanted = actions.unflatten(1, (num_frames - 1, -1)).mean(dim=2)  # (N, T - 1, 4)
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        model = InverseDynamics(height, width).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.learning_rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, settings.learning_rate, settings.steps)
    started = time.monotonic()
    for step in range(settings.steps):
        clip = torch.randint(count, (settings.batch,), generator=generator)
        moment = torch.randint(num_frames - 1, (settings.batch,), generator=generator)
        predicted = model(frames[clip, moment].to(device), frames[clip, moment + 1].to(device))
        loss = (predicted - wanted[clip, moment].to(device)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if (step + 1) % 500 == 0:
            seconds = time.monotonic() - started
            print(f"step {step + 1} of {settings.steps}, loss {loss.item():.4f}, {seconds:.0f} s", flush=True)
    return model.eval()
