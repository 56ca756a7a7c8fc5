"""The memory plan: its bytes by hand, and that more memory never keeps less."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from train import gdpo, loop
from train.backbones.fused import memory
from train.backbones.fused.memory import GIB, Sizes, choose_levels, predict
from train.backbones.fused.offload import affordable
from train.backbones.fused.prepare import prepare_network
from train.backbones.wan import WAN

WAN_14B = Sizes(tokens=32760, width=5120, ffn=13824, heads=40, blocks=40)


def test_bytes_by_hand():
    sizes = Sizes(tokens=10, width=8, ffn=16, heads=2, blocks=3)
    hidden, wide, logsumexp = 160, 320, 80
    assert (sizes.hidden, sizes.wide) == (hidden, wide)
    levels = [hidden, 2 * hidden + logsumexp, 5 * hidden + logsumexp, 8 * hidden + wide + logsumexp]
    assert [sizes.kept(level) for level in range(4)] == levels
    assert predict(sizes, [0, 1, 1]) == levels[0] + 2 * levels[1] + sizes.workspace(1)
    # The second block keeps less than the last and has more work, so that the peak can be there.
    assert sizes.workspace(0) == 12.5 * 160 + 2.9 * 320 == 2928 and sizes.workspace(1) == 14.5 * 160 + 1.4 * 320 == 2768
    assert predict(sizes, [0, 0, 1]) == max(2 * 160 + 2928, 2 * 160 + 400 + 2768)
    wide = Sizes(tokens=10, width=8, ffn=80, heads=2, blocks=3)  # w is 1600
    assert predict(wide, [0, 0, 1]) == 2 * 160 + 12.5 * 160 + 2.9 * 1600 > 2 * 160 + 400 + 14.5 * 160 + 1.4 * 1600


def test_more_memory_never_keeps_less_and_the_prediction_fits():
    before = [0] * WAN_14B.blocks
    for gib in range(5, 200):
        levels = choose_levels(WAN_14B, gib * GIB)
        assert all(new >= old for new, old in zip(levels, before, strict=True))
        assert predict(WAN_14B, levels) <= gib * GIB or not any(levels)
        before = levels
    assert before == [3] * WAN_14B.blocks


def test_attention_is_kept_everywhere_before_anything_else_and_the_last_blocks_first():
    seen = [choose_levels(WAN_14B, gib * GIB) for gib in range(5, 200)]
    assert all(levels == sorted(levels) and levels[-1] - levels[0] <= 1 for levels in seen)
    assert len({tuple(levels) for levels in seen}) > 50


def test_two_passes_that_wait_together_keep_less_each():
    """By hand: inputs 2 x 40 x 0.3124 GiB, workspace 12.5 x 0.3124 + 2.9 x 0.8436, outside 1.1 x 0.3124."""
    assert predict(WAN_14B, [0] * 40, 2) / GIB == pytest.approx(31.7, abs=0.05)
    one, two = choose_levels(WAN_14B, 47 * GIB), choose_levels(WAN_14B, 47 * GIB, passes=2)
    assert sum(two) < sum(one) and predict(WAN_14B, two, 2) <= 47 * GIB < predict(WAN_14B, one, 2)
    assert choose_levels(WAN_14B, 80 * GIB, 40 * GIB, passes=2).count(4) <= choose_levels(
        WAN_14B, 80 * GIB, 20 * GIB
    ).count(4)


def test_what_the_host_takes_is_spread_and_never_the_last_block():
    host = 10.5 * WAN_14B.offloaded
    levels = choose_levels(WAN_14B, 30 * GIB, host)
    places = [index for index, level in enumerate(levels) if level == 4]
    assert len(places) == 10 and {later - earlier for earlier, later in zip(places, places[1:], strict=False)} <= {3, 4}
    assert levels[-1] < 4 and predict(WAN_14B, levels) <= 30 * GIB
    assert sum(choose_levels(WAN_14B, 30 * GIB)) < sum(levels)


def test_no_more_is_offloaded_than_it_takes_to_keep_everything():
    assert choose_levels(WAN_14B, 1e15, 1e15) == [3] * 40
    everything = predict(WAN_14B, [3] * 40)
    assert choose_levels(WAN_14B, everything, 1e15).count(4) == 0
    # What comes back has to fit beside the rest: a block less than the device holds takes two to the host.
    less = choose_levels(WAN_14B, everything - 0.5 * WAN_14B.offloaded, 1e15)
    assert less.count(4) == 2 and set(less) == {3, 4}
    assert choose_levels(WAN_14B, 22 * GIB, 1e15).count(4) == 39


def test_inputs_wait_on_the_host_only_where_they_do_not_fit_and_then_of_the_first_blocks():
    for gib in (16, 19.5, 22.4, 40, 130):
        for host in (0, 3, 13, 80):
            levels = choose_levels(WAN_14B, gib * GIB, host * GIB, inputs=True)
            first, used = levels.count(5), levels.count(4) * WAN_14B.offloaded + levels.count(5) * WAN_14B.hidden
            assert levels[:first] == [5] * first and levels[-1] < 4 and used <= host * GIB
            assert predict(WAN_14B, levels) <= gib * GIB or host < 13
            plain = choose_levels(WAN_14B, gib * GIB, host * GIB)
            if first:  # or else fewer blocks could keep everything there
                assert predict(WAN_14B, plain) > gib * GIB or plain.count(4) < levels.count(4)
            else:
                assert levels == plain or min(plain) == 0


def test_the_host_takes_nothing_where_what_comes_back_would_not_fit():
    """By hand: all inputs and the workspace are 18.9 GiB, a block's activations that come back 2.7 more."""
    for gib in (19, 20, 21):
        levels = choose_levels(WAN_14B, gib * GIB, 5 * GIB)
        assert 4 not in levels and predict(WAN_14B, levels) <= gib * GIB
    assert choose_levels(WAN_14B, 22 * GIB, 5 * GIB).count(4) == 1


def test_the_least_that_a_step_can_take():
    """By hand: one input and the workspace, 6.7 GiB, and an input on its way back; the others' 12.2 GiB on the host."""
    levels = choose_levels(WAN_14B, 0, 12.3 * GIB, inputs=True)
    assert levels == [5] * 39 + [0] and predict(WAN_14B, levels) / GIB == pytest.approx(6.98, abs=0.01)
    assert choose_levels(WAN_14B, 0, 12 * GIB, inputs=True).count(5) == 38
    two = choose_levels(WAN_14B, 0, 100 * GIB, passes=2, inputs=True)
    assert two.count(5) == 39 and choose_levels(WAN_14B, 0, 12.3 * GIB, passes=2, inputs=True).count(5) == 19


def test_processes_share_the_host(monkeypatch):
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(total=100 * GIB))
    assert affordable(80.0) == 80.0
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert affordable(20.0) == 20.0
    with pytest.warns(UserWarning, match="train.offload_gib=80 for each of 4 processes .* 20 GiB each"):
        assert affordable(80.0) == 20.0
    with pytest.warns(UserWarning, match="10 GiB each"):  # beside streamed weights
        assert affordable(20.0, 40 * GIB) == 10.0


@pytest.fixture(autouse=True)
def of_wan(monkeypatch):
    """A layer passes for Wan's network, so that its bytes are counted by hand."""
    monkeypatch.setattr(memory, "kind_of", lambda network: WAN)


def network(device="cpu"):
    shapes = {
        "num_layers": 2,
        "ffn_dim": 16,
        "num_attention_heads": 2,
        "attention_head_dim": 2,
        "patch_size": (1, 2, 2),
    }
    made = nn.Linear(4, 4, device=device)
    made.config, made.dtype, made.blocks = shapes, torch.bfloat16, nn.ModuleList([nn.Identity()])
    return made


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, [3, 3]),  # a CPU has no limit
        ({"memory_budget_gib": 1e-9}, [0, 0]),
        ({"memory_budget_gib": 1e-9, "activation_checkpointing": False}, [3, 3]),
    ],
)
def test_plan_of_a_network(changes, expected):
    config = loop.TrainConfig(**changes)
    levels = memory.plan(network(), [torch.zeros(3)], config)
    assert levels(torch.Size([1, 10, 8]), 1) == expected


def test_a_larger_batch_keeps_less():
    config = loop.TrainConfig(memory_budget_gib=20e3 / GIB)
    levels = memory.plan(network(), [torch.zeros(3)], config)
    small, large = levels(torch.Size([1, 10, 8]), 1), levels(torch.Size([9, 10, 8]), 1)
    assert sum(small) > sum(large)


def settings(**train):
    return gdpo.Config(train=loop.TrainConfig(**train))


def test_a_negative_budget_is_refused():
    for key in ("memory_budget_gib", "offload_gib"):
        with pytest.raises(ValueError, match=f"train.{key}=-1: give GiB per GPU"):
            prepare_network(network(), None, settings(**{key: -1}))
        with pytest.raises(ValueError, match=f"train.{key}=nan: give GiB per GPU"):
            gdpo.check(settings(**{key: math.nan}))


def config(float8):
    return loop.TrainConfig(memory_budget_gib=6e3 / GIB, float8=float8)


def test_float8_is_refused_without_fused_blocks():
    with pytest.raises(ValueError, match="train.float8 needs compiled blocks with LoRA, but backbone.compile is false"):
        prepare_network(network(), None, settings(float8=True))


def test_blocks_that_zero3_gathers_count():
    made = network()
    made.blocks = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
    assert memory.gathered(made) == 0
    for weight in made.blocks.parameters():
        weight.ds_numel = weight.numel()
    assert memory.gathered(made) == 2 * (16 + 4) * 4


def test_every_set_of_gradients_that_waits_counts():
    """By hand: four more sets of 500 float32 numbers take 8000 of 20,000 bytes from the blocks."""
    config, shape = loop.TrainConfig(memory_budget_gib=20e3 / GIB), torch.Size([1, 10, 8])
    few, many = (memory.plan(network(), [torch.zeros(500)], config, gradients=sets)(shape, 1) for sets in (1, 5))
    assert few == [3, 3] and sum(many) < sum(few)


def test_gradients_of_one_step():
    one, batched = loop.TrainConfig(), loop.TrainConfig(pairs_per_pass=2)
    sets = [
        loop.gradient_sets(SimpleNamespace(train=train), 5, passes) for train in (one, batched) for passes in (1, 4)
    ]
    assert sets == [5, 6, 1, 2]


def test_float8_leaves_room_for_its_operands():
    wide, narrow = (memory.plan(network(), [torch.zeros(3)], config(float8)) for float8 in (False, True))
    shape = torch.Size([1, 10, 8])
    assert sum(wide(shape, 1)) > sum(narrow(shape, 1))


WAN_1_3B = Sizes(tokens=32760, width=1536, ffn=8960, heads=12, blocks=30)
WAN_5B = Sizes(tokens=27280, width=3072, ffn=14336, heads=24, blocks=30)  # 704x1280x121
RESIDENT = {  # GiB: weights, whole and streamed, and adapters five times: themselves, two moments, two gradients
    WAN_14B: (26.614 + 5 * 0.293, 1.794 + 5 * 0.293),
    WAN_1_3B: (2.643 + 5 * 0.0659, 0.226 + 5 * 0.0659),
    WAN_5B: (9.313 + 5 * 0.132, 0.797 + 5 * 0.132),
}


@pytest.mark.parametrize(
    ("sizes", "streamed", "steps", "measured"),
    [
        # How many blocks have levels 0 to 5, and passes; of the two kinds of steps that a run had.
        (WAN_14B, False, [((40, 0, 0, 0, 0, 0), 1)], 47.19),
        (WAN_5B, False, [((30, 0, 0, 0, 0, 0), 1)], 18.70),
        (WAN_1_3B, False, [((30, 0, 0, 0, 0, 0), 1)], 8.47),
        (WAN_14B, False, [((0, 22, 18, 0, 0, 0), 1)], 75.75),
        (WAN_1_3B, False, [((0, 0, 30, 0, 0, 0), 1)], 18.85),
        (WAN_14B, False, [((14, 26, 0, 0, 0, 0), 2)], 75.91),
        (WAN_14B, False, [((5, 22, 0, 0, 13, 0), 2)], 76.29),
        (WAN_14B, False, [((0, 0, 9, 5, 26, 0), 1)], 74.37),
        (WAN_14B, False, [((0, 0, 9, 5, 26, 0), 1), ((8, 19, 0, 0, 13, 0), 2)], 74.94),
        (WAN_14B, True, [((19, 1, 0, 0, 8, 12), 1)], 21.70),
        (WAN_5B, True, [((0, 0, 5, 4, 21, 0), 1)], 20.65),
        (WAN_1_3B, True, [((8, 6, 0, 0, 16, 0), 1)], 6.99),
        # The cards of train/README.md.
        (WAN_14B, True, [((0, 1, 0, 0, 2, 37), 1), ((3, 1, 0, 0, 0, 36), 2)], 13.9),
        (WAN_14B, True, [((18, 1, 0, 0, 8, 13), 1), ((9, 1, 0, 0, 2, 28), 2)], 21.15),
        (WAN_14B, True, [((19, 12, 0, 0, 9, 0), 1), ((20, 1, 0, 0, 3, 16), 2)], 27.93),
        (WAN_14B, True, [((0, 22, 9, 0, 9, 0), 1), ((28, 8, 0, 0, 4, 0), 2)], 42.6),
        (WAN_14B, False, [((0, 16, 15, 0, 9, 0), 1), ((19, 17, 0, 0, 4, 0), 2)], 72.8),
        (WAN_1_3B, True, [((0, 7, 7, 0, 16, 0), 1), ((21, 1, 0, 0, 8, 0), 2)], 10.3),
        (WAN_1_3B, False, [((0, 3, 11, 0, 16, 0), 1), ((14, 8, 0, 0, 8, 0), 2)], 13.8),
        (WAN_1_3B, False, [((0, 0, 6, 8, 16, 0), 1), ((0, 14, 8, 0, 8, 0), 2)], 20.5),
        (WAN_1_3B, False, [((0, 0, 0, 16, 14, 0), 1), ((0, 0, 22, 0, 8, 0), 2)], 28.4),
        (WAN_1_3B, False, [((0, 0, 0, 30, 0, 0), 1), ((0, 0, 13, 9, 8, 0), 2)], 43.25),
        (WAN_1_3B, False, [((0, 0, 0, 30, 0, 0), 1), ((0, 0, 0, 25, 5, 0), 2)], 71.68),
    ],
)
def test_the_prediction_is_near_what_an_h200_measured(sizes, streamed, steps, measured):
    """Peaks that train.tools.benchmark measured, GiB. The plan is to be right within 0.5."""
    peaks = []
    for counts, passes in steps:
        offloaded, inputs = counts[4:]
        rest, others = iter([level for level in range(4) for _ in range(counts[level])]), sizes.blocks - 1 - inputs
        spread = {inputs + (2 * n + 1) * others // (2 * offloaded) for n in range(offloaded)}
        levels = [5] * inputs + [4 if place in spread else next(rest) for place in range(inputs, sizes.blocks)]
        peaks.append(RESIDENT[sizes][streamed] + predict(sizes, levels, passes) / GIB)
    assert max(peaks) == pytest.approx(measured, abs=0.4)
