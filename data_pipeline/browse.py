"""Look into a folder of preference groups: what it holds, whether it is whole, and how its clips look.

    python -m data_pipeline.browse runs/wan14b/groups
    python -m data_pipeline.browse runs/wan14b/groups --html gallery --model Wan-AI/Wan2.1-T2V-14B-Diffusers --count 24

Prints the schema, counts and histograms, and checks every checksum: the groups are read once for both. The exit status
is 1 where something is missing or damaged (each problem is a line that names the sample and the remedy), 2 for options
that cannot work.

With --html it also writes a page for any browser, without a network or a server; the folder can be copied as it is:

    <folder>/index.html
    <folder>/clips/<key>-<digest>-<clip>.mp4    clip: winner, loser-0, ... and tracks: the winner with its points drawn

The clips are decoded from their latents by the VAE of --model, which must be the model that made the groups. The digest
is the group's: a clip that exists is up to date and is not decoded again.

Groups may come from anywhere: their texts are escaped on the page and in the terminal, and only keys that
`train.groups.GroupSet` lets pass become file names.
"""

import argparse
import json
import os
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor
from tqdm import tqdm

from train import entry
from train.backbones import BACKBONES, load_backbone
from train.backbones.base import Backbone, BackboneConfig
from train.clips import to_pixels, write_clip
from train.files import render as render_page
from train.files import write_bytes
from train.groups import INDEX, Group, GroupSet, verify
from train.teachers.points import unpack

TEMPLATE = Path(__file__).with_name("gallery.html")
CLIPS = "clips"  # folder beside the page
BAR = 40  # characters of the longest bar
BINS = 10  # of a histogram
ACTIONS = 20  # lines of the action histogram; rarer ones share a line
TAIL = 5  # frames that a kept point's tail reaches back
SHARP = 256  # pixels; the tracks of a lower clip are drawn on one enlarged to about this height
KEPT, OTHER, EDGE = (255, 220, 0), (120, 120, 120), (0, 0, 0)  # RGB of points, and around kept ones


@dataclass(frozen=True)
class Facts:
    """What the summary needs of one group."""

    action: str
    num_losers: int
    semantic: list[float]  # of each loser, in [0, 1]
    physical: list[float]
    physics_richness: float | None
    tensors: dict[str, tuple[str, tuple[int, ...]]]  # name -> dtype, shape


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m data_pipeline.browse", description="Summary, check and gallery of preference groups."
    )
    parser.add_argument("groups", type=Path, metavar="GROUPS", help="folder with index.json and the shards")
    parser.add_argument("--html", type=Path, metavar="FOLDER", help="write a gallery there; needs --model")
    parser.add_argument("--model", metavar="PIPELINE", help="hub id or folder of the pipeline that made the groups")
    parser.add_argument("--count", type=int, default=24, help="groups in the gallery")
    parser.add_argument("--seed", type=int, default=0, help="of the choice of groups; a larger count adds to a smaller")
    options = parser.parse_args(argv)
    if (options.html is None) != (options.model is None):
        parser.error("--html and --model go together: the gallery needs the VAE of the model that made the groups")
    if options.count < 1:
        parser.error(f"--count {options.count}: give 1 or more")
    try:
        problems = browse(options.groups, options.html, options.model, count=options.count, seed=options.seed)
    except (ValueError, OSError) as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")
    if problems:
        sys.exit(1)


def browse(folder: Path, html: Path | None, model: str | None, *, count: int, seed: int) -> list[str]:
    """Print the summary, check everything and write the gallery; the problems found, which are printed as well.

    With a problem there is no gallery. Raises ValueError for a model that did not make the groups or has no VAE, and
    OSError where the gallery cannot be written.
    """
    try:
        groups = GroupSet(folder)
    except ValueError:  # it names the first problem only
        return _report(verify(folder))
    if html:  # both may fail, and reading all the groups takes long
        backbone = load_vae(model, groups)
        (html / CLIPS).mkdir(parents=True, exist_ok=True)
    index = json.loads((folder / INDEX).read_bytes())
    print(describe(groups, index))
    facts, problems = survey(groups, index)
    print(summarize(facts))
    if problems:
        return _report(problems)
    print(f"all {len(groups)} groups match their checksums")
    if html:
        page = write_gallery(html, groups, index, backbone, choose(len(groups), count, seed))
        print(f"gallery: {page}")
    return []


def _report(problems: list[str]) -> list[str]:
    print("\n".join(plain(problem) for problem in problems), file=sys.stderr)
    return problems


# ---- summary and check -----------------------------------------------------------------------------------------------


def survey(groups: GroupSet, index: Mapping[str, Any]) -> tuple[list[Facts], list[str]]:
    """The facts of every group that is whole, and one line for each problem, as from `train.groups.verify`.

    One pass for both, for the data may be terabytes. It covers every byte: samples follow each other without a gap, and
    behind the last one a shard holds zeros.
    """

    def read(number: int) -> Facts | str:
        try:
            return _facts(groups[number])
        except ValueError as error:
            return str(error)

    samples = [sample for shard in index["shards"] for sample in shard["samples"]]
    facts, problems = [], []
    bar = tqdm(total=groups.total_bytes, desc="reading", unit="B", unit_scale=True)
    with bar, ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # hashing and reading let go of Python's lock
        for sample, found in zip(samples, pool.map(read, range(len(groups))), strict=True):
            (problems if isinstance(found, str) else facts).append(found)
            bar.update(sample["bytes"])
        for shard in index["shards"]:
            size = sum(sample["bytes"] for sample in shard["samples"])
            with open(groups.folder / shard["file"], "rb") as file:
                file.seek(size)
                if any(file.read()):
                    name = shard["file"]
                    problems.append(f"{groups.folder / name} is damaged behind its samples; delete it and build again")
            bar.update(shard["bytes"] - size)
    return facts, problems


def _facts(group: Group) -> Facts:
    tensors = {"winner": group.winner, "losers": group.losers, "text": group.text}
    tensors |= {} if group.condition is None else {"condition": group.condition}
    tensors |= {f"extra.{name}": tensor for name, tensor in group.extra.items()}
    return Facts(
        action=group.action,
        num_losers=len(group.losers),
        semantic=[loser.semantic for loser in group.losers_info],
        physical=[loser.physical for loser in group.losers_info],
        physics_richness=group.physics_richness,
        tensors={name: (_dtype(tensor.dtype), tuple(tensor.shape)) for name, tensor in tensors.items()},
    )


def _dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def describe(groups: GroupSet, index: Mapping[str, Any]) -> str:
    """What the index alone says, in lines."""
    num_bytes = sum(sample["bytes"] for shard in index["shards"] for sample in shard["samples"])
    lines = {
        "folder": groups.folder,
        "fingerprint": groups.fingerprint,
        "video": ", ".join(f"{name} {value}" for name, value in groups.video.items()),
        "latent shape": f"{groups.latent_shape} {_dtype(groups.latent_dtype)}",
        "groups": len(groups),
        "shards": len(index["shards"]),
        "bytes a group": f"{num_bytes / len(groups):.0f}",
        "bytes in all": groups.total_bytes,
    }
    return "\n".join(f"{name:<16}{plain(str(value))}" for name, value in lines.items())


def summarize(facts: Sequence[Facts]) -> str:
    """Tensors and histograms of all groups, as text."""
    if not facts:
        return "no group can be read"
    by_name: dict[str, list[tuple[str, tuple[int, ...]]]] = {}
    for one in facts:
        for name, form in one.tensors.items():
            by_name.setdefault(name, []).append(form)
    lines = ["", "tensors"]
    for name, forms in by_name.items():
        dtypes = "/".join(sorted({dtype for dtype, _ in forms}))
        lines.append(f"  {plain(name):<18} {dtypes:<9} {_shapes([shape for _, shape in forms])}, {len(forms)} groups")
    actions = Counter(one.action for one in facts).most_common()
    if rare := actions[ACTIONS:]:
        actions = [*actions[:ACTIONS], (f"({len(rare)} more)", sum(count for _, count in rare))]
    richness = [one.physics_richness for one in facts if one.physics_richness is not None]
    losers = sorted(Counter(one.num_losers for one in facts).items())
    parts = [
        "\n".join(lines),
        bars("action", actions),
        bars("losers a group", losers),
        histogram("semantic score", [score for one in facts for score in one.semantic], 0.0, 1.0),
        histogram("physical score", [score for one in facts for score in one.physical], 0.0, 1.0),
        histogram("physics richness", richness, min(richness, default=0.0), max(richness, default=0.0)),
    ]
    return "\n\n".join(parts) + "\n"


def _shapes(shapes: Sequence[tuple[int, ...]]) -> str:
    """One text for all: sizes that differ as smallest..largest."""
    if len({len(shape) for shape in shapes}) > 1:
        return " or ".join(str(shape) for shape in sorted(set(shapes)))
    ranges = [(min(sizes), max(sizes)) for sizes in zip(*shapes, strict=True)]
    sizes = [str(least) if least == most else f"{least}..{most}" for least, most in ranges]
    return f"({', '.join(sizes)})"


def bars(title: str, counts: Sequence[tuple[Any, int]]) -> str:
    """A line a name, with a bar as long as its share of the most frequent."""
    names = [plain(str(name)) for name, _ in counts]
    width, most = max(map(len, names)), max(count for _, count in counts)
    lines = [
        f"  {name:>{width}}  {'#' * -(-BAR * count // most):<{BAR}}  {count}"
        for name, (_, count) in zip(names, counts, strict=True)
    ]
    return "\n".join([title, *lines])


def histogram(title: str, values: Sequence[float], low: float, high: float) -> str:
    """Ten equal bins from low to high, the last one closed."""
    if not values:
        return f"{title}: none"
    title = f"{title}: {len(values)} values, mean {sum(values) / len(values):.3f}"
    if low == high:
        return f"{title}, all {low:g}"
    counts, edges = np.histogram(values, bins=BINS, range=(low, high))
    return bars(title, [(f"{edge:.2f}", int(count)) for edge, count in zip(edges[:-1], counts, strict=True)])


def plain(text: str) -> str:
    """Text for a terminal: what is not printable (control sequences, direction marks) as an escape."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


# ---- gallery ---------------------------------------------------------------------------------------------------------


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
    if backbone.fingerprint != groups.fingerprint:
        raise ValueError(
            f"the groups in {groups.folder} were built with backbone {groups.fingerprint}, but --model {model} is"
            f" {backbone.fingerprint}: give the pipeline that built them"
        )
    return backbone


def choose(num_groups: int, count: int, seed: int) -> list[int]:
    """Numbers of `count` groups, or of all, in ascending order; the choice for a larger count contains a smaller's."""
    order = torch.randperm(num_groups, generator=torch.Generator().manual_seed(seed))
    return sorted(order[:count].tolist())


def write_gallery(
    folder: Path, groups: GroupSet, index: Mapping[str, Any], backbone: Backbone, numbers: Sequence[int]
) -> Path:
    """Decode the clips that are missing, then write the page, which is returned."""
    digests = [sample["sha256"] for shard in index["shards"] for sample in shard["samples"]]
    cards = []
    for number in tqdm(numbers, desc="gallery", unit="group"):
        group = groups[number]
        clips = write_clips(folder / CLIPS, group, digests[number], backbone, groups.video["fps"])
        cards.append(_card(group, {name: f"{CLIPS}/{path.name}" for name, path in clips.items()}))
    page = folder / "index.html"
    _write_page(page, render(groups, cards))
    return page


def _write_page(page: Path, text: str) -> None:
    write_bytes(page, text.encode("utf-8", errors="xmlcharrefreplace"))  # JSON may hold lone surrogates


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
            _dot(draw, centres[time][point], radius // 2, OTHER)
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
            _dot(draw, centres[time][point], radius + 1, EDGE)
            _dot(draw, centres[time][point], radius, KEPT)
        drawn.append(torch.from_numpy(np.array(image)))
    return torch.stack(drawn)


def _dot(draw: ImageDraw.ImageDraw, centre: Sequence[int], radius: int, colour: tuple[int, int, int]) -> None:
    x, y = centre
    draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=colour)


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


def render(groups: GroupSet, cards: Sequence[Mapping[str, Any]]) -> str:
    """The page. Every value is escaped, attributes are always quoted, no value stands inside a script."""
    return render_page(
        TEMPLATE,
        name="/".join(groups.folder.resolve().parts[-2:]),
        fingerprint=groups.fingerprint,
        video=groups.video,
        num_groups=len(groups),
        actions=sorted({card["action"] for card in cards}),
        cards=cards,
    )


if __name__ == "__main__":
    entry.run(main)
