"""PAI-Bench-G and EZS-Bench against a stand-in for a judge, which answers from the frames and words that it is sent."""

import base64
import io
import json

import pytest
import torch
from PIL import Image, ImageStat

from eval.benchmarks.base import DataConfig, Sample
from eval.benchmarks.vqa import EzsBench, PaiBench, frame_count
from eval.vlm.backend import VlmConfig
from eval.vlm.client import VlmUnavailable
from tests.eval.vlm_stub import StubServer, media_of, question_of
from train.clips import VideoConfig, write_clip

pytestmark = pytest.mark.usefixtures("two_tries")

VIDEO = VideoConfig(height=16, width=16, num_frames=17, fps=8.0)
BRIGHT = "Does the scene stay bright?"


def level(request) -> float:
    """Mean grey level of the first picture."""
    picture = base64.b64decode(media_of(request)[0].split(",", 1)[1])
    return ImageStat.Stat(Image.open(io.BytesIO(picture)).convert("L")).mean[0]


def answer(request) -> str:
    """To "Does the arm move 7?" yes where the clip's level is 7 or more tens, in different spellings."""
    words = question_of(request).split("Question: ")[1].split("\n")[0]
    if words == BRIGHT:
        return "It is hard to say."
    threshold = int(words.split()[-1].rstrip("?")) * 10
    return "**YES**." if level(request) >= threshold - 5 else "no"


def ask(number: int, expected: str) -> dict:
    options = {"A": "yes", "B": "No"}
    letter = {"yes": "A", "no": "B"}[expected]
    record = {"uid": f"q{number}", "question": f"Does the arm move {number}?", "answer": letter, "index2ans": options}
    return record | {"task": "task:success", "split": "val"}


def judge(server, **settings) -> VlmConfig:
    return VlmConfig(base_url=server.url, model="stub", **settings)


def make_samples(tasks, folder, levels) -> list[Sample]:
    samples = [Sample(task, seed, folder / f"{task.key}-{seed}.mp4") for task in tasks for seed in (0, 5)]
    for sample, grey in zip(samples, levels, strict=True):
        write_clip(sample.path, torch.full((17, 16, 16, 3), grey, dtype=torch.uint8), 8.0)
    return samples


@pytest.fixture
def pai(tmp_path):
    """A folder as the data set has it: two prompts of robots, one of people."""
    folder = tmp_path / "pai"
    questions = {"robot_a": [ask(5, "yes"), ask(9, "yes"), ask(12, "no"), ask(3, "no")]}
    questions |= {"robot_b": [ask(10, "yes"), ask(20, "no")], "human_c": [ask(1, "yes")]}
    for sub in ("vqa", "condition_image"):
        (folder / sub).mkdir(parents=True)
    records = []
    for name, records_of in questions.items():
        (folder / "vqa" / f"{name}.json").write_text(json.dumps(records_of), encoding="utf-8")
        (folder / "condition_image" / f"{name}.jpg").write_bytes(b"picture")
        records.append({"video_id": name, "prompt_en": f"The clip {name}.", "image_name": f"{name}.jpg"})
    (folder / "cosmos_predict2_bench_full_info.json").write_text(json.dumps(records), encoding="utf-8")
    return folder


def test_the_domain_score_is_the_share_of_right_answers(pai, tmp_path):
    with StubServer(answer) as server:
        benchmark = PaiBench(DataConfig(folder=str(pai)), VIDEO, judge(server))
        tasks = benchmark.prompts()
        assert [task.key for task in tasks] == ["robot-a", "robot-b"] and tasks[0].category == "robot"
        assert tasks[0].text == "The clip robot_a." and tasks[1].image == pai / "condition_image" / "robot_b.jpg"
        samples = make_samples(tasks, tmp_path / "clips", [40, 100, 150, 250])
        rows = list(benchmark.score(samples, tmp_path / "scores"))
        asked = len(server.requests)
        # By hand, robot_a: level 40 says no, no, no, yes; expected yes, yes, no, no: 1 of 4. Level 100 says yes, yes,
        # no, yes: 3 of 4. robot_b: 150 says yes, no, expected yes, no: 2 of 2; 250 says yes, yes: 1 of 2.
        assert [row.values["domain"] for row in rows] == [1 / 4, 3 / 4, 1, 1 / 2]
        assert [(row.key, row.seed) for row in rows] == [(sample.task.key, sample.seed) for sample in samples]
        assert asked == 12 and all(len(media_of(request)) == 4 for request in server.requests)  # 17 / 8 s at 2 fps
        assert server.requests[0]["temperature"] == 0 and server.requests[0]["max_tokens"] == 1024
        list(benchmark.score(samples, tmp_path / "scores"))
        assert len(server.requests) == asked  # kept


def test_a_question_without_an_answer_is_an_error_that_names_it(pai, tmp_path):
    records = [ask(5, "no"), {**ask(6, "yes"), "uid": "bright", "question": BRIGHT}]
    (pai / "vqa" / "robot_b.json").write_text(json.dumps(records), encoding="utf-8")
    with StubServer(answer) as server:
        benchmark = PaiBench(DataConfig(folder=str(pai)), VIDEO, judge(server))
        samples = make_samples(benchmark.prompts(), tmp_path / "clips", [40, 100, 150, 250])
        samples[0].path.unlink()
        rows = list(benchmark.score(samples, tmp_path / "scores"))
        assert [bool(row.error) for row in rows] == [True, False, True, True]
        assert rows[0].error == f"{samples[0].path}: missing: no such file"
        assert rows[2].error.startswith(f"{samples[2].path}: malformed: question bright: the answer says neither")
        assert not rows[2].values
    with pytest.raises(VlmUnavailable, match="no connection"):
        list(benchmark.score(samples, tmp_path / "elsewhere"))


def test_ezs_bench_reads_its_lines_and_finds_its_pictures(tmp_path):
    folder = tmp_path / "ezs"
    (folder / "images").mkdir(parents=True)
    (folder / "images" / "scene_001.jpg").write_bytes(b"picture")
    (folder / "scene_002.png").write_bytes(b"picture")
    lines = [
        {"video": "/home/theirs/images/scene_001.jpg", "prompt": "An arm lifts a cube.", "question": [ask(9, "yes")]},
        {"video": "scene_002.png", "prompt": "A hand.", "question": [ask(9, "yes"), ask(15, "no"), ask(2, "no")]},
    ]
    text = "\n".join(json.dumps(line) for line in lines) + "\n\n"
    (folder / "data.jsonl").write_text(text, encoding="utf-8")
    with StubServer(answer) as server:
        benchmark = EzsBench(DataConfig(folder=str(folder)), VIDEO, judge(server))
        tasks = benchmark.prompts()
        assert [task.image for task in tasks] == [folder / "images" / "scene_001.jpg", folder / "scene_002.png"]
        samples = make_samples(tasks, tmp_path / "clips", [40, 100, 100, 200])
        rows = list(benchmark.score(samples, tmp_path / "scores"))
        assert len(media_of(server.requests[0])) == 6  # 17 / 8 s at 3 fps, an even number
    # By hand, the second: level 100 says yes, no, yes: 2 of 3 as expected; 200 says yes, yes, yes: 1 of 3.
    assert [row.values["domain"] for row in rows] == [0, 1, 2 / 3, 1 / 3]
    laid = benchmark.layout(samples, tmp_path / "laid")
    found = sorted(str(path.relative_to(laid)) for path in laid.rglob("*.mp4"))
    assert found == [f"seed-{seed}/scene_00{number}.mp4" for seed in (0, 5) for number in (1, 2)]
    (folder / "scene_002.png").unlink()
    with pytest.raises(ValueError, match="holds no scene_002.png, a first frame"):
        benchmark.prompts()


def test_pai_bench_layout_numbers_the_seeds(pai, tmp_path):
    benchmark = PaiBench(DataConfig(folder=str(pai)), VIDEO)
    tasks = benchmark.prompts()
    assert [task.category for task in tasks] == ["robot", "robot"]
    laid = benchmark.layout(make_samples(tasks, tmp_path / "clips", [1, 2, 3, 4]), tmp_path / "laid")
    assert sorted(path.name for path in laid.iterdir()) == [f"robot_{x}__{n}.mp4" for x in "ab" for n in (0, 1)]


def test_frames_are_as_many_as_the_official_sampling_takes():
    assert [frame_count(frames, 16, 2.0) for frames in (81, 49, 17, 3)] == [10, 6, 4, 3]
    assert frame_count(121, 24, 3.0) == 14 and frame_count(9, 8, 100.0) == 8


def test_what_is_missing_or_wrong_is_said(pai, tmp_path):
    for benchmark in (PaiBench(DataConfig(), VIDEO), EzsBench(DataConfig(), VIDEO)):
        assert [one.found for one in benchmark.requirements()] == [False, False]
        assert all(
            one.licence and one.remedy and ("run." in one.where or "vlm." in one.where)
            for one in benchmark.requirements()
        )
        with pytest.raises(ValueError, match=f"run.{benchmark.name}.folder is empty: get it with"):
            benchmark.prompts()
    benchmark = PaiBench(DataConfig(folder=str(pai)), VIDEO)
    assert benchmark.requirements()[0].found
    questions = pai / "vqa" / "robot_a.json"
    for record, message in [
        ({**ask(1, "yes"), "index2ans": {"A": "left"}}, "expects 'left' of .* not yes or no"),
        ({**ask(1, "yes"), "answer": "C"}, "has not uid, question, index2ans and an answer out of it"),
    ]:
        questions.write_text(json.dumps([record]), encoding="utf-8")
        with pytest.raises(ValueError, match=f"robot_a.json, question 1 {message}"):
            benchmark.prompts()
    questions.write_text("[]", encoding="utf-8")
    with pytest.raises(ValueError, match="has no list of questions"):
        benchmark.prompts()
    questions.unlink()
    with pytest.raises(ValueError, match="robot_a.json cannot be read as JSON"):
        benchmark.prompts()


def test_published_figures_are_shares():
    for benchmark in (PaiBench, EzsBench):
        assert benchmark.published and all(0.5 < one.values["domain"] < 1 for one in benchmark.published)
