"""Files of other projects: what is refused, and clips under other names."""

import os

import pytest

from eval.benchmarks.official_files import place, read_records, read_table


def test_records_are_a_list_of_objects_with_the_keys(tmp_path):
    path, lines = tmp_path / "a.json", tmp_path / "a.jsonl"
    path.write_text('\ufeff[{"a": 1, "b": "\u00e9"}]', encoding="utf-8")
    lines.write_text('{"a": 1}\n\n{"a": 2}\n', encoding="utf-8")
    assert read_records(path, ("a", "b"), "get it") == [{"a": 1, "b": "\u00e9"}]
    assert read_records(lines, ("a",), "get it") == [{"a": 1}, {"a": 2}]
    with pytest.raises(ValueError, match="a.jsonl, record 1, has no 'b': get it"):
        read_records(lines, ("a", "b"), "get it")
    for text in ('{"a": 1}', "[1]"):
        path.write_text(text, encoding="utf-8")
        with pytest.raises(ValueError, match="a.json is no list of objects: get it"):
            read_records(path, (), "get it")
    path.write_bytes(b"[\xff]")
    with pytest.raises(ValueError, match="a.json cannot be read as JSON"):
        read_records(path, (), "get it")


def test_tables_may_have_long_fields_with_lines(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text('\ufeffa,b\n"one, ""two""\nlines",2\n', encoding="utf-8")
    assert read_table(path, ["a", "b"], "get it") == [{"a": 'one, "two"\nlines', "b": "2"}]
    with pytest.raises(ValueError, match="a.csv has no column 'c', found a, b: get it"):
        read_table(path, ["c"], "get it")


@pytest.mark.parametrize("linked", [True, False])
def test_a_clip_stands_under_its_other_name_and_replaces_what_was_there(tmp_path, monkeypatch, linked):
    if not linked:

        def refuse(*paths):
            raise OSError("another file system")

        monkeypatch.setattr(os, "link", refuse)
    source, target = tmp_path / "a.mp4", tmp_path / "new" / "b.mp4"
    for content in (b"one", b"two", b"two"):
        source.unlink(missing_ok=True)
        source.write_bytes(content)
        for _ in range(2):
            place(source, target)
        assert target.read_bytes() == content and [path.name for path in target.parent.iterdir()] == ["b.mp4"]
    assert target.samefile(source) is linked
