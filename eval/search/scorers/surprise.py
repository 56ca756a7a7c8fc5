"""WMReward's surprise (arXiv 2601.10553): how badly a world model, V-JEPA 2, foresees the clip's later frames.

`eval.search.world_model` says how; 1 - cosine, averaged over windows. The world model is loaded at the first clip.
"""

from functools import cached_property

import torch
from torch import Tensor

from eval.search.candidates import Candidates
from eval.search.world_model import SurpriseConfig, WorldModel


class Surprise:
    """The mean surprise of each clip, `batch` of them at a time. Raises ValueError without a path."""

    def __init__(self, config: SurpriseConfig, device: torch.device | str, *, batch: int):
        if not config.path:
            raise ValueError(
                "search.surprise.path is empty: name a V-JEPA 2 model, or take surprise out of the scorers"
            )
        self.config, self.device, self.batch = config, device, batch

    @cached_property
    def model(self) -> WorldModel:
        return WorldModel(self.config.path, self.device)

    def of(self, clips: Tensor) -> Tensor:
        """(N,) of clips (N,T,H,W,3), `batch` at a time, see `WorldModel.surprise`."""
        return self.model.surprise(clips, self.config, batch=self.batch)

    def __call__(self, candidates: Candidates) -> Tensor:
        return self.of(candidates.clips).float().cpu()
