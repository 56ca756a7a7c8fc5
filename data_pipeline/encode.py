"""The encode stage: from pixels and prompts to what the network sees, and all of it into shards.

Winners are kept by the digest of what they depend on, like losers: new scores write the shards anew without a network.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor

from data_pipeline.sources import FrameReader, record_digest, row_of
from data_pipeline.store import Store
from data_pipeline.tables import Advance, Made, Stage, Table, Unit, drop, unit_name
from train.backbones.base import Backbone, Conditioning
from train.clips import VideoConfig, from_pixels
from train.groups import Group, Loser, ShardWriter, check_group, shard_record, write_index

PARTS = ("text", "vae")


class Encode(Stage):
    """See the module.

    extras: gives the tensors that go with a row's winner (tracks, ...), None where there are none. settings: plain
    values that the winners depend on, the backbone's fingerprint among them; loser_settings and extra_settings: those
    of the losers and extras. first_frame: whether groups hold their clip's first frame. encode_batch: clips encoded
    together.
    """

    name = "encode"

    def __init__(
        self,
        folder: Path,
        groups: Path,
        load: Callable[[Sequence[str]], Backbone],
        settings: Mapping[str, Any],
        video: VideoConfig,
        device: torch.device,
        *,
        losers: Store,
        loser_settings: Mapping[str, Any],
        extras: Callable[[Mapping[str, Any]], dict[str, Tensor]] | None,
        extra_settings: Any,
        num_losers: int,
        first_frame: bool,
        encode_batch: int,
    ):
        super().__init__(folder)
        self.groups, self.load, self.settings, self.video = groups, load, settings, video
        self.losers, self.loser_settings = losers, loser_settings
        self.extras, self.extra_settings = extras, extra_settings
        self.num_losers, self.first_frame, self.encode_batch = num_losers, first_frame, encode_batch
        self.store = Store(folder / "winners")
        self.reader = FrameReader(video, device)
        self._checksum: dict[str, str] = {}  # of the shards of this process

    @cached_property
    def backbone(self) -> Backbone:
        return self.load(PARTS)

    def plan(self, before: Table) -> list[Unit]:
        return before.units(lambda number: [self.settings, self.loser_settings, self.extra_settings])

    def build(self, unit: Unit, rows: pa.Table, advance: Advance) -> Made:
        """Encode what is missing and write the unit's shard; clips that cannot be read any more are dropped."""
        records = rows.to_pylist()
        bad: dict[int, tuple[str, str]] = {}
        for first in range(0, len(records), self.encode_batch):
            batch = range(first, min(first + self.encode_batch, len(records)))
            bad |= self._make({record_digest(self.settings, records[place]): place for place in batch}, records)
            advance(len(batch))
        with ShardWriter(self.groups, unit.name) as writer:
            for place, record in enumerate(records):
                if place not in bad:
                    group = self._group(record)
                    try:
                        check_group(group)
                    except ValueError as error:  # a network's numbers may overflow: that is this group's matter
                        bad[place] = ("unusable", str(error))
                    else:
                        writer.write(group)
        self._checksum[unit.name] = writer.record["sha256"]
        return drop(rows, bad)

    def _make(self, batch: Mapping[str, int], records: Sequence[Mapping[str, Any]]) -> dict[int, tuple[str, str]]:
        """Encode a batch (digest -> place in `records`); the places of clips that cannot be read."""
        missing = self.store.missing(list(batch))
        frames, unread = self.reader.read_all({made: row_of(records[batch[made]]) for made in missing})
        if frames:
            clips = torch.stack(list(frames.values()))  # (B, T, H, W, 3)
            prompts = [records[batch[made]]["prompt"] for made in frames]
            winners, conditioning = encode_clips(self.backbone, clips, prompts, self.first_frame)
            winners, stored = winners.to(torch.bfloat16).cpu(), conditioning.to("cpu", torch.bfloat16)
            made_tensors = {}
            for number, made in enumerate(frames):
                made_tensors[made] = {"winner": winners[number], "text": unpad(stored.text[number])}
                if stored.image is not None:
                    made_tensors[made]["condition"] = stored.image[number]
            self.store.save(made_tensors)
        return {batch[made]: reason for made, reason in unread.items()}

    def _group(self, record: Mapping[str, Any]) -> Group:
        row, made = row_of(record), self.store.load(record_digest(self.settings, record))
        losers = made["winner"][None][:0]  # (0, C, F, H, W)
        if self.num_losers:
            losers = self.losers.load(record_digest(self.loser_settings, record))["losers"]
        scored = zip(record["seeds"], record["semantic"], record["physical"], strict=True)
        return Group(
            key=row.key,
            prompt=row.prompt,
            action=row.action,
            physics_richness=row.physics_richness,
            source=f"{row.clip} at {row.start:g} s",
            losers_info=[Loser(*values) for values in scored],
            fingerprint=self.settings["fingerprint"],
            winner=made["winner"],
            losers=losers,
            text=made["text"],
            condition=made.get("condition"),
            extra=self.extras(record) if self.extras else {},
        )

    def notes(self, unit: Unit) -> dict[str, Any]:
        return {"shard": self._checksum[unit.name]}

    def is_intact(self, unit: Unit, marker: Mapping[str, Any]) -> bool:
        shard = shard_record(self.groups, unit.name)
        return shard is not None and shard["sha256"] == marker.get("shard")

    def conclude(self, table: Table) -> None:
        """Delete the shards of earlier runs beyond the last unit, and index the others."""
        names = {unit_name(number) for number in range(len(table.markers))}
        for path in [*self.groups.glob("unit-*.json"), *self.groups.glob("unit-*.tar")]:
            if path.stem not in names:
                path.unlink()
        index = write_index(self.groups, fingerprint=self.settings["fingerprint"], video=self.video)
        count, total = index["num_groups"], index["total_bytes"]
        print(f"groups: {self.groups}, {count} groups, {total // count} bytes a group")


def takes_first_frame(family: type[Backbone], asked: bool | None) -> bool:
    """Whether groups of a family hold their clip's first frame: pipeline.first_frame, or where it is null the family's
    own way. ValueError for a way that it has not."""
    if asked is None:
        return family.first_frame[0]
    if asked not in family.first_frame:
        way = "begins every clip with an image" if family.first_frame[0] else "generates from text alone"
        raise ValueError(f"pipeline.first_frame={str(asked).lower()}: this backbone.family {way}; leave the key out")
    return asked


@torch.no_grad()
def condition(
    backbone: Backbone, first: Tensor, prompts: Sequence[str], *, num_frames: int, first_frame: bool
) -> Conditioning:
    """The conditioning of B clips of `num_frames`, in one pass; with `first_frame` it carries the image latents of
    their first frames (B, H, W, 3) uint8."""
    text, image = backbone.encode_text(list(prompts)), None
    if first_frame:
        frame = from_pixels(first[:, None].to(backbone.device))[:, :, 0]  # (B, 3, H, W)
        image = backbone.encode_first_frame(frame, num_frames=num_frames)
    return Conditioning(text, image)


@torch.no_grad()
def encode_clips(
    backbone: Backbone, frames: Tensor, prompts: Sequence[str], first_frame: bool
) -> tuple[Tensor, Conditioning]:
    """frames (B, T, H, W, 3) uint8 -> (latents (B, C, F, H, W) float32, conditioning of B clips, see `condition`)."""
    conditioning = condition(backbone, frames[:, 0], prompts, num_frames=frames.shape[1], first_frame=first_frame)
    video = from_pixels(frames.to(backbone.device))  # (B, 3, T, H, W)
    return backbone.encode_video(video, batch_size=len(video)), conditioning


def unpad(text: Tensor) -> Tensor:
    """(L, D) zero-padded -> (L', D) up to the last token, for storage."""
    used = text.abs().amax(dim=1).nonzero()
    return text[: int(used.max()) + 1]
