"""Which generator a recipe means, and how its weights are held: the section `backbone`."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class BaseLora:
    """A LoRA that becomes part of the base."""

    path: str = ""  # LoRA file of any tool (train.backbones.lora_formats), checkpoint folder or training folder
    weight: float = 1.0  # what its difference is multiplied by
    expert: str = ""  # high_noise | low_noise; empty: what the file says, else the only network


@dataclass
class BackboneConfig:
    # Key of BACKBONES: wan21 | wan22_ti2v | wan22_t2v | wan22_i2v | hunyuan15 | hunyuan15_i2v | cosmos25
    family: str = "wan21"
    path: str = ""  # hub id or local folder of a diffusers pipeline
    revision: str = ""  # of a hub id: a commit or tag, so that later edits there change nothing here; empty: its newest
    architecture: str = "14B"  # key of the family's ARCHITECTURES; used for --dry-run and random weights
    random_weights: bool = False  # build the architecture with seeded random weights (no path): speed and memory runs
    # Of the frozen weights: bfloat16 | float32 | float8, which is bfloat16 with the blocks' matrices rounded to 8 bits
    # (train.backbones.quantize): half of the host's memory and of the copies with `stream`. The VAE is always float32.
    dtype: str = "bfloat16"
    expert: str = "high_noise"  # two-expert families: which one trains: high_noise | low_noise | both
    attention: str = "auto"  # a diffusers attention backend; auto: the fastest here, measured
    compile: bool = False  # torch.compile, in training and wherever clips are made: fused blocks where they fit
    # Blocks wait in host memory, and each visits the GPU while the one before it computes (train.backbones.streaming).
    stream: bool = False
    text_length: int = 512  # text tokens after zero padding; Wan and Cosmos: 512, HunyuanVideo 1.5: 1000
    # Video frames that clips begin with where any are given (pipeline.first_frame, images): 1, or the 4 k + 1 of a
    # prefix that wan22_ti2v or cosmos25 continues.
    prefix_frames: int = 1
    # LoRAs merged into the frozen weights while they are read, in this order, as '[{path: runs/sft/train}]': a step-
    # distilled one for losers and searches, or the supervised start of preference training, then in its reference too.
    loras: list[BaseLora] = field(default_factory=list)
