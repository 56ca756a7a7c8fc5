"""Racing and pruning: the winner of full scoring, for fewer passes; clips that are the sampler's own."""

import pytest
import torch

from eval.search import racing
from eval.search.pruning import Partial, advance, begin, promising
from eval.search.racing import race
from train.backbones import load_backbone
from train.backbones.base import BackboneConfig, Conditioning
from train.backbones.tiny import write_tiny_pipeline
from train.clips import VideoConfig
from train.sampling import SOLVERS, SamplerConfig, Stepper, initial_noise, sample_clips, sampling_passes

VIDEO = VideoConfig(32, 32, 9, 8.0)


def load(path, family="wan21"):
    config = BackboneConfig(family=family, path=str(path), dtype="float32", text_length=12, architecture="tiny")
    return load_backbone(config, "cpu", parts=("transformer", "vae"))


@pytest.fixture(scope="module")
def backbone(tiny_pipeline):
    return load(tiny_pipeline)


def text(seed=3):
    return Conditioning(torch.randn(1, 12, 64, generator=torch.Generator().manual_seed(seed)))


# Racing


def simulate(generator, *, spread, noise, levels=4, draws=4, count=16):
    """Errors (count, rounds): a quality, a level's scale, noise that all share and noise of each one's own."""
    quality = 1 + spread * torch.rand(count, generator=generator)
    scale = torch.linspace(1.3, 0.7, levels).repeat(draws)
    shared = 0.3 * torch.randn(levels * draws, generator=generator)
    own = noise * torch.randn(count, levels * draws, generator=generator)
    return scale * (quality[:, None] + shared + own)


def test_a_race_finds_the_winner_of_full_scoring_at_no_more_than_half_the_passes():
    generator, same, passes, problems = torch.Generator().manual_seed(0), 0, 0, 300
    for _ in range(problems):
        values = simulate(generator, spread=1.0, noise=0.05)
        result = race(lambda number, chosen, values=values: values[chosen, number], 16, 16)
        same += result.winner == int(values.mean(1).argmin())
        passes += result.passes
    assert same >= 0.95 * problems
    assert passes <= 0.5 * problems * 16 * 16


@pytest.mark.parametrize("spread, noise", [(0.0, 0.2), (0.2, 0.3), (1.0, 0.3)])
def test_hard_races_take_longer_but_keep_the_winner(spread, noise, monkeypatch):
    """The standard error of the share is 1.1%: at most two of them below what is stated."""
    monkeypatch.setattr(racing, "CONFIDENCE", 0.95)
    generator, same, problems = torch.Generator().manual_seed(1), 0, 400
    for _ in range(problems):
        values = simulate(generator, spread=spread, noise=noise)
        result = race(lambda number, chosen, values=values: values[chosen, number], 16, 16)
        same += result.winner == int(values.mean(1).argmin())
    assert same >= (0.95 - 2 * 0.011) * problems


def test_without_noise_all_but_the_winner_leave_at_the_first_look():
    values = torch.tensor([3.0, 1.0, 2.0])[:, None].expand(3, 16)
    asked = []

    def observe(number, chosen):
        asked.append((number, list(chosen)))
        return values[chosen, number]

    result = race(observe, 3, 16)
    assert result.winner == 1 and result.rounds == [3, 3, 3] and result.passes == 9
    assert asked == [(number, [0, 1, 2]) for number in range(3)]
    assert result.scores.tolist() == [3.0, 1.0, 2.0]


def test_equal_candidates_run_to_the_end_and_one_candidate_runs_once():
    values = torch.randn(1, 16, generator=torch.Generator().manual_seed(0)).expand(2, 16)
    tied = race(lambda number, chosen: values[chosen, number], 2, 16)
    assert tied.winner == 0 and tied.rounds == [16, 16]
    assert race(lambda number, chosen: values[chosen, number], 1, 16).rounds == [1]


def test_survivors_by_hand(monkeypatch):
    """Two rivals of a leader at 0, n = 4 of R = 16: mean 1, variances 4/3 and 0; PRIOR 0 leaves them as they are."""
    monkeypatch.setattr(racing, "PRIOR", 0.0)
    values = torch.tensor([[0.0, 0, 0, 0], [0, 0, 2, 2], [1, 1, 1, 1]], dtype=torch.float64)
    error = (4 / 3 / 4 * (1 - 4 / 16)) ** 0.5  # 0.5
    assert error == 0.5
    assert racing.survivors(values, [0, 1, 2], 16, 1.99) == [0]
    assert racing.survivors(values, [0, 1, 2], 16, 2.01) == [0, 1]


# Pruning


@pytest.mark.parametrize(  # rCM's students hold guidance themselves
    ("solver", "guidance"), [*((solver, 1.0) for solver in SOLVERS), ("euler", 4.0), ("unipc", 4.0), ("dpm++", 4.0)]
)
@pytest.mark.parametrize("family", ["wan21", "wan22_t2v", "wan22_ti2v"])
def test_a_finished_clip_is_the_samplers(family, guidance, solver, tiny_pipeline, tmp_path):
    pipeline = tiny_pipeline if family == "wan21" else write_tiny_pipeline(family, tmp_path)
    backbone, conditioning, negative = load(pipeline, family), text(), text(4)
    sampler = SamplerConfig(solver, steps=4, guidance=guidance, guidance_low=3.0 if guidance > 1 else None)
    if family == "wan22_ti2v":
        shape = backbone.latent_shape(32, 32, 9)
        image = torch.randn(1, shape[0], 1, *shape[2:], generator=torch.Generator().manual_seed(5))
        conditioning = Conditioning(conditioning.text, image)
    seeds = [7, 8]
    expected = sample_clips(backbone, conditioning, seeds, VIDEO, sampler, negative=negative, progress=False)

    both, one = (
        Stepper(backbone, conditioning.expand(len(some)), sampler, negative, seeds=some) for some in (seeds, seeds[1:])
    )
    start = begin(both, initial_noise(backbone, VIDEO, seeds))
    partial = advance(both, start, 2)
    for _ in range(2):  # what a solver remembers stays as it was
        assert torch.equal(advance(both, partial, 4).latents, expected)
    joined = Partial.cat([partial.select([0]), partial.select([1])])
    assert torch.equal(advance(both, joined, 4).latents, expected)
    torch.testing.assert_close(advance(one, partial.select([1]), 4).latents[0], expected[1], rtol=1e-4, atol=1e-4)
    last = advance(both, start, 4)
    torch.testing.assert_close(last.clean, expected, rtol=1e-5, atol=1e-5)  # the end of the line is the clip


def test_the_predicted_clean_latents_need_no_further_pass(backbone):
    """x_k - s_k v of the step just made, with s = 1, .9, .75, .5, 0."""
    conditioning, sampler, calls = text(), SamplerConfig("euler", steps=4, guidance=1.0, shift=3.0), []
    handle = backbone.transformer.register_forward_hook(lambda *arguments: calls.append(arguments[2][0]))
    stepper = Stepper(backbone, conditioning, sampler)
    partial = advance(stepper, begin(stepper, initial_noise(backbone, VIDEO, [7])), 2)
    handle.remove()
    assert len(calls) == 2
    torch.testing.assert_close(partial.clean, partial.latents - 0.75 * calls[1], rtol=1e-5, atol=1e-5)


def test_passes_of_guided_and_unguided_steps(backbone, tmp_path):
    assert sampling_passes(backbone, SamplerConfig("euler", steps=4, guidance=1.0)) == 4
    assert sampling_passes(backbone, SamplerConfig("euler", steps=4, guidance=5.0)) == 8
    assert sampling_passes(backbone, SamplerConfig("euler", steps=4, guidance=5.0), 1, 3) == 4
    experts = load(write_tiny_pipeline("wan22_t2v", tmp_path), "wan22_t2v")
    # t = 1, .9 | .75, .5 about the boundary of .875
    half = SamplerConfig("euler", steps=4, guidance=5.0, guidance_low=1.0)
    assert sampling_passes(experts, half) == 6
    assert sampling_passes(backbone, SamplerConfig("euler", 4, 5.0, guided=[0.6, 0.95], shift=3.0)) == 6
    assert sampling_passes(backbone, SamplerConfig("euler", steps=4, guidance=5.0, guided=[0.7, 0.95]), start=0.5) == 4


def test_promising_by_hand():
    assert promising(torch.tensor([0.3, torch.inf, 0.1, 0.1]), 2) == [2, 3]
