"""Refinement of the initial noise on tiny pipelines: identity, trace, an independent reference, memory."""

import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from eval.search import noise_refinement as proprio
from eval.search.noise_refinement import RefineConfig, SelfScore, kl_to_standard_normal, refine
from eval.search.residuals import noise_levels
from losses.self_score import motion_mask
from tests.tiny_backbones import load
from train.backbones.base import Conditioning
from train.backbones.tiny import write_tiny_pipeline
from train.sampling import SamplerConfig, Stepper, sample, sigma_grid

SIZE = {"height": 32, "width": 32, "num_frames": 5}
FEW = SamplerConfig("euler", steps=2, guidance=1.0)
QUICK = {"levels": 2, "draws": 2, "gradient": "proprio"}
FRESH = {"levels": 1, "draws": 1, "learning_rate": 0.02}


@pytest.fixture(scope="module")
def backbone(tiny_pipeline):
    return load("wan21", tiny_pipeline)


@pytest.fixture(scope="module")
def image_backbone(tmp_path_factory):
    return load("wan22_ti2v", write_tiny_pipeline("wan22_ti2v", tmp_path_factory.mktemp("ti2v")))


def noise_for(backbone):
    return torch.randn((2, *backbone.latent_shape(**SIZE)), generator=torch.Generator().manual_seed(7))


def plain(backbone, conditioning, noise, sampler=FEW, **more):
    return sample(backbone, conditioning, noise, sampler, progress=False, **more)


def conditioning_of(backbone, image=False):
    first = torch.rand((2, 3, 32, 32), generator=torch.Generator().manual_seed(3)) * 2 - 1 if image else None
    return backbone.condition(["a ball falls", "a cup breaks"], first, num_frames=5)


@pytest.mark.parametrize("image", [False, True])
def test_no_update_is_the_plain_sample(backbone, image_backbone, image):
    network = image_backbone if image else backbone
    conditioning, noise = conditioning_of(network, image), noise_for(network)
    sampler = SamplerConfig("euler", steps=2, guidance=3.0)
    negative = network.condition([""])
    found = refine(network, conditioning, noise, sampler, RefineConfig(updates=0, **QUICK), negative=negative)
    assert torch.equal(found.latents, plain(network, conditioning, noise, sampler, negative=negative))
    assert torch.equal(found.noise, noise)
    assert found.trace.shape == (1, 2)
    assert found.passes == 2 * 2 + 4


@pytest.mark.parametrize("image", [False, True])
def test_the_best_iterate_is_returned_and_its_noise_gives_it_again(backbone, image_backbone, image):
    network = image_backbone if image else backbone
    conditioning, noise = conditioning_of(network, image), noise_for(network)
    config = RefineConfig(updates=3, learning_rate=0.02, **QUICK)
    found = refine(network, conditioning, noise, FEW, config)
    assert found.trace.shape == (4, 2) and (found.trace.amin(dim=0) < found.trace[0]).all()
    assert torch.equal(found.latents, plain(network, conditioning, found.noise))
    mask = motion_mask(plain(network, conditioning, noise))
    assert torch.equal(SelfScore(network, conditioning, mask, config)(found.latents), found.trace.amin(dim=0))
    if image:
        assert torch.equal(found.latents[:, :, :1], conditioning.image)


def test_a_score_that_gets_worse_returns_the_start(backbone, monkeypatch):
    conditioning, noise = conditioning_of(backbone), noise_for(backbone)
    count = iter(range(10))

    def worse(self, latents, update):
        return latents.flatten(1).mean(dim=1) * 0 + next(count)

    monkeypatch.setattr(SelfScore, "__call__", worse)
    found = refine(backbone, conditioning, noise, FEW, RefineConfig(updates=3, **QUICK))
    assert torch.equal(found.latents, plain(backbone, conditioning, noise))
    assert found.trace[:, 0].tolist() == [0, 1, 2, 3]


def test_clips_do_not_influence_each_other(backbone):
    conditioning, noise = conditioning_of(backbone), noise_for(backbone)
    config = RefineConfig(updates=2, learning_rate=0.02, **QUICK)
    both = refine(backbone, conditioning, noise, FEW, config)
    alone = refine(backbone, conditioning[1:], noise[1:], FEW, config)
    torch.testing.assert_close(both.latents[1:], alone.latents, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(both.trace[:, 1:], alone.trace)


def test_a_score_through_the_samples_is_that_of_a_loop_written_out_in_float64(backbone, monkeypatch):
    """Sampler, score, KL, clipping and Adam once more, in numbers of double length and without checkpoints."""
    conditioning, noise = conditioning_of(backbone), noise_for(backbone)
    monkeypatch.setattr(proprio, "KL_WEIGHT", 0.3)
    monkeypatch.setattr(proprio, "CLIP", 1e-3)
    config = RefineConfig(updates=2, learning_rate=0.02, **QUICK)
    found = refine(backbone, conditioning, noise, FEW, config)

    sigmas = sigma_grid(2, FEW.shift).double()
    draws = [
        torch.randn(noise.shape[1:], generator=torch.Generator().manual_seed(number)).double() for number in range(4)
    ]
    mask = motion_mask(plain(backbone, conditioning, noise)).double()
    for clip in range(2):
        told = conditioning[clip : clip + 1]

        def velocity(latents, t, told=told):
            return backbone.velocity(latents.float(), torch.tensor([t]), told).double()

        parameters = torch.zeros(2, 16, dtype=torch.float64, requires_grad=True)  # mean, log scale
        first, second = torch.zeros(2, 16, dtype=torch.float64), torch.zeros(2, 16, dtype=torch.float64)
        for update in range(3):
            mean, log_scale = (row.view(1, -1, 1, 1, 1) for row in parameters)
            latents = mean + log_scale.exp() * noise[clip : clip + 1].double()
            for t, following in zip(sigmas[:-1], sigmas[1:], strict=True):
                latents = latents + (following - t) * velocity(latents, float(t))
            whole, motion = [], []
            for level, t in enumerate((2 / 3, 0.875)):  # after 60% and 30% of the steps, at shift 3
                errors = []
                for draw in draws[2 * level : 2 * level + 2]:
                    noisy = (1 - t) * latents + t * draw
                    error = ((velocity(noisy, t) - (draw - latents)) ** 2).mean(dim=1)[0]  # (F,H,W)
                    errors.append(torch.stack([error.mean(), (mask[clip] * error).sum() / (mask[clip].sum() + 1e-6)]))
                whole.append(torch.stack(errors)[:, 0])
                motion.append(torch.stack(errors)[:, 1])
            score = 0.2 * torch.stack(whole).mean() + 0.8 * torch.stack(motion).mean()
            assert float(found.trace[update, clip]) == pytest.approx(score.item(), rel=2e-4)
            kl = 0.5 * (parameters[0] ** 2 + (2 * parameters[1]).exp() - 1 - 2 * parameters[1]).mean()
            (gradient,) = torch.autograd.grad(score + proprio.KL_WEIGHT * kl, parameters)
            gradient = gradient * min(1.0, proprio.CLIP / float(gradient.norm()))
            first, second = 0.9 * first + 0.1 * gradient, 0.999 * second + 0.001 * gradient**2
            step = first / (1 - 0.9 ** (update + 1)) / ((second / (1 - 0.999 ** (update + 1))).sqrt() + 1e-8)
            parameters = (parameters - config.learning_rate * step).detach().requires_grad_()


def count_passes(backbone):
    """The network's passes from here on, (forward without gradient, forward with), each of one clip."""
    counts = [0, 0]

    def count(network, inputs, named):  # before the pass: one that is computed again ends as soon as it can
        counts[torch.is_grad_enabled()] += len(named["hidden_states"])

    return counts, backbone.transformer.register_forward_pre_hook(count, with_kwargs=True)


@pytest.mark.parametrize(
    ("gradient", "passes", "backward"),
    # Two updates of 4 steps and 1 pass of the score; spsa: two of them each, and the steps for the mask.
    [("all", 10, 10), ("last_2", 10, 6), ("last_1", 10, 4), ("score", 10, 2), ("spsa", 24, 0)],
)
def test_fresh_noise_takes_few_passes_and_they_are_counted(backbone, gradient, passes, backward):
    conditioning, noise = conditioning_of(backbone), noise_for(backbone)
    config = RefineConfig(updates=2, gradient=gradient, **FRESH)
    counts, handle = count_passes(backbone)
    found = refine(backbone, conditioning, noise, SamplerConfig("euler", steps=4, guidance=1.0), config)
    handle.remove()
    assert (found.passes, found.backward) == (passes, backward)
    # A checkpoint computes again what goes backward, that is, twice with gradients on; but not an update's last pass.
    assert counts == [2 * (passes - backward), 2 * (2 * backward - 2 * (backward > 0))]
    assert found.latents is None and found.trace.shape == (2, 2)
    assert (found.noise != noise).flatten(1).any(dim=1).all()


def test_velocities_before_the_last_steps_are_constants(backbone):
    """By hand, through the last of two steps: z_0 = zeta + c - t v(zeta + c) with c of the first step as it is."""
    conditioning, noise = conditioning_of(backbone), noise_for(backbone)
    stepper, config = Stepper(backbone, conditioning, FEW), RefineConfig(gradient="last_1", **FRESH)
    objective = proprio.Objective(stepper, noise, FEW, config)
    parameters = torch.zeros(2, 2, 16, requires_grad=True)
    weights = torch.randn(noise.shape, generator=torch.Generator().manual_seed(1))
    (found,) = torch.autograd.grad((weights * objective.sample(parameters)).sum(), parameters)

    begun = noise.clone().requires_grad_()
    first, second = stepper.sigmas[:2]
    with torch.no_grad():
        constant = (second - first) * backbone.velocity(begun, first.expand(2), conditioning)
    middle = begun + constant
    ended = middle - second * backbone.velocity(middle, second.expand(2), conditioning)
    (by_noise,) = torch.autograd.grad((weights * ended).sum(), begun)
    expected = torch.stack([by_noise.sum((2, 3, 4)), (by_noise * noise).sum((2, 3, 4))])
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def test_spsa_is_the_slope_along_its_direction(backbone, monkeypatch):
    """g = (w . d) d of a score with gradient w: its size is the same everywhere, and w . g = (w . d)^2."""
    conditioning, noise = conditioning_of(backbone), noise_for(backbone)
    monkeypatch.setattr(proprio, "KL_WEIGHT", 0.0)
    monkeypatch.setattr(SelfScore, "__call__", lambda self, z, update: z.mean((1, 2, 3, 4)))
    monkeypatch.setattr(Stepper, "velocity", lambda self, latents, step: torch.zeros_like(latents))
    objective = proprio.Objective(Stepper(backbone, conditioning, FEW), noise, FEW, RefineConfig(gradient="spsa"))
    found, value = objective.spsa(torch.zeros(2, 2, 16), 0)
    slope = found[0, :, 0].abs()  # (B,)
    torch.testing.assert_close(found.abs(), slope[:, None].expand_as(found))
    gradient = torch.stack([torch.ones(2, 16), noise.mean((2, 3, 4))]) / 16  # of mean and log_scale, both at 0
    torch.testing.assert_close((gradient * found).sum((0, 2)), slope.square(), rtol=0.01, atol=1e-5)
    torch.testing.assert_close(value, noise.mean((1, 2, 3, 4)), rtol=0.01, atol=1e-3)


def test_fresh_noise_differs_from_update_to_update_alone(backbone):
    conditioning, latents = conditioning_of(backbone), noise_for(backbone)
    score = SelfScore(backbone, conditioning, motion_mask(latents), RefineConfig(levels=2, draws=2))
    drawn = [score.noise(latents, level, draw, update) for update in (0, 1) for level in (0, 1) for draw in (0, 1)]
    assert len({one.sum().item() for one in drawn}) == 8 and torch.equal(drawn[0][0], drawn[0][1])
    times = [[score.time(level, update) for level in (0, 1)] for update in range(50)]
    at = noise_levels(3, 0.3, 0.6, 3.0)  # after 60%, 45% and 30% of the steps
    assert all(at[1] <= first <= at[2] and at[0] <= second <= at[1] for first, second in times)
    assert len({first for first, _ in times}) == 50 and torch.equal(score(latents, 1), score(latents, 1))


def test_the_noise_of_rcm_stays_while_the_first_noise_is_refined(backbone):
    conditioning, noise = conditioning_of(backbone), noise_for(backbone)
    student, given = SamplerConfig("rcm", steps=4, guidance=1.0), {"seeds": [3, 4]}
    config = RefineConfig(updates=2, **{**QUICK, "learning_rate": 0.02})
    found = refine(backbone, conditioning, noise, student, config, **given)
    assert torch.equal(found.latents, plain(backbone, conditioning, found.noise, student, **given))
    assert (found.trace.amin(dim=0) < found.trace[0]).all()
    alone = refine(backbone, conditioning[1:], noise[1:], student, config, seeds=[4])
    torch.testing.assert_close(alone.trace[:, 0], found.trace[:, 1])


def test_kl_by_hand():
    mean, log_scale = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    assert kl_to_standard_normal(mean, log_scale).item() == pytest.approx((0.5 + (torch.e**2 - 3) / 2) / 2)


def test_the_kl_term_pulls_back_to_the_prior(backbone, monkeypatch):
    conditioning, noise = conditioning_of(backbone), noise_for(backbone)
    monkeypatch.setattr(SelfScore, "__call__", lambda self, z, update: z.flatten(1).mean(dim=1))

    def drift(kl_weight):
        monkeypatch.setattr(proprio, "KL_WEIGHT", kl_weight)
        found = refine(backbone, conditioning, noise, FEW, RefineConfig(updates=6, learning_rate=0.05))
        return (found.noise - noise).flatten(1).norm(dim=1)

    assert (drift(10.0) < drift(0.0)).all()


class Live(TorchDispatchMode):
    """Largest number of bytes of tensor storage that operations made and that was alive at once."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.seen = weakref.WeakSet()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and (storage := tensor.untyped_storage()) not in self.seen:
                self.seen.add(storage)
                self.now += storage.nbytes()
                weakref.finalize(storage, self._gone, storage.nbytes())
        self.peak = max(self.peak, self.now)
        return result

    def _gone(self, size):
        self.now -= size


def peak(backbone, steps, draws):
    """Bytes at the peak of one update."""
    conditioning, noise = conditioning_of(backbone), noise_for(backbone)
    config = RefineConfig(updates=1, levels=1, draws=draws, gradient="proprio")
    with Live() as live:
        refine(backbone, conditioning, noise, SamplerConfig("euler", steps=steps, guidance=1.0), config)
    return live.peak


def test_memory_is_that_of_one_network_pass(backbone, monkeypatch):
    latents = noise_for(backbone).nbytes
    few, many, drawn = peak(backbone, 1, 1), peak(backbone, 6, 1), peak(backbone, 1, 6)
    with monkeypatch.context() as patch:
        patch.setattr(proprio, "checkpoint", lambda function, *args, **_: function(*args))
        held, held_drawn = peak(backbone, 6, 1), peak(backbone, 1, 6)
    assert (many - few) / 5 <= 2 * latents and (drawn - few) / 5 <= 2 * latents
    assert (held - many) / 5 > 20 * latents and (held_drawn - drawn) / 5 > 20 * latents  # what it would be otherwise


def test_the_networks_own_checkpoints_may_be_on(backbone):
    conditioning, noise = conditioning_of(backbone), noise_for(backbone)
    config = RefineConfig(updates=2, learning_rate=0.02, **QUICK)
    without = refine(backbone, conditioning, noise, FEW, config)
    backbone.transformer.enable_gradient_checkpointing()
    try:
        within = refine(backbone, conditioning, noise, FEW, config)
    finally:
        backbone.transformer.disable_gradient_checkpointing()
    assert torch.equal(without.trace, within.trace)


def test_what_does_not_fit_is_named(backbone, monkeypatch):
    conditioning, noise = conditioning_of(backbone), noise_for(backbone)
    with pytest.raises(ValueError, match=r"noise of shape \(1, .* with 2 conditionings"):
        refine(backbone, conditioning, noise[:1], FEW, RefineConfig())
    with pytest.raises(ValueError, match="needs the encoded negative prompt"):
        refine(backbone, conditioning, noise, SamplerConfig("euler", steps=2), RefineConfig())
    for bad in ({"updates": -1}, {"learning_rate": 0}, {"gradient": "last_3"}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            RefineConfig(**bad)
    with pytest.raises(ValueError, match="last=1.0"):
        refine(backbone, conditioning, noise, FEW, RefineConfig(last=1.0))
    monkeypatch.setattr(SelfScore, "__call__", lambda self, z, update: z.sum((1, 2, 3, 4)) * torch.nan)
    with pytest.raises(ValueError, match="the score gave .*nan"):
        refine(backbone, conditioning, noise, FEW, RefineConfig())


def test_the_global_random_generator_is_left_alone(backbone):
    before = torch.get_rng_state()
    conditioning = Conditioning(conditioning_of(backbone).text)
    refine(backbone, conditioning, noise_for(backbone), FEW, RefineConfig(updates=1, **QUICK))
    assert torch.equal(before, torch.get_rng_state())
