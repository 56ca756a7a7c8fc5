"""Settings of a search: the section `search` of a recipe."""

from dataclasses import asdict, dataclass, field
from typing import Any

from eval.search.guidance import GuidanceConfig
from eval.search.noise_refinement import ProprioRefineConfig
from eval.search.racing import FIRST
from eval.search.residuals import ResidualConfig
from eval.search.scorers.proprio import MIXING
from eval.search.scorers.surprise import SurpriseConfig


@dataclass
class PruneConfig:
    steps: list[int] = field(default_factory=list)  # sampling steps after which to look; none: no pruning
    keep: float = 0.5  # share of the candidates that is finished
    scorers: list[str] = field(default_factory=lambda: ["most_motion", "residual_per_motion"])  # that look
    draws: int = 1  # of noise for these looks, instead of residuals.draws: an early look should be cheap


@dataclass
class RaceConfig:
    confidence: float = 0.98  # that the winner is that of full scoring

    def settings(self) -> dict[str, Any]:
        """What a race depends on, as plain JSON values."""
        return {"confidence": self.confidence, "first": FIRST, "every": 1}


SAMPLERS_SHIFT: Any = "${sampler.shift}"  # levels are shares of the steps that the recipe samples with


@dataclass
class RefineConfig(ProprioRefineConfig):
    best: int = 0  # of a prompt's candidates so many, the best by chosen_by, are refined, and the first; 0: none
    steps: int = 4  # of the sampler that gradients pass through; the clip is then sampled with sampler.steps
    batch_size: int = 1  # clips refined together, of several prompts, per GPU

    def settings(self) -> dict[str, Any]:
        """What refined clips depend on, as plain JSON values."""
        return without_batch(self) | {"mixing": MIXING}


@dataclass
class GuideConfig(GuidanceConfig):
    candidates: int = 0  # of a prompt's candidates so many, the first, are made with guidance as well; 0: none
    batch_size: int = 1  # clips guided, decoded and looked at together, of several prompts, per GPU

    def settings(self) -> dict[str, Any]:
        """What guided clips depend on, as plain JSON values."""
        return without_batch(self)


@dataclass
class SearchConfig:
    num_candidates: int = 16  # N, clips per prompt
    batch_size: int = 1  # clips sampled or decoded together, per GPU
    chosen_by: str = "residual_per_motion"  # the scorer that races and chooses; a key of eval.search.scorers.SCORERS
    residuals: ResidualConfig = field(  # of the self-scores
        default_factory=lambda: ResidualConfig(shift=SAMPLERS_SHIFT)
    )
    surprise: SurpriseConfig = field(default_factory=SurpriseConfig)
    prune: PruneConfig = field(default_factory=PruneConfig)
    race: RaceConfig = field(default_factory=RaceConfig)
    refine: RefineConfig = field(  # Proprio's refinement of the initial noise
        default_factory=lambda: RefineConfig(shift=SAMPLERS_SHIFT)
    )
    guidance: GuideConfig = field(default_factory=GuideConfig)  # WMReward's, by the surprise that `surprise` describes


def without_batch(config: Any) -> dict[str, Any]:
    """A dataclass as plain values without `batch_size`, which says how fast clips are made."""
    return {name: value for name, value in asdict(config).items() if name != "batch_size"}
