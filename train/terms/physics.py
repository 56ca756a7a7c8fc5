"""PhysisForcing's two terms on the features of a middle block (its sections 3.2-3.4, eq. 13):

    L += S (trajectory L_pix + relational L_sem)     `losses.trajectory`, eqs. 5-8, and `losses.relational`, eqs. 9-12

The features F (B,D,F',H',W') come from the policy's own pass over the winner. Each term has a head of its own, a
two-layer SiLU MLP on single tokens (hidden width 512), trained beside the adapters and left out of the exported LoRA:

    pix   all tokens -> PIX_WIDTH; where the first frame's points go, against the clip's tracks at the latent frames
    sem   F resampled trilinearly to the teacher's grid -> sem_width; cosine matrix, against the teacher's, over the
          tokens that physics-informative points visit

Where the paper is silent or this deviates: heads read layer-normalised features (no affine part), since the residual
stream's scale differs by orders of magnitude between backbones; the sem head may have any width, for only cosines are
compared; it runs on the resampled tokens (the paper projects first), of which only the chosen ones are ever made; the
first layer runs in the backbone's dtype, the rest in float32. The loss weights are not published.

The resampling in time is the plain one ("by interpolation" is all the paper says): every latent frame covers an equal
share of the clip. In fact the first stands for one video frame and the others for four, so a student's token is read
up to about 3 video frames too early, at latent frame 1, and hardly off at the clip's end.

Shapes: B clips, D block width, F' H' W' its token grid, N points, K relation tokens, Dt teacher width.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from losses.relational import relational_loss
from losses.trajectory import predict_tracks, trajectory_loss
from train.backbones.architecture import shape_of
from train.backbones.base import BOTH, Backbone, Conditioning
from train.data import Sample
from train.groups import GroupSet
from train.policy import Policy, Prediction
from train.teachers.points import unpack

HIDDEN_WIDTH = 512  # of both heads
PIX_WIDTH = 128  # of the trajectory head's output
FRAMES_PER_LATENT = 4  # video frames a latent frame after the first, of every Wan VAE
KEYS = {  # of `Group.extra`, by the weight that needs them
    "trajectory": ("tracks", "visible", "keep"),
    "relational": ("relation_tokens", "relation_indices", "relation_grid"),
}


@dataclass
class PhysicsConfig:
    # Weights in units of the preference loss's slope (`train.gdpo.slope`), in supervised training of the flow error; 0:
    # no such term, nor its head.
    trajectory: float = 0.0  # of the trajectory term, in squared frame sides
    relational: float = 0.0  # of the relational term, in cosines
    # Whose output is read, counted from 0; -1: the middle, 20 of 14B's 40 and 15 of 5B's 30. The paper names layers 20
    # and 15 and does not say from where it counts: from 1, they are blocks 19 and 14 here.
    block: int = -1
    # Trajectory term: the points that `keep` chose; false: all tracked ones. The relational term has the tokens that
    # were chosen when the targets were made: with targets.rule=all, from everywhere.
    region_focus: bool = True
    sem_width: int = 512  # of the relational head's output
    head_lr: float = 1.0e-3  # of the heads where the schedule of optim.lr has its peak
    on_the_fly: bool = False  # make the targets of groups without any while training, by the section `targets`

    @property
    def enabled(self) -> bool:
        return self.trajectory > 0 or self.relational > 0


def feature_block(config: PhysicsConfig, num_blocks: int) -> int | None:
    """Which block's output the terms read, None without terms. ValueError for a block that is not there."""
    if not config.enabled:
        return None
    if not -1 <= config.block < num_blocks:
        raise ValueError(
            f"physics.block={config.block} is no block of this network: use 0 to {num_blocks - 1}, or -1 for the"
            f" middle ({num_blocks // 2})"
        )
    return num_blocks // 2 if config.block == -1 else config.block


class PhysicsHeads(nn.Module):
    """Heads of the terms whose weight is not 0, float32, drawn from `seed`: uniform weights that keep the variance of
    normalised inputs (bound sqrt(3 / in)), zero biases."""

    def __init__(self, config: PhysicsConfig, width: int, *, seed: int):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        outputs = {"pix": (config.trajectory, PIX_WIDTH), "sem": (config.relational, config.sem_width)}
        for name, (weight, output) in outputs.items():
            if weight > 0:
                first, last = nn.Linear(width, HIDDEN_WIDTH), nn.Linear(HIDDEN_WIDTH, output)
                self.add_module(name, nn.Sequential(first, nn.SiLU(), last))
        with torch.no_grad():
            for name, weight in self.named_parameters():
                bound = math.sqrt(3 / weight.shape[1]) if name.endswith("weight") else 0.0
                weight.copy_(torch.rand(weight.shape, generator=generator) * 2 * bound - bound)

    def forward(self, name: str, tokens: Tensor) -> Tensor:
        """Head `name` on tokens (...,D) of any dtype: (..., its width) float32."""
        first, activation, second = getattr(self, name)
        tokens = F.layer_norm(tokens, tokens.shape[-1:])
        hidden = F.linear(tokens, first.weight.to(tokens.dtype), first.bias.to(tokens.dtype))
        return second(activation(hidden.float()))


def build_heads(config: Any, backbone: Backbone) -> PhysicsHeads | nn.ModuleDict | None:
    """The heads of the recipe's physics terms, whole on every rank; None without such terms. ValueError for a block
    that the network has not. Where both experts train, each has its own, by the name of its folder, for their features
    have nothing in common."""
    shape = shape_of(backbone.architecture)
    if feature_block(config.physics, shape.layers) is None:
        return None

    def build() -> PhysicsHeads:
        return PhysicsHeads(config.physics, shape.width, seed=config.seed).to(backbone.device)

    if backbone.trained == BOTH:
        return nn.ModuleDict({folder: build() for folder in backbone.expert_folders.values()})
    return build()


def serving_heads(heads: nn.Module, backbone: Backbone) -> PhysicsHeads:
    """Of `build_heads`, those of the network that trains now."""
    return heads[backbone.expert_folders[backbone.expert]] if isinstance(heads, nn.ModuleDict) else heads


def loss(
    config: Any, policy: Policy, won: Prediction, batch: dict[str, Tensor]
) -> tuple[Tensor, dict[str, Tensor]] | None:
    if won.features is None:
        return None
    batch = without_given(batch, won.features.shape[2])
    return physics_losses(config.physics, serving_heads(policy.heads, policy.backbone), won.features, batch)


def without_given(batch: dict[str, Tensor], num_frames: int) -> dict[str, Tensor]:
    """The batch with nothing to learn in the latent frames of a given prefix, of `num_frames` in all: points count as
    hidden there, and relation tokens that are read from there alone as absent. Of one given frame no track counts
    either way, and its tokens do."""
    given = Conditioning.of(batch).held_frames(num_frames)
    if given < 2:
        return batch
    batch = dict(batch)
    if "visible" in batch:
        batch["visible"] = batch["visible"].clone()  # (B,F',N)
        batch["visible"][:, :given] = False
    if "relation_grid" in batch:
        frames, rows, columns = batch["relation_grid"].unsqueeze(-1).unbind(1)  # (B,1)
        places = batch["relation_indices"] // (rows * columns)  # (B,K)
        latent = (places + 0.5) * num_frames / frames - 0.5  # as in `sample_trilinear`
        batch["relation_valid"] = batch["relation_valid"] & (latent > given - 1)
    return batch


def physics_losses(
    config: PhysicsConfig, heads: PhysicsHeads, features: Tensor, batch: dict[str, Tensor]
) -> tuple[Tensor, dict[str, Tensor]]:
    """trajectory L_pix + relational L_sem of every clip, (B,) float32, and metrics. features (B,D,F',H',W'); batch
    holds the tensors of `target_tensors`, stacked."""
    total, metrics = torch.zeros(len(features), device=features.device), {}
    if config.trajectory > 0:
        tracks, keep = batch["tracks"], batch["keep"]
        predicted = student_tracks(heads, features, tracks[:, 0])
        loss = trajectory_loss(predicted, tracks, keep, batch["visible"])
        total = total + config.trajectory * loss
        metrics |= {"pix": loss.detach().mean(), "kept": keep.float().mean()}
    if config.relational > 0:
        student = student_tokens(heads, features, batch["relation_grid"], batch["relation_indices"])
        loss = relational_loss(student, batch["relation_tokens"], batch["relation_valid"])
        total = total + config.relational * loss
        metrics |= {"sem": loss.detach().mean(), "relation_tokens": batch["relation_valid"].sum(1).float().mean()}
    return total, metrics


def student_tracks(heads: PhysicsHeads, features: Tensor, queries: Tensor) -> Tensor:
    """Where the network thinks that points (B,N,2) of the first frame go: (B,F',N,2), eqs. 5-7."""
    maps = heads("pix", features.permute(0, 2, 3, 4, 1))  # (B,F',H',W',C)
    return predict_tracks(maps.permute(0, 1, 4, 2, 3), queries)


def student_tokens(heads: PhysicsHeads, features: Tensor, grid: Tensor, indices: Tensor) -> Tensor:
    """The network's tokens at places of the teacher's grid: grid (B,3), indices (B,K) -> (B,K,C), eq. 9."""
    return heads("sem", sample_trilinear(features, grid, indices))


def sample_trilinear(features: Tensor, grid: Tensor, indices: Tensor) -> Tensor:
    """Some cells of `features` resampled to another grid: (B,D,F',H',W'), grid (B,3) its frames, rows and columns,
    indices (B,K) into it, flattened -> (B,K,D) in the features' dtype.

    Equal to `F.interpolate(mode="trilinear", align_corners=False)` and a gather, without ever making what is not asked.
    """
    batch, width, *sizes = features.shape
    tokens = features.flatten(2).transpose(1, 2)  # (B,F'H'W',D)
    _, rows, columns = (side.unsqueeze(1) for side in grid.unbind(1))  # (B,1)
    places = indices // (rows * columns), indices // columns % rows, indices % columns  # (B,K) each
    corners = torch.zeros(batch, indices.shape[1], 1, dtype=torch.long, device=features.device)
    weights = torch.ones(batch, indices.shape[1], 1, device=features.device)
    for place, side, size in zip(places, grid.unbind(1), sizes, strict=True):
        source = ((place + 0.5) * size / side.unsqueeze(1) - 0.5).clamp(min=0)
        lower = source.long().clamp(max=size - 1)
        upper = (lower + 1).clamp(max=size - 1)
        share = source - lower
        pair = torch.stack([lower, upper], dim=-1).unsqueeze(2)  # (B,K,1,2)
        shares = torch.stack([1 - share, share], dim=-1).unsqueeze(2)
        corners = (corners.unsqueeze(-1) * size + pair).flatten(2)  # (B,K,2), then 4, then 8
        weights = (weights.unsqueeze(-1) * shares).flatten(2)
    gathered = tokens.gather(1, corners.flatten(1).unsqueeze(-1).expand(-1, -1, width)).unflatten(1, corners.shape[1:])
    return torch.einsum("bkcd,bkc->bkd", gathered.float(), weights).to(features.dtype)


# ---- targets ---------------------------------------------------------------------------------------------------------


def missing(config: PhysicsConfig, extra: dict[str, Tensor]) -> list[str]:
    """What the terms need and `Group.extra` lacks."""
    return [key for weight, keys in KEYS.items() if getattr(config, weight) > 0 for key in keys if key not in extra]


def target_tensors(
    config: PhysicsConfig, extra: dict[str, Tensor], *, num_frames: int, max_tokens: int
) -> dict[str, Tensor]:
    """`Group.extra` in the shapes that batches need, for clips of `num_frames` latent frames F.

    tracks (F,N,2) float32, visible (F,N), keep (N,) bool; relation_tokens (Kmax,Dt), relation_indices (Kmax,) int64,
    relation_valid (Kmax,) bool, relation_grid (3,) int64, with Kmax = max_tokens. Raises ValueError for targets that
    are not as `train.teachers.targets` makes them, tracks of another length, or more tokens than that.
    """
    tensors = {}
    if config.trajectory > 0:
        shape = extra["tracks"].shape[:2]  # (T,N)
        _check_target(extra, "tracks", (*shape, 2), torch.uint16)
        _check_target(extra, "visible", shape, torch.bool)
        _check_target(extra, "keep", shape[1:], torch.bool)
        tracks, visible = (extra[name][::FRAMES_PER_LATENT] for name in ("tracks", "visible"))
        if len(tracks) != num_frames:
            raise ValueError(
                f"tracks over {len(extra['tracks'])} video frames do not fit {num_frames} latent frames: {AGAIN}"
            )
        keep = extra["keep"] if config.region_focus else torch.ones_like(extra["keep"])
        tensors |= {"tracks": unpack(tracks), "visible": visible, "keep": keep}
    if config.relational > 0:
        indices, grid = extra["relation_indices"], extra["relation_grid"]
        _check_target(extra, "relation_indices", (indices.numel(),), torch.int32)
        _check_target(extra, "relation_grid", (3,), torch.int32)
        _check_target(extra, "relation_tokens", (len(indices), *extra["relation_tokens"].shape[-1:]), torch.bfloat16)
        if (grid < 1).any() or ((indices < 0) | (indices >= grid.prod())).any():
            raise ValueError(f"relation_indices lie outside of the grid {tuple(grid.tolist())}: {AGAIN}")
        found = len(indices)
        if found > max_tokens:
            raise ValueError(f"a group has {found} relation tokens: set targets.max_tokens={found} or more")
        tensors |= {
            "relation_tokens": F.pad(extra["relation_tokens"], (0, 0, 0, max_tokens - found)),
            "relation_indices": F.pad(indices.long(), (0, max_tokens - found)),
            "relation_valid": torch.arange(max_tokens) < found,
            "relation_grid": grid.long(),
        }
    return tensors


def _check_target(extra: dict[str, Tensor], name: str, shape: Sequence[int], dtype: torch.dtype) -> None:
    tensor = extra[name]
    if tensor.shape != torch.Size(shape) or tensor.dtype != dtype:
        raise ValueError(
            f"{name} has shape {tuple(tensor.shape)} and {tensor.dtype}, not {tuple(shape)} and {dtype}: {AGAIN}"
        )


def prepare(config: Any, sample: Sample, generator: torch.Generator) -> dict[str, Tensor]:
    """`target_tensors` of the sample's group; empty without terms, and where they are to be made on the fly. ValueError
    for a group that lacks them, or has them in another form."""
    group = sample.group
    lacking = missing(config.physics, group.extra)
    if lacking and config.physics.on_the_fly:
        return {}
    if lacking:
        raise ValueError(f"group {group.key!r} lacks {', '.join(lacking)}: {REMEDY}")
    sizes = {"num_frames": group.winner.shape[1], "max_tokens": config.targets.max_tokens}
    try:
        return target_tensors(config.physics, group.extra, **sizes)
    except ValueError as error:
        raise ValueError(f"group {group.key!r}: {error}") from error


AGAIN = "build the targets again (pipeline.stage=targets..encode)"
REMEDY = (
    "the physics terms need them. Build the groups with targets.tracks (and targets.relation for physics.relational),"
    " or set physics.on_the_fly=true with them, or physics.trajectory=0 physics.relational=0"
)


def check(config: Any) -> None:
    """Refuse settings that cannot work, naming key, value and remedy."""
    physics = config.physics
    for name in ("trajectory", "relational"):
        value = getattr(physics, name)
        if not (value >= 0 and math.isfinite(value)):
            raise ValueError(f"physics.{name}={value}: must be 0 (no such term) or positive")
    if not physics.enabled:
        return
    if physics.sem_width < 1:
        raise ValueError(f"physics.sem_width={physics.sem_width}: must be at least 1")
    if not (physics.head_lr > 0 and config.optim.lr > 0):
        raise ValueError(f"physics.head_lr={physics.head_lr} with optim.lr={config.optim.lr}: both must be positive")
    if config.objective.winner == "generated":
        raise ValueError(
            "objective.winner=generated has no physics targets, which describe real clips: use objective.winner=real,"
            " or physics.trajectory=0 physics.relational=0"
        )


def lacks_targets(config: Any) -> bool:
    """Whether the terms are on and the folder's first group has no targets for them. Reads no weights.

    Raises ValueError where that cannot work: without `on_the_fly`, or where `targets` do not make what is needed.
    """
    physics, targets = config.physics, config.targets
    if not physics.enabled:
        return False
    first = GroupSet(config.train.groups)[0]
    lacking = missing(physics, first.extra)
    if not lacking:
        return False
    if not physics.on_the_fly:
        raise ValueError(
            f"the groups in {config.train.groups} lack {', '.join(lacking)} (group {first.key!r}): {REMEDY}"
        )
    if not targets.tracks:
        raise ValueError("physics.on_the_fly=true needs targets.tracks: set lucas_kanade or cotracker")
    if physics.relational > 0 and not targets.relation:
        raise ValueError("physics.on_the_fly=true with physics.relational needs targets.relation: set vjepa2")
    return True
