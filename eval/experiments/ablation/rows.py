"""What the ablation compares: rows of the suites, and what the papers report for them.

preference   the objectives of PhyGDPO's comparison, and sweeps of its hyperparameters
physics      PhysisForcing's two terms and the self-score regulariser, on SFT and on PhyGDPO
precision    the recipe in float32, bfloat16, with 8-bit products, and with 8-bit matrices
timesteps    where t is drawn: uniform, of the released code, and of this one
losers       how losers are made, and what they cost in network passes
transfer     whether the anchor's best weight stays where it is when beta, the number of losers or the loss change
robots       the physics terms on the robots of eval/robots, with a planner's success, and two searches
"""

from collections.abc import Callable
from typing import Any

from eval.experiments.ablation.physics import ASKED, physics, robots
from eval.experiments.ablation.suite import SANDBOX, START, WORLD_MODEL, Row, Sections, Suite, World

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
TEACHERS = ("targets.tracks=simulator", "targets.depth=simulator", "targets.relation=vjepa2")
TARGETS = (*TEACHERS, "targets.vjepa2.path=eval/sandbox/world_model")
ROBOTS_TARGETS = (*TEACHERS, f"targets.vjepa2.path={WORLD_MODEL}")
GROUPS = {
    "groups": ("pipeline.losers.count=4",),
    "pairs": ("pipeline.losers.count=1",),
    "targets": ("pipeline.losers.count=4", *TARGETS),
    "everywhere": ("pipeline.losers.count=4", *TARGETS, "targets.rule=all"),
    "robots_targets": ("pipeline.losers.count=4", *ROBOTS_TARGETS),
    "robots_everywhere": ("pipeline.losers.count=4", *ROBOTS_TARGETS, "targets.rule=all"),
}


def losers(count: int, **keys: Any) -> tuple[str, ...]:
    """Arguments of a build with `count` losers, sampled by these keys of pipeline.losers."""
    return (f"pipeline.losers.count={count}", *(f"pipeline.losers.{key}={value}" for key, value in keys.items()))


CORRUPTED = "losers_corrupted"  # made of the set "groups", by `ablation.corrupted`
GROUPS |= {f"losers_{count}x{steps}": losers(count, steps=steps) for count, steps in ((4, 5), (4, 3), (4, 2), (4, 1))}
GROUPS |= {
    "losers_1x5": losers(1, steps=5),
    "losers_1x3": losers(1, steps=3),
    "losers_1x2": losers(1, steps=2),
    "losers_1x3_unipc": losers(1, steps=3, solver="unipc"),
    "losers_1x3_guided": losers(1, steps=3, guidance=2),
    "losers_1x3_interval": losers(1, steps=3, guidance=2, guided="[0.8,1]"),
    "losers_cached": losers(4, cache=0.15),
    **{f"losers_winner_{t}": losers(4, steps=4, start_time=f"0.{t}") for t in (80, 85, 90, 95)},
    "losers_wide_1x3": (*losers(1, steps=3), "pipeline.manifest=sandbox:mixed:512"),
    "losers_wide_4x3": (*losers(4, steps=3), "pipeline.manifest=sandbox:mixed:512"),
    CORRUPTED: (),
}

# ---- the rows --------------------------------------------------------------------------------------------------------


def gdpo(name: str, label: str, *overrides: str, **more: Any) -> Row:
    """A row of train.gdpo."""
    return Row(name, label, "train.gdpo", overrides, **more)


# Without the anchor the recipe's learning rate ruins the model; these rows get one that does not.
GENTLE = ("objective.anchor=0", "optim.lr=1e-4", "optim.lr_end=1e-5")
UNGUIDED = "objective.physics_guided=false"
PLAIN = (UNGUIDED, *GENTLE)
SMALL_STEPS = ("optim.lr=0.0001", "optim.lr_end=1e-05")  # all weights need smaller ones than adapters
METHODS = (
    Row("base", "base model", "", (), (("2c", "Baseline"), ("2b", "Baseline"))),
    Row("sft", "LoRA-SFT", "train.sft", (), (("2d", "LoRA-SFT"),)),
    gdpo("videodpo", "VideoDPO-style, lr 1e-4", "objective.winner=generated", *PLAIN, paper=(("2c", "VideoDPO"),)),
    gdpo("flow_dpo", "Flow-DPO, lr 1e-4", *PLAIN, paper=(("2c", "Flow-DPO"), ("2b", "+ LoRA-SR")), groups="pairs"),
    gdpo("gdpo_no_pgr", "PhyGDPO, no physics weights", UNGUIDED, paper=(("2b", "+ Groupwise Model"),)),
    gdpo("gdpo", "PhyGDPO (recipe)", paper=(("2c", "PhyGDPO"), ("2b", "+ Physics Rewarding"))),
    # The objective as the paper writes it.
    gdpo("gdpo_no_anchor", "PhyGDPO, no anchor, lr 1e-4", *GENTLE),
    gdpo("gdpo_no_anchor_fast", "PhyGDPO, no anchor", "objective.anchor=0"),
    gdpo("plackett_luce", "PhyGDPO, exact eq. 6", "objective.loss=plackett_luce"),
    gdpo("full_copy", "PhyGDPO, full copy", "train.parameters=full", *SMALL_STEPS, paper=(("2d", "w/o LoRA-SR"),)),
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


def preference(read: Callable[[World], Sections]) -> Suite:
    """The preference rows around the values of the recipe."""
    objective = read(SANDBOX)["objective"]
    defaults = {key: objective.get(key, value) for key, value in DEFAULTS.items()}

    def swept(name: str, key: str, value: float) -> Row:
        return gdpo(name, f"{key} = {value:g}", f"objective.{key}={value:g}", sweep=(key, value))

    rows = list(METHODS)
    rows += [swept(f"beta_x{factor:.2g}", "beta", defaults["beta"] * factor) for factor in BETA_FACTORS]
    rows += [swept(f"{key}_{value:g}", key, value) for key, values in SWEEPS.items() for value in values]
    return Suite({row.name: row for row in rows}, defaults, "gdpo")


FUSED = ("backbone.dtype=bfloat16", "backbone.compile=true")  # as the large recipes


def precision(read: Callable[[World], Sections]) -> Suite:
    """The recipe's PhyGDPO in float32, in bfloat16 with fused blocks, with 8-bit products besides, and with the blocks'
    matrices in 8 bits instead."""
    rows = [
        Row("base", "base model", "", against="gdpo"),
        gdpo("gdpo", "float32", against="base"),
        gdpo("gdpo_bf16", "bfloat16, fused blocks", *FUSED, against="gdpo"),
        gdpo("gdpo_float8", "+ float8", *FUSED, "train.float8=true", against="gdpo_bf16"),
        gdpo("gdpo_stored_float8", "8-bit matrices", "backbone.dtype=float8", FUSED[1], against="gdpo_bf16"),
    ]
    return Suite({row.name: row for row in rows}, {}, "gdpo")


def timesteps(read: Callable[[World], Sections]) -> Suite:
    """The recipe's PhyGDPO with t drawn elsewhere: uniform at shifts 1 (the large recipes), 3 (this recipe's sampling
    grid, eqs. 5 and 6) and 5 (the released code), logit-normal at shifts 1 and 3 (this recipe)."""
    rows = [Row("base", "base model", "", against="logit_normal_3")]
    for kind, shift in (("uniform", 1), ("uniform", 3), ("uniform", 5), ("logit_normal", 1), ("logit_normal", 3)):
        overrides = (f"objective.timesteps={kind}", f"objective.timestep_shift={shift}")
        label = f"{kind.replace('_', '-')}, shift {shift}"
        rows.append(gdpo(f"{kind}_{shift}", label, *overrides, against="logit_normal_3"))
    return Suite({row.name: row for row in rows}, {}, "logit_normal_3")


LONG, LONGER = ("optim.steps=450",), ("optim.steps=600",)
ASKED_SELDOM = ("self_score.every=4", *ASKED[1:])


def loser_rows(read: Callable[[World], Sections]) -> Suite:
    """The recipe's PhyGDPO with losers that cost less, or none, and with the time that this saves spent on training."""

    def row(name: str, label: str, groups: str, passes: float, overrides: tuple[str, ...] = (), **more) -> Row:
        groups = groups if groups == "groups" else f"losers_{groups}"
        return gdpo(name, label, *overrides, groups=groups, passes=passes, **{"against": "gdpo"} | more)

    def asked(strength: float) -> tuple[str, ...]:
        return (*ASKED_SELDOM, f"self_score.strength={strength:g}")

    rows = [
        Row("base", "base model", "", against="gdpo"),
        Row("sft", "LoRA-SFT", "train.sft", against="gdpo", passes=0),
        row("gdpo", "4 of 10 steps (recipe)", "groups", 40, against="sft"),
        row("gdpo_long", "the same, 600 training steps", "groups", 40, LONGER),
        *(row(f"4x{steps}", f"4 of {steps}", f"4x{steps}", 4 * steps) for steps in (5, 3, 2, 1)),
        *(row(f"1x{steps}", f"1 of {steps}", f"1x{steps}", steps) for steps in (5, 3, 2)),
        row("1x3_450", "1 of 3, 450 training steps", "1x3", 3, LONG),
        row("1x3_600", "1 of 3, 600 training steps", "1x3", 3, LONGER),
        row("1x2_450", "1 of 2, 450 training steps", "1x2", 2, LONG),
        row("1x3_unipc", "1 of 3, UniPC", "1x3_unipc", 3),
        row("1x3_guided", "1 of 3, guidance 2", "1x3_guided", 6),
        row("1x3_interval", "1 of 3, guidance 2 at t >= 0.8", "1x3_interval", 5),
        row("cached", "4 of 10, residual cache", "cached", 24),  # whole passes, the mean of 32 prompts
        *(row(f"winner_{t}", f"4 of 4 from the winner at t = 0.{t}", f"winner_{t}", 16) for t in (80, 85, 90, 95)),
        row("corrupted", "4 winners with frames in another order", "corrupted", 0),
        row("wide_1x3", "512 prompts, 1 of 3, 600 training steps", "wide_1x3", 3, LONGER),
        row("wide_4x3", "512 prompts, 4 of 3, 600 training steps", "wide_4x3", 12, LONGER),
        row("gdpo_self", "recipe + self-score every 4th step", "groups", 40, asked(30)),
        row("1x3_self", "1 of 3 + self-score every 4th step", "1x3", 3, asked(30)),
        row("1x3_450_self", "the same, 450 training steps", "1x3", 3, (*LONG, *asked(30))),
        row("1x3_self_120", "1 of 3 + self-score 120 every 4th step", "1x3", 3, asked(120)),
        row("1x3_self_each", "1 of 3 + self-score every step", "1x3", 3, (*ASKED, "self_score.strength=30")),
    ]
    return Suite({row.name: row for row in rows}, {}, "gdpo")


ANCHORS = (0.3, 1, 3)
SETTINGS = {
    "recipe": ("beta 50, 4 losers, eq. 13", "groups", ()),
    "beta_17": ("beta 17", "groups", ("objective.beta=17",)),
    "beta_150": ("beta 150", "groups", ("objective.beta=150",)),
    "pairs": ("1 loser", "pairs", ()),
    "plackett_luce": ("eq. 6", "groups", ("objective.loss=plackett_luce",)),
}


def transfer(read: Callable[[World], Sections]) -> Suite:
    """The anchor's weight, in units of the slope, where beta, the losers or the loss are others than the recipe's."""
    rows = [Row("base", "base model", "", against="recipe_1")]
    for name, (label, groups, overrides) in SETTINGS.items():
        for anchor in ANCHORS:
            own = (f"objective.anchor={anchor}", *overrides)
            against = f"{name}_1" if anchor != 1 else "recipe_1"
            rows.append(gdpo(f"{name}_{anchor}", f"{label}, anchor {anchor}", *own, groups=groups, against=against))
    return Suite({row.name: row for row in rows}, {}, "recipe_1")


HALF = ("optim.steps=150",)


def starts(read: Callable[[World], Sections]) -> Suite:
    """Supervised training first, then preferences, at the recipe's number of steps in all: from the LoRA as policy with
    the base model as reference, and with it merged into both."""
    merged, after = (f"backbone.loras=[{{path: '{START}'}}]",), {"against": "gdpo", "start": "sft_half"}
    rows = [
        Row("base", "base model", "", against="gdpo"),
        Row("sft", "LoRA-SFT", "train.sft", against="gdpo"),
        gdpo("gdpo", "PhyGDPO (recipe)", against="sft"),
        Row("sft_half", "LoRA-SFT, half the steps", "train.sft", HALF, against="gdpo"),
        gdpo("sft_start", "then PhyGDPO from its LoRA", *HALF, f"lora.start={START}", **after),
        gdpo("sft_merged", "then PhyGDPO on it, merged", *HALF, **after, base=merged),
    ]
    return Suite({row.name: row for row in rows}, {}, "gdpo")


# By name. Each is given what reads a world's recipe with the command line's overrides.
SUITES: dict[str, Callable[[Callable[[World], Sections]], Suite]] = {
    "preference": preference,
    "physics": physics,
    "precision": precision,
    "timesteps": timesteps,
    "losers": loser_rows,
    "transfer": transfer,
    "starts": starts,
    "robots": robots,
}


def paper_figures(row: Row) -> list[dict[str, Any]]:
    """What the paper reports for this row: table, model, the row's name there, Overall."""
    found = [(table, PAPER[table][0], name, PAPER[table][1][name]) for table, name in row.paper]
    if row.sweep and row.sweep[1] in TABLE_3.get(row.sweep[0], {}):
        key, value = row.sweep
        found.append(("3", "Wan2.1-14B", f"{key} = {value:g}", TABLE_3[key][value]))
    return [dict(zip(("table", "model", "name", "overall"), figure, strict=True)) for figure in found]
