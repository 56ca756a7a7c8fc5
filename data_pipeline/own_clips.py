"""The model's own clips of rows' prompts: losers of a preference group, and what difficulty is judged by.

The clips of a row are kept by the digest of all that they depend on (`Store`): when rows move, scores change or units
get another size, tables are written anew, but no clip is generated twice. A row's own clip is not decoded, but for its
first frame where the model's clips begin with it; what its container shows to be unusable is dropped first.
"""

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from data_pipeline.config import Setup
from data_pipeline.frames import FrameReader
from data_pipeline.store import Store
from data_pipeline.tables import Advance, Bad, TableRow
from train.backbones.base import Backbone, Conditioning
from train.clips import VideoConfig, from_pixels
from train.files import seed_of
from train.sampling import SamplerConfig, sample_clips

PARTS = ("text", "vae", "transformer")


class ClipMaker:
    """Makes `num_clips` clips per row and keeps them in `store`: {"losers": (M, C, F, H, W) bfloat16} each. Whole rows
    are sampled together where pipeline.batch_size covers more than one."""

    def __init__(self, setup: Setup, store: Store, num_clips: int):
        self.setup, self.store, self.num_clips = setup, store, num_clips
        self.reader = FrameReader(setup.video, setup.device)

    @cached_property
    def backbone(self) -> Backbone:
        return self.setup.load(PARTS)

    @cached_property
    def negative(self) -> Conditioning:
        return self.backbone.condition([self.setup.config.sampler.negative_prompt])

    def make(self, rows: Sequence[TableRow], advance: Advance) -> Bad:
        """Make what is missing, of rows with their `identity`; the places of rows whose clip cannot be read, with the
        reason and the detail."""
        if not self.num_clips:
            return {}
        read = self.reader.read_first if self.setup.first_frame else self.reader.check
        together = max(1, self.setup.pipeline.batch_size // self.num_clips)  # rows
        return self.store.make_missing(rows, read, self._make, together=together, advance=advance)

    @torch.no_grad()
    def _make(self, rows: Sequence[TableRow], begins: list[Tensor]) -> list[dict[str, Tensor]]:
        setup = self.setup
        first = None
        if setup.first_frame:
            first = from_pixels(torch.stack(begins)[:, None].to(self.backbone.device))[:, :, 0]  # (B, 3, H, W)
        made = generate_losers(
            self.backbone,
            self.backbone.condition([row["prompt"] for row in rows], first, num_frames=setup.video.num_frames),
            self.negative,
            list(map(self.seeds, rows)),
            setup.video,
            setup.config.sampler,
            batch_size=setup.pipeline.batch_size,
        )
        return [{"losers": latents} for latents in made]

    def seeds(self, row: TableRow) -> list[int]:
        return [loser_seed(self.setup.config.seed, row["key"], number) for number in range(self.num_clips)]


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
