"""Settings of a search: the section `search` of a recipe."""

from dataclasses import dataclass, field
from typing import Any

from eval.benchmarks.sandbox import SandboxConfig
from eval.search.guidance import GuidanceConfig
from eval.search.noise_refinement import ProprioRefineConfig
from eval.search.residuals import ResidualConfig
from eval.search.scorers.surprise import SurpriseConfig

DEFAULT_SCORERS = [
    "random",
    "most_motion",
    "proprio_global",
    "proprio_motion",
    "proprio_hybrid",
    "proprio_motion-text",
    "proprio_motion-attention",
    "proprio_hybrid-pooled",
    "proprio_hybrid-uniform",
    "proprio_global-uniform",
    "proprio_motion-uniform",
    "proprio_motion-text-uniform",
    "proprio_motion-attention-uniform",
    "masked_residual_per_motion",
    "residual_per_motion",
    "rank_sum",
]


@dataclass
class PruneConfig:
    steps: list[int] = field(default_factory=list)  # sampling steps after which to look; none: no pruning
    keep: float = 0.5  # share of the candidates that is finished
    scorers: list[str] = field(default_factory=lambda: ["most_motion", "residual_per_motion"])  # that look
    draws: int = 1  # of noise for these looks, in place of residuals.draws: an early look should be cheap


@dataclass
class RaceConfig:
    confidence: float = 0.98  # that the winner is that of full scoring
    first: int = 3  # rounds before the first look
    every: int = 1  # rounds from look to look


SAMPLERS_SHIFT: Any = "${sampler.shift}"  # levels are shares of the steps that the recipe samples with


@dataclass
class RefineConfig(ProprioRefineConfig):
    best: int = 0  # of a prompt's candidates so many, the best by chosen_by, are refined, and the first; 0: none
    steps: int = 4  # of the sampler that gradients pass through; the clip is then sampled with sampler.steps
    batch_size: int = 1  # clips refined together, of several prompts, per GPU


@dataclass
class GuideConfig(GuidanceConfig):
    candidates: int = 0  # of a prompt's candidates so many, the first, are made with guidance as well; 0: none
    batch_size: int = 1  # clips guided, decoded and looked at together, of several prompts, per GPU


@dataclass
class SearchConfig:
    folder: str = "${output}/search"  # everything goes here
    share: str = ""  # "2/8": only the second of eight shares of the prompts, without a table, beside other processes
    num_candidates: int = 16  # N, clips a prompt
    batch_size: int = 1  # clips sampled or decoded together, per GPU
    lora: str = ""  # search with this LoRA or full weights attached; empty: the base model
    scorers: list[str] = field(default_factory=lambda: list(DEFAULT_SCORERS))  # keys of eval.search.scorers.SCORERS
    chosen_by: str = "residual_per_motion"  # the scorer whose choice the page marks, that races and chooses at the end
    residuals: ResidualConfig = field(  # of the self-scores
        default_factory=lambda: ResidualConfig(shift=SAMPLERS_SHIFT)
    )
    mixing: float = 0.2  # share of the global score in the hybrid one
    surprise: SurpriseConfig = field(default_factory=SurpriseConfig)
    judge_aspect: str = "physical"  # physical | semantic | both: what the scorers "judge" and "vlm" look at
    combined: list[str] = field(  # of the scorer "rank_sum"
        default_factory=lambda: ["residual_per_motion", "proprio_motion-text-uniform"]
    )
    prune: PruneConfig = field(default_factory=PruneConfig)
    race: RaceConfig = field(default_factory=RaceConfig)
    refine: RefineConfig = field(  # Proprio's refinement of the initial noise
        default_factory=lambda: RefineConfig(shift=SAMPLERS_SHIFT)
    )
    guidance: GuideConfig = field(default_factory=GuideConfig)  # WMReward's, by the surprise that `surprise` describes
    shown: int = 24  # prompts on the page
    sandbox: SandboxConfig = field(default_factory=SandboxConfig)  # the prompts, and the truth that scorers are held to
