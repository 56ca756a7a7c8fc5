"""Random preference groups, written with the real writer: inputs for tests and for speed runs.

    python tests/synthetic_groups.py --folder groups --num-groups 16 --latent 16,21,60,104 --text 512,4096 \\
        --fingerprint wan21-random-14B
"""

import argparse
import hashlib
import io
import json
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from train.groups import Group, Loser, ShardWriter, survey, write_index
from train.teachers.points import pack, query_grid


def synthetic_group(
    number: int,
    *,
    num_losers: int,
    latent_shape: Sequence[int],
    text_shape: Sequence[int],
    fingerprint: str,
    seed: int,
    targets: bool = False,
) -> Group:
    """Group `number` of the stream of `seed`: standard normal latents (C, F, H, W) and text (L', D), uniform scores.

    targets: also `random_targets`; everything else is the same without.
    """
    generator = torch.Generator().manual_seed(seed * 1_000_003 + number)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).bfloat16()

    scores = torch.rand(num_losers, 2, generator=generator).tolist()
    return Group(
        key=f"group-{number:06d}",
        prompt=f"a ball number {number} falls",
        action="falling",
        physics_richness=float(torch.rand((), generator=generator)),
        source=f"synthetic {number} at 0.0 s",
        losers_info=[Loser(index, semantic, physical) for index, (semantic, physical) in enumerate(scores)],
        fingerprint=fingerprint,
        winner=normal(*latent_shape),
        losers=normal(num_losers, *latent_shape),
        text=normal(*text_shape),
        extra=random_targets(latent_shape[1], seed * 1_000_003 + number) if targets else {},
    )


def verify(folder: str | Path) -> list[str]:
    """A line for each problem of a folder of groups."""
    return survey(folder, lambda group: None)[1]


def random_targets(num_frames: int, seed: int) -> dict[str, torch.Tensor]:
    """Physics targets of a clip of `num_frames` latent frames, as train/teachers/targets.py makes them: 25 points on
    straight random paths, some invisible or not kept, and 3 to 12 tokens of width 24 of a 3 x 5 x 4 grid."""
    generator = torch.Generator().manual_seed(seed)
    time = torch.linspace(0, 1, 4 * (num_frames - 1) + 1)[:, None, None]
    goal = torch.rand(25, 2, generator=generator)
    tracks = (1 - time) * query_grid(5) + time * goal
    count = 3 + int(torch.randint(10, (), generator=generator))
    return {
        "tracks": pack(tracks),
        "visible": torch.rand(len(tracks), 25, generator=generator) > 0.2,
        "keep": torch.rand(25, generator=generator) > 0.5,
        "relation_tokens": torch.randn(count, 24, generator=generator).bfloat16(),
        "relation_indices": torch.randperm(60, generator=generator)[:count].sort().values.int(),
        "relation_grid": torch.tensor([3, 5, 4], dtype=torch.int32),
    }


def write_synthetic_groups(
    folder: str | Path,
    *,
    num_groups: int,
    num_losers: int | Sequence[int] = 2,
    latent_shape: Sequence[int] = (4, 2, 4, 4),
    text_shape: Sequence[int] = (5, 8),
    fingerprint: str = "tiny-random",
    seed: int = 0,
    samples_per_shard: int = 4,
    spatial_scale: int = 8,
    targets: bool = False,
) -> dict[str, Any]:
    """Writes `num_groups` groups and their index, which it returns.

    num_losers: of every group, or one number for each. latent_shape: (C, F, H, W). text_shape: (L', D).
    spatial_scale: pixels per latent cell, only for the video size that the index names. targets: with random physics
    targets.
    """
    losers = [num_losers] * num_groups if isinstance(num_losers, int) else list(num_losers)

    def groups(numbers: range) -> Iterator[Group]:
        for number in numbers:
            yield synthetic_group(
                number,
                num_losers=losers[number],
                latent_shape=latent_shape,
                text_shape=text_shape,
                fingerprint=fingerprint,
                seed=seed,
                targets=targets,
            )

    for shard, first in enumerate(range(0, num_groups, samples_per_shard)):
        with ShardWriter(folder, f"shard-{shard:05d}") as writer:
            for group in groups(range(first, min(first + samples_per_shard, num_groups))):
                writer.write(group)
    _, frames, rows, columns = latent_shape
    size = {"height": rows * spatial_scale, "width": columns * spatial_scale, "num_frames": 4 * (frames - 1) + 1}
    return write_index(folder, fingerprint=fingerprint, video={**size, "fps": 16.0})


def sample_bytes(description: bytes | None, tensors: bytes | None) -> bytes:
    """A tar sample with these members, whatever they hold, without the end of the archive."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for name, data in (("k.json", description), ("k.safetensors", tensors)):
            if data is not None:
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
        size = tar.offset
    return buffer.getvalue()[:size]


def replace_sample(folder: Path, data: bytes) -> None:
    """Make `data` the only sample of the only shard of `folder`, with all checksums anew: what another program, or
    somebody with bad intent, might write."""
    index = json.loads((folder / "index.json").read_bytes())
    (shard,) = index["shards"]
    (sample,) = shard["samples"]
    whole = data + bytes(1024)
    sample |= {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    shard |= {"bytes": len(whole), "sha256": hashlib.sha256(whole).hexdigest()}
    index["total_bytes"] = len(whole)
    (folder / shard["file"]).write_bytes(whole)
    (folder / "index.json").write_text(json.dumps(index), encoding="utf-8")


def main() -> None:
    def shape(text: str) -> tuple[int, ...]:
        return tuple(int(size) for size in text.split(","))

    parser = argparse.ArgumentParser(description="Writes random preference groups for speed runs.")
    parser.add_argument("--folder", required=True)
    parser.add_argument("--num-groups", type=int, default=8)
    parser.add_argument("--num-losers", type=int, default=1)
    parser.add_argument("--latent", type=shape, required=True, metavar="C,F,H,W")
    parser.add_argument("--text", type=shape, required=True, metavar="L,D")
    parser.add_argument("--fingerprint", required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--samples-per-shard", type=int, default=8)
    parser.add_argument("--spatial-scale", type=int, default=8, help="pixels per latent cell (TI2V-5B: 16)")
    options = parser.parse_args()
    index = write_synthetic_groups(
        options.folder,
        num_groups=options.num_groups,
        num_losers=options.num_losers,
        latent_shape=options.latent,
        text_shape=options.text,
        fingerprint=options.fingerprint,
        seed=options.seed,
        samples_per_shard=options.samples_per_shard,
        spatial_scale=options.spatial_scale,
    )
    print(f"{index['num_groups']} groups, {index['total_bytes'] / 1e6:.1f} MB in {options.folder}")


if __name__ == "__main__":
    main()
