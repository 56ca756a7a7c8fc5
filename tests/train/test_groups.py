"""Shard format, errors and the training order of `train/groups.py`."""

import errno
import itertools
import json
import math
import os
from collections import Counter
from dataclasses import dataclass, replace

import pytest
import safetensors.torch
import torch
import webdataset
from torch.utils.data import DataLoader

import train.groups
from tests.synthetic_groups import synthetic_group, write_synthetic_groups
from train.groups import (
    GroupSet,
    GroupStream,
    Loser,
    ShardWriter,
    assignment,
    generated_winner,
    pad_text,
    positions,
    shard_record,
    verify,
    write_index,
)

VIDEO = {"height": 32, "width": 32, "num_frames": 5, "fps": 16.0}


def make_group(number=0, *, num_losers=2, **changes):
    group = synthetic_group(
        number, num_losers=num_losers, latent_shape=(4, 2, 4, 4), text_shape=(5, 8), fingerprint="tiny-1", seed=0
    )
    return replace(group, **changes)


def write_shard(folder, name, *groups):
    with ShardWriter(folder, name) as writer:
        for group in groups:
            writer.write(group)
    return writer.record


def assert_equal_groups(left, right):
    for name in ("key", "prompt", "action", "physics_richness", "source", "losers_info", "fingerprint"):
        assert getattr(left, name) == getattr(right, name)
    assert left.extra.keys() == right.extra.keys()
    pairs = [(getattr(left, name), getattr(right, name)) for name in ("winner", "losers", "text", "condition")]
    for one, other in pairs + [(left.extra[name], right.extra[name]) for name in left.extra]:
        assert (one is None) == (other is None)
        if one is not None:
            assert one.dtype == other.dtype and torch.equal(one, other)


def flip_byte(path, offset):
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)


def test_round_trip_keeps_every_field(tmp_path):
    full = make_group(
        0,
        prompt='Ein Glas fällt; "물이" spills\n',
        physics_richness=None,
        condition=torch.full((4, 1, 4, 4), 0.5, dtype=torch.bfloat16),
        extra={"tracks": torch.rand(2, 7, 2), "visibility": torch.tensor([[True, False]])},
    )
    # Views that share memory and are not contiguous must be stored as what they show.
    base = torch.randn(3, 4, 4, 2, 4, generator=torch.Generator().manual_seed(1)).bfloat16().transpose(2, 3)
    views = make_group(1, winner=base[0], losers=base[1:])
    write_shard(tmp_path, "a", full, views)
    write_shard(tmp_path, "b", make_group(2, num_losers=3))
    write_index(tmp_path, fingerprint="tiny-1", video=VIDEO)

    groups = GroupSet(tmp_path, fingerprint="tiny-1")
    assert [groups.num_losers(index) for index in range(len(groups))] == [2, 2, 3]
    assert groups.latent_shape == (4, 2, 4, 4) and groups.latent_dtype == torch.bfloat16
    assert groups.video == VIDEO and groups.total_bytes == sum(p.stat().st_size for p in tmp_path.glob("*.tar"))
    for read, written in zip(groups, (full, views, make_group(2, num_losers=3)), strict=True):
        assert_equal_groups(read, written)
    assert verify(tmp_path) == []


def test_equal_groups_give_equal_bytes_whatever_the_order_of_extras(tmp_path):
    tracks, mask = torch.rand(2, 7, 2), torch.ones(4, 4, dtype=torch.bool)
    write_shard(tmp_path / "one", "a", make_group(extra={"tracks": tracks, "mask": mask}))
    write_shard(tmp_path / "two", "a", make_group(extra={"mask": mask, "tracks": tracks}))
    for name in ("a.tar", "a.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_webdataset_reads_the_shards(tmp_path):
    write_synthetic_groups(tmp_path, num_groups=5, samples_per_shard=2)
    shards = sorted(str(path) for path in tmp_path.glob("*.tar"))
    samples = list(webdataset.WebDataset(shards, shardshuffle=False))
    assert [sample["__key__"] for sample in samples] == [f"group-{number:06d}" for number in range(5)]
    for sample, group in zip(samples, GroupSet(tmp_path), strict=True):
        assert json.loads(sample["json"])["prompt"] == group.prompt
        assert torch.equal(safetensors.torch.load(sample["safetensors"])["losers"], group.losers)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt": " \n"}, "prompt is empty"),
        ({"fingerprint": ""}, "fingerprint is empty"),
        ({"key": "a/b"}, "key has 1 to 80 characters"),
        ({"key": ""}, "key has 1 to 80 characters"),
        ({"key": "a" * 81}, "key has 1 to 80 characters"),
        ({"physics_richness": math.inf}, "physics_richness is inf"),
        ({"losers_info": [Loser(0, 0.5, 0.5), Loser(1, math.nan, 0.5)]}, "loser 1 has semantic score nan"),
        ({"losers_info": [Loser(0, 0.5, math.inf), Loser(1, 0.5, 0.5)]}, "loser 0 has physical score inf"),
        ({"losers_info": [Loser(0, 0.5, 0.5), Loser(1, 0.5, 1.01)]}, "loser 1 has physical score 1.01"),
        ({"losers_info": [Loser(0, -0.1, 0.5), Loser(1, 0.5, 0.5)]}, "loser 0 has semantic score -0.1"),
        ({"losers_info": [Loser(0, 0.5, 0.5)]}, "1 loser records for 2 loser latents"),
        ({"losers": torch.zeros(2, 4, 2, 4, 5, dtype=torch.bfloat16)}, r"\(2, 4, 2, 4, 5\).*\(4, 2, 4, 4\)"),
        ({"losers": torch.zeros(2, 4, 2, 4, 4)}, "float32.*bfloat16"),
        ({"losers": torch.zeros(0, 4, 2, 4, 4, dtype=torch.bfloat16)}, "2 loser records for 0 loser latents"),
        (
            {"losers": torch.zeros(0, dtype=torch.bfloat16), "losers_info": []},
            r"losers \(0,\) bfloat16 must be a stack",
        ),
        ({"winner": torch.zeros(4, 4, 4, dtype=torch.bfloat16)}, "winner must be a float latent"),
        ({"winner": torch.full((4, 2, 4, 4), math.nan, dtype=torch.bfloat16)}, "'winner' has values that are not"),
        ({"losers": torch.full((2, 4, 2, 4, 4), math.inf, dtype=torch.bfloat16)}, "'losers' has values that are not"),
        ({"text": torch.zeros(0, 8)}, "text embedding must be"),
        ({"text": torch.full((5, 8), math.nan)}, "'text' has values that are not"),
        ({"extra": {"tracks": torch.tensor([math.nan])}}, "'extra.tracks' has values that are not"),
    ],
)
def test_a_useless_group_is_refused_and_leaves_nothing(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        write_shard(tmp_path, "a", make_group(0), make_group(1, **changes))
    assert list(tmp_path.iterdir()) == []


def test_a_shard_holds_a_key_once_and_one_kind_of_latent(tmp_path):
    with pytest.raises(ValueError, match="'group-000000'.*already holds"):
        write_shard(tmp_path, "a", make_group(0), make_group(0))
    with pytest.raises(ValueError, match="fingerprint tiny-2.*holds tiny-1"):
        write_shard(tmp_path, "a", make_group(0), make_group(1, fingerprint="tiny-2"))
    zeros = torch.zeros(3, 4, 2, 4, 8, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="latent_shape"):
        write_shard(tmp_path, "a", make_group(0), make_group(1, winner=zeros[0], losers=zeros[1:]))
    for name in ("index", "a/b", ""):
        with pytest.raises(ValueError, match="shard name"):
            ShardWriter(tmp_path, name)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_explained_and_leaves_earlier_shards(tmp_path, monkeypatch):
    write_shard(tmp_path, "a", make_group(0))

    class FullDisk:
        """A file on a disk with no room for a second group."""

        def __init__(self, *arguments):
            self.file = open(*arguments)

        def write(self, data):
            if self.file.tell():
                raise OSError(errno.ENOSPC, "No space left on device")
            return self.file.write(data)

        def close(self):
            self.file.close()
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(train.groups, "open", FullDisk, raising=False)
    with pytest.raises(OSError, match=r"b\.tar needs at least \d{4,} bytes.*shards are intact") as caught:
        write_shard(tmp_path, "b", make_group(1), make_group(2))
    monkeypatch.undo()
    assert caught.value.errno == errno.ENOSPC
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.json", "a.tar"]

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)  # some file systems only notice here
    with pytest.raises(OSError, match=r"b\.tar needs at least"):
        write_shard(tmp_path, "b", make_group(1))
    with pytest.raises(OSError, match=r"index\.json needs at least"):
        write_index(tmp_path, fingerprint="tiny-1", video=VIDEO)
    monkeypatch.undo()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.json", "a.tar"]
    write_index(tmp_path, fingerprint="tiny-1", video=VIDEO)
    assert verify(tmp_path) == []


def test_an_interrupted_shard_is_not_done(tmp_path):
    with pytest.raises(KeyboardInterrupt), ShardWriter(tmp_path, "a") as writer:
        writer.write(make_group(0))
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == [] and shard_record(tmp_path, "a") is None

    record = write_shard(tmp_path, "a", make_group(0))
    assert shard_record(tmp_path, "a") == record
    (tmp_path / "a.json").unlink()  # stopped between tar and marker
    assert shard_record(tmp_path, "a") is None
    with pytest.raises(ValueError, match="'a'.*not finished"):
        write_index(tmp_path, fingerprint="tiny-1", video=VIDEO)
    write_shard(tmp_path, "a", make_group(0))
    (tmp_path / "a.tar").unlink()
    assert shard_record(tmp_path, "a") is None
    with pytest.raises(ValueError, match="'a'.*not finished"):
        write_index(tmp_path, fingerprint="tiny-1", video=VIDEO)


def test_write_index_refuses_shards_that_do_not_belong_together(tmp_path):
    with pytest.raises(ValueError, match="no preference group"):
        write_index(tmp_path, fingerprint="tiny-1", video=VIDEO)
    write_shard(tmp_path, "a", make_group(0))
    with pytest.raises(ValueError, match="'a'.*tiny-1, not tiny-2"):
        write_index(tmp_path, fingerprint="tiny-2", video=VIDEO)
    write_shard(tmp_path, "b", make_group(1, fingerprint="tiny-2"))
    with pytest.raises(ValueError, match="'b'.*tiny-2, not tiny-1.*delete b.tar and b.json"):
        write_index(tmp_path, fingerprint="tiny-1", video=VIDEO)
    write_shard(tmp_path, "b", make_group(0))
    with pytest.raises(ValueError, match="'group-000000' is in shard 'a' and in 'b'"):
        write_index(tmp_path, fingerprint="tiny-1", video=VIDEO)
    zeros = torch.zeros(3, 4, 2, 4, 8, dtype=torch.bfloat16)
    write_shard(tmp_path, "b", make_group(1, winner=zeros[0], losers=zeros[1:]))
    with pytest.raises(ValueError, match="'b'.*latent_shape"):
        write_index(tmp_path, fingerprint="tiny-1", video=VIDEO)
    assert not (tmp_path / "index.json").exists()


def test_index_of_shards_written_in_any_order_with_an_empty_one(tmp_path):
    @dataclass
    class Video:
        height: int = 32

    write_shard(tmp_path, "c", make_group(2))
    write_shard(tmp_path, "b")
    write_shard(tmp_path, "a", make_group(1), make_group(0))
    index = write_index(tmp_path, fingerprint="tiny-1", video=Video())
    assert json.loads((tmp_path / "index.json").read_text(encoding="utf-8")) == index
    assert [shard["file"] for shard in index["shards"]] == ["a.tar", "b.tar", "c.tar"]
    assert [group.key[-1] for group in GroupSet(tmp_path)] == ["1", "0", "2"]
    assert index["num_groups"] == 3 and index["video"] == {"height": 32}
    assert verify(tmp_path) == []


def test_a_rebuilt_shard_makes_the_index_outdated(tmp_path):
    write_synthetic_groups(tmp_path, num_groups=2, samples_per_shard=1)
    write_shard(tmp_path, "shard-00000", make_group(0))
    with pytest.raises(ValueError, match="no index.json"):
        GroupSet(tmp_path)


def test_a_flipped_byte_is_found_on_reading_and_by_verify(tmp_path):
    index = write_synthetic_groups(tmp_path, num_groups=4, samples_per_shard=2)
    sample = index["shards"][1]["samples"][1]
    for offset in (sample["offset"] + 5, sample["offset"] + sample["bytes"] - 600):  # in a tar header; in a latent
        flip_byte(tmp_path / "shard-00001.tar", offset)
        groups = GroupSet(tmp_path)
        assert [groups[number].key for number in range(3)] == [f"group-{number:06d}" for number in range(3)]
        message = (
            rf"shard-00001\.tar.*'group-000003' at offset {sample['offset']}.*"
            "delete shard-00001.tar and shard-00001.json and run the build again"
        )
        with pytest.raises(ValueError, match=message):
            groups[3]
        (problem,) = verify(tmp_path)
        assert "shard-00001.tar" in problem and "'group-000003'" in problem
        flip_byte(tmp_path / "shard-00001.tar", offset)
    flip_byte(tmp_path / "shard-00000.tar", -1)
    (problem,) = verify(tmp_path)
    assert "outside its samples" in problem


def test_truncated_and_missing_shards_are_reported_on_opening(tmp_path):
    write_synthetic_groups(tmp_path, num_groups=4, samples_per_shard=2)
    path = tmp_path / "shard-00000.tar"
    data = path.read_bytes()
    path.write_bytes(data[:-1000])
    with pytest.raises(ValueError, match=rf"shard-00000.tar is {len(data) - 1000} bytes long, not {len(data)}"):
        GroupSet(tmp_path)
    path.unlink()
    with pytest.raises(ValueError, match="shard-00000.tar is missing"):
        GroupSet(tmp_path)
    assert len(verify(tmp_path)) == 1


def test_index_errors_name_both_sides_and_the_remedy(tmp_path):
    with pytest.raises(ValueError, match="no index.json.*run the build"):
        GroupSet(tmp_path)
    assert len(verify(tmp_path)) == 1
    write_synthetic_groups(tmp_path, num_groups=1, fingerprint="wan21-0123456789ab")
    with pytest.raises(ValueError, match="wan21-0123456789ab.*wan21-ba9876543210"):
        GroupSet(tmp_path, fingerprint="wan21-ba9876543210")
    index = json.loads((tmp_path / "index.json").read_text(encoding="utf-8"))
    (tmp_path / "index.json").write_text(json.dumps(index | {"schema": 99}), encoding="utf-8")
    with pytest.raises(ValueError, match="schema 99.*schema 1.*run the build"):
        GroupSet(tmp_path)
    (tmp_path / "index.json").write_text("{", encoding="utf-8")
    with pytest.raises(ValueError, match="not readable JSON.*run the build"):
        GroupSet(tmp_path)


@pytest.mark.parametrize("num_losers", [[1], [3], [2, 2, 2], [1, 4, 2, 3, 6]])
def test_every_pair_comes_exactly_once_a_cycle(num_losers):
    num_groups, epochs = len(num_losers), 2 * math.lcm(*num_losers)
    stream = [assignment(position, num_losers, seed=5) for position in range(num_groups * epochs)]
    for epoch in range(epochs):
        visited = [group for group, _ in stream[epoch * num_groups : (epoch + 1) * num_groups]]
        assert sorted(visited) == list(range(num_groups))
    for group, count in enumerate(num_losers):
        met = [loser for visited, loser in stream if visited == group]
        for cycle in range(epochs // count):
            assert sorted(met[cycle * count : (cycle + 1) * count]) == list(range(count))
    counts = Counter(stream)
    for group, count in enumerate(num_losers):
        assert [counts[group, loser] for loser in range(count)] == [epochs // count] * count


def test_order_depends_on_seed_and_epoch_only():
    num_losers = [4] * 50
    stream = [assignment(position, num_losers, 0) for position in range(200)]
    state = torch.random.get_rng_state()
    assert [assignment(position, num_losers, 0) for position in reversed(range(200))] == stream[::-1]
    assert torch.equal(torch.random.get_rng_state(), state)
    assert stream != [assignment(position, num_losers, 1) for position in range(200)]
    assert [group for group, _ in stream[:50]] != [group for group, _ in stream[50:100]]
    # Fixed for good: a run stopped under one version of the libraries continues the same stream under another.
    assert stream[:4] == [(16, 0), (25, 2), (9, 0), (21, 0)]


def test_stopping_and_resuming_on_other_numbers_of_ranks_keeps_the_stream():
    num_losers = [1, 4, 2, 3, 6]

    def consume(start, world, steps):
        """The samples that `world` ranks train on in `steps` steps, in the order of their positions."""
        ranks = [positions(start, rank, world) for rank in range(world)]
        return [assignment(next(rank), num_losers, 7) for _ in range(steps) for rank in ranks]

    whole = consume(0, 1, 60)
    assert consume(0, 1, 7) + consume(7, 1, 53) == whole
    # One rank stops after 6 samples, two after 14 more, three do the remaining 40 (the last step runs over by 2).
    assert (consume(0, 1, 6) + consume(6, 2, 7) + consume(20, 3, 14))[:60] == whole
    for start, rank, world in ((-1, 0, 1), (0, 2, 2), (0, -1, 2)):
        with pytest.raises(ValueError, match="positions need"):
            positions(start, rank, world)


def test_fewer_groups_and_shards_than_ranks(tmp_path):
    write_synthetic_groups(tmp_path, num_groups=2, num_losers=3, samples_per_shard=2)
    stream = GroupStream(GroupSet(tmp_path), seed=3)
    pairs = set()
    for rank in range(6):
        sample = stream[next(positions(0, rank, 6))]
        assert sample.position == rank
        pairs.add((sample.group.key, sample.loser_index))
    assert len(pairs) == 6


def test_workers_give_the_stream_of_the_main_process(tmp_path):
    write_synthetic_groups(tmp_path, num_groups=5, num_losers=[1, 3, 2, 1, 2], samples_per_shard=2)
    stream = GroupStream(GroupSet(tmp_path), seed=1)

    def load(count, **options):
        loader = DataLoader(stream, sampler=positions(3, 1, 2), batch_size=None, **options)
        return list(itertools.islice(loader, count))

    expected = load(12)
    assert [sample.position for sample in expected] == list(range(4, 28, 2))
    for options in (
        {"num_workers": 2, "multiprocessing_context": "fork"},
        {"num_workers": 1, "multiprocessing_context": "spawn"},
    ):
        for sample, other in zip(expected, load(12, **options), strict=True):
            assert (sample.position, sample.loser_index) == (other.position, other.loser_index)
            assert_equal_groups(sample.group, other.group)


def test_groups_without_losers_serve_supervised_training(tmp_path):
    write_synthetic_groups(tmp_path, num_groups=4, num_losers=[0, 2, 0, 0])
    groups = GroupSet(tmp_path)
    assert verify(tmp_path) == [] and [groups.num_losers(index) for index in range(4)] == [0, 2, 0, 0]
    assert groups[0].losers.shape == (0, 4, 2, 4, 4) and groups[0].losers.dtype == groups[0].winner.dtype
    samples = [GroupStream(groups, seed=0)[position] for position in range(8)]
    for epoch in (samples[:4], samples[4:]):
        assert sorted(sample.group.key for sample in epoch) == [f"group-{number:06d}" for number in range(4)]
    assert {s.loser_index for s in samples if s.group.key != "group-000001"} == {-1}
    assert {s.loser_index for s in samples if s.group.key == "group-000001"} == {0, 1}
    # A group of M losers comes in the same order whether or not others have any.
    order = [assignment(position, [2, 2], seed=1)[0] for position in range(6)]
    assert [assignment(position, [0, 2], seed=1)[0] for position in range(6)] == order
    with pytest.raises(ValueError, match="'group-000000'.*has 0"):
        GroupStream(groups, seed=0, winner="generated")


def test_generated_winner_is_the_best_loser(tmp_path):
    infos = [Loser(10, 0.25, 0.5), Loser(11, 0.75, 0.5), Loser(12, 0.5, 0.75), Loser(13, 0.0, 1.0)]
    group = make_group(0, num_losers=4, losers_info=infos, extra={"tracks": torch.zeros(1)})
    changed = generated_winner(group)
    assert torch.equal(changed.winner, group.losers[1])  # 11 and 12 tie: the first
    assert torch.equal(changed.losers, group.losers[[0, 2, 3]])
    assert [loser.seed for loser in changed.losers_info] == [10, 12, 13]
    assert changed.extra == {} and "11" in changed.source and changed.prompt == group.prompt
    assert len(group.losers) == 4 and torch.equal(group.winner, make_group(0, num_losers=4).winner)
    with pytest.raises(ValueError, match="at least 2 losers"):
        generated_winner(make_group(0, num_losers=1))

    write_shard(tmp_path, "a", group, make_group(1, num_losers=2))
    write_index(tmp_path, fingerprint="tiny-1", video=VIDEO)
    stream = GroupStream(GroupSet(tmp_path), seed=0, winner="generated")
    samples = [stream[position] for position in range(6)]
    met = sorted(s.group.losers_info[s.loser_index].seed for s in samples if s.group.key == "group-000000")
    assert met == [10, 12, 13]
    with pytest.raises(ValueError, match="'best'.*'real' or 'generated'"):
        GroupStream(GroupSet(tmp_path), seed=0, winner="best")
    write_shard(tmp_path, "b", make_group(2, num_losers=1))
    write_index(tmp_path, fingerprint="tiny-1", video=VIDEO)
    with pytest.raises(ValueError, match="'group-000002'.*has 1"):
        GroupStream(GroupSet(tmp_path), seed=0, winner="generated")


def test_pad_text():
    text = torch.ones(3, 2, dtype=torch.bfloat16)
    padded = pad_text(text, 5)
    assert padded.dtype == torch.bfloat16
    assert padded.tolist() == [[1, 1]] * 3 + [[0, 0]] * 2
    assert torch.equal(pad_text(text, 3), text)
    with pytest.raises(ValueError, match="3 tokens does not fit into 2"):
        pad_text(text, 2)
