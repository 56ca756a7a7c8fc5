"""R-Bench on worked examples, against a stand-in for its judge; clone and data are small ones of the test's own."""

import io
import json

import numpy as np
import pytest
import torch
from PIL import Image

from eval.benchmarks import r_bench_questions as questions
from eval.benchmarks.base import Sample
from eval.benchmarks.r_bench import DIMENSIONS, RBench, RBenchConfig, pick
from eval.vlm.backend import VlmConfig
from tests.eval.vlm_stub import StubServer, media_of, question_of
from train.clips import VideoConfig, write_clip

pytestmark = pytest.mark.usefixtures("two_tries")

VIDEO = VideoConfig(height=16, width=16, num_frames=21, fps=8.0)
COMMON = "{view}|{description}|{manipulated_object}"
BLANKS = {
    "common_manipulation": "|{robotic_manipulator}",
    "spatial_relationship": "|{robotic_manipulator}|{spatial_text}|{obj1} {spatial} {obj2}",
    "multi-entity_collaboration": "|{entity1}|{entity2}",
    "long-horizon_planning": "|{robotic_manipulator}|{events_formatted}|{len(events_formatted)}",
    "visual_reasoning": "|{robotic_manipulator}|{questions}",
}
STABILITY = """
def analyze_phrase(phrase_1):
    if gripper:
        return f"{phrase_1} becomes a hand"
    elif hand:
        return f"{phrase_1} becomes human"
    elif robot:
        return f"{phrase_1} is gone"
    return ""

def process():
    if has_hand:
        Q1 = f"robot, look at the hand: {phrase_1}; E: {E1}"
    else:
        Q1 = f"robot: {phrase_1}; E: {E1}"
    Q2 = f"object: {phrase_2}"
"""
RECORD = {
    "view": "front",
    "robotic manipulator": "robot arms with grippers",
    "manipulated object": "cube",
    "entity1": "robot",
    "entity2": "child",
    "event_list": ["grasp", "lift"],
    "Spatial Relationship": {"spatial": "left of", "object1": "cup", "object2": "plate"},
}


def marks(first: str, second: str, *values: float) -> str:
    names = (first, second, "total")
    return "Here:\n" + json.dumps(
        {name: {"reason": "", "score": value} for name, value in zip(names, values, strict=True)}
    )


def answer(request) -> str:
    """What the judge says, by the prompt that stands in the question."""
    text = question_of(request)
    task = next((task for task, rule in questions.TASKS.items() if text.startswith(f"{task}:")), "")
    if task:
        values = {"fails": (1, 5, 1), "middling": (4, 3, 2.4), "good": (5, 4, 4.8), "low": (1, 0, 1)}
        chosen = next((value for word, value in values.items() if word in text), None)
        return marks(*questions.TASKS[task].decisive, *chosen) if chosen else "I cannot tell."
    if text.startswith("chain:"):
        return "1. Is it lifted?"
    if text.startswith(("plausible:", "adherent:")):
        return json.dumps({"reason": "", "score": {"plausible:": 4, "adherent:": "3"}[text.split()[0]]})
    letters = {"robot": "B" if "shaky" in text or "gripper" in text else "A", "object": "C"}
    return json.dumps({"option": "A", "explanation": "", "adjust": letters[text.split(":")[0].split(",")[0]]})


@pytest.fixture
def settings(tmp_path):
    """A clone and a data set: two prompts of each task, one of each embodiment."""
    clone, data = tmp_path / "clone", tmp_path / "data"
    for name in ("prompts", "imgs"):
        (data / name).mkdir(parents=True)
    (data / "imgs" / "0001.png").write_bytes(b"picture")
    scripts = {
        f"eval/5_tasks/{task}.py": f'def create_prompt(view):\n    return f"""{task}:{COMMON}{rest}"""\n'
        for task, rest in BLANKS.items()
    }
    scripts["eval/5_tasks/visual_reasoning.py"] += 'def create_question_chain(prompt):\n    return f"chain: {prompt}"\n'
    scripts["eval/5_tasks/spatial_relationship.py"] += (
        'def f():\n    spatial_text = ""\n    if info:\n        spatial_text = f"{obj1} is {spatial} {obj2}"\n'
    )
    for script, word in ((questions.PLAUSIBILITY, "plausible"), (questions.ADHERENCE, "adherent")):
        scripts[script] = f'def create_prompt(view):\n    return f"{word}: {{view}} {{description}}"\n'
    scripts[questions.STABILITY] = STABILITY
    for name, text in scripts.items():
        (clone / name).parent.mkdir(parents=True, exist_ok=True)
        (clone / name).write_text(text, encoding="utf-8")
    for dimension in DIMENSIONS:
        texts = ["It fails", "It is good"] if dimension in questions.TASKS else ["It walks"]
        records = [
            RECORD | {"name": f"{number:04d}", "prompt": text, "image_path": "0001.png"}
            for number, text in enumerate(texts, start=1)
        ]
        if dimension == "quad":
            records[0] |= {"robotic manipulator": "robot dog", "manipulated object": "None"}
        (data / "prompts" / f"{dimension}_prompts.json").write_text(json.dumps(records), encoding="utf-8")
    return {"folder": str(data), "checkout": str(clone)}


def judge(server, **changes) -> VlmConfig:
    return VlmConfig(base_url=server.url, model="stub", **changes)


def make_samples(tasks, folder) -> list[Sample]:
    frames = (10 * torch.arange(21))[:, None, None, None].expand(-1, 16, 16, 3).to(torch.uint8).contiguous()
    samples = [Sample(task, 4, folder / "tuned" / f"{task.key}-4.mp4") for task in tasks]
    for sample in samples:
        write_clip(sample.path, frames, 8.0)
    return samples


def means(rows, columns):
    found = {name: [row.values[name] for row in rows if name in row.values] for name in columns}
    return {name: np.array([np.mean(values)]) for name, values in found.items() if values}


def test_worked_example_of_all_dimensions(settings, tmp_path):
    """By hand.

    Tasks: (1, 5, total 1) gives max(min(3, 1), 1) = 1, so 0; (5, 4, total 4.8) gives min(4.5, 4.8) = 4.5, so .875.
    Each task .4375. Embodiments: plausibility 4 is .75, adherence 3 is .5, completion .625. Robot B and object C: 11 of
    15, stability 10 / 14; q = (.2 + .4) / 2 = .3; quality 10 / 14 - .3. The dog has no object, A alone: stability 1,
    quality 1.
    """
    with StubServer(answer) as server:
        benchmark = RBench(RBenchConfig(**settings), VIDEO, judge(server))
        tasks = benchmark.prompts()
        assert len(tasks) == 14 and tasks[0].key == "common-manipulation-0001" and tasks[-1].category == "humanoid"
        rows = list(benchmark.score(make_samples(tasks, tmp_path), tmp_path / "scores"))
        texts = [question_of(request) for request in server.requests]
    assert not any(row.error for row in rows)
    found = benchmark.derive(means(rows, benchmark.columns))
    quality = 10 / 14 - 0.3
    arm, dog = (0.625 + quality) / 2, (0.625 + 1) / 2
    assert found["tasks"] == pytest.approx([0.4375]) and found["visual_reasoning"] == pytest.approx([0.4375])
    assert found["single_arm"] == found["humanoid"] == pytest.approx([arm]) and found["quad"] == pytest.approx([dog])
    assert found["embodiments"] == pytest.approx([(3 * arm + dog) / 4])
    assert found["average"] == pytest.approx([(5 * 0.4375 + 3 * arm + dog) / 9])
    assert found["stability"] == pytest.approx([(3 * 10 / 14 + 1) / 4]) and found["plausibility"] == [0.75]
    assert tuple(found) == benchmark.figures
    robot = "robot arms with grippers"
    assert f"common_manipulation:front|It fails|cube|{robot}" in texts
    assert f"spatial_relationship:front|It fails|cube|{robot}|cup is left of plate|cup left of plate" in texts
    assert "multi-entity_collaboration:front|It is good|cube|robot|child" in texts
    assert f"long-horizon_planning:front|It is good|cube|{robot}|1) grasp\n2) lift|16" in texts
    assert "chain: It is good" in texts and f"visual_reasoning:front|It is good|cube|{robot}|1. Is it lifted?" in texts
    assert f"robot, look at the hand: {robot}; E: {robot} becomes a hand" in texts
    assert "robot: robot dog; E: robot dog is gone" in texts and "object: cube" in texts
    assert not media_of(server.requests[texts.index("chain: It is good")])


def test_motion_results_enter_visual_quality(settings, tmp_path):
    """.8 stability + .2 smoothness - still - change, by hand: .8 * 10 / 14 + .2 * .9 - (.1 - .04 + .1) - .3 for one."""
    results = tmp_path / "motion" / "tuned-4" / "dual_arm" / "motion" / "results.json"
    results.parent.mkdir(parents=True)
    records = [
        {"index": "0001", "motion_smoothness_score": 0.9, "perceptible_amplitude_robotic_manipulator": 0.04},
        {"index": "0002", "motion_smoothness_score": None, "perceptible_amplitude_robotic_manipulator": 0.2},
    ]
    results.write_text(json.dumps(records), encoding="utf-8")
    with StubServer(answer) as server:
        config = RBenchConfig(**settings, motion=str(tmp_path / "motion"))
        benchmark = RBench(config, VIDEO, judge(server))
        samples = make_samples(benchmark.prompts(), tmp_path)
        rows = {row.key: row for row in benchmark.score(samples, tmp_path / "scores")}
    expected = 0.8 * 10 / 14 + 0.2 * 0.9 - 0.16 - 0.3
    assert rows["dual-arm-0001"].values["visual_quality"] == pytest.approx(expected)
    assert rows["dual-arm-0001"].values["dual_arm"] == pytest.approx((0.625 + expected) / 2)
    assert "no motion results in" in rows["humanoid-0001"].error and not rows["humanoid-0001"].values


def test_an_answer_without_marks_is_an_error_that_names_the_question(settings, tmp_path):
    path = tmp_path / "data" / "prompts" / "common_manipulation_prompts.json"
    records = json.loads(path.read_text(encoding="utf-8"))
    records[0]["prompt"] = "Nobody knows"
    path.write_text(json.dumps(records), encoding="utf-8")
    with StubServer(answer) as server:
        benchmark = RBench(RBenchConfig(**settings), VIDEO, judge(server))
        samples = make_samples(benchmark.prompts()[:2], tmp_path)
        rows = list(benchmark.score(samples, tmp_path / "scores"))
    assert rows[0].error.startswith(f"{samples[0].path}: malformed: common_manipulation: the answer is no JSON")
    assert not rows[0].values and rows[1].values == {"common_manipulation": pytest.approx(0.875)}


@pytest.mark.parametrize(
    ("values", "score"), [((1, 5, 1), 0), ((4, 3, 2.4), 0.35), ((5, 4, 4.8), 0.875), ((1, 0, 1), 0), ((5, 5, 5), 1)]
)
def test_a_task_is_worth_its_decisive_aspects_or_its_total(values, score):
    assert questions.task_score(*values) == pytest.approx(score)


def test_stability_and_visual_quality_of_letters():
    points = {"AA": 15, "BA": 14, "CB": 11, "AE": 8, "DC": 5, "DD": 4, "EC": 3, "EE": 1, "B": 11, "E": 1}
    for letters, value in points.items():
        assert questions.stability(letters) == (value - 1) / 14
    assert questions.visual_quality(1.0, "AE", None) == 1  # the object's change alone takes nothing, as there
    assert questions.visual_quality(1.0, "BA", None) == questions.visual_quality(1.0, "B", None) == 0.8
    assert questions.visual_quality(0.1, "DE", (1.0, 1.0)) == 0
    assert [questions.still_penalty(amplitude) for amplitude in (0.0, 0.05, 0.07, 0.1)] == pytest.approx(
        [0.2, 0.05, 0.03, 0]
    )


def test_pictures_are_grids_of_the_frames_that_the_official_code_takes(settings):
    tasks = {task.category: task for task in RBench(RBenchConfig(**settings), VIDEO).prompts()}
    clip = (5 * torch.arange(41))[:, None, None, None].expand(-1, 16, 24, 3).to(torch.uint8)

    def greys(picture, rows, columns):
        image = np.asarray(Image.open(io.BytesIO(picture)).convert("L"))
        assert image.shape == (16 * rows, 24 * columns)
        return (image[8::16, 12::24] / 5).round().astype(int).ravel().tolist()

    # 16 of 41 frames: 0, 2, 5, 8, 10, 13, 16, 18, 21, 24, 26, 29, 32, 34, 37, 40; every third, or 0, 7 and 15 of them.
    (picture,) = pick(tasks["visual_reasoning"], clip)
    assert greys(picture, 3, 2) == [0, 8, 16, 24, 32, 40]
    (picture,) = pick(tasks["spatial_relationship"], clip)
    assert greys(picture, 1, 3) == [0, 18, 40]
    six, pair = pick(tasks["quad"], clip)
    assert greys(six, 3, 2) == [0, 8, 16, 24, 32, 40] and greys(pair, 1, 2) == [0, 30]
    assert greys(pick(tasks["quad"], clip[:6])[0], 3, 2) == [0, 1, 2, 3, 4, 5]


def test_layout_and_what_is_missing(settings, tmp_path):
    benchmark = RBench(RBenchConfig(**settings), VIDEO)
    samples = make_samples(benchmark.prompts()[:3], tmp_path)
    samples[1].path.unlink()
    laid = benchmark.layout(samples, tmp_path / "laid")
    found = sorted(str(path.relative_to(laid)) for path in laid.rglob("*.mp4"))
    assert found == [f"tuned-4/{name}/videos/0001.mp4" for name in ("common_manipulation", "spatial_relationship")]
    assert [one.found for one in benchmark.requirements()] == [True, True, False]
    bare = RBench(RBenchConfig(motion="nowhere"), VIDEO)
    assert [one.found for one in bare.requirements()] == [False] * 4
    with pytest.raises(ValueError, match="run.r_bench.folder is empty: get it with"):
        bare.prompts()
    with pytest.raises(ValueError, match="run.r_bench.checkout is empty: clone https"):
        list(bare.score([], tmp_path))
    (tmp_path / "data" / "imgs" / "0001.png").unlink()
    with pytest.raises(
        ValueError, match="0001.png, the first frame of 0001 in common_manipulation_prompts.json, is not"
    ):
        benchmark.prompts()
    (tmp_path / "clone" / questions.STABILITY).write_text('Q1 = Q2 = "one"\ndef analyze_phrase(): return "x"\n')
    with pytest.raises(ValueError, match="1_robot_subject_stability.py is another version than the one meant: clone"):
        list(benchmark.score([], tmp_path))


def test_published_averages_are_the_means_of_their_nine_dimensions():
    """Within the rounding of the printed figures."""
    for one in RBench.published:
        nine = [one.values[name] for name in DIMENSIONS]
        assert one.values["average"] == pytest.approx(np.mean(nine), abs=0.002), one.model
