import copy

import pytest
import torch
from transformers import VJEPA2Config, VJEPA2Model
from transformers.image_utils import IMAGENET_DEFAULT_MEAN as MEAN
from transformers.image_utils import IMAGENET_DEFAULT_STD as STD

from eval.search.world_model import SurpriseConfig, WorldModel, chosen_frames

USUAL = SurpriseConfig()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny random model with the shape of the real checkpoints: 64 frames, tubelets of 2."""
    path = tmp_path_factory.mktemp("vjepa2")
    config = VJEPA2Config(
        crop_size=32,
        patch_size=16,
        frames_per_clip=64,
        hidden_size=24,
        num_attention_heads=2,
        num_hidden_layers=2,
        pred_hidden_size=12,
        pred_num_attention_heads=2,
        pred_num_hidden_layers=2,
        initializer_range=0.2,
        pred_zero_init_mask_tokens=False,
    )
    torch.manual_seed(0)
    VJEPA2Model(config).save_pretrained(path)
    return str(path)


@pytest.fixture(scope="module")
def world(folder):
    return WorldModel(folder, "cpu")


def noise(*shape, seed=0):
    return torch.randint(256, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def pixels_of(clip):
    """(T,H,W,3) at the model's own size -> (1,T,3,H,W) float64, so that nothing is resampled."""
    mean, std = (torch.tensor(values, dtype=torch.float64)[:, None, None] for values in (MEAN, STD))
    return ((clip.permute(0, 3, 1, 2).double() / 255 - mean) / std)[None]


def reference(model, clip, window, context, stride, axis):
    """Surprise of one clip in float64: tokens of the context alone, cosines by loops."""
    values = []
    start = 0
    while start + window <= len(clip):
        pixels = pixels_of(clip[start : start + window])
        seen = model.encoder(pixel_values_videos=pixels[:, :context]).last_hidden_state
        whole = model.encoder(pixel_values_videos=pixels).last_hidden_state
        count, total = seen.shape[1], whole.shape[1]
        # The predictor reads the context at its own positions: the rest of what it is given must not matter.
        filled = torch.cat([seen, torch.full_like(whole[:, count:], 1e3)], dim=1)
        predicted = model.predictor(
            encoder_hidden_states=filled,
            context_mask=[torch.arange(count)[None]],
            target_mask=[torch.arange(count, total)[None]],
        ).last_hidden_state[0]
        sides = []
        for tokens in (predicted, whole[0, count:]):
            centred = tokens - tokens.mean(dim=1, keepdim=True)
            tokens = centred / (centred.square().mean(dim=1, keepdim=True) + 1e-5).sqrt()
            sides.append(tokens if axis == "feature" else tokens.T)
        values.append(1 - sum(float(a @ b / a.norm() / b.norm()) for a, b in zip(*sides, strict=True)) / len(sides[0]))
        start += stride
    return sum(values) / len(values)


@torch.no_grad()
@pytest.mark.parametrize("axis", ["feature", "token"])
@pytest.mark.parametrize(("window", "context", "stride"), [(16, 8, 8), (8, 2, 5)])
def test_equals_a_float64_reference(world, window, context, stride, axis):
    clips = noise(3, 25, 32, 32, 3)
    model = copy.deepcopy(world.model).double()
    scores = world.surprise(clips, SurpriseConfig("", window, context, stride, axis), batch=2)
    assert scores.shape == (3,) and scores.dtype == torch.float32
    for score, clip in zip(scores, clips, strict=True):
        assert score.item() == pytest.approx(reference(model, clip, window, context, stride, axis), abs=2e-5)


@torch.no_grad()
def test_the_future_does_not_reach_the_prediction(world):
    clip, other = noise(1, 16, 32, 32, 3).float(), noise(1, 16, 32, 32, 3, seed=1).float()
    altered = torch.cat([clip[:, :8], other[:, 8:]], dim=1)
    predicted, target = world.predict(clip, 8)
    again, changed = world.predict(altered, 8)
    assert predicted.shape == target.shape == (1, 16, 24)
    assert torch.equal(predicted, again) and (target - changed).abs().max() > 0.01

    # The model's own forward lets it in: this test would notice.
    ids = torch.arange(32)[None]
    masks = {"context_mask": [ids[:, :16]], "target_mask": [ids[:, 16:]]}
    leaky = [
        world.model(pixels_of(frames[0]).float(), **masks).predictor_output.last_hidden_state
        for frames in (clip, altered)
    ]
    assert (leaky[0] - leaky[1]).abs().max() > 1e-3


@torch.no_grad()
def test_frames_after_the_last_window_are_not_judged(world):
    clips = noise(1, 17, 32, 32, 3)
    altered = clips.clone()
    altered[:, 16] = 0
    assert torch.equal(world.surprise(clips, USUAL), world.surprise(altered, USUAL))
    assert not torch.equal(*(world.surprise(one, SurpriseConfig(stride=1)) for one in (clips, altered)))


def test_49_frames_are_taken_evenly_from_a_longer_clip_and_all_of_a_shorter_one(world, monkeypatch):
    # By hand: 121 frames have 120 gaps, so every 2.5th frame, the earlier of two where it falls between them.
    chosen = chosen_frames(121, 49)
    assert chosen[:6] == [0, 2, 5, 7, 10, 12] and chosen[-3:] == [115, 117, 120] and len(chosen) == 49
    assert chosen_frames(81, 49)[:5] == [0, 1, 3, 5, 6] and chosen_frames(97, 49) == list(range(0, 97, 2))
    assert chosen_frames(49, 49) == list(range(49)) and chosen_frames(17, 49) == list(range(17))
    clips = noise(1, 121, 32, 32, 3)
    with torch.no_grad():
        expected = world.surprise(clips[:, chosen], USUAL)
        assert torch.equal(world.surprise(clips, USUAL), expected)
        monkeypatch.setattr("eval.search.world_model.FRAMES", 121)
        assert not torch.equal(world.surprise(clips, USUAL), expected)
    monkeypatch.undo()
    assert torch.allclose(world.surprise(clips.float().requires_grad_(), USUAL), expected, atol=1e-5)


def test_any_frame_shape_fits(world):
    assert world.surprise(noise(2, 16, 20, 36, 3), USUAL).isfinite().all()


def test_gradient_equals_the_plain_one_and_the_value_that_of_bytes(world):
    clips = noise(2, 12, 32, 32, 3)
    options = {"window": 8, "context": 4, "stride": 2, "axis": "token"}
    frames = clips.float().requires_grad_()
    scores = world.surprise(frames, SurpriseConfig(**options))
    assert torch.allclose(scores, world.surprise(clips, SurpriseConfig(**options)), atol=1e-5)
    scores.sum().backward()

    plain = frames.detach().clone().requires_grad_()
    starts = (0, 2, 4)
    sum(world._window(plain[:, start : start + 8], 4, "token").sum() / 3 for start in starts).backward()
    assert torch.allclose(frames.grad, plain.grad, atol=1e-7) and frames.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in world.model.parameters())

    direction = torch.randn(frames.shape, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        up, down = (world.surprise(frames + sign * 1.275 * direction, SurpriseConfig(**options)) for sign in (1, -1))
    slope = (frames.grad * direction).sum().item()
    assert ((up - down).sum() / 2.55).item() == pytest.approx(slope, rel=0.05, abs=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 8, "context": 8}, "context=8 with window=8"),
        ({"context": 0}, "context=0"),
        ({"window": 15}, "window=15 is no multiple of the world model's tubelet of 2"),
        ({"context": 3}, "context=3 is no multiple"),
        ({"stride": 0}, "stride=0"),
        ({"window": 18}, "window=18 is longer than the clip of 17 frames"),
        ({"axis": "time"}, "axis='time'"),
    ],
)
def test_what_does_not_fit_is_refused(world, options, message):
    with pytest.raises(ValueError, match=message):
        world.surprise(noise(1, 17, 32, 32, 3), SurpriseConfig(**options))


def test_a_missing_model_is_refused(tmp_path):
    with pytest.raises(ValueError, match="world_model.path"):
        WorldModel(str(tmp_path), "cpu")
