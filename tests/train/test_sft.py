"""`train/sft.py`: its gradient, its draws, and that it lowers the flow error on the winners."""

import pytest
import torch
from torch.utils.data import default_collate

from train import checkpoint, gdpo, sft
from train.backbones import load_backbone
from train.backbones.base import Conditioning
from train.data import GroupStream
from train.groups import GroupSet
from train.lora_switch import LoraSwitch
from train.policy import Policy


@pytest.fixture
def config(tiny, tmp_path):
    return tiny.config(tmp_path, entry=sft)


@pytest.fixture
def policy(config):
    backbone = load_backbone(config.backbone, "cpu", parts=("expert",))
    return Policy(backbone, LoraSwitch(backbone.transformer, config.lora, seed=config.seed))


def prepared(config, positions):
    stream = GroupStream(GroupSet(config.train.groups), config.seed, winner=config.objective.winner)
    return [sft.prepare(config, stream[position]) for position in positions]


def error(policy, sample):
    """Mean squared velocity error of one winner (eqs. 10 and 12), float64; differentiable."""
    clean, noise, t = sample["winner"].float(), sample["noise"], sample["t"]
    x_t = ((1 - t) * clean + t * noise).unsqueeze(0)
    velocity = policy.backbone.velocity(x_t, t.view(1), Conditioning(sample["text"].unsqueeze(0)))
    return ((velocity[0].double() - noise.double() + clean.double()) ** 2).mean()


@pytest.mark.parametrize("count", [1, 3])
def test_a_step_is_the_gradient_of_the_mean_error(config, policy, count):
    chosen = prepared(config, range(count))
    gradients, metrics = sft.step(config, policy, default_collate(chosen))
    loss = sum(error(policy, sample) for sample in chosen) / count
    expected = torch.autograd.grad(loss, policy.switch.parameters())
    assert metrics["loss"].item() == pytest.approx(loss.item(), rel=1e-6)
    assert any(gradient.any() for gradient in gradients)
    for gradient, other in zip(gradients, expected, strict=True):
        assert torch.allclose(gradient, other, rtol=1e-4, atol=1e-7)


def test_draws_are_those_of_the_preference_trainer(tiny, tmp_path, config):
    """The same group, time and noise at the same position, so that the two baselines differ in the loss alone."""
    stream = GroupStream(GroupSet(config.train.groups), config.seed)
    for position in (0, 9):
        preference = gdpo.prepare(tiny.config(tmp_path), stream[position])
        (supervised,) = prepared(config, [position])
        assert torch.equal(supervised["winner"], preference["winner"]) and supervised["t"] == preference["t"]
        assert torch.equal(supervised["noise"], preference["noise"][0])


def test_no_reference_pass_and_one_clip_a_group(config, policy):
    passes = []
    policy.backbone.transformer.register_forward_hook(lambda *_: passes.append(policy.switch.state.active))
    sft.step(config, policy, default_collate(prepared(config, [0])))
    assert passes == [True]
    losers = GroupSet(config.train.groups).num_losers(0)
    assert config.objective.reference_passes == 0 and config.objective.clips_per_group(losers) == 1


def test_twenty_steps_lower_the_error(tiny, tmp_path, config, policy):
    with torch.no_grad():
        before = [error(policy, sample) for sample in prepared(config, range(8))]
    checkpoints = tiny.train(tmp_path, "optim.steps=20", "optim.lr=0.01", "optim.lr_end=0.01", entry=sft)
    options = {"fingerprint": policy.backbone.fingerprint, "expert": "transformer"}
    checkpoint.load_weights(checkpoint.find_lora(checkpoints)[0], policy.switch, **options)
    with torch.no_grad():
        after = [error(policy, sample) for sample in prepared(config, range(8))]
    assert sum(after) < 0.9 * sum(before)
    assert (tmp_path / "train" / "lora" / "pytorch_lora_weights.safetensors").exists()
    assert "margin" not in tiny.metrics(tmp_path)[0]
