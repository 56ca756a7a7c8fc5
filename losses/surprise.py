"""How far a clip's future is from what a latent world model predicted (WMReward, Yuan et al., 2026): lower is better.

    surprise = 1 - mean cos(norm(predicted), norm(target))        norm: layer norm over features, without an affine part

The paper takes the cosine of each token's features; its released code takes it across tokens, for each feature. Both
are here. Both sides are normalised, since a V-JEPA predictor is trained towards layer-normed targets.

Shapes: B clips, K tokens, D features. Everything is float32 inside.
"""

import torch.nn.functional as F
from torch import Tensor

AXES = ("feature", "token")


def surprise(predicted: Tensor, target: Tensor, *, axis: str = "feature") -> Tensor:
    """1 - mean cosine of predicted and target, both (B,K,D): (B,) float32 in [0, 2].

    axis: "feature", a cosine for each token over its D features, then the mean over tokens; "token", a cosine for each
    feature over the K tokens, then the mean over features. Gradient flows to both sides. ValueError for another axis.

    By hand: features (1, 3) and (3, 1) become (-1, 1) and (1, -1). Predicted (1, 3), (1, 3) against target (1, 3),
    (3, 1): token cosines 1 and -1, so 1; feature vectors (-1, -1) and (-1, 1), (1, 1) and (1, -1): cosines 0, so 1.
    """
    if axis not in AXES:
        raise ValueError(f"axis={axis!r} is unknown: choose one of {', '.join(AXES)}")
    predicted, target = (F.layer_norm(tokens.float(), tokens.shape[-1:]) for tokens in (predicted, target))
    dim = 2 if axis == "feature" else 1
    return 1 - F.cosine_similarity(predicted, target, dim=dim).mean(dim=1)
