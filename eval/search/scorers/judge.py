"""A judge as a scorer: what it measures on the decoded clips, turned so that low is good."""

from dataclasses import dataclass

import torch
from torch import Tensor

from eval.judges.scores import Judge, Unjudged
from eval.search.candidates import Candidates

ASPECTS = ("physical", "semantic", "both")


@dataclass(frozen=True)
class JudgeScore:
    """1 - the judge's score; of both aspects, 1 - their product. Infinity for a clip that it cannot judge."""

    judge: Judge
    aspect: str = "physical"  # physical | semantic | both

    def __call__(self, candidates: Candidates) -> Tensor:
        try:
            scores, judged = self.judge(candidates.clips, [candidates.prompt] * len(candidates)), slice(None)
        except Unjudged as refusal:
            scores, judged = refusal.scores, torch.tensor(refusal.judged, dtype=torch.int64)
        found = {"physical": scores.physical, "semantic": scores.semantic, "both": scores.physical * scores.semantic}
        values = torch.full((len(candidates),), torch.inf)
        values[judged] = 1 - found[self.aspect]
        return values
