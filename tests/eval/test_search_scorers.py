"""Scorers against references of their own: the network called clip by clip, the arithmetic in float64, plain loops."""

import hashlib
import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import recipes
from eval import generate
from eval.judges import JudgeConfig, Judging
from eval.judges.scores import Scores, Unjudged
from eval.search import searcher
from eval.search.candidates import Candidates, choose
from eval.search.masks import attention_masks, mask_of
from eval.search.residuals import ResidualConfig, Residuals, noise_levels
from eval.search.scorers import PROPRIO, SCORERS, SETTINGS
from eval.search.scorers import surprise as surprise_scorer
from eval.search.scorers.baselines import most_motion, motion_energy, random_choice
from eval.search.scorers.judge import judge_score
from eval.search.scorers.per_motion import PerMotion
from eval.search.scorers.proprio import Proprio
from eval.search.scorers.surprise import Surprise
from eval.search.searcher import scorer_settings
from eval.search.world_model import SurpriseConfig
from train.backbones import load_backbone
from train.backbones.base import BackboneConfig, Conditioning
from train.backbones.tiny import write_tiny_pipeline
from train.sampling import sigma_grid

SHAPE = (16, 3, 4, 6)  # (C, F, H, W)
CONFIG = ResidualConfig(levels=2, first=0.4, last=0.7, shift=1.0, draws=2)
PROMPT_TOKENS = 5


def load(path, family="wan21"):
    config = BackboneConfig(family=family, path=str(path), dtype="float32", text_length=12, architecture="tiny")
    return load_backbone(config, "cpu", parts=("transformer",))


@pytest.fixture(scope="module")
def backbone(tiny_pipeline):
    return load(tiny_pipeline)


def candidates(count=3, shape=SHAPE, image=None):
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(count, *shape, generator=generator) * torch.tensor([1.0, 0.3, 2.0])[:count].view(
        -1, 1, 1, 1, 1
    )
    text = torch.randn(1, 12, 64, generator=generator)
    text[:, PROMPT_TOKENS:] = 0
    decode = lambda z: torch.zeros(len(z), 9, 8, 8, 3, dtype=torch.uint8)  # noqa: E731
    return Candidates("a-key", "a ball", latents, Conditioning(text, image), decode, 8.0)


def reference_noise(key, t, draw, shape=SHAPE):
    digest = hashlib.sha256(f"0/{key}/{t:.9g}/{draw}".encode()).digest()
    return torch.randn(shape, generator=torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1))


def reference_errors(backbone, found, mask, times=(0.3, 0.6), expert=None):
    """(N, levels, draws) float64: eqs. 4-6 with one clip a pass."""
    errors = np.zeros((len(found), len(times), 2))
    for n, clean in enumerate(found.latents):
        for k, t in enumerate(times):
            network = (expert or (lambda t: backbone.transformer))(t)
            for d in range(2):
                noise = reference_noise(found.key, t, d, tuple(clean.shape))
                noisy = ((1 - t) * clean.double() + t * noise.double()).float()
                with torch.no_grad():
                    velocity = network(
                        hidden_states=noisy[None],
                        timestep=torch.tensor([1000.0 * t]),
                        encoder_hidden_states=found.conditioning.text,
                        return_dict=False,
                    )[0][0]
                squared = ((velocity.double() - (noise.double() - clean.double())) ** 2).mean(0).numpy()
                weight = np.ones_like(squared) if mask is None else mask[n].double().numpy()
                errors[n, k, d] = (weight * squared).sum() / (weight.sum() + 1e-6)
    return errors


def reference_weighting(errors, weighting):
    mean, variance = errors.mean(2), errors.var(2)
    if weighting == "uniform":
        return mean.mean(1)
    weight = 1 / (variance + 1e-8)
    return (mean * weight).sum(1) / (weight * np.ones_like(mean)).sum(1)


def reference_motion_mask(latents):
    masks = []
    for z in latents.double().numpy():
        change = np.abs(z[:, 1:] - z[:, :-1]).mean(0)
        change = np.concatenate([change[:1], change])
        masks.append(change / change.max())
    return torch.from_numpy(np.stack(masks))


# Proprio


@pytest.mark.parametrize("weighting", ["inverse_variance", "uniform"])
def test_global_motion_and_hybrid_are_the_reference(backbone, weighting):
    found = candidates()
    everything = reference_weighting(reference_errors(backbone, found, None), weighting)
    moving = reference_weighting(reference_errors(backbone, found, reference_motion_mask(found.latents)), weighting)
    expected = {"global": everything, "motion": moving, "hybrid": 0.2 * everything + 0.8 * moving}
    for variant, values in expected.items():
        scorer = Proprio(Residuals(backbone, CONFIG, 2), variant, "motion", weighting)
        torch.testing.assert_close(scorer(found).double(), torch.from_numpy(values), rtol=2e-5, atol=0)


@pytest.mark.parametrize("kind", ["text", "attention"])
def test_other_masks_only_change_the_weights(backbone, kind):
    found, residuals = candidates(), Residuals(backbone, CONFIG, 2)
    mask = mask_of(kind, found, residuals)
    expected = reference_weighting(reference_errors(backbone, found, mask), "uniform")
    values = Proprio(residuals, "motion", kind, "uniform")(found)
    torch.testing.assert_close(values.double(), torch.from_numpy(expected), rtol=2e-5, atol=0)


def test_passes_are_shared_and_counted_for_each_scorer(backbone, monkeypatch):
    # Every look at this clock is a second later than the one before.
    monkeypatch.setattr("eval.search.candidates.time", SimpleNamespace(perf_counter=itertools.count().__next__))
    found, residuals = candidates(), Residuals(backbone, CONFIG, 2)
    _, first = found.measure(Proprio(residuals, "global"))
    _, second = found.measure(Proprio(Residuals(backbone, CONFIG, 2), "hybrid", "text"))
    assert first.passes == 3 * 4 and second.passes == 3 * 4 + 3  # the same residuals, and one pass for the masks
    assert first.seconds == 3  # looks at the start and the end, and two between them for the residuals: 0, 1, 2, 3
    assert second.seconds == 4  # 4 to 7, two for the masks, and the residuals' second, which were there already
    _, third = found.measure(most_motion)
    assert third.passes == 0


def test_batches_do_not_change_scores_and_candidates_do_not_change_noise(backbone):
    found = candidates()
    one = Residuals(backbone, CONFIG, batch_size=1).maps(candidates())
    all_together = Residuals(backbone, CONFIG, batch_size=3).maps(found)
    torch.testing.assert_close(one, all_together, rtol=1e-4, atol=1e-5)
    fewer = candidates()
    fewer.latents = fewer.latents[:1]
    alone = Residuals(backbone, CONFIG, 2).maps(fewer)
    torch.testing.assert_close(alone[0], all_together[0], rtol=1e-4, atol=1e-5)


def test_rounds_are_the_maps_and_their_mean_is_the_uniform_score(backbone):
    found, fresh, residuals = candidates(), candidates(), Residuals(backbone, CONFIG, 2)
    for scorer in (
        Proprio(residuals, "hybrid", "motion", "uniform"),
        PerMotion(residuals, "global", "motion", "uniform"),
    ):
        whole = scorer(found)
        rounds = torch.stack([scorer.round_values(fresh, number, [0, 2]) for number in range(4)])
        torch.testing.assert_close(rounds.mean(0), whole[[0, 2]], rtol=1e-4, atol=0)
    with pytest.raises(ValueError, match="uniform"):
        Proprio(residuals, "global").round_values(found, 0, [0])


def test_levels_are_shares_of_the_steps_on_the_samplers_grid():
    # By hand, after 60% and 30% of the steps: u = 0.4 and 0.7 are left, t = s u / (1 + (s - 1) u).
    assert noise_levels(2, 0.3, 0.6, 3.0) == pytest.approx([1.2 / 1.8, 2.1 / 2.4])
    assert noise_levels(2, 0.3, 0.6, 5.0) == pytest.approx([2 / 2.6, 3.5 / 3.8])
    assert noise_levels(4, 0.4, 0.7, 1.0) == pytest.approx([0.3, 0.4, 0.5, 0.6])
    steps = sigma_grid(10, 5.0)  # where a sampler of ten steps is after 3, 4, 5 and 6 of them
    assert noise_levels(4, 0.3, 0.6, 5.0) == pytest.approx(steps[[6, 5, 4, 3]].tolist())


def test_a_recipes_levels_follow_its_sampler_and_stand_in_what_a_clip_depends_on():
    config = recipes.load(generate.Config, ["sampler.shift=5", "generate.prompts=[x]"])
    assert config.search.residuals.shift == config.search.refine.shift == 5
    kept = searcher.settings(searcher.Method("best_of_n", "proprio"), config.search)
    levels = {"levels": 4, "first": 0.3, "last": 0.6, "shift": 5.0}
    assert levels.items() <= kept["scorers"]["residual_per_motion"]["residuals"].items()
    assert (levels | {"levels": 1}).items() <= kept["refined"].items()
    pinned = recipes.load(generate.Config, ["recipe=sandbox"]).search.residuals
    assert noise_levels(4, pinned.first, pinned.last, pinned.shift) == pytest.approx([0.3, 0.4, 0.5, 0.6])


def test_each_level_is_served_by_its_expert(tmp_path):
    backbone = load(write_tiny_pipeline("wan22_t2v", tmp_path), "wan22_t2v")
    found = candidates(2)
    config = ResidualConfig(levels=2, first=0.05, last=0.2, shift=1.0, draws=2)  # the boundary is .875
    names = {0.8: "low_noise", 0.95: "high_noise"}
    expected = reference_errors(backbone, found, None, (0.8, 0.95), lambda t: backbone.experts[names[t]])
    values = Proprio(Residuals(backbone, config), "global", "motion", "uniform")(found)
    torch.testing.assert_close(values.double(), torch.from_numpy(expected.mean((1, 2))), rtol=2e-5, atol=0)


def test_the_image_of_ti2v_is_not_scored(tmp_path):
    backbone = load(write_tiny_pipeline("wan22_ti2v", tmp_path), "wan22_ti2v")
    shape = (backbone.architecture["z_dim"], 3, 4, 4)
    image = torch.randn(1, shape[0], 1, 4, 4, generator=torch.Generator().manual_seed(2))
    found = candidates(2, shape, image)
    found.latents[:, :, :1] = image
    residuals = Residuals(backbone, CONFIG, 2)
    maps = residuals.maps(found)
    assert (maps[:, :, :, 0] == 0).all() and (maps[:, :, :, 1:] > 0).all()
    values = Proprio(residuals, "global", "motion", "uniform")(found)
    torch.testing.assert_close(values, maps[:, :, :, 1:].mean(dim=(1, 2, 3, 4, 5)), rtol=1e-4, atol=0)


# Masks


def test_attention_masks_are_the_reference(backbone, monkeypatch):
    monkeypatch.setattr("train.backbones.wan_attention.QUERIES", 5)  # 18 tokens: several chunks, the last one shorter
    found, residuals = candidates(), Residuals(backbone, CONFIG, 2)
    masks = attention_masks(found, residuals)
    network, frames, rows, columns = backbone.transformer, 3, 2, 3
    layers = [1]  # the middle third of three blocks
    inputs = {}
    handles = [
        getattr(network.blocks[layer], name).register_forward_pre_hook(
            lambda module, args, place=(layer, name): inputs.__setitem__(place, args)
        )
        for layer in layers
        for name in ("attn1", "attn2")
    ]
    for n, clean in enumerate(found.latents):
        noisy = 0.7 * clean + 0.3 * reference_noise("a-key", 0.3, 0)
        with torch.no_grad():
            network(noisy[None], torch.tensor([300.0]), found.conditioning.text, return_dict=False)
        text, change = np.zeros((frames, rows * columns)), np.zeros((frames, rows * columns))
        for layer in layers:
            block = network.blocks[layer]
            projected = {}
            for name in ("attn1", "attn2"):
                attention, (hidden, *others) = getattr(block, name), inputs[layer, name]
                keys = hidden if name == "attn1" else others[0]
                with torch.no_grad():
                    projected[name] = [
                        attention.norm_q(attention.to_q(hidden))[0].double().numpy(),
                        attention.norm_k(attention.to_k(keys))[0].double().numpy(),
                    ]
            query, key = projected["attn2"]
            width = query.shape[1] // block.attn2.heads
            for head in range(block.attn2.heads):
                part = slice(head * width, (head + 1) * width)
                weight = np.exp(query[:, part] @ key[:, part].T / np.sqrt(width))
                share = (weight / weight.sum(1, keepdims=True))[:, :PROMPT_TOKENS].mean(1)
                text += share.reshape(frames, -1) / block.attn2.heads / len(layers)
            query, key = (values.reshape(frames, rows * columns, -1) for values in projected["attn1"])
            for frame in range(1, frames):
                a, b = query[frame], key[frame - 1]
                cosine = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
                change[frame] += np.maximum(0, 1 - cosine) / len(layers)
        change[0] = change[1]
        difference = np.abs(text[1:] - text[:-1])
        expected = {"text": np.concatenate([difference[:1], difference]), "attention": change}
        for kind, volume in expected.items():
            grid = volume.reshape(frames, rows, columns).repeat(2, 1).repeat(2, 2) / volume.max()
            torch.testing.assert_close(masks[kind][n].double(), torch.from_numpy(grid), rtol=1e-3, atol=1e-4)
    for handle in handles:
        handle.remove()


def test_observing_leaves_the_network_as_it_was(backbone):
    found, residuals = candidates(1), Residuals(backbone, CONFIG, 2)
    before = residuals.round(found, 0)
    attention_masks(found, residuals)
    assert torch.equal(residuals.round(found, 0), before)
    assert not any(module._forward_pre_hooks for module in backbone.transformer.modules())


def test_one_frame_and_an_unknown_mask(backbone):
    found, residuals = candidates(1, (16, 1, 4, 4)), Residuals(backbone, CONFIG, 2)
    assert all((mask_of(kind, found, residuals) == 0).all() for kind in ("motion", "text", "attention"))
    with pytest.raises(ValueError, match="unknown"):
        mask_of("depth", found, residuals)


# Without the network


def test_motion_by_hand():
    latents = torch.zeros(2, 1, 3, 1, 1)
    latents[1, 0, :, 0, 0] = torch.tensor([1.0, 3.0, 4.0])
    assert motion_energy(latents).tolist() == [0.0, 1.5]
    found = candidates(2)
    found.latents = latents
    assert choose(most_motion(found)) == 1
    assert motion_energy(latents[:, :, :1]).tolist() == [0.0, 0.0]


def test_per_motion_by_hand(backbone):
    found, score = candidates(), Proprio(Residuals(backbone, CONFIG, 2), "global", "motion", "uniform")
    found.latents[1] = found.latents[1, :, :1]  # stands still
    values = PerMotion(score.residuals, "global", "motion", "uniform")(found)
    expected = score(found) / motion_energy(found.latents)
    assert values[1] == torch.inf and torch.equal(values[[0, 2]], expected[[0, 2]])


def test_random_choice_is_the_prompts_alone():
    first, again, other = candidates(), candidates(), candidates()
    other.key = "another"
    assert torch.equal(random_choice(first), random_choice(again))
    assert not torch.equal(random_choice(first), random_choice(other))


def test_a_judge_turned_round_never_chooses_what_it_cannot_judge():
    scores = Scores(semantic=torch.tensor([0.5, 1.0]), physical=torch.tensor([0.9, 0.4]))

    def judge(clips, prompts):
        assert clips.shape[0] == len(prompts) == 3
        raise Unjudged({1: "blank"}, prompts, scores)

    torch.testing.assert_close(judge_score(judge, candidates()), torch.tensor([0.1, torch.inf, 0.6]))


def test_surprise_hands_clips_and_windows_on(monkeypatch):
    class Model:
        def surprise(self, clips, config, *, batch):
            assert clips.shape == (3, 9, 8, 8, 3) and clips.dtype == torch.uint8
            assert (config.window, config.context, config.stride, config.axis, batch) == (16, 8, 8, "token", 2)
            return torch.arange(3, dtype=torch.float64)

    scorer = Surprise(SurpriseConfig(path="somewhere", axis="token"), "cpu", batch=2)
    scorer.model = Model()
    values, cost = candidates().measure(scorer)
    assert values.tolist() == [0.0, 1.0, 2.0] and values.dtype == torch.float32 and cost.passes == 0
    with pytest.raises(ValueError, match="search.surprise.path"):
        Surprise(SurpriseConfig(), "cpu", batch=2)
    assert "world_model" not in vars(surprise_scorer)  # imported where it is used


# The contract


def test_every_scorer_is_built_and_says_what_it_depends_on(backbone):
    config = recipes.load(generate.Config, []).search
    config.surprise.path, config.batch_size, judge = "somewhere", 2, Judging(JudgeConfig("sandbox"))
    assert set(SETTINGS) <= set(SCORERS) and len(PROPRIO) == 14
    assert {name for name in SCORERS if not scorer_settings(name, config, judge)} == {"random", "most_motion"}
    built = {name: build(config, backbone, 8.0, judge) for name, build in SCORERS.items()}
    assert built["surprise"].batch == 2
    found = candidates()
    values = {name: found.measure(built[name])[0] for name in built if name not in ("surprise", "judge")}
    assert all(torch.isfinite(value).all() for value in values.values())
    assert not torch.equal(values["proprio_motion"], values["proprio_motion-text"])


def test_a_scorer_that_gives_no_number_is_refused():
    with pytest.raises(ValueError, match="one number each"):
        candidates().measure(lambda found: torch.tensor([0.0, torch.nan, 1.0]))
    with pytest.raises(ValueError, match="one number each"):
        candidates().measure(lambda found: torch.zeros(2))


@pytest.mark.parametrize(
    "change",
    [{"levels": 0}, {"draws": 0}, {"first": 0.0}, {"first": 0.7}, {"last": 1.0}, {"shift": 0.0}],
)
def test_settings_that_cannot_work_are_refused(backbone, change):
    with pytest.raises(ValueError, match=next(iter(change))):
        Residuals(backbone, ResidualConfig(**change))
