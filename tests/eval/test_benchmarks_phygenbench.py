"""PhyGenBench on worked examples, against a stand-in for its judge, with a small clone of the test's own."""

import base64
import io
import json
import math

import pytest
import torch
from PIL import Image, ImageStat

from eval.benchmarks import phygenbench
from eval.benchmarks.base import DataConfig, Sample
from eval.benchmarks.official_prompts import prompts
from eval.benchmarks.phygenbench import PhyGenBench
from eval.vlm.backend import VlmConfig
from tests.eval.vlm_stub import Response, StubServer, media_of, question_of
from train.clips import VideoConfig, write_clip

VIDEO = VideoConfig(height=16, width=16, num_frames=33, fps=8.0)  # frame n has the grey level 4 n
ORDER = """
pretrix = "Answer in Format. "
for i in range(2):
    try:
        question1 = "Do these fit?\\n" + f"Description: {description1}" + f"\\n{pretrix}"
        raise SystemExit("this file is never run")
    except KeyError:
        question1 = "Do these fit?\\n" + f"Description: {description1}" + f"\\n{pretrix}"
"""
NATURALNESS = '''
prompt = """Choose a description."""
input_prompt = f"""
Prompt:{data_tmp['caption']}
Law:{data_tmp['physical_laws']}
Completely Fantastical:{data_tmp['video_question']['Description1']}
Highly Unrealistic:{data_tmp['video_question']['Description2']}
Slightly Unrealistic:{data_tmp['video_question']['Description4']}
Almost Realistic:{data_tmp['video_question']['Description5']}
"""
'''
CAPTIONS = ["A ball sinks.", "Ice melts.", "Light bends."]
MAIN = ["Force", "Chemical Properties", "Light"]
STATEMENTS = [
    [("the moment of 40", "probable", "improbable"), ("Last Frame", "fairly sure", "improbable")],
    [("any moment", "less sure", "least sure")],
    [("Last Frame", "fairly sure", "improbable")],
]
MOMENTS = ["Middle Frame", "any moment", "Middle Frame"]
# How surely a picture shows a text, by the text.
SURE = {"probable": 0.6, "improbable": 0.2, "fairly sure": 0.7, "less sure": 0.3, "least sure": 0.5, "any moment": 0.5}


def levels(request) -> list[float]:
    pictures = (base64.b64decode(url.split(",", 1)[1]) for url in media_of(request))
    return [ImageStat.Stat(Image.open(io.BytesIO(picture)).convert("L")).mean[0] for picture in pictures]


def answer(request):
    text = question_of(request)
    if request.get("logprobs"):
        shown = text.split('"')[1]
        if shown == "the moment of 40":
            share = 0.9 if abs(levels(request)[0] - 40) < 3 else 0.1
        else:
            share = SURE[shown]
        return Response("Yes", first_token=[("Yes", math.log(share)), ("No", math.log(1 - share))])
    if text.startswith("Do these fit?"):
        description = text.split("Description: ")[1].split("\n")[0]
        return f'```json\n{{"Choice": "{description.split()[-1]}", "Reason": "as told"}}\n```'
    chosen = {"A ball sinks.": "Highly Unrealistic", "Ice melts.": "Almost Realistic: best"}
    return json.dumps({"Choice": chosen.get(text.split("Prompt:")[1].split("\n")[0], "?"), "Reason": ""})


@pytest.fixture
def clone(tmp_path):
    """Three prompts. What the judge says to a description of the order is that description's last word."""
    folder = tmp_path / "clone"
    for name, text in ((phygenbench.ORDER, ORDER), (phygenbench.NATURALNESS, NATURALNESS)):
        (folder / name).parent.mkdir(parents=True)
        (folder / name).write_text(text, encoding="utf-8")
    pairs = [("first Yes", "then No"), ("first yes.", "then No"), ("first Yes", "then Perhaps")]
    explicit = ["all Yes", "all No", "all Yes"]
    files = {
        name: [] for name in ("prompts", "explicit_prompts", "single_question", "multi_question", "video_question")
    }
    for index, caption in enumerate(CAPTIONS):
        statements = [
            {"Retrieval Prompt": moment, "Statement": statement, "Antonym": antonym}
            for moment, statement, antonym in STATEMENTS[index]
        ]
        question = {
            "Retrieval Prompt": MOMENTS[index],
            "Description1": pairs[index][0],
            "Description2": pairs[index][1],
        }
        files["prompts"].append({"caption": caption, "physical_laws": "law", "main_category": MAIN[index]})
        files["explicit_prompts"].append({"caption": caption, "explicit_caption": explicit[index]})
        files["single_question"].append({"caption": caption, "singleimage_question": statements})
        files["multi_question"].append({"caption": caption, "multiimage_question": question})
        descriptions = {f"Description{number}": f"words {number}" for number in (1, 2, 3, 4)}
        files["video_question"].append({"caption": caption, "video_question": descriptions})
    (folder / "PhyGenBench").mkdir()
    for name, records in files.items():
        (folder / "PhyGenBench" / f"{name}.json").write_text(json.dumps(records), encoding="utf-8")
    return folder


def make_samples(tasks, folder) -> list[Sample]:
    frames = (4 * torch.arange(33))[:, None, None, None].expand(-1, 16, 16, 3).to(torch.uint8).contiguous()
    samples = [Sample(task, 3, folder / f"{task.key}-3.mp4") for task in tasks]
    for sample in samples:
        write_clip(sample.path, frames, 8.0)
    return samples


def test_worked_examples(clone, tmp_path, monkeypatch):
    """Stages by hand.

    A ball sinks. Moment: r = .9 at grey 40, .1 elsewhere; s / (s + a) = .6 / .8 = .75; best 1.65. Last frame: .7. Sum
    2.35, above 2.25: 3. Order, with the middle frame: yes, no, yes: 2. Highly unrealistic: 1. Score round(6 / 3) = 2.

    Ice melts. One statement, r = .5 everywhere: .5 + .3 / .8 - .5 = .375: 1. Order, with a moment: .5 + yes = 1.5
    counts, .5 + no does not, nor for all frames: 1. Almost realistic: 3. Score round(5 / 3) = 2.

    Light bends. Its second question gets no answer: no row.
    """
    monkeypatch.setattr("eval.vlm.client.RETRIES", 0)
    with StubServer(answer) as server:
        config = VlmConfig(base_url=server.url, model="stub", concurrency=2)
        benchmark = PhyGenBench(DataConfig(folder=str(clone)), VIDEO, config)
        tasks = benchmark.prompts()
        assert [task.category for task in tasks] == ["mechanics", "material", "optics"]
        rows = list(benchmark.score(make_samples(tasks, tmp_path / "clips"), tmp_path / "scores"))
    stages = {"detection": 1, "order": 2 / 3, "naturalness": 1 / 3}
    assert rows[0].values == {"average": 2 / 3, "mechanics": 2 / 3, **stages}
    stages = {"detection": 1 / 3, "order": 1 / 3, "naturalness": 1}
    assert rows[1].values == {"average": 2 / 3, "material": 2 / 3, **stages}
    assert not rows[2].values and "order, question 2: the choice is 'perhaps', not yes or no" in rows[2].error
    asked = [(question_of(request), levels(request)) for request in server.requests]
    shown = {text.split('"')[1]: [] for text, _ in asked if '"' in text and "figure" in text}
    for text, grey in asked:
        if "figure" in text:
            shown[text.split('"')[1]] += [round(grey[0])]
    near = lambda numbers: pytest.approx(numbers, abs=2)  # noqa: E731
    assert shown["probable"] == shown["improbable"] == near([32, 36, 40, 44, 48])  # two on either side
    assert len(shown["the moment of 40"]) == 32 and shown["fairly sure"] == near([128])  # asked once for two clips
    order = {text.split("Description: ")[1]: grey for text, grey in asked if "Description: " in text}
    assert order["first Yes\nAnswer in Format. "] == near([0, 64]) and order["then No\nAnswer in Format. "]
    assert order["all Yes\nAnswer in Format. "] == near([0, 64, 128])
    assert order["all No\nAnswer in Format. "] == near([0, 0, 0, 4, 128])  # the moment's frame twice
    natural = next(grey for text, grey in asked if "Prompt:Ice melts." in text)
    assert len(natural) == 26 and natural == near([4 * number for number in range(26)])
    text = next(text for text, _ in asked if "Prompt:Ice melts." in text)
    assert text.startswith("Choose a description.\nPrompt:Ice melts.\nLaw:law\n")
    assert "Slightly Unrealistic:words 3\nAlmost Realistic:words 4" in text


def test_levels_are_cut_where_the_official_code_cuts():
    assert [phygenbench.level_of_one(score) for score in (0, 0.24, 0.25, 0.5, 0.74, 0.75, 1.9)] == [0, 0, 1, 2, 2, 3, 3]
    assert [phygenbench.level_of_two(total) for total in (0.5, 1, 1.1, 1.5, 2.25, 2.26)] == [0, 0, 1, 1, 2, 3]
    stages = ((3, 0, 1), (3, 1, 1), (3, 0, 2), (0, 0, 1), (3, 3, 2))
    assert [phygenbench.overall(*one) for one in stages] == [1, 2, 2, 0, 3]


def test_layout_and_what_is_missing(clone, tmp_path):
    benchmark = PhyGenBench(DataConfig(folder=str(clone)), VIDEO)
    samples = make_samples(benchmark.prompts(), tmp_path / "clips")
    samples[1].path.unlink()
    laid = benchmark.layout(samples, tmp_path / "laid")
    assert sorted(path.name for path in (laid / "seed-3").iterdir()) == ["output_video_1.mp4", "output_video_3.mp4"]
    assert [one.found for one in benchmark.requirements()] == [True, False]
    bare = PhyGenBench(DataConfig(), VIDEO)
    assert [one.found for one in bare.requirements()] == [False, False]
    with pytest.raises(ValueError, match="run.phygenbench.folder is empty: clone https://github.com/OpenGVLab/Phy"):
        bare.prompts()
    path = clone / "PhyGenBench" / "multi_question.json"
    records = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(records[::-1]), encoding="utf-8")
    with pytest.raises(ValueError, match="multi_question.json has not the captions of prompts.json in their order"):
        benchmark.prompts()
    del records[1]["multiimage_question"]["Description2"]
    path.write_text(json.dumps(records), encoding="utf-8")
    with pytest.raises(ValueError, match="prompt 2 of PhyGenBench lacks or does not know 'Description2'"):
        benchmark.prompts()
    (clone / phygenbench.ORDER).unlink()
    with pytest.raises(ValueError, match="GPT4o.py cannot be read as Python .* clone https"):
        list(benchmark.score(samples, tmp_path / "scores"))


def test_official_prompts_are_read_and_never_run(tmp_path):
    path = tmp_path / "theirs.py"
    path.write_text(
        'raise SystemExit\n\ndef ask(a):\n    if a:\n        return f"Is {a} {b[0]}?"\n'
        '    return "No" + a + f"{len(a)}"\nother = 3\n',
        encoding="utf-8",
    )
    first, second = prompts(path, "ask", "get it again")
    assert first.fill({"a": "it", "b[0]": "so"}) == "Is it so?"
    assert second.fill({"a": "pe", "len(a)": "2"}) == "Nope2"
    with pytest.raises(
        ValueError, match=r"theirs.py, line 5: the prompt has the blank 'b\[0\]', which is not known here"
    ):
        first.fill({"a": "it"})
    with pytest.raises(ValueError, match="theirs.py has no text 'other': get it again"):
        prompts(path, "other", "get it again")


def test_published_figures_are_of_figures_that_are_printed():
    assert all(set(one.values) <= set(PhyGenBench.figures) for one in PhyGenBench.published)
