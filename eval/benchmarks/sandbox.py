"""The sandbox benchmark: held-out prompts of simulated scenes, scored by the sandbox judge from pixels alone.

The judge measures single pixels, so clips are kept without loss. The true clips are scored as well: they show what the
judge takes for perfect.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
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

    def prompts(self) -> list[Task]:
        return [_task(number, clip) for number, clip in enumerate(_listed(self.settings, self.model_video))]

    def references(self, folder: Path) -> list[Sample]:
        video, seed = self.model_video, self.settings.seed
        folder = folder / f"{seed}-{video.width}x{video.height}x{video.num_frames}-{video.fps:g}fps"
        listed = _listed(self.settings, video)
        samples = [
            Sample(task, 0, folder / f"{task.key}.mp4")
            for task in (_task(number, clip) for number, clip in enumerate(listed))
        ]
        if missing := [number for number, sample in enumerate(samples) if not sample.path.exists()]:
            frames = _simulate([listed[number] for number in missing], seed, video)
            for number, clip in zip(missing, frames, strict=True):
                write_clip(samples[number].path, clip, video.fps, lossless=True)
        return samples

    def score(self, samples: Sequence[Sample], folder: Path) -> Iterator[Row]:
        for start in range(0, len(samples), self.together):
            read, clips = [], []
            for sample in samples[start : start + self.together]:
                try:
                    clips.append(read_clip(sample.path, self.model_video))
                    read.append(sample)
                except ClipError as error:
                    yield Row.of(sample, error=str(error))
            if read:
                scores = score(torch.stack(clips), [sample.task.text for sample in read], self.model_video)
                yield from (Row.of(sample, row) for sample, row in zip(read, scores.rows(), strict=True))


def prompts(config: SandboxConfig, video: VideoConfig) -> tuple[list[str], Tensor]:
    """Prompts that no training set holds, and the true clips (N,T,H,W,3) uint8 that they describe."""
    listed = _listed(config, video)
    return [clip.prompt for clip in listed], _simulate(listed, config.seed, video)


def score(clips: Tensor, texts: list[str], video: VideoConfig) -> judge.SandboxScores:
    """The judge's scores of clips (N,T,H,W,3) uint8."""
    return judge.build(judge.SandboxJudgeConfig(fps=video.fps), "cpu")(clips, texts)


def _listed(config: SandboxConfig, video: VideoConfig) -> list[Simulated]:
    return list_clips("mixed", "heldout", config.seed, config.clips, video)


def _task(number: int, clip: Simulated) -> Task:
    return Task(make_key(number, clip.prompt), clip.prompt, clip.shown)


def _simulate(listed: Sequence[Simulated], seed: int, video: VideoConfig) -> Tensor:
    """(N, T, H, W, 3) uint8 of the listed clips."""
    blocks = {clip.block for clip in listed}
    frames = {block: simulate_block("mixed", "heldout", seed, block, video).frames for block in blocks}
    return torch.stack([frames[clip.block][clip.index] for clip in listed])
