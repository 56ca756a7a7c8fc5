"""The other baseline: a random choice, the same in every run."""

import hashlib

import torch
from torch import Tensor

from eval.search.candidates import Candidates


def random_choice(candidates: Candidates) -> Tensor:
    """Uniform values, from the prompt's key alone."""
    seed = int.from_bytes(hashlib.sha256(candidates.key.encode("utf-8")).digest()[:8], "big") >> 1
    return torch.rand(len(candidates), generator=torch.Generator("cpu").manual_seed(seed))
