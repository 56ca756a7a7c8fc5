"""Settings of a search: the section `search` of a recipe."""

from dataclasses import dataclass, field
from typing import Any

from eval.search.guidance import GuideConfig
from eval.search.noise_refinement import RefineConfig
from eval.search.residuals import ResidualConfig
from eval.search.world_model import SurpriseConfig


@dataclass
class PruneConfig:
    steps: list[int] = field(default_factory=list)  # sampling steps after which to look; none: no pruning
    keep: float = 0.5  # share of the candidates that is finished
    scorers: list[str] = field(default_factory=lambda: ["most_motion", "residual_per_motion"])  # that look


SAMPLERS_SHIFT: Any = "${sampler.shift}"  # levels are shares of the steps that the recipe samples with


@dataclass
class SearchConfig:
    num_candidates: int = 16  # N, clips per prompt
    batch_size: int = 1  # clips sampled, decoded, scored, refined or guided together, per GPU
    chosen_by: str = "residual_per_motion"  # the scorer that races and chooses; a key of eval.search.scorers.SCORERS
    residuals: ResidualConfig = field(  # of the self-scores
        default_factory=lambda: ResidualConfig(shift=SAMPLERS_SHIFT)
    )
    surprise: SurpriseConfig = field(default_factory=SurpriseConfig)
    prune: PruneConfig = field(default_factory=PruneConfig)
    refine: RefineConfig = field(  # Proprio's refinement of the initial noise
        default_factory=lambda: RefineConfig(shift=SAMPLERS_SHIFT)
    )
    guidance: GuideConfig = field(default_factory=GuideConfig)  # WMReward's, by the surprise that `surprise` describes
