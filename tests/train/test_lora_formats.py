"""LoRAs of other tools: files made by their key names give the difference that their tool applies."""

import json
import math
from dataclasses import replace
from functools import cache
from itertools import count

import peft
import pytest
import torch
from diffusers import WanPipeline, WanTransformer3DModel
from safetensors.torch import save_file

from train import export
from train.attached_loras import AttachedLoras
from train.backbones import find_architecture, load_backbone, lora_formats
from train.backbones.architecture import parameter_shapes
from train.backbones.base import BackboneConfig, BaseLora
from train.backbones.loading import random_transformer
from train.backbones.tiny import write_tiny_pipeline
from train.lora_switch import LoraConfig, LoraSwitch

# Names in diffusers and in Wan's own code, which all other tools have.
BLOCK = {
    "attn1.to_q": "self_attn.q",
    "attn1.to_k": "self_attn.k",
    "attn1.to_v": "self_attn.v",
    "attn1.to_out.0": "self_attn.o",
    "attn2.to_q": "cross_attn.q",
    "attn2.to_k": "cross_attn.k",
    "attn2.to_v": "cross_attn.v",
    "attn2.to_out.0": "cross_attn.o",
    "ffn.net.0.proj": "ffn.0",
    "ffn.net.2": "ffn.2",
}
OUTSIDE = {
    "condition_embedder.time_embedder.linear_1": "time_embedding.0",
    "condition_embedder.text_embedder.linear_2": "text_embedding.2",
    "condition_embedder.time_proj": "time_projection.1",
    "proj_out": "head.head",
}
DIFFERENCES = {  # of parameters: norms change places
    "blocks.0.norm2.weight": "blocks.0.norm3.diff",
    "blocks.0.norm2.bias": "blocks.0.norm3.diff_b",
    "blocks.1.attn1.norm_q.weight": "blocks.1.self_attn.norm_q.diff",
    "blocks.1.attn1.to_q.bias": "blocks.1.self_attn.q.diff_b",
    "blocks.1.scale_shift_table": "blocks.1.modulation.diff",
    "blocks.2.scale_shift_table": "blocks.2.diff_m",
    "scale_shift_table": "head.diff_m",
    "proj_out.weight": "head.head.diff",
    "proj_out.bias": "head.head.diff_b",
    "patch_embedding.weight": "patch_embedding.diff",
    "condition_embedder.time_proj.bias": "time_projection.1.diff_b",
}
IN_BLOCKS = {f"blocks.{n}.{ours}": f"blocks.{n}.{theirs}" for n in range(3) for ours, theirs in BLOCK.items()}
MISSING = object()
SEEDS = count()


@cache
def shapes():
    return parameter_shapes(find_architecture(BackboneConfig(architecture="tiny")))


def draw(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(next(SEEDS))) * 0.1


class Made:
    """Random adapters of layers, each of a rank and alpha of its own, and the difference that they make."""

    def __init__(self, layers, *, rank=None, alpha=None):
        self.down, self.up, self.alpha, self.delta = {}, {}, {}, {}
        for number, layer in enumerate(layers):
            out, into = shapes()[f"{layer}.weight"]
            own = rank or 2 + number % 3
            self.down[layer], self.up[layer] = draw(own, into), draw(out, own)
            self.alpha[layer] = own if alpha is MISSING else alpha or 1.5 + number % 2
            self.delta[f"{layer}.weight"] = self.alpha[layer] / own * (self.up[layer] @ self.down[layer])

    def tensors(self, names, key, *, down, up, alpha=None):
        found = {}
        for layer, name in names.items():
            found[key.format(name, down)] = self.down[layer]
            found[key.format(name, up)] = self.up[layer]
            if alpha:
                found[alpha.format(name)] = torch.tensor(float(self.alpha[layer]))
        return found


def assert_gives(path, delta, *, expert="", experts=("transformer",), prefix=None):
    """The file adds just `delta` to zeros."""
    file = lora_formats.read(path)
    (lora,) = file.by_expert(list(experts), expert=expert, source=f"lora={path}").values()
    lora.check(shapes(), source="it")
    for name, shape in shapes().items():
        found = lora.add(name, torch.zeros(shape))
        torch.testing.assert_close(found, delta.get(name, torch.zeros(shape)), rtol=0, atol=1e-6)
    return file


def flat(names):
    return {layer: name.replace(".", "_") for layer, name in names.items()}


ORIGINAL = IN_BLOCKS | OUTSIDE
FORMATS = {
    "ComfyUI": (ORIGINAL, "diffusion_model.{}.{}.weight", ("lora_down", "lora_up"), "diffusion_model.{}.alpha"),
    "ComfyUI, whole checkpoint's prefix": (ORIGINAL, "model.diffusion_model.{}.{}.weight", ("lora_A", "lora_B"), None),
    "musubi-tuner, kohya": (flat(ORIGINAL), "lora_unet_{}.{}.weight", ("lora_down", "lora_up"), "lora_unet_{}.alpha"),
    "DiffSynth-Studio": (ORIGINAL, "{}.{}.default.weight", ("lora_A", "lora_B"), None),
    "DiffSynth-Studio, pipe.dit": (ORIGINAL, "pipe.dit.{}.{}.default.weight", ("lora_A", "lora_B"), None),
    "diffusers": (dict(zip(ORIGINAL, ORIGINAL, strict=True)), "transformer.{}.{}.weight", ("lora_A", "lora_B"), None),
    "bare names of diffusers": (dict(zip(ORIGINAL, ORIGINAL, strict=True)), "{}.{}.weight", ("lora_A", "lora_B"), None),
}


@pytest.mark.parametrize("tool", FORMATS)
def test_a_tools_keys_give_its_difference(tmp_path, tool):
    names, key, (down, up), alpha = FORMATS[tool]
    made = Made(names, alpha=None if alpha else MISSING)
    save_file(made.tensors(names, key, down=down, up=up, alpha=alpha), tmp_path / "lora.safetensors")
    file = assert_gives(tmp_path / "lora.safetensors", made.delta)
    assert (file.fingerprint, file.expert) == ("", "")


def test_lightx2v_adds_whole_differences_of_weights_biases_norms_and_tables(tmp_path):
    made = Made(IN_BLOCKS)
    key = {"key": "diffusion_model.{}.{}.weight", "down": "lora_down", "up": "lora_up"}
    tensors = made.tensors(IN_BLOCKS, **key, alpha="diffusion_model.{}.alpha")
    differences = {name: draw(*shapes()[name]) for name in DIFFERENCES}
    tensors |= {f"diffusion_model.{DIFFERENCES[name]}": tensor for name, tensor in differences.items()}
    save_file(tensors, tmp_path / "lora.safetensors")
    assert_gives(tmp_path / "lora.safetensors", made.delta | differences)


def test_16_bit_matrices_are_multiplied_in_float32(tmp_path):
    made, key = Made(IN_BLOCKS), "diffusion_model.{}.{}.weight"
    tensors = made.tensors(IN_BLOCKS, key, down="lora_down", up="lora_up", alpha="diffusion_model.{}.alpha")
    tensors = {name: tensor.bfloat16() for name, tensor in tensors.items()}
    save_file(tensors, tmp_path / "lora.safetensors")
    delta = {}
    for layer, name in IN_BLOCKS.items():
        down, up = (tensors[key.format(name, side)].float() for side in ("lora_down", "lora_up"))
        delta[f"{layer}.weight"] = made.alpha[layer] / len(down) * (up @ down)
    assert_gives(tmp_path / "lora.safetensors", delta)


def test_diffusers_metadata_state_alpha_by_pattern(tmp_path):
    """As diffusers writes a LoRA whose layers differ."""
    layers = ["blocks.0.attn1.to_q", "blocks.1.attn1.to_q", "blocks.1.ffn.net.2"]
    made = Made(layers)
    config = {
        "transformer.r": 4,
        "transformer.lora_alpha": 1.5,
        "transformer.rank_pattern": {"blocks.0.attn1.to_q": 2, "blocks.1.attn1.to_q": 3},
        "transformer.alpha_pattern": {"blocks.1.attn1.to_q": 2.5},
    }
    tensors = made.tensors({layer: layer for layer in layers}, "transformer.{}.{}.weight", down="lora_A", up="lora_B")
    metadata = {"format": "pt", "lora_adapter_metadata": json.dumps(config)}
    save_file(tensors, tmp_path / "lora.safetensors", metadata=metadata)
    assert_gives(tmp_path / "lora.safetensors", made.delta)
    config["transformer.r"] = 5
    metadata["lora_adapter_metadata"] = json.dumps(config)
    save_file(tensors, tmp_path / "lora.safetensors", metadata=metadata)
    with pytest.raises(ValueError, match=r"alpha of blocks.1.ffn.net.2: rank 5 is stated, but A has rank 4"):
        lora_formats.read(tmp_path / "lora.safetensors")


@pytest.mark.filterwarnings("ignore:Adapter")  # peft takes a bias for a shard
@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"lora_bias": True}], ids=str)
def test_pefts_own_folder_gives_what_peft_merges(tmp_path, options):
    network = random_transformer(
        find_architecture(BackboneConfig(architecture="tiny")), device="cpu", seed=0, dtype=torch.float32
    )
    base = {name: weight.clone() for name, weight in network.state_dict().items()}
    config = peft.LoraConfig(
        r=4,
        lora_alpha=10,
        target_modules=["attn1.to_q", "ffn.net.2"],
        rank_pattern={"blocks.1.attn1.to_q": 2},
        alpha_pattern={"blocks.2.ffn.net.2": 3},
        init_lora_weights=False,
        **options,
    )
    wrapped = peft.get_peft_model(network, config)
    wrapped.save_pretrained(tmp_path)
    merged = wrapped.merge_and_unload().state_dict()
    file = assert_gives(
        tmp_path, {name: merged[name] - base[name] for name in shapes() if not torch.equal(merged[name], base[name])}
    )
    assert file.path.name == "adapter_model.safetensors"
    alone = tmp_path / "alone.safetensors"
    file.path.rename(alone)
    before = lora_formats.read(alone).sha256
    (tmp_path / "adapter_config.json").write_text(
        (tmp_path / "adapter_config.json").read_text().replace('"lora_alpha": 10', '"lora_alpha": 11')
    )
    assert lora_formats.read(alone).sha256 != before  # alpha stands there


@pytest.fixture(scope="module")
def ours(tmp_path_factory, tiny_pipeline):
    """A LoRA of ours on the tiny pipeline, and the network without it."""
    folder = tmp_path_factory.mktemp("ours")
    config = BackboneConfig(path=str(tiny_pipeline), dtype="float32")
    backbone = load_backbone(config, "cpu", parts=("expert",))
    switch = LoraSwitch(backbone.transformer, LoraConfig(rank=4, alpha=10.0, targets=list(BLOCK)))
    for weight in switch.parameters():
        weight.data = draw(*weight.shape)
    metadata = {**switch.describe(), "fingerprint": backbone.fingerprint, "expert": "transformer"}
    save_file(switch.state_dict(), folder / LoraSwitch.file, metadata=metadata)
    delta = {}
    for layer in IN_BLOCKS:
        down, up = (switch.weights[f"{layer}.lora_{side}.weight"].data for side in "AB")
        delta[f"{layer}.weight"] = 2.5 * (up @ down)
    return folder / LoraSwitch.file, backbone.fingerprint, delta


@pytest.mark.parametrize("to", ["itself", "diffusers", "comfyui"])
def test_our_own_file_and_its_exports_come_back(tmp_path, ours, to):
    path, fingerprint, delta = ours
    write = {"itself": lambda source, _: source, "diffusers": export.to_diffusers, "comfyui": export.to_comfyui}[to]
    written = write(path, tmp_path / "pytorch_lora_weights.safetensors")
    file = assert_gives(written if to == "itself" else tmp_path, delta)
    assert (file.fingerprint, file.expert) == (fingerprint, "transformer")


@torch.no_grad()
def velocity(network):
    generator = torch.Generator().manual_seed(3)
    latents, text = torch.randn(1, 16, 2, 4, 4, generator=generator), torch.randn(1, 8, 64, generator=generator)
    return network(
        hidden_states=latents, timestep=torch.tensor([400.0]), encoder_hidden_states=text, return_dict=False
    )[0]


def test_attached_merged_and_diffusers_own_loader_are_one_network(tmp_path, ours, tiny_pipeline):
    written = export.to_comfyui(ours[0], tmp_path / "lora.safetensors")
    config = BackboneConfig(path=str(tiny_pipeline), dtype="float32", loras=[BaseLora(str(written))])
    merged = load_backbone(config, "cpu", parts=("transformer",))
    plain = load_backbone(BackboneConfig(path=str(tiny_pipeline), dtype="float32"), "cpu", parts=("transformer",))
    base = velocity(plain.transformer)
    lora = lora_formats.read(written).by_expert(["transformer"], source="it")
    attached = AttachedLoras(plain.experts, lora, source="it")
    pipeline = WanPipeline.from_pretrained(tiny_pipeline)
    pipeline.load_lora_weights(str(written))
    expected = velocity(pipeline.transformer)
    assert (expected - base).abs().max() > 0.05
    for network in (merged.transformer, plain.transformer):
        torch.testing.assert_close(velocity(network), expected, rtol=1e-5, atol=1e-5)
    with attached.reference():
        assert torch.equal(velocity(plain.transformer), base)


def test_attached_differences_are_switched_off_with_the_adapters(tmp_path):
    made = Made(IN_BLOCKS)
    tensors = made.tensors(IN_BLOCKS, "diffusion_model.{}.{}.weight", down="lora_down", up="lora_up")
    tensors |= {f"diffusion_model.{key}": draw(*shapes()[name]) for name, key in DIFFERENCES.items()}
    save_file(tensors, tmp_path / "lora.safetensors")
    (lora,) = lora_formats.read(tmp_path / "lora.safetensors").networks.values()
    architecture = find_architecture(BackboneConfig(architecture="tiny"))
    plain, merged = (random_transformer(architecture, device="cpu", seed=0, dtype=torch.float32) for _ in range(2))
    merged.load_state_dict({name: lora.add(name, weight) for name, weight in merged.state_dict().items()})
    base = velocity(plain)
    attached = AttachedLoras({"transformer": plain}, {"transformer": lora}, source="it")
    torch.testing.assert_close(velocity(plain), velocity(merged), rtol=1e-5, atol=1e-5)
    with attached.reference():
        assert torch.equal(velocity(plain), base)
    torch.testing.assert_close(velocity(plain), velocity(merged), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(velocity(plain), base, atol=0.01)


def test_streamed_blocks_take_loras_under_and_on_them(tmp_path, tiny_pipeline):
    """Their parameters hold other blocks' numbers in between."""
    made = Made(IN_BLOCKS)
    tensors = made.tensors(IN_BLOCKS, "diffusion_model.{}.{}.weight", down="lora_down", up="lora_up")
    tensors |= {f"diffusion_model.{key}": draw(*shapes()[name]) for name, key in DIFFERENCES.items()}
    save_file(tensors, tmp_path / "lora.safetensors")
    (lora,) = lora_formats.read(tmp_path / "lora.safetensors").networks.values()
    under = [BaseLora(str(tmp_path / "lora.safetensors"))]
    found = {}
    for stream in (False, True):
        config = BackboneConfig(path=str(tiny_pipeline), dtype="float32", stream=stream)
        plain = load_backbone(config, "cpu", parts=("transformer",))
        base = velocity(plain.transformer)
        attached = AttachedLoras(plain.experts, {"transformer": lora}, source="it")
        tuned = velocity(plain.transformer)
        with attached.reference():
            assert torch.equal(velocity(plain.transformer), base)
        assert torch.equal(velocity(plain.transformer), tuned)
        merged = load_backbone(replace(config, loras=under), "cpu", parts=("transformer",))
        torch.testing.assert_close(velocity(merged.transformer), tuned, rtol=1e-5, atol=1e-5)
        found[stream] = (base, tuned, velocity(merged.transformer))
    assert all(map(torch.equal, found[False], found[True]))


# Which network


def test_a_file_of_both_experts_is_read_as_two(tmp_path):
    made = {name: Made(["blocks.0.attn1.to_q"]) for name in ("transformer", "transformer_2")}
    tensors = {}
    for name, one in made.items():
        tensors |= one.tensors(
            {"blocks.0.attn1.to_q": f"{name}.blocks.0.attn1.to_q"}, "{}.{}.weight", down="lora_A", up="lora_B"
        )
    metadata = {"fingerprint": "f", "expert": "both"}
    save_file(tensors, tmp_path / "both.safetensors", metadata=metadata)
    file = lora_formats.read(tmp_path / "both.safetensors")
    found = file.by_expert(["high_noise", "low_noise"], source="x")
    for expert, one in zip(("high_noise", "low_noise"), made.values(), strict=True):
        weight = torch.zeros(shapes()["blocks.0.attn1.to_q.weight"])
        scaled = {layer: one.up[layer] @ one.down[layer] for layer in one.up}
        torch.testing.assert_close(
            found[expert].add("blocks.0.attn1.to_q.weight", weight), scaled["blocks.0.attn1.to_q"]
        )
    for experts, expert in ((["transformer"], ""), (["high_noise", "low_noise"], "high_noise")):
        with pytest.raises(ValueError, match="x is for both experts, high_noise and low_noise: give it alone"):
            file.by_expert(experts, expert=expert, source="x")


EXPERTS = ["high_noise", "low_noise"]
SAYS = {
    "nobody says": (
        "",
        EXPERTS,
        "",
        r"does not say which of high_noise, low_noise it is for: name it, as in 'k=\{high_",
    ),
    "one network": ("", ["transformer"], "", "transformer"),
    "the key says": ("", EXPERTS, "low_noise", "low_noise"),
    "the file says": ("low_noise", EXPERTS, "", "low_noise"),
    "both say the same": ("low_noise", EXPERTS, "low_noise", "low_noise"),
    "they differ": (
        "high_noise",
        EXPERTS,
        "low_noise",
        "for the expert low_noise, but the file says that it is for high_",
    ),
    "no such expert": ("", EXPERTS, "middle", "is given for the network 'middle', this backbone has: high_noise, low_"),
    "of another backbone": (
        "high_noise",
        ["transformer"],
        "",
        "for the network 'high_noise', this backbone has: transf",
    ),
}


@pytest.mark.parametrize("case", SAYS)
def test_the_network_is_what_file_and_key_say(tmp_path, case):
    says, experts, expert, wanted = SAYS[case]
    made = Made(["blocks.0.attn1.to_q"])
    tensors = made.tensors({"blocks.0.attn1.to_q": "blocks.0.self_attn.q"}, "{}.{}.weight", down="lora_A", up="lora_B")
    save_file(tensors, tmp_path / "l.safetensors", metadata={"expert": says} if says else None)
    file = lora_formats.read(tmp_path / "l.safetensors")
    source = f"k={tmp_path / 'l.safetensors'}"
    if wanted in [*EXPERTS, "transformer"]:
        assert list(file.by_expert(experts, expert=expert, source=source)) == [wanted]
    else:
        with pytest.raises(ValueError, match=wanted):
            file.by_expert(experts, expert=expert, source=source)


# What is refused

Q = "diffusion_model.blocks.0.self_attn.q"
A, B = f"{Q}.lora_A.weight", f"{Q}.lora_B.weight"
BAD = {
    "half a pair": ({A: (4, 128)}, r"has .*q\.lora_A\.weight without its B \(up\): the file is not whole"),
    "the other half": ({B: (128, 4)}, r"has .*q\.lora_B\.weight without its A \(down\)"),
    "ranks differ": ({A: (4, 128), B: (128, 3)}, r"attn1\.to_q has A \(4, 128\) and B \(128, 3\), whose ranks differ"),
    "alpha alone": ({f"{Q}.alpha": ()}, r"has .*q\.alpha without its A \(down\)"),
    "DoRA": (
        {A: (4, 8), B: (8, 4), f"{Q}.dora_scale": (8,)},
        r"keys that nothing here reads \(.*q\.dora_scale\): LoRAs",
    ),
    "LoKr": ({f"{Q}.lokr_w{n}": (4, 4) for n in range(5)}, r"\(.*lokr_w0, .*lokr_w1, .*lokr_w2 and 2 more\)"),
    "a text encoder": ({"lora_te_layers_0.lora_down.weight": (4, 4)}, r"reads \(lora_te_layers_0"),
    "another network": ({"lora_unet_down_blocks_0.lora_down.weight": (4, 4)}, r"reads \(lora_unet_down_blocks_0"),
    "two adapters of one layer": ({f"{Q}.lora_A.{n}.weight": (4, 8) for n in "ab"}, r"reads \(.*lora_A\.b\.weight\)"),
    "nothing": ({}, "holds no tensors"),
    "one network with its prefix and without": (
        {f"{prefix}{A[16:]}": (4, 8) for prefix in ("transformer.", "")}
        | {f"{prefix}{B[16:]}": (8, 4) for prefix in ("transformer.", "")},
        r"has keys of no network and transformer\.: a file of one network has one of these, of two transformer\. and",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_no_whole_lora_is_one_line(tmp_path, case):
    tensors, message = BAD[case]
    save_file({key: torch.ones(shape) for key, shape in tensors.items()}, tmp_path / "lora.safetensors")
    with pytest.raises(ValueError, match=message) as caught:
        lora_formats.read(tmp_path / "lora.safetensors")
    assert "\n" not in str(caught.value) and str(tmp_path / "lora.safetensors") in str(caught.value)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (torch.ones(128, 4, dtype=torch.int8), r"lora_B\.weight is quantised \(torch.int8\): use the file in 16 bits"),
        (torch.full((128, 4), math.nan), r"lora_B\.weight is not finite: the file is damaged, use another one"),
    ],
)
def test_what_is_no_finite_float_is_named_while_a_base_is_read(tmp_path, tiny_pipeline, value, message):
    save_file({A: torch.ones(4, 128), B: value}, tmp_path / "lora.safetensors")
    config = BackboneConfig(path=str(tiny_pipeline), loras=[BaseLora(str(tmp_path / "lora.safetensors"))])
    with pytest.raises(ValueError, match=rf"^LoRA {tmp_path}/lora.safetensors: .*{message}"):
        load_backbone(config, "cpu", parts=("transformer",))
    (lora,) = lora_formats.read(tmp_path / "lora.safetensors").networks.values()
    with pytest.raises(ValueError, match=message):
        lora.matrices("blocks.0.attn1.to_q")


def test_what_does_not_fit_the_network_is_named_key_by_key(tmp_path):
    tensors = {}
    for layer in (*(f"blocks.{number}.self_attn.q" for number in range(8)), "blocks.0.self_attn.norm_q"):
        tensors |= {f"{layer}.lora_A.weight": torch.ones(4, 64), f"{layer}.lora_B.weight": torch.ones(128, 4)}
    tensors |= {"blocks.0.ffn.0.diff_b": torch.ones(3), "img_emb.proj.1.diff_b": torch.ones(4)}
    save_file(tensors, tmp_path / "lora.safetensors")
    (lora,) = lora_formats.read(tmp_path / "lora.safetensors").networks.values()
    first = (
        r"blocks\.0\.attn1\.norm_q, which is no layer there, blocks\.0\.attn1\.to_q \(A \(4, 64\), B \(128, 4\)\) for"
    )
    with pytest.raises(ValueError, match=rf"k=x does not fit this network in 11 of 11 entries: {first}.* and 8 more"):
        lora.check(shapes(), source="k=x")


def test_a_lora_of_another_base_is_refused_and_one_of_no_base_is_not(tmp_path, ours, tiny_pipeline):
    made = Made(["blocks.0.attn1.to_q"])
    tensors = made.tensors({"blocks.0.attn1.to_q": "blocks.0.self_attn.q"}, "{}.{}.weight", down="lora_A", up="lora_B")
    save_file(tensors, tmp_path / "other.safetensors", metadata={"fingerprint": "wan21-0123456789ab"})

    def load(*loras):
        return load_backbone(BackboneConfig(path=str(tiny_pipeline), loras=list(loras)), "cpu", parts=())

    with pytest.raises(
        ValueError, match=r"backbone.loras=.*other.safetensors was trained on backbone wan21-0123456789ab"
    ):
        load(BaseLora(str(tmp_path / "other.safetensors")))
    with pytest.raises(ValueError, match="backbone.loras=/nowhere: LoRA /nowhere does not exist"):
        load(BaseLora("/nowhere"))
    with pytest.raises(ValueError, match=r"backbone.loras has an entry without a path: .*'\[\{path: lora"):
        load(BaseLora())
    with pytest.raises(ValueError, match="weight=nan is no finite number"):
        load(BaseLora(str(ours[0]), weight=math.nan))
    with pytest.raises(ValueError, match="stands there twice: give it once, with the sum of its weights"):
        load(BaseLora(str(ours[0])), BaseLora(str(ours[0]), weight=0.5))
    export.main([str(ours[0]), str(tmp_path / "exported")])
    with pytest.raises(ValueError, match="exported stands there twice"):
        load(BaseLora(str(ours[0])), BaseLora(str(tmp_path / "exported")))
    save_file(tensors, tmp_path / "any.safetensors")
    first, second = BaseLora(str(ours[0])), BaseLora(str(tmp_path / "any.safetensors"), weight=0.5)
    both, one = load(first, second), load(first)
    assert both.fingerprints[0] == one.fingerprints[0] == ours[1] and both.fingerprints[1] == one.fingerprint
    assert (
        len({both.fingerprint, one.fingerprint, load(second, first).fingerprint, load(second).fingerprint, ours[1]})
        == 5
    )
    assert both.encoders == one.encoders == load().encoders and load().fingerprints == (ours[1],)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merged_weights_are_rounded_once(tmp_path, ours, tiny_pipeline, dtype):
    """Two LoRAs, one at half its weight, in each dtype; what neither changes stays as it was."""
    made = Made(["blocks.0.attn1.to_q", "blocks.2.ffn.net.0.proj"])
    names = {layer: IN_BLOCKS[layer] for layer in made.down}
    tensors = made.tensors(names, "{}.{}.weight", down="lora_A", up="lora_B", alpha="{}.alpha")
    save_file(tensors, tmp_path / "any.safetensors")
    loras = [BaseLora(str(ours[0])), BaseLora(str(tmp_path / "any.safetensors"), weight=0.5)]
    config = BackboneConfig(path=str(tiny_pipeline), dtype=str(dtype).removeprefix("torch."), loras=loras)
    found = load_backbone(config, "cpu", parts=("transformer",)).transformer
    base = WanTransformer3DModel.from_pretrained(tiny_pipeline / "transformer").state_dict()
    for name, weight in found.state_dict().items():
        expected = base[name]
        for delta, strength in ((ours[2], 1.0), (made.delta, 0.5)):
            expected = expected + strength * delta[name] if name in delta else expected
        close = {"rtol": 0, "atol": 1e-6} if weight.dtype == torch.float32 else {"rtol": 2**-8, "atol": 0}
        torch.testing.assert_close(weight.float(), expected, **close)
        if name not in ours[2] and name not in made.delta:
            assert torch.equal(weight, base[name].to(weight.dtype))


# Exports of another tool's LoRA


@pytest.mark.parametrize("to", ["diffusers", "comfyui", "merged"])
def test_any_file_is_exported_with_its_difference(tmp_path, tiny_pipeline, to, capsys):
    """Ranks and alphas differ by layer."""
    made, source = Made(IN_BLOCKS), tmp_path / "musubi.safetensors"
    key = {"key": "lora_unet_{}.{}.weight", "down": "lora_down", "up": "lora_up", "alpha": "lora_unet_{}.alpha"}
    save_file(made.tensors(flat(IN_BLOCKS), **key), source)
    target = tmp_path / ("merged" if to == "merged" else "out.safetensors")
    more = ["--base", str(tiny_pipeline), "--dtype", "float32"] if to == "merged" else []
    export.main([str(source), str(target), "--to", to, *more])
    assert capsys.readouterr().out == f"wrote {target}\n"
    if to == "merged":
        base = WanTransformer3DModel.from_pretrained(tiny_pipeline / "transformer").state_dict()
        for name, weight in WanTransformer3DModel.from_pretrained(target).state_dict().items():
            delta = made.delta.get(name, torch.zeros_like(weight))
            torch.testing.assert_close(weight - base[name], delta, rtol=0, atol=1e-6)
    else:
        assert_gives(target, made.delta)


def test_exports_say_the_expert_that_is_given_and_refuse_whole_differences(tmp_path, capsys):
    made, source = Made(["blocks.0.attn1.to_q"]), tmp_path / "lora.safetensors"
    tensors = made.tensors({"blocks.0.attn1.to_q": "blocks.0.self_attn.q"}, "{}.{}.weight", down="lora_A", up="lora_B")
    save_file(tensors, source)
    export.main([str(source), str(tmp_path / "out.safetensors"), "--expert", "low_noise"])
    assert capsys.readouterr().out.endswith("out.safetensors, for the low_noise expert\n")
    assert lora_formats.read(tmp_path / "out.safetensors").expert == "low_noise"
    save_file(tensors | {"blocks.0.norm3.diff": torch.ones(128)}, source)
    with pytest.raises(ValueError, match="holds full differences, which no export has: use it as backbone.loras"):
        export.main([str(source), str(tmp_path / "other.safetensors")])
    convolution = {"lora_A": torch.ones(4, 16, 1, 2, 2), "lora_B": torch.ones(128, 4, 1, 1, 1)}
    save_file({f"patch_embedding.{side}.weight": value for side, value in convolution.items()}, source)
    with pytest.raises(
        ValueError, match="holds a convolution's adapter, which no export has: use it as backbone.loras"
    ):
        export.main([str(source), str(tmp_path / "other.safetensors")])


def test_a_pair_is_exported_as_one_lora_of_both(tmp_path, capsys):
    """Of other layers and ranks each; what a file says of its expert and its backbone is held against its place."""
    layers, paths = ("blocks.0.attn1.to_q", "blocks.1.attn1.to_k"), []
    for name, layer, rank in zip(EXPERTS, layers, (3, 5), strict=True):
        tensors = {f"{layer}.lora_A.weight": draw(rank, 64), f"{layer}.lora_B.weight": draw(64, rank)}
        save_file(tensors, path := tmp_path / f"{name}.safetensors", metadata={"expert": name})
        paths.append(str(path))
    export.main([paths[0], str(tmp_path / "both.safetensors"), "--low-noise", paths[1]])
    assert capsys.readouterr().out.endswith("both.safetensors, for both experts\n")
    found = lora_formats.read(tmp_path / "both.safetensors").by_expert(EXPERTS, source="k")
    for name, layer, path in zip(EXPERTS, layers, paths, strict=True):
        (lora,) = lora_formats.read(path).networks.values()
        (down, up), (own_down, own_up) = found[name].matrices(layer), lora.matrices(layer)
        torch.testing.assert_close(up @ down, own_up @ own_down, rtol=0, atol=1e-6)
        assert [*found[name].pairs] == [layer]
    with pytest.raises(ValueError, match="is given for the expert high_noise, but the file says that it is for low"):
        export.main([paths[1], str(tmp_path / "x.safetensors"), "--low-noise", paths[0]])
    save_file(tensors, paths[1], metadata={"fingerprint": "wan22_t2v-0123456789ab"})
    with pytest.raises(ValueError, match=r"backbone \(unknown\), .* on wan22_t2v-0123456789ab: export each alone"):
        export.main([paths[0], str(tmp_path / "x.safetensors"), "--low-noise", paths[1]])


def test_keys_of_the_second_network_say_the_expert_of_an_export(tmp_path, capsys):
    made = Made(["blocks.0.attn1.to_q"], alpha=MISSING)
    names = {"blocks.0.attn1.to_q": "transformer_2.blocks.0.attn1.to_q"}
    save_file(made.tensors(names, "{}.{}.weight", down="lora_A", up="lora_B"), tmp_path / "l.safetensors")
    export.main([str(tmp_path / "l.safetensors"), str(tmp_path / "out.safetensors")])
    assert capsys.readouterr().out.endswith("out.safetensors, for the low_noise expert\n")
    assert_gives(tmp_path / "out.safetensors", made.delta, experts=EXPERTS, expert="low_noise")


def test_an_export_of_ours_says_for_itself_which_expert_it_is_for(tmp_path, ours):
    with pytest.raises(ValueError, match="--expert=low_noise: LoRA .* says that it is for transformer; leave it out"):
        export.main([str(ours[0]), str(tmp_path / "out.safetensors"), "--expert", "low_noise"])


def test_a_lora_of_two_networks_is_merged_layer_by_layer_and_none_into_a_guess(tmp_path):
    """Ranks and layers differ between the two; each ends up in its own."""
    pipeline = write_tiny_pipeline("wan22_t2v", tmp_path / "model")
    tensors = {
        "transformer.blocks.0.attn1.to_q.lora_A.weight": draw(3, 64),
        "transformer.blocks.0.attn1.to_q.lora_B.weight": draw(64, 3),
        "transformer_2.blocks.1.ffn.net.2.lora_A.weight": draw(5, 256),
        "transformer_2.blocks.1.ffn.net.2.lora_B.weight": draw(64, 5),
    }
    source, target = tmp_path / "both.safetensors", tmp_path / "out"
    save_file(tensors, source)
    merge = ["--to", "merged", "--base", str(pipeline), "--dtype", "float32"]
    export.main([str(source), str(target), *merge])
    for folder in ("transformer", "transformer_2"):
        base = WanTransformer3DModel.from_pretrained(pipeline / folder).state_dict()
        found = WanTransformer3DModel.from_pretrained(target / folder).state_dict()
        (key,) = {key.rpartition(".lora_")[0] for key in tensors if key.startswith(f"{folder}.")}
        expected = tensors[f"{key}.lora_B.weight"] @ tensors[f"{key}.lora_A.weight"]
        changed = [name for name in base if not torch.equal(found[name], base[name])]
        assert changed == [f"{key.removeprefix(f'{folder}.')}.weight"]
        torch.testing.assert_close(found[changed[0]] - base[changed[0]], expected, rtol=0, atol=1e-5)
    save_file({key.removeprefix("transformer."): tensors[key] for key in list(tensors)[:2]}, source)
    with pytest.raises(
        ValueError, match=f"^LoRA {source} does not say which network of .*: say --expert high_noise or"
    ):
        export.main([str(source), str(target / "one"), *merge])
    save_file(
        {"blocks.0.attn1.to_q.lora_A.weight": draw(3, 8), "blocks.0.attn1.to_q.lora_B.weight": draw(64, 3)}, source
    )
    with pytest.raises(ValueError, match=f"^LoRA {source} does not fit this network in 1 of 1 entries: blocks"):
        export.main([str(source), str(target / "one"), *merge, "--expert", "low_noise"])
    assert not (target / "one").exists()
