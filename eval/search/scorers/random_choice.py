"""The other baseline: a random choice, the same in every run."""

import torch
from torch import Tensor

from eval.search.candidates import Candidates
from train.files import seed_of


def random_choice(candidates: Candidates) -> Tensor:
    """Uniform values, from the prompt's key alone."""
    return torch.rand(len(candidates), generator=torch.Generator("cpu").manual_seed(seed_of(candidates.key)))
