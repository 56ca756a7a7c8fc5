"""Loading: folders, errors, fingerprints, random weights, sizes without weights, tiny pipelines and their tokenizer."""

import dataclasses
import itertools
import json
import shutil

import pytest
import torch
from diffusers import AutoencoderKLWan, DiffusionPipeline, WanTransformer3DModel
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, UMT5EncoderModel

from train.backbones import ARCHITECTURES, BACKBONES, find_architecture, load_backbone, loading
from train.backbones.architecture import parameter_count
from train.backbones.base import BackboneConfig
from train.backbones.loading import random_transformer
from train.backbones.tiny import write_tiny_pipeline
from train.backbones.tokenizer import WORDS
from train.backbones.wan import WAN, WanBackbone, text_config


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {family: write_tiny_pipeline(family, tmp_path_factory.mktemp(family)) for family in BACKBONES}


@pytest.fixture
def copy(folders, tmp_path):
    """A copy of a family's tiny pipeline that a test may damage."""
    return lambda family="wan21": shutil.copytree(folders[family], tmp_path / family)


def edit_json(file, **changes):
    file.write_text(json.dumps({**json.loads(file.read_text(encoding="utf-8")), **changes}), encoding="utf-8")


@pytest.mark.parametrize("family", BACKBONES)
def test_tiny_pipeline_loads_here_and_in_diffusers(folders, family):
    guardrail = {"safety_checker": lambda: None} if family == "cosmos25" else {}  # NVIDIA's is a package of its own
    pipeline = DiffusionPipeline.from_pretrained(folders[family], **guardrail)
    state = torch.get_rng_state()
    backbone = load_backbone(BackboneConfig(family, str(folders[family]), dtype="float32"), "cpu")
    assert torch.equal(torch.get_rng_state(), state)
    assert list(backbone.experts) == list(BACKBONES[family].expert_folders)
    for part, name in [*BACKBONES[family].expert_folders.items(), ("vae", "vae"), ("text_encoder", "text_encoder")]:
        ours = backbone.experts.get(part) or getattr(backbone, part)
        assert not ours.training and not any(parameter.requires_grad for parameter in ours.parameters())
        theirs = getattr(pipeline, name).state_dict()
        assert theirs.keys() == ours.state_dict().keys()
        assert all(torch.equal(value, theirs[key]) for key, value in ours.state_dict().items())
    assert backbone.architecture["transformer"]["in_channels"] == backbone.transformer.config.in_channels
    tiny = ARCHITECTURES[family]["tiny"]
    assert parameter_count(tiny) == sum(parameter.numel() for parameter in backbone.transformer.parameters())
    vae = backbone.vae.config
    assert backbone.latent_shape(64, 64, 9)[0] == tiny["z_dim"] == vae.get("z_dim", vae.get("latent_channels"))
    most = (
        25e6 if family.startswith("hunyuan15") else 10e6
    )  # one of its layers has 2048 x 2048 weights, whatever the config
    assert sum(file.stat().st_size for file in folders[family].rglob("*")) < most


def test_dtypes_are_those_of_from_pretrained(folders):
    backbone = load_backbone(BackboneConfig(path=str(folders["wan21"])), "cpu")
    dtypes = {name: parameter.dtype for name, parameter in backbone.transformer.named_parameters()}
    assert dtypes["blocks.0.attn1.to_q.weight"] == torch.bfloat16
    assert dtypes["blocks.0.scale_shift_table"] == dtypes["blocks.0.norm2.weight"] == torch.float32
    assert backbone.text_encoder.dtype == torch.bfloat16
    assert {parameter.dtype for parameter in backbone.vae.parameters()} == {torch.float32}

    drawn = random_transformer(ARCHITECTURES["wan21"]["tiny"], device="cpu", dtype=torch.bfloat16, seed=0)
    assert dtypes == {name: parameter.dtype for name, parameter in drawn.named_parameters()}
    loaded_buffers = dict(backbone.transformer.named_buffers())
    for name, buffer in drawn.named_buffers():
        assert buffer.dtype == torch.float32
        assert torch.equal(buffer, loaded_buffers[name])


def test_tiny_pipelines_are_seeded(folders, tmp_path):
    torch.manual_seed(5)
    state = torch.get_rng_state()
    again, other = (
        write_tiny_pipeline("wan22_t2v", tmp_path / "a"),
        write_tiny_pipeline("wan22_t2v", tmp_path / "b", seed=1),
    )
    assert torch.equal(torch.get_rng_state(), state)
    names = [loading.fingerprint("wan22_t2v", folder) for folder in (folders["wan22_t2v"], again, other)]
    assert names[0] == names[1] != names[2]
    with pytest.raises(ValueError, match="family='wan23' is unknown"):
        write_tiny_pipeline("wan23", tmp_path / "c")


def test_tokenizer_reads_any_text(folders):
    tokenizer = AutoTokenizer.from_pretrained(folders["wan21"] / "tokenizer")
    for text in ("a red ball", "zwölf Bälle 球 🎾 \u202e x\u0301", "<pad></s>?", "unheard-of words\tand tabs"):
        ids = tokenizer(text).input_ids
        assert ids[-1] == tokenizer.eos_token_id == 1
        if "<" not in text:
            assert tokenizer.decode(ids, skip_special_tokens=True).strip() == text
    assert len(tokenizer("a red ball falls").input_ids) == 5
    assert all(len(tokenizer(word).input_ids) == 2 for word in WORDS.split())
    padded = tokenizer(["ball", ""], padding="max_length", max_length=4, return_tensors="pt")
    assert tokenizer.pad_token_id == 0 and padded.input_ids[1].tolist() == [1, 0, 0, 0]
    assert padded.attention_mask.tolist() == [[1, 1, 0, 0], [1, 0, 0, 0]]
    assert (
        max(tokenizer.get_vocab().values())
        < load_backbone(
            BackboneConfig(path=str(folders["wan21"])), "cpu", parts=("text",)
        ).text_encoder.config.vocab_size
    )


def test_fingerprint_follows_the_weights(folders, copy):
    def fingerprint(folder, **changes):
        config = BackboneConfig("wan21", str(folder), **changes)
        return load_backbone(config, "cpu", parts=("expert",)).fingerprint

    original = fingerprint(folders["wan21"])
    family, digits = original.split("-")
    assert family == "wan21" and len(digits) == 12 and int(digits, 16) >= 0
    folder = copy()
    assert fingerprint(folder) == fingerprint(folder, dtype="float32") == original  # no path, no dtype in it
    assert load_backbone(BackboneConfig("wan21", str(folder)), "cpu", parts=("vae", "text")).fingerprint == original

    edit_json(folder / "vae" / "config.json", _diffusers_version="9.9")
    assert fingerprint(folder) == original
    edit_json(folder / "vae" / "config.json", latents_mean=[0.5] * 16)
    assert fingerprint(folder) != original

    shutil.copy(folders["wan21"] / "vae" / "config.json", folder / "vae" / "config.json")
    assert fingerprint(folder) == original
    weights = folder / "text_encoder" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert fingerprint(folder) != original


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"path": ""}, "backbone.path is empty"),
        ({"path": "/nowhere/at all"}, "is no folder: give an existing one or a hub id"),
        ({"family": "wan3"}, "backbone.family='wan3' is unknown: use one of wan21"),
        ({"dtype": "float16"}, "backbone.dtype='float16' is unknown: use one of bfloat16, float32, float8"),
        (
            {"random_weights": True, "architecture": "70B"},
            "backbone.architecture='70B' is unknown: use one of tiny, 1.3B",
        ),
        (
            {"family": "wan22_t2v", "expert": "middle"},
            "backbone.expert='middle' is unknown: use one of high_noise, low_noise",
        ),
    ],
)
def test_unknown_values_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        load_backbone(BackboneConfig(**changes), "cpu", parts=("transformer",))


@pytest.mark.parametrize(("given", "wanted"), itertools.permutations(BACKBONES, 2))
def test_a_pipeline_of_another_family_is_named(folders, given, wanted):
    config = BackboneConfig(wanted, str(folders[given]), expert="low_noise")
    with pytest.raises(ValueError, match=f"backbone.family={wanted} does not fit .*; set backbone.family={given}"):
        load_backbone(config, "cpu", parts=("transformer",))


def test_mixed_pipelines_are_refused(folders, copy):
    folder = copy("wan22_ti2v")
    shutil.rmtree(folder / "transformer")
    shutil.copytree(folders["wan21"] / "transformer", folder / "transformer")
    with pytest.raises(ValueError, match="in_channels=16, but beside a VAE of z_dim=12 needs 12"):
        load_backbone(BackboneConfig("wan22_ti2v", str(folder)), "cpu")

    edit_json(folder / "text_encoder" / "config.json", d_model=32)
    shutil.rmtree(folder / "transformer")
    shutil.copytree(folders["wan22_ti2v"] / "transformer", folder / "transformer")
    with pytest.raises(ValueError, match="text encoder has width 32, but the transformer reads 64"):
        load_backbone(BackboneConfig("wan22_ti2v", str(folder)), "cpu")

    edit_json(folder / "model_index.json", _class_name="FluxPipeline")
    with pytest.raises(ValueError, match="holds a FluxPipeline"):
        load_backbone(BackboneConfig("wan22_ti2v", str(folder)), "cpu")


def test_incomplete_folders_are_refused(copy, tmp_path):
    folder = copy("wan22_t2v")
    config = BackboneConfig("wan22_t2v", str(folder))
    edit_json(folder / "model_index.json", boundary_ratio=None)
    with pytest.raises(ValueError, match="no boundary_ratio"):
        load_backbone(config, "cpu")
    edit_json(folder / "model_index.json", boundary_ratio=0.8)
    assert load_backbone(config, "cpu", parts=()).boundary == 0.8

    shutil.rmtree(folder / "transformer_2")
    with pytest.raises(ValueError, match="lacks the component transformer_2"):
        load_backbone(config, "cpu")
    assert list(load_backbone(config, "cpu", parts=("expert",)).experts) == ["high_noise"]
    (folder / "vae" / "diffusion_pytorch_model.safetensors").rename(folder / "vae" / "diffusion_pytorch_model.bin")
    with pytest.raises(ValueError, match="no safetensors weights for the component vae"):
        load_backbone(config, "cpu", parts=("vae",))
    shutil.rmtree(folder / "tokenizer")
    with pytest.raises(ValueError, match="lacks the component tokenizer"):
        load_backbone(config, "cpu", parts=("text",))
    (folder / "vae" / "config.json").write_text("{", encoding="utf-8")
    with pytest.raises(ValueError, match="vae/config.json is damaged"):
        load_backbone(config, "cpu", parts=("expert",))
    (folder / "model_index.json").unlink()
    with pytest.raises(ValueError, match="no diffusers pipeline"):
        load_backbone(config, "cpu")


@pytest.mark.parametrize("name", ["transformer", "vae", "text_encoder"])
def test_damaged_weights_are_refused(copy, name):
    folder = copy()
    (weights,) = (folder / name).glob("*.safetensors")
    tensors = load_file(weights)
    dropped = sorted(key for key in tensors if key.endswith("norm.weight") or key.endswith("bias"))[-1]
    save_file({key: value for key, value in tensors.items() if key != dropped}, weights, metadata={"format": "pt"})
    config = BackboneConfig(path=str(folder))
    with pytest.raises(ValueError, match=f"the component {name} .* download it again"):
        load_backbone(config, "cpu")
    weights.write_bytes(weights.read_bytes()[:5000])
    with pytest.raises(ValueError, match=f"the component {name} cannot be loaded; if its weights are damaged"):
        load_backbone(config, "cpu")


@pytest.mark.parametrize("name", ["transformer", "vae", "text_encoder"])
def test_weights_that_the_model_does_not_know_are_refused_by_name(copy, name):
    folder = copy()
    (weights,) = (folder / name).glob("*.safetensors")
    more = {f"block.{n}.weight_extra": torch.zeros(2) for n in range(5)}
    save_file(load_file(weights) | more, weights, metadata={"format": "pt"})
    message = r"the component \w+ has weights that the model does not know \(block.0.* and 2 more\)"
    with pytest.raises(ValueError, match=message):
        load_backbone(BackboneConfig(path=str(folder)), "cpu")


@pytest.mark.parametrize("scaled", [True, False])
@pytest.mark.parametrize("name", ["transformer", "text_encoder"])
def test_weights_in_8_bits_are_refused(copy, name, scaled):
    folder = copy()
    (weights,) = (folder / name).glob("*.safetensors")
    tensors = load_file(weights)
    key = next(key for key, value in tensors.items() if value.dim() == 2)
    if scaled:
        tensors[f"{key}_scale"] = tensors[key].abs().max() / 448
        tensors[key] = tensors[key] / tensors[f"{key}_scale"]
    tensors[key] = tensors[key].to(torch.float8_e4m3fn)
    save_file(tensors, weights, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=rf"the component {name} is quantised \({key} is stored as F8_E4M3\)"):
        load_backbone(BackboneConfig(path=str(folder)), "cpu")


@pytest.mark.parametrize("name", ["transformer", "text_encoder"])
def test_a_quantised_config_is_refused(copy, name):
    folder = copy()
    edit_json(folder / name / "config.json", quantization_config={"quant_method": "modelopt", "quant_algo": "FP8"})
    with pytest.raises(ValueError, match=f"{name} is quantised .its config.json has a quantization_config.*bfloat16"):
        load_backbone(BackboneConfig(path=str(folder)), "cpu")


def test_shards_are_those_of_the_index(folders, copy):
    folder = copy()
    (weights,) = (folder / "transformer").glob("*.safetensors")
    tensors = load_file(weights)
    names = [f"diffusion_pytorch_model-0000{n}-of-00002.safetensors" for n in (1, 2)]
    shards = {key: names[index % 2] for index, key in enumerate(tensors)}
    for name in names:
        save_file({key: tensors[key] for key in tensors if shards[key] == name}, folder / "transformer" / name)
    weights.unlink()
    weights.write_bytes(b"of another time")
    index = folder / "transformer" / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": shards}), encoding="utf-8")
    loaded = load_backbone(BackboneConfig(path=str(folder), dtype="float32"), "cpu", parts=("transformer",))
    assert all(torch.equal(value, tensors[key]) for key, value in loaded.transformer.state_dict().items())
    (folder / "transformer" / names[1]).unlink()
    with pytest.raises(ValueError, match=f"transformer cannot be loaded.*download it again.*{names[1]}"):
        load_backbone(BackboneConfig(path=str(folder)), "cpu", parts=("transformer",))


def test_the_tiny_text_encoder_is_stored_as_wans(folders):
    (weights,) = (folders["wan21"] / "text_encoder").glob("*.safetensors")
    config = json.loads((folders["wan21"] / "text_encoder" / "config.json").read_text(encoding="utf-8"))
    assert config["tie_word_embeddings"] is False
    assert "shared.weight" in load_file(weights) and "encoder.embed_tokens.weight" not in load_file(weights)


@pytest.fixture
def hub(folders, copy, tmp_path, monkeypatch):
    """The hub: some/wan is there but for revision v0, some/original has no model_index.json; lists what is fetched."""
    (tmp_path / "original").mkdir()
    quantised = copy("wan22_ti2v")
    edit_json(quantised / "transformer" / "config.json", quantization_config={"quant_method": "modelopt"})
    there = {"some/wan": folders["wan21"], "some/original": tmp_path / "original", "some/quantised": quantised}
    asked = []

    def fetch(repository, *, revision, allow_patterns):
        asked.append((repository, revision, "weights" if "*.safetensors" in allow_patterns else "configs"))
        if repository not in there or revision == "v0":
            raise FileNotFoundError("no such repository")
        return str(there[repository])

    monkeypatch.setattr(loading, "snapshot_download", fetch)
    return asked


def test_hub_ids_are_resolved_once_and_at_their_revision(folders, hub):
    backbone = load_backbone(BackboneConfig(path="some/wan"), "cpu", parts=("vae",))
    assert hub == [("some/wan", None, "configs"), ("some/wan", None, "weights")]
    assert backbone.fingerprint == loading.fingerprint("wan21", folders["wan21"])
    with pytest.raises(ValueError, match="backbone.path='other/wan' .* cannot be downloaded .no such repository"):
        load_backbone(BackboneConfig(path="other/wan"), "cpu")
    hub.clear()
    load_backbone(BackboneConfig(path="some/wan", revision="a1b2"), "cpu", parts=())
    assert [revision for _, revision, _ in hub] == ["a1b2", "a1b2"]
    with pytest.raises(ValueError, match="'some/wan' .* cannot be downloaded at backbone.revision=v0 "):
        load_backbone(BackboneConfig(path="some/wan", revision="v0"), "cpu")
    with pytest.raises(ValueError, match="backbone.revision='v0' is for hub ids, but backbone.path=.* is a folder"):
        load_backbone(BackboneConfig(path=str(folders["wan21"]), revision="v0"), "cpu")


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("some/original", "'some/original' is no diffusers pipeline .*-Diffusers$"),
        ("some/quantised", "the component transformer is quantised .its config.json has a quantization_config"),
    ],
)
def test_what_cannot_be_read_is_refused_before_its_weights_are_fetched(hub, path, message):
    with pytest.raises(ValueError, match=message):
        load_backbone(BackboneConfig(path=path), "cpu")
    assert hub == [(path, None, "configs")]


def test_random_weights(folders):
    config = BackboneConfig("wan22_i2v", architecture="tiny", random_weights=True, dtype="float32", text_length=8)
    torch.manual_seed(5)
    state = torch.get_rng_state()
    backbone = load_backbone(config, "cpu", parts=("transformer",))
    assert torch.equal(torch.get_rng_state(), state)
    assert backbone.fingerprint == "wan22_i2v-random-tiny" and backbone.boundary == 0.9
    assert list(load_backbone(config, "cpu", parts=("expert",)).experts) == ["high_noise"]
    twin = load_backbone(config, "cpu", parts=("transformer",))
    for name, expert in backbone.experts.items():
        assert not expert.training and not any(parameter.requires_grad for parameter in expert.parameters())
        for key, value in expert.state_dict().items():
            assert torch.equal(value, twin.experts[name].state_dict()[key])
    high, low = backbone.experts.values()
    assert not torch.equal(high.proj_out.weight, low.proj_out.weight)
    whole, again = load_backbone(config, "cpu"), load_backbone(config, "cpu")
    assert torch.equal(torch.get_rng_state(), state)
    frames = torch.rand(1, 3, 5, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    latents, text = whole.encode_video(frames), whole.encode_text(["a ball"])
    assert torch.equal(latents, again.encode_video(frames)) and torch.equal(text, again.encode_text(["a ball"]))
    for made in (latents, text[:, :3], whole.decode_latents(latents)):
        assert made.isfinite().all() and made.std() > 0.1


def test_random_parts_have_the_real_sizes():
    """Parameters of the public checkpoints' VAEs and text encoder, in millions."""
    sizes = {"wan21": ("14B", 126.9), "wan22_ti2v": ("5B", 704.7)}
    for family, (name, millions) in sizes.items():
        architecture = ARCHITECTURES[family][name]
        with torch.device("meta"):
            vae = AutoencoderKLWan(**WanBackbone.vae_config(architecture))
            text = UMT5EncoderModel(text_config(architecture["transformer"]["text_dim"], 1))
        assert round(sum(value.numel() for value in vae.parameters()) / 1e6, 1) == millions
        assert round(sum(value.numel() for value in text.parameters()) / 1e6, 1) == 5680.9


def test_what_random_weights_refuse():
    config = BackboneConfig("wan22_i2v", architecture="tiny", random_weights=True, dtype="float32", text_length=8)
    with pytest.warns(UserWarning, match="backbone.path=some/wan is not read"):
        load_backbone(dataclasses.replace(config, path="some/wan"), "cpu", parts=("expert",))
    with pytest.raises(ValueError, match="backbone.parts='weights' is unknown"):
        load_backbone(config, "cpu", parts=("weights",))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_random_outputs_are_of_order_one(dtype):
    deep = {**ARCHITECTURES["wan21"]["tiny"]["transformer"], "num_layers": 40}
    network = random_transformer({"kind": WAN, "transformer": deep}, device="cpu", dtype=dtype, seed=0)
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(1, 16, 2, 8, 8, generator=generator, dtype=dtype)
    text = torch.randn(1, 8, 64, generator=generator, dtype=dtype)
    for t in (20.0, 500.0, 1000.0):
        velocity = network(latents, torch.tensor([t]), text, return_dict=False)[0].float()
        assert 0.3 < velocity.std() < 3 and velocity.isfinite().all()


@pytest.mark.parametrize(
    ("family", "name", "billions"),
    [("wan21", "1.3B", 1.4), ("wan21", "14B", 14.3), ("wan22_ti2v", "5B", 5.0), ("wan22_i2v", "A14B", 14.3)],
)
def test_sizes_without_weights(family, name, billions):
    torch.manual_seed(5)
    state = torch.get_rng_state()
    architecture = find_architecture(BackboneConfig(family, architecture=name))
    assert parameter_count(architecture) / 1e9 == pytest.approx(billions, rel=0.02)
    assert torch.equal(torch.get_rng_state(), state)
    # The facts of Wan's 14B are diffusers' own defaults, but for the text width.
    if name == "14B":
        with torch.device("meta"):
            default = WanTransformer3DModel(text_dim=4096)
        assert parameter_count(architecture) == sum(parameter.numel() for parameter in default.parameters())
