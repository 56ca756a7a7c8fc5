"""What the ablation compares: rows of the suites, and what the papers report for them.

preference   the objectives of PhyGDPO's comparison, and sweeps of its hyperparameters
physics      PhysisForcing's two terms and the self-score regulariser, on SFT and on PhyGDPO
precision    the recipe in float32, bfloat16 and with 8-bit products
timesteps    where t is drawn: the distributions of the large recipes, of the released code, and of this one
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

FULL_COPY_RATE = 1e-4  # all weights need smaller steps than adapters

# ---- the paper's figures (arXiv 2512.24551): "Overall" on VideoPhy2, the share of clips that an automatic rater gives
# ---- 4 or 5 of 5 for both semantics and physics. Another scale and another test than the sandbox's.

PAPER = {
    "2b": (
        "Wan2.1-14B",
        {"Baseline": 0.1288, "+ LoRA-SR": 0.1458, "+ Groupwise Model": 0.1559, "+ Physics Rewarding": 0.1627},
    ),
    "2c": ("Wan2.1-1.3B", {"Baseline": 0.1232, "Flow-DPO": 0.1283, "VideoDPO": 0.1305, "PhyGDPO": 0.1407}),
    "2d": ("Wan2.1-1.3B", {"Baseline": 0.1232, "LoRA-SFT": 0.1283, "w/o LoRA-SR": 0.1373, "with LoRA-SR": 0.1407}),
}
TABLE_3 = {  # on Wan2.1-14B, each around the values of eq. 9 below
    "alpha_min": {0.3: 0.1582, 0.4: 0.1591, 0.5: 0.1627, 0.6: 0.1615, 0.7: 0.1608},
    "k_alpha": {4.0: 0.1611, 4.5: 0.1579, 5.0: 0.1627, 5.5: 0.1593, 6.0: 0.1618},
    "b_alpha": {0.3: 0.1582, 0.4: 0.1579, 0.5: 0.1627, 0.6: 0.1598, 0.7: 0.1602},
    "lam": {0.3: 0.1592, 0.4: 0.1586, 0.5: 0.1608, 0.6: 0.1627, 0.7: 0.1615},
    "k_gamma": {1.0: 0.1588, 1.5: 0.1609, 2.0: 0.1627, 2.5: 0.1592, 3.0: 0.1598},
    "b_gamma": {0.3: 0.1586, 0.4: 0.1627, 0.5: 0.1582, 0.6: 0.1607, 0.7: 0.1595},
}
# PhysisForcing (its Tables 4 to 6): R-Bench's average, and PAI-Bench-G's robot domain for the block.
PAPER |= {
    "PF4": ("Wan2.2-TI2V-5B", {"fine-tuned": 44.8, "+ pix": 47.2, "+ sem": 46.2, "+ both": 47.5}),
    "PF5": ("Wan2.2-TI2V-5B", {"everywhere": 46.0, "focused": 47.5}),
    "PF6": ("Wan2.2-TI2V-5B", {"layer 10": 83.9, "layer 15 of 30": 85.2, "layer 20": 84.1, "layer 25": 83.2}),
}
# What the objective has where the recipe is silent: the paper's values, and this project's beta.
DEFAULTS = {
    "beta": 1000.0,
    "alpha_min": 0.5,
    "k_alpha": 5.0,
    "b_alpha": 0.5,
    "k_gamma": 2.0,
    "b_gamma": 0.4,
    "lam": 0.6,
}

# The group sets: arguments of the build.
TARGETS = (
    "targets.tracks=simulator",
    "targets.depth=simulator",
    "targets.relation=vjepa2",
    "targets.vjepa2.path=eval/sandbox/world_model",
)
GROUPS = {
    "groups": ("pipeline.num_losers=4",),
    "pairs": ("pipeline.num_losers=1",),
    "targets": ("pipeline.num_losers=4", *TARGETS),
    "everywhere": ("pipeline.num_losers=4", *TARGETS, "targets.rule=all"),
}

# ---- the rows --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    name: str  # of its folders
    label: str  # in the table
    trainer: str  # module; empty: nothing is trained
    overrides: tuple[str, ...] = ()
    paper: tuple[tuple[str, str], ...] = ()  # (table, its row) in PAPER
    groups: str = "groups"  # a key of GROUPS
    sweep: tuple[str, float] | None = None  # (key, value)
    against: str = "sft"  # the row that it is compared with


@dataclass(frozen=True)
class Suite:
    rows: dict[str, Row]  # by name, in the table's order
    defaults: dict[str, float]  # of the keys that are swept: where the row `middle` stands
    middle: str


# Without the anchor the recipe's learning rate ruins the model; these rows get one that does not.
GENTLE = ("objective.w_fm=0", "optim.lr=1e-4", "optim.lr_end=1e-5")
PLAIN = ("objective.physics_guided=false", *GENTLE)
METHODS = (
    Row("base", "base model", "", (), (("2c", "Baseline"), ("2b", "Baseline"))),
    Row("sft", "LoRA-SFT", "train.sft", (), (("2d", "LoRA-SFT"),)),
    Row(
        "videodpo",
        "VideoDPO-style, lr 1e-4",
        "train.gdpo",
        ("objective.winner=generated", *PLAIN),
        (("2c", "VideoDPO"),),
    ),
    Row(
        "flow_dpo", "Flow-DPO, lr 1e-4", "train.gdpo", PLAIN, (("2c", "Flow-DPO"), ("2b", "+ LoRA-SR")), groups="pairs"
    ),
    Row(
        "gdpo_no_pgr",
        "PhyGDPO, no physics weights",
        "train.gdpo",
        ("objective.physics_guided=false",),
        (("2b", "+ Groupwise Model"),),
    ),
    Row("gdpo", "PhyGDPO (recipe)", "train.gdpo", (), (("2c", "PhyGDPO"), ("2b", "+ Physics Rewarding"))),
    # The objective as the paper writes it.
    Row("gdpo_no_anchor", "PhyGDPO, no anchor, lr 1e-4", "train.gdpo", GENTLE),
    Row("gdpo_no_anchor_fast", "PhyGDPO, no anchor", "train.gdpo", ("objective.w_fm=0",)),
    Row(  # eq. 13 counts a pair once for each of 4 losers, eq. 6 does not: a quarter of the anchor
        "plackett_luce", "PhyGDPO, exact eq. 6", "train.gdpo", ("objective.loss=plackett_luce", "objective.w_fm=50")
    ),
    Row(
        "full_copy",
        "PhyGDPO, full copy",
        "train.gdpo",
        ("train.parameters=full", f"optim.lr={FULL_COPY_RATE}", f"optim.lr_end={FULL_COPY_RATE / 10}"),
        (("2d", "w/o LoRA-SR"),),
    ),
)
BETA_FACTORS = (1 / 10, 1 / 3, 3, 10)  # of the recipe's beta
SWEEPS = {
    "alpha_min": (0.3, 0.7),
    "k_alpha": (4, 6),
    "b_alpha": (0.3, 0.7),
    "k_gamma": (1, 4),
    "b_gamma": (0.2, 0.6),
    "lam": (0.3, 0.9),
}


def preference(recipe: Mapping[str, Mapping[str, Any]]) -> Suite:
    """The preference rows around the values of the recipe."""
    defaults = {key: recipe["objective"].get(key, value) for key, value in DEFAULTS.items()}

    def swept(name: str, key: str, value: float) -> Row:
        return Row(name, f"{key} = {value:g}", "train.gdpo", (f"objective.{key}={value:g}",), sweep=(key, value))

    rows = list(METHODS)
    rows += [swept(f"beta_x{factor:.2g}", "beta", defaults["beta"] * factor) for factor in BETA_FACTORS]
    rows += [swept(f"{key}_{value:g}", key, value) for key, values in SWEEPS.items() for value in values]
    return Suite({row.name: row for row in rows}, defaults, "gdpo")


W_PIX, W_SEM, W_SELF = 10.0, 1.0, 10.0  # beside SFT's flow error, whose weight is 1
# On PhyGDPO, whose anchor weighs the same error by 200: what a quarter of it did was better than the whole.
ON_GDPO = {"physics.w_pix": 50.0, "physics.w_sem": 50.0, "self_score.weight": 600.0}
# Asked every step, for the networks are small; at higher levels than Proprio scores at, where it has something to say.
ASKED = ("self_score.every=1", "self_score.t_min=0.6", "self_score.t_max=0.9", "self_score.motion_mask=false")
MIDDLE, BLOCKS = 3, (0, 1, 2, 4, 5)  # of the sandbox's six blocks
FACTORS = (1 / 10, 10)


def physics(recipe: Mapping[str, Mapping[str, Any]]) -> Suite:
    """The physics rows; all train on the same clips."""

    def row(name: str, label: str, *, pix: float = 0, sem: float = 0, own: float = 0, more=(), **options) -> Row:
        trainer = "train.sft" if name.startswith("sft") else "train.gdpo"
        weights = {"physics.w_pix": pix, "physics.w_sem": sem, "self_score.weight": own}
        if trainer == "train.gdpo":
            weights = {key: value * ON_GDPO[key] for key, value in weights.items()}
        overrides = [f"{key}={value:g}" for key, value in weights.items() if value]
        overrides += ASKED if own else ()
        against = "sft" if trainer == "train.sft" else "gdpo"
        return Row(name, label, trainer, (*overrides, *more), **{"groups": "targets", "against": against} | options)

    def swept(name: str, key: str, value: float, **options) -> Row:
        return row(name, f"{key} = {value:g}", sweep=(key, value), **options)

    both = {"pix": W_PIX, "sem": W_SEM}
    everywhere = {"groups": "everywhere", "more": ("physics.region_focus=false",)}
    rows = [
        Row("base", "base model", ""),
        row("sft", "LoRA-SFT", paper=(("PF4", "fine-tuned"),)),
        row("sft_pix", "SFT + trajectories", pix=W_PIX, paper=(("PF4", "+ pix"),)),
        row("sft_sem", "SFT + relations", sem=W_SEM, paper=(("PF4", "+ sem"),)),
        row("sft_both", "SFT + both", **both, paper=(("PF4", "+ both"), ("PF5", "focused"), ("PF6", "layer 15 of 30"))),
        row("sft_pix_everywhere", "SFT + trajectories of all points", pix=W_PIX, **everywhere),
        row("sft_sem_everywhere", "SFT + relations of all tokens", sem=W_SEM, **everywhere),
        row("sft_both_everywhere", "SFT + both, everywhere", **both, **everywhere, paper=(("PF5", "everywhere"),)),
        row("sft_self", "SFT + self-score", own=W_SELF),
        row("sft_all", "SFT + all three", **both, own=W_SELF),
        row("gdpo", "PhyGDPO (recipe)"),
        row("gdpo_both", "PhyGDPO + both", **both),
        row("gdpo_self", "PhyGDPO + self-score", own=W_SELF),
        row("gdpo_all", "PhyGDPO + all three", **both, own=W_SELF),
    ]
    for block in BLOCKS:
        rows.append(swept(f"sft_block_{block}", "block", block, **both, more=(f"physics.block={block}",)))
    for factor in FACTORS:
        rows.append(swept(f"sft_pix_x{factor:.2g}", "w_pix", W_PIX * factor, pix=W_PIX * factor, sem=W_SEM))
    for factor in FACTORS:
        rows.append(swept(f"sft_sem_x{factor:.2g}", "w_sem", W_SEM * factor, pix=W_PIX, sem=W_SEM * factor))
    return Suite({row.name: row for row in rows}, {"block": MIDDLE, "w_pix": W_PIX, "w_sem": W_SEM}, "sft_both")


FUSED = ("backbone.dtype=bfloat16", "train.compile=true")  # as the large recipes; float8 needs a GPU


def precision(recipe: Mapping[str, Mapping[str, Any]]) -> Suite:
    """The recipe's PhyGDPO in float32, in bfloat16 with fused blocks, and with 8-bit products besides."""
    rows = [
        Row("base", "base model", "", against="gdpo"),
        Row("gdpo", "float32", "train.gdpo", against="base"),
        Row("gdpo_bf16", "bfloat16, fused blocks", "train.gdpo", FUSED, against="gdpo"),
        Row("gdpo_float8", "+ float8", "train.gdpo", (*FUSED, "train.float8=true"), against="gdpo_bf16"),
    ]
    return Suite({row.name: row for row in rows}, {}, "gdpo")


def timesteps(recipe: Mapping[str, Mapping[str, Any]]) -> Suite:
    """The recipe's PhyGDPO with t drawn elsewhere: uniform at shifts 1 (the large recipes), 3 (this recipe's sampling
    grid, eqs. 5 and 6) and 5 (the released code), logit-normal at shifts 1 and 3 (this recipe)."""
    rows = [Row("base", "base model", "", against="logit_normal_3")]
    for kind, shift in (("uniform", 1), ("uniform", 3), ("uniform", 5), ("logit_normal", 1), ("logit_normal", 3)):
        overrides = (f"objective.timesteps={kind}", f"objective.timestep_shift={shift}")
        label = f"{kind.replace('_', '-')}, shift {shift}"
        rows.append(Row(f"{kind}_{shift}", label, "train.gdpo", overrides, against="logit_normal_3"))
    return Suite({row.name: row for row in rows}, {}, "logit_normal_3")


SUITES: dict[str, Callable[[Mapping[str, Mapping[str, Any]]], Suite]] = {
    "preference": preference,
    "physics": physics,
    "precision": precision,
    "timesteps": timesteps,
}


def paper_figures(row: Row) -> list[dict[str, Any]]:
    """What the paper reports for this row: table, model, the row's name there, Overall."""
    found = [(table, PAPER[table][0], name, PAPER[table][1][name]) for table, name in row.paper]
    if row.sweep and row.sweep[1] in TABLE_3.get(row.sweep[0], {}):
        key, value = row.sweep
        found.append(("3", "Wan2.1-14B", f"{key} = {value:g}", TABLE_3[key][value]))
    return [dict(zip(("table", "model", "name", "overall"), figure, strict=True)) for figure in found]
