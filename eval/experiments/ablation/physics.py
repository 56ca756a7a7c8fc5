"""The suites of PhysisForcing's two terms and the self-score, on the sandbox and on the robots."""

from collections.abc import Callable
from functools import partial

from eval.experiments.ablation.suite import NUM_CANDIDATES, ROBOTS, Row, Sections, Suite, World

W_PIX, W_SEM, W_SELF = 10.0, 1.0, 10.0  # beside SFT's flow error, whose weight is 1
# On PhyGDPO, in units of its slope: a quarter was better than the whole, of the self-score three times as much.
ON_GDPO = {"physics.trajectory": 0.25, "physics.relational": 0.25, "self_score.strength": 3.0}
# Asked every step, for the networks are small; at higher levels than Proprio scores at, where it has something to say.
ASKED = ("self_score.every=1", "self_score.t_min=0.6", "self_score.t_max=0.9", "self_score.motion_mask=false")
MIDDLE, BLOCKS = 3, (0, 1, 2, 4, 5)  # of the sandbox's six blocks
ROBOTS_MIDDLE, ROBOTS_BLOCKS = 2, (0, 1, 3, 4)  # of the robots' five
FACTORS = (1 / 10, 10)
BOTH = {"pix": W_PIX, "sem": W_SEM}


def row(name: str, label: str, *, pix: float = 0, sem: float = 0, own: float = 0, more=(), **options) -> Row:
    """A trained row with these weights of the trajectory term, the relational one and the self-score."""
    trainer = "train.sft" if name.startswith("sft") else "train.gdpo"
    weights = {"physics.trajectory": pix, "physics.relational": sem, "self_score.strength": own}
    if trainer == "train.gdpo":
        weights = {key: value * ON_GDPO[key] for key, value in weights.items()}
    overrides = [f"{key}={value:g}" for key, value in weights.items() if value]
    overrides += ASKED if own else ()
    against = "sft" if trainer == "train.sft" else "gdpo"
    return Row(name, label, trainer, (*overrides, *more), **{"groups": "targets", "against": against} | options)


def swept(name: str, key: str, value: float, **options) -> Row:
    return row(name, f"{key} = {value:g}", sweep=(key, value), **options)


def supervised(groups: str, groups_everywhere: str) -> list[Row]:
    """The rows on SFT without the self-score."""
    make = partial(row, groups=groups)
    everywhere = {"groups": groups_everywhere, "more": ("physics.region_focus=false",)}
    papers = (("PF4", "+ both"), ("PF5", "focused"), ("PF6", "layer 15 of 30"))
    return [
        Row("base", "base model", ""),
        make("sft", "LoRA-SFT", paper=(("PF4", "fine-tuned"),)),
        make("sft_pix", "SFT + trajectories", pix=W_PIX, paper=(("PF4", "+ pix"),)),
        make("sft_sem", "SFT + relations", sem=W_SEM, paper=(("PF4", "+ sem"),)),
        make("sft_both", "SFT + both", **BOTH, paper=papers),
        row("sft_pix_everywhere", "SFT + trajectories of all points", pix=W_PIX, **everywhere),
        row("sft_sem_everywhere", "SFT + relations of all tokens", sem=W_SEM, **everywhere),
        row("sft_both_everywhere", "SFT + both, everywhere", **BOTH, **everywhere, paper=(("PF5", "everywhere"),)),
    ]


def physics(read: Callable[[World], Sections]) -> Suite:
    """The physics rows; all train on the same clips."""
    rows = [
        *supervised("targets", "everywhere"),
        row("sft_self", "SFT + self-score", own=W_SELF),
        row("sft_all", "SFT + all three", **BOTH, own=W_SELF),
        row("gdpo", "PhyGDPO (recipe)"),
        row("gdpo_both", "PhyGDPO + both", **BOTH),
        row("gdpo_self", "PhyGDPO + self-score", own=W_SELF),
        row("gdpo_all", "PhyGDPO + all three", **BOTH, own=W_SELF),
    ]
    for block in BLOCKS:
        rows.append(swept(f"sft_block_{block}", "block", block, **BOTH, more=(f"physics.block={block}",)))
    for factor in FACTORS:
        rows.append(swept(f"sft_pix_x{factor:.2g}", "trajectory", W_PIX * factor, pix=W_PIX * factor, sem=W_SEM))
    for factor in FACTORS:
        rows.append(swept(f"sft_sem_x{factor:.2g}", "relational", W_SEM * factor, pix=W_PIX, sem=W_SEM * factor))
    return Suite(
        {row.name: row for row in rows}, {"block": MIDDLE, "trajectory": W_PIX, "relational": W_SEM}, "sft_both"
    )


def robots(read: Callable[[World], Sections]) -> Suite:
    """The physics rows on the robots: of the groups the winners are demonstrations, the losers the model's own. And two
    searches on top of SFT, of which clips alone are measured: the planner imagines one clip, whatever searches."""
    groups = {"groups": "robots_targets"}
    searched = {"groups": "", "start": "sft"}
    by_surprise = {**searched, "search": "surprise"}
    rows = [
        *supervised("robots_targets", "robots_everywhere"),
        row("gdpo", "PhyGDPO (recipe)", **groups),
        row("gdpo_all", "PhyGDPO + all three", **BOTH, own=W_SELF, **groups),
        Row("sft_residual", f"SFT, best of {NUM_CANDIDATES} by residual", "", **searched, search="residual_per_motion"),
        Row("sft_surprise", f"SFT, best of {NUM_CANDIDATES} by surprise", "", **by_surprise),
    ]
    for block in ROBOTS_BLOCKS:
        rows.append(swept(f"sft_block_{block}", "block", block, **BOTH, more=(f"physics.block={block}",), **groups))
    return Suite({row.name: row for row in rows}, {"block": ROBOTS_MIDDLE}, "sft_both", ROBOTS)
