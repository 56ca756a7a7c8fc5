"""The model's own clips of rows' prompts: losers of a preference group, and what difficulty is judged by.

The clips of a row are kept by the digest of all that they depend on (`Store`): when rows move, scores change or units
get another size, tables are written anew, but no clip is generated twice. A row's own clip is not decoded, but for its
first frame where the model's clips begin with it; what its container shows to be unusable is dropped first.
"""

from collections.abc import Sequence
from functools import cached_property, partial

import torch
from torch import Tensor

from data_pipeline.config import Setup
from data_pipeline.frames import FrameReader
from data_pipeline.store import Store
from data_pipeline.tables import Advance, Bad, TableRow
from train.backbones.base import Backbone, Conditioning
from train.backbones.fused.inference import fuse
from train.clips import from_pixels
from train.files import seed_of
from train.sampling import SamplerConfig, sample_clips

PARTS = ("text", "vae", "transformer")


class ClipMaker:
    """Makes `num_clips` clips per row and keeps them in `store`: {"losers": (M, C, F, H, W) bfloat16} each. Whole rows
    are sampled together where pipeline.batch_size covers more than one. start_time: where it is not 1, they begin with
    the row's own clip, noised to it.
    """

    def __init__(self, setup: Setup, store: Store, num_clips: int, sampler: SamplerConfig, *, start_time: float = 1.0):
        self.setup, self.store, self.num_clips = setup, store, num_clips
        self.sampler, self.start_time = sampler, start_time
        self.reader = FrameReader(setup.video, setup.device)

    @cached_property
    def backbone(self) -> Backbone:
        backbone = self.setup.load(PARTS)
        if self.setup.config.backbone.compile and (reason := fuse(backbone)):
            print(f"blocks are not fused: {reason}")
        return backbone

    @cached_property
    def negative(self) -> Conditioning:
        return self.backbone.condition([self.setup.config.sampler.negative_prompt])

    def make(self, rows: Sequence[TableRow], advance: Advance) -> Bad:
        """Make what is missing, of rows with their `identity`; the places of rows whose clip cannot be read, with the
        reason and the detail."""
        if not self.num_clips:
            return {}
        first = partial(self.reader.read_first, count=self.setup.prefix_frames)
        read = first if self.setup.first_frame else self.reader.check
        read = self.reader.read if self.start_time < 1 else read
        together = max(1, self.setup.pipeline.batch_size // self.num_clips)  # rows
        return self.store.make_missing(rows, read, self.generate, together=together, advance=advance)

    @torch.no_grad()
    def generate(self, rows: Sequence[TableRow], begins: list[Tensor | None]) -> list[dict[str, Tensor]]:
        """What is kept of each row, `pipeline.batch_size` clips at a time. begins: their first frames (n, H, W, 3)
        uint8 where the model's clips begin with them; all frames (T, H, W, 3) with a start_time below 1."""
        setup, size, first, clean = self.setup, self.setup.pipeline.batch_size, None, None
        if self.start_time < 1:
            frames = from_pixels(torch.stack(begins).to(self.backbone.device))  # (B, 3, T, H, W)
            clean = self.backbone.encode_video(frames, batch_size=setup.pipeline.encode_batch).cpu()
            begins = [clip[: setup.prefix_frames] for clip in begins]
        if setup.first_frame:
            first = from_pixels(torch.stack(begins).to(self.backbone.device))  # (B, 3, n, H, W)
        prompts = [row["prompt"] for row in rows]
        conditioning = self.backbone.condition(prompts, first, num_frames=setup.video.num_frames)
        clips = [(place, seed) for place, row in enumerate(rows) for seed in self.seeds(row)]
        latents = []
        for batch in (clips[start : start + size] for start in range(0, len(clips), size)):
            made = sample_clips(
                self.backbone,
                Conditioning.cat([conditioning[place : place + 1] for place, _ in batch]),
                [seed for _, seed in batch],
                setup.video,
                self.sampler,
                negative=self.negative,
                clean=None if clean is None else clean[[place for place, _ in batch]],
                start=self.start_time,
                progress=False,
            )
            latents.append(made.cpu())
        together = torch.cat(latents).to(torch.bfloat16).unflatten(0, (len(rows), -1))  # (B, M, C, F, H, W)
        return [{"losers": of_row} for of_row in together]

    def seeds(self, row: TableRow) -> list[int]:
        """63-bit noise seeds: a function of the recipe's seed and the row's key, not of order or ranks."""
        return [seed_of(self.setup.config.seed, row["key"], number) for number in range(self.num_clips)]
