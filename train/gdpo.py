"""PhyGDPO: physics-aware groupwise direct preference optimization of Wan (arXiv 2512.24551), the main trainer.

    accelerate launch train/gdpo.py recipe=wan14b                     # one process, or as your accelerate config says
    accelerate launch --config_file launch/zero3.yaml train/gdpo.py recipe=wan14b
    python -m train.gdpo recipe=wan14b --dry-run                      # print the derived numbers and stop

A group is a real clip w and M generated losers l_j of one prompt. With l the flow error at one drawn time t, theta
the policy and psi the reference (the same network with its adapters switched off):

    x_j  = beta [(l_theta(w) - l_psi(w)) - (l_theta(l_j) - l_psi(l_j))]
    loss = -M gamma_j log sigmoid(-alpha_j x_j)   for one sampled j    (eq. 13, objective.loss=bound)
         = log(1 + sum_j exp(x_j))                over all losers      (eq. 6,  objective.loss=plackett_luce)

Either is a function of few flow errors, so its gradient is a sum of the errors' own gradients with scalar
coefficients. With `train.pairs_per_pass=1` only one clip's activations live at a time, whatever M: `train.policy`.

`objective.anchor` adds the winner's own flow error, as supervised fine-tuning has it, and train/terms adds three terms,
which read the winner's pass and share its backward:

    loss += S (anchor l_theta(w) + trajectory L_pix + relational L_sem + strength L_self)

S is the slope of the preference loss at a margin of 0, without alpha, gamma and the sigmoid's 1/2: M beta for eq. 13,
beta for eq. 6. In this unit weights keep their meaning when beta, M or the loss change. Preference losses alone raise
the errors of losers AND winners, the losers' faster; the anchor keeps the winner's down. The paper has none of the
four (objective.preset=paper).

Baselines from the same losses: objective.physics_guided=false is Flow-DPO, with objective.winner=generated
VideoDPO-style; train/sft.py is LoRA-SFT. Deviations: `losses.flow_matching` (a mean for the paper's sum), and the
shared noise of winner and losers, which the paper leaves open (objective.noise=independent draws them apart).
"""

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

import recipes
from losses.flow_matching import bell_weight
from losses.preference import pairwise_bound, physics_guided_weights, plackett_luce, relative_error
from train import entry, validation
from train.backbones import BACKBONES
from train.backbones.base import BackboneConfig
from train.backbones.conditioning import pad_texts
from train.backbones.fused import memory
from train.clips import VideoConfig
from train.cost import Job, clips_per_group
from train.data import Sample
from train.files import seed_of
from train.groups import GroupSet, told
from train.loop import TrainConfig, fit
from train.lora_switch import LoraConfig
from train.optimizer import OptimConfig, learning_rate
from train.plan import print_plan
from train.policy import Policy, Prediction, gradients, policy_errors, reference_errors, winner_passes
from train.sampling import SamplerConfig
from train.teachers.targets import TargetsConfig
from train.terms import TERMS
from train.terms.physics import PhysicsConfig, feature_block
from train.terms.self_score import SelfScoreConfig
from train.timesteps import check_experts, draw_time
from train.validation import ValidationConfig

CHOICES = {
    "loss": ("bound", "plackett_luce"),
    "winner": ("real", "generated"),
    "noise": ("shared", "independent"),
    "timesteps": ("uniform", "logit_normal"),
    "weighting": ("none", "bell"),
}
GUIDED = ("alpha_min", "k_alpha", "b_alpha", "k_gamma", "b_gamma", "lam", "score_floor")  # keys of eq. 9


@dataclass
class ObjectiveConfig:
    # recipe: as it stands | paper: PhyGDPO as printed | released: its authors' code, which differs (recipes/presets)
    preset: str = "recipe"
    loss: str = "bound"  # bound: eq. 13, one sampled loser | plackett_luce: eq. 6, all losers
    beta: float = 1000.0  # multiplies a difference of MEAN squared errors; the knob to sweep
    # Weight of the winner's flow error, which anchors the policy to real clips, in units of the preference loss's slope
    # (`slope`). 1 by the sandbox's figures (eval/experiments/ablation); the paper has none.
    anchor: float = 1.0
    physics_guided: bool = True  # alpha and gamma from the judge's scores (eq. 9); false: both 1
    alpha_min: float = 0.5  # eq. 9, and the next five
    k_alpha: float = 5.0
    b_alpha: float = 0.5
    k_gamma: float = 2.0
    b_gamma: float = 0.4
    lam: float = 0.6
    gamma_per_loser: bool = False  # divide gamma's numerator by the loser's own alpha, not alpha_min (released code)
    score_floor: float = 0.0  # the worst score in eq. 9; 0.2: ratings of 1 to 5 over 5 (released code)
    group_factor: bool = True  # eq. 13's factor m, the losers of the group; false: 1 (released code)
    weighting: str = "none"  # of flow errors by t: none | bell (released code; `losses.flow_matching.bell_weight`)
    winner: str = "real"  # real | generated: the best-scored loser (VideoDPO-style)
    noise: str = "shared"  # shared: winner and losers meet the same noise | independent
    # Eqs. 5 and 6 take t over the T steps of sampling, so a grid of shift 3 to 12, and the released code over one of
    # shift 5. On the sandbox uniform t with shift 1, of which half lies below 0.5, was 0.011 worse than these, paired,
    # and uniform with shift 3 or 5 as good (eval/experiments/ablation/ablation_timesteps.json).
    timesteps: str = "logit_normal"  # uniform | logit_normal
    timestep_shift: float = 3.0  # t <- s t / (1 + (s - 1) t), after the draw
    t_min: float = 0.0  # t is mapped linearly into [t_min, t_max]: an expert's share of [0, 1]
    t_max: float = 1.0
    reference_passes: ClassVar[int] = 1  # forward passes of the reference per clip

    def check(self) -> None:
        """Refuse values that cannot work, naming key, value and remedy."""
        for key, allowed in CHOICES.items():
            if getattr(self, key) not in allowed:
                raise ValueError(f"objective.{key}={getattr(self, key)!r}: must be one of {', '.join(allowed)}")
        if not self.beta > 0:
            raise ValueError(f"objective.beta={self.beta}: must be positive; 1000 suits a mean squared error")
        if not (self.anchor >= 0 and math.isfinite(self.anchor)):
            raise ValueError(f"objective.anchor={self.anchor}: must be 0 (no anchor) or positive")
        if not 0 < self.alpha_min <= 1:
            raise ValueError(f"objective.alpha_min={self.alpha_min}: must lie in (0, 1] for inequality (7) to hold")
        if not 0 <= self.score_floor < 1:
            raise ValueError(f"objective.score_floor={self.score_floor}: must lie in [0, 1); 0 is the paper's")
        if not 0 <= self.t_min < self.t_max <= 1:
            raise ValueError(f"objective.t_min={self.t_min}, t_max={self.t_max}: need 0 <= t_min < t_max <= 1")
        if not (self.timestep_shift > 0 and math.isfinite(self.timestep_shift)):
            raise ValueError(f"objective.timestep_shift={self.timestep_shift}: must be positive; 1 leaves t as drawn")

    def clips_per_group(self, num_losers: int) -> int:
        """Clips that pass through the network for a group of `num_losers` losers."""
        return clips_per_group(self.loss, self.winner, num_losers)


@dataclass
class Config:
    bill: ClassVar[type] = Job  # what a dry run reads besides
    recipe: str = ""  # name or path of a recipe
    output: str = "runs/default"  # everything goes below this folder
    seed: int = 0  # of every draw
    dry_run: bool = False  # print the derived numbers and stop
    ranks: int = 0  # with dry_run: for so many processes, more than one under ZeRO-3; 0: for those of this launch
    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    video: VideoConfig = field(default_factory=VideoConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    physics: PhysicsConfig = field(default_factory=PhysicsConfig)
    targets: TargetsConfig = field(default_factory=TargetsConfig)  # what physics.on_the_fly makes
    self_score: SelfScoreConfig = field(default_factory=SelfScoreConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    train: TrainConfig = field(default_factory=TrainConfig)


def winner_tensors(config: Config, sample: Sample, *, draws: int = 1) -> dict[str, Tensor]:
    """winner (C,F,H,W), t (), noise (draws,C,F,H,W) float32, the group's conditioning, its texts (L,D) padded, and what
    the terms add.

    Drawn on the CPU from a generator seeded by (seed, position): the same on any device and rank.
    """
    group = sample.group
    generator = torch.Generator().manual_seed(draw_seed(config.seed, sample.position))
    texts = BACKBONES[config.backbone.family].text_lengths(config.backbone.text_length)
    tensors = {
        "winner": group.winner,
        **pad_texts(told(group), texts),
        "t": draw_time(config.objective, generator, sample.share),
        "noise": torch.randn(draws, *group.winner.shape, generator=generator),
    }
    if config.train.reference_cache:
        tensors["position"] = torch.tensor(sample.position)
    for term in TERMS.values():
        tensors |= term.prepare(config, sample, generator)
    return tensors


def prepare(config: Config, sample: Sample) -> dict[str, Tensor]:
    """Tensors of one training sample with M' = 1 loser, or all of them: `winner_tensors` with noise (1+M',C,F,H,W), the
    winner's first; losers (M',C,F,H,W), semantic and physical (M',), group_size ()."""
    group, objective = sample.group, config.objective
    chosen = [sample.loser_index] if objective.loss == "bound" else list(range(len(group.losers)))
    tensors = winner_tensors(config, sample, draws=1 if objective.noise == "shared" else 1 + len(chosen))
    return tensors | {
        "losers": group.losers[chosen],
        "noise": tensors["noise"].expand(1 + len(chosen), *group.winner.shape),
        "semantic": torch.tensor([group.losers_info[j].semantic for j in chosen]),
        "physical": torch.tensor([group.losers_info[j].physical for j in chosen]),
        "group_size": torch.tensor(float(len(group.losers))),
    }


def draw_seed(seed: int, position: int) -> int:
    """Generator seed of the draws at one global stream position."""
    return seed_of(f"draws {seed} {position}") >> 7  # 56 bits: the draws of runs begun before stay as they are


def weigh(objective: ObjectiveConfig, errors: Tensor, batch: dict[str, Tensor]) -> Tensor:
    """Flow errors (B,...) times objective.weighting at the batch's t, (B,)."""
    if objective.weighting == "none":
        return errors
    weight = bell_weight(batch["t"], shift=objective.timestep_shift)
    return errors * weight.view(-1, *[1] * (errors.dim() - 1))


def slope(objective: ObjectiveConfig, group_size: Tensor) -> Tensor:
    """The unit of the anchor and the terms, (B,), for groups of M = group_size (B,) losers: M beta, or beta for eq. 6
    and without the factor M.

    By hand: beta 50 and 4 losers give 200 for eq. 13, 50 for eq. 6.
    """
    counted = objective.loss == "bound" and objective.group_factor
    return objective.beta * (group_size if counted else torch.ones_like(group_size))


def preference_loss(
    config: Config, policy: Tensor, reference: Tensor, batch: dict[str, Tensor]
) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss (B,) and its weights from flow errors `policy` and `reference`, both (B, 1+M') with the winner's first and
    without `objective.weighting`."""
    objective = config.objective
    policy, reference = (weigh(objective, errors, batch) for errors in (policy, reference))
    anchor = objective.anchor * slope(objective, batch["group_size"]) * policy[:, 0]
    if objective.loss == "plackett_luce":
        loss = plackett_luce(policy[:, 0], reference[:, 0], policy[:, 1:], reference[:, 1:], beta=objective.beta)
        return loss + anchor, {}
    semantic, physical = batch["semantic"][:, 0], batch["physical"][:, 0]  # (B,)
    alpha, gamma = torch.ones_like(semantic), torch.ones_like(semantic)
    if objective.physics_guided:
        alpha, gamma = physics_guided_weights(semantic, physical, **{key: getattr(objective, key) for key in GUIDED})
        if objective.gamma_per_loser:
            gamma = gamma * objective.alpha_min / alpha
    group_size = batch["group_size"] if objective.group_factor else 1.0
    weights = {"alpha": alpha, "gamma": gamma, "beta": objective.beta, "group_size": group_size}
    loss = pairwise_bound(policy[:, 0], reference[:, 0], policy[:, 1], reference[:, 1], **weights)
    return loss + anchor, {"alpha": alpha.mean(), "gamma": gamma.mean()}


def step(config: Config, policy: Policy, batch: dict[str, Tensor]) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Gradients of the batch's mean loss with respect to the adapters and heads, and metrics.

    Every clip goes through the reference once and through the policy once, forward and backward: `train.policy`.
    """
    reference = reference_errors(policy, batch)  # (B,1+M'), the winner's first
    block = feature_block(config.physics, len(policy.backbone.blocks))
    errors, won, settled = policy_errors(policy, batch, features_at=block)
    terms, more = term_losses(config, policy, won, batch)
    loss, extra = preference_loss(config, errors, reference, batch)
    loss = loss + slope(config.objective, batch["group_size"]) * terms
    metrics = describe(config, loss.detach(), errors.detach(), reference) | extra | more
    return gradients(loss.mean(), policy, settled), metrics


def term_losses(
    config: Any, policy: Policy, won: Prediction, batch: dict[str, Tensor]
) -> tuple[Tensor, dict[str, Tensor]]:
    """Sum of the weighted terms of every winner, (B,) float32, and metrics; zeros where no term is on."""
    total, metrics = torch.zeros_like(won.error), {}
    with winner_passes(batch):
        for term in TERMS.values():
            if found := term.loss(config, policy, won, batch):
                total, metrics = total + found[0], metrics | found[1]
    return total, metrics


def describe(config: Config, loss: Tensor, policy: Tensor, reference: Tensor) -> dict[str, Tensor]:
    """Metrics of losses (B,) and flow errors (B,1+M')."""
    margin = -relative_error(policy[:, 0], reference[:, 0], policy[:, 1:], reference[:, 1:])  # (B,M')
    return {
        "loss": loss.mean(),
        "accuracy": (margin > 0).float().mean(),
        "margin": margin.mean(),
        "policy_winner": policy[:, 0].mean(),
        "policy_loser": policy[:, 1:].mean(),
        "reference_winner": reference[:, 0].mean(),
        "reference_loser": reference[:, 1:].mean(),
        "beta": torch.full_like(loss[0], config.objective.beta),
    }


def check(config: Config) -> None:
    """Refuse settings that cannot work, naming key, value and remedy."""
    learning_rate(config.optim, 0)
    memory.check(config.train)
    config.sampler.check()
    if config.train.reference_cache and not config.objective.reference_passes:
        raise ValueError(
            f"train.reference_cache={config.train.reference_cache}: supervised training has no reference; leave it out"
        )
    for term in TERMS.values():
        term.check(config)
    config.objective.check()
    check_experts(config)
    validation.check(config)


def check_groups(config: Config, groups: GroupSet) -> None:
    """Every group must have a loser, and under eq. 6 all equally many: ranks run equally many passes, and a batch
    stacks them."""
    counts = {groups.num_losers(index) for index in range(len(groups))}
    if 0 in counts:
        raise ValueError(
            f"{groups.folder} has groups without losers, which serve supervised training alone: use train/sft.py, or"
            " build the groups with pipeline.losers.count=1 or more"
        )
    if config.objective.loss == "plackett_luce" and len(counts) > 1:
        raise ValueError(
            f"objective.loss=plackett_luce needs equally many losers in every group, {groups.folder} has"
            f" {min(counts)} to {max(counts)}: use objective.loss=bound, or build the groups"
            " with one pipeline.losers.count"
        )


def main(argv: list[str] | None = None) -> None:
    config = recipes.load(Config, argv)
    check(config)
    if config.dry_run:
        print_plan(config, argv)
        return
    shown = ("loss", "accuracy", "margin", "grad_norm", "tokens_per_second")
    fit(config, step=step, prepare=prepare, check_groups=check_groups, shown=shown, keep_reference=True)


if __name__ == "__main__":
    entry.run(main)
