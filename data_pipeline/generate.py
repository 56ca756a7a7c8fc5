"""The generate stage: the model's own clips for each prompt, the losers of a preference group.

The losers of a row are kept by the digest of all that they depend on (`Store`): when rows move, scores change or units
get another size, the table is written anew, but no clip is generated twice. Rows whose clip cannot be read are dropped
here, before anything is generated for them.
"""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor

from data_pipeline.encode import condition
from data_pipeline.manifests import Row
from data_pipeline.sources import FrameReader, clip_digest, clip_identity, record_digest, row_of
from data_pipeline.store import Store
from data_pipeline.tables import Advance, Made, Marker, Stage, Table, Unit, add_columns, drop, read_rows
from train.backbones.base import Backbone, Conditioning
from train.clips import VideoConfig
from train.files import digest, seed_of
from train.sampling import SamplerConfig, sample_clips

OPEN_FILES = 16  # clips looked at together: over a network each takes milliseconds
PARTS = ("text", "vae", "transformer")


class LoserMaker:
    """Makes the losers of rows and keeps them in `store`: {"losers": (M, C, F, H, W) bfloat16} each.

    load: loads parts of the backbone. settings: plain values that the losers depend on. first_frame: whether they
    begin with their row's. batch_size: clips sampled together; whole rows are, where it covers more than one.
    """

    def __init__(
        self,
        store: Store,
        load: Callable[[Sequence[str]], Backbone],
        settings: Mapping[str, Any],
        video: VideoConfig,
        sampler: SamplerConfig,
        device: torch.device,
        *,
        seed: int,
        num_losers: int,
        first_frame: bool,
        batch_size: int,
    ):
        self.store, self.load, self.settings, self.video, self.sampler = store, load, settings, video, sampler
        self.seed, self.num_losers, self.batch_size = seed, num_losers, batch_size
        self.first_frame = first_frame
        self.reader = FrameReader(video, device)

    @cached_property
    def backbone(self) -> Backbone:
        return self.load(PARTS)

    @cached_property
    def negative(self) -> Conditioning:
        return self.backbone.condition([self.sampler.negative_prompt])

    def make(self, rows: Sequence[Row], identities: Sequence[str], advance: Advance) -> dict[int, tuple[str, str]]:
        """Make what is missing; the places of rows whose clip cannot be read, with the reason and the detail."""
        bad: dict[int, tuple[str, str]] = {}
        together = max(1, self.batch_size // max(1, self.num_losers))  # rows
        for first in range(0, len(rows), together) if self.num_losers else ():
            batch = range(first, min(first + together, len(rows)))
            bad |= self._make({self.digest(rows[place], identities[place]): place for place in batch}, rows)
            advance(len(batch))
        return bad

    def _make(self, batch: Mapping[str, int], rows: Sequence[Row]) -> dict[int, tuple[str, str]]:
        """Of a batch, digest -> place in `rows`."""
        frames, unread = self.reader.read_all({made: rows[batch[made]] for made in self.store.missing(list(batch))})
        if frames:
            chosen = [rows[batch[made]] for made in frames]
            first = torch.stack([clip[0] for clip in frames.values()])  # (B, H, W, 3)
            conditioning = condition(
                self.backbone,
                first,
                [row.prompt for row in chosen],
                num_frames=self.video.num_frames,
                first_frame=self.first_frame,
            )
            losers = generate_losers(
                self.backbone,
                conditioning,
                self.negative,
                list(map(self.seeds, chosen)),
                self.video,
                self.sampler,
                batch_size=self.batch_size,
            )
            self.store.save({made: {"losers": latents} for made, latents in zip(frames, losers, strict=True)})
        return {batch[made]: reason for made, reason in unread.items()}

    def digest(self, row: Row, identity: str) -> str:
        return clip_digest(self.settings, row, identity)

    def seeds(self, row: Row) -> list[int]:
        return [loser_seed(self.seed, row.key, loser) for loser in range(self.num_losers)]


class Generate(Stage):
    """See the module."""

    name = "generate"

    def __init__(self, folder: Path, maker: LoserMaker, *, unit_size: int):
        super().__init__(folder)
        self.maker, self.unit_size = maker, unit_size

    def plan(self, before: Table) -> list[Unit]:
        units = []
        with ThreadPoolExecutor(OPEN_FILES) as pool:
            for first in range(0, len(before), self.unit_size):
                records = before.rows(first, self.unit_size).to_pylist()
                identities = list(pool.map(clip_identity, map(row_of, records)))
                settings = self.maker.settings
                units.append(Unit(len(units), digest([records, identities, settings]), first, len(records)))
        return units

    def build(self, unit: Unit, rows: pa.Table, advance: Advance) -> Made:
        """Generate what is missing; rows whose clip cannot be read are dropped."""
        found = [row_of(record) for record in rows.to_pylist()]
        identities = [clip_identity(row) for row in found]
        bad = self.maker.make(found, identities, advance)
        columns = {"seeds": list(map(self.maker.seeds, found)), "identity": identities}
        return drop(add_columns(rows, self.name, columns), bad)

    def is_intact(self, unit: Unit, marker: Marker) -> bool:
        lost = self.maker.store.lost()
        records = read_rows(self.folder, unit.number).to_pylist() if lost else []
        return lost.isdisjoint(record_digest(self.maker.settings, record) for record in records)

    def conclude(self, table: Table) -> None:
        records = (record for number in range(len(table.markers)) for record in table.unit(number).to_pylist())
        wanted = {record_digest(self.maker.settings, record) for record in records}
        if unused := self.maker.store.unused(wanted):
            folder = self.maker.store.folder
            print(f"{unused / 1e9:.3f} GB of {folder} are of earlier settings: delete them when you like")


def losers_of(folder: Path) -> Store:
    """The losers beside the table of the generate stage in `folder`: {"losers": (M, C, F, H, W) bfloat16} each."""
    return Store(folder / "losers")


def loser_seed(seed: int, key: str, loser: int) -> int:
    """63-bit noise seed of a group's loser: a function of the recipe's seed and the group, not of order or ranks."""
    return seed_of(seed, key, loser)


def generate_losers(
    backbone: Backbone,
    conditioning: Conditioning,
    negative: Conditioning,
    seeds: Sequence[Sequence[int]],
    video: VideoConfig,
    sampler: SamplerConfig,
    *,
    batch_size: int,
) -> Tensor:
    """Latents (B, M, C, F, H, W) bfloat16 on the CPU for B prompts with M seeds each, `batch_size` clips at a time."""
    clips = [(prompt, seed) for prompt, of_prompt in enumerate(seeds) for seed in of_prompt]
    latents = []
    for first in range(0, len(clips), batch_size):
        batch = clips[first : first + batch_size]
        prompts = Conditioning.cat([conditioning[prompt : prompt + 1] for prompt, _ in batch])
        made = sample_clips(
            backbone, prompts, [seed for _, seed in batch], video, sampler, negative=negative, progress=False
        )
        latents.append(made.cpu())
    return torch.cat(latents).to(torch.bfloat16).unflatten(0, (len(seeds), -1))
