"""The gallery of `data_pipeline.browse`: the clips of groups, decoded from their latents, on one page."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor
from tqdm import tqdm

from train.backbones import BACKBONES, load_backbone
from train.backbones.base import Backbone, BackboneConfig
from train.clips import to_pixels, write_clip
from train.files import render, write_bytes
from train.groups import INDEX, Group, GroupSet
from train.teachers.points import unpack

TEMPLATE = Path(__file__).with_name("gallery.html")
CLIPS = "clips"  # folder beside the page
TAIL = 5  # frames that a kept point's tail reaches back
SHARP = 256  # pixels; the tracks of a lower clip are drawn on one enlarged to about this height
KEPT, OTHER, EDGE = (255, 220, 0), (120, 120, 120), (0, 0, 0)  # RGB of points, and around kept ones


def load_vae(model: str, groups: GroupSet) -> Backbone:
    """The backbone that made `groups`, its VAE alone; ValueError where `model` is another one or has none."""
    if lacking := {"height", "width", "num_frames", "fps"} - set(groups.video):
        raise ValueError(f"{groups.folder / INDEX} lacks video.{min(lacking)}, which the gallery needs: build it again")
    family = groups.fingerprint.rpartition("-")[0]
    if family not in BACKBONES:
        raise ValueError(
            f"the groups in {groups.folder} were built with {groups.fingerprint}, which is no pipeline with a VAE:"
            " leave out --html and --model"
        )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        backbone = load_backbone(BackboneConfig(family=family, path=model), device, parts=("vae",))
    except ValueError as error:
        raise ValueError(f"--model {model} cannot decode the groups of {groups.fingerprint}: {error}") from error
    if groups.fingerprint not in backbone.group_fingerprints:
        raise ValueError(
            f"the groups in {groups.folder} were built with backbone {groups.fingerprint}, but --model {model} is"
            f" {backbone.fingerprint}: give the pipeline that built them"
        )
    return backbone


def choose(num_groups: int, count: int, seed: int) -> list[int]:
    """Numbers of `count` groups, or of all, in ascending order; the choice for a larger count contains a smaller's."""
    order = torch.randperm(num_groups, generator=torch.Generator().manual_seed(seed))
    return sorted(order[:count].tolist())


def write_gallery(folder: Path, groups: GroupSet, backbone: Backbone, numbers: Sequence[int]) -> Path:
    """Decode the clips that are missing, then write the page, which is returned."""
    digests = [sample["sha256"] for shard in groups.index["shards"] for sample in shard["samples"]]
    cards = []
    for number in tqdm(numbers, desc="gallery", unit="group"):
        group = groups[number]
        clips = write_clips(folder / CLIPS, group, digests[number], backbone, groups.video["fps"])
        cards.append(_card(group, {name: f"{CLIPS}/{path.name}" for name, path in clips.items()}))
    return write_page(folder / "index.html", groups, cards)


@torch.no_grad()
def write_clips(folder: Path, group: Group, digest: str, backbone: Backbone, fps: float) -> dict[str, Path]:
    """Decode and write the clips that are missing; the files of all by name: winner, tracks, loser-0 ..."""
    latents = {"winner": group.winner, **{f"loser-{number}": loser for number, loser in enumerate(group.losers)}}
    names = [*latents, *(["tracks"] if "tracks" in group.extra else [])]
    clips = {name: folder / f"{group.key}-{digest[:16]}-{name}.mp4" for name in names}
    missing = {name for name, path in clips.items() if not path.exists()}
    for name, latent in latents.items():
        drawn = name == "winner" and "tracks" in missing
        if name in missing or drawn:
            frames = to_pixels(backbone.decode_latents(latent[None]))[0].cpu()  # (T, H, W, 3)
        if name in missing:
            write_clip(clips[name], frames, fps)
        if drawn:
            write_clip(clips["tracks"], draw_tracks(frames, *tracks_of(group, len(frames))), fps)
    return clips


def tracks_of(group: Group, num_frames: int) -> tuple[Tensor, Tensor, Tensor]:
    """The winner's tracks (T, N, 2) in [0, 1], visible (T, N) and keep (N,) bool, from what data_pipeline.targets made.

    Raises ValueError where they are none of a clip of T frames.
    """
    stored = group.extra["tracks"]
    num_points = stored.shape[1] if stored.ndim == 3 else 0
    wanted = {
        "tracks": ((num_frames, num_points, 2), torch.uint16),
        "visible": ((num_frames, num_points), torch.bool),
        "keep": ((num_points,), torch.bool),
    }
    for name, form in wanted.items():
        tensor = group.extra.get(name)
        found = None if tensor is None else (tuple(tensor.shape), tensor.dtype)
        if found != form:
            raise ValueError(
                f"group {group.key!r}: extra {name!r} is {found}, not {form} as for these tracks in a clip of"
                f" {num_frames} frames: build the group again"
            )
    return unpack(stored), group.extra["visible"], group.extra["keep"]


def draw_tracks(frames: Tensor, tracks: Tensor, visible: Tensor, keep: Tensor) -> Tensor:
    """Frames (T, H, W, 3) uint8 with their points: kept ones bright with a tail, others small and dim, hidden ones not.

    tracks (T, N, 2): x and y in [0, 1], from the outer edge of the first pixel to that of the last. visible (T, N),
    keep (N,) bool. A low clip is enlarged, each pixel into k x k, so that the points hide less of it.
    """
    scale = max(1, round(SHARP / frames.shape[1]))
    frames = frames.repeat_interleave(scale, dim=1).repeat_interleave(scale, dim=2)
    _, height, width, _ = frames.shape
    shown = visible & ((tracks >= 0) & (tracks <= 1)).all(dim=2)  # also bars the numbers that PIL cannot take
    centres = (tracks.clamp(0, 1) * torch.tensor([width, height]) - 0.5).nan_to_num().round().int().tolist()  # pixels
    radius = max(2, round(height / 120))
    drawn = []
    for time, pixels in enumerate(frames):
        image = Image.fromarray(pixels.numpy())
        draw = ImageDraw.Draw(image)
        for point in (shown[time] & ~keep).nonzero().flatten().tolist():
            draw.circle(centres[time][point], radius // 2, fill=OTHER)
        kept = (shown[time] & keep).nonzero().flatten().tolist()
        for point in kept:
            tail = [centres[time][point]]
            for earlier in range(time - 1, max(time - TAIL, 0) - 1, -1):
                if not shown[earlier, point]:
                    break
                tail.append(centres[earlier][point])
            corners = [tuple(centre) for centre in tail]
            draw.line(corners, fill=EDGE, width=radius + 1)
            draw.line(corners, fill=KEPT, width=radius - 1)
        for point in kept:
            draw.circle(centres[time][point], radius + 1, fill=EDGE)
            draw.circle(centres[time][point], radius, fill=KEPT)
        drawn.append(torch.from_numpy(np.array(image)))
    return torch.stack(drawn)


def _card(group: Group, clips: Mapping[str, str]) -> dict[str, Any]:
    """What the template shows of a group; `clips` are addresses relative to the page."""
    losers = group.losers_info
    return {
        "key": group.key,
        "prompt": group.prompt,
        "action": str(group.action),
        "source": group.source,
        "richness": group.physics_richness,
        "semantic": sum(loser.semantic for loser in losers) / len(losers) if losers else None,
        "physical": sum(loser.physical for loser in losers) / len(losers) if losers else None,
        "clips": clips,
        "losers": losers,
    }


def write_page(page: Path, groups: GroupSet, cards: Sequence[Mapping[str, Any]]) -> Path:
    """Every value on the page is escaped: jinja2's autoescape, attributes always quoted, no value in a script."""
    text = render(
        TEMPLATE,
        name="/".join(groups.folder.resolve().parts[-2:]),
        fingerprint=groups.fingerprint,
        video=groups.video,
        num_groups=len(groups),
        actions=sorted({card["action"] for card in cards}),
        cards=cards,
    )
    write_bytes(page, text.encode("utf-8", errors="xmlcharrefreplace"))  # JSON may hold lone surrogates
    return page
