"""Sources: what is fatal, what is dropped, what comes out, of every kind; and the judge's table. Much of it hostile."""

import io
import json
import os
import resource
import struct
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from data_pipeline import tables
from data_pipeline.frames import FrameReader, clip_identity
from data_pipeline.manifests import MAX_KEY, MAX_TEXT, Row, read_manifest, safe_key
from data_pipeline.scores import loser_scores, read_scores
from data_pipeline.sources import open_sources
from data_pipeline.stages.pool import read_pool
from data_pipeline.tables import Dropped
from train.clips import ClipError, VideoConfig, read_clip, write_clip

VIDEO = VideoConfig(32, 32, 9, 8.0)


def csv_manifest(tmp_path, text: str | bytes):
    path = tmp_path / "clips.csv"
    path.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8"))
    return list(read_manifest(path, num_losers=2))


def jsonl_manifest(tmp_path, *lines):
    path = tmp_path / "clips.jsonl"
    text = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
    path.write_text(text, encoding="utf-8")
    return list(read_manifest(path, num_losers=2))


def pool(manifest, *, table_rows=100, num_losers=2, video=VIDEO):
    """All rows of some sources: kept, dropped, as dicts."""
    sources = open_sources(manifest, num_losers=num_losers, video=video, seed=0)
    pieces = list(read_pool(sources, table_rows))
    assert all(len(kept) + len(dropped) == table_rows for kept, dropped in pieces[:-1])
    return tuple([row for piece in pieces for row in piece[side].to_pylist()] for side in (0, 1))


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """A good clip of 9 frames."""
    path = tmp_path_factory.mktemp("clip") / "good.mp4"
    frames = torch.randint(0, 255, (9, 32, 32, 3), generator=torch.Generator().manual_seed(0)).byte()
    write_clip(path, frames, 8)
    return path


def test_csv_with_all_columns(tmp_path, capsys):
    text = (
        "clip,prompt,key,start,action,physics_richness,semantic,physical,camera\n"
        'a.mp4,"A ball, red, falls",ball,1.5,falling,0.8,0.25,1,static\n'
        "/data/b.mp4, Eine Kugel rollt — schnell ,,,,,,,\n"
    )
    first, second = csv_manifest(tmp_path, text)
    place = json.dumps({"file": str(tmp_path / "clips.csv"), "row": 1})
    path = str(tmp_path / "a.mp4")
    scores = [[0.25, 1.0]]
    assert first == Row("ball", "a.mp4", path, "A ball, red, falls", 1.5, "falling", 0.8, scores, "manifest", place)
    assert (second.prompt, second.start, second.action, second.physics_richness, second.scores) == (
        "Eine Kugel rollt — schnell",
        0.0,
        "",
        None,
        None,
    )
    assert second.path == "/data/b.mp4"
    assert "columns of" in (printed := capsys.readouterr().out) and printed.endswith("not read: camera\n")


def test_derived_keys_depend_on_the_row_not_on_its_place(tmp_path):
    one = csv_manifest(tmp_path, "clip,prompt\na.mp4,A\nb.mp4,B\n")
    other = csv_manifest(tmp_path, "prompt,clip\nB,b.mp4\nA,a.mp4\n")
    assert [row.key for row in one] == [row.key for row in reversed(other)]
    assert len({row.key for row in one}) == 2


def test_a_byte_order_mark_and_windows_line_ends_are_no_problem(tmp_path):
    manifest = csv_manifest(tmp_path, b"\xef\xbb\xbfclip,prompt\r\na.mp4,A\r\n\r\nb.mp4,B\r\n")
    assert [row.clip for row in manifest] == ["a.mp4", "b.mp4"]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("a.mp4,,,,,", "empty prompt"),
        ("a.mp4,   ,,,,", "empty prompt"),
        (",A ball,,,,", "missing"),
        ("a.mp4,A ball,,-1,,", "bad number"),
        ("a.mp4,A ball,,soon,,", "bad number"),
        ("a.mp4,A ball,,inf,,", "bad number"),
        ("a.mp4,A ball,,,nan,0.5", "bad score"),
        ("a.mp4,A ball,,,0.5,1.01", "bad score"),
        ("a.mp4,A ball,,,0.5,", "bad score"),
        ("a.mp4," + "A ball. " * 12_500 + ",,,,", "too long"),
        ("a.mp4," + "A" * 200_000 + ",,,,", "too long"),
        ("a.mp4,A ball, which falls,,,,", "malformed row"),
        ("a.mp4", "malformed row"),
        (b"a.mp4,Ein B\xe4ll,,,,", "not UTF-8"),
        (b"\xff.mp4,A ball,,,,", "not UTF-8"),
        (b"a.mp4,A\0 ball,,,,", "not UTF-8"),
    ],
)
def test_a_bad_csv_row_is_quarantined_and_the_others_are_kept(tmp_path, line, reason):
    line = line if isinstance(line, bytes) else line.encode("utf-8")
    text = b"clip,prompt,key,start,semantic,physical\na.mp4,A,first,,,\n" + line + b"\nb.mp4,B,last,,,\n"
    before, bad, after = csv_manifest(tmp_path, text)
    assert (before.key, after.key, json.loads(after.place)["row"]) == ("first", "last", 3)
    assert isinstance(bad, Dropped) and json.loads(bad.place)["row"] == 2
    assert bad.reason == reason and bad.detail
    json.dumps([bad.clip, bad.key, bad.detail], ensure_ascii=False).encode("utf-8")  # can be reported


def test_too_few_and_too_many_fields_are_told_apart_and_the_clip_is_named(tmp_path):
    many, few, one = csv_manifest(tmp_path, "key,clip,prompt\nk,a.mp4,A ball, falls\nk,b.mp4\nk\n")
    assert (many.clip, many.detail) == ("a.mp4", "4 fields for 3 columns: quote fields that hold a comma")
    remedy = "write every column's comma, also before an empty field"
    assert (few.clip, few.detail) == ("b.mp4", f"2 fields for 3 columns: {remedy}")
    assert (one.clip, one.detail) == ("", f"1 field for 3 columns: {remedy}")


def test_a_spreadsheets_blank_rows_and_columns_are_none(tmp_path):
    text = "clip,prompt,key,,\n,,,,\na.mp4,A,,,\n  , ,,,\n   \nb.mp4,nan,,\nc.mp4,C,k,x,\n"
    first, second, stray = csv_manifest(tmp_path, text)
    assert [(row.clip, row.prompt) for row in (first, second)] == [("a.mp4", "A"), ("b.mp4", "nan")]
    assert (stray.clip, stray.reason) == ("c.mp4", "malformed row")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"clip;prompt\na.mp4;A\n", "clips.csv: the fields are separated by semicolons: save it with commas"),
        (b'"clip";"prompt"\n"a.mp4";"A, B"\n', "the fields are separated by semicolons: save it with commas"),
        (b"clip\tprompt\na.mp4\tA\n", "the fields are separated by tabs: save it with commas"),
        ("clip,prompt\na.mp4,A\n".encode("utf-16"), "is UTF-16, or no text: save it as UTF-8 .in Excel as CSV UTF-8"),
        ("clip,prompt\na.mp4,A\n".encode("utf-16-le"), "is UTF-16, or no text: save it as UTF-8"),
        (b"video,caption\n", "rename the column 'video' to 'clip', rename the column 'caption' to 'prompt'"),
        (b"file_name,text\n", "rename the column 'file_name' to 'clip', rename the column 'text' to 'prompt'"),
        (b"Path,prompt\n", "rename the column 'Path' to 'clip'"),
        (b"Clip,clip,prompt\n", "has the column 'clip' twice: remove one"),
    ],
)
def test_tables_of_another_form_are_named(tmp_path, content, message):
    with pytest.raises(ValueError, match=message):
        csv_manifest(tmp_path, content)


def test_column_names_may_be_in_capitals(tmp_path):
    (row,) = csv_manifest(tmp_path, "Clip, PROMPT ,Camera\na.mp4,A,x\n")
    assert (row.clip, row.prompt) == ("a.mp4", "A")
    (row,) = jsonl_manifest(tmp_path, {"Clip": "a.mp4", "Prompt": "A"})
    assert (row.clip, row.prompt) == ("a.mp4", "A")
    pq.write_table(pa.table({"Clip": ["a.mp4"], "PROMPT": ["A"]}), tmp_path / "clips.parquet")
    (row,) = read_manifest(tmp_path / "clips.parquet", num_losers=2)
    assert (row.clip, row.prompt) == ("a.mp4", "A")
    _, doubled = jsonl_manifest(tmp_path, {"clip": "a", "prompt": "A"}, {"clip": "b.mp4", "prompt": "A", "Prompt": "B"})
    assert (doubled.reason, doubled.detail) == ("malformed row", "not a JSON object: prompt twice")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), True, False, 12, 1.5, ["A"], {"a": "A"}])
def test_what_is_no_text_becomes_no_prompt_and_no_clip(tmp_path, value):
    good = {"clip": "a.mp4", "prompt": "A"}
    manifest = jsonl_manifest(tmp_path, good, good | {"prompt": value}, good | {"clip": value})
    for row, name in zip(manifest[1:], ("prompt", "clip"), strict=True):
        assert (row.reason, row.detail) == ("malformed row", f"{name} must be text in quotes, not {value}")


def test_numbers_and_nothing_in_a_parquet_file_become_no_prompts(tmp_path):
    table = {"clip": ["a.mp4", "b.mp4"], "prompt": [1.5, None]}
    pq.write_table(pa.table(table), tmp_path / "clips.parquet")
    rows = list(read_manifest(tmp_path / "clips.parquet", num_losers=2))
    assert [(row.clip, row.reason) for row in rows] == [("a.mp4", "malformed row"), ("b.mp4", "empty prompt")]


def test_a_key_or_an_action_may_be_a_whole_number(tmp_path):
    row = {"clip": "a.mp4", "prompt": "A", "key": 7, "action": 3}
    good, true = jsonl_manifest(tmp_path, row, row | {"key": True})
    assert (good.key, good.action) == ("7", "3") and true.reason == "malformed row"


@pytest.mark.parametrize(
    "scores",
    ["[[1" + "0" * 400 + ", 0.5], [0, 1]]", "[[true, 0.5], [0, 1]]", '["01", "10"]', '[{"a": 0, "b": 1}, [0, 1]]'],
)
def test_scores_that_are_no_numbers_spoil_their_row_only(tmp_path, scores):
    row = '{"clip": "a.mp4", "prompt": "A", "scores": [[0, 1], [1, 0]]}'
    bad, good = jsonl_manifest(tmp_path, row.replace("[[0, 1], [1, 0]]", scores), row)
    assert (bad.clip, bad.reason) == ("a.mp4", "bad score") and good.scores == [[0.0, 1.0], [1.0, 0.0]]


@pytest.mark.parametrize(
    ("clip", "message"),
    [
        ("https://x.org/a.mp4", "is an address: only local files are read, so download it"),
        ("s3://bucket/a.mp4", "is an address"),
        ("C:\\clips\\a.mp4", "is a Windows path"),
        ("\\\\server\\a.mp4", "is a Windows path"),
        ("$HOME/a.mp4", "begins with a variable: write the path out"),
    ],
)
def test_names_of_other_machines_are_refused_at_once(tmp_path, clip, message):
    (row,) = csv_manifest(tmp_path, f"clip,prompt\n{clip},A\n")
    assert (row.clip, row.reason) == (clip, "not supported") and row.detail.startswith(f"{clip} {message}")
    with pytest.raises(ValueError, match=f"pipeline.manifest=.* {message}"):
        open_sources([clip], num_losers=2, video=VIDEO, seed=0)


def test_a_home_folder_is_found(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "sub").mkdir()
    write_csv(tmp_path / "sub" / "clips.csv", "~/a.mp4")
    (row,) = pool("~/sub/clips.csv")[0]
    assert row["path"] == str(tmp_path / "a.mp4")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("a.json", "unknown format '.json': write one JSON object a line and name it .jsonl"),
        ("a.tsv", "unknown format '.tsv': save it with commas as .csv"),
        ("a.tar.gz", "unknown format '.gz': unpack it"),
        ("a.gif", "a.gif is a single clip: give its folder, with the prompt in a.txt, or a CSV that names it"),
        ("a", "unknown format '': use one of .csv, .jsonl, .parquet, a folder of clips, or .tar shards"),
    ],
)
def test_files_of_other_kinds_are_named_with_what_to_do(tmp_path, name, message):
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(ValueError, match=message):
        pool([str(tmp_path / name)])


@pytest.mark.parametrize("text", ['[{"clip": "a.mp4", "prompt": "A"}]', '{\n  "clip": "a.mp4",\n  "prompt": "A"\n}\n'])
def test_json_over_several_lines_is_named(tmp_path, text):
    with pytest.raises(ValueError, match="holds JSON over several lines: write one JSON object a line"):
        jsonl_manifest(tmp_path, text)


def test_a_clip_is_taken_once_however_its_path_is_spelt(tmp_path):
    (tmp_path / "clips").mkdir()
    spellings = ["clips/a.mp4", "./clips/a.mp4", f"{tmp_path}/clips/a.mp4", "clips/../clips//a.mp4"]
    write_csv(tmp_path / "a.csv", *spellings)
    kept, dropped = pool([str(tmp_path / "a.csv")])
    assert [row["clip"] for row in kept] == spellings[:1]
    assert [row["clip"] for row in dropped] == spellings[1:]
    assert {(row["reason"], row["detail"]) for row in dropped} == {
        ("duplicate clip", "same clip, prompt and start as row 1")
    }
    (tmp_path / "b.csv").write_text("clip,prompt,start\na.mp4,A,0\na.mp4,A,1\na.mp4,B,0\na.mp4,A,1.0\n")
    kept, dropped = pool([str(tmp_path / "b.csv")])
    assert len(kept) == 3 and [row["detail"] for row in dropped] == ["same clip, prompt and start as row 2"]
    kept, dropped = pool([str(tmp_path / "b.csv"), f"{tmp_path}/clips/../b.csv"])
    assert len(kept) == 3
    assert dropped[1]["detail"] == "same clip, prompt and start as row 1 (counted over all sources)"


def test_jsonl_rows(tmp_path):
    row = {"clip": "a.mp4", "prompt": "A", "key": "k", "start": 2}
    manifest = jsonl_manifest(
        tmp_path,
        {**row, "scores": [[0, 1], [0.5, 0.25]]},
        "",
        {**row, "key": "m", "semantic": 0.1, "physical": 0.2},
        {**row, "key": "n", "scores": [[0, 1]]},
        {**row, "key": "o", "scores": [[0, 1], [0, None]]},
        {**row, "key": "p", "scores": [[0, 1], [0.5, float("nan")]]},
        {**row, "key": "q", "prompt": ["A"]},
        {"clip": "a.mp4"},
        "{broken",
        "[1, 2]",
        '{"clip": "a.mp4", "prompt": "\\ud800"}',
    )
    good, pair, *bad = manifest
    assert good.scores == [[0.0, 1.0], [0.5, 0.25]] and good.start == 2.0
    assert pair.scores == [[0.1, 0.2]]
    assert [row.reason for row in bad] == [
        "bad score",
        "bad score",
        "bad score",
        "malformed row",
        "empty prompt",
        "malformed row",
        "malformed row",
        "not UTF-8",
    ]
    assert "2 pairs" in bad[0].detail


def test_missing_column_names_column_file_and_what_was_found(tmp_path):
    with pytest.raises(
        ValueError, match=r"clips\.csv has no column 'prompt'; found: clip, promt;.*did you mean 'prompt' by 'promt'"
    ):
        csv_manifest(tmp_path, "clip,promt\na.mp4,A\n")
    with pytest.raises(
        ValueError, match="no column 'clip'; found: prompt, video;.*rename the column 'video' to 'clip'"
    ):
        jsonl_manifest(tmp_path, {"prompt": "A", "video": "a.mp4"})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no rows"),
        ("clip,prompt\n", "no rows"),
        ("clip,clip,prompt\na,b,c\n", "column 'clip' twice"),
        ('clip,prompt\na.mp4,"never closed\nb.mp4,B\n', "not valid CSV"),
    ],
)
def test_fatal_manifests(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        csv_manifest(tmp_path, text)


def test_manifest_that_is_not_there_or_of_unknown_kind(tmp_path):
    with pytest.raises(ValueError, match="pipeline.manifest=.*no such file"):
        open_sources(str(tmp_path / "none.csv"), num_losers=2, video=VIDEO, seed=0)
    (tmp_path / "clips.xlsx").write_bytes(b"PK")
    with pytest.raises(ValueError, match="unknown format '.xlsx': save it as CSV UTF-8"):
        pool(str(tmp_path / "clips.xlsx"))


def test_parquet_rows_are_those_of_the_same_csv(tmp_path):
    rows = [
        {"clip": "a.mp4", "prompt": "A", "key": "k", "start": 1.5, "scores": [[0.0, 1.0], [0.5, 0.25]], "camera": 1},
        {"clip": "b.mp4", "prompt": "B", "key": None, "start": None, "scores": None, "camera": 2},
        {"clip": "c.mp4", "prompt": None, "key": None, "start": float("nan"), "scores": None, "camera": 3},
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "clips.parquet")
    first, second, third = read_manifest(tmp_path / "clips.parquet", num_losers=2)
    assert (first.key, first.start, first.scores) == ("k", 1.5, [[0.0, 1.0], [0.5, 0.25]])
    assert second.key == csv_manifest(tmp_path, "clip,prompt\nb.mp4,B\n")[0].key
    assert third.reason == "empty prompt"
    pq.write_table(pa.table({"clip": ["a"], "caption": ["A"]}), tmp_path / "clips.parquet")
    with pytest.raises(ValueError, match="no column 'prompt'; found: clip, caption"):
        list(read_manifest(tmp_path / "clips.parquet", num_losers=2))
    (tmp_path / "clips.parquet").write_bytes(b"PAR1 but not really")
    with pytest.raises(ValueError, match="not a readable Parquet file"):
        list(read_manifest(tmp_path / "clips.parquet", num_losers=2))
    pq.write_table(pa.table({"clip": [b"\xff"], "prompt": ["A"]}), tmp_path / "clips.parquet")
    assert [row.reason for row in read_manifest(tmp_path / "clips.parquet", num_losers=2)] == ["malformed row"]


def test_a_key_is_taken_once_over_all_sources_and_pieces(tmp_path):
    (tmp_path / "a.csv").write_text("clip,prompt,key\n1,A,one\n2,B,two\n3,C,one\n", encoding="utf-8")
    (tmp_path / "b.jsonl").write_text('{"clip": "4", "prompt": "D", "key": "two"}\n', encoding="utf-8")
    kept, dropped = pool([str(tmp_path / "a.csv"), str(tmp_path / "b.jsonl")], table_rows=2)
    assert [row["key"] for row in kept] == ["one", "two"]
    assert [(row["key"], row["reason"]) for row in dropped] == [("one", "duplicate key"), ("two", "duplicate key")]
    assert dropped[0]["detail"] == "key 'one' is that of row 1" and json.loads(dropped[1]["place"])["row"] == 1
    two_seconds = VideoConfig(32, 32, 9, 4.0)
    joined = pool(f"{tmp_path / 'a.csv'}, sandbox:ramp:2", video=two_seconds)[0]
    assert [row["source"] for row in joined] == ["manifest"] * 2 + ["sandbox"] * 2
    assert pool([str(tmp_path / "a.csv"), "sandbox:ramp:2"], video=two_seconds)[0] == joined
    (tmp_path / "c,d.csv").write_text("clip,prompt\n1,A\n", encoding="utf-8")
    assert len(pool(str(tmp_path / "c,d.csv"))[0]) == 1


# ---- folders ---------------------------------------------------------------------------------------------------------


def test_a_folder_of_clips_with_captions_beside_them(tmp_path, clip):
    (tmp_path / "sub").mkdir()
    for name in ("b.mp4", "a.mp4", "sub/c.MKV", "d.mp4", "e.mp4", "f.mp4", "g.mp4", "h.mp4", "i.mp4"):
        (tmp_path / name).write_bytes(clip.read_bytes())
    (tmp_path / "a.txt").write_text("\ufeffA ball falls\n", encoding="utf-8")
    (tmp_path / "b.json").write_text('{"caption": "B", "action": "roll", "start": 0.5, "scores": 3}', encoding="utf-8")
    (tmp_path / "sub" / "c.txt").write_text("overruled", encoding="utf-8")
    (tmp_path / "sub" / "c.json").write_text('{"prompt": "C", "clip": "/etc/passwd", "source": "x"}', encoding="utf-8")
    (tmp_path / "e.txt").write_bytes(b"\xff\xfe")
    (tmp_path / "f.json").write_text("[1]", encoding="utf-8")
    (tmp_path / "g.json").write_text("{", encoding="utf-8")
    (tmp_path / "h.txt").write_text(" ", encoding="utf-8")
    (tmp_path / "i.txt").write_text("A" * (1 << 21), encoding="utf-8")
    kept, dropped = pool(str(tmp_path))
    assert [(row["key"], row["prompt"], row["clip"]) for row in kept[:2]] == [
        ("a", "A ball falls", "a.mp4"),
        ("b", "B", "b.mp4"),
    ]
    assert (kept[1]["action"], kept[1]["start"], kept[1]["scores"]) == ("roll", 0.5, None)
    assert (kept[2]["prompt"], kept[2]["path"]) == ("C", str(tmp_path / "sub" / "c.MKV"))
    reasons = ["no caption", "not UTF-8", "malformed row", "malformed row", "empty prompt", "too long"]
    assert [row["reason"] for row in dropped] == reasons
    assert FrameReader(VIDEO, "cpu").read(kept[0]).shape == (9, 32, 32, 3)


def test_every_file_that_looks_like_a_clip_is_kept_or_listed_by_name(tmp_path, clip):
    endings = [
        "gif",
        "ts",
        "wmv",
        "mpg",
        "mpeg",
        "flv",
        "3gp",
        "m2ts",
        "mts",
        "ogv",
        "vob",
        "MOV",
        "asf",
        "mxf",
        "h264",
    ]
    for ending in endings:
        (tmp_path / f"{ending}.{ending}").write_bytes(clip.read_bytes())
        (tmp_path / f"{ending}.txt").write_text("A ball", encoding="utf-8")
    kept, dropped = pool(str(tmp_path))
    assert sorted(row["clip"] for row in kept) == sorted(f"{ending}.{ending}" for ending in endings) and not dropped
    for path in tmp_path.glob("*.txt"):
        path.unlink()
    (tmp_path / "gif.txt").write_bytes(b"\xe4")
    (tmp_path / "wmv.txt").write_bytes("A ball".encode("utf-16"))
    (tmp_path / "mpg.json").write_text("[1]", encoding="utf-8")
    (tmp_path / "flv.json").write_text('{"prompt": NaN}', encoding="utf-8")
    (tmp_path / "3gp.json").write_text('{"caption": 12}', encoding="utf-8")
    kept, dropped = pool(str(tmp_path))
    reasons = {row["clip"]: row["reason"] for row in dropped}
    found = {"gif.gif": "not UTF-8", "wmv.wmv": "not UTF-8", "mpg.mpg": "malformed row", "flv.flv": "malformed row"}
    found["3gp.3gp"] = "malformed row"
    assert not kept and reasons == dict.fromkeys((f"{ending}.{ending}" for ending in endings), "no caption") | found
    assert {row["detail"] for row in dropped if row["clip"] == "ts.ts"} == {"there is no ts.txt or ts.json beside it"}


def test_a_preview_beside_a_clip_does_not_take_its_place(tmp_path, clip):
    for name in ("a.gif", "a.mp4"):
        (tmp_path / name).write_bytes(clip.read_bytes())
    (tmp_path / "a.txt").write_text("A ball", encoding="utf-8")
    kept, dropped = pool(str(tmp_path))
    assert [row["clip"] for row in kept] == ["a.mp4"]
    assert [(row["clip"], row["detail"]) for row in dropped] == [("a.gif", "key 'a' is that of row 1")]


def test_what_systems_leave_beside_clips_is_skipped_by_name(tmp_path, clip):
    (tmp_path / "data").mkdir()
    for name in ("a.mp4", "._a.mp4", ".b.mp4", "@eaDir/a.mp4", ".trash/c.mp4", "__MACOSX/d.mp4"):
        path = tmp_path / "data" / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(clip.read_bytes())
        path.with_suffix(".txt").write_text("A ball", encoding="utf-8")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "data" / "linked").symlink_to(tmp_path / "elsewhere")
    kept, dropped = pool(str(tmp_path / "data"))
    assert [row["clip"] for row in kept] == ["a.mp4"]
    hidden = ["._a.mp4", ".b.mp4", ".trash/c.mp4", "@eaDir/a.mp4", "__MACOSX/d.mp4"]
    reasons = dict.fromkeys(hidden, "hidden") | {"linked": "not supported"}
    assert {row["clip"]: row["reason"] for row in dropped} == reasons
    files = [
        (name, clip.read_bytes() if name.endswith("4") else b"A") for name in ("._a.mp4", "._a.txt", "x/@eaDir/a.mp4")
    ]
    kept, dropped = pool(str(write_tar(tmp_path / "0.tar", files)))
    names = [f"{tmp_path / '0.tar'}::{name}" for name in ("._a.mp4", "x/@eaDir/a.mp4")]
    assert not kept and [(row["clip"], row["reason"]) for row in dropped] == [(name, "hidden") for name in names]


def test_a_dropped_row_shows_no_credentials(tmp_path):
    address = "https://user:hunter2@host/a.mp4?token=s3cret"
    (dropped,) = csv_manifest(tmp_path, f"clip,prompt,key\n{address},a ball,{address}\n")
    assert (dropped.clip, dropped.key) == ("https://***@host/a.mp4?***",) * 2
    assert "hunter2" not in str(dropped) and "s3cret" not in str(dropped)
    with pytest.raises(ValueError, match=r"manifest=https://\*\*\*@host/c.csv is an address"):
        pool("https://user:hunter2@host/c.csv")


def test_a_folder_that_may_not_be_read_is_listed_and_the_rest_is_used(tmp_path, clip, monkeypatch):
    (tmp_path / "lost+found").mkdir()
    (tmp_path / "a.mp4").write_bytes(clip.read_bytes())
    (tmp_path / "a.txt").write_text("a ball falls")
    scan = os.scandir

    def scandir(path):  # root may read everything
        if Path(path).name in closed:
            raise PermissionError(13, "Permission denied", os.fspath(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", scandir)
    closed = {"lost+found"}
    kept, dropped = pool(str(tmp_path))
    assert [row["clip"] for row in kept] == ["a.mp4"]
    assert [(row["clip"], row["reason"]) for row in dropped] == [("lost+found", "unreadable")]
    assert "Permission denied" in dropped[0]["detail"]
    closed = {tmp_path.name}
    with pytest.raises(ValueError, match=r"cannot be read \(Permission denied\)"):
        pool(str(tmp_path))


def test_a_folder_without_clips_says_what_to_do(tmp_path):
    with pytest.raises(ValueError, match="no clip in this folder; clips end in"):
        pool(str(tmp_path))
    (tmp_path / "a.tar").touch()
    with pytest.raises(ValueError, match=r"no clip in this folder; give .*/\*\.tar"):
        pool(str(tmp_path))


def test_a_folder_has_another_identity_when_a_caption_changes(tmp_path, clip):
    (tmp_path / "a.mp4").write_bytes(clip.read_bytes())
    (tmp_path / "a.txt").write_text("A", encoding="utf-8")

    def identity():
        return [source.identity() for source in open_sources(str(tmp_path), num_losers=2, video=VIDEO, seed=0)]

    before = identity()
    assert identity() == before
    (tmp_path / "a.txt").write_text("A ball", encoding="utf-8")
    assert identity() != before


# ---- shards of clips -------------------------------------------------------------------------------------------------


def write_tar(path: Path, members, *, claim: dict[str, int] | None = None):
    """Members in order: (name, bytes), or a TarInfo for a link."""
    with tarfile.open(path, "w") as tar:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                tar.addfile(member)
                continue
            info = tarfile.TarInfo(member[0])
            info.size = len(member[1])
            tar.addfile(info, io.BytesIO(member[1]))
    return path


def test_shards_of_clips_are_read_in_place(tmp_path, clip):
    data = clip.read_bytes()
    write_tar(
        tmp_path / "0.tar", [("a.mp4", data), ("a.txt", b"A ball"), ("b.json", b'{"caption": "B"}'), ("b.mp4", data)]
    )
    write_tar(tmp_path / "1.tar", [("x/c.d.mp4", data), ("x/c.txt", b"C"), ("d.mp4", data), ("e.txt", b"E")])
    kept, dropped = pool(f"{tmp_path}/*.tar")
    assert [(row["key"], row["prompt"]) for row in kept] == [("a", "A ball"), ("b", "B")]
    assert [row["reason"] for row in dropped] == ["no caption"] * 2
    assert [row["clip"] for row in dropped] == [f"{tmp_path / '1.tar'}::{name}.mp4" for name in ("x/c.d", "d")]
    reader = FrameReader(VIDEO, "cpu")
    for row in kept:
        assert row["path"] == str(tmp_path / "0.tar") and row["clip"] == f"{tmp_path / '0.tar'}::{row['key']}.mp4"
        assert torch.equal(reader.read(row), read_clip(clip, VIDEO))
    first, second = (clip_identity(row) for row in kept)
    assert first == second  # the same bytes at another place


def test_members_with_dots_in_their_names_and_of_any_suffix_are_kept_or_listed(tmp_path, clip):
    data = clip.read_bytes()
    members = [
        ("v_0.5.mp4", data),
        ("v_0.5.txt", b"A"),
        ("v_0.7.mp4", data),
        ("007.v2.mp4", data),
        ("007.v2.json", b"{"),
    ]
    members += [("b.GIF", data), ("b.jpg", b""), ("b.txt", b"B"), ("c.webm", data), ("c.mp4", data), ("c.txt", b"C")]
    path = write_tar(tmp_path / "0.tar", members)
    kept, dropped = pool(str(path))
    assert [(row["clip"], row["prompt"]) for row in kept] == [
        (f"{path}::v_0.5.mp4", "A"),
        (f"{path}::b.GIF", "B"),
        (f"{path}::c.mp4", "C"),
    ]
    assert [(row["clip"], row["reason"]) for row in dropped] == [
        (f"{path}::v_0.7.mp4", "no caption"),
        (f"{path}::007.v2.mp4", "malformed row"),
        (f"{path}::c.webm", "duplicate key"),
    ]
    assert dropped[0]["detail"] == "there is no v_0.7.txt or v_0.7.json beside it"
    assert FrameReader(VIDEO, "cpu").read(kept[0]).shape == (9, 32, 32, 3)


def test_braces_name_shards_as_webdataset_does(tmp_path, clip):
    for number in (0, 1, 3):
        write_tar(tmp_path / f"{number:03d}.tar", [(f"{number}.mp4", clip.read_bytes()), (f"{number}.txt", b"A")])
    assert [row["key"] for row in pool(f"{tmp_path}/{{000..001}}.tar")[0]] == ["0", "1"]
    assert [
        row["key"] for row in pool(f"{tmp_path}/{{000,003}}.tar, sandbox:ramp:1", video=VideoConfig(32, 32, 9, 4.0))[0]
    ][:2] == ["0", "3"]
    with pytest.raises(ValueError, match=r"\{000..003\}.tar: no such file .*/002.tar"):
        pool(f"{tmp_path}/{{000..003}}.tar")


@pytest.mark.parametrize("kind", [tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE])
@pytest.mark.parametrize("size", [1 << 62, 1 << 70])
def test_a_header_that_declares_more_than_any_machine_has_costs_the_rest_of_its_shard(tmp_path, clip, kind, size):
    path = write_tar(tmp_path / "0.tar", [("a.mp4", clip.read_bytes()), ("a.txt", b"A")])
    info = tarfile.TarInfo("b.mp4")
    info.type, info.size = kind, size
    path.write_bytes(path.read_bytes()[: 512 * 4 + -(-len(clip.read_bytes()) // 512) * 512 - 512] + info.tobuf())
    kept, dropped = pool(str(path))
    assert [row["key"] for row in kept] == ["a"]
    assert [(row["clip"], row["reason"]) for row in dropped] == [(str(path), "truncated")]


def test_hostile_member_names_are_never_paths(tmp_path, clip, monkeypatch):
    data = clip.read_bytes()
    names = ["../../escape", "/etc/passwd", "a/../../b", "c$(touch pwned)", "d;rm -rf ~", "e" * 90, "ü\u202e", "f\nf"]
    members = [part for name in names for part in ((f"{name}.mp4", data), (f"{name}.txt", b"$(touch pwned); `id` A"))]
    link, device = tarfile.TarInfo("link.mp4"), tarfile.TarInfo("device.mp4")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    device.type = tarfile.FIFOTYPE
    (tmp_path / "in").mkdir()
    write_tar(tmp_path / "in" / "0.tar", [*members, link, device])
    monkeypatch.chdir(tmp_path / "in")
    before = sorted(tmp_path.rglob("*"))
    kept, dropped = pool(str(tmp_path / "in" / "0.tar"))
    assert len(kept) == len(names)
    refused = [(row["clip"].rpartition("::")[2], row["reason"]) for row in dropped]
    assert refused == [("link.mp4", "not supported"), ("device.mp4", "not supported")]
    reader = FrameReader(VIDEO, "cpu")
    for row in kept:
        assert set(row["key"]) <= set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-")
        assert row["path"] == str(tmp_path / "in" / "0.tar")
        assert row["prompt"] == "$(touch pwned); `id` A"
        assert reader.read(row).shape == (9, 32, 32, 3)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_cut_or_broken_shard_loses_only_what_is_cut(tmp_path, clip):
    data = clip.read_bytes()
    whole = write_tar(
        tmp_path / "0.tar", [("a.txt", b"A"), ("a.mp4", data), ("b.txt", b"B"), ("b.mp4", data)]
    ).read_bytes()
    kept, _ = pool(str(tmp_path / "0.tar"))
    end = json.loads(kept[1]["place"])["offset"] + 1000
    (tmp_path / "0.tar").write_bytes(whole[:end])
    (tmp_path / "1.tar").write_bytes(b"not a tar" * 1000)
    kept, dropped = pool(f"{tmp_path}/*.tar")
    assert [row["key"] for row in kept] == ["a", "b"]
    assert [row["reason"] for row in dropped] == ["truncated", "truncated"]
    reader = FrameReader(VIDEO, "cpu")
    assert reader.read(kept[0]).shape == (9, 32, 32, 3)
    with pytest.raises(ClipError, match="0.tar::b.mp4: truncated: the shard ends before"):
        reader.read(kept[1])


def test_a_member_that_declares_ten_gigabytes_costs_nothing(tmp_path, clip):
    info = tarfile.TarInfo("a.mp4")
    info.size = 10 << 30
    (tmp_path / "0.tar").write_bytes(info.tobuf() + clip.read_bytes())
    kept, dropped = pool(str(tmp_path / "0.tar"))
    assert not kept and {row["reason"] for row in dropped} <= {"no caption", "truncated"} and dropped


# ---- clips -----------------------------------------------------------------------------------------------------------


def boxes(*parts: tuple[bytes, bytes]) -> bytes:
    return b"".join(struct.pack(">I", 8 + len(body)) + name + body for name, body in parts)


def test_headers_that_declare_too_much_are_refused_at_once(tmp_path, clip):
    data = clip.read_bytes()
    wide = b"YUV4MPEG2 W9000 H9000 F8:1 Ip A1:1 C420\nFRAME\n" + bytes(1000)
    huge = wide.replace(b"9000", b"60000")
    large = boxes((b"ftyp", b"isom\0\0\2\0isomiso2avc1mp41")) + struct.pack(">I4sQ", 1, b"mdat", 10 << 30) + bytes(100)
    endless = boxes((b"ftyp", b"isom\0\0\2\0isomiso2avc1mp41"), (b"moov", boxes((b"mvhd", bytes(20)))))
    reader = FrameReader(VIDEO, "cpu")
    row = vars(next(read_manifest(write_csv(tmp_path / "clips.csv", "c.mp4"), num_losers=2)))
    for hostile in (
        wide,
        huge,
        large,
        endless,
        b"",
        b"\0" * 10_000,
        data[:100],
        b"#EXTM3U\n#EXTINF:1,\nhttp://x/y.ts\n",
    ):
        (tmp_path / "c.mp4").write_bytes(hostile)
        for read in (reader.read, reader.read_first, reader.check):
            with pytest.raises(ClipError, match="too large: declares 9000x9000" if hostile is wide else "."):
                read(row)


def write_csv(path: Path, *clips: str) -> Path:
    path.write_text("clip,prompt\n" + "".join(f"{clip},A\n" for clip in clips), encoding="utf-8")
    return path


def test_names_that_no_file_can_have(tmp_path):
    os.mkfifo(tmp_path / "pipe.mp4")
    names = ["x" * 5000, "a/" * 2000 + "b", "pipe.mp4", ".", "/dev/zero"]
    reader = FrameReader(VIDEO, "cpu")
    for row in map(vars, read_manifest(write_csv(tmp_path / "clips.csv", *names), num_losers=2)):
        assert clip_identity(row) == ""
        for read in (reader.read, reader.read_first, reader.check):
            with pytest.raises(ClipError, match="missing"):
                read(row)


def test_a_machine_without_file_descriptors_costs_no_rows(tmp_path, clip):
    path = write_tar(tmp_path / "0.tar", [("a.mp4", clip.read_bytes()), ("a.txt", b"A")])
    (row,) = pool(str(path))[0]
    reader, limits = FrameReader(VIDEO, "cpu"), resource.getrlimit(resource.RLIMIT_NOFILE)
    spare = os.open("/dev/null", os.O_RDONLY)
    os.close(spare)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (spare, limits[1]))
        with pytest.raises(OSError, match="Too many open files") as caught:
            reader.read(row)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert not isinstance(caught.value, ClipError)
    assert reader.read(row).shape == (9, 32, 32, 3)


def test_a_prompt_at_the_limit_is_kept(tmp_path):
    (row,) = csv_manifest(tmp_path, f"clip,prompt\na.mp4,{'A' * MAX_TEXT}\n")
    assert len(row.prompt) == MAX_TEXT
    (row,) = csv_manifest(tmp_path, f"clip,prompt\na.mp4,{'A' * (MAX_TEXT + 1)}\n")
    assert row.detail == f"prompt has {MAX_TEXT + 1} characters; at most {MAX_TEXT} are taken"


# ---- keys and scores -------------------------------------------------------------------------------------------------


def test_keys_are_safe_names():
    assert safe_key("ball_01-a") == "ball_01-a"
    unsafe = ["../../etc/passwd", "a b", "a.b", "x" * 200, "é", "///"]
    keys = [safe_key(key) for key in unsafe]
    for key in keys:
        assert set(key) <= set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-")
        assert 0 < len(key) <= MAX_KEY
        assert safe_key(key) == key
    assert len(set(keys)) == len(unsafe)
    assert safe_key("a b") != safe_key("a-b")


def test_scores_come_from_the_table_then_the_manifest_then_neutral(tmp_path):
    plain, pair = csv_manifest(tmp_path, "clip,prompt,key,semantic,physical\na,A,one,,\nb,B,two,.2,.4\n")
    table = tmp_path / "scores.csv"
    table.write_text("key,loser,clip,semantic,physical\none,1,x.mp4,0.75,0\n", encoding="utf-8")
    scores = read_scores(table)
    assert loser_scores(plain.key, plain.scores, scores, 3) == [None, (0.75, 0.0), None]
    assert loser_scores(pair.key, pair.scores, scores, 2) == [(0.2, 0.4), (0.2, 0.4)]


def test_bad_score_tables_stop_before_any_work(tmp_path):
    table = tmp_path / "scores.csv"
    table.write_text("key,loser,semantic\n", encoding="utf-8")
    with pytest.raises(ValueError, match="no column 'physical'; found: key, loser, semantic"):
        read_scores(table)
    table.write_text("key,loser,semantic,physical\na,0,nan,1\na,1,1,1\na,1,1,1\na,x,1,1\nb,0\n", encoding="utf-8")
    with pytest.raises(ValueError, match="4 bad rows .row 1:.*row 3:.*second time.*row 4:.*row 5: 2 fields for 4"):
        read_scores(table)
    table.write_text("key;loser;semantic;physical\na;0;1;1\n", encoding="utf-8")
    with pytest.raises(ValueError, match="scores.csv: the fields are separated by semicolons"):
        read_scores(table)
    with pytest.raises(ValueError, match="pipeline.scores=.*no such file"):
        read_scores(tmp_path / "none.csv")


def test_the_judges_table_comes_back_as_scores(tmp_path):
    table = tmp_path / "losers" / "losers.csv"
    rows = [("k", 0, "k-0.mp4", 'A "red", ball'), ("k", 1, "k-1.mp4", "B")]
    tables.write_csv(table, [("key", "loser", "clip", "prompt"), *rows])
    header, *lines = table.read_text(encoding="utf-8").splitlines()
    assert lines[0] == 'k,0,k-0.mp4,"A ""red"", ball"'
    filled = [header + ",semantic,physical", *(line + ",1,0" for line in lines)]
    (tmp_path / "scores.csv").write_text("\n".join(filled), encoding="utf-8")
    assert read_scores(tmp_path / "scores.csv") == {("k", 0): (1.0, 0.0), ("k", 1): (1.0, 0.0)}
