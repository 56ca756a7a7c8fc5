"""The first data pipeline end to end, on a tiny random Wan: build, quarantine, continue, change, two processes."""

import csv
import io
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import tarfile
from contextlib import ExitStack
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import save_file

import recipes
from data_pipeline import build, config, tables
from data_pipeline.own_clips import ClipMaker
from data_pipeline.stages import STAGES
from data_pipeline.stages.encode import Encode
from data_pipeline.stages.targets import TargetMaker
from data_pipeline.tables import POOL
from eval.judges.sandbox.judge import SandboxJudgeConfig
from eval.judges.sandbox.judge import build as sandbox_judge
from eval.judges.scores import Scores, Unjudged
from eval.sandbox.splits import list_clips, simulate_block
from tests.synthetic_groups import verify
from train.backbones import load_backbone
from train.backbones.base import BackboneConfig
from train.backbones.conditioning import unpad
from train.backbones.loading import fingerprint
from train.backbones.tiny import write_tiny_pipeline
from train.clips import VideoConfig, from_pixels, read_clip, to_pixels, write_clip
from train.files import lock, seed_of
from train.groups import GroupSet
from train.sampling import SamplerConfig, sample_clips

ROOT = Path(__file__).parents[2]
GOOD = ("red", "green", "blue", "grey", "pink")
SHAPES = {"A": (2, 128), "B": (128, 2)}  # of a LoRA on the tiny network


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_tiny_pipeline("wan21", tmp_path_factory.mktemp("wan21"))


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """Five good clips of 9 frames at 8 fps, and files that are none."""
    folder = tmp_path_factory.mktemp("clips")
    for number, name in enumerate(GOOD):
        generator = torch.Generator().manual_seed(number)
        write_clip(folder / f"{name}.mp4", torch.randint(0, 255, (9, 64, 64, 3), generator=generator).byte(), 8)
    write_clip(folder / "short.mp4", torch.zeros(3, 64, 64, 3, dtype=torch.uint8), 8)
    whole = (folder / "red.mp4").read_bytes()
    (folder / "cut.mp4").write_bytes(whole[: len(whole) // 2])
    (folder / "text.mp4").write_text("not a clip", encoding="utf-8")
    return folder


def write_manifest(path: Path, clips: Path, rows: list[dict]) -> Path:
    columns = ["clip", "prompt", "key", "action", "semantic", "physical"]
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, columns, restval="")
        writer.writeheader()
        for row in rows:
            writer.writerow({"prompt": f"a {row['clip']} ball falls", **row, "clip": str(clips / f"{row['clip']}.mp4")})
    return path


def good_rows(**changes) -> list[dict]:
    return [{"clip": name, "key": name, "action": "fall", **changes.get(name, {})} for name in GOOD]


def arguments(model: Path, manifest: Path, output: Path, *more: str) -> list[str]:
    return [
        f"output={output}",
        f"backbone.path={model}",
        "backbone.architecture=tiny",
        "backbone.dtype=float32",
        "backbone.text_length=32",
        "video.height=64",
        "video.width=64",
        "video.num_frames=9",
        "video.fps=8",
        "sampler.steps=2",
        "sampler.guidance=2",
        "pipeline.losers.count=2",
        "pipeline.unit_size=2",
        f"pipeline.manifest={manifest}",
        *more,
    ]


@pytest.fixture(scope="module")
def built(model, clips, tmp_path_factory):
    """A finished build of the five good clips: three shards. Tests copy it before they change it."""
    folder = tmp_path_factory.mktemp("built")
    manifest = write_manifest(folder / "clips.csv", clips, good_rows())
    build.main(arguments(model, manifest, folder / "out"))
    return folder


@pytest.fixture
def copied(built, tmp_path):
    shutil.copytree(built, tmp_path / "copy")
    return tmp_path / "copy"


@pytest.fixture
def no_weights(monkeypatch):
    """Fails the test when any weights are loaded."""
    real = config.load_backbone

    def shell_only(config, device, *, parts=("all",)):
        assert not parts, "weights were loaded"
        return real(config, device, parts=())

    monkeypatch.setattr(config, "load_backbone", shell_only)


def shards(output: Path) -> dict[str, tuple[bytes, int]]:
    return {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in (output / "groups").glob("*.tar")}


def tables_of(output: Path, stage: str) -> list[Path]:
    return sorted((output / "pipeline" / stage).glob("unit-?????.parquet"))


def by_key(output: Path) -> dict:
    groups = GroupSet(output / "groups")
    return {group.key: group for group in (groups[index] for index in range(len(groups)))}


def summary(output: Path, stage: str) -> dict:
    return json.loads((output / "pipeline" / stage / "summary.json").read_text(encoding="utf-8"))


def quarantine(output: Path) -> list[dict]:
    text = (output / "groups" / "build" / "quarantine.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def test_groups_hold_what_training_needs(built, model, clips):
    output = built / "out"
    assert verify(output / "groups") == []
    groups = by_key(output)
    assert list(groups) == list(GOOD)
    assert sorted(shards(output)) == ["unit-00000.tar", "unit-00001.tar", "unit-00002.tar"]
    group = groups["blue"]
    assert (group.prompt, group.action) == ("a blue ball falls", "fall")
    assert group.source == f"{clips / 'blue.mp4'} at 0 s"
    assert group.winner.shape == (16, 3, 8, 8) and group.losers.shape == (2, 16, 3, 8, 8)
    assert group.winner.dtype == group.losers.dtype == group.text.dtype == torch.bfloat16
    assert group.text.shape == (5, 64) and group.condition is None  # four words and the end token
    assert [(loser.semantic, loser.physical) for loser in group.losers_info] == [(0.5, 0.5)] * 2
    assert [loser.seed for loser in group.losers_info] == [seed_of(0, "blue", j) for j in range(2)]
    assert not torch.equal(group.losers[0], group.losers[1])
    assert not torch.equal(group.losers, groups["red"].losers)


def test_winner_and_losers_are_what_the_backbone_makes(built, model, clips):
    loaded = BackboneConfig(path=str(model), architecture="tiny", dtype="float32", text_length=32)
    backbone = load_backbone(loaded, "cpu")
    group = by_key(built / "out")["green"]
    assert group.fingerprint == backbone.encoders == GroupSet(built / "out" / "groups").fingerprint
    assert group.network == backbone.fingerprint == GroupSet(built / "out" / "groups").network
    frames = read_clip(clips / "green.mp4", VideoConfig(64, 64, 9, 8.0))
    torch.testing.assert_close(group.winner, backbone.encode_video(from_pixels(frames)[None])[0].bfloat16())
    text, seeds = backbone.condition(["a green ball falls"]), [group.losers_info[1].seed]
    sampler = SamplerConfig(steps=2, guidance=2.0)
    loser = sample_clips(backbone, text, seeds, VideoConfig(64, 64, 9, 8.0), sampler, progress=False)
    torch.testing.assert_close(group.losers[1], loser[0].bfloat16())


@pytest.mark.slow
def test_losers_have_a_sampler_of_their_own(built, copied, model, clips):
    """Steps, solver, guidance and start are the losers' alone; changed ones make the losers anew, and nothing else."""
    own = ["pipeline.losers.steps=3", "pipeline.losers.solver=euler", "pipeline.losers.guidance=1"]
    own += ["pipeline.losers.start_time=0.8"]
    build.main(arguments(model, built / "clips.csv", copied / "out", *own))
    before, after = by_key(built / "out"), by_key(copied / "out")
    backbone = load_backbone(
        BackboneConfig(path=str(model), architecture="tiny", dtype="float32", text_length=32), "cpu"
    )
    video = VideoConfig(64, 64, 9, 8.0)
    assert torch.equal(before["green"].winner, after["green"].winner)
    clean = backbone.encode_video(from_pixels(read_clip(clips / "green.mp4", video))[None])
    seeds = [loser.seed for loser in after["green"].losers_info]
    sampler = SamplerConfig("euler", steps=3, guidance=1.0)
    text = backbone.condition(["a green ball falls"])
    made = sample_clips(backbone, text, seeds, video, sampler, clean=clean.expand(2, -1, -1, -1, -1), start=0.8)
    torch.testing.assert_close(after["green"].losers, made.bfloat16(), rtol=1e-2, atol=1e-2)
    shutil.copytree(copied / "out", copied / "again")
    build.main(arguments(model, built / "clips.csv", copied / "again", *own, "sampler.guidance=3"))
    assert shards(copied / "again").keys() == shards(copied / "out").keys()
    assert {name: data for name, (data, _) in shards(copied / "again").items()} == {
        name: data for name, (data, _) in shards(copied / "out").items()
    }
    written = copied / "out" / "groups" / "build" / "recipe.yaml"
    said = recipes.load(build.Config, [f"recipe={written}"]).pipeline.losers
    assert (said.count, said.steps, said.solver, said.start_time) == (2, 3, "euler", 0.8)


def test_bad_rows_are_quarantined_and_the_good_ones_kept(model, clips, tmp_path, capsys):
    rows = [
        {"clip": "red", "key": "a"},
        {"clip": "none", "key": "b"},
        {"clip": "cut", "key": "c"},
        {"clip": "short", "key": "d"},
        {"clip": "text", "key": "../e"},
        {"clip": "red", "key": "f", "prompt": ""},
        {"clip": "red", "key": "g", "semantic": "nan", "physical": ".5"},
        {"clip": "red", "key": "a"},
        {"clip": "green", "key": "../../h i", "semantic": ".25", "physical": "1"},
    ]
    manifest = write_manifest(tmp_path / "clips.csv", clips, rows)
    build.main(arguments(model, manifest, tmp_path / "out"))
    bad = quarantine(tmp_path / "out")
    reasons = ["missing", "truncated", "too short", "unreadable", "empty prompt", "bad score", "duplicate clip"]
    assert sorted((row["row"], row["reason"]) for row in bad) == list(enumerate(reasons, start=2))
    assert [row["stage"] for row in bad] == ["pool"] * 3 + ["generate"] * 4
    assert bad[5]["key"] == "d" and "9 frames at 8 fps" in bad[5]["detail"]
    assert summary(tmp_path / "out", "pool")["dropped"] == dict.fromkeys(reasons[4:], 1)
    counts = summary(tmp_path / "out", "generate")
    assert (counts["in"], counts["kept"], counts["dropped"]) == (6, 2, dict.fromkeys(reasons[:4], 1))
    groups = by_key(tmp_path / "out")
    first, last = groups.values()
    assert first.key == "a" and last.key.startswith("h-i-")
    assert [(loser.semantic, loser.physical) for loser in last.losers_info] == [(0.25, 1.0)] * 2
    printed = capsys.readouterr().out.strip().splitlines()
    assert printed[-2].startswith(f"groups: {tmp_path / 'out' / 'groups'}, 2 groups, ")
    listing = tmp_path / "out" / "groups" / "build" / "quarantine.jsonl"
    assert printed[-1] == f"quarantine: {listing}, 7 rows that could not be used, each with its reason"
    assert [row["clip"] for row in bad] == [str(clips / f"{rows[row['row'] - 1]['clip']}.mp4") for row in bad]
    assert not list(tmp_path.rglob("*.tmp"))


def test_a_second_run_does_nothing(built, copied, model, no_weights, capsys):
    before = shards(copied / "out")
    index = (copied / "out" / "groups" / "index.json").read_bytes()
    build.main(arguments(model, built / "clips.csv", copied / "out"))
    printed = capsys.readouterr().out
    assert "quarantine" not in printed and "warning" not in printed
    assert shards(copied / "out") == before
    assert (copied / "out" / "groups" / "index.json").read_bytes() == index


@pytest.mark.slow
def test_a_build_of_an_earlier_version_goes_on_under_its_fingerprint(model, clips, tmp_path, monkeypatch, capsys):
    """Those have the whole pipeline's fingerprint in their groups, and nothing beside it."""
    manifest = write_manifest(tmp_path / "clips.csv", clips, good_rows()[:3])
    earlier = {"fingerprint": fingerprint("wan21", model), "network": ""}
    with monkeypatch.context() as patch:
        patch.setattr(Encode, "origin", earlier)
        build.main(arguments(model, manifest, tmp_path / "out"))
    before = shards(tmp_path / "out")
    index = (tmp_path / "out" / "groups" / "index.json").read_bytes()
    build.main(arguments(model, manifest, tmp_path / "out"))  # finished: not a byte is written
    assert shards(tmp_path / "out") == before
    assert (tmp_path / "out" / "groups" / "index.json").read_bytes() == index
    write_manifest(manifest, clips, good_rows(red={"semantic": "0.9", "physical": "0.8"})[:3])
    build.main(arguments(model, manifest, tmp_path / "out"))  # one of its two shards is written anew
    assert {name for name, data in shards(tmp_path / "out").items() if data != before[name]} == {"unit-00000.tar"}
    groups = GroupSet(tmp_path / "out" / "groups")
    assert {groups.fingerprint, groups.network} == {earlier["fingerprint"]} and "network" not in groups.index


@pytest.mark.slow
def test_loras_under_the_base_make_other_losers_of_the_same_winners(built, copied, model, tmp_path):
    name = {f"blocks.0.self_attn.q.lora_{side}.weight": torch.ones(*shape) for side, shape in SHAPES.items()}
    save_file(name, tmp_path / "lora.safetensors")
    loras = f"backbone.loras=[{{path: {tmp_path / 'lora.safetensors'}}}]"
    build.main(arguments(model, built / "clips.csv", copied / "out", loras))
    before, after = by_key(built / "out"), by_key(copied / "out")
    groups = GroupSet(copied / "out" / "groups")
    whole = fingerprint("wan21", model)
    assert groups.network.startswith(f"{whole}+") and groups.fingerprint == before["red"].fingerprint
    for key, group in after.items():
        assert torch.equal(group.winner, before[key].winner) and group.network == groups.network
        assert not torch.equal(group.losers, before[key].losers)
    winners = list((copied / "out" / "pipeline" / "encode" / "winners").rglob("*.safetensors"))
    assert len(winners) == len(GOOD)  # none was encoded again


@pytest.mark.slow
def test_a_deleted_shard_alone_is_rebuilt_byte_for_byte(built, copied, model):
    before = shards(copied / "out")
    (copied / "out" / "groups" / "unit-00001.tar").unlink()
    build.main(arguments(model, built / "clips.csv", copied / "out"))
    after = shards(copied / "out")
    assert {name: data for name, (data, _) in after.items()} == {name: data for name, (data, _) in before.items()}
    assert {name for name in before if after[name][1] != before[name][1]} == {"unit-00001.tar"}
    assert verify(copied / "out" / "groups") == []


@pytest.mark.slow
def test_an_interrupted_build_continues(built, model, tmp_path, monkeypatch):
    real, calls = ClipMaker.generate, []

    def failing(*args):
        calls.append(None)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(ClipMaker, "generate", failing)
    with pytest.raises(KeyboardInterrupt):
        build.main(arguments(model, built / "clips.csv", tmp_path / "out"))
    assert [path.name for path in tables_of(tmp_path / "out", "generate")] == ["unit-00000.parquet"]
    with pytest.raises(ValueError, match="did not finish"):
        GroupSet(tmp_path / "out" / "groups")
    with pytest.raises(ValueError, match="stage=judge needs the table of generate, of which 2 of 3 units are missing"):
        build.main(arguments(model, built / "clips.csv", tmp_path / "out", "pipeline.stage=judge"))
    build.main(arguments(model, built / "clips.csv", tmp_path / "out"))
    assert len(calls) == 4 + 2  # grey once more, though its unit had begun with blue, and pink
    index = tmp_path / "out" / "groups" / "index.json"
    assert index.read_bytes() == (built / "out" / "groups" / "index.json").read_bytes()


@pytest.mark.slow
def test_new_scores_rewrite_the_shard_from_its_own_tensors(built, copied, model, clips, no_weights):
    output, old = copied / "out", by_key(copied / "out")
    before = shards(output)
    table = copied / "scores.csv"
    table.write_text("key,loser,semantic,physical\ngreen,1,0.9,0.125\nnobody,0,1,1\n", encoding="utf-8")
    build.main(arguments(model, built / "clips.csv", output, f"pipeline.scores={table}"))
    changed = {name for name, state in shards(output).items() if state != before[name]}
    assert changed == {"unit-00000.tar"}
    new = by_key(output)
    assert [(j.semantic, j.physical) for j in new["green"].losers_info] == [(0.5, 0.5), (0.9, 0.125)]
    assert [(j.semantic, j.physical) for j in new["red"].losers_info] == [(0.5, 0.5)] * 2
    for key in GOOD:
        assert torch.equal(new[key].losers, old[key].losers) and torch.equal(new[key].text, old[key].text)
    assert verify(output / "groups") == []


@pytest.mark.slow
def test_moved_rows_and_other_units_generate_nothing_again(copied, model, clips, no_weights):
    old = by_key(copied / "out")
    manifest = write_manifest(copied / "clips.csv", clips, list(reversed(good_rows(red={"action": "roll"}))))
    build.main(arguments(model, manifest, copied / "out", "pipeline.unit_size=3"))
    new = by_key(copied / "out")
    assert list(new) == ["pink", "grey", "blue", "green", "red"]
    assert sorted(shards(copied / "out")) == ["unit-00000.tar", "unit-00001.tar"]
    assert all(torch.equal(new[key].losers, old[key].losers) for key in GOOD)
    assert new["red"].action == "roll"


@pytest.mark.slow
def test_changed_inputs_rebuild_only_the_groups_they_touch(copied, model, clips, monkeypatch, capsys):
    old, keys = by_key(copied / "out"), []
    real = Encode.encode

    def watched(self, records, frames):
        keys.extend(record["prompt"] for record in records)
        return real(self, records, frames)

    monkeypatch.setattr(Encode, "encode", watched)
    rows = good_rows(blue={"prompt": "a blue cube falls"}, grey={"clip": "none"})
    build.main(arguments(model, write_manifest(copied / "clips.csv", clips, rows), copied / "out"))
    assert keys == ["a blue cube falls"]
    new = by_key(copied / "out")
    assert list(new) == ["red", "green", "blue", "pink"]
    assert not torch.equal(new["blue"].losers, old["blue"].losers)
    assert "are of earlier settings" in capsys.readouterr().out  # the old blue and grey are kept
    build.main(arguments(model, write_manifest(copied / "clips.csv", clips, good_rows()), copied / "out"))
    assert keys == ["a blue cube falls"]  # and serve again
    assert torch.equal(by_key(copied / "out")["blue"].losers, old["blue"].losers)


@pytest.mark.slow
def test_other_settings_generate_everything_again(copied, model):
    old = by_key(copied / "out")
    build.main(arguments(model, copied / "clips.csv", copied / "out", "seed=1"))
    new = by_key(copied / "out")
    assert all(torch.equal(new[key].winner, old[key].winner) for key in GOOD)
    assert not any(torch.equal(new[key].losers, old[key].losers) for key in GOOD)


@pytest.mark.slow
def test_loser_clips_for_a_judge(copied, model, clips):
    before = shards(copied / "out")
    build.main(arguments(model, copied / "clips.csv", copied / "out", "pipeline.save_losers=true"))
    folder = copied / "out" / "losers"
    with (folder / "losers.csv").open(encoding="utf-8", newline="") as file:
        table = list(csv.DictReader(file))
    assert [(row["key"], row["loser"]) for row in table] == [(key, str(j)) for key in GOOD for j in range(2)]
    assert table[0]["prompt"] == "a red ball falls"
    for row in table:
        assert read_clip(folder / row["clip"], VideoConfig(64, 64, 9, 8.0)).shape == (9, 64, 64, 3)
    assert {name: data for name, (data, _) in shards(copied / "out").items()} == {
        name: data for name, (data, _) in before.items()
    }


@pytest.mark.slow
def test_jsonl_with_scores_for_each_loser(model, clips, tmp_path):
    row = {"clip": "red.mp4", "prompt": "a red ball falls", "key": "red", "scores": [[0, 1], [0.5, 0.25]]}
    shutil.copy(clips / "red.mp4", tmp_path)  # relative to the manifest
    manifest = tmp_path / "clips.jsonl"
    manifest.write_text(json.dumps({**row, "physics_richness": 0.7}) + "\n", encoding="utf-8")
    build.main(arguments(model, manifest, tmp_path / "out"))
    group = by_key(tmp_path / "out")["red"]
    assert [(j.semantic, j.physical) for j in group.losers_info] == [(0.0, 1.0), (0.5, 0.25)]
    assert group.physics_richness == 0.7 and group.source == "red.mp4 at 0 s"


@pytest.mark.parametrize("family", ["wan22_ti2v", "wan22_i2v"])
@pytest.mark.slow
def test_groups_from_an_image_keep_the_first_frames_latents(family, clips, tmp_path, capsys):
    model = write_tiny_pipeline(family, tmp_path / "model")
    manifest = write_manifest(tmp_path / "clips.csv", clips, good_rows()[:1])
    more = (f"backbone.family={family}", "pipeline.losers.count=1", "pipeline.first_frame=true")
    build.main(arguments(model, manifest, tmp_path / "out", *more, "--dry-run"))
    planned = capsys.readouterr().out
    build.main(arguments(model, manifest, tmp_path / "out", *more))
    group = by_key(tmp_path / "out")["red"]
    channels, frames, rows, columns = group.winner.shape
    kept = frames if family == "wan22_i2v" else 1
    assert group.condition.shape == (channels, kept, rows, columns)
    if family == "wan22_ti2v":  # the first latent frame is the image's
        assert torch.equal(group.losers[0, :, :1], group.condition)
    stored = 2 * (group.winner.numel() + group.losers.numel() + group.condition.numel())
    assert f"{stored:,} bytes per group" in planned


@pytest.mark.slow
def test_ti2v_groups_are_from_text_unless_a_first_frame_is_asked_for(clips, tmp_path, capsys):
    """In the same folder: the change makes winners and losers anew, the same ones on the way back."""
    model = write_tiny_pipeline("wan22_ti2v", tmp_path / "model")
    manifest = write_manifest(tmp_path / "clips.csv", clips, good_rows()[:1])
    more = ("backbone.family=wan22_ti2v", "pipeline.losers.count=1")
    build.main(arguments(model, manifest, tmp_path / "out", *more, "--dry-run"))
    planned = capsys.readouterr().out
    build.main(arguments(model, manifest, tmp_path / "out", *more))
    text = by_key(tmp_path / "out")["red"]
    assert text.condition is None
    assert f"{2 * (text.winner.numel() + text.losers.numel()):,} bytes per group" in planned
    build.main(arguments(model, manifest, tmp_path / "out", *more, "pipeline.first_frame=true"))
    image = by_key(tmp_path / "out")["red"]
    assert torch.equal(image.winner, text.winner) and torch.equal(image.losers[0, :, :1], image.condition)
    assert not torch.equal(text.losers[0, :, :1], image.condition)
    build.main(arguments(model, manifest, tmp_path / "out", *more, "pipeline.first_frame=false"))
    again = by_key(tmp_path / "out")["red"]
    assert again.condition is None and torch.equal(again.losers, text.losers)


@pytest.mark.parametrize(
    ("family", "asked", "said"),
    [("wan21", "true", "generates from text alone"), ("wan22_i2v", "false", "begins every clip with an image")],
)
def test_a_first_frame_that_the_family_has_not_is_refused_before_any_work(family, asked, said, clips, tmp_path):
    model = write_tiny_pipeline(family, tmp_path / "model")
    manifest = write_manifest(tmp_path / "clips.csv", clips, good_rows()[:1])
    run = arguments(model, manifest, tmp_path / "out", f"backbone.family={family}", f"pipeline.first_frame={asked}")
    for more in ((), ("--dry-run",)):
        with pytest.raises(ValueError, match=f"pipeline.first_frame={asked}: this backbone.family {said}"):
            build.main([*run, *more])
    assert not (tmp_path / "out").exists()


def simulated(model: Path, output: Path, *more: str) -> list[str]:
    small = ("video.height=32", "video.width=32", "video.num_frames=9", "video.fps=4")
    settings = (*small, "pipeline.unit_size=4", "pipeline.encode_batch=3", *more)
    return arguments(model, Path("sandbox:mixed:6"), output, *settings)


@pytest.mark.slow
def test_simulated_clips_come_without_files_and_losers(model, tmp_path, monkeypatch):
    asked = []
    real = config.load_backbone
    monkeypatch.setattr(config, "load_backbone", lambda *a, parts: asked.append(parts) or real(*a, parts=parts))
    build.main(simulated(model, tmp_path / "out", "pipeline.losers.count=0"))
    assert set(asked) == {(), ("text", "vae")}  # no transformer
    groups = by_key(tmp_path / "out")
    assert verify(tmp_path / "out" / "groups") == []
    assert len(groups) == 6 and {key[-6:] for key in groups} == {f"{number:06d}" for number in range(6)}
    backbone = load_backbone(BackboneConfig(path=str(model), dtype="float32", text_length=32), "cpu")
    video = VideoConfig(32, 32, 9, 4.0)
    for clip, (key, group) in zip(list_clips("mixed", "train", 0, 6, video), groups.items(), strict=True):
        assert key.startswith(clip.shown) and group.action == clip.shown and group.prompt == clip.prompt
        assert group.losers.shape == (0, 16, 3, 4, 4) and group.losers_info == []
        frames = simulate_block("mixed", "train", 0, clip.block, video).frames[clip.index]
        latents = backbone.encode_video(from_pixels(frames)[None])[0]
        torch.testing.assert_close(group.winner.float(), latents, atol=0.02, rtol=0.01)  # stored in bfloat16
        torch.testing.assert_close(group.text, unpad(backbone.encode_text([clip.prompt])[0]).bfloat16())

    # More clips: the old ones stay, and what is built is not built again. Another seed gives other clips.
    before = shards(tmp_path / "out")
    more = simulated(model, tmp_path / "out", "pipeline.losers.count=0", "pipeline.manifest=sandbox:mixed:8")
    build.main(more)
    after = shards(tmp_path / "out")
    assert after["unit-00000.tar"] == before["unit-00000.tar"]
    grown = by_key(tmp_path / "out")
    assert len(grown) == 8 and all(torch.equal(grown[key].winner, groups[key].winner) for key in groups)
    build.main(simulated(model, tmp_path / "other", "pipeline.losers.count=0", "seed=1"))
    other = by_key(tmp_path / "other")
    assert all(key not in other or not torch.equal(other[key].winner, groups[key].winner) for key in groups)


@pytest.mark.slow
def test_simulated_clips_with_losers_and_in_one_batch_or_several(model, tmp_path):
    build.main(simulated(model, tmp_path / "three"))
    build.main(simulated(model, tmp_path / "one", "pipeline.encode_batch=1"))
    three, one = by_key(tmp_path / "three"), by_key(tmp_path / "one")
    assert list(three) == list(one)
    for key in three:
        assert three[key].losers.shape == (2, 16, 3, 4, 4)
        torch.testing.assert_close(three[key].winner, one[key].winner, atol=0.02, rtol=0.02)
        assert three[key].losers_info == one[key].losers_info


@pytest.mark.slow
def test_the_judge_scores_every_loser_that_nobody_scored(model, tmp_path, monkeypatch):
    output = tmp_path / "out"
    build.main(simulated(model, output))
    neutral = by_key(output)
    assert {(loser.semantic, loser.physical) for group in neutral.values() for loser in group.losers_info} == {
        (0.5, 0.5)
    }
    monkeypatch.setattr(ClipMaker, "generate", lambda *_: pytest.fail("a clip was generated again"))
    monkeypatch.setattr(Encode, "encode", lambda *_: pytest.fail("a clip was encoded again"))
    build.main(simulated(model, output, "judge.name=sandbox"))
    judged = by_key(output)
    backbone = load_backbone(BackboneConfig(path=str(model), dtype="float32", text_length=32), "cpu")
    judge = sandbox_judge(SandboxJudgeConfig(fps=4), "cpu")
    for key, group in judged.items():
        assert torch.equal(group.losers, neutral[key].losers)
        expected = judge(to_pixels(backbone.decode_latents(group.losers)), [group.prompt] * 2)
        found = torch.tensor([(loser.semantic, loser.physical) for loser in group.losers_info])
        assert found.allclose(torch.stack([expected.semantic, expected.physical], dim=1), atol=0.01)
        assert (found[:, 1] < 0.2).all()  # a random network's clips are noise
    first = next(iter(judged))
    (tmp_path / "scores.csv").write_text(f"key,loser,semantic,physical\n{first},1,0.25,0.75\n", encoding="utf-8")
    build.main(simulated(model, output, "judge.name=sandbox", f"pipeline.scores={tmp_path / 'scores.csv'}"))
    mixed = by_key(output)
    assert mixed[first].losers_info[0].physical == pytest.approx(judged[first].losers_info[0].physical, abs=1e-4)
    assert (mixed[first].losers_info[1].semantic, mixed[first].losers_info[1].physical) == (0.25, 0.75)


@pytest.mark.slow
def test_targets_of_the_winners_are_made_once(model, tmp_path, monkeypatch):
    more = ("targets.tracks=simulator", "targets.grid=4", "pipeline.losers.count=0")
    build.main(simulated(model, tmp_path / "out", *more))
    before = by_key(tmp_path / "out")
    for group in before.values():
        assert group.extra["tracks"].shape == (9, 16, 2) and group.extra["visible"].dtype == torch.bool
    monkeypatch.setattr(TargetMaker, "make", lambda *_, **__: pytest.fail("targets were made again"))
    monkeypatch.setattr(Encode, "encode", lambda *_: pytest.fail("a clip was encoded again"))
    build.main(simulated(model, tmp_path / "out", *more, "pipeline.unit_size=5"))
    after = by_key(tmp_path / "out")
    assert all(torch.equal(after[key].extra["tracks"], before[key].extra["tracks"]) for key in before)
    build.main(simulated(model, tmp_path / "out", *more, "targets.tracks=''"))
    assert not any(group.extra for group in by_key(tmp_path / "out").values())


@pytest.mark.slow
def test_a_bad_clip_spoils_no_other_of_its_batch(model, clips, tmp_path):
    rows = [{"clip": "red", "key": "a"}, {"clip": "cut", "key": "b"}, {"clip": "green", "key": "c"}]
    manifest = write_manifest(tmp_path / "clips.csv", clips, rows)
    build.main(arguments(model, manifest, tmp_path / "out", "pipeline.encode_batch=4", "pipeline.unit_size=4"))
    assert list(by_key(tmp_path / "out")) == ["a", "c"]
    assert [(row["key"], row["reason"]) for row in quarantine(tmp_path / "out")] == [("b", "truncated")]


def test_prompts_that_the_text_encoder_cuts_are_counted_and_named(model, clips, tmp_path, capsys):
    """Every letter that is in no word of the tiny tokenizer is a token; 31 and the end token are read."""
    rows = [
        {"clip": name, "key": name, "prompt": "9" * count} for name, count in zip(GOOD, (31, 40, 5, 41), strict=False)
    ]
    out = [write_manifest(tmp_path / "clips.csv", clips, rows), tmp_path / "out"]
    read = load_backbone(BackboneConfig(path=str(model), text_length=32), "cpu", parts=("tokenizer",))
    lengths = [len(read.tokenizer(row["prompt"]).input_ids) for row in rows]
    over = sum(length > 32 for length in lengths)
    assert 0 < over < 4
    build.main(arguments(model, *out, "pipeline.losers.count=0"))
    first = next(row["clip"] for row, length in zip(rows, lengths, strict=True) if length > 32)
    line = f"warning: {over} prompts are longer than the 32 tokens that the text encoder reads, and cut there; "
    assert f"{line}the first is that of {clips / first}.mp4 (key {first})\n" in capsys.readouterr().out


def hold(folders: list[Path], task: str, held, release) -> None:
    """Locks in a process of its own, until told to let go."""
    with ExitStack() as stack:
        for folder in folders:
            stack.enter_context(lock(folder, task=task))
        held.set()
        release.wait(60)


@pytest.mark.slow
@pytest.mark.parametrize("place", ["pipeline", "groups"])
def test_a_second_build_in_a_folder_is_refused_with_the_first_ones_name(place, model, clips, tmp_path):
    context = multiprocessing.get_context("spawn")
    held, release = context.Event(), context.Event()
    args = arguments(model, write_manifest(tmp_path / "clips.csv", clips, good_rows()), tmp_path / "out")
    first = context.Process(target=hold, args=([tmp_path / "out" / place], "", held, release))
    first.start()
    assert held.wait(60)
    with pytest.raises(ValueError, match=f"out/{place} is in use by process {first.pid} on .* since .*: wait for it"):
        build.main([*args, "pipeline.stage=pool"])
    assert [path.name for path in (tmp_path / "out").rglob("*") if path.is_file()] == [".lock"] * (
        1 + (place == "groups")
    )
    release.set()
    first.join(60)
    build.main([*args, "pipeline.stage=pool"])
    assert summary(tmp_path / "out", "pool")["kept"] == len(GOOD)


@pytest.mark.slow
def test_the_tasks_of_an_array_share_a_folder_and_a_plain_build_waits_for_them(model, clips, tmp_path):
    context = multiprocessing.get_context("spawn")
    held, release = context.Event(), context.Event()
    args = arguments(model, write_manifest(tmp_path / "clips.csv", clips, good_rows()), tmp_path / "out")
    args.append("pipeline.stage=pool")
    folders = [tmp_path / "out" / "pipeline", tmp_path / "out" / "groups"]
    first = context.Process(target=hold, args=(folders, "task-1", held, release))
    first.start()
    assert held.wait(60)
    build.main([*args, "pipeline.array_count=2", "pipeline.array_index=0"])
    for more in (["pipeline.array_count=2", "pipeline.array_index=1"], []):
        with pytest.raises(ValueError, match="out/pipeline is in use by"):
            build.main([*args, *more])
    release.set()
    first.join(60)
    build.main([*args, "pipeline.array_count=2", "pipeline.array_index=1"])


@pytest.mark.slow
def test_a_damaged_loser_is_named_and_made_anew(built, copied, model):
    before = shards(copied / "out")
    store = copied / "out" / "pipeline" / "generate" / "losers"
    victim = sorted(store.glob("??/*.safetensors"))[1]
    whole = victim.read_bytes()
    victim.write_bytes(whole[:-7] + bytes([whole[-7] ^ 1]) + whole[-6:])  # one bit of a latent
    for name in before:
        (copied / "out" / "groups" / name).unlink()
    with pytest.raises(ValueError, match=f"{victim.name} is missing or damaged: run the whole build again"):
        build.main(arguments(model, built / "clips.csv", copied / "out"))
    build.main(arguments(model, built / "clips.csv", copied / "out"))
    assert victim.read_bytes() == whole
    assert {name: data for name, (data, _) in shards(copied / "out").items()} == {
        name: data for name, (data, _) in before.items()
    }


def test_no_usable_row_is_an_error_that_names_the_reasons(model, clips, tmp_path):
    manifest = write_manifest(tmp_path / "clips.csv", clips, [{"clip": "none"}, {"clip": "text"}])
    with pytest.raises(ValueError, match=r"no row of .* is usable \(.*missing 1.*\): see .*quarantine.jsonl"):
        build.main(arguments(model, manifest, tmp_path / "out"))
    assert summary(tmp_path / "out", "generate")["kept"] == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("video.height=60", "height=60 is no multiple of 16.*64"),
        ("video.num_frames=10", "num_frames=10"),
        ("pipeline.losers.count=-1", "pipeline.losers.count=-1: use 0 or more"),
        ("pipeline.losers.start_time=0", "pipeline.losers.start_time=0.0: must lie in .0, 1."),
        ("pipeline.losers.start_time=1.1", "pipeline.losers.start_time=1.1: must lie in .0, 1."),
        ("pipeline.losers.solver=heun", "pipeline.losers.solver='heun': must be one of euler, unipc, dpm"),
        ("pipeline.losers.cache=2", "pipeline.losers.cache=2.0: give 0"),
        ("pipeline.num_losers=3", "pipeline.num_losers; it is pipeline.losers.count now"),
        ("pipeline.encode_batch=0", "pipeline.encode_batch=0: use 1 or more"),
        ("pipeline.manifest=sandbox:mixed", "sandbox:<scene>:<count>.*projectile"),
        ("pipeline.manifest=sandbox:mixed:0", "sandbox:<scene>:<count>"),
        ("pipeline.manifest=sandbox:fountain:4", "scene out of mixed, projectile"),
        ("pipeline.manifest=sandbox:mixed:4:test", "split 'test' is unknown"),
        ("pipeline.manifest=''", "pipeline.manifest is empty"),
        ("pipeline.manifest=none.csv", "pipeline.manifest=none.csv: no such file"),
        ("pipeline.scores=none.csv", "pipeline.scores=none.csv: no such file"),
        ("pipeline.loosers=3", "did you mean 'losers'"),
        ("pipeline.judge.name=sandbox", "unknown key pipeline.judge; it is judge, .* now"),
        ("pipeline.targets.tracks=simulator", "unknown key pipeline.targets; it is targets now"),
        ("pipeline.filter.vlm.model=m", "pipeline.filter.vlm; it is vlm .and pipeline.filter.enabled=true. now"),
        ("pipeline.table_rows=3", "it is the constant data_pipeline.tables.TABLE_ROWS now"),
        ("pipeline.filter.enabled=true", "vlm.model is empty"),
        ("judge.name=wizard", "judge.name='wizard' is no judge"),
        ("pipeline.stage=jugde", "'jugde' is no stage; use all, one of pool, filter"),
        ("pipeline.stage=judge..filter", "filter comes before judge"),
        ("pipeline.array_index=2", "pipeline.array_index=2: use 0 ... array_count - 1 = 0"),
        ("pipeline.array_count=2", "one array per stage"),
    ],
)
def test_wrong_settings_stop_before_any_work(built, model, tmp_path, no_weights, change, message):
    with pytest.raises(ValueError, match=message):
        build.main(arguments(model, built / "clips.csv", tmp_path / "out", change))
    assert not list(tmp_path.rglob("*.tar"))


def test_missing_column_stops_before_any_work(model, tmp_path, no_weights):
    (tmp_path / "clips.csv").write_text("clip,caption\na.mp4,A\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"clips\.csv has no column 'prompt'; found: clip, caption"):
        build.main(arguments(model, tmp_path / "clips.csv", tmp_path / "out"))


def test_dry_run_prints_the_numbers_and_writes_nothing(built, model, tmp_path, no_weights, capsys):
    build.main(arguments(model, built / "clips.csv", tmp_path / "out", "--dry-run"))
    printed = capsys.readouterr().out
    for line in (
        "rows            5, of which 5 usable",
        "units           3 of 2 rows",
        "latent shape    (16, 3, 8, 8)",
        "tokens          48 per clip",
        "10 clips of 4 passes",
        "5 clips; 18,432 bytes per group, without its text",
    ):
        assert line in printed
    assert not (tmp_path / "out").exists()


def test_dry_run_needs_no_model_at_all(built, capsys):
    build.main([f"pipeline.manifest={built / 'clips.csv'}", "backbone.path=owner/model", "--dry-run"])
    printed = capsys.readouterr().out
    assert "latent shape    (16, 21, 60, 104)" in printed and "tokens          32760" in printed


@pytest.mark.slow
def test_stages_run_alone_and_in_ranges_and_leave_tables(built, model, tmp_path, capsys):
    def run(stage):
        build.main(arguments(model, built / "clips.csv", tmp_path / "out", f"pipeline.stage={stage}"))

    with pytest.raises(ValueError, match="stage=encode needs the table of pool, .*run pipeline.stage=pool first"):
        run("encode")
    run("pool..resample")
    assert not (tmp_path / "out" / "pipeline" / "generate").exists()
    with pytest.raises(ValueError, match="stage=judge needs the table of generate, of which 3 of 3"):
        run("judge")
    run("generate")
    run("judge..targets")
    assert not list(tmp_path.rglob("*.tar"))
    run("encode")
    index = tmp_path / "out" / "groups" / "index.json"
    assert index.read_bytes() == (built / "out" / "groups" / "index.json").read_bytes()
    printed = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert printed == ["pool", "generate", "judge", "encode", "groups:"]
    table = pq.read_table(tables_of(tmp_path / "out", "targets")[0])
    assert table.schema.names[:10] == POOL.names
    assert {"parse", "category", "difficulty", "seeds", "semantic", "physical"} <= set(table.schema.names)
    assert table["seeds"].to_pylist()[1] == [seed_of(0, "green", loser) for loser in range(2)]


def times(output: Path) -> dict[str, set[int]]:
    """When the tables of each stage were written."""
    return {stage: {path.stat().st_mtime_ns for path in tables_of(output, stage)} for stage in STAGES}


@pytest.mark.parametrize(
    ("change", "changed"),
    [
        pytest.param("sampler.steps=3", ["generate", "encode"], marks=pytest.mark.slow),  # nobody judges here
        pytest.param("judge.name=sandbox", ["judge", "targets", "encode"], marks=pytest.mark.slow),
        ("pipeline.batch_size=2", []),
    ],
)
def test_a_changed_setting_rebuilds_what_depends_on_it(built, copied, model, monkeypatch, change, changed):
    before = times(copied / "out")
    monkeypatch.setattr(Encode, "encode", lambda *_: pytest.fail("a winner was encoded again"))
    if "generate" not in changed:
        monkeypatch.setattr(ClipMaker, "generate", lambda *_: pytest.fail("a clip was generated again"))
    build.main(arguments(model, built / "clips.csv", copied / "out", change))
    after = times(copied / "out")
    assert [stage for stage in STAGES if after[stage] != before[stage]] == changed


@pytest.mark.slow
def test_other_pieces_of_the_first_tables_change_no_later_stage(built, copied, model, no_weights, monkeypatch):
    before = times(copied / "out")
    monkeypatch.setattr(tables, "TABLE_ROWS", 3)
    build.main(arguments(model, built / "clips.csv", copied / "out"))
    changed = [stage for stage, written in times(copied / "out").items() if written != before[stage]]
    assert changed == ["pool", "filter", "cluster", "difficulty", "resample"]


@pytest.mark.slow
def test_hostile_clips_of_every_source_harm_nothing(model, clips, tmp_path, monkeypatch):
    """Shell metacharacters, path traversal, a damaged clip, duplicate keys: all in one build."""
    folder, captions = tmp_path / "in", ["`touch pwned`; $(touch pwned) && rm -rf ~ | cat 'A' \"B\"", "x" * 100_000]
    folder.mkdir()
    for name, caption in zip(("red", "green"), captions, strict=True):
        shutil.copy(clips / f"{name}.mp4", folder / f"{name}; touch pwned.mp4")
        (folder / f"{name}; touch pwned.txt").write_text(caption, encoding="utf-8")
    with tarfile.open(tmp_path / "shard.tar", "w") as tar:
        for name, source in (("../../blue", "blue"), ("/abs/cut", "cut"), ("../../blue", "grey")):
            for data, suffix in (((clips / f"{source}.mp4").read_bytes(), "mp4"), (b"../../caption", "txt")):
                info = tarfile.TarInfo(f"{name}.{suffix}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    out = tmp_path / "deep" / "out"
    more = (f"pipeline.manifest=[{folder},{tmp_path / 'shard.tar'}]", "pipeline.save_losers=true")
    build.main(arguments(model, "", out, *more))
    assert [group.prompt for group in by_key(out).values()] == [captions[0], "../../caption"]
    reasons = sorted((row["stage"], row["reason"]) for row in quarantine(out))
    assert reasons == [("generate", "truncated"), ("pool", "duplicate key"), ("pool", "too long")]
    made = {path.relative_to(tmp_path).parts[0] for path in tmp_path.rglob("*")}
    assert made == {"in", "shard.tar", "cwd", "deep"} and not list((tmp_path / "cwd").iterdir())
    assert {path.name for path in (tmp_path / "deep").iterdir()} == {"out"}
    assert {path.name for path in out.iterdir()} == {"groups", "pipeline", "losers"}


@pytest.mark.slow
def test_losers_that_are_no_numbers_are_left_out(model, built, tmp_path, monkeypatch):
    real = ClipMaker.generate

    def overflowing(self, rows, begins):
        factors = [float("nan") if row["key"] == "blue" else 1 for row in rows]
        made = real(self, rows, begins)
        return [{"losers": kept["losers"] * factor} for kept, factor in zip(made, factors, strict=True)]

    monkeypatch.setattr(ClipMaker, "generate", overflowing)
    build.main(arguments(model, built / "clips.csv", tmp_path / "out"))
    assert list(by_key(tmp_path / "out")) == ["red", "green", "grey", "pink"]
    (bad,) = quarantine(tmp_path / "out")
    assert (bad["stage"], bad["key"], bad["reason"]) == ("encode", "blue", "unusable") and "not finite" in bad["detail"]


@pytest.mark.slow
def test_a_clip_that_the_judge_refuses_is_left_out(model, built, tmp_path, monkeypatch):
    def judge(clips, prompts):
        found = [number for number, prompt in enumerate(prompts) if "green" not in prompt]
        scores = Scores(torch.full((len(found),), 0.25), torch.full((len(found),), 0.75))
        refused = {number: "no answer" for number in range(len(prompts)) if number not in found}
        if refused:
            raise Unjudged(refused, prompts, scores)
        return scores

    monkeypatch.setattr(config, "build_judge", lambda *_: judge)
    build.main(arguments(model, built / "clips.csv", tmp_path / "out", "judge.name=sandbox"))
    groups = by_key(tmp_path / "out")
    assert list(groups) == ["red", "blue", "grey", "pink"]
    assert {(j.semantic, j.physical) for group in groups.values() for j in group.losers_info} == {(0.25, 0.75)}
    (bad,) = quarantine(tmp_path / "out")
    assert (bad["stage"], bad["key"], bad["reason"], bad["detail"]) == (
        "judge",
        "green",
        "not judged",
        "loser 1: no answer",
    )


@pytest.mark.slow
def test_saved_losers_follow_the_settings(built, copied, model):
    """mp4 files of other settings are written anew, also when their latents were kept."""
    more = ("pipeline.save_losers=true", "pipeline.stage=generate..judge")
    clip = copied / "out" / "losers" / "red-0.mp4"
    shown = []
    for steps in (2, 3, 2):
        build.main(arguments(model, built / "clips.csv", copied / "out", f"sampler.steps={steps}", *more))
        shown.append(clip.read_bytes())
    assert shown[0] == shown[2] != shown[1]
    clip.unlink()
    build.main(arguments(model, built / "clips.csv", copied / "out", *more))
    assert clip.read_bytes() == shown[0]


@pytest.mark.slow
def test_two_processes_write_what_one_writes(built, model, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += ["-m", "data_pipeline.build", *arguments(model, built / "clips.csv", tmp_path / "out")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    run = subprocess.Popen(command, cwd=tmp_path, env=environment, start_new_session=True, **pipes)
    try:
        printed, errors = run.communicate(timeout=600)
    finally:
        if run.poll() is None:
            os.killpg(run.pid, signal.SIGKILL)  # the ranks too
    assert run.returncode == 0, errors
    assert "3/3" in errors and "5/5" not in errors  # the main process made the first and the third unit
    assert printed.count("groups: ") == 1
    index = tmp_path / "out" / "groups" / "index.json"
    assert index.read_bytes() == (built / "out" / "groups" / "index.json").read_bytes()
