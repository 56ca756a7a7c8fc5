"""A judge as a scorer: the physics that it measures on the decoded clips, turned so that low is good."""

import torch
from torch import Tensor

from eval.judges.scores import Judge, Unjudged
from eval.search.candidates import Candidates


def judge_score(judge: Judge, candidates: Candidates) -> Tensor:
    """1 - the judge's physical score; infinity for a clip that it cannot judge."""
    try:
        scores, judged = judge(candidates.clips, [candidates.prompt] * len(candidates)), slice(None)
    except Unjudged as refusal:
        scores, judged = refusal.scores, torch.tensor(refusal.judged, dtype=torch.int64)
    values = torch.full((len(candidates),), torch.inf)
    values[judged] = 1 - scores.physical
    return values
