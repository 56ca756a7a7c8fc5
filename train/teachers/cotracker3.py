"""Point tracks by CoTracker3, offline (Karaev et al., 2024), from the user's own installation.

CoTracker is CC BY-NC: this project holds none of its code, and nothing here needs it unless `tracks` is "cotracker".
Its weights are published as a pickle, which is not read here: convert them once.

    pip install "cotracker @ git+https://github.com/facebookresearch/co-tracker@5dd71b0cfe9a2e136c24ef7d4422f4e242dea05d"
    python -c "import torch, safetensors.torch as s; s.save_file(torch.load('scaled_offline.pth', weights_only=True), \\
        'scaled_offline.safetensors')"        # the file is facebook/cotracker3's on the hub

The name of this file is not the package's, which it would otherwise hide from scripts that run in its folder.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from train.entry import first_line

Tracker = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]

WINDOW = 60  # frames, of the published offline weights; longer and shorter clips interpolate its time embedding
PACKAGE = "cotracker @ git+https://github.com/facebookresearch/co-tracker@5dd71b0cfe9a2e136c24ef7d4422f4e242dea05d"


@dataclass
class CoTrackerConfig:
    path: str = ""  # scaled_offline.safetensors, converted from CoTracker3's scaled_offline.pth


def check(config: CoTrackerConfig) -> None:
    """ValueError, before any work, where the weights or the package are missing."""
    path = Path(config.path).expanduser()
    if path.suffix != ".safetensors" or not path.is_file():
        raise ValueError(
            f"cotracker.path={config.path!r} is no .safetensors file: convert CoTracker3's scaled_offline.pth as "
            "train/teachers/cotracker3.py shows"
        )
    _predictor_class()


def build(config: CoTrackerConfig, device: torch.device | str) -> Tracker:
    """The tracker: track(frames (T,H,W,3) uint8, queries (N,2) in [0,1]) -> tracks (T,N,2) float32, visible (T,N) bool.

    queries are points of frame 0. An occluded point may become visible again; one outside of the frame is invisible and
    lies on its edge. Raises ValueError where the package or its weights are missing or do not belong together.
    """
    check(config)
    with _own_chance():
        predictor = _predictor_class()(checkpoint=None, offline=True, window_len=WINDOW)
    try:
        predictor.model.load_state_dict(load_file(Path(config.path).expanduser()))
    except (SafetensorError, RuntimeError) as error:
        raise ValueError(
            f"cotracker.path={config.path!r} does not hold CoTracker3's offline weights "
            f"({first_line(error)}): convert scaled_offline.pth again"
        ) from error
    predictor = predictor.to(device).eval().requires_grad_(False)

    @torch.no_grad()
    def track(frames: Tensor, queries: Tensor) -> tuple[Tensor, Tensor]:
        size = torch.tensor([frames.shape[2], frames.shape[1]], device=device)  # width, height
        video = frames.to(device).permute(0, 3, 1, 2)[None].float()  # (1,T,3,H,W), 0 ... 255
        points = queries.to(device).float() * size - 0.5  # pixel i is centred at (i + 0.5) / size
        points = torch.cat([torch.zeros_like(points[:, :1]), points], dim=1)  # frame, x, y
        pixels, visible = predictor(video, queries=points[None])  # (1,T,N,2), (1,T,N) bool
        tracks = (pixels[0] + 0.5) / size
        inside = ((tracks >= 0) & (tracks <= 1)).all(dim=-1)
        return tracks.clamp(0, 1), visible[0] & inside

    return track


def _own_chance() -> AbstractContextManager:
    """Give the global generators their state back: the package seeds them when it is imported, and draws weights."""
    return torch.random.fork_rng(devices=range(torch.cuda.device_count()))


def _predictor_class() -> type:
    with _own_chance():
        try:
            from cotracker.predictor import CoTrackerPredictor
        except ImportError as error:
            raise ValueError(f"tracks=cotracker needs CoTracker ({error}): pip install '{PACKAGE}'") from error
    return CoTrackerPredictor
