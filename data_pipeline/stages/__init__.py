"""The stages of a build by name, in their order; each reads the table of the one before."""

from data_pipeline.contract import Stage
from data_pipeline.stages.cluster import Cluster
from data_pipeline.stages.difficulty import Difficulty
from data_pipeline.stages.encode import Encode
from data_pipeline.stages.filter import Filter
from data_pipeline.stages.generate import Generate
from data_pipeline.stages.judge import JudgeLosers
from data_pipeline.stages.pool import Pool
from data_pipeline.stages.resample import Resample
from data_pipeline.stages.targets import Targets

STAGES: dict[str, type[Stage]] = {
    "pool": Pool,  # all clips of all sources, with their prompts
    "filter": Filter,  # a language model keeps the physics-rich ones
    "cluster": Cluster,  # an action for each
    "difficulty": Difficulty,  # how well the model does each action already
    "resample": Resample,  # as many of each action as its difficulty asks for
    "generate": Generate,  # the losers: the model's own clips
    "judge": JudgeLosers,  # scores of the losers
    "targets": Targets,  # tracks and other references of the winners
    "encode": Encode,  # latents and text embeddings, all of it into shards
}
