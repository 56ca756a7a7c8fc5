"""diffusers' First Block Cache around the passes of a sampler: a pass may end after its first block."""

from collections.abc import Iterator
from contextlib import contextmanager

from diffusers import FirstBlockCacheConfig
from diffusers.models.cache_utils import CacheMixin

from train.backbones.base import Backbone


@contextmanager
def residual_cache(backbone: Backbone, threshold: float) -> Iterator[None]:
    """Inside, passes of one batch of clips, step after step, may end after the first block (`SamplerConfig.cache`).

    ValueError for networks that have no such cache in diffusers.
    """
    for name, expert in backbone.experts.items():
        if not (isinstance(expert, CacheMixin) and backbone.kind.cached):
            raise ValueError(
                f"cache={threshold:g}: the {name} network has no residual cache in diffusers; set cache to 0"
            )
    try:
        for expert in backbone.experts.values():
            expert.enable_cache(FirstBlockCacheConfig(threshold=threshold))
        yield
    finally:
        for expert in backbone.experts.values():
            if expert.is_cache_enabled:
                expert.disable_cache()
