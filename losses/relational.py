"""Semantic-level relational alignment (PhysisForcing, section 3.3, eqs. 9-12).

The network's tokens need not equal a video encoder's. Only their cosines to each other are compared with the encoder's:

    G_ij = cos(y_i, y_j)                                    of the student and of the teacher      eq. 11
    loss = mean over pairs (i, j) of |G_ij student - G_ij teacher|                                 eq. 12

Shapes: B clips, K tokens, Ds and Dt feature widths. Everything is float32 inside.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

NORM_FLOOR = 1e-6  # below it a token counts as zero, and its cosines as 0


def relational_loss(student: Tensor, teacher: Tensor, valid: Tensor) -> Tensor:
    """Mean absolute difference of two cosine matrices over the pairs of valid tokens: (B,) float32 in [0, 2].

    student (B,K,Ds), teacher (B,K,Dt), valid (B,K) bool: tokens that are there (clips have different numbers of masked
    tokens). All ordered pairs count, the K diagonal ones too, whose difference is 0; there is no margin. A clip
    without a valid token gives 0, and so does one with a single token. Tokens that are not valid touch neither loss nor
    gradient, whatever they hold. The teacher gets no gradient.

    By hand: student (1, 0), (1, 0) and teacher (1, 0), (0, 2): cosines 1 and 0 for both off-diagonal pairs, so
    2 * 1 / 4 = 0.5.
    """
    student = torch.where(valid.unsqueeze(-1), student.float(), 0.0)
    teacher = torch.where(valid.unsqueeze(-1), teacher.detach().float(), 0.0)
    difference = (cosines(student) - cosines(teacher)).abs()  # 0 where either token is not valid
    pairs = valid.sum(dim=1).square()
    return difference.sum(dim=(1, 2)) / pairs.clamp(min=1)


def cosines(tokens: Tensor) -> Tensor:
    """(B,K,D) -> (B,K,K) float32 cosine of every two tokens, eq. 11; rows and columns of zero tokens are 0."""
    unit = F.normalize(tokens.float(), dim=-1, eps=NORM_FLOOR)
    return unit @ unit.transpose(1, 2)
