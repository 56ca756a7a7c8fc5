"""The encode stage: from pixels and prompts to what the network sees, and all of it into shards.

Winners are kept by the digest of what they depend on, like losers: new scores write the shards anew without a network.
"""

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor

from data_pipeline.config import Setup
from data_pipeline.contract import Stage
from data_pipeline.frames import FrameReader
from data_pipeline.store import Store
from data_pipeline.tables import Advance, Made, Marker, Table, TableRow, Unit, drop, unit_name
from eval.robots import recordings
from train.backbones.base import Backbone
from train.backbones.conditioning import Conditioning, unpad_texts
from train.clips import from_pixels
from train.groups import Group, Loser, ShardWriter, shard_record, write_index

PARTS = ("text", "vae")


class Encode(Stage):
    name = "encode"

    def __init__(self, setup: Setup):
        super().__init__(setup)
        self.groups = Path(setup.pipeline.groups)
        self.store, self.losers = Store(self.folder / "winners", setup.winner_settings), setup.losers
        self.targets = setup.targets if setup.config.targets.tracks else None
        self.reader = FrameReader(setup.video, setup.device, Path(setup.config.output) / recordings.FOLDER)

    @cached_property
    def backbone(self) -> Backbone:
        return self.setup.load(PARTS)

    @cached_property
    def origin(self) -> dict[str, str]:
        """Fingerprints for the groups: of the encoders, and of the backbone that made the losers. A folder that an
        earlier version began goes on with its one, of the whole pipeline."""
        shell, names = self.setup.shell, sorted(path.stem for path in self.groups.glob("unit-*.json"))
        begun = next((found["fingerprint"] for found in self._shards(names) if "fingerprint" in found), "")
        fingerprint = begun if begun == shell.fingerprints[0] else shell.encoders
        made = self.setup.pipeline.losers.count > 0 and shell.fingerprint != fingerprint
        return {"fingerprint": fingerprint, "network": shell.fingerprint if made else ""}

    def _shards(self, names: Sequence[str]) -> Iterator[Mapping[str, Any]]:
        return filter(None, (shard_record(self.groups, name) for name in names))

    def plan(self, before: Table) -> list[Unit]:
        settings = [self.store.settings, self.losers.settings, self.targets and self.targets.settings]
        return before.units(lambda number: settings)

    def build(self, unit: Unit, rows: pa.Table, advance: Advance) -> Made:
        """Encode what is missing and write the unit's shard; clips that cannot be read any more are dropped."""
        records, together = rows.to_pylist(), self.setup.pipeline.encode_batch
        bad = self.store.make_missing(records, self.reader.read, self.encode, together=together, advance=advance)
        with ShardWriter(self.groups, unit_name(unit.number)) as writer:
            for place, record in enumerate(records):
                if place not in bad:
                    group = self._group(record)
                    try:
                        writer.write(group)
                    except ValueError as error:  # a network's numbers may overflow: that is this group's matter
                        bad[place] = ("unusable", str(error))
        return drop(rows, bad)

    @torch.no_grad()
    def encode(self, records: Sequence[TableRow], frames: list[Tensor]) -> Iterator[dict[str, Tensor]]:
        """What is kept of each row and its clip (T, H, W, 3) uint8, all in one batch."""
        video = from_pixels(torch.stack(frames).to(self.backbone.device))  # (B, 3, T, H, W)
        first = video[:, :, : self.setup.prefix_frames] if self.setup.first_frame else None
        prompts = [record["prompt"] for record in records]
        conditioning = self.backbone.condition(prompts, first, num_frames=video.shape[2])
        winners = self.backbone.encode_video(video, batch_size=len(video)).to(torch.bfloat16).cpu()
        stored = conditioning.to("cpu", torch.bfloat16)
        for number, winner in enumerate(winners):
            named = {name: tensor[number] for name, tensor in stored.named().items()}
            yield {"winner": winner, **unpad_texts(named, stored.texts())}

    def _group(self, record: TableRow) -> Group:
        made = self.store.load_of(record)
        told = Conditioning.of(made)
        losers = made["winner"][None][:0]  # (0, C, F, H, W)
        if self.setup.pipeline.losers.count:
            losers = self.losers.load_of(record)["losers"]
        scored = zip(record["seeds"], record["semantic"], record["physical"], strict=True)
        return Group(
            **{name: record[name] for name in ("key", "prompt", "action", "physics_richness")},
            source=f"{record['clip']} at {record['start']:g} s",
            losers_info=[Loser(*values) for values in scored],
            **self.origin,
            winner=made["winner"],
            losers=losers,
            text=told.text,
            condition=told.image,
            conditioning=told.more,
            extra=self.targets.load_of(record) if self.targets else {},
        )

    def notes(self, unit: Unit) -> dict[str, Any]:
        return {"shard": shard_record(self.groups, unit_name(unit.number))["sha256"]}

    def is_intact(self, unit: Unit, marker: Marker) -> bool:
        shard = shard_record(self.groups, unit_name(unit.number))
        return shard is not None and shard["sha256"] == marker.get("shard")

    def conclude(self, table: Table) -> None:
        """Delete the shards of earlier runs beyond the last unit, and index the others."""
        names = {unit_name(number) for number in range(len(table.markers))}
        for path in [*self.groups.glob("unit-*.json"), *self.groups.glob("unit-*.tar")]:
            if path.stem not in names:
                path.unlink()
        index = write_index(self.groups, fingerprint=self.origin["fingerprint"], video=self.setup.video)
        count, total = index["num_groups"], index["total_bytes"]
        print(f"groups: {self.groups}, {count} groups, {total // count} bytes per group")
