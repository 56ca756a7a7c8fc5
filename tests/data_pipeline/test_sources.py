"""Sources: what is fatal, what is dropped, what comes out, of every kind; and the judge's table. Much of it hostile."""

import io
import json
import os
import struct
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from data_pipeline.judge import loser_scores, read_scores, write_table
from data_pipeline.manifests import MAX_KEY, MAX_TEXT, Row, read_manifest, safe_key
from data_pipeline.sources import Dropped, FrameReader, clip_identity, open_sources, read_pool, row_of
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
        open_sources(str(tmp_path / "none.csv"), num_losers=2, video=VIDEO, seed=0)
    (tmp_path / "clips.xlsx").write_bytes(b"PK")
    with pytest.raises(ValueError, match="unknown format '.xlsx'; use one of .csv, .jsonl, .parquet"):
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
    assert "row 1 already" in dropped[0]["detail"] and json.loads(dropped[1]["place"])["row"] == 1
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
    assert FrameReader(VIDEO, "cpu").read(row_of(kept[0])).shape == (9, 32, 32, 3)


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
    assert [row["reason"] for row in dropped] == ["no caption"]  # c.d.mp4 is no clip's ending; e has none
    reader = FrameReader(VIDEO, "cpu")
    for row in kept:
        assert row["path"] == str(tmp_path / "0.tar") and row["clip"] == f"{tmp_path / '0.tar'}::{row['key']}"
        assert torch.equal(reader.read(row_of(row)), read_clip(clip, VIDEO))
    first, second = (clip_identity(row_of(row)) for row in kept)
    assert first == second  # the same bytes at another place


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
    assert len(kept) == len(names) and not dropped
    reader = FrameReader(VIDEO, "cpu")
    for row in kept:
        assert set(row["key"]) <= set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-")
        assert row["path"] == str(tmp_path / "in" / "0.tar")
        assert row["prompt"] == "$(touch pwned); `id` A"
        assert reader.read(row_of(row)).shape == (9, 32, 32, 3)
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
    assert reader.read(row_of(kept[0])).shape == (9, 32, 32, 3)
    with pytest.raises(ClipError, match="0.tar::b: truncated: the shard ends before"):
        reader.read(row_of(kept[1]))


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
    row = next(read_manifest(write_csv(tmp_path / "clips.csv", "c.mp4"), num_losers=2))
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
        with pytest.raises(ClipError, match="too large: declares 9000x9000" if hostile is wide else "."):
            reader.read(row)


def write_csv(path: Path, *clips: str) -> Path:
    path.write_text("clip,prompt\n" + "".join(f"{clip},A\n" for clip in clips), encoding="utf-8")
    return path


def test_names_that_no_file_can_have(tmp_path):
    os.mkfifo(tmp_path / "pipe.mp4")
    names = ["x" * 5000, "a/" * 2000 + "b", "pipe.mp4", ".", "/dev/zero"]
    reader = FrameReader(VIDEO, "cpu")
    for row in read_manifest(write_csv(tmp_path / "clips.csv", *names), num_losers=2):
        assert clip_identity(row) == ""
        with pytest.raises(ClipError, match="missing"):
            reader.read(row)


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
