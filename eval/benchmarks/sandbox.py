"""The sandbox benchmark: held-out prompts of simulated scenes, scored by the sandbox judge from pixels alone."""

from dataclasses import dataclass

import torch
from torch import Tensor

from eval.judges import sandbox as judge
from eval.sandbox.splits import list_clips, simulate_block
from train.clips import VideoConfig


@dataclass
class SandboxConfig:
    clips: int = 256  # prompts, one clip each, of all scenes
    seed: int = 0  # of the held-out scenes and of the clips' noise


def texts(config: SandboxConfig, video: VideoConfig) -> list[str]:
    """Prompts that no training set holds, without simulating their clips."""
    return [clip.prompt for clip in list_clips("mixed", "heldout", config.seed, config.clips, video)]


def prompts(config: SandboxConfig, video: VideoConfig) -> tuple[list[str], Tensor]:
    """Prompts that no training set holds, and the true clips (N,T,H,W,3) uint8 that they describe."""
    listed = list_clips("mixed", "heldout", config.seed, config.clips, video)
    blocks = {clip.block for clip in listed}
    frames = {block: simulate_block("mixed", "heldout", config.seed, block, video).frames for block in blocks}
    return [clip.prompt for clip in listed], torch.stack([frames[clip.block][clip.index] for clip in listed])


def noise_seeds(config: SandboxConfig) -> list[int]:
    """A noise seed a clip, in no training set: losers' seeds are hashes of 63 bits, these are small."""
    return [config.seed * 1_000_003 + number for number in range(config.clips)]


def score(clips: Tensor, texts: list[str], video: VideoConfig) -> judge.SandboxScores:
    """The judge's scores of clips (N,T,H,W,3) uint8."""
    return judge.build(judge.SandboxJudgeConfig(fps=video.fps), "cpu")(clips, texts)
