"""`train/tools/benchmark.py` on the tiny architecture: every part runs, and its figures hang together."""

import json

import pytest

from train.tools import benchmark
from train.tools.breakdown import KINDS, draw_timeline, kind_of, overlap, window


@pytest.mark.slow
def test_all_parts_run_and_are_written(tmp_path):
    parts = "benchmark.parts=[ceilings,plain,ours,low_memory,streamed,groupwise,copy,physics,self_score]"
    own = ("benchmark.repeats=1", "train.memory_budget_gib=1", "self_score.every=4")
    arguments = ["recipe=tiny", f"output={tmp_path}", *own, parts]
    results = benchmark.main(arguments)
    assert json.loads((tmp_path / "benchmark.json").read_text(encoding="utf-8")) == results
    for part in ("plain", "ours", "low_memory", "streamed", "groupwise", "copy", "physics", "self_score"):
        assert results[part]["seconds"] > 0 and results[part]["memory_gib"] > 0
        assert results[part]["time"]["matrix"] > 0 and results[part]["time"]["attention"] > 0
        assert results[part]["compiled_later"] == 0
    assert (tmp_path / "benchmark.png").stat().st_size > 10_000
    # Without training, the switch's policy is its reference to the last bit.
    assert results["ours"]["untrained_gap"] == results["groupwise"]["untrained_gap"] == 0
    # Two clips against five: the limit is proportional to the clips.
    assert results["groupwise"]["limit_seconds"] == pytest.approx(2.5 * results["ours"]["limit_seconds"])
    assert results["ours"]["limit_seconds"] == results["ceilings"]["pair_limit_seconds"]
    for part in ("low_memory", "groupwise", "copy", "physics", "self_score"):
        assert results[part]["ratio"] == results[part]["seconds"] / results["ours"]["seconds"]
    assert results["streamed"]["ratio"] == results["streamed"]["seconds"] / results["low_memory"]["seconds"]
    assert results["streamed"]["same_gradients"] is results["streamed"]["repeated_gradients"] is True
    assert "ratio" not in results["plain"] and "limit_seconds" not in results["self_score"]
    assert results["self_score"]["amortised"] - 1 == pytest.approx((results["self_score"]["ratio"] - 1) / 4)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["hunyuan15", "hunyuan15_i2v", "cosmos25", "cosmos25 backbone.prefix_frames=5"])
def test_every_family_is_measured_beside_plain_code(tmp_path, family):
    small = ("backbone.architecture=tiny", "backbone.compile=false", "backbone.dtype=float32", "video.height=64")
    small += ("video.width=64", "video.num_frames=9", "benchmark.repeats=1", "benchmark.parts=[plain,ours]")
    results = benchmark.main([*f"recipe={family}".split(), f"output={tmp_path}", *small])
    assert results["plain"]["seconds"] > 0 and results["ours"]["seconds"] > 0
    assert results["ours"]["untrained_gap"] == 0


@pytest.mark.slow
def test_what_fits_is_measured_card_by_card(tmp_path, monkeypatch):
    monkeypatch.setattr(benchmark, "CARDS", (0, 3))
    own = ("backbone.compile=true", "benchmark.parts=[ours,fits]", "benchmark.repeats=1", "self_score.strength=1")
    none, some = benchmark.main(["recipe=tiny", f"output={tmp_path}", *own])["fits"].values()
    assert none == {} and some["seconds"] > 0 and some["cap_gib"] == 45 / 16 > some["planned_gib"]
    assert some["arguments"] == "backbone.stream=false train.memory_budget_gib=1.3125"


def test_unknown_part_is_refused():
    with pytest.raises(ValueError, match="benchmark.parts: unknown theirs"):
        benchmark.main(["recipe=tiny", "benchmark.parts=[theirs]"])


@pytest.mark.parametrize("part", ["plain", "ours"])
def test_layers_that_are_not_there_are_refused_by_plain_and_ours_alike(part, tmp_path):
    own = [f"output={tmp_path}", f"benchmark.parts=[{part}]", "lora.targets=[attn9.to_q]"]
    with pytest.raises(ValueError, match=r"lora.targets: 'attn9.to_q' matches no linear layer; did you mean"):
        benchmark.main(["recipe=tiny", *own])


def test_sharding_needs_a_launch_that_shards():
    with pytest.raises(ValueError, match="zero3 shards over the ranks of a DeepSpeed launch"):
        benchmark.main(["recipe=tiny", "benchmark.parts=[zero3]"])


def test_streaming_needs_a_budget_to_keep_to():
    with pytest.raises(ValueError, match="streamed keeps to train.memory_budget_gib: give one"):
        benchmark.main(["recipe=tiny", "benchmark.parts=[streamed]"])


def test_time_that_two_kinds_share_by_hand():
    """0 to 4 and 9 to 10 meet 1 to 2, 3 to 5 and 8 to 20 in 1 + 1 + 1, however they are cut or nested."""
    others = [(8, 20), (1, 2), (3, 5), (9, 12)]
    assert overlap([(9, 10), (0, 3), (2, 4)], others) == overlap(others, [(0, 4), (9, 10)]) == 3
    assert overlap([], others) == overlap(others, []) == overlap([(5, 8)], others) == 0


def test_the_timeline_is_the_middle_second_without_short_pauses(tmp_path):
    """Of 10 to 14 the middle is 11.5 to 12.5: a pause of 0.01 ms is closed, one of 0.1 s stays."""
    spans = dict.fromkeys(KINDS, ()) | {"matrix": [(10, 11.6), (11.60001, 12), (12.1, 14)], "copies": [(11.7, 11.8)]}
    shown = window(spans)
    assert shown["matrix"] == [(0, 0.5), (0.6, 1)] and shown["copies"] == [(0.2, 0.3)] and shown["attention"] == []
    draw_timeline(shown, tmp_path / "timeline.png")
    assert (tmp_path / "timeline.png").stat().st_size > 5_000


@pytest.mark.parametrize(
    ("kernel", "kind"),
    [
        ("cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16", "attention"),
        ("void cudnn::fusion::compute_dot_do_o_specialized<true, 128>", "attention"),
        ("nvjet_sm90_tst_256x152_64x4_1x2_h_bz_coopA_bias_TNT", "matrix"),
        ("void cublasLt::splitKreduce_kernel", "matrix"),
        ("triton_red_fused__scaled_dot_product_cudnn_attention__to_copy_add_mul", "elementwise"),
        ("void at::native::vectorized_elementwise_kernel<4>", "elementwise"),
        ("kernel_cutlass_kernel_flash_attncuteflash_fwd_sm90FlashAttentionForwardSm90", "attention"),
        ("ncclDevKernel_AllGather_RING_LL", "communication"),
        ("c10d::_allgather_base_", "communication"),
        ("Memcpy DtoH (Device -> Pinned)", "copies"),
        ("Memcpy DtoD (Device -> Device)", "elementwise"),
    ],
)
def test_kinds_of_kernels(kernel, kind):
    assert kind_of(kernel) == kind
