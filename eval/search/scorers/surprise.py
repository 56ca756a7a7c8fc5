"""WMReward's surprise (arXiv 2601.10553): how badly a world model, V-JEPA 2, foresees the clip's later frames.

Of a clip at most `frames` frames are taken, evenly. Windows of `window` of them every `stride`; the first `context` of
each are encoded alone and the rest predicted from them; 1 - cosine, averaged. The world model is loaded at the first
clip.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from eval.search.candidates import Candidates
from eval.search.world_model import FRAMES, WorldModel


@dataclass
class SurpriseConfig:
    path: str = ""  # hub id or folder of a V-JEPA 2 model
    frames: int = FRAMES  # of a clip, at most, evenly over it, as in the release; the next three count these
    window: int = 16  # frames
    context: int = 8  # frames of a window that are seen
    stride: int = 8  # frames between windows
    axis: str = "feature"  # cosine over features (the paper's text) or over tokens (its released code)


class Surprise:
    """The mean surprise of each clip. Raises ValueError without a path."""

    def __init__(self, config: SurpriseConfig, device: torch.device | str):
        if not config.path:
            raise ValueError(
                "search.surprise.path is empty: name a V-JEPA 2 model, or take surprise out of the scorers"
            )
        self.config, self.device, self.model = config, device, None

    def __call__(self, candidates: Candidates) -> Tensor:
        if self.model is None:
            self.model = WorldModel(self.config.path, self.device)
        config = self.config
        with torch.no_grad():
            values = self.model.surprise(
                candidates.clips, frames=config.frames, window=config.window, context=config.context,
                stride=config.stride, axis=config.axis,
            )  # fmt: skip
        return values.float().cpu()
