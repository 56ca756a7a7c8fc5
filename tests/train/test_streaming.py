"""Blocks that visit the device from host memory: the same numbers to the bit, whatever runs them, and no copy too many.
On a CPU the copies are plain ones between two sets of tensors."""

from types import SimpleNamespace

import pytest
import torch
from torch._dynamo.utils import counters
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.data import default_collate

import recipes
from eval.search.noise_refinement import RefineConfig, refine
from train import checkpoint, gdpo, loop, sft
from train.backbones import load_backbone
from train.backbones.base import BackboneConfig, Conditioning
from train.backbones.fused.fused_block import fuse_blocks
from train.backbones.fused.inference import fuse
from train.backbones.fused.memory import INPUT_OFFLOADED, OFFLOADED, Sizes, resident
from train.backbones.fused.offload import HostStore
from train.backbones.fused.prepare import prepare_network
from train.backbones.loading import random_transformer
from train.backbones.quantize import round_matrix
from train.backbones.streaming import Ring
from train.backbones.wan import wan_architecture
from train.data import GroupStream
from train.full_parameters import FullParameters
from train.groups import GroupSet
from train.lora_switch import LoraConfig, LoraSwitch
from train.plan import on_card, plan_blocks
from train.policy import Policy
from train.sampling import SamplerConfig
from train.terms.physics import build_heads

CPU = torch.device("cpu")
STREAM = "backbone.stream=true"
OBJECTIVES = {
    "bound": (gdpo, "objective.loss=bound"),
    "plackett_luce": (gdpo, "objective.loss=plackett_luce"),
    "all_terms": (
        gdpo,
        *("objective.t_min=0.5", "physics.trajectory=2", "physics.relational=0.5"),
        *("targets.max_tokens=12", "self_score.strength=3"),
    ),
    "sft": (sft,),
}


def gradients(config, entry):
    """Of a step over the first group, in noise so loud that the judge has something to say, by a moved policy."""
    backbone = load_backbone(config.backbone, "cpu", parts=("expert",))
    switch = LoraSwitch(backbone.transformer, config.lora)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in switch.parameters():
            weight.copy_(0.03 * torch.randn(weight.shape, generator=generator))
    policy = Policy(backbone, switch, build_heads(config, backbone))
    prepare_network(backbone.transformer, switch, config)
    sample = entry.prepare(config, GroupStream(GroupSet(config.train.groups), config.seed)[0])
    return entry.step(config, policy, default_collate([sample | {"noise": 9 * sample["noise"]}]))


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_gradient_is_the_same_to_the_bit(tiny_targets, tmp_path, monkeypatch, name, compiled):
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)  # fused, but run as written
    entry, *changes = OBJECTIVES[name]
    changes += ["objective.beta=10", f"backbone.compile={compiled}", "train.memory_budget_gib=1e-9"]
    (expected, before), (found, after) = (
        gradients(tiny_targets.config(tmp_path, *changes, *more, entry=entry), entry) for more in ((), (STREAM,))
    )
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    assert before == after and any(gradient.any() for gradient in found)
    assert name != "all_terms" or after["self"] > 0


@pytest.mark.parametrize("compiled", [False, True])
def test_8_bits_on_the_host_are_the_numbers_of_a_network_in_8_bits(tiny_targets, tmp_path, monkeypatch, compiled):
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    changes = ("objective.beta=10", f"backbone.compile={compiled}", "train.memory_budget_gib=1e-9")
    (rounded, before), (found, after), (bfloat16, _) = (
        gradients(tiny_targets.config(tmp_path, *changes, f"backbone.dtype={dtype}", *more), gdpo)
        for dtype, more in (("float8", ()), ("float8", (STREAM,)), ("bfloat16", ()))
    )
    assert all(torch.equal(one, other) for one, other in zip(found, rounded, strict=True)) and before == after
    assert any(not torch.equal(one, other) for one, other in zip(bfloat16, rounded, strict=True))


def test_a_parameter_in_8_bits_is_near_its_own_and_takes_half():
    """By hand: a row of 1 and 0.3, in 448ths of its largest, is 448 and 134.4, which e4m3 rounds to 128: 0.286."""
    (whole, _), (network, _) = make(), make(float8=True)
    streamed = network.streamed
    key = "blocks.2.ffn.net.0.proj.weight"
    found, expected = streamed.stored(key), whole.streamed.stored(key)
    torch.testing.assert_close(found, expected, rtol=1 / 16 + 1 / 256, atol=0)  # rounded to bfloat16 once more
    assert not torch.equal(found, expected)
    key = key.replace("weight", "bias")
    assert torch.equal(streamed.stored(key), whole.streamed.stored(key))
    sizes = [sum(host.nbytes for host in one.streamed.hosts) for one in (network, whole)]
    assert 0.5 < sizes[0] / sizes[1] < 0.75  # small blocks have many scales
    weight = torch.tensor([[1.0, 0.3]])
    round_matrix(weight)
    torch.testing.assert_close(weight, torch.tensor([[1.0, 128 / 448]]))


def make(layers=4, *, streamed=True, dtype=torch.bfloat16, float8=False):
    architecture = wan_architecture(heads=2, head_dim=16, ffn=48, layers=layers, z_dim=4, text_dim=16)
    ring = Ring(CPU, count=1) if streamed else None
    network = random_transformer(architecture, device="cpu", dtype=dtype, seed=0, ring=ring, float8=float8)
    switch = LoraSwitch(network, LoraConfig(4, 8.0))
    with torch.no_grad():
        for weight in switch.parameters():
            weight.normal_(std=0.1, generator=torch.Generator().manual_seed(1))
    return network, switch


def velocity(network):
    generator = torch.Generator().manual_seed(0)
    latents, text = (torch.randn(*shape, generator=generator) for shape in ((1, 4, 2, 4, 4), (1, 6, 16)))
    inputs = {"hidden_states": latents.to(network.dtype), "encoder_hidden_states": text.to(network.dtype)}
    return network(**inputs, timestep=torch.tensor([300.0]), return_dict=False)[0].float()


@pytest.mark.slow
@pytest.mark.parametrize("fused", [True, False])
def test_a_streamed_network_compiles_no_graph_more(monkeypatch, fused):
    compile_with = torch.compile
    monkeypatch.setattr(torch, "compile", lambda *args, **kwargs: compile_with(*args, backend="aot_eager", **kwargs))
    graphs, found = [], []
    for streamed in (False, True):
        torch._dynamo.reset()
        counters.clear()
        network, switch = make(streamed=streamed)
        if fused:
            fuse_blocks(network, switch, lambda *_: [0, 1, 0, 1])
        else:
            config = gdpo.Config(backbone=BackboneConfig(compile=True))
            monkeypatch.setattr("train.backbones.fused.prepare.unfit", lambda *_: "as a test says")
            prepare_network(network, switch, config)
        for _ in range(2):
            with switch.frozen_reference():
                reference = velocity(network).detach()
            loss = (velocity(network) - reference).square().mean()
            found.append(torch.autograd.grad(loss, switch.parameters()))
            graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[0] > 0 and len(set(graphs)) == 1
    assert all(torch.equal(one, other) for one, other in zip(found[3], found[0], strict=True))
    torch._dynamo.reset()


def test_a_step_copies_each_block_once_a_pass_and_ahead_of_its_turn(monkeypatch):
    """Six blocks, two of them on the device: a pass begins with the two that the one before left or looked ahead to."""
    network, switch = make(layers=6)
    fuse_blocks(network, switch, lambda *_: [0] * 6, compiled=False)
    streamed, copies, late = network.streamed, [], []
    fill, fetch = streamed.ring.fill, streamed.fetch

    def counted(slot, host):
        if slot.holds is not host:
            copies.append(next(index for index, other in enumerate(streamed.hosts) if other is host))
        fill(slot, host)

    def watched(index):
        if streamed.slot(index).holds is not streamed.hosts[index]:
            late.append(index)
        fetch(index)

    monkeypatch.setattr(streamed.ring, "fill", counted)
    for index, block in enumerate(network.blocks):
        monkeypatch.setattr(block.forward, "fetch", lambda index=index: watched(index))
    with switch.frozen_reference():
        velocity(network)
    assert (copies, late) == ([0, 1, 2, 3, 4, 5, 0], [0])
    velocity(network).sum().backward()
    assert copies[7:] == [1, 2, 3, 4, 5, 3, 2, 1, 0] and late == [0]
    with switch.frozen_reference():
        velocity(network)
    assert copies[16:] == [2, 3, 4, 5, 0] and late == [0]


def test_the_device_holds_two_blocks():
    network, _ = make(layers=6)
    whole, _ = make(layers=6, streamed=False)
    block = sum(weight.nbytes for weight in whole.blocks[0].parameters())
    streamed = network.streamed
    assert streamed.layout.device.size == pytest.approx(block, rel=0.2) and streamed.layout.device.size >= block
    assert resident(whole) - resident(network) == 6 * block - 2 * streamed.layout.device.size
    assert streamed.ring.taken == 6 * streamed.layout.host.size
    for name, weight in whole.blocks[4].named_parameters():
        network.streamed.fetch(4)
        assert torch.equal(weight, network.blocks[4].get_parameter(name))


def test_weights_that_were_overwritten_meanwhile_are_no_silent_error():
    network, _ = make()
    network.disable_gradient_checkpointing()
    with pytest.raises(ValueError, match="backbone.stream=true keeps no block's weights for its backward pass"):
        velocity(network)
    for index, block in enumerate(network.blocks):  # as a caller that bypasses the check would
        block._forward_pre_hooks.clear()
        block.register_forward_pre_hook(lambda *_, index=index: network.streamed.fetch(index))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        velocity(network).sum().backward()


@pytest.mark.parametrize("fused", [False, True])
def test_gradients_to_the_noise_are_the_same_to_the_bit(tiny_pipeline, fused):
    found = []
    for stream in (False, True):
        config = BackboneConfig(path=str(tiny_pipeline), dtype="float32", text_length=16, stream=stream)
        backbone = load_backbone(config, "cpu", parts=("transformer",))
        assert not fused or not fuse(backbone, compiled=False)
        noise = torch.randn(1, *backbone.latent_shape(32, 32, 5), generator=torch.Generator().manual_seed(7))
        text = Conditioning(torch.randn(1, 16, 64, generator=torch.Generator().manual_seed(8)))
        found.append(refine(backbone, text, noise, SamplerConfig("euler", steps=2, guidance=1.0), RefineConfig()))
    assert torch.equal(found[0].noise, found[1].noise) and torch.equal(found[0].trace, found[1].trace)
    assert (found[0].noise != noise).any()


RUN = ("optim.batch_size=1", "optim.schedule=constant", "train.checkpoint_every=2")
CLIP = ("validation.prompts=[a ball]", "validation.every=2", "sampler.steps=2")


@pytest.mark.slow
def test_a_run_with_clips_stopped_and_resumed_is_the_same_run(tiny, tmp_path):
    whole = tiny.train(tmp_path / "whole", *RUN, *CLIP, "optim.steps=4")
    for steps in (2, 4):
        streamed = tiny.train(tmp_path / "streamed", *RUN, *CLIP, STREAM, f"optim.steps={steps}")
    found, expected = (tiny.weights(checkpoint.latest(path)) for path in (streamed, whole))
    assert found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in found)
    assert tiny.metrics(tmp_path / "streamed") == tiny.metrics(tmp_path / "whole")
    clips = [sorted((tmp_path / name / "train" / "validation").rglob("*.mp4")) for name in ("whole", "streamed")]
    assert len(clips[0]) == 3 and all(a.read_bytes() == b.read_bytes() for a, b in zip(*clips, strict=True))


def test_inputs_in_host_memory_change_no_gradient_and_all_memory_comes_back():
    found = {}
    for levels in ([0] * 4, [5, 5, 4, 0], [5, 5, 5, 3]):
        network, switch = make()
        store = HostStore(2**16, CPU)
        fuse_blocks(network, switch, lambda *_, levels=levels: levels, store=store, compiled=False)
        for _ in range(2):
            loss = velocity(network).square().mean()
            assert (store.newest() is None) == (levels[0] == 0)
            found.setdefault(tuple(levels), torch.autograd.grad(loss, switch.parameters()))
        del loss
        assert store.newest() is None and store.free == [(0, 2**16)]  # all of it is free again
    expected, *others = found.values()
    assert all(torch.equal(one, two) for other in others for one, two in zip(other, expected, strict=True))


def test_memory_is_used_again_by_tensors_of_other_sizes():
    """By hand, in pages: 10 hold 4 + 4; given back they hold 10 of one page; gaps of 2 and 3 hold 2 but not 4."""
    store, page = HostStore(10 * 4096, CPU), 4096
    large = [store.send([torch.zeros(4 * page, dtype=torch.uint8)]) for _ in range(2)]
    assert None not in large
    del large
    small = [store.send([torch.full((page - 1,), float(n), dtype=torch.uint8)]) for n in range(10)]
    assert None not in small and [one.fetch()[0].unique().tolist() for one in small] == [[n] for n in range(10)]
    del small[7:], small[2:4]
    assert store.free == [(2 * page, 4 * page), (7 * page, 10 * page)]
    with pytest.warns(UserWarning, match="train.offload_gib is used up"):
        assert store.send([torch.zeros(page, dtype=torch.uint8), torch.zeros(4 * page, dtype=torch.uint8)]) is None
    assert store.free == [(2 * page, 4 * page), (7 * page, 10 * page)]
    assert store.send([torch.zeros(3 * page, dtype=torch.uint8)]).regions == [(7 * page, 10 * page)]


def test_a_steps_passes_use_the_same_memory():
    """wan14b on a 32 GB card with 30 GiB on the host, at 1/1024 of its size: a pass that keeps everything of 9 blocks
    there, then the two of the self-score, which keep 6 and 34 inputs. The first leaves 29 regions of a hidden state too
    few for the others, if each is used again for its own size alone."""
    config = on_card(recipes.load(gdpo.Config, ["recipe=wan14b", "train.offload_gib=30"]), 32)
    sizes = Sizes(tokens=32, width=5120, ffn=13824, heads=40, blocks=40)  # of 32,760 tokens
    everything = [sizes.hidden] * 7 + [sizes.wide, 4 * 32 * 40]
    store, counts = HostStore(30 * 2**20, CPU), []
    for passes in (1, 2):
        levels = plan_blocks(config, passes=passes).levels * passes
        parts = [{OFFLOADED: everything, INPUT_OFFLOADED: [sizes.hidden]}.get(level) for level in levels]
        sent = [store.send([torch.empty(size, dtype=torch.uint8) for size in part]) for part in parts if part]
        assert None not in sent
        counts.append((levels.count(OFFLOADED), levels.count(INPUT_OFFLOADED)))
        del sent
    assert counts == [(9, 0), (6, 34)]


@pytest.mark.parametrize(
    ("levels", "stay"),
    [([0] * 4, [True] * 4), ([5, 5, 5, 0], [False, False, True, True])],  # what was sent last comes back first
)
def test_an_input_in_host_memory_leaves_the_device(levels, stay):
    network, switch = make()
    fuse_blocks(network, switch, lambda *_: levels, store=HostStore(2**16, CPU), compiled=False)
    seen = []
    for block in network.blocks:
        block.register_forward_pre_hook(lambda _, inputs: seen.append(StorageWeakRef(inputs[0].untyped_storage())))
    loss = velocity(network).square().mean()
    assert [not one.expired() for one in seen] == stay
    torch.autograd.grad(loss, switch.parameters())


def test_two_experts_share_the_ring_and_sample_the_same():
    latents, text = torch.randn(1, 16, 2, 4, 4), Conditioning(torch.randn(1, 8, 64))
    config = {"family": "wan22_t2v", "architecture": "tiny", "random_weights": True, "text_length": 8}
    plain, streamed = (
        load_backbone(BackboneConfig(**config, stream=stream), "cpu", parts=("transformer",))
        for stream in (False, True)
    )
    high, low = (expert.streamed for expert in streamed.experts.values())
    assert high.ring is low.ring and high.ring.taken == 4 * high.layout.host.size
    for t in (0.95, 0.3, 0.9):
        with torch.no_grad():
            assert torch.equal(streamed.velocity_at(latents, t, text), plain.velocity_at(latents, t, text))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="copies between a GPU and its host")
def test_a_gpu_computes_with_no_weight_too_early_or_too_late():
    """Blocks of 200 MB, whose copies take longer than they compute: a pass that did not wait would be wrong."""
    gpu, outputs = torch.device("cuda"), []
    architecture = wan_architecture(heads=16, ffn=8192, layers=7, text_dim=64)
    for ring in (None, Ring(gpu, count=1)):
        network = random_transformer(architecture, device=gpu, dtype=torch.bfloat16, seed=0, ring=ring)
        switch = LoraSwitch(network, LoraConfig(4, 8.0))
        fuse_blocks(network, switch, lambda *_: [0] * 7, compiled=False)
        latents, text = (
            torch.ones(shape, device=gpu, dtype=torch.bfloat16) for shape in ((1, 16, 2, 8, 8), (1, 6, 64))
        )
        time = torch.tensor([300.0], device=gpu)
        for _ in range(3):
            velocity = network(latents, time, text, return_dict=False)[0]
            gradients = torch.autograd.grad(velocity.float().square().mean(), switch.parameters())
            with switch.frozen_reference():
                reference = network(2 * latents, time, text, return_dict=False)[0]
            outputs.append([velocity.detach(), reference, *(gradient.norm() for gradient in gradients)])
    for found in outputs:
        assert torch.equal(found[0], outputs[0][0]) and torch.equal(found[1], outputs[0][1])
        torch.testing.assert_close(found[2:], outputs[0][2:], rtol=1e-2, atol=1e-6)


def test_a_host_without_the_memory_is_refused_before_anything_is_read(monkeypatch):
    monkeypatch.setattr("train.host_memory.host_memory", lambda: 60 * 2**30)
    monkeypatch.setattr("train.backbones.loading._fill", lambda *_: pytest.fail("weights were made"))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    size = SimpleNamespace(size=13 * 2**28)
    ring, layout = Ring(CPU, count=2), SimpleNamespace(device=size, host=size, scales={})
    with pytest.raises(
        ValueError, match="keeps 104.0 GiB of weights, 52.0 GiB for each of 2 .* may lock 48.0 GiB here"
    ):
        ring.reserve(layout, 8)
    together = Ring(CPU, count=1, together=True)
    monkeypatch.setattr("train.backbones.streaming.Slot", lambda *_: None)
    together.reserve(layout, 8)
    assert together.taken == 26 * 2**30  # one copy for both


def test_what_cannot_stream_says_so(tiny, tmp_path):
    network, _ = make()
    with pytest.raises(ValueError, match="full weights do not stream: set backbone.stream=false"):
        FullParameters(network)
    with pytest.raises(ValueError, match="backbone.stream=true needs train.parameters=lora and a launch without"):
        tiny.train(tmp_path, STREAM, "train.parameters=full")
    with pytest.raises(ValueError, match="backbone.stream=true needs train.parameters=lora and a launch without"):
        loop.check_frozen(tiny.config(tmp_path, STREAM), sharded=True)
    for more in ([], ["--dry-run"]):  # before anything is read
        with pytest.raises(ValueError, match="keeps no block's weights .* set train.activation_checkpointing=true"):
            tiny.train(tmp_path / "none", STREAM, "train.activation_checkpointing=false", "train.groups=/none", *more)
    config = tiny.config(tmp_path, STREAM).backbone
    with pytest.raises(ValueError, match="backbone.stream=true keeps the frozen network in host memory, and ZeRO-3"):
        load_backbone(config, "cpu", parts=("expert",), sharding=SimpleNamespace())
