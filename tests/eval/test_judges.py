"""What all judges share: names and settings, what they give back, what they raise for a clip they cannot judge."""

import pytest
import torch

from eval.judges import JUDGES, JudgeConfig, Judging, build_judge, judge_settings
from eval.judges.external_tool import RatersConfig
from eval.judges.sandbox import judge as sandbox
from eval.judges.scores import Scores, Unjudged, check_clips
from eval.sandbox.clips import simulate
from eval.vlm.backend import VlmConfig


@pytest.mark.parametrize(
    ("name", "hint"),
    [("sandbx", "did you mean 'sandbox'"), ("videophy_2", "did you mean 'videophy2'"), ("", "known: sandbox, ")],
)
def test_an_unknown_judge_gets_a_suggestion(name, hint):
    with pytest.raises(ValueError, match=f"judge.name='{name}' is no judge; {hint}"):
        build_judge(Judging(JudgeConfig(name)), 16, "cpu")


def test_what_scores_depend_on_has_the_form_of_finished_works_digests():
    settings = judge_settings(Judging(JudgeConfig("vlm"), VlmConfig(model="m"), RatersConfig()))
    assert set(settings) == {"name", *JUDGES} - {"robots"} and settings["name"] == "vlm"
    assert "robots" in judge_settings(Judging(JudgeConfig("robots")))  # only where it judges: it came later
    assert settings["sandbox"] == {"fps": 8.0, "batch_size": 16}
    assert settings["vlm"]["model"] == "m" and settings["vlm"]["seed"] == 0 and len(settings["vlm"]) == 18
    tool = {"checkout": "", "python": "", "checkpoint": "", "timeout": 1800.0, "fps": 16.0}
    assert settings["videophy2"] == tool and settings["videocon_physics"] == tool | {"batch_size": 16}


def test_a_judge_takes_the_frame_rate_of_the_clips():
    clips = simulate("projectile", 2, torch.Generator().manual_seed(1), fps=16.0)
    scores = build_judge(Judging(JudgeConfig("sandbox")), 16, "cpu")(clips.frames, clips.prompts)
    expected = sandbox.build(sandbox.SandboxJudgeConfig(fps=16.0), "cpu")(clips.frames, clips.prompts)
    assert scores.physical.tolist() == expected.physical.tolist() and scores.physical.min() > 0.9


def test_the_sandbox_judge_names_clips_whose_prompt_is_none_of_its_world():
    clips = simulate("mixed", 4, torch.Generator().manual_seed(2))
    judge = sandbox.build(sandbox.SandboxJudgeConfig(), "cpu")
    expected = judge(clips.frames, clips.prompts)
    with pytest.raises(
        Unjudged, match="clip 2 .'An opera singer.'.: prompt .* names none of the sandbox scenes"
    ) as refusal:
        judge(clips.frames, [*clips.prompts[:2], "An opera singer.", clips.prompts[3]])
    assert refusal.value.judged == [0, 1, 3]
    assert refusal.value.scores.semantic.tolist() == expected.semantic[[0, 1, 3]].tolist()
    assert refusal.value.scores.errors["gravity"].tolist() == expected.errors["gravity"][[0, 1, 3]].tolist()
    assert len(refusal.value.scores.rows()) == 3
    assert judge(clips.frames[:0], []).physical.shape == (0,)


def test_a_message_spells_out_a_few_failures_and_counts_the_rest():
    none = Scores(torch.zeros(0), torch.zeros(0))
    refusal = Unjudged({clip: "it is dark" for clip in range(8)}, ["x" * 200] * 9, none)
    assert "8 of 9 clips" in str(refusal) and "clip 4" in str(refusal) and "clip 5" not in str(refusal)
    assert "and 3 more" in str(refusal) and "x" * 58 not in str(refusal) and refusal.judged == [8]


def test_clips_and_prompts_are_checked():
    clips = torch.zeros(2, 3, 16, 16, 3, dtype=torch.uint8)
    check_clips(clips, ["a", "b"])
    for wrong in (clips.float(), clips[0], clips[..., :1], clips[:, :0]):
        with pytest.raises(ValueError, match=r"give uint8 \(clips, frames, height, width, 3\)"):
            check_clips(wrong, ["a", "b"])
    with pytest.raises(ValueError, match="2 clips but 1 prompts"):
        check_clips(clips, ["a"])
