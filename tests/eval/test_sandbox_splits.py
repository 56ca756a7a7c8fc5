"""The sandbox's numbered streams of clips: stable, and disjoint between the splits."""

import pytest
import torch

from eval.judges.sandbox.judge import SandboxJudgeConfig, build
from eval.sandbox.prompts import TEMPLATES
from eval.sandbox.splits import BLOCK, is_held_out, list_clips, simulate_block
from train.clips import VideoConfig

VIDEO = VideoConfig(64, 64, 17, 8.0)


def test_a_clip_does_not_depend_on_how_many_are_asked_for():
    few, many = list_clips("mixed", "train", 3, 5, VIDEO), list_clips("mixed", "train", 3, BLOCK + 20, VIDEO)
    assert many[:5] == few and len(many) == BLOCK + 20
    assert {clip.block for clip in many} == {0, 1}
    assert {clip.shown for clip in many} == set(TEMPLATES)
    assert many != list_clips("mixed", "train", 4, BLOCK + 20, VIDEO)
    clips = simulate_block("mixed", "train", 3, 1, VIDEO)  # at full size: what the list says
    for clip in many:
        if clip.block == 1:
            assert (clip.prompt, clip.shown) == (clips.prompts[clip.index], clips.scenes[clip.index])
    assert clips.frames.shape == (BLOCK, 17, 64, 64, 3)


def test_the_frame_size_changes_no_prompt():
    wide = [
        [clip.prompt for clip in list_clips("ramp", "train", 0, 30, VideoConfig(height, 2 * height, 17, 8.0))]
        for height in (48, 64)
    ]
    assert wide[0] == wide[1]


def test_splits_share_neither_prompts_nor_clips():
    train, held_out = (
        list_clips("mixed", split, 0, count, VIDEO) for split, count in (("train", 300), ("heldout", 60))
    )
    assert not any(is_held_out(clip.prompt) for clip in train)
    assert all(is_held_out(clip.prompt) for clip in held_out)
    assert {clip.shown for clip in held_out} == set(TEMPLATES)  # no scene is left out
    assert is_held_out(held_out[0].prompt.upper() + " ")
    frames = [simulate_block("projectile", split, 0, 0, VIDEO).frames for split in ("train", "heldout")]
    assert not torch.equal(*frames)
    pool = list_clips("mixed", "pool", 0, 300, VIDEO)
    assert not any(is_held_out(clip.prompt) for clip in pool)
    with pytest.raises(ValueError, match="split 'test' is unknown"):
        list_clips("mixed", "test", 0, 1, VIDEO)


@pytest.mark.slow
def test_every_other_block_of_the_pool_breaks_a_law():
    judge = build(SandboxJudgeConfig(fps=8), "cpu")
    for scene in ("mixed", "pendulum"):
        physical = []
        for block in range(4):
            clips = simulate_block(scene, "pool", 0, block, VIDEO)
            physical.append(float(judge(clips.frames[:50], clips.prompts[:50]).physical.mean()))
        assert min(physical[0], physical[2]) > 0.95, physical
        assert max(physical[1], physical[3]) < 0.7, physical
