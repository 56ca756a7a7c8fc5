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
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from data_pipeline.gallery import CLIPS, choose, load_vae, write_gallery
from train import entry
from train.groups import Group, GroupSet, Loser, dtype_name, survey, tensors_of

BAR = 40  # characters of the longest bar
BINS = 10  # of a histogram
ACTIONS = 20  # lines of the action histogram; rarer ones share a line


@dataclass(frozen=True)
class Facts:
    """What the summary needs of one group."""

    action: str
    losers: list[Loser]
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
        return _report(survey(folder, _facts)[1])
    if html:  # both may fail, and reading all the groups takes long
        backbone = load_vae(model, groups)
        (html / CLIPS).mkdir(parents=True, exist_ok=True)
    print(describe(groups))
    with tqdm(total=groups.total_bytes, desc="reading", unit="B", unit_scale=True) as bar:
        facts, problems = survey(folder, _facts, bar.update)
    print(summarize(facts))
    if problems:
        return _report(problems)
    print(f"all {len(groups)} groups match their checksums")
    if html:
        page = write_gallery(html, groups, backbone, choose(len(groups), count, seed))
        print(f"gallery: {page}")
    return []


def _report(problems: list[str]) -> list[str]:
    print("\n".join(plain(problem) for problem in problems), file=sys.stderr)
    return problems


# ---- summary and check -----------------------------------------------------------------------------------------------


def _facts(group: Group) -> Facts:
    tensors = tensors_of(group).items()
    forms = {name: (dtype_name(tensor.dtype), tuple(tensor.shape)) for name, tensor in tensors}
    return Facts(group.action, group.losers_info, group.physics_richness, forms)


def describe(groups: GroupSet) -> str:
    """What the index alone says, in lines."""
    num_bytes = sum(sample["bytes"] for shard in groups.index["shards"] for sample in shard["samples"])
    lines = {
        "folder": groups.folder,
        "fingerprint": groups.fingerprint,
        **({"losers of": groups.network} if groups.network != groups.fingerprint else {}),
        "video": ", ".join(f"{name} {value}" for name, value in groups.video.items()),
        "latent shape": f"{groups.latent_shape} {dtype_name(groups.latent_dtype)}",
        "groups": len(groups),
        "shards": len(groups.index["shards"]),
        "bytes per group": f"{num_bytes / len(groups):.0f}",
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
    losers = sorted(Counter(len(one.losers) for one in facts).items())
    parts = [
        "\n".join(lines),
        bars("action", actions),
        bars("losers per group", losers),
        histogram("semantic score", [loser.semantic for one in facts for loser in one.losers], 0.0, 1.0),
        histogram("physical score", [loser.physical for one in facts for loser in one.losers], 0.0, 1.0),
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
    """A line per name, with a bar as long as its share of the most frequent."""
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


if __name__ == "__main__":
    entry.run(main)
