"""What every command that makes clips reads of a recipe, and what is checked of it before anything is loaded."""

from dataclasses import dataclass, field, replace
from pathlib import Path

from eval.judges import JudgeConfig, Judging
from eval.judges.external_tool import RatersConfig
from eval.maker import Model
from eval.search import searcher
from eval.search.config import SearchConfig
from eval.vlm.backend import VlmConfig
from train.backbones import load_backbone
from train.backbones.base import Backbone, BackboneConfig
from train.clips import VideoConfig
from train.sampling import SamplerConfig


@dataclass
class ClipsConfig:
    """The base of a command's Config, whose own section has the keys batch_size, search and refine."""

    recipe: str = ""  # name or path of a recipe
    output: str = "runs/default"  # everything goes below this folder
    dry_run: bool = False  # print what would be made and stop
    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    video: VideoConfig = field(default_factory=VideoConfig)
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    search: SearchConfig = field(default_factory=SearchConfig)  # of the section's keys search and refine
    vlm: VlmConfig = field(default_factory=VlmConfig)
    judge: JudgeConfig = field(default_factory=JudgeConfig)  # of the scorer "judge"
    raters: RatersConfig = field(default_factory=RatersConfig)

    @property
    def is_here(self) -> bool:
        """False for a dry run without the backbone's folder: it downloads nothing and takes the family's table."""
        return not self.dry_run or bool(self.backbone.path) and Path(self.backbone.path).expanduser().is_dir()

    def shell(self) -> Backbone:
        """The backbone without weights."""
        own = self.backbone if self.is_here else replace(self.backbone, path="", random_weights=True)
        return load_backbone(own, "cpu", parts=())

    def method(self, section: str) -> searcher.Method:
        settings = getattr(self, section)
        return searcher.Method(settings.search, settings.refine)

    def searching(self, model: Model, section: str) -> Model:
        """The model with the section's search behind it; as it is where there is none."""
        return searcher.searching(model, self.method(section), self.search, Judging.of(self))

    def check(self, section: str) -> None:
        """Refuse settings that cannot work, naming key, value and remedy."""
        if self.backbone.random_weights and not self.dry_run:
            raise ValueError("backbone.random_weights=true makes clips of noise: set it to false, give a path")
        if (size := getattr(self, section).batch_size) < 1:
            raise ValueError(f"{section}.batch_size={size}: use 1 or more")
        self.sampler.check()
        if method := self.method(section):
            searcher.check(method, self.search, self.sampler, section)
