"""The manifest: what is fatal, what is quarantined, what comes out; and the judge's table."""

import json

import pytest

from data_pipeline.judge import loser_scores, read_scores, write_table
from data_pipeline.sources import MAX_KEY, Quarantined, Row, read_manifest, safe_key


def csv_manifest(tmp_path, text: str | bytes):
    path = tmp_path / "clips.csv"
    path.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8"))
    return read_manifest(path, num_losers=2)


def jsonl_manifest(tmp_path, *lines):
    path = tmp_path / "clips.jsonl"
    text = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
    path.write_text(text, encoding="utf-8")
    return read_manifest(path, num_losers=2)


def test_csv_with_all_columns(tmp_path):
    text = (
        "clip,prompt,key,start,action,physics_richness,semantic,physical,camera\n"
        'a.mp4,"A ball, red, falls",ball,1.5,falling,0.8,0.25,1,static\n'
        "/data/b.mp4, Eine Kugel rollt — schnell ,,,,,,,\n"
    )
    manifest = csv_manifest(tmp_path, text)
    first, second = manifest.rows
    assert first == Row(
        1, "ball", "a.mp4", tmp_path / "a.mp4", "A ball, red, falls", 1.5, "falling", 0.8, ((0.25, 1.0),)
    )
    assert (second.prompt, second.start, second.action, second.physics_richness, second.scores) == (
        "Eine Kugel rollt — schnell",
        0.0,
        "",
        None,
        (),
    )
    assert str(second.path) == "/data/b.mp4"
    assert manifest.unused_columns == ["camera"]


def test_derived_keys_depend_on_the_row_not_on_its_place(tmp_path):
    one = csv_manifest(tmp_path, "clip,prompt\na.mp4,A\nb.mp4,B\n").rows
    other = csv_manifest(tmp_path, "prompt,clip\nB,b.mp4\nA,a.mp4\n").rows
    assert [row.key for row in one] == [row.key for row in reversed(other)]
    assert len({row.key for row in one}) == 2


def test_a_byte_order_mark_and_windows_line_ends_are_no_problem(tmp_path):
    manifest = csv_manifest(tmp_path, b"\xef\xbb\xbfclip,prompt\r\na.mp4,A\r\n\r\nb.mp4,B\r\n")
    assert [row.clip for row in manifest.rows] == ["a.mp4", "b.mp4"]


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
        ("a.mp4,A ball,first,,,", "duplicate key"),
        ("a.mp4,A ball, which falls,,,,", "malformed row"),
        ("a.mp4", "malformed row"),
        (b"a.mp4,Ein B\xe4ll,,,,", "not UTF-8"),
        (b"\xff.mp4,A ball,,,,", "not UTF-8"),
    ],
)
def test_a_bad_csv_row_is_quarantined_and_the_others_are_kept(tmp_path, line, reason):
    line = line if isinstance(line, bytes) else line.encode("utf-8")
    text = b"clip,prompt,key,start,semantic,physical\na.mp4,A,first,,,\n" + line + b"\nb.mp4,B,last,,,\n"
    before, bad, after = csv_manifest(tmp_path, text).rows
    assert (before.key, after.key, after.number) == ("first", "last", 3)
    assert isinstance(bad, Quarantined) and bad.row == 2
    assert bad.reason == reason and bad.detail
    json.dumps([bad.clip, bad.key, bad.detail], ensure_ascii=False).encode("utf-8")  # can be reported


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
    good, pair, *bad = manifest.rows
    assert good.scores == ((0.0, 1.0), (0.5, 0.25)) and good.start == 2.0
    assert pair.scores == ((0.1, 0.2),)
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
        ValueError, match=r"clips\.csv has no column 'prompt'; found: clip, promt;.*did you mean 'promt'"
    ):
        csv_manifest(tmp_path, "clip,promt\na.mp4,A\n")
    with pytest.raises(ValueError, match="no column 'clip'; found: prompt, video"):
        jsonl_manifest(tmp_path, {"prompt": "A", "video": "a.mp4"})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no rows"),
        ("clip,prompt\n", "no rows"),
        ("clip,clip,prompt\na,b,c\n", "column clip twice"),
        ('clip,prompt\na.mp4,"never closed\nb.mp4,B\n', "not valid CSV"),
    ],
)
def test_fatal_manifests(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        csv_manifest(tmp_path, text)


def test_manifest_that_is_not_there_or_of_unknown_kind(tmp_path):
    with pytest.raises(ValueError, match="pipeline.manifest=.*no such file"):
        read_manifest(tmp_path / "none.csv", num_losers=2)
    (tmp_path / "clips.xlsx").write_bytes(b"PK")
    with pytest.raises(ValueError, match="unknown format '.xlsx'; use a .csv"):
        read_manifest(tmp_path / "clips.xlsx", num_losers=2)


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
    plain, pair = csv_manifest(tmp_path, "clip,prompt,key,semantic,physical\na,A,one,,\nb,B,two,.2,.4\n").rows
    table = tmp_path / "scores.csv"
    table.write_text("key,loser,clip,semantic,physical\none,1,x.mp4,0.75,0\n", encoding="utf-8")
    scores = read_scores(table)
    assert loser_scores(plain, scores, 3) == [None, (0.75, 0.0), None]
    assert loser_scores(pair, scores, 2) == [(0.2, 0.4), (0.2, 0.4)]


def test_bad_score_tables_stop_before_any_work(tmp_path):
    table = tmp_path / "scores.csv"
    table.write_text("key,loser,semantic\n", encoding="utf-8")
    with pytest.raises(ValueError, match="no column physical; found: key, loser, semantic"):
        read_scores(table)
    table.write_text("key,loser,semantic,physical\na,0,nan,1\na,1,1,1\na,1,1,1\na,x,1,1\nb,0\n", encoding="utf-8")
    with pytest.raises(ValueError, match="4 bad lines .line 2:.*line 4:.*second time.*line 5:.*line 6:"):
        read_scores(table)
    with pytest.raises(ValueError, match="pipeline.scores=.*no such file"):
        read_scores(tmp_path / "none.csv")


def test_the_judges_table_comes_back_as_scores(tmp_path):
    folder = tmp_path / "losers"
    write_table(
        folder / "losers.csv", [("k", 0, folder / "k-0.mp4", 'A "red", ball'), ("k", 1, folder / "k-1.mp4", "B")]
    )
    header, *lines = (folder / "losers.csv").read_text(encoding="utf-8").splitlines()
    assert lines[0] == 'k,0,k-0.mp4,"A ""red"", ball"'
    filled = [header + ",semantic,physical", *(line + ",1,0" for line in lines)]
    (tmp_path / "scores.csv").write_text("\n".join(filled), encoding="utf-8")
    assert read_scores(tmp_path / "scores.csv") == {("k", 0): (1.0, 0.0), ("k", 1): (1.0, 0.0)}
