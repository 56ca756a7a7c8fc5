"""Pixel-level trajectory alignment (PhysisForcing, section 3.2, eqs. 5-8).

Where does the network think that a point of the first frame goes? Its feature there is compared with all features of a
later frame, and the expected place under the softmax of these similarities is the predicted track:

    s_t(i, u) = <F_0(p_i), F_t(u)> / sqrt(C)          u over the cells of frame t         eqs. 5-6
    p_t(i)    = sum_u softmax_u s_t(i, u) u                                               eq. 7
    loss      = mean over kept, visible point-frames of |p_t(i) - reference_t(i)|^2       eq. 8

Points are (x, y), each in [0, 1] inside the frame; cell (row, column) of an H x W grid has its centre at
((column + 1/2) / W, (row + 1/2) / H). So a loss weight does not depend on the resolution (the paper's unit is not
published).

Shapes: B clips, T frames, C feature channels, N points, H W rows and columns. Everything is float32 inside.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def predict_tracks(features: Tensor, queries: Tensor) -> Tensor:
    """Expected places of first-frame points in every frame: features (B,T,C,H,W), queries (B,N,2) -> (B,T,N,2).

    Frame 0 returns the queries. A query's feature is interpolated bilinearly between cell centres, and beyond the
    outermost centres is that of the border. The similarity is a scaled dot product, not a cosine: its sharpness is the
    network's to learn.

    By hand: one channel, 1 x 2 cells, frame 0 = (2, 0), frame 1 = (1, 3); query (0.25, 0.5), the centre of cell 0, has
    feature 2; similarities 2 and 6, softmax (0.017986, 0.982014), x = 0.25 * 0.017986 + 0.75 * 0.982014 = 0.741007.
    """
    batch, frames, channels, height, width = features.shape
    features, queries = features.float(), queries.float()
    grid = (2 * queries - 1).unsqueeze(1)  # (B,1,N,2)
    sampled = F.grid_sample(features[:, 0], grid, mode="bilinear", padding_mode="border", align_corners=False)
    keys = features[:, 1:].flatten(3)  # (B,T-1,C,HW)
    similarity = torch.einsum("bcn,btcu->btnu", sampled[:, :, 0], keys) / math.sqrt(channels)
    rows = (torch.arange(height, device=features.device) + 0.5) / height
    columns = (torch.arange(width, device=features.device) + 0.5) / width
    centres = torch.stack([columns.repeat(height), rows.repeat_interleave(width)], dim=-1)  # (HW,2)
    expected = similarity.softmax(dim=-1) @ centres  # (B,T-1,N,2)
    return torch.cat([queries.unsqueeze(1), expected], dim=1)


def trajectory_loss(predicted: Tensor, reference: Tensor, keep: Tensor, visible: Tensor) -> Tensor:
    """Mean squared distance over the kept, visible points of all frames but the first: (B,) float32, squared frames.

    predicted and reference (B,T,N,2), keep (B,N) bool, visible (B,T,N) bool. x and y are added. What a point that is
    not counted holds (NaN, say) touches neither loss nor gradient. A clip in which nothing counts gives 0.

    By hand: one point, two frames, predicted (0.5, 0.5) against (0.8, 0.1) in frame 1: 0.09 + 0.16 = 0.25.
    """
    counted = keep.unsqueeze(1) & visible  # (B,T,N)
    counted = torch.cat([torch.zeros_like(counted[:, :1]), counted[:, 1:]], dim=1)
    predicted = torch.where(counted.unsqueeze(-1), predicted.float(), 0.0)
    reference = torch.where(counted.unsqueeze(-1), reference.float(), 0.0)
    squared = (predicted - reference).square().sum(dim=(1, 2, 3))
    return squared / counted.sum(dim=(1, 2)).clamp(min=1)
