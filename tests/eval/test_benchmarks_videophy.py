"""VideoPhy and VideoPhy-2, with small programs in place of their judges, which answer in the judges' own tables."""

import csv
import json
import re
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from eval.benchmarks.base import DataConfig, Sample
from eval.benchmarks.videophy import VideoPhy
from eval.benchmarks.videophy2 import VideoPhy2, VideoPhy2Config
from eval.judges import videocon_physics, videophy2
from eval.judges.external_tool import InstallationConfig, RatersConfig, ToolError
from train.clips import VideoConfig, write_clip

VIDEO = VideoConfig(height=16, width=16, num_frames=3, fps=8.0)
READ = """
import argparse, csv, json, os, sys
parser = argparse.ArgumentParser()
for name in ("input_csv", "output_csv", "output_folder", "checkpoint", "task", "batch_size"):
    parser.add_argument("--" + name)
arguments = parser.parse_args()
rows = list(csv.DictReader(open(arguments.input_csv, newline="")))
if arguments.checkpoint:
    answers = json.load(open(os.path.join(arguments.checkpoint, "answers.json")))
    open(os.path.join(arguments.checkpoint, "calls.txt"), "a").write("call" + chr(10))
    if answers == "crash":
        sys.exit(1)
"""
RATE = """
with open(arguments.output_csv, "w", newline="") as file:
    writer = csv.writer(file, lineterminator=chr(10))
    if arguments.task == "rule":
        writer.writerow(["", "videopath", "rule", "score"])
        for number, row in enumerate(rows):
            writer.writerow([number, row["videopath"], row["rule"], float(answers[row["rule"]])])
        sys.exit(0)
    writer.writerow(["", "caption", "videopath", "score"])
    for number, row in enumerate(rows):
        value = answers[row["caption"]][arguments.task == "pc"]
        writer.writerow([number, row["caption"], row["videopath"], float(value)])
"""
PREPARE = """
for name, text in (("sa_testing.csv", 'entail "%s"?'), ("physics_testing.csv", "physical laws?")):
    with open(os.path.join(arguments.output_folder, name), "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["videopath", "caption"])
        writer.writerows([row["videopath"], text.replace("%s", row["caption"])] for row in rows)
"""
ENTAIL = """
captions = {row["videopath"]: row["caption"][8:-2] for row in rows if row["caption"].startswith("entail")}
with open(arguments.output_csv, "a", newline="") as file:
    for row in rows:
        value = answers[captions[row["videopath"]]][row["caption"] == "physical laws?"]
        csv.writer(file).writerow([row["videopath"], row["caption"], value])
"""


class Installed(NamedTuple):
    folder: str
    raters: RatersConfig


@pytest.fixture
def installed(tmp_path):
    """Settings of an installation whose judges answer what is given to `answer`, and the folder of the data."""
    scripts = {videophy2.INFERENCE: RATE, videocon_physics.PREPARE: PREPARE, videocon_physics.INFERENCE: ENTAIL}
    for name, text in scripts.items():
        path = tmp_path / "checkout" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(READ + text, encoding="utf-8")
    for name in ("weights", "data"):
        (tmp_path / name).mkdir()
    rater = InstallationConfig(sys.executable, str(tmp_path / "checkout"), str(tmp_path / "weights"))
    return Installed(str(tmp_path / "data"), RatersConfig(rater, rater))


def build(kind, installed, **settings):
    config = (VideoPhy2Config if kind is VideoPhy2 else DataConfig)(folder=installed.folder, **settings)
    return kind(config, VIDEO, None, installed.raters)


def answer(installed, answers) -> None:
    (Path(installed.raters.videophy2.checkpoint) / "answers.json").write_text(json.dumps(answers), encoding="utf-8")


def calls(installed) -> int:
    return len((Path(installed.raters.videophy2.checkpoint) / "calls.txt").read_text(encoding="utf-8").splitlines())


def write_rows(path: Path, header: list[str], rows: list[list]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([header, *rows])


def make_samples(tasks, folder: Path) -> list[Sample]:
    samples = [Sample(task, 7, folder / f"{task.key}-7.mp4") for task in tasks]
    for sample in samples:
        write_clip(sample.path, torch.zeros(3, 16, 16, 3, dtype=torch.uint8), 8.0)
    return samples


def means(rows, columns) -> dict[str, float]:
    """Over the rows that have the column."""
    found = {name: [row.values[name] for row in rows if name in row.values] for name in columns}
    return {name: sum(values) / len(values) for name, values in found.items() if values}


# Five captions, the third and fifth hard; the table has two clips of the first and marks one of two of the third.
CAPTIONS = ["A ball falls.", "Wax melts, slowly.", "A man dives.", "Ice cracks", "A top spins."]
TABLE2 = [
    [CAPTIONS[0], "https://x/a.mp4", "0", "Object", "A red ball falls."],
    [CAPTIONS[0], "https://x/b.mp4", "0", "Object", "A red ball falls."],
    [CAPTIONS[1], "https://x/c.mp4", "False", "Object", "Wax melts in a pan."],
    [CAPTIONS[2], "https://x/d.mp4", "", "Activity", "A man dives into a pool."],
    [CAPTIONS[2], "https://x/e.mp4", "True", "Activity", "A man dives into a pool."],
    [CAPTIONS[3], "https://x/f.mp4", "0.0", "Object", "Ice cracks on a lake."],
    [CAPTIONS[4], "https://x/g.mp4", "1", "Object", "A top spins."],
]
HEADER2 = ["caption", "video_url", "is_hard", "category", "upsampled_caption"]


@pytest.fixture
def table2(installed):
    write_rows(Path(installed.folder) / "videophy2_test.csv", HEADER2, TABLE2)
    return installed


def test_videophy2_counts_ratings_of_4_and_5_on_all_and_on_hard_prompts(table2, tmp_path):
    # By hand: SA >= 4 for captions 0, 1, 2; PC >= 4 for 0, 2, 4; both for 0 and 2; hard are 2 and 4.
    ratings = [[4, 5], [5, 3], [4, 4], [3, 1], [1, 4]]
    answer(table2, dict(zip(CAPTIONS, ratings, strict=True)))
    benchmark = build(VideoPhy2, table2)
    benchmark.clips_a_call = 2
    tasks = benchmark.prompts()
    assert [task.text for task in tasks] == CAPTIONS and [task.facts["hard"] for task in tasks] == [0, 0, 1, 0, 1]
    assert [task.category for task in tasks] == ["Object", "Object", "Activity", "Object", "Object"]
    rows = list(benchmark.score(make_samples(tasks, tmp_path / "clips"), tmp_path / "scores"))
    assert [row.key for row in rows] == [task.key for task in tasks] and not any(row.error for row in rows)
    found = means(rows, benchmark.columns)
    assert found["semantic"] == found["physical"] == 3 / 5 and found["joint"] == 2 / 5
    assert found["hard_semantic"] == 1 / 2 and found["hard_physical"] == 1 and found["hard_joint"] == 1 / 2
    assert found["semantic_rating"] == 17 / 5 and found["physical_rating"] == 17 / 5
    assert "hard_joint" not in rows[0].values and set(rows[2].values) == {*benchmark.columns} - {"rules_followed"}
    assert calls(table2) == 2 * 3  # five clips, two a call, SA and PC
    assert list((tmp_path / "scores").iterdir()) == []


def test_videophy2_prompts_by_length(table2):
    upsampled = build(VideoPhy2, table2, upsampled=True).prompts()
    assert [task.text for task in upsampled][2::2] == ["A man dives into a pool.", "A top spins."]
    assert [task.facts["caption"] for task in upsampled] == CAPTIONS
    assert [task.key for task in upsampled] == [task.key for task in build(VideoPhy2, table2).prompts()]


def test_rules_of_the_table_are_judged_one_by_one(installed, tmp_path):
    """By hand: the first clip follows 2 of 3 rules that it shows, the second shows none, the third has no verdict."""
    header = ["caption", "is_hard", "physics_rules_followed", "physics_rules_unfollowed"]
    rows = [
        [CAPTIONS[0], 0, "['It falls.', \"It doesn't stop.\"]", "['It is round.']", "[]"],
        [CAPTIONS[0], 0, "['It is round.']", "", "['It casts a shadow.', 'It falls.']"],
        [CAPTIONS[1], 0, "[]", "['It drips.']", ""],
        [CAPTIONS[2], 1, "['He gets wet.']", "", ""],
    ]
    path = Path(installed.folder) / "videophy2_test.csv"
    write_rows(path, [*header, "physics_rules_cannot_be_determined"], rows)
    verdicts = {"It falls.": 1, "It doesn't stop.": 0, "It is round.": 1, "It casts a shadow.": 2, "It drips.": 2}
    answer(installed, dict.fromkeys(CAPTIONS[:3], [4, 3]) | verdicts | {"He gets wet.": 5})
    benchmark = build(VideoPhy2, installed, rules=True)
    tasks = benchmark.prompts()
    assert tasks[0].facts["rules"] == ["It falls.", "It doesn't stop.", "It is round.", "It casts a shadow."]
    found = list(benchmark.score(make_samples(tasks, tmp_path / "clips"), tmp_path / "scores"))
    assert found[0].values["rules_followed"] == pytest.approx(2 / 3) and found[0].values["semantic"] == 1
    assert "rules_followed" not in found[1].values and found[1].values["semantic_rating"] == 4
    assert "its verdict on the rule 'He gets wet.' is '5.0', not 0.0, 1.0 or 2.0" in found[2].error
    assert calls(installed) == 3
    rows[0][2] = "It falls."
    write_rows(path, [*header, "physics_rules_cannot_be_determined"], rows)
    with pytest.raises(ValueError, match="physics_rules_followed of 'A ball falls.' is no list"):
        benchmark.prompts()
    write_rows(path, header[:2], [row[:2] for row in rows])
    with pytest.raises(ValueError, match="has no column 'physics_rules_followed'"):
        benchmark.prompts()


def test_clips_without_a_rating_are_named_and_never_zero(table2, tmp_path):
    answer(table2, dict(zip(CAPTIONS, [[4, 5], [0, 5], [4, 4], [5, 5], [5, 5]], strict=True)))
    benchmark = build(VideoPhy2, table2)
    samples = make_samples(benchmark.prompts(), tmp_path / "clips")
    samples[2].path.unlink()
    samples[3].path.write_bytes(samples[3].path.read_bytes()[:200])
    rows = list(benchmark.score(samples, tmp_path / "scores"))
    assert [bool(row.error) for row in rows] == [False, True, True, True, False]
    assert all(
        not row.values and row.error.startswith(str(samples[index + 1].path)) for index, row in enumerate(rows[1:4])
    )
    assert "semantic rating is 0: the tool found none" in rows[1].error
    assert "no such file" in rows[2].error and "no video stream" in rows[3].error
    assert rows[4].values["hard_joint"] == 1
    answer(table2, "crash")
    with pytest.raises(ToolError, match="videophy2: VIDEOPHY2/inference.py exited with code 1"):
        list(benchmark.score(samples, tmp_path / "scores"))


def test_videophy_counts_scores_of_a_half_and_above(installed, tmp_path):
    rows = [
        ["https://x/1.mp4", CAPTIONS[0], "solid_solid", "lavie"],
        ["https://x/2.mp4", CAPTIONS[1], "solid_fluid", "pika"],
    ]
    rows += [
        ["https://x/3.mp4", CAPTIONS[0], "solid_solid", "pika"],
        ["https://x/4.mp4", CAPTIONS[3], "solid_solid", "pika"],
    ]
    header = ["video_url", "caption", "states_of_matter", "source"]
    write_rows(Path(installed.folder) / "videophy_test_public.csv", header, rows)
    # By hand: SA for 0 and 1, PC for 0 and 3 (0.5 counts), both for 0.
    answer(installed, {CAPTIONS[0]: [0.953125, 0.5], CAPTIONS[1]: [0.5, 0.4999], CAPTIONS[3]: [5.4e-06, 0.94140625]})
    benchmark = build(VideoPhy, installed)
    tasks = benchmark.prompts()
    assert [task.category for task in tasks] == ["solid_solid", "solid_fluid", "solid_solid"]
    found = list(benchmark.score(make_samples(tasks, tmp_path / "clips"), tmp_path / "scores"))
    mean = means(found, benchmark.columns)
    assert mean["semantic"] == mean["physical"] == 2 / 3 and mean["joint"] == 1 / 3
    assert mean["semantic_score"] == pytest.approx((0.953125 + 0.5 + 5.4e-06) / 3)
    assert calls(installed) == 1  # the weights are loaded once


@pytest.mark.parametrize(
    ("benchmark", "table", "header", "end"),
    [
        (VideoPhy, "example.csv", ["videopath", "caption"], "._7.mp4"),
        (VideoPhy2, "sa_pc.csv", ["caption", "videopath"], "_7.mp4"),
    ],
)
def test_the_layout_is_the_one_of_the_authors_examples(table2, tmp_path, benchmark, table, header, end):
    tasks = build(VideoPhy2, table2).prompts()
    samples = make_samples(tasks[:3], tmp_path / "clips")
    samples[2].path.unlink()
    for _ in range(2):  # again over what is there
        folder = build(benchmark, table2).layout(samples, tmp_path / "laid")
    with (folder / table).open(encoding="utf-8", newline="") as file:
        found = list(csv.reader(file))
    assert found[0] == header and len(found) == 3
    rows = [dict(zip(header, row, strict=True)) for row in found[1:]]
    assert [row["caption"] for row in rows] == CAPTIONS[:2]
    assert [Path(row["videopath"]).name for row in rows] == ["A_ball_falls" + end, "Wax_melts,_slowly" + end]
    assert all(Path(row["videopath"]).read_bytes() == samples[0].path.read_bytes() for row in rows)
    assert len(list((folder / "examples").iterdir())) == 2


def test_what_is_missing_is_said_with_where_to_get_it(table2):
    bare = VideoPhy2(VideoPhy2Config(), VIDEO)
    assert [one.found for one in bare.requirements()] == [False] * 3
    assert all(
        re.match(r"(run|raters)\.videophy2\.", one.where) and one.remedy and one.licence for one in bare.requirements()
    )
    assert all(one.found for one in build(VideoPhy2, table2).requirements())
    with pytest.raises(ValueError, match="run.videophy2.folder is empty: name the folder of videophy2_test.csv"):
        bare.prompts()
    with pytest.raises(ValueError, match="raters.videophy2.checkout is empty"):
        list(bare.score([], Path(table2.folder) / "scores"))
    with pytest.raises(ValueError, match="videophy_test_public.csv cannot be read as a table"):
        build(VideoPhy, table2).prompts()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("caption,is_hard\nA ball,maybe\n", "is_hard is 'maybe' for 'A ball', not 0 or 1"),
        ("caption\nA ball\n", "has no column 'is_hard'"),
        ("prompt,is_hard\nA ball,1\n", "has no column 'caption', found prompt, is_hard"),
        ("caption,is_hard\nA ball\n", "row 1, has not 2 fields"),
        ("caption,is_hard\n", "holds no captions"),
        ('caption,is_hard\n"A ball,1\n', "cannot be read as a table"),
    ],
)
def test_a_bad_table_is_refused(installed, text, message):
    (Path(installed.folder) / "videophy2_test.csv").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        build(VideoPhy2, installed).prompts()


def test_published_figures_are_shares_of_figures_that_are_printed():
    for benchmark in (VideoPhy, VideoPhy2):
        for one in benchmark.published:
            assert set(one.values) <= set(benchmark.figures) and all(0 <= value <= 1 for value in one.values.values())
