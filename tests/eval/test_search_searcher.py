"""A search from prompt and seed to the clip: each strategy on tiny networks, and as `eval.generate` runs it."""

import json
from pathlib import Path

import pytest
import torch

from eval import generate
from eval.search import searcher
from eval.search.config import GuideConfig, PruneConfig, RefineConfig, SearchConfig
from eval.search.residuals import ResidualConfig
from eval.search.searcher import STRIDE, Method, Searcher
from eval.search.world_model import SurpriseConfig
from train import checkpoint
from train.backbones import load_backbone
from train.backbones.base import BackboneConfig, Conditioning
from train.backbones.tiny import write_tiny_pipeline
from train.clips import VideoConfig, write_clip
from train.lora_switch import LoraConfig, LoraSwitch
from train.sampling import SamplerConfig, sample_clips

VIDEO = VideoConfig(32, 32, 9, 8.0)
SAMPLER = SamplerConfig("euler", steps=3, guidance=1.0)
WORLD_MODEL = Path(generate.__file__).parent / "sandbox" / "world_model"


def load(path, family="wan21"):
    config = BackboneConfig(family=family, path=str(path), dtype="float32", text_length=12, architecture="tiny")
    return load_backbone(config, "cpu", parts=("transformer", "vae"))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_tiny_pipeline("wan21", tmp_path_factory.mktemp("wan21"))


@pytest.fixture(scope="module")
def backbone(model):
    return load(model)


def text(backbone, image=None):
    shape = (1, 12, backbone.architecture["transformer"]["text_dim"])
    return Conditioning(torch.randn(shape, generator=torch.Generator().manual_seed(4)), image)


def settings(**more):
    found = {"num_candidates": 4, "batch_size": 2, "residuals": ResidualConfig(levels=2, draws=2)}
    found["refine"] = RefineConfig(updates=1, steps=2)
    found["prune"] = PruneConfig(steps=[1], scorers=["most_motion"])
    return SearchConfig(**found | more)


def find(backbone, strategy, conditioning=None, sampler=SAMPLER, **more):
    conditioning = conditioning or text(backbone)
    one = Searcher(settings(**more), backbone, VIDEO, sampler)
    with torch.no_grad():  # as generation calls it
        return one.find(Method(*strategy), "a", "a ball", conditioning, 7)


def plain(backbone, seeds, conditioning=None):
    return sample_clips(backbone, conditioning or text(backbone), seeds, VIDEO, SAMPLER, progress=False)


def test_best_of_n_takes_the_clip_of_the_lowest_score(backbone):
    latents, facts = find(backbone, ("best_of_n", ""))
    assert facts["seeds"] == [7 + number * STRIDE for number in range(4)]
    assert facts["values"][facts["chosen"]] == min(facts["values"])
    assert (facts["passes"], facts["backward"]) == (4 * 3 + 4 * 4, 0) and facts["seconds"] > 0
    torch.testing.assert_close(latents, plain(backbone, facts["seeds"])[facts["chosen"]][None], rtol=1e-4, atol=1e-4)


def test_race_and_prune_take_fewer_passes(backbone):
    _, full = find(backbone, ("best_of_n", ""))
    _, raced = find(backbone, ("race", ""))
    assert raced["passes"] <= full["passes"]
    _, pruned = find(backbone, ("prune", ""))
    assert pruned["values"].count(None) == 2 and pruned["passes"] == 4 * 1 + 2 * 2 + 2 * 4
    json.dumps(pruned, allow_nan=False)


def test_refinement_without_search_starts_from_the_seed(backbone):
    latents, facts = find(backbone, ("", "proprio"))
    assert facts["seeds"] == [7] and facts["refined"]["of"] == [0]
    assert len(facts["refined"]["scores"][0]) == 1
    # one update of 2 steps and 1 pass of the score, then the sampler's 3 steps
    assert (facts["passes"], facts["backward"]) == (3 + 3, 3)
    unrefined, _ = find(backbone, ("", "proprio"), refine=RefineConfig(updates=0, steps=2))
    torch.testing.assert_close(unrefined, plain(backbone, [7]), rtol=1e-4, atol=1e-4)
    assert latents.shape == unrefined.shape


@pytest.mark.parametrize("strategy", [("prune", ""), ("race", "proprio"), ("best_of_n", "guidance")])
def test_a_student_of_rcm_is_searched_and_refined(backbone, strategy):
    """Each clip from its own seed's noise, whichever it was sampled beside."""
    sampler = SamplerConfig("rcm", steps=3, guidance=1.0)
    guided = {"surprise": SurpriseConfig(str(WORLD_MODEL), window=4, context=2, stride=4)}
    guided |= {"guidance": GuideConfig(scale=0.0), "refine": RefineConfig(updates=0, steps=2)}
    latents, facts = find(backbone, strategy, sampler=sampler, **guided)
    seed = facts["seeds"][facts["chosen"]]
    expected = sample_clips(backbone, text(backbone), [seed], VIDEO, sampler, progress=False)
    torch.testing.assert_close(latents, expected, rtol=1e-4, atol=1e-4)


def test_variance_weights_are_refused_for_students_of_rcm():
    student = SamplerConfig("rcm", steps=3, guidance=1.0)
    for key, more in (("chosen_by", {}), ("prune.scorers", {"prune": PruneConfig([1], scorers=["proprio_hybrid"])})):
        more = more or {"chosen_by": "proprio_hybrid"}
        with pytest.raises(ValueError, match=f"search.{key} names proprio_hybrid, .* use proprio_hybrid-uniform"):
            searcher.check(Method("prune", ""), settings(**more), student, "generate")
    searcher.check(Method("best_of_n", ""), settings(chosen_by="proprio_hybrid-uniform"), student, "generate")
    with pytest.raises(ValueError, match="search.refine.steps=10: rcm has a time grid for 1 to 4 steps"):
        searcher.check(Method("", "proprio"), settings(refine=RefineConfig(steps=10)), student, "generate")


def test_the_best_few_are_refined_and_chosen_from_again(backbone):
    refine = RefineConfig(updates=1, steps=3, gradient="proprio", best=2)
    _, facts = find(backbone, ("best_of_n", "proprio"), refine=refine)
    values = facts["refined"]["values"]
    order = sorted(range(4), key=lambda index: facts["values"][index])
    assert facts["refined"]["of"] == sorted(order[:2]) and facts["refined"]["chosen"] == values.index(min(values))
    assert facts["passes"] == 4 * 3 + 4 * 4 + 2 * (2 * 4) + 2 * 4 and facts["backward"] == 2 * 4


def test_every_candidate_is_guided(backbone):
    guided = {"surprise": SurpriseConfig(str(WORLD_MODEL), window=4, context=2, stride=4)}
    guided |= {"guidance": GuideConfig(scale=0.05, every=2), "num_candidates": 2}
    latents, facts = find(backbone, ("best_of_n", "guidance"), **guided)
    assert facts["passes"] == 2 * 3 + 2 * 4 and facts["backward"] == 2 * 2
    assert (latents - plain(backbone, facts["seeds"])[facts["chosen"]]).abs().max() > 1e-3


def test_the_image_of_a_clip_stays(tmp_path):
    backbone = load(write_tiny_pipeline("wan22_ti2v", tmp_path), "wan22_ti2v")
    video = VideoConfig(64, 64, 9, 8.0)
    shape = backbone.latent_shape(64, 64, 9)
    image = torch.randn((1, shape[0], 1, *shape[2:]), generator=torch.Generator().manual_seed(2))
    one = Searcher(settings(num_candidates=2), backbone, video, SAMPLER)
    latents, facts = one.find(Method("race", "proprio"), "a", "a ball", text(backbone, image), 7)
    assert torch.equal(latents[:, :, :1], image) and facts["refined"]["of"] == [facts["chosen"]]


@pytest.mark.parametrize(
    ("strategy", "more", "message"),
    [
        (("best", ""), {}, "generate.search='best'"),
        (("", "propio"), {}, "generate.refine='propio'"),
        (("race", ""), {"chosen_by": "proprio_hybrid"}, "search.chosen_by=proprio_hybrid cannot race"),
        (("best_of_n", ""), {"chosen_by": "nobody"}, "search.chosen_by names 'nobody'"),
        (("best_of_n", ""), {"num_candidates": 1}, "search.num_candidates=1"),
        (("prune", ""), {"prune": PruneConfig()}, "search.prune.steps"),
        (("prune", "guidance"), {}, "generate.search=prune"),
        (("", "guidance"), {}, "search.surprise.path"),
        (("best_of_n", ""), {"batch_size": 0}, "batch_size"),
    ],
)
def test_strategies_that_cannot_work_are_refused(strategy, more, message):
    with pytest.raises(ValueError, match=message):
        searcher.check(Method(*strategy), settings(**more), SAMPLER, "generate")


def test_a_residual_cache_is_refused_where_candidates_are_compared():
    cached = SamplerConfig("euler", steps=3, guidance=1.0, cache=0.1)
    with pytest.raises(
        ValueError, match=r"sampler.cache=0.1: search and refinement need every pass whole; set it to 0"
    ):
        searcher.check(Method("best_of_n", ""), settings(), cached, "run")


def test_settings_are_those_that_the_clip_depends_on():
    def found(*strategy, **more):
        return searcher.settings(Method(*strategy), settings(**more))

    assert found("best_of_n") == found("best_of_n", batch_size=1, refine=RefineConfig(updates=9))
    assert found("best_of_n") != found("best_of_n", num_candidates=3)
    assert found("best_of_n") != found("best_of_n", residuals=ResidualConfig(levels=1))
    assert found("race") != found("best_of_n") and found("", "proprio") != found("best_of_n", "proprio")
    assert found("", "proprio", chosen_by="most_motion") == found("", "proprio")


# As a command


def arguments(model, output, *more):
    return [
        "recipe=tiny",
        f"output={output}",
        f"backbone.path={model}",
        "video.num_frames=5",
        "sampler.steps=2",
        "sampler.guidance=1.0",
        'generate.prompts=["A red ball falls"]',
        "generate.seeds=[3]",
        "search.num_candidates=3",
        "search.residuals.levels=1",
        "search.residuals.draws=2",
        "search.refine.steps=1",
        "search.refine.updates=1",
        "search.refine.levels=1",
        "search.refine.draws=1",
        *more,
    ]


def test_generate_searches_refines_and_resumes(model, tmp_path, monkeypatch, capsys):
    wanted = ["generate.search=best_of_n", "generate.refine=proprio", "search.chosen_by=most_motion"]
    generate.main(arguments(model, tmp_path, *wanted, "--dry-run"))
    assert "best_of_n of 3 by most_motion" in capsys.readouterr().out
    generate.main(arguments(model, tmp_path))
    generate.main(arguments(model, tmp_path, *wanted))
    folders = sorted(path.name for path in (tmp_path / "clips").iterdir() if path.is_dir())
    assert folders == ["base", "base-best_of_n-proprio"]
    (sidecar,) = (tmp_path / "clips" / "base-best_of_n-proprio").glob("*.json")
    record = json.loads(sidecar.read_text(encoding="utf-8"))
    assert len(record["search"]["values"]) == 3 and record["search"]["seeds"][0] == 3
    assert record["strategy"]["num_candidates"] == 3 and record["search"]["passes"] == 3 * 2 + 2 + 2
    monkeypatch.setattr("eval.maker.Maker", None)  # nothing is loaded again
    generate.main(arguments(model, tmp_path, *wanted))
    generate.main(arguments(model, tmp_path))


@pytest.mark.slow
def test_two_experts_an_image_and_a_lora(tmp_path):
    """The base model's search and the tuned one's differ, start from the image, and need no other setting."""
    folder = write_tiny_pipeline("wan22_i2v", tmp_path / "model")
    ours = {"architecture": "tiny", "dtype": "float32", "text_length": 64, "expert": "low_noise"}
    config = BackboneConfig("wan22_i2v", str(folder), **ours)
    network = load_backbone(config, "cpu", parts=("expert",))
    switch = LoraSwitch(network.transformer, LoraConfig(rank=2, alpha=2))
    for number, weight in enumerate(switch.parameters()):
        weight.data.normal_(std=0.3, generator=torch.Generator().manual_seed(number))
    metadata = checkpoint.weights_metadata(switch, fingerprint=network.fingerprint, expert=network.expert)
    optimizer = torch.optim.AdamW(switch.parameters())
    lora = tmp_path / "train" / "checkpoints"
    state = {"samples_seen": 1, "skipped": 0, "seed": 0}
    checkpoint.save(lora, 1, switch=switch, optimizer=optimizer, state=state, metadata=metadata, keep=1)
    picture = tmp_path / "start.mp4"
    write_clip(picture, torch.full((2, 64, 64, 3), 90, dtype=torch.uint8), 8)
    more = ["backbone.family=wan22_i2v", f"generate.images=[{picture}]", f"generate.lora={tmp_path / 'train'}"]
    more += ["generate.search=race", "generate.refine=proprio", "search.refine.best=2", "backbone.compile=true"]
    generate.main(arguments(folder, tmp_path, *more))
    found = {}
    for name in ("base-race-proprio", "tuned-race-proprio"):
        (sidecar,) = (tmp_path / "clips" / name).glob("*.json")
        found[name] = json.loads(sidecar.read_text(encoding="utf-8"))["search"]
    base, tuned = found.values()
    assert base["seeds"] == tuned["seeds"] and base["values"] != tuned["values"]
    assert len(tuned["refined"]["of"]) == 2 and len(list((tmp_path / "clips").glob("side_by_side-*/*.mp4"))) == 1
