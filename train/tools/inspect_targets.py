"""A picture of a group's physics targets, and of what a trained network makes of them: look before you train.

    python -m train.tools.inspect_targets recipe=sandbox                        # the first group of runs/sandbox/groups
    python -m train.tools.inspect_targets recipe=runs/mine/train/recipe.yaml inspect.key=group-000003 \\
        inspect.checkpoint=runs/mine/train                                   # beside the student's tracks and relations

The picture is `<output>/targets.png`. Frames are decoded from the winner's latent. Tracks of kept points are coloured,
from dark for the highest in the first frame to bright, the others grey; a point is drawn only while it is visible. With
a checkpoint that has heads (`train.terms.physics`) the last row shows where the network thinks that the kept points go,
at t = 0.5, and both relation matrices.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

import recipes
from losses.flow_matching import interpolate
from losses.relational import cosines
from train import checkpoint, entry, files, gdpo
from train.backbones import load_backbone
from train.backbones.base import BOTH, Backbone, Conditioning
from train.backbones.conditioning import pad_texts
from train.clips import to_pixels
from train.data import Sample
from train.groups import Group, GroupSet, told
from train.teachers.points import unpack
from train.terms.physics import build_heads, feature_block, prepare, serving_heads, student_tokens, student_tracks

FRAMES = 4  # columns of the first row
LEVEL = 0.5  # the time t at which the network looks at the clip


@dataclass
class InspectConfig:
    key: str = ""  # of the group; empty: the first
    checkpoint: str = ""  # a checkpoint folder or a training folder; empty: the targets alone


@dataclass
class Config(gdpo.Config):
    inspect: InspectConfig = field(default_factory=InspectConfig)


def find_group(groups: GroupSet, key: str) -> Group:
    """The group of that key, or the first. ValueError for a key that no group has, and for a group without tracks."""
    group = next((group for group in groups if not key or group.key == key), None)
    if group is None:
        raise ValueError(f"inspect.key={key!r}: no group of {groups.folder} has it; the first is {groups[0].key!r}")
    if "tracks" not in group.extra:
        raise ValueError(f"group {group.key!r} has no physics targets: build the groups with targets.tracks")
    return group


@torch.no_grad()
def student(config: Config, backbone: Backbone, group: Group) -> dict[str, Tensor]:
    """What the checkpoint's network and heads make of the group: tracks (F,N,2) and tokens (K,C), each where there is a
    head for it. Empty without a checkpoint."""
    if not config.inspect.checkpoint:
        return {}
    path = checkpoint.weights_path(config.inspect.checkpoint)
    checkpoint.attach_trained(path, backbone.experts, fingerprint=backbone.fingerprint)
    backbone.serve(torch.tensor([LEVEL]))
    heads = build_heads(config, backbone)
    if heads is None:
        raise ValueError(
            f"inspect.checkpoint={config.inspect.checkpoint} needs the physics section that it was trained with: pass"
            " recipe=<its folder>/recipe.yaml"
        )
    checkpoint.load_heads(path.parent, heads)
    heads = serving_heads(heads, backbone)

    def batch(tensor: Tensor) -> Tensor:
        return tensor[None].to(backbone.device)

    prepared = prepare(config, Sample(0, group, 0), torch.Generator())
    targets = {name: batch(tensor) for name, tensor in prepared.items()}
    clean, lengths = batch(group.winner).float(), backbone.text_lengths(backbone.text_length)
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(config.seed)).to(clean)
    t = torch.full((1,), LEVEL, device=clean.device)
    conditioning = Conditioning.of({name: batch(value) for name, value in pad_texts(told(group), lengths).items()})
    block = feature_block(config.physics, len(backbone.blocks))
    _, features = backbone.velocity(interpolate(clean, noise, t), t, conditioning, features_at=block)
    made = {}
    if config.physics.trajectory > 0:
        made["tracks"] = student_tracks(heads, features, targets["tracks"][:, 0])[0].cpu()
    if config.physics.relational > 0:
        tokens = student_tokens(heads, features, targets["relation_grid"], targets["relation_indices"])
        made["tokens"] = tokens[0, targets["relation_valid"][0]].cpu()
    return made


def draw(group: Group, frames: Tensor, made: dict[str, Tensor]) -> Figure:
    """The picture: group with targets, its decoded frames (T,H,W,3) uint8, and what `student` gave."""
    extra, tracks = group.extra, unpack(group.extra["tracks"])
    keep, visible = extra["keep"], extra["visible"]
    rows = 3 if made else 2
    figure = Figure(figsize=(4 * FRAMES, 4 * rows), layout="constrained")
    figure.suptitle(f"{group.key}: {group.prompt}\n{int(keep.sum())} of {len(keep)} points kept", fontsize=11)
    axes = figure.subplots(rows, FRAMES)
    for axis, frame in zip(axes[0], torch.linspace(0, len(frames) - 1, FRAMES).round().long().tolist(), strict=True):
        show(axis, frames[frame], f"frame {frame}: tracks up to here")
        draw_paths(axis, tracks[: frame + 1], visible[: frame + 1], ~keep, frames.shape, grey=True)
        draw_paths(axis, tracks[: frame + 1], visible[: frame + 1], keep, frames.shape)
    scatter(axes[1, 0], frames, tracks[0, keep], "kept points")
    if "disparity" in extra:
        scatter(axes[1, 1], frames, tracks[0], "disparity: near is bright", extra["disparity"].float())
    else:
        show(axes[1, 1], frames[0], "disparity: none stored")
    scatter(axes[1, 2], frames, tracks[0], "visible in how many frames", visible.float().mean(dim=0))
    axes[1, 3].set_axis_off()
    if "relation_indices" in extra:
        grid = extra["relation_grid"].tolist()
        counts = torch.bincount(extra["relation_indices"] % (grid[1] * grid[2]), minlength=grid[1] * grid[2])
        title = f"{len(extra['relation_indices'])} relation tokens, summed over time"
        matrix(axes[1, 3], counts.unflatten(0, grid[1:]), title)
    if made:
        draw_student(axes[2], group, frames, made)
    return figure


def draw_student(axes: Any, group: Group, frames: Tensor, made: dict[str, Tensor]) -> None:
    """The last row: reference and predicted tracks of the kept points, teacher's and student's relation matrix."""
    keep, visible = group.extra["keep"], group.extra["visible"]
    reference = unpack(group.extra["tracks"])
    for axis in axes:
        axis.set_axis_off()
    if "tracks" in made:
        stride = (len(frames) - 1) // max(len(made["tracks"]) - 1, 1)
        reference, visible = reference[::stride], visible[::stride]
        apart = (made["tracks"] - reference).norm(dim=-1)[1:][(keep & visible)[1:]].mean()
        titles = "reference tracks", f"predicted tracks, {apart:.3f} sides apart"
        for axis, paths, title in zip(axes[:2], (reference, made["tracks"]), titles, strict=True):
            show(axis, frames[0], title)
            draw_paths(axis, paths, visible, keep, frames.shape)
    if "tokens" in made:
        teacher = cosines(group.extra["relation_tokens"].float()[None])[0]
        ours = cosines(made["tokens"][None])[0]
        matrix(axes[2], teacher, "teacher's relations", vmin=-1, vmax=1)
        matrix(axes[3], ours, f"student's, {(ours - teacher).abs().mean():.3f} apart", vmin=-1, vmax=1)


def show(axis: Axes, frame: Tensor, title: str) -> None:
    axis.imshow(frame.numpy())
    axis.autoscale(False)  # what leaves the frame is not drawn
    axis.set_title(title, fontsize=9)
    axis.set_axis_off()


def draw_paths(
    axis: Axes, tracks: Tensor, visible: Tensor, chosen: Tensor, shape: torch.Size, *, grey: bool = False
) -> None:
    """Paths of the chosen points: tracks (T,N,2), visible (T,N), chosen (N,); `shape` of the frames (T,H,W,3)."""
    size = torch.tensor([shape[2], shape[1]])
    pixels = torch.where(visible.unsqueeze(-1), tracks * size - 0.5, torch.nan)[:, chosen]  # pixel i: centre at i
    x, y = pixels.unbind(-1)  # (T,N)
    if grey:
        axis.plot(x, y, color="0.6", alpha=0.4, linewidth=0.5)
    elif chosen.any():
        axis.set_prop_cycle(color=colormaps["plasma"](torch.linspace(0, 1, x.shape[1])))
        axis.plot(x, y, linewidth=1)
        axis.plot(x[-1:], y[-1:], ".", markersize=4)


def scatter(axis: Axes, frames: Tensor, points: Tensor, title: str, values: Tensor | None = None) -> None:
    """Points (N,2) on the first frame, coloured by values (N,) in [0, 1] where there are any."""
    show(axis, frames[0], title)
    x, y = (points * torch.tensor([frames.shape[2], frames.shape[1]]) - 0.5).unbind(-1)
    if values is None:
        axis.scatter(x, y, c="tab:red", s=8)
    else:
        drawn = axis.scatter(x, y, c=values, s=8, vmin=0, vmax=1, cmap="magma")
        axis.figure.colorbar(drawn, ax=axis, shrink=0.7)


def matrix(axis: Axes, values: Tensor, title: str, **options) -> None:
    axis.set(xticks=[], yticks=[])
    axis.set_axis_on()
    axis.set_title(title, fontsize=9)
    axis.figure.colorbar(axis.imshow(values, interpolation="nearest", **options), ax=axis, shrink=0.7)


def main(argv: list[str] | None = None) -> None:
    config = recipes.load(Config, argv)
    group = find_group(GroupSet(config.train.groups), config.inspect.key)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    networks = ("transformer",) if config.backbone.expert == BOTH else ("expert",)
    parts = (*networks, "vae") if config.inspect.checkpoint else ("vae",)
    backbone = load_backbone(config.backbone, device, parts=parts)
    with torch.no_grad():
        frames = to_pixels(backbone.decode_latents(group.winner[None]))[0].cpu()
    figure = draw(group, frames, student(config, backbone, group))
    path = Path(config.output) / "targets.png"
    with files.atomic(path) as aside:
        figure.savefig(aside, format="png", dpi=110)
    print(f"wrote {path}")


if __name__ == "__main__":
    entry.run(main)
