"""Groupwise preference objectives over flow errors (PhyGDPO, arXiv 2512.24551, eqs. 6, 7, 9 and 13).

Every input error l is a flow error (`losses.flow_matching.flow_error`): a MEAN of squares, so `beta` multiplies a
difference of means and absorbs the paper's T and h^2 / 2 epsilon. With w the real winner and l_j the j-th generated
loser of a group,

    x_j = beta [(policy_w - reference_w) - (policy_l_j - reference_l_j)]

is negative where the policy improved on the winner more than on the loser.

Shapes: B groups, M losers per group. Everything is per sample and float32; callers average.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def physics_guided_weights(
    semantic: Tensor,
    physical: Tensor,
    *,
    alpha_min: float = 0.5,
    k_alpha: float = 5.0,
    b_alpha: float = 0.5,
    k_gamma: float = 2.0,
    b_gamma: float = 0.4,
    lam: float = 0.6,
    score_floor: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Physics-guided rewarding, eq. 9: sharpness alpha and weight gamma of a loser from its two judge scores.

        v = (1 - score_floor) (1 - (semantic + physical) / 2)
        alpha = alpha_min + (1 - alpha_min) sigmoid(k_alpha (v - b_alpha))
        gamma = (1 + lam sigmoid(k_gamma (v - b_gamma))) / alpha_min

    `semantic` and `physical` are scores in [0, 1] of any shape; returns alpha in (alpha_min, 1) and gamma >= 1 /
    alpha_min, float32 and of that shape. gamma >= 1 / alpha always, which is what inequality (7) asks for.

    score_floor is 0 in the paper. The released code divides ratings of 1 to 5 by 5, so its worst score is 0.2 where
    (rating - 1) / 4 is 0: with 0.2 a score counts as 0.2 + 0.8 score.

    By hand: scores 0.5 and 0.5 give v = 0.5, alpha = 0.5 + 0.5 * sigmoid(0) = 0.75 and
    gamma = (1 + 0.6 * sigmoid(0.2)) / 0.5 = 2 * (1 + 0.6 * 0.549834) = 2.659801.
    """
    difficulty = (1 - score_floor) * (1 - (semantic.float() + physical.float()) / 2)
    alpha = alpha_min + (1 - alpha_min) * torch.sigmoid(k_alpha * (difficulty - b_alpha))
    gamma = (1 + lam * torch.sigmoid(k_gamma * (difficulty - b_gamma))) / alpha_min
    return alpha, gamma


def relative_error(
    policy_winner: Tensor, reference_winner: Tensor, policy_loser: Tensor, reference_loser: Tensor
) -> Tensor:
    """(policy_w - reference_w) - (policy_l - reference_l): the bracket of eq. 13, float32. Negative is better.

    Winner (B,) and loser (B,) or (B,M) flow errors; returns the loser's shape.
    """
    winner = policy_winner.float() - reference_winner.float()
    loser = policy_loser.float() - reference_loser.float()
    return winner.view(-1, *[1] * (loser.dim() - 1)) - loser


def pairwise_bound(
    policy_winner: Tensor,
    reference_winner: Tensor,
    policy_loser: Tensor,
    reference_loser: Tensor,
    *,
    alpha: Tensor | float,
    gamma: Tensor | float,
    beta: float,
    group_size: Tensor | float,
) -> Tensor:
    """The training objective, eq. 13, with one loser sampled from a group of `group_size`: (B,).

        -group_size gamma log sigmoid(-alpha beta [(policy_w - reference_w) - (policy_l - reference_l)])

    Its mean over the group's losers bounds eq. 6 from above by inequality (7) while 0 < alpha <= 1 and gamma >= 1 /
    alpha. alpha = gamma = 1 is Flow-DPO. T is absorbed into `beta`.

    By hand: errors w 1.0 (reference 1.1), l 1.3 (reference 1.2): bracket = -0.1 - 0.1 = -0.2; alpha 0.5, beta 10,
    gamma 2, group_size 4: -8 log sigmoid(1) = 8 * 0.313262 = 2.506093.
    """
    bracket = relative_error(policy_winner, reference_winner, policy_loser, reference_loser)
    return -group_size * gamma * F.logsigmoid(-alpha * beta * bracket)


def plackett_luce(
    policy_winner: Tensor, reference_winner: Tensor, policy_losers: Tensor, reference_losers: Tensor, *, beta: float
) -> Tensor:
    """The exact groupwise objective, eq. 6: log(1 + sum_j exp(x_j)), (B,). Winner errors (B,), loser errors (B,M).

    Computed as a logsumexp with a zero beside the x_j, so that no beta overflows. T is absorbed into `beta`.

    By hand: two losers with brackets 0 and 0 give log(1 + 1 + 1) = 1.098612.
    """
    x = beta * relative_error(policy_winner, reference_winner, policy_losers, reference_losers)  # (B,M)
    return torch.logsumexp(torch.cat([torch.zeros_like(x[:, :1]), x], dim=1), dim=1)
