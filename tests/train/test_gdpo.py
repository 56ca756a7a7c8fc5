"""`train/gdpo.py`: gradients of a step against autograd over the equations, its memory, its draws, its learning."""

import math
import weakref
from collections import Counter
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from torch.utils.data import default_collate

from losses.flow_matching import flow_error, interpolate
from losses.preference import pairwise_bound
from train import checkpoint, gdpo
from train.backbones import load_backbone
from train.backbones.base import Conditioning
from train.data import GroupStream
from train.full_parameters import FullParameters
from train.groups import GroupSet
from train.lora_switch import LoraSwitch
from train.policy import Policy


@pytest.fixture(scope="module")
def policy(tiny, tmp_path_factory):
    """A policy that has moved away from its reference: seeded random adapters, both matrices."""
    config = tiny.config(tmp_path_factory.mktemp("unused"))
    backbone = load_backbone(config.backbone, "cpu", parts=("expert",))
    switch = LoraSwitch(backbone.transformer, config.lora)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in switch.parameters():
            weight.copy_(0.03 * torch.randn(weight.shape, generator=generator))
    return Policy(backbone, switch)


@pytest.fixture
def configure(tiny, tmp_path):
    return lambda *arguments: tiny.config(tmp_path, *arguments)


def samples(config, positions):
    """Prepared tensors of the stream's `positions`."""
    stream = GroupStream(GroupSet(config.train.groups), config.seed, winner=config.objective.winner)
    return [gdpo.prepare(config, stream[position]) for position in positions]


def first_losers(sample, count):
    """The sample with its first `count` losers only."""
    shorter = {name: sample[name][:count] for name in ("losers", "semantic", "physical")}
    return sample | shorter | {"noise": sample["noise"][: 1 + count]}


def by_the_equations(config, policy, sample):
    """Loss of one group by eqs. 6, 9, 10, 12 and 13, in float64 after the network, all clips in one pass."""
    objective, sigmoid = config.objective, lambda x: 1 / (1 + math.exp(-x))
    clean = torch.cat([sample["winner"].unsqueeze(0), sample["losers"]]).float()  # (1+M,C,F,H,W)
    noise, t = sample["noise"], sample["t"]
    conditioning = Conditioning(sample["text"].expand(len(clean), -1, -1))

    def errors():  # (1+M,)
        velocity = policy.backbone.velocity((1 - t) * clean + t * noise, t.expand(len(clean)), conditioning)
        return ((velocity.double() - noise.double() + clean.double()) ** 2).mean(dim=(1, 2, 3, 4))

    with torch.no_grad(), policy.switch.reference():
        reference = errors()
    gained = errors() - reference
    brackets = gained[0] - gained[1:]  # (M,)
    anchor = objective.anchor * objective.beta * (gained[0] + reference[0])
    if objective.loss == "plackett_luce":
        return torch.log(1 + torch.exp(objective.beta * brackets).sum()) + anchor
    anchor = anchor * float(sample["group_size"])
    difficulty = 1 - (float(sample["semantic"][0]) + float(sample["physical"][0])) / 2
    alpha = 0.5 + 0.5 * sigmoid(5 * (difficulty - 0.5)) if objective.physics_guided else 1.0
    gamma = (1 + 0.6 * sigmoid(2 * (difficulty - 0.4))) / 0.5 if objective.physics_guided else 1.0
    return gamma * sample["group_size"] * torch.log(1 + torch.exp(alpha * objective.beta * brackets[0])) + anchor


def distance(gradients, expected):
    """Norm of the difference over the norm of `expected`, over all adapters together."""
    difference = [(g.double() - e.double()).square().sum() for g, e in zip(gradients, expected, strict=True)]
    return float(
        torch.stack(difference).sum().sqrt() / torch.stack([e.double().square().sum() for e in expected]).sum().sqrt()
    )


# ---- gradients -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 4])
@pytest.mark.parametrize("loss", ["bound", "plackett_luce"])
def test_clip_by_clip_equals_autograd_through_all_clips_at_once(policy, configure, loss, count):
    """beta 10 keeps the rounding of the errors, which beta multiplies inside an exponential, out of the comparison."""
    config = configure(f"objective.loss={loss}", "objective.beta=10")
    (sample,) = samples(config, [3])
    if loss == "plackett_luce":
        sample = first_losers(sample, count)
    else:
        sample["group_size"] = torch.tensor(float(count))
    gradients, metrics = gdpo.step(config, policy, default_collate([sample]))
    expected = by_the_equations(config, policy, sample)
    assert metrics["loss"].item() == pytest.approx(expected.item(), rel=1e-5)
    assert distance(gradients, torch.autograd.grad(expected, policy.switch.parameters())) < 1e-5


@pytest.mark.parametrize("loss", ["bound", "plackett_luce"])
def test_the_default_beta_stands_the_rounding_of_float32(policy, configure, loss):
    """beta 1000 times an error of 3 with 1e-7 of rounding: the coefficients keep three digits."""
    config = configure(f"objective.loss={loss}")
    (sample,) = samples(config, [0])
    gradients, metrics = gdpo.step(config, policy, default_collate([sample]))
    expected = by_the_equations(config, policy, sample)
    assert metrics["loss"].item() == pytest.approx(expected.item(), rel=2e-3)
    assert distance(gradients, torch.autograd.grad(expected, policy.switch.parameters())) < 2e-3


def test_activation_checkpointing_changes_no_gradient(policy, configure):
    config = configure("objective.loss=plackett_luce", "objective.beta=10")
    batch = default_collate(samples(config, [1]))
    plain, _ = gdpo.step(config, policy, batch)
    network = policy.backbone.transformer
    network.enable_gradient_checkpointing(gradient_checkpointing_func=policy.switch.checkpoint)
    try:
        again, _ = gdpo.step(config, policy, batch)
    finally:
        network.disable_gradient_checkpointing()
    assert all(torch.equal(one, other) for one, other in zip(plain, again, strict=True))


def test_the_slope_by_hand():
    """beta 50 and 4 losers: 200, of which half is the loss's slope at a margin of 0; eq. 6 counts no M."""
    losers = torch.tensor([4.0])
    objective = gdpo.ObjectiveConfig(beta=50.0, alpha_min=0.5)
    assert gdpo.slope(objective, losers).item() == 200
    assert gdpo.slope(replace(objective, group_factor=False), losers).item() == 50
    assert gdpo.slope(replace(objective, loss="plackett_luce"), losers).item() == 50
    winner = torch.ones(1, requires_grad=True)
    loss = pairwise_bound(winner, torch.ones(1), torch.ones(1), torch.ones(1), alpha=1, gamma=1, beta=50, group_size=4)
    (found,) = torch.autograd.grad(loss.sum(), winner)
    assert found.item() == pytest.approx(200 / 2)


@pytest.mark.parametrize("loss", ["bound", "plackett_luce"])
@pytest.mark.parametrize("count", [1, 2])
def test_the_anchor_adds_the_winners_error(policy, configure, loss, count):
    config = configure(f"objective.loss={loss}", "objective.beta=10", "objective.anchor=0.75")
    chosen = samples(config, range(count))
    gradients, metrics = gdpo.step(config, policy, default_collate(chosen))
    expected = sum(by_the_equations(config, policy, sample) for sample in chosen) / count
    assert metrics["loss"].item() == pytest.approx(expected.item(), rel=1e-5)
    assert distance(gradients, torch.autograd.grad(expected, policy.switch.parameters())) < 1e-5
    with pytest.raises(ValueError, match="objective.anchor=-1"):
        gdpo.check(configure("objective.anchor=-1"))


def test_full_parameters_have_a_copied_reference(configure):
    """The gradient with respect to every weight, by finite differences along itself, and the errors of the copy."""
    config = configure("objective.beta=10", "train.parameters=full")
    backbone = load_backbone(config.backbone, "cpu", parts=("expert",))
    policy = Policy(backbone, FullParameters(backbone.transformer, keep_reference=True))
    (sample,) = samples(config, [3])
    batch = default_collate([sample])
    _, first = gdpo.step(config, policy, batch)
    assert first["margin"].item() == 0  # the copy is the network
    with torch.no_grad():
        for weight in policy.switch.parameters():
            weight.add_(0.01 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(weight.numel())))
    gradients, moved = gdpo.step(config, policy, batch)
    assert moved["margin"].item() != 0
    assert moved["reference_winner"].item() == first["reference_winner"].item()
    norm = torch.stack([gradient.square().sum() for gradient in gradients]).sum().sqrt()
    losses = []
    for sign in (1, -1):
        with torch.no_grad():
            for weight, gradient in zip(policy.switch.parameters(), gradients, strict=True):
                weight.add_(gradient, alpha=sign * (1 if sign > 0 else 2) * 1e-3 / norm)
        losses.append(gdpo.step(config, policy, batch)[1]["loss"].item())
    assert (losses[0] - losses[1]) / 2e-3 == pytest.approx(norm.item(), rel=0.02)


@pytest.mark.parametrize("loss", ["bound", "plackett_luce"])
def test_three_groups_in_a_pass_are_the_mean_of_three_passes(policy, configure, loss):
    config = configure(f"objective.loss={loss}", "objective.beta=10")
    three = samples(config, [0, 1, 2])
    singles = [gdpo.step(config, policy, default_collate([sample])) for sample in three]
    together, metrics = gdpo.step(config, policy, default_collate(three))
    means = [torch.stack(parts).mean(0) for parts in zip(*(gradients for gradients, _ in singles), strict=True)]
    assert distance(together, means) < 1e-5
    for name, value in metrics.items():
        assert value.item() == pytest.approx(sum(m[name].item() for _, m in singles) / 3, rel=1e-4, abs=1e-6), name


def test_an_untrained_policy_starts_at_log_two(tiny, configure):
    """Both errors are equal bit for bit, so the bracket is 0: the loss is M gamma log 2, or log(1 + M)."""
    config = configure()
    backbone = load_backbone(config.backbone, "cpu", parts=("expert",))
    untrained = Policy(backbone, LoraSwitch(backbone.transformer, config.lora))
    _, metrics = gdpo.step(config, untrained, default_collate(samples(config, [0])))
    assert metrics["margin"] == 0 and metrics["policy_winner"] == metrics["reference_winner"]
    assert metrics["loss"].item() == pytest.approx(4 * metrics["gamma"].item() * math.log(2))
    config = configure("objective.loss=plackett_luce")
    _, metrics = gdpo.step(config, untrained, default_collate(samples(config, [0])))
    assert metrics["loss"].item() == pytest.approx(math.log(5)) and "alpha" not in metrics


def test_every_clip_passes_the_network_twice(policy, configure):
    """Once as reference, once as policy; eq. 6 adds passes for losers, not for pairs."""
    passes = Counter()
    handle = policy.backbone.transformer.register_forward_hook(lambda *_: passes.update([policy.switch.state.active]))
    try:
        for loss, clips in (("bound", 2), ("plackett_luce", 5)):
            config = configure(f"objective.loss={loss}")
            gdpo.step(config, policy, default_collate(samples(config, [0])))
            assert passes == {True: clips, False: clips}
            assert config.objective.clips_per_group(GroupSet(config.train.groups).num_losers(0)) == clips
            passes.clear()
    finally:
        handle.remove()


class LiveBytes:
    """Peak bytes that autograd keeps for backward, parameters left out."""

    def __init__(self, kept):
        self.kept = {tensor.untyped_storage().data_ptr() for tensor in kept}
        self.now = self.peak = 0

    def pack(self, tensor):
        if tensor.untyped_storage().data_ptr() in self.kept:
            return tensor
        holder = Holder(tensor)
        size = tensor.numel() * tensor.element_size()
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(holder, self._forget, size)
        return holder

    def _forget(self, size):
        self.now -= size

    def unpack(self, held):
        return held.tensor if isinstance(held, Holder) else held


class Holder:
    def __init__(self, tensor):
        self.tensor = tensor


def test_four_losers_cost_the_memory_of_one_pair(policy, configure):
    def peak(work):
        live = LiveBytes([*policy.backbone.transformer.parameters(), *policy.switch.parameters()])
        with torch.autograd.graph.saved_tensors_hooks(live.pack, live.unpack):
            work()
        assert live.now == 0  # every graph has been freed
        return live.peak

    pair, exact = configure(), configure("objective.loss=plackett_luce")
    batches = {loss: default_collate(samples(config, [0])) for loss, config in (("pair", pair), ("exact", exact))}
    one = peak(lambda: gdpo.step(pair, policy, batches["pair"]))
    four = peak(lambda: gdpo.step(exact, policy, batches["exact"]))
    at_once = peak(
        lambda: by_the_equations(exact, policy, samples(exact, [0])[0]).backward(inputs=policy.switch.parameters())
    )
    for weight in policy.switch.parameters():
        weight.grad = None
    assert one > 1e6 and four <= 1.1 * one
    assert at_once > 4 * one  # the measure does see a graph of five clips


# ---- weights, winners, draws -----------------------------------------------------------------------------------------


def test_flow_dpo_has_unit_weights(policy, configure):
    config = configure("objective.physics_guided=false", "objective.beta=10")
    (sample,) = samples(config, [2])
    gradients, metrics = gdpo.step(config, policy, default_collate([sample]))
    assert metrics["alpha"] == 1 and metrics["gamma"] == 1
    expected = by_the_equations(config, policy, sample)
    assert metrics["loss"].item() == pytest.approx(expected.item(), rel=1e-5)
    assert distance(gradients, torch.autograd.grad(expected, policy.switch.parameters())) < 1e-5


def test_released_preset_divides_gamma_by_the_losers_own_alpha(policy, configure):
    """Ratings 1 and 1 give v = .8: alpha = .5 + .5 sigmoid(1.5) = .9088, gamma = (1 + .5 sigmoid(.9)) / alpha = 1.4915;
    four losers make no difference."""
    config = configure("objective.preset=released")
    assert config.objective.gamma_per_loser and config.objective.k_gamma == 3
    batch = {"semantic": torch.zeros(1, 1), "physical": torch.zeros(1, 1), "group_size": torch.full((1,), 4.0)}
    batch["t"] = torch.tensor([0.5])
    errors = torch.zeros(1, 2)
    loss, weights = gdpo.preference_loss(config, errors, errors, batch)
    alpha = 0.5 + 0.5 / (1 + math.exp(-1.5))
    gamma = (1 + 0.5 / (1 + math.exp(-0.9))) / alpha
    assert weights["alpha"].item() == pytest.approx(alpha, rel=1e-6)
    assert weights["gamma"].item() == pytest.approx(gamma, rel=1e-6)
    assert loss.item() == pytest.approx(gamma * math.log(2), rel=1e-6)


def as_released(policy, reference, t, ratings):
    """The released loss of one pair in float64: errors (winner, loser) times the scheduler's weight on its grid."""
    grid = torch.linspace(1, 0, 1001, dtype=torch.float64)[:-1]
    grid = 5 * grid / (1 + 4 * grid)
    bell = torch.exp(-2 * ((1000 * grid - 500) / 1000) ** 2)
    bell = (bell - bell.min()) * 1000 / (bell - bell.min()).sum()
    weight = bell[(grid - t).abs().argmin()].item()
    v = 1 - (ratings[0] / 5 + ratings[1] / 5) / 2
    alpha = 0.5 + 0.5 / (1 + math.exp(-5 * (v - 0.5)))
    gamma = (1 + 0.5 / (1 + math.exp(-3 * (v - 0.5)))) / alpha
    bracket = weight * ((policy[0] - reference[0]) - (policy[1] - reference[1]))
    return gamma * math.log(1 + math.exp(1000 * alpha * bracket))


def test_the_released_preset_is_the_released_loss(configure):
    config = configure("objective.preset=released")
    generator = torch.Generator().manual_seed(2)
    for t in (0.98, 0.9, 0.75, 0.5, 0.25):
        policy, reference = 1 + 1e-3 * torch.rand(2, 2, generator=generator)
        first, second = torch.randint(1, 6, (2,), generator=generator).tolist()
        batch = {"t": torch.tensor([t]), "group_size": torch.full((1,), 3.0)}
        batch |= {"semantic": torch.tensor([[(first - 1) / 4]]), "physical": torch.tensor([[(second - 1) / 4]])}
        loss, _ = gdpo.preference_loss(config, policy[None], reference[None], batch)
        expected = as_released(policy.tolist(), reference.tolist(), t, (first, second))
        assert loss.item() == pytest.approx(expected, rel=5e-3)  # t lies up to half a step of the grid away


def test_the_released_preset_draws_as_the_release(configure):
    """t over a grid of shift 5, its mean 5/4 - 5/16 ln 5 = .747 and 1/6 below .5; noise of its own for each clip."""
    config = configure("objective.preset=released", "recipe=sandbox")
    t = draws(config.objective)
    assert t.mean().item() == pytest.approx(1.25 - 5 / 16 * math.log(5), abs=0.01)
    assert (t < 0.5).double().mean().item() == pytest.approx(1 / 6, abs=0.02)
    assert config.objective.noise == "independent" and config.optim.max_grad_norm >= 1e9


@pytest.mark.parametrize("loss", ["bound", "plackett_luce"])
@pytest.mark.parametrize("count", [1, 2])
def test_a_weighted_error_has_a_weighted_gradient(policy, configure, loss, count):
    """In a group alone and in a batch, each at its own t: the bell (of shift 1) scales beta, so the anchor too."""
    settings = (f"objective.loss={loss}", "objective.beta=10", "objective.anchor=0.3")
    bare, config = configure(*settings), configure(*settings, "objective.weighting=bell")
    chosen, expected = samples(config, range(count)), 0
    grid = torch.arange(1, 1001).double() / 1000
    for sample in chosen:
        bell = [math.exp(-2 * (float(t) - 0.5) ** 2) - math.exp(-0.5) for t in (sample["t"], *grid)]
        weight = bell[0] / (sum(bell[1:]) / 1000)
        objective = replace(bare.objective, beta=10 * weight)
        expected = expected + by_the_equations(replace(bare, objective=objective), policy, sample) / count
    gradients, metrics = gdpo.step(config, policy, default_collate(chosen))
    assert metrics["loss"].item() == pytest.approx(expected.item(), rel=1e-5)
    assert distance(gradients, torch.autograd.grad(expected, policy.switch.parameters())) < 1e-5
    _, plain = gdpo.step(bare, policy, default_collate(chosen))
    assert all(metrics[name] == plain[name] for name in ("margin", "policy_winner", "reference_loser"))  # unweighted


def test_a_generated_winner_is_the_best_scored_loser(configure):
    groups = GroupSet(configure().train.groups)
    config = configure("objective.winner=generated", "objective.loss=plackett_luce")
    assert config.objective.clips_per_group(groups.num_losers(0)) == 4
    seen = samples(config, range(8))
    for group in groups:
        best = max(range(4), key=lambda j: group.losers_info[j].semantic + group.losers_info[j].physical)
        matching = [sample for sample in seen if torch.equal(sample["winner"], group.losers[best])]
        assert len(matching) == 1  # once an epoch
        rest = [group.losers[j] for j in range(4) if j != best]
        assert torch.equal(matching[0]["losers"], torch.stack(rest)) and matching[0]["group_size"] == 3


def test_winner_and_losers_share_the_noise_unless_independent(configure):
    (shared,) = samples(configure("objective.loss=plackett_luce"), [5])
    assert shared["noise"].shape == (5, 16, 5, 8, 8)
    assert all(torch.equal(noise, shared["noise"][0]) for noise in shared["noise"])
    (apart,) = samples(configure("objective.loss=plackett_luce", "objective.noise=independent"), [5])
    flat = apart["noise"].flatten(1)
    correlation = torch.corrcoef(flat) - torch.eye(5)
    assert correlation.abs().max() < 0.1 and flat.std(1).sub(1).abs().max() < 0.05
    assert torch.equal(shared["t"], apart["t"])  # the time is drawn first


def test_prepared_tensors_depend_on_seed_and_position_alone(configure):
    config = configure()
    torch.manual_seed(7)
    first = samples(config, [4, 11])
    torch.manual_seed(8)
    again = samples(config, [11, 4])[::-1]
    for one, other in zip(first, again, strict=True):
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)
    assert not torch.equal(first[0]["noise"], first[1]["noise"]) and first[0]["t"] != first[1]["t"]
    stream = GroupStream(GroupSet(config.train.groups), config.seed)
    elsewhere = gdpo.prepare(replace(config, seed=1), stream[4])  # the same group under another seed
    assert torch.equal(elsewhere["winner"], first[0]["winner"])
    assert elsewhere["t"] != first[0]["t"] and not torch.equal(elsewhere["noise"], first[0]["noise"])


def test_one_epoch_pairs_every_group_with_the_assigned_loser(configure):
    config = configure()
    groups, stream = GroupSet(config.train.groups), GroupStream(GroupSet(config.train.groups), config.seed)
    pairs = set()
    for position in range(4 * len(groups)):
        sample = stream[position]
        tensors = gdpo.prepare(config, sample)
        assert tensors["losers"].shape[0] == 1 and torch.equal(
            tensors["losers"][0], sample.group.losers[sample.loser_index]
        )
        assert tensors["semantic"].item() == pytest.approx(sample.group.losers_info[sample.loser_index].semantic)
        pairs.add((sample.group.key, sample.loser_index))
    assert len(pairs) == 4 * len(groups)  # M epochs show every pair once


def draws(objective, count=4000):
    return torch.stack(
        [gdpo.draw_time(objective, torch.Generator().manual_seed(seed)) for seed in range(count)]
    ).double()


def quantile_distance(sample, cumulative):
    """Kolmogorov-Smirnov distance of `sample` to a distribution function; chance exceeds 1.63 / sqrt(n) once in 100."""
    ordered = sample.sort().values
    steps = torch.arange(1, len(ordered) + 1) / len(ordered)
    return float((cumulative(ordered) - steps).abs().max())


def test_time_distributions():
    limit = 1.63 / math.sqrt(4000) + 1 / 4000
    uniform = draws(gdpo.ObjectiveConfig(timesteps="uniform", timestep_shift=1.0))
    assert quantile_distance(uniform, lambda t: t) < limit
    normal = torch.distributions.Normal(0.0, 1.0)
    logit = draws(gdpo.ObjectiveConfig(timestep_shift=1.0))
    assert quantile_distance(logit, lambda t: normal.cdf(torch.logit(t.clamp(1e-12, 1 - 1e-12)))) < limit
    shifted = draws(gdpo.ObjectiveConfig(timesteps="uniform"))
    assert torch.allclose(shifted, 3 * uniform / (1 + 2 * uniform), atol=1e-6)  # s = 3, t = .5 gives .75
    expert = draws(gdpo.ObjectiveConfig(timesteps="uniform", t_min=0.875))
    assert torch.allclose(expert, 0.875 + 0.125 * shifted, atol=1e-6)
    assert expert.min() >= 0.875 and expert.max() <= 1 and uniform.min() >= 0 and uniform.max() < 1


# ---- learning --------------------------------------------------------------------------------------------------------


def measure(policy, config, positions):
    """Policy and reference flow errors of winner and loser at fixed positions: (N, 2) each."""
    measured = {"policy": [], "reference": []}
    for sample in samples(config, positions):
        clips = torch.stack([sample["winner"], sample["losers"][0]])
        t, conditioning = sample["t"].expand(2), Conditioning(sample["text"].expand(2, -1, -1))
        with torch.no_grad():
            for name in measured:
                with policy.switch.reference() if name == "reference" else nullcontext():
                    velocity = policy.backbone.velocity(interpolate(clips, sample["noise"], t), t, conditioning)
                measured[name].append(flow_error(velocity, clips, sample["noise"]))
    return torch.stack(measured["policy"]), torch.stack(measured["reference"])


@pytest.mark.slow
def test_thirty_steps_raise_margin_and_accuracy(tiny, tmp_path, configure):
    run = ("optim.steps=30", "optim.lr=0.003", "train.checkpoint_every=30")
    checkpoints = tiny.train(tmp_path, *run)
    config = configure(*run)
    backbone = load_backbone(config.backbone, "cpu", parts=("expert",))
    fresh = Policy(backbone, LoraSwitch(backbone.transformer, config.lora, seed=config.seed))
    positions = range(32)  # of the 60 that training saw: every group with every loser
    _, reference_before = measure(fresh, config, positions)
    checkpoint.load_weights(
        checkpoint.find_lora(checkpoints)[0], fresh.switch, fingerprint=backbone.fingerprint, expert="transformer"
    )
    after, reference_after = measure(fresh, config, positions)
    assert torch.equal(reference_before, reference_after)  # the reference has not moved by a bit
    gained = reference_after - after  # (N, 2) how much better than the reference on winner and loser
    margin = gained[:, 0] - gained[:, 1]
    assert margin.mean() > 3e-3  # beta times this: the sigmoid's argument
    assert (margin > 0).float().mean() > 0.8
    metrics = tiny.metrics(tmp_path)
    assert metrics[0]["margin"] == 0
    assert sum(m["margin"] for m in metrics[-10:]) > sum(m["margin"] for m in metrics[:10])
    assert sum(m["accuracy"] for m in metrics[-10:]) / 10 > 0.7
    assert sum(m["loss"] for m in metrics[-10:]) < 0.7 * sum(m["loss"] for m in metrics[:10])
