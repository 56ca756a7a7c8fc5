"""Tables: whole or not there, equal bytes for equal rows, readable by anyone; the store; a hundred thousand rows."""

import csv
import json
import os
import random
import resource
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import save_file

from data_pipeline.config import Config, Setup
from data_pipeline.contract import PassThrough, WholeStage
from data_pipeline.manifests import Row
from data_pipeline.store import Store
from data_pipeline.tables import (
    POOL,
    Dropped,
    Table,
    Unit,
    add_columns,
    drop,
    dropped_table,
    read_dropped,
    read_marker,
    remove_units,
    write_summary,
    write_unit,
)
from data_pipeline.workers import plan_stage
from train import files
from train.files import digest

ROOT = Path(__file__).parents[2]


def rows(first: int, count: int) -> pa.Table:
    made = [
        Row(
            f"k{i}",
            f"{i}.mp4",
            f"/c/{i}.mp4",
            "A",
            0.0,
            "roll",
            None,
            [[0.5, 0.25]],
            "manifest",
            json.dumps({"row": i}),
        )
        for i in range(first, first + count)
    ]
    return pa.Table.from_pylist([vars(row) for row in made], POOL)


def write(folder: Path, sizes: list[int]) -> Table:
    first = 0
    for number, size in enumerate(sizes):
        write_unit(folder, number, f"d{number}", (rows(first, size), dropped_table()), 0.5)
        first += size
    return Table(folder, len(sizes))


def test_rows_are_found_whichever_unit_they_are_in(tmp_path):
    table = write(tmp_path, [3, 0, 2, 4])
    assert len(table) == 9 and table.firsts == [0, 3, 3, 5, 9]
    for first in range(9):
        for count in range(9 - first + 1):
            found = table.rows(first, count)["key"].to_pylist()
            assert found == [f"k{i}" for i in range(first, first + count)]
    assert table.rows(7, 100)["key"].to_pylist() == ["k7", "k8"]
    assert table.columns(["key"])["key"].to_pylist() == [f"k{i}" for i in range(9)]


def test_equal_rows_give_equal_bytes_and_the_content_alone_counts(tmp_path):
    one = write(tmp_path / "one", [3, 2])
    write_unit(tmp_path / "two", 0, "another digest", (rows(0, 3), dropped_table()), 9.0)
    assert (tmp_path / "two" / "unit-00000.parquet").read_bytes() == (
        tmp_path / "one" / "unit-00000.parquet"
    ).read_bytes()
    two = Table(tmp_path / "two", 1)
    assert two.markers[0]["content"] == one.markers[0]["content"]
    assert two.units(lambda number: "x")[0] == one.units(lambda number: "x")[0]
    assert one.units(lambda number: number)[1] == Unit(1, digest([one.markers[1]["content"], 1]), 3, 2)


def test_a_unit_without_its_marker_or_with_half_its_rows_does_not_exist(tmp_path):
    write(tmp_path, [3, 2])
    whole = (tmp_path / "unit-00000.parquet").read_bytes()
    assert read_marker(tmp_path, 0)["rows"] == 3
    (tmp_path / "unit-00000.parquet").write_bytes(whole[:-1])
    assert read_marker(tmp_path, 0) is None
    (tmp_path / "unit-00001.json").write_text('{"digest": "d1"', encoding="utf-8")
    assert read_marker(tmp_path, 1) is None
    (tmp_path / "unit-00001.json").unlink()
    assert read_marker(tmp_path, 1) is None
    with pytest.raises(ValueError, match="unit-00000.parquet is missing or damaged"):
        Table(tmp_path, 2)


def test_a_failing_write_leaves_no_trace_and_the_old_unit_is_gone(tmp_path, monkeypatch):
    write(tmp_path, [3])

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "replace", full)
    with pytest.raises(OSError, match="full: .*unit-00000.parquet could not be written"):
        write_unit(tmp_path, 0, "new", (rows(5, 1), dropped_table()), 0.0)
    assert read_marker(tmp_path, 0) is None and not list(tmp_path.glob(".*"))


def test_dropped_rows_keep_their_reason(tmp_path):
    kept, dropped = drop(rows(0, 4), {2: ("truncated", "half"), 0: ("missing", "gone")})
    assert kept["key"].to_pylist() == ["k1", "k3"]
    assert [tuple(row.values()) for row in dropped.to_pylist()] == [
        ("k0", "0.mp4", '{"row": 0}', "missing", "gone"),
        ("k2", "2.mp4", '{"row": 2}', "truncated", "half"),
    ]
    write_unit(tmp_path, 0, "d", (kept, dropped), 0.25)
    assert read_dropped(tmp_path, 0) == dropped
    summary = write_summary(Table(tmp_path, 1), "all")
    assert (summary["in"], summary["kept"], summary["dropped"]) == (4, 2, {"missing": 1, "truncated": 1})
    write_unit(tmp_path, 0, "d", (kept, dropped_table()), 0.25)
    assert len(read_dropped(tmp_path, 0)) == 0
    assert drop(rows(0, 2), {})[1] == dropped_table([]) == dropped_table()
    assert dropped_table([Dropped("k", "c", "{}", "r", "d")]).to_pylist()[0]["reason"] == "r"


def test_columns_are_added_with_their_types_and_may_be_replaced():
    passed = add_columns(
        add_columns(rows(0, 2), "filter"), "cluster", {"action": ["fall", "other"], "action_score": [1, 0]}
    )
    assert passed["action"].to_pylist() == ["fall", "other"] and passed["parse"].to_pylist() == [None, None]
    assert passed.schema.field("action_score").type == pa.float64()
    assert add_columns(rows(0, 0), "generate").schema.field("seeds").type == pa.list_(pa.int64())
    assert passed.schema.names[: len(POOL.names)] == POOL.names


def test_tables_are_plain_parquet(tmp_path):
    write(tmp_path, [3, 2])
    pandas = pytest.importorskip("pandas")
    frame = pandas.concat([pandas.read_parquet(path) for path in sorted(tmp_path.glob("*.parquet"))])
    assert list(frame["key"]) == ["k0", "k1", "k2", "k3", "k4"] and frame["scores"].iloc[0][0].tolist() == [0.5, 0.25]


def test_units_of_earlier_runs_are_removed(tmp_path):
    write(tmp_path, [1, 1, 1])
    (tmp_path / "unit-notes.json").touch()
    remove_units(tmp_path, 1)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "unit-00000.json",
        "unit-00000.parquet",
        "unit-notes.json",
    ]


def test_a_stage_that_is_not_configured_passes_its_rows(tmp_path):
    table = write(tmp_path / "pool", [2, 1])
    stage = PassThrough(Setup(Config(output=str(tmp_path)), "cpu"), "resample")
    units = stage.plan(table)
    made, dropped = stage.build(units[1], table.rows(units[1].first, units[1].count), lambda count: None)
    assert made["key"].to_pylist() == ["k2"] and made["difficulty"].to_pylist() == [None] and len(dropped) == 0
    assert not stage.is_done(units[1])
    write_unit(stage.folder, 1, units[1].digest, (made, dropped), 0.0)
    assert stage.is_done(units[1]) and not stage.is_done(units[0])


# ---- the store -------------------------------------------------------------------------------------------------------


def test_a_batch_counts_as_made_only_as_a_whole(tmp_path):
    store, batch = Store(tmp_path, {}), ["aa1", "bb2", "cc3"]
    assert store.missing(batch) == batch
    store.save({name: {"x": torch.full((2,), float(number))} for number, name in enumerate(batch)})
    assert store.missing(batch) == [] and store.load("bb2")["x"].tolist() == [1.0, 1.0]
    store.path("bb2").unlink()  # as if killed between the files
    assert store.missing(batch) == batch
    assert store.missing(["aa1", "cc3"]) == []  # another unit size: bb2 is not asked for here
    assert store.missing(["aa1", "dd4"]) == ["dd4"]
    assert store.unused({"aa1"}) == store.path("cc3").stat().st_size


def test_a_damaged_file_of_the_store_is_named_and_made_anew(tmp_path):
    store = Store(tmp_path, {})
    store.save({"aa1": {"x": torch.zeros(2)}, "bb2": {"x": torch.ones(2)}})
    store.path("aa1").write_bytes(b"half")
    assert store.missing(["aa1"]) == ["aa1"] and store.missing(["bb2"]) == []
    assert store.missing(["aa1", "bb2"]) == ["aa1", "bb2"]  # one batch
    assert store.lost() == set()
    for name in ("aa1", "cc3"):
        with pytest.raises(ValueError, match=f"{name}.safetensors is missing or damaged: run the whole build again"):
            store.load(name)
    assert store.lost() == {"aa1", "cc3"}
    store.save({"aa1": {"x": torch.zeros(2)}, "cc3": {"x": torch.zeros(2)}})
    assert store.lost() == set() and store.load("aa1")["x"].tolist() == [0, 0]


def test_what_an_earlier_version_kept_without_checksums_is_not_made_again(tmp_path):
    store = Store(tmp_path, {})
    for name in ("aa1", "aa2"):
        store.path(name).parent.mkdir(exist_ok=True)
        save_file({"x": torch.ones(2)}, store.path(name), {"batch": "aa1 aa2"})
    assert store.missing(["aa1", "aa2"]) == [] and store.load("aa1")["x"].tolist() == [1, 1]
    store.path("aa2").unlink()
    assert store.missing(["aa1", "aa2"]) == ["aa1", "aa2"]


def test_a_file_of_the_store_under_another_name_is_none(tmp_path):
    store = Store(tmp_path, {})
    store.save({"aa1": {"x": torch.zeros(2)}, "aa2": {"x": torch.ones(2)}})
    store.path("aa1").write_bytes(store.path("aa2").read_bytes())
    assert store.missing(["aa1", "aa2"]) == ["aa1", "aa2"]


@pytest.mark.parametrize("tries", [200, pytest.param(2000, marks=pytest.mark.slow)])
def test_changed_tensors_are_never_accepted(tmp_path, tries):
    store, chance = Store(tmp_path, {}), random.Random(0)
    tensors = {"x": torch.arange(12).reshape(3, 4).bfloat16(), "flag": torch.tensor([True, False])}
    store.save({"aa1": tensors})
    whole, accepted = store.path("aa1").read_bytes(), 0
    for _ in range(tries):
        store.path("aa1").write_bytes(mutated(whole, chance))
        if not store.missing(["aa1"]):
            found, accepted = store.load("aa1"), accepted + 1
            assert found.keys() == tensors.keys() and all(found[name].equal(tensors[name]) for name in tensors)
    assert accepted < tries / 10  # what is not the same to the byte


def mutated(data: bytes, chance: random.Random) -> bytes:
    """With one to three bytes, or a stretch of them, changed, cut out or doubled."""
    for _ in range(chance.randint(1, 3)):
        first = chance.randrange(len(data))
        end = min(len(data), first + chance.choice((1, 1, 4, 100)))
        part = data[first:end]
        other = (b"", part + part, bytes(chance.randrange(256) for _ in part), bytes([part[0] ^ 1]) + part[1:])
        data = data[:first] + chance.choice(other) + data[end:] or b"x"
    return data


# ---- damage ----------------------------------------------------------------------------------------------------------


def test_a_marker_with_other_types_or_counts_is_missing_or_damaged(tmp_path):
    write_unit(tmp_path, 0, "d", drop(rows(0, 4), {2: ("truncated", "half")}), 0.25)
    marker = tmp_path / "unit-00000.json"
    whole = json.loads(marker.read_text(encoding="utf-8"))
    values = (None, True, -1, 7, 1e400, "x", "0" * 64, [], [1], {}, {"x": "y"}, {"x": -1})
    assert read_marker(tmp_path, 0) == whole
    for name in ("content", "dropped_content", "rows"):
        for value in values:
            marker.write_text(json.dumps({**whole, name: value}), encoding="utf-8")
            assert read_marker(tmp_path, 0) is None
    for name, wrong in (("digest", 0), ("seconds", "x"), ("dropped", [1]), ("dropped", {"truncated": "x"})):
        marker.write_text(json.dumps({**whole, name: wrong}), encoding="utf-8")
        assert read_marker(tmp_path, 0) is None
    for text in ("", "[]", "7", "null", "{", "[" * 100_000):
        marker.write_text(text, encoding="utf-8")
        assert read_marker(tmp_path, 0) is None
        with pytest.raises(ValueError, match="unit-00000.parquet is missing or damaged: run this stage again"):
            Table(tmp_path, 1)


@pytest.mark.parametrize("tries", [100, pytest.param(2000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("file", ["unit-00000.parquet", "unit-00000.dropped.parquet", "unit-00000.json"])
def test_changed_tables_are_never_accepted(tmp_path, file, tries):
    made, chance = drop(rows(0, 4), {2: ("truncated", "half")}), random.Random(0)
    write_unit(tmp_path, 0, "d", made, 0.25)
    whole = (tmp_path / file).read_bytes()
    for _ in range(tries):
        (tmp_path / file).write_bytes(mutated(whole, chance))
        if read_marker(tmp_path, 0) is not None:
            assert Table(tmp_path, 1).rows(0, 9) == made[0] and read_dropped(tmp_path, 0) == made[1]


def test_a_stage_of_all_rows_with_a_damaged_summary_is_done_again(tmp_path):
    class Whole(WholeStage):
        name = "pool"

        def plan(self, before):
            return [Unit(0, "d", 0, 5)]

    stage = Whole(Setup(Config(output=str(tmp_path)), "cpu"))
    for number in range(2):
        write_unit(stage.folder, number, "d", (rows(2 * number, 2), dropped_table()), 0.0)
    summary = write_summary(Table(stage.folder, 2), "d")
    assert plan_stage(stage, None, retry=True)[1] == []
    for change in (
        {"units": 1},
        {"units": 0},
        {"units": -1},
        {"units": 10**18},
        {"units": "2"},
        {"kept": 3},
        {"in": []},
    ):
        (stage.folder / "summary.json").write_text(json.dumps({**summary, **change}), encoding="utf-8")
        assert len(plan_stage(stage, None, retry=True)[1]) == 1


# ---- size ------------------------------------------------------------------------------------------------------------

CHEAP_STAGES = """
import sys
import numpy as np
from data_pipeline import build
from data_pipeline.stages import cluster

vectors = np.random.default_rng(0).standard_normal((100, 64))

class Matcher(cluster.ActionMatcher):
    def __init__(self, config, device):
        super().__init__(config, device, encoder=lambda texts: vectors[[len(text) % 100 for text in texts]])

cluster.ActionMatcher = Matcher
build.main(sys.argv[1:])
"""


@pytest.mark.slow
def test_a_hundred_thousand_rows_pass_the_cheap_stages_in_bounded_memory(tmp_path):
    """A tenth of a million: far less memory than its 4 GiB, of which torch takes one."""
    with (tmp_path / "clips.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["clip", "prompt", "action", "physics_richness"])
        for number in range(100_000):
            prompt = f"clip {number}: a ball of colour {10 ** (number % 9)} rolls down a ramp and hits a wall " * 2
            writer.writerow([f"{number // 1000}/{number}.mp4", prompt, f"action {number % 50}", (number % 100) / 100])
    command = [sys.executable, "-c", CHEAP_STAGES, f"output={tmp_path / 'out'}", "pipeline.stage=pool..resample"]
    command += [f"pipeline.manifest={tmp_path / 'clips.csv'}", "pipeline.cluster.model=stub"]
    command += ["pipeline.cluster.threshold=-1", "pipeline.resample.budget=2000", "pipeline.resample.tau=0"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "2"}
    subprocess.run(command, check=True, cwd=tmp_path, env=environment, timeout=600)
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert used.ru_maxrss < 2 << 20  # KiB
    folder = tmp_path / "out" / "pipeline" / "resample"
    kept = sum(pq.read_metadata(path).num_rows for path in folder.glob("unit-?????.parquet"))
    dropped = sum(pq.read_metadata(path).num_rows for path in folder.glob("unit-?????.dropped.parquet"))
    assert 1000 < kept <= 2000 and kept + dropped == 100_000
