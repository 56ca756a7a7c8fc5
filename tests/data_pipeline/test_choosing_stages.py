"""The stages that choose rows, on tables: what is asked, what is kept, what is written beside it."""

import asyncio
import json
import zlib
from collections import Counter

import pyarrow as pa
import torch

from data_pipeline.config import ClusterConfig, Config, FilterConfig, PipelineConfig, ResampleConfig, Setup
from data_pipeline.manifests import Row
from data_pipeline.stages import cluster, filter
from data_pipeline.stages.cluster import Cluster, load_actions
from data_pipeline.stages.filter import Filter
from data_pipeline.stages.resample import Resample
from data_pipeline.tables import POOL, Table, add_columns, dropped_table, read_marker, write_unit
from eval.vlm.client import NoAnswer, Reply, VlmConfig
from tests.eval.vlm_stub import filter_answer
from train.clips import VideoConfig, write_clip

VIDEO = VideoConfig(32, 32, 9, 8.0)


def setup(folder, *, vlm=None, **sections) -> Setup:
    return Setup(
        Config(output=str(folder), video=VIDEO, vlm=vlm or VlmConfig(), pipeline=PipelineConfig(**sections)), "cpu"
    )


def pool(folder, prompts, *, size=3, path="none.mp4") -> Table:
    made = [
        Row(f"k{i}", path, path, prompt, 0.0, "", None, None, "manifest", json.dumps({"row": i}))
        for i, prompt in enumerate(prompts)
    ]
    rows = pa.Table.from_pylist([vars(row) for row in made], POOL)
    for number, first in enumerate(range(0, len(made), size)):
        write_unit(folder, number, "d", (rows.slice(first, size), dropped_table()), 0.0)
    return Table(folder, -(-len(made) // size))


def run(stage, before):
    """All units of a stage, written; the table and the dropped rows."""
    units, dropped = stage.plan(before), []
    for unit in units:
        made = stage.build(unit, before.rows(unit.first, unit.count), lambda count: None)
        write_unit(stage.folder, unit.number, unit.digest, made, 0.0)
        dropped += made[1].to_pylist()
    return Table(stage.folder, len(units)), dropped


class FakeVlm:
    """Finds physics in what falls."""

    def __init__(self, config):
        self.config = config

    def run(self, function, items, advance):
        results = []
        for item in items:
            advance(1)
            try:
                results.append(asyncio.run(function(item)))
            except NoAnswer as refusal:
                results.append(refusal)
        return results

    async def ask(self, question, check):
        assert len(question.frames) == self.config.frames and question.frames[0].startswith(b"\xff\xd8")
        if "busy" in question.text:
            raise NoAnswer("timeout", "no answer in 60 s")
        parse = {"entities": [{"name": "ä", "material": "b"}], "actions": [], "forces": [], "outcomes": []}
        richness = next((number for number in (0.59999, 0.6) if str(number) in question.text), 0.25)
        richness = 0.75 if "fall" in question.text else richness
        return check(Reply(filter_answer(parse=parse, reason=" why ", extended="more\n", physics_richness=richness)))


def test_the_filter_keeps_rich_rows_with_what_was_said_of_them(tmp_path, monkeypatch):
    monkeypatch.setattr(filter, "Vlm", FakeVlm)
    write_clip(tmp_path / "a.mp4", torch.zeros(9, 32, 32, 3, dtype=torch.uint8), 8)
    before = pool(tmp_path / "pool", ["balls fall", "a face", "busy", "a fall"], path=str(tmp_path / "a.mp4"))
    stage = Filter(setup(tmp_path, vlm=VlmConfig(model="m", frames=2, frame_height=16)))
    table, dropped = run(stage, before)
    rows = table.rows(0, 9).to_pylist()
    assert [(row["key"], row["physics_richness"], row["physics_label"]) for row in rows] == [
        ("k0", 0.75, True),
        ("k3", 0.75, True),
    ]
    entities = {"entities": [{"name": "ä", "material": "b"}], "actions": [], "forces": [], "outcomes": []}
    assert json.loads(rows[0]["parse"]) == entities | {"removed": ["a dog"], "added": [], "penalties": []}
    assert (rows[0]["reason"], rows[0]["extended"]) == ("why", "more")
    assert rows[0]["prompt"] == "balls fall"  # training uses the original
    assert [(row["key"], row["reason"]) for row in dropped] == [("k1", "no physics"), ("k2", "server")]
    assert dropped[1]["detail"] == "timeout: no answer in 60 s"
    worth = [stage.is_worth_a_retry(read_marker(stage.folder, number)) for number in range(2)]
    assert worth == [True, False]


def test_the_label_is_ours(tmp_path, monkeypatch):
    monkeypatch.setattr(filter, "Vlm", FakeVlm)
    write_clip(tmp_path / "a.mp4", torch.zeros(9, 32, 32, 3, dtype=torch.uint8), 8)
    before = pool(tmp_path / "pool", ["0.59999", "0.6"], path=str(tmp_path / "a.mp4"))
    table, dropped = run(Filter(setup(tmp_path)), before)
    assert [row["physics_richness"] for row in table.rows(0, 9).to_pylist()] == [0.6]
    assert [row["detail"] for row in dropped] == ["physics_richness=0.59999"]
    table, dropped = run(Filter(setup(tmp_path, filter=FilterConfig(threshold=0.0))), before)
    assert table.rows(0, 9)["physics_label"].to_pylist() == [True, True] and not dropped


def test_a_clip_without_frames_is_refused_with_its_reason(tmp_path, monkeypatch):
    monkeypatch.setattr(filter, "Vlm", FakeVlm)
    stage = Filter(setup(tmp_path))
    table, dropped = run(stage, pool(tmp_path / "pool", ["balls fall"]))
    assert len(table) == 0 and dropped[0]["reason"] == "frames" and "no such file" in dropped[0]["detail"]


def test_the_filter_depends_on_rows_and_settings(tmp_path):
    before = pool(tmp_path / "pool", ["a", "b", "c", "d"])

    def digests(model, threshold=0.6, **server):
        made = setup(tmp_path, vlm=VlmConfig(model=model, **server), filter=FilterConfig(threshold=threshold))
        return [unit.digest for unit in Filter(made).plan(before)]

    assert digests("m") == digests("m", base_url="http://x/v1", concurrency=3)
    assert not set(digests("m")) & {*digests("n"), *digests("m", 0.5)} and len(set(digests("m"))) == 2


def test_other_and_no_action_take_part_in_resampling_as_one_action_each(tmp_path):
    """tau = 0: three actions, a third of nine each, of which `fall` has only two: 2 + 3 + 3."""
    before, actions = pool(tmp_path / "pool", [f"{i}" for i in range(12)], size=12), ["fall"] * 2 + ["other", ""] * 5
    rows = add_columns(before.rows(0, 12), "cluster", {"action": actions})
    rows = add_columns(rows, "difficulty")
    write_unit(tmp_path / "difficulty", 0, "d", (rows, dropped_table()), 0.0)
    stage = Resample(setup(tmp_path, resample=ResampleConfig(budget=9, tau=0)))
    ((kept, dropped),) = stage.parts(Table(tmp_path / "difficulty", 1))
    assert Counter(kept["action"].to_pylist()) == {"fall": 2, "other": 3, "": 3} and len(dropped) == 4


def words(texts):
    """(N, 64): a text is the sum of its words' random vectors."""
    vectors = torch.zeros(len(texts), 64)
    for place, text in enumerate(texts):
        for word in text.lower().replace(".", "").split():
            generator = torch.Generator().manual_seed(zlib.crc32(word.encode()))
            vectors[place] += torch.randn(64, generator=generator)
    return vectors


def test_rows_get_the_actions_of_their_prompts_in_any_units(tmp_path, monkeypatch):
    real = cluster.ActionMatcher
    monkeypatch.setattr(cluster, "ActionMatcher", lambda config, device: real(config, device, encoder=words))
    phrase = {action.name: action.phrase for action in load_actions()}
    prompts = [phrase["water_pour"], "qq zz", f"{phrase['ramp_slide']} slowly", phrase["water_pour"]]
    tables = []
    for size in (1, 3, 4):
        before = pool(tmp_path / f"pool{size}", prompts, size=size)
        stage = Cluster(setup(tmp_path / str(size), cluster=ClusterConfig(model="stub", threshold=0.8)))
        table, dropped = run(stage, before)
        assert not dropped
        tables.append(table.rows(0, 4).to_pylist())
    assert tables[0] == tables[1] == tables[2]
    rows = tables[0]
    assert [row["action"] for row in rows] == ["water_pour", "other", "ramp_slide", "water_pour"]
    assert [row["category"] for row in rows] == [
        "liquids_and_floating",
        "other",
        "rolling_and_sliding",
        "liquids_and_floating",
    ]
    assert rows[0]["action_score"] == 1 and rows[1]["action_score"] < 0.8 <= rows[2]["action_score"] < 1
    stage.conclude(table)
    csv = (stage.folder / "actions.csv").read_text(encoding="utf-8").splitlines()
    assert csv[1] == "water_pour,liquids_and_floating,2" and len(csv) == 4
    assert (stage.folder / "actions.png").read_bytes().startswith(b"\x89PNG")
