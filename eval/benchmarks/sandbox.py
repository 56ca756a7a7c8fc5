"""The sandbox benchmark: held-out prompts of simulated scenes, scored by the sandbox judge from pixels alone.

The judge measures single pixels, so clips are kept without loss. The true clips are scored as well: they show what the
judge takes for perfect.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from eval.benchmarks.base import Benchmark, Requirement, Row, Sample, Task
from eval.judges.sandbox import judge
from eval.prompts import make_key
from eval.sandbox.splits import Simulated, list_clips, simulate_block
from train.clips import ClipError, VideoConfig, read_clip, write_clip


@dataclass
class SandboxConfig:
    clips: int = 256  # prompts, of all scenes
    seed: int = 0  # of the held-out scenes


class Sandbox(Benchmark):
    name = "sandbox"
    columns = ("physical", "semantic", *(f"error_{law}" for law in judge.LAWS))
    figures = ("physical", "semantic")
    lossless = True
    together = 64

    def requirements(self) -> list[Requirement]:
        return []

    @cached_property
    def listed(self) -> list[Simulated]:
        """Clips with prompts that no training set holds."""
        return list_clips("mixed", "heldout", self.settings.seed, self.settings.clips, self.model_video)

    def prompts(self) -> list[Task]:
        return [Task(make_key(number, clip.prompt), clip.prompt, clip.shown) for number, clip in enumerate(self.listed)]

    def references(self, folder: Path) -> list[Sample]:
        video, seed = self.model_video, self.settings.seed
        folder = folder / f"{seed}-{video.width}x{video.height}x{video.num_frames}-{video.fps:g}fps"
        samples = [Sample(task, 0, folder / f"{task.key}.mp4") for task in self.prompts()]
        if missing := [number for number, sample in enumerate(samples) if not sample.path.exists()]:
            frames = simulate_listed([self.listed[number] for number in missing], seed, video)
            for number, clip in zip(missing, frames, strict=True):
                write_clip(samples[number].path, clip, video.fps, lossless=True)
        return samples

    def score(self, samples: Sequence[Sample], folder: Path) -> Iterator[Row]:
        measure = judge.build(judge.SandboxJudgeConfig(fps=self.model_video.fps), "cpu")
        for start in range(0, len(samples), self.together):
            read, clips = [], []
            for sample in samples[start : start + self.together]:
                try:
                    clips.append(read_clip(sample.path, self.model_video))
                    read.append(sample)
                except ClipError as error:
                    yield Row.of(sample, error=str(error))
            if read:
                rows = measure(torch.stack(clips), [sample.task.text for sample in read]).rows()
                yield from (Row.of(sample, row) for sample, row in zip(read, rows, strict=True))


def simulate_listed(listed: Sequence[Simulated], seed: int, video: VideoConfig) -> Tensor:
    """(N, T, H, W, 3) uint8 of the listed clips."""
    blocks = {clip.block for clip in listed}
    frames = {block: simulate_block("mixed", "heldout", seed, block, video).frames for block in blocks}
    return torch.stack([frames[clip.block][clip.index] for clip in listed])
