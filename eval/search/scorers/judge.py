"""A judge as a scorer: the physics that it measures on the decoded clips, turned so that low is good."""

from dataclasses import dataclass

import torch
from torch import Tensor

from eval.judges.scores import Judge, Unjudged
from eval.search.candidates import Candidates


@dataclass(frozen=True)
class JudgeScore:
    """1 - the judge's physical score; infinity for a clip that it cannot judge."""

    judge: Judge

    def __call__(self, candidates: Candidates) -> Tensor:
        try:
            scores, judged = self.judge(candidates.clips, [candidates.prompt] * len(candidates)), slice(None)
        except Unjudged as refusal:
            scores, judged = refusal.scores, torch.tensor(refusal.judged, dtype=torch.int64)
        values = torch.full((len(candidates),), torch.inf)
        values[judged] = 1 - scores.physical
        return values
