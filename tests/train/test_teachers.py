import subprocess
import sys
import types

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from transformers import DepthAnythingConfig as DepthModelConfig
from transformers import DepthAnythingForDepthEstimation, Dinov2Config, VJEPA2Config, VJEPA2Model
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from eval.sandbox.clips import simulate
from losses.regions import rasterize
from train.teachers import DEPTHS, ENCODERS, TRACKERS, cotracker3, depth_anything, vjepa2
from train.teachers.cotracker3 import CoTrackerConfig
from train.teachers.depth_anything import DepthAnythingConfig
from train.teachers.lucas_kanade import LucasKanadeConfig
from train.teachers.points import choose_tokens, look_up, pack, query_grid, token_mask, unpack
from train.teachers.vjepa2 import VJepa2Config


def noise(*shape, seed=0):
    return torch.randint(256, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def textured(height, width, seed=0):
    """A picture with structure at every scale, (H, W, 3) uint8."""
    picture = torch.zeros(1, 3, height, width)
    for size in (4, 8, 16, 32):
        coarse = noise(1, 3, size, size, seed=seed + size).float()
        picture += torch.nn.functional.interpolate(coarse, (height, width), mode="bicubic")
    return (picture / 4).clamp(0, 255)[0].permute(1, 2, 0).to(torch.uint8)


# ---- points ----------------------------------------------------------------------------------------------------------


def test_query_grid_by_hand():
    assert query_grid(2).tolist() == [[0.25, 0.25], [0.75, 0.25], [0.25, 0.75], [0.75, 0.75]]
    assert query_grid(25).shape == (625, 2)


def test_packed_points_are_exact_enough():
    """Well below half a pixel at 832 columns; float16 of the same size is not."""
    points = torch.linspace(0, 1, 100_001, dtype=torch.float64)
    error = 832 * (unpack(pack(points)).double() - points).abs().max()
    assert error < 0.0066
    assert 832 * (points.half().double() - points).abs().max() > 0.2
    assert unpack(pack(torch.tensor([0.0, 1.0]))).tolist() == [0, 1]
    assert pack(points).dtype == torch.uint16


def test_look_up_reads_the_pixel_a_point_lies_in():
    image = torch.arange(6.0).view(2, 3)
    points = torch.tensor([[0.1, 0.1], [0.5, 0.1], [0.99, 0.6], [1.0, 1.0], [0.0, 0.5], [-1.0, 2.0]])
    assert look_up(image, points).tolist() == [0, 1, 5, 5, 3, 3]
    both = look_up(torch.stack([image, -image]), points.expand(2, -1, -1))
    assert both[1].tolist() == [0, -1, -5, -5, -3, -3]


def test_token_mask_equals_rasterised_frames():
    generator = torch.Generator().manual_seed(0)
    tracks = torch.rand(9, 6, 2, generator=generator)
    visible, keep = torch.rand(9, 6, generator=generator) > 0.3, torch.tensor([True, False, True, True, False, True])
    frames = vjepa2.sample_frames(9, 8).view(4, 2)
    mask = token_mask(tracks, visible, keep, frames, (5, 4))
    for part in range(4):
        expected = torch.zeros(5, 4, dtype=torch.bool)
        for frame in frames[part].tolist():
            for point in range(6):
                if keep[point] and visible[frame, point]:
                    expected |= rasterize(tracks[None, frame, None, point, None], torch.ones(1, 1).bool(), (5, 4))[0, 0]
        assert torch.equal(mask[part], expected)
    assert not token_mask(tracks, visible, torch.zeros(6, dtype=torch.bool), frames, (5, 4)).any()


def test_chosen_tokens_by_hand():
    mask = torch.zeros(3, 3, dtype=torch.bool)
    mask.view(-1)[[2, 3, 5, 7, 8]] = True
    assert choose_tokens(mask, 3).tolist() == [2, 5, 8]
    assert choose_tokens(mask, 5).tolist() == choose_tokens(mask, 100).tolist() == [2, 3, 5, 7, 8]
    assert choose_tokens(torch.zeros(3, 3, dtype=torch.bool), 5).tolist() == []


def test_chosen_tokens_are_spread_over_all_frames():
    chosen = choose_tokens(torch.ones(32, 16, 16, dtype=torch.bool), 512)
    assert len(chosen.unique()) == 512
    assert torch.bincount(chosen // 256).tolist() == [16] * 32


# ---- Lucas-Kanade ----------------------------------------------------------------------------------------------------


def lucas_kanade(**options):
    pytest.importorskip("cv2", reason="OpenCV is optional")
    return TRACKERS["lucas_kanade"].build(LucasKanadeConfig(**options), "cpu")


def test_a_shifting_picture_is_followed():
    """To the right by 1.5 and down by 0.5 pixels a frame, in a frame that is not square."""
    large = textured(240, 320)
    frames = torch.stack([large[100 - t : 196 - t : 2, 120 - 3 * t : 248 - 3 * t : 2] for t in range(8)])
    assert frames.shape == (8, 48, 64, 3)
    queries = query_grid(6)
    tracks, visible = lucas_kanade()(frames, queries)
    assert tracks.dtype == torch.float32 and visible.dtype == torch.bool
    step = torch.tensor([1.5 / 64, 0.5 / 48])
    true = queries + step * torch.arange(8.0)[:, None, None]
    assert visible[0].all() and torch.equal(tracks[0], queries)
    error = ((tracks - true) * torch.tensor([64, 48])).norm(dim=-1)
    assert error[visible].max() < 1 and error[visible].median() < 0.1  # pixels
    stays = (true[-1] < 0.9).all(dim=-1)
    assert visible[-1, stays].float().mean() > 0.9
    left = (true > 1).any(dim=-1)
    assert left.any() and not (visible & left).any()
    assert (tracks >= 0).all() and (tracks <= 1).all()


def test_lost_points_stay_lost_and_where_they_were():
    frames = textured(48, 48).repeat(6, 1, 1, 1)
    frames[3] = noise(48, 48, 3, seed=5)  # one frame of something else; the picture then comes back
    tracks, visible = lucas_kanade()(frames, query_grid(5))
    assert visible[:3].all() and visible[3:].any(dim=0).float().mean() < 0.2
    lost = ~visible[3]
    assert not visible[3:, lost].any()
    assert torch.equal(tracks[3:, lost], tracks[2, lost].expand(3, -1, -1))


def test_flat_surroundings_are_never_followed():
    tracks, visible = lucas_kanade()(torch.full((4, 32, 32, 3), 200, dtype=torch.uint8), query_grid(4))
    assert not visible.any() and torch.equal(tracks, query_grid(4).expand(4, -1, -1))


def test_what_is_hidden_is_lost():
    """A still picture behind which nothing moves, and a dark panel that slides over its left half."""
    frames = textured(48, 48, seed=3).repeat(7, 1, 1, 1)
    for t in range(7):
        frames[t, :, : 4 * t] = 20
    queries = query_grid(6)
    _, visible = lucas_kanade()(frames, queries)
    behind, beside = queries[:, 0] < 0.4, queries[:, 0] > 0.7
    assert visible[-1, beside].all() and visible[-1, behind].float().mean() < 0.1


def follow_simulated(scene, **options):
    """Against the simulator's truth at 64 x 64: errors in pixels of the visible points on the first object, and the
    share of its points that last to the end."""
    track, queries = lucas_kanade(**options), query_grid(25)
    errors, lasting = [], []
    clips = simulate(scene, 6, torch.Generator().manual_seed(0))
    for index in range(6):
        tracks, visible = track(clips.frames[index], queries)
        own = look_up(clips.masks[index, 0].long(), queries) == 1
        centre = clips.tracks[index, :, :1]  # (T, 1, 2)
        true = queries[own] + centre - centre[:1]
        errors.append(64 * (tracks[1:, own] - true[1:]).norm(dim=-1)[visible[1:, own]])
        lasting.append(visible[-1, own].float())
    return torch.cat(errors), torch.cat(lasting).mean()


def test_lucas_kanade_on_a_bouncing_ball():
    errors, lasting = follow_simulated("projectile")
    assert errors.median() < 0.1 and errors.quantile(0.9) < 0.5 and lasting > 0.7


def test_each_check_takes_out_wrong_points():
    off = 1e9
    neither = follow_simulated("collision", max_return=off, max_change=off)[0].mean()
    by_return = follow_simulated("collision", max_change=off)[0].mean()
    by_change = follow_simulated("collision", max_return=off)[0].mean()
    both = follow_simulated("collision")[0].mean()
    assert both < min(by_return, by_change) and max(by_return, by_change) < 0.9 * neither


@pytest.mark.parametrize(
    "option", [{"window": 0.0}, {"window": 2.0}, {"max_return": 0.0}, {"max_change": float("nan")}]
)
def test_lucas_kanade_refuses(option):
    with pytest.raises(ValueError, match=f"lucas_kanade.{next(iter(option))}="):
        LucasKanadeConfig(**option)


def test_lucas_kanade_names_the_missing_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(ValueError, match=r"pip install 'physalign\[trackers\]'"):
        TRACKERS["lucas_kanade"].check(LucasKanadeConfig())


# ---- CoTracker -------------------------------------------------------------------------------------------------------


class FakePredictor(torch.nn.Module):
    """CoTracker's interface: video (B,T,3,H,W) in 0 ... 255, queries (B,N,3) of frame, x, y in pixels. Every point
    moves by its `speed` a frame, and is visible in even frames."""

    def __init__(self, checkpoint, offline, v2=False, window_len=60):
        super().__init__()
        torch.manual_seed(0)  # as the package does
        assert checkpoint is None and offline and not v2 and window_len == 60
        self.model = torch.nn.Linear(2, 1)

    def forward(self, video, queries=None, segm_mask=None, grid_size=0, grid_query_frame=0, backward_tracking=False):
        assert video.ndim == 5 and video.shape[2] == 3 and video.dtype == torch.float32
        assert (queries[..., 0] == 0).all() and grid_size == 0
        self.video, self.queries = video, queries
        times = torch.arange(video.shape[1], dtype=torch.float32)
        tracks = queries[:, None, :, 1:] + times[:, None, None] * self.model.weight  # (B,T,N,2)
        visible = (times % 2 == 0)[None, :, None].expand(len(video), -1, queries.shape[1])
        return tracks, visible.clone()


@pytest.fixture
def fake_cotracker(monkeypatch, tmp_path):
    """A module of CoTracker's name, and weights for it."""
    module = types.ModuleType("cotracker.predictor")
    module.CoTrackerPredictor = FakePredictor
    monkeypatch.setitem(sys.modules, "cotracker", types.ModuleType("cotracker"))
    monkeypatch.setitem(sys.modules, "cotracker.predictor", module)
    weights = {"weight": torch.tensor([[8.0, 3.0]]), "bias": torch.zeros(1)}  # pixels a frame
    save_file(weights, tmp_path / "scaled_offline.safetensors")
    return CoTrackerConfig(path=str(tmp_path / "scaled_offline.safetensors"))


def test_cotracker_is_asked_in_pixels_and_answers_in_shares(fake_cotracker):
    frames = noise(5, 30, 40, 3)
    queries = torch.tensor([[0.5, 0.1], [0.0, 1.0]])
    tracks, visible = cotracker3.build(fake_cotracker, "cpu")(frames, queries)
    expected = queries + torch.tensor([8 / 40, 3 / 30]) * torch.arange(5.0)[:, None, None]  # x, then y
    inside = (expected <= 1).all(dim=-1)
    torch.testing.assert_close(tracks, expected.clamp(0, 1))
    assert visible.tolist() == (inside & (torch.arange(5) % 2 == 0)[:, None]).tolist()
    assert not visible[4, 0] and tracks[4, 0, 0] == 1  # it has left the frame


def test_cotracker_sees_the_clip_as_it_is(fake_cotracker, monkeypatch):
    made = []
    monkeypatch.setattr(FakePredictor, "eval", lambda self: made.append(self) or self)
    frames = noise(3, 20, 32, 3)
    cotracker3.build(fake_cotracker, "cpu")(frames, torch.tensor([[0.25, 0.75]]))
    assert torch.equal(made[0].video[0].permute(0, 2, 3, 1), frames.float())  # frame order, channels, 0 ... 255
    assert made[0].queries.tolist() == [[[0, 0.25 * 32 - 0.5, 0.75 * 20 - 0.5]]]  # pixel i is centred at i + 0.5


def test_cotracker_without_package_or_weights(fake_cotracker, monkeypatch, tmp_path):
    for path in ("", "scaled_offline.pth", str(tmp_path / "missing.safetensors")):
        with pytest.raises(ValueError, match="convert CoTracker3's scaled_offline.pth"):
            cotracker3.check(CoTrackerConfig(path))
    save_file({"other": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="does not hold CoTracker3's offline weights"):
        cotracker3.build(CoTrackerConfig(str(tmp_path / "other.safetensors")), "cpu")
    (tmp_path / "cut.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{")
    with pytest.raises(ValueError, match="does not hold CoTracker3's offline weights"):
        cotracker3.build(CoTrackerConfig(str(tmp_path / "cut.safetensors")), "cpu")
    monkeypatch.setitem(sys.modules, "cotracker.predictor", None)
    with pytest.raises(ValueError, match=r"pip install 'cotracker @ git\+https://github.com/facebookresearch"):
        cotracker3.check(fake_cotracker)


@pytest.mark.slow
def test_the_real_cotracker_keeps_frame_0(tmp_path):
    """With random weights, where it is installed: shapes, and points of frame 0 that come back where they were."""
    predictor = pytest.importorskip("cotracker.predictor", reason="CoTracker is optional")
    whole = predictor.CoTrackerPredictor(checkpoint=None, offline=True, window_len=60).model.state_dict()
    save_file({name: tensor.clone().contiguous() for name, tensor in whole.items()}, tmp_path / "w.safetensors")
    state = torch.get_rng_state()
    track = cotracker3.build(CoTrackerConfig(str(tmp_path / "w.safetensors")), "cpu")
    assert torch.equal(torch.get_rng_state(), state)
    queries = query_grid(3)
    tracks, visible = track(noise(5, 48, 80, 3), queries)
    assert tracks.shape == (5, 9, 2) and visible.shape == (5, 9) and visible.dtype == torch.bool
    torch.testing.assert_close(tracks[0], queries, atol=1e-5, rtol=0)
    assert visible[0].all() and ((tracks >= 0) & (tracks <= 1)).all()


# ---- Depth-Anything --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def depth_folder(tmp_path_factory):
    backbone = Dinov2Config(
        hidden_size=16,
        num_hidden_layers=4,
        num_attention_heads=2,
        image_size=56,
        patch_size=14,
        out_indices=[1, 2, 3, 4],
        reshape_hidden_states=False,
    )
    config = DepthModelConfig(
        backbone_config=backbone,
        reassemble_hidden_size=16,
        neck_hidden_sizes=[4, 8, 16, 16],
        fusion_hidden_size=8,
        head_hidden_size=4,
        initializer_range=0.5,
    )
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("depth")
    DepthAnythingForDepthEstimation(config).save_pretrained(folder)
    return folder


def test_disparity_of_a_tiny_model(depth_folder):
    disparity = DEPTHS["depth_anything"].build(DepthAnythingConfig(str(depth_folder)), "cpu")
    frame = textured(48, 80)
    near = disparity(frame)
    assert near.shape == (48, 80) and near.dtype == torch.float32 and not near.requires_grad
    assert near.min() == 0 and near.max() == 1
    model = DepthAnythingForDepthEstimation.from_pretrained(depth_folder).eval()
    with torch.no_grad():
        raw = model(pixel_values=depth_anything.preprocess(frame, 56, 14)).predicted_depth
    assert raw.shape == (1, 56, 98)
    small = torch.nn.functional.interpolate(near[None, None], (56, 98), mode="bilinear")[0, 0]
    both = torch.stack([small.flatten(), raw.flatten()])
    assert torch.corrcoef(both)[0, 1] > 0.98  # scaled and shifted, not turned round: near stays large


def test_a_frame_without_depth_is_near_everywhere(depth_folder, monkeypatch):
    def flat(self, pixel_values):
        return types.SimpleNamespace(predicted_depth=torch.zeros(1, *pixel_values.shape[2:]))

    monkeypatch.setattr(DepthAnythingForDepthEstimation, "forward", flat)
    near = DEPTHS["depth_anything"].build(DepthAnythingConfig(str(depth_folder)), "cpu")(textured(20, 30))
    assert torch.equal(near, torch.ones(20, 30))


@pytest.mark.parametrize("shape", [(480, 832), (832, 480), (64, 64), (704, 1280), (720, 1280)])
def test_depth_preprocessing_equals_transformers(shape):
    from transformers.models.dpt.image_processing_pil_dpt import DPTImageProcessorPil

    processor = DPTImageProcessorPil(
        size={"height": 518, "width": 518},
        keep_aspect_ratio=True,
        ensure_multiple_of=14,
        resample=3,
        image_mean=IMAGENET_DEFAULT_MEAN,
        image_std=IMAGENET_DEFAULT_STD,
    )
    frame = textured(*shape)
    expected = processor(frame.numpy(), return_tensors="pt", input_data_format="channels_last")["pixel_values"]
    pixels = depth_anything.preprocess(frame, 518, 14)
    assert pixels.shape == expected.shape
    assert (pixels - expected).abs().max() < 0.03  # PIL rounds to whole grey levels: 1 / 255 / 0.225 is 0.017


def test_depth_refuses(depth_folder, tmp_path):
    refused = {"": "is empty", "no folder": "is no folder", str(tmp_path): "no config can be read"}
    for path, words in refused.items():
        with pytest.raises(ValueError, match=f"depth_anything.path.*{words}"):
            DEPTHS["depth_anything"].build(DepthAnythingConfig(path), "cpu")
    config = DepthModelConfig.from_pretrained(depth_folder)
    config.save_pretrained(tmp_path / "empty")
    with pytest.raises(ValueError, match="its weights cannot be read"):
        DEPTHS["depth_anything"].build(DepthAnythingConfig(str(tmp_path / "empty")), "cpu")
    config.depth_estimation_type = "metric"
    config.save_pretrained(tmp_path / "metric")
    with pytest.raises(ValueError, match="is a metric model, whose far is large"):
        DEPTHS["depth_anything"].build(DepthAnythingConfig(str(tmp_path / "metric")), "cpu")
    config.depth_estimation_type = "relative"
    config.save_pretrained(tmp_path / "part")
    save_file({"head.conv1.bias": torch.zeros(4)}, tmp_path / "part" / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="lacks [0-9]+ tensors"):
        DEPTHS["depth_anything"].build(DepthAnythingConfig(str(tmp_path / "part")), "cpu")


# ---- V-JEPA 2 --------------------------------------------------------------------------------------------------------


def write_vjepa2(folder, layers=2):
    config = VJEPA2Config(
        crop_size=48,
        frames_per_clip=8,
        hidden_size=24,
        num_attention_heads=2,
        num_hidden_layers=layers,
        pred_hidden_size=12,
        pred_num_attention_heads=2,
        pred_num_hidden_layers=1,
    )
    torch.manual_seed(0)
    VJEPA2Model(config).save_pretrained(folder)
    return VJepa2Config(str(folder))


@pytest.fixture(scope="session")
def vjepa2_config(tmp_path_factory):
    return write_vjepa2(tmp_path_factory.mktemp("vjepa2"))


@pytest.mark.parametrize("num_frames", [1, 3, 8, 17])
def test_tokens_of_a_tiny_model(vjepa2_config, num_frames):
    tokens = ENCODERS["vjepa2"].build(vjepa2_config, "cpu")(noise(num_frames, 20, 36, 3))
    assert tokens.grid == (4, 3, 3) and tokens.values.shape == (36, 24) and tokens.values.dtype == torch.float32
    assert ENCODERS["vjepa2"].shape(vjepa2_config) == (tokens.grid, 24)
    assert tokens.frames.shape == (4, 2) and not tokens.values.requires_grad
    assert tokens.frames.min() >= 0 and tokens.frames.max() < num_frames


def test_tokens_are_the_encoder_s(vjepa2_config):
    frames = noise(8, 48, 48, 3)
    tokens = ENCODERS["vjepa2"].build(vjepa2_config, "cpu")(frames)
    model = VJEPA2Model.from_pretrained(vjepa2_config.path).eval()
    pixels = frames.permute(0, 3, 1, 2).double() / 255  # at the model's own size: nothing is resampled
    mean, std = (
        torch.tensor(v, dtype=torch.float64)[:, None, None] for v in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
    )
    with torch.no_grad():
        expected = model.get_vision_features(((pixels - mean) / std).float()[None])[0]
    torch.testing.assert_close(tokens.values, expected, atol=1e-5, rtol=1e-5)
    assert tokens.frames.tolist() == [[0, 1], [2, 3], [4, 5], [6, 7]]


def test_a_token_is_where_its_pixels_are(tmp_path):
    """Without layers a token sees its own patch only: changing one cell of one frame changes one token."""
    encode = ENCODERS["vjepa2"].build(write_vjepa2(tmp_path, layers=0), "cpu")
    before = noise(24, 60, 96, 3)
    after = before.clone()
    after[9:12, 45:55, 5:25] //= 2  # inside row 2, column 0 of the 3 x 3 cells of 20 x 32 pixels; in frames 9 to 11
    tokens = encode(before)
    changed = (encode(after).values - tokens.values).abs().amax(dim=1) > 1e-6
    parts = [part for part, frames in enumerate(tokens.frames.tolist()) if {9, 10, 11} & set(frames)]
    assert parts == [1]  # frames 1, 4, 7, 10 ... 22 are taken
    assert changed.view(tokens.grid).nonzero().tolist() == [[1, 2, 0]]


def test_frames_are_taken_evenly():
    assert vjepa2.sample_frames(81, 64)[:5].tolist() == [0, 1, 3, 4, 5] and vjepa2.sample_frames(81, 64)[-1] == 80
    assert vjepa2.sample_frames(64, 64).tolist() == list(range(64))
    assert vjepa2.sample_frames(2, 4).tolist() == [0, 0, 1, 1]
    for num_frames in (1, 17, 49, 81, 121):  # the same as torch's nearest neighbour with pixel centres
        places = torch.arange(num_frames, dtype=torch.float64)[None, None]
        expected = torch.nn.functional.interpolate(places, 64, mode="nearest-exact")[0, 0].long()
        assert torch.equal(vjepa2.sample_frames(num_frames, 64), expected)


def test_the_whole_frame_is_seen():
    """Squeezed, not cropped: each corner's colour stays in its corner, on average unchanged."""
    frame = torch.zeros(1, 40, 100, 3, dtype=torch.uint8)
    frame[:, :20, :50, 0] = frame[:, :20, 50:, 1] = frame[:, 20:, :50, 2] = 255
    pixels = vjepa2.preprocess(frame, 16)
    mean, std = (torch.tensor(values)[:, None, None] for values in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD))
    shown = (pixels[0] * std + mean)[:, [0, 0, -1, -1], [0, -1, 0, -1]]  # the four corners
    torch.testing.assert_close(shown.T, torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1], [0, 0, 0]]), atol=1e-5, rtol=0)


def test_vjepa2_refuses(depth_folder, vjepa2_config, tmp_path):
    with pytest.raises(ValueError, match="vjepa2.path is empty.*facebook/vjepa2-vitl-fpc64-256"):
        ENCODERS["vjepa2"].check(VJepa2Config())
    with pytest.raises(ValueError, match="holds a depth_anything model, not a vjepa2 one"):
        ENCODERS["vjepa2"].build(VJepa2Config(str(depth_folder)), "cpu")
    with pytest.raises(ValueError, match="holds a vjepa2 model, not a depth_anything one"):
        DEPTHS["depth_anything"].build(DepthAnythingConfig(vjepa2_config.path), "cpu")


# ---- all of them -----------------------------------------------------------------------------------------------------


def test_teachers_leave_the_global_generator_alone(depth_folder, vjepa2_config, fake_cotracker):
    state = torch.get_rng_state()
    DEPTHS["depth_anything"].build(DepthAnythingConfig(str(depth_folder)), "cpu")(noise(20, 20, 3))
    ENCODERS["vjepa2"].build(vjepa2_config, "cpu")(noise(4, 20, 20, 3))
    TRACKERS["cotracker"].build(fake_cotracker, "cpu")(noise(2, 20, 20, 3), query_grid(2))
    assert torch.equal(torch.get_rng_state(), state)


def test_naming_the_teachers_loads_none_of_their_libraries():
    heavy = "{'cv2', 'cotracker', 'transformers'} & set(sys.modules)"
    code = f"import sys; import train.teachers; assert not {heavy}, {heavy}"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_same_clip_same_targets(depth_folder, vjepa2_config):
    for build, frames in (
        (lambda: DEPTHS["depth_anything"].build(DepthAnythingConfig(str(depth_folder)), "cpu"), noise(20, 30, 3)),
        (lambda: lambda clip: ENCODERS["vjepa2"].build(vjepa2_config, "cpu")(clip).values, noise(5, 20, 30, 3)),
    ):
        assert np.array_equal(build()(frames).numpy(), build()(frames).numpy())
