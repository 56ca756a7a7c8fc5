"""The terms on the winner inside both trainers: gradients, heads in the optimizer and checkpoint, refusals, resume."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import default_collate

import recipes
from losses.flow_matching import interpolate
from losses.self_score import motion_mask
from train import checkpoint, gdpo, loop, sft
from train.backbones import find_architecture, load_backbone
from train.backbones.base import BackboneConfig, Conditioning
from train.backbones.fused.fused_block import fuse_blocks
from train.backbones.fused.memory import passes_waiting
from train.backbones.wan22_ti2v import Wan22TI2V
from train.clips import to_pixels
from train.data import GroupStream
from train.full_parameters import FullParameters
from train.groups import GroupSet
from train.lora_switch import LoraSwitch
from train.policy import Policy
from train.teachers import TRACKERS
from train.terms.physics import build_heads, physics_losses

PHYSICS = ("physics.trajectory=2", "physics.relational=0.5", "targets.max_tokens=12")
SELF = ("self_score.strength=3", "self_score.every=2")
MILD = ("objective.beta=10", "objective.t_min=0.5")  # no rounding inside the exponential; noise that counts


def make_policy(config):
    """A policy that has moved away from its reference, with the recipe's heads."""
    backbone = load_backbone(config.backbone, "cpu", parts=("expert",))
    switch = LoraSwitch(backbone.transformer, config.lora)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in switch.parameters():
            weight.copy_(0.03 * torch.randn(weight.shape, generator=generator))
    return Policy(backbone, switch, build_heads(config, backbone))


@pytest.fixture
def configure(tiny_targets, tmp_path):
    return lambda *arguments, entry=gdpo: tiny_targets.config(tmp_path, *arguments, entry=entry)


def samples(config, positions, entry=gdpo):
    """Prepared samples in loud noise, of which the predicted winners keep so much that the judge finds them worse."""
    stream = GroupStream(GroupSet(config.train.groups), config.seed)
    prepared = [entry.prepare(config, stream[position]) for position in positions]
    return [sample | {"noise": 9 * sample["noise"]} for sample in prepared]


def by_the_equations(config, policy, sample):
    """The weighted terms of one winner, from passes of their own; the judge's pass inside plain autograd."""
    batch = default_collate([sample])
    t, noise, conditioning = batch["t"], batch["noise"], Conditioning(batch["text"])
    if noise.ndim == 6:
        noise = noise[:, 0]
    x_t = interpolate(batch["winner"], noise, t)
    block = len(policy.backbone.blocks) // 2
    velocity, features = policy.backbone.velocity(x_t, t, conditioning, features_at=block)
    total = physics_losses(config.physics, policy.heads, features, batch)[0].sum() if policy.heads else 0
    if config.self_score.strength and "score_t" in batch:
        level, own_noise, winner = batch["score_t"], batch["score_noise"], batch["winner"].float()
        mask = motion_mask(winner) if config.self_score.motion_mask else torch.ones_like(winner[:, 0])

        def score(clip):
            with policy.switch.reference():
                seen = (1 - level) * clip + level * own_noise
                residual = policy.backbone.velocity(seen, level, conditioning) - (own_noise - clip)
            return (residual.square().mean(1) * mask).sum() / (mask.sum() + 1e-6)

        hinge = (score(x_t - t * velocity) - score(winner).detach()).relu()
        assert hinge > 0  # or nothing is tested
        total = total + config.self_score.strength * hinge
    return total


def distance(gradients, expected):
    difference = sum((g.double() - e.double()).square().sum() for g, e in zip(gradients, expected, strict=True))
    return float((difference / sum(e.double().square().sum() for e in expected)).sqrt())


# ---- gradients -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("terms", [PHYSICS, SELF, (*PHYSICS, *SELF)], ids=["physics", "self", "all"])
@pytest.mark.parametrize("entry", [gdpo, sft])
def test_terms_add_their_own_gradient_clip_by_clip_and_batched(configure, entry, terms):
    """Difference to the step without terms, against autograd through passes of their own."""
    config, bare = configure(*MILD, *terms, entry=entry), configure(*MILD, entry=entry)
    policy = make_policy(config)
    for positions in ([1], [0, 1]):  # both of step 0, which is due
        chosen = samples(config, positions, entry)
        gradients, metrics = entry.step(config, policy, default_collate(chosen))
        adapters = len(policy.switch.parameters())
        undue = [{name: value for name, value in sample.items() if name != "score_t"} for sample in chosen]
        plain, less = entry.step(bare, Policy(policy.backbone, policy.switch), default_collate(undue))
        plain = plain + [torch.zeros_like(weight) for weight in policy.head_parameters()]
        unit = config.objective.beta * float(chosen[0]["group_size"]) if entry is gdpo else 1
        added = unit * sum(by_the_equations(config, policy, sample) for sample in chosen) / len(chosen)
        expected = torch.autograd.grad(added, policy.parameters(), allow_unused=True)  # blocks behind the features
        weights = policy.parameters()
        expected = [torch.zeros_like(w) if g is None else g for g, w in zip(expected, weights, strict=True)]
        assert metrics["loss"].item() - less["loss"].item() == pytest.approx(added.item(), rel=1e-3)
        for part in (slice(adapters), slice(adapters, None)):
            if expected[part]:
                found = [one - other for one, other in zip(gradients[part], plain[part], strict=True)]
                assert distance(found, expected[part]) < 1e-3


@pytest.mark.parametrize("entry", [gdpo, sft])
def test_checkpointing_and_one_graph_change_no_gradient(configure, entry):
    """The judge's blocks are recomputed with the switch off, the policy's with it on."""
    config = configure(*MILD, *PHYSICS, *SELF, entry=entry)
    policy, batch = make_policy(config), default_collate(samples(config, [0], entry))
    plain, metrics = entry.step(config, policy, batch)
    assert metrics["self"] > 0
    network = policy.backbone.transformer
    network.enable_gradient_checkpointing(gradient_checkpointing_func=policy.switch.checkpoint)
    again, _ = entry.step(config, policy, batch)
    assert all(torch.equal(one, other) for one, other in zip(plain, again, strict=True))
    policy.switch.share_graph()  # as compiled: the frozen passes stay in grad mode, the adapters are multiplied by 0
    gated, _ = entry.step(config, policy, batch)
    assert distance(gated, plain) < 1e-5


@pytest.mark.parametrize("entry", [gdpo, sft])
def test_fused_blocks_change_no_gradient(configure, entry):
    """What backbone.compile puts in the blocks' place: features, heads and the judge's own gradient pass through it."""
    config = configure(*PHYSICS, *SELF, *MILD, entry=entry)
    batch = default_collate(samples(config, [0], entry))
    expected, metrics = entry.step(config, make_policy(config), batch)
    policy = make_policy(config)
    network, asked = policy.backbone.transformer, []

    def plan(shape, passes):
        asked.append(passes)
        return [1] * len(network.blocks)

    fuse_blocks(network, policy.switch, plan, compiled=False)
    found, again = entry.step(config, policy, batch)
    assert set(asked) == ({1, 2} if entry is gdpo else {2})  # two wait where the judge looks at the winner
    assert distance(found, expected) < 1e-4
    assert all(again[name] == pytest.approx(metrics[name].item(), rel=1e-3, abs=1e-6) for name in metrics)


def test_the_judge_gets_no_gradient(configure):
    """A judge that wants one, its whole network, is left without; the policy's adapters in its pass count nothing."""
    config = configure(*SELF, "train.parameters=full", entry=sft)
    backbone = load_backbone(config.backbone, "cpu", parts=("expert",))
    policy = Policy(backbone, FullParameters(backbone.transformer, keep_reference=True))
    frozen = policy.switch._frozen
    for weight in frozen.values():
        weight.requires_grad_()
    sft.step(config, policy, default_collate(samples(config, [0], sft)))
    assert all(weight.grad is None for weight in frozen.values())
    assert all(weight.grad is None for weight in policy.switch.parameters())


def test_a_copied_reference_judges_as_the_switched_one_does(configure):
    """Full fine-tuning from the same weights: the same terms; and its gradient by finite differences along itself."""
    config = configure(*MILD, *SELF, "self_score.motion_mask=false", "train.parameters=full", entry=sft)
    (sample,) = samples(config, [0], sft)
    backbone = load_backbone(config.backbone, "cpu", parts=("expert",))
    switched = Policy(backbone, LoraSwitch(backbone.transformer, config.lora))
    _, expected = sft.step(config, switched, default_collate([sample]))
    assert expected["self"] > 0
    other = load_backbone(config.backbone, "cpu", parts=("expert",))
    policy = Policy(other, FullParameters(other.transformer, keep_reference=True))
    gradients, metrics = sft.step(config, policy, default_collate([sample]))
    for name, value in expected.items():
        assert metrics[name].item() == pytest.approx(value.item(), rel=1e-5), name
    norm = torch.stack([gradient.square().sum() for gradient in gradients]).sum().sqrt()
    losses = []
    for sign in (1, -2):
        with torch.no_grad():
            for weight, gradient in zip(policy.switch.parameters(), gradients, strict=True):
                weight.add_(gradient, alpha=sign * 1e-3 / norm)
        losses.append(sft.step(config, policy, default_collate([sample]))[1]["loss"].item())
    assert (losses[0] - losses[1]) / 2e-3 == pytest.approx(norm.item(), rel=0.02)


def test_a_prediction_that_is_natural_enough_costs_nothing(configure):
    """A loud winner, of which the network predicts less: the hinge is 0, and so is its gradient."""
    config = configure(*SELF, entry=sft)
    policy = make_policy(config)
    (sample,) = samples(config, [0], sft)
    sample["winner"] = 300 * sample["winner"]
    gradients, metrics = sft.step(config, policy, default_collate([sample]))
    del sample["score_t"]
    plain, less = sft.step(config, policy, default_collate([sample]))
    assert metrics["self_score"] < metrics["self_winner"]
    assert metrics["self"] == 0 and metrics["loss"] == less["loss"]
    assert distance(gradients, plain) < 1e-6


# ---- which steps, how many passes ------------------------------------------------------------------------------------


def test_due_steps_follow_from_the_position(configure):
    config = configure("self_score.strength=1", "self_score.every=3", "optim.batch_size=4")
    due = [("score_t" in sample) for sample in samples(config, range(32))]
    assert due == [position // 4 % 3 == 0 for position in range(32)]
    levels = torch.stack([sample["score_t"] for sample in samples(config, range(4))])
    assert (levels >= 0.6).all() and (levels <= 0.9).all() and len(levels.unique()) == 4


@pytest.mark.parametrize("entry", [gdpo, sft])
def test_passes_of_the_network(configure, entry):
    """The terms cost the policy nothing; a due step of the regulariser costs two passes of the reference."""
    config = configure(*PHYSICS, *SELF, entry=entry)
    policy, passes = make_policy(config), []
    policy.backbone.transformer.register_forward_hook(lambda *_: passes.append(policy.switch.state.active))
    for position, more in ((0, 2), (2, 0)):
        passes.clear()
        entry.step(config, policy, default_collate(samples(config, [position], entry)))
        clips = 2 if entry is gdpo else 1
        assert passes.count(True) == clips and passes.count(False) == more + (2 if entry is gdpo else 0)


def test_reference_and_policy_see_a_clip_through_the_same_graphs(configure):
    """Which graphs run depends on how many passes share the memory: two graphs round differently."""
    config = configure(*SELF)
    policy, seen = make_policy(config), []
    state = policy.switch.state
    policy.backbone.transformer.register_forward_hook(lambda *_: seen.append((state.active, passes_waiting())))
    gdpo.step(config, policy, default_collate(samples(config, [0])))
    judge = [(False, 2)] * 2
    assert seen == [(False, 2), (False, 1), (True, 1), (True, 2), *judge]  # winner, loser; loser, winner
    seen.clear()
    gdpo.step(config, policy, default_collate(samples(config, [0, 1])))
    assert seen == [(False, 2), (True, 2), *judge]


# ---- runs ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("entry", [gdpo, sft])
def test_weights_of_zero_train_bit_for_bit_as_without_targets(tiny, tiny_targets, tmp_path, entry):
    zeros = ("physics.trajectory=0", "physics.relational=0", "self_score.strength=0", "physics.block=99")
    tiny.train(tmp_path / "without", "optim.steps=3", entry=entry)
    tiny_targets.train(tmp_path / "zero", *zeros, "optim.steps=3", entry=entry)
    assert tiny.metrics(tmp_path / "without") == tiny.metrics(tmp_path / "zero")
    one, other = (
        tiny.weights(checkpoint.latest(tmp_path / at / "train" / "checkpoints")) for at in ("without", "zero")
    )
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in other)


@pytest.mark.parametrize("entry", [gdpo, pytest.param(sft, marks=pytest.mark.slow)])
def test_three_steps_and_three_equal_six_with_all_terms(tiny_targets, tmp_path, entry):
    tiny, run = tiny_targets, (*PHYSICS, *SELF, "train.checkpoint_every=3")
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    checkpoints = tiny.train(whole, *run, "optim.steps=6", entry=entry)
    source = checkpoints / "step_00000003"
    target = parts / "train" / "checkpoints" / "step_00000003"
    target.mkdir(parents=True)
    for file in source.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    tiny.train(parts, *run, "optim.steps=6", entry=entry)
    assert tiny.metrics(parts) == tiny.metrics(whole)[3:]
    one, other = (tiny.weights(at / "train" / "checkpoints" / "step_00000006") for at in (parts, whole))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in other)
    assert {"heads.pix.0.weight.exp_avg", "heads.sem.2.bias.exp_avg_sq", "pix.0.weight"} <= other.keys()
    exported = load_file(whole / "train" / "lora" / "pytorch_lora_weights.safetensors")
    assert not any("pix" in name or "sem" in name or "heads" in name for name in exported)
    first = tiny.metrics(whole)[0]
    assert {"pix", "sem", "self", "self_winner", "head_grad_norm", "kept"} <= first.keys()
    assert "self" not in tiny.metrics(whole)[1]


def test_heads_and_adapters_have_rates_and_norms_of_their_own(tiny_targets, tmp_path, monkeypatch):
    seen = []
    original = torch.optim.AdamW.step

    def step(optimizer, *args):
        seen.append(
            [
                (group["lr"], torch.stack([weight.grad.norm() for weight in group["params"]]).norm().item())
                for group in optimizer.param_groups
            ]
        )
        return original(optimizer, *args)

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    run = (*PHYSICS, "optim.steps=3", "physics.head_lr=0.02", "optim.max_grad_norm=0.001")
    tiny_targets.train(tmp_path, *run, entry=sft)
    lines = tiny_targets.metrics(tmp_path)
    for line, ((lr, norm), (head_lr, head_norm)) in zip(lines, seen, strict=True):
        assert head_lr == pytest.approx(20 * lr) and line["lr"] == lr  # optim.lr is 0.001
        assert norm == pytest.approx(0.001, rel=1e-3) and head_norm == pytest.approx(0.001, rel=1e-3)
        assert line["grad_norm"] > 0.001 and line["head_grad_norm"] > 0.001


def test_a_step_with_bad_heads_is_skipped(tiny_targets, tmp_path, monkeypatch):
    build = loop.build_heads

    def broken(*args):
        heads = build(*args)
        with torch.no_grad():
            heads.pix[0].weight.fill_(torch.nan)
        return heads

    monkeypatch.setattr(loop, "build_heads", broken)
    checkpoints = tiny_targets.train(tmp_path, *PHYSICS, "optim.steps=2", entry=sft)
    assert tiny_targets.metrics(tmp_path)[-1]["skipped"] == 2
    lora = load_file(checkpoint.latest(checkpoints) / "lora.safetensors")
    assert all(not weight.any() for name, weight in lora.items() if "lora_B" in name)


# ---- refusals --------------------------------------------------------------------------------------------------------


def test_heads_of_another_run_are_refused(tiny_targets, tmp_path):
    run = ("optim.steps=2", "train.checkpoint_every=1")
    tiny_targets.train(tmp_path / "with", *PHYSICS, *run, entry=sft)
    tiny_targets.train(tmp_path / "without", *run, entry=sft)
    more = "optim.steps=3"
    with pytest.raises(ValueError, match="holds heads of physics terms: pix.0.bias .*this recipe has: none"):
        tiny_targets.train(tmp_path / "with", *run, more, entry=sft)
    with pytest.raises(ValueError, match="holds heads of physics terms: none; this recipe has: pix.0.weight"):
        tiny_targets.train(tmp_path / "without", *PHYSICS, *run, more, entry=sft)
    with pytest.raises(ValueError, match="Restore physics.trajectory"):
        tiny_targets.train(tmp_path / "with", *PHYSICS, *run, more, "physics.sem_width=7", entry=sft)
    with pytest.raises(ValueError, match="optim.batch_size=3 does not divide the 4 groups seen"):
        tiny_targets.train(tmp_path / "without", *SELF, *run, more, "optim.batch_size=3", entry=sft)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (("physics.trajectory=1",), "lack tracks, visible, keep .*targets.tracks.*physics.on_the_fly=true"),
        (("physics.relational=1",), "lack relation_tokens"),
        (("physics.trajectory=nan",), "physics.trajectory=nan"),
        (("physics.trajectory=1", "objective.winner=generated"), "objective.winner=generated has no physics targets"),
        (("physics.trajectory=1", "physics.on_the_fly=true"), "needs targets.tracks"),
        (
            ("physics.relational=1", "physics.on_the_fly=true", "targets.tracks=lucas_kanade"),
            "needs targets.relation",
        ),
        (("self_score.strength=-1",), "self_score.strength=-1"),
        (("self_score.every=0",), "self_score.every=0"),
        (("self_score.t_min=0.95",), "self_score.t_min=0.95, t_max=0.9"),
    ],
)
def test_what_cannot_work_is_said_before_weights_are_loaded(tiny, tmp_path, monkeypatch, settings, said):
    monkeypatch.setattr(loop, "load_backbone", lambda *_, **__: pytest.fail("weights were loaded"))
    for entry in (gdpo, sft):
        with pytest.raises(ValueError, match=said):
            tiny.train(tmp_path, *settings, entry=entry)


def test_a_block_that_is_not_there(tiny_targets, tmp_path):
    with pytest.raises(ValueError, match="physics.block=3 is no block of this network: use 0 to 2"):
        tiny_targets.train(tmp_path, *PHYSICS, "physics.block=3", entry=sft)


def test_a_group_without_targets_among_others_is_named(configure):
    config = configure(*PHYSICS)
    sample = GroupStream(GroupSet(config.train.groups), config.seed)[0]
    bare = replace(sample, group=replace(sample.group, extra={}))
    with pytest.raises(ValueError, match=f"group '{sample.group.key}' lacks tracks"):
        gdpo.prepare(config, bare)


# ---- on the fly ------------------------------------------------------------------------------------------------------


def test_targets_are_made_while_training(tiny, tmp_path, capsys, monkeypatch):
    """The winner's latent is decoded and tracked; the run says so once, and trains heads by it."""
    seen = []

    def track(frames, queries):
        seen.append(frames)
        time = torch.linspace(0, 1, len(frames))[:, None, None]
        return (1 - time) * queries + time * queries.flip(0), torch.ones(len(frames), len(queries), dtype=torch.bool)

    monkeypatch.setattr(TRACKERS["lucas_kanade"], "check", lambda config: None)
    monkeypatch.setattr(TRACKERS["lucas_kanade"], "build", lambda config, device: track)
    run = ("physics.trajectory=1", "physics.on_the_fly=true", "targets.tracks=lucas_kanade", "optim.steps=2")
    tiny.train(tmp_path, *run, "targets.grid=9", "train.pairs_per_pass=2", "targets.rule=all", entry=sft)
    printed = capsys.readouterr().out
    assert printed.count("physics.on_the_fly: the groups hold no targets; making them took") == 1
    assert all(line["kept"] == 1 and line["head_grad_norm"] > 0 for line in tiny.metrics(tmp_path))
    assert len(seen) == 4 and seen[0].shape == (17, 64, 64, 3) and seen[0].dtype == torch.uint8
    winner = GroupStream(GroupSet(tiny.groups), 0)[0].group.winner
    backbone = load_backbone(tiny.config(tmp_path).backbone, "cpu", parts=("vae",))
    with torch.no_grad():
        assert torch.equal(to_pixels(backbone.decode_latents(winner[None]))[0], seen[0])


# ---- an image as the first frame -------------------------------------------------------------------------------------


class Knows(nn.Module):
    """A network that knows the one clip there is, but for `offset` in every cell: v = (x_t - clip + offset) / t, so
    that its z_0 is clip - offset. With an image, the first frame's tokens have t = 0."""

    dtype = torch.float32

    def __init__(self, clip):
        super().__init__()
        self.clip, self.blocks = clip, nn.ModuleList()
        self.offset = nn.Parameter(torch.zeros(()))

    def forward(self, hidden_states, timestep, encoder_hidden_states, return_dict):
        return ((hidden_states - self.clip + self.offset) / (timestep.amax() / 1000),)


OFF, LEVEL, FRAMES = 0.1, 0.75, 21


@pytest.fixture
def knowing():
    """A policy that is OFF in every cell, beside a reference that knows the winner exactly, and one group."""
    draw = partial(torch.randn, generator=torch.Generator().manual_seed(0))
    winner = draw(1, 12, FRAMES, 4, 4)
    config = BackboneConfig(family="wan22_ti2v", text_length=2)
    architecture = find_architecture(replace(config, architecture="tiny"))
    network = Knows(winner)
    backbone = Wan22TI2V(config, architecture, torch.device("cpu"), ("known",), "known", {"transformer": network})
    policy = Policy(backbone, FullParameters(network, keep_reference=True))
    with torch.no_grad():
        network.offset.fill_(OFF)
    batch = {"winner": winner, "noise": draw(1, 12, FRAMES, 4, 4), "text": torch.zeros(1, 2, 64)}
    return policy, batch | {"score_t": torch.tensor([LEVEL]), "score_noise": draw(1, 12, FRAMES, 4, 4)}


@pytest.mark.parametrize("image", [1, 6, 0], ids=["image", "prefix", "text"])
@pytest.mark.parametrize("masked", ["true", "false"])
@pytest.mark.parametrize("t", [0.2, 0.5, 0.8])
def test_frames_that_are_held_are_neither_an_error_nor_judged(knowing, t, masked, image):
    """By hand, in every cell that is generated: the flow is off by OFF / t, and z_0 by OFF, which the judge at level s
    sees as OFF / s: (.1 / .75)^2 = .0178 above the winner's 0, at any t. A held frame's velocity is 0; counted, it
    adds 2 / 21 = .095 to the flow error of a network that knows everything, and takes about 2 t (1 - t) / 21 off the
    hinge."""
    policy, batch = knowing
    batch["t"] = torch.tensor([t])
    batch |= {"condition": batch["winner"][:, :, :image]} if image else {}
    own = ("self_score.strength=1", f"self_score.motion_mask={masked}")
    gradients, metrics = sft.step(recipes.load(sft.Config, list(own)), policy, batch)
    assert metrics["flow"].item() == pytest.approx((OFF / t) ** 2, rel=1e-3)
    assert metrics["self"].item() == pytest.approx((OFF / LEVEL) ** 2, rel=1e-3)  # 0.017778
    assert gradients[0].item() == pytest.approx(2 * OFF / t**2 + 2 * OFF / LEVEL**2, rel=1e-3)


@pytest.mark.parametrize("image", [1, 6, 0], ids=["image", "prefix", "text"])
def test_a_perfect_network_has_no_error_on_a_clip_that_begins_with_given_frames(knowing, image):
    """The reference; the bracket is then the policy's own errors, and beta and the anchor are what they say."""
    policy, batch = knowing
    batch |= {"losers": batch["winner"][:, None], "noise": batch["noise"][:, None].expand(-1, 2, -1, -1, -1, -1)}
    batch |= {"t": torch.tensor([0.5]), "group_size": torch.ones(1)}
    batch |= {"semantic": torch.zeros(1, 1), "physical": torch.zeros(1, 1)}
    batch |= {"condition": batch["winner"][:, :, :image]} if image else {}
    del batch["score_t"]
    _, metrics = gdpo.step(recipes.load(gdpo.Config, []), policy, batch)
    assert metrics["reference_winner"].item() == pytest.approx(0, abs=1e-9)
    assert metrics["policy_winner"].item() == pytest.approx((OFF / 0.5) ** 2, rel=1e-4)


def test_sft_weighs_its_error_by_time(knowing):
    """At t = .5 and shift 5 the bell is 2.0764; metrics show the error itself."""
    policy, batch = knowing
    batch["t"] = torch.tensor([0.5])
    del batch["score_t"]
    config = recipes.load(sft.Config, ["objective.weighting=bell", "objective.timestep_shift=5"])
    _, metrics = sft.step(config, policy, batch)
    assert metrics["flow"].item() == pytest.approx(0.04, rel=1e-4)
    assert metrics["loss"].item() == pytest.approx(2.0764 * 0.04, rel=1e-4)
