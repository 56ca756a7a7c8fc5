"""Scorers by name: build(SearchConfig, Backbone, fps, Judging) -> Scorer, lower is better; see
`eval.search.candidates`.

Proprio's are named proprio_<variant>[-<mask>][-uniform]; left out, the paper's: the motion mask, inverse variance.
A new scorer is a file, a line in SCORERS, and a line in SETTINGS: the settings that its values depend on
(`eval.search.searcher.scorer_settings`).
"""

from functools import partial

from eval.judges import build_judge
from eval.search.scorers import proprio
from eval.search.scorers.baselines import most_motion, random_choice
from eval.search.scorers.judge import judge_score
from eval.search.scorers.per_motion import PerMotion
from eval.search.scorers.surprise import Surprise

PROPRIO = {
    f"proprio_{variant}{mask}{weighting}": partial(
        proprio.build, variant=variant, mask=mask[1:] or "motion", weighting=weighting[1:] or "inverse_variance"
    )
    for variant in proprio.VARIANTS
    for mask in ("", "-text", "-attention")
    for weighting in ("", "-uniform")
    if variant != "global" or not mask
}
SCORERS = {
    "random": lambda config, backbone, fps, judging: random_choice,
    "most_motion": lambda config, backbone, fps, judging: most_motion,
    **PROPRIO,
    "residual_per_motion": partial(PROPRIO["proprio_global-uniform"], kind=PerMotion),
    "masked_residual_per_motion": partial(PROPRIO["proprio_motion-uniform"], kind=PerMotion),
    "surprise": lambda config, backbone, *_: Surprise(config.surprise, backbone.device, batch=config.batch_size),
    "judge": lambda config, backbone, fps, judging: partial(judge_score, build_judge(judging, fps, backbone.device)),
}
SETTINGS = {
    **{name: ("residuals", "mixing") for name in PROPRIO},
    "residual_per_motion": ("residuals",),
    "masked_residual_per_motion": ("residuals",),
    "surprise": ("surprise",),
    "judge": ("judge", "judge_aspect"),
}
