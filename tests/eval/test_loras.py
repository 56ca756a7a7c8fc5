"""LoRAs of any tool in evaluation: one, a pair for the two experts, and what is refused."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from eval import generate
from eval.loras import attach, read_lora
from eval.report import tables
from tests.eval.test_generate import arguments, backbone_config, manifest, write_lora
from train import checkpoint, export
from train.backbones import load_backbone
from train.backbones.base import BaseLora, Conditioning
from train.backbones.tiny import write_tiny_pipeline
from train.files import sha256

HIGH, LOW = 0.9, 0.4  # times of either expert


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    return write_tiny_pipeline("wan22_t2v", tmp_path_factory.mktemp("wan22_t2v"))


@pytest.fixture(scope="module")
def loras(pipeline, tmp_path_factory):
    """A ComfyUI file for each expert, which does not say for which, and the training folder that it was made from."""
    found = {}
    for expert in ("high_noise", "low_noise"):
        folder = tmp_path_factory.mktemp(expert)
        trained = write_lora(folder, pipeline, scale=0.3, family="wan22_t2v", expert=expert)
        file = export.to_comfyui(trained, folder / "comfy.safetensors")
        save_file(load_file(file), folder / "other.safetensors")
        found[expert] = folder / "other.safetensors"
    return found


def load(pipeline):
    return load_backbone(backbone_config(pipeline, "wan22_t2v"), "cpu", parts=("transformer",))


@torch.no_grad()
def velocities(backbone):
    """At a time of each expert."""
    latents = torch.randn(1, *backbone.latent_shape(32, 32, 5), generator=torch.Generator().manual_seed(1))
    text = torch.randn(1, 32, 64, generator=torch.Generator().manual_seed(2))
    return [backbone.velocity_at(latents, t, Conditioning(text)) for t in (HIGH, LOW)]


def test_each_of_a_pair_changes_its_own_time_range_alone(pipeline, loras):
    base, found = velocities(load(pipeline)), {}
    for names in (["high_noise"], ["low_noise"], ["high_noise", "low_noise"]):
        backbone = load(pipeline)
        lora = read_lora({name: str(loras[name]) for name in names}, backbone, key="run.lora")
        assert lora.expert == ", ".join(names) and lora.describe() == "rank 3"
        assert lora.sha256 == {name: sha256(loras[name]) for name in names}
        attached = attach(lora, backbone)
        tuned = velocities(backbone)
        assert [torch.equal(*pair) for pair in zip(tuned, base, strict=True)] == [
            "high_noise" not in names,
            "low_noise" not in names,
        ]
        with attached.reference():
            assert all(torch.equal(*pair) for pair in zip(velocities(backbone), base, strict=True))
        found[tuple(names)] = tuned
    both = found["high_noise", "low_noise"]
    assert torch.equal(both[0], found["high_noise",][0]) and torch.equal(both[1], found["low_noise",][1])


def test_a_foreign_file_gives_what_our_own_gives_bit_for_bit(pipeline, loras):
    found = []
    for value in (str(loras["low_noise"].parent), {"low_noise": str(loras["low_noise"])}):
        backbone = load(pipeline)
        attach(read_lora(value, backbone, key="run.lora"), backbone)
        found.append(velocities(backbone))
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


@pytest.mark.parametrize("form", ["{{high_noise: {0}, low_noise: {1}}}", None], ids=["mapping", "two keys"])
def test_the_command_line_takes_a_pair_and_clips_know_both_files(pipeline, loras, tmp_path, capsys, form):
    paths = [str(loras[name]) for name in ("high_noise", "low_noise")]
    given = [f"generate.lora.{name}={path}" for name, path in zip(loras, paths, strict=True)]
    given = [f"generate.lora={form.format(*paths)}"] if form else given
    args = arguments(pipeline, tmp_path, "backbone.family=wan22_t2v", *given, "generate.seeds=[0]", prompts=["a ball"])
    generate.main(args)
    _, tuned = manifest(tmp_path)
    assert tuned["lora_sha256"] == {name: sha256(path) for name, path in zip(loras, paths, strict=True)}
    assert tuned["lora"] == ", ".join(paths)
    assert "clips     2, of which 2 made now" in capsys.readouterr().out
    generate.main([*args, "--dry-run"])
    said = capsys.readouterr().out
    assert f"{paths[0]}, {paths[1]} (rank 3, for high_noise, low_noise)" in said and "2 done, 0 to do" in said


def test_what_does_not_suit_is_refused_before_weights_are_loaded(pipeline, loras, tmp_path):
    shell = load_backbone(backbone_config(pipeline, "wan22_t2v"), "cpu", parts=())
    high, trained = str(loras["high_noise"]), str(loras["high_noise"].parent)
    other = write_tiny_pipeline("wan22_t2v", tmp_path / "other", seed=3)
    stranger = load_backbone(backbone_config(other, "wan22_t2v"), "cpu", parts=())
    wrong = tmp_path / "wrong.safetensors"
    save_file({f"blocks.9.self_attn.q.lora_{side}.weight": torch.ones(4, 4) for side in "AB"}, wrong)
    cases = [
        (high, shell, "does not say which of high_noise, low_noise it is for: name it, as in 'k={high_noise: "),
        ({"middle": high}, shell, "is given for the network 'middle'"),
        (
            {"low_noise": trained},
            shell,
            "is given for the expert low_noise, but the file says that it is for high_noise",
        ),
        (trained, stranger, "was trained on backbone wan22_t2v-"),
        ({"high_noise": trained}, stranger, "was trained on backbone wan22_t2v-"),
        ({"high_noise": str(wrong)}, shell, "does not fit this network in 1 of 1 entries: blocks.9.attn1.to_q, which"),
        ({"high_noise": str(tmp_path / "none")}, shell, "does not exist"),
        ({"high_noise": high, "low_noise": ""}, shell, "k.low_noise='': give the path of a LoRA, or leave it out"),
        ({"high_noise": None}, shell, "k.high_noise=None: give the path of a LoRA, or leave it out"),
        ([high], shell, "give a path, or for two experts {high_noise: path, low_noise: path}"),
    ]
    for value, backbone, message in cases:
        with pytest.raises(ValueError) as caught:
            read_lora(value, backbone, key="k")
        assert message in str(caught.value) and str(caught.value).startswith(("k=", "k."))
    assert read_lora("", shell, key="k") is None
    with pytest.raises(ValueError, match=r"it is for: name it in its entry, as in '\{path: .*, expert: high_noise\}'"):
        load_backbone(backbone_config(pipeline, "wan22_t2v", loras=[BaseLora(high)]), "cpu", parts=())


def test_a_lora_also_suits_its_base_with_more_loras_merged(pipeline, loras):
    """As a step-distilled one under a trained one; the other way round is another base."""
    trained, distilled = str(loras["high_noise"].parent), str(loras["low_noise"])
    config = backbone_config(pipeline, "wan22_t2v", loras=[BaseLora(distilled, expert="low_noise")])
    shell = load_backbone(config, "cpu", parts=())
    assert read_lora(trained, shell, key="k").trained == shell.fingerprints[0] != shell.fingerprint
    under = load_backbone(config, "cpu", parts=("transformer",))
    attach(read_lora(trained, under, key="k"), under)
    alone = load(pipeline)
    attach(read_lora({"high_noise": trained, "low_noise": distilled}, alone, key="k"), alone)
    for merged, attached in zip(velocities(under), velocities(alone), strict=True):
        torch.testing.assert_close(merged, attached, rtol=1e-5, atol=1e-5)


def test_the_report_names_both_files():
    results = {"recipe": "", "date": "", "backbone": "", "seeds": [0], "settings": {"sampler": {"steps": 1}}}
    results["settings"]["sampler"] |= {"guidance": 1, "shift": 1}
    results["compute"] = {"device": "CPU", "ranks": 1, "made_now": 0, "seconds": 0}
    results["lora"] = {"path": "a, b", "sha256": {"high_noise": "1" * 64, "low_noise": "2" * 64}}
    results["lora"] |= {"expert": "high_noise, low_noise", "shape": "rank 4"}
    said = dict(tables.facts(results))["LoRA"]
    assert said == "a, b (rank 4, high_noise, low_noise, sha256 111111111111… and 222222222222…)"


def test_a_trained_lora_is_described_as_before(pipeline, loras):
    """Rank, alpha and targets of its own, and the digest of the file itself: finished clips stay."""
    trained = loras["high_noise"].parent
    shell = load_backbone(backbone_config(pipeline, "wan22_t2v"), "cpu", parts=())
    lora = read_lora(str(trained), shell, key="k")
    assert lora.shape == {"rank": 3, "alpha": 6.0, "targets": ["attn1.to_q", "attn2.to_v"]}
    assert lora.sha256 == sha256(checkpoint.find_lora(trained)[0]) and lora.describe() == "rank 3, alpha 6"
