"""Mutated inputs: each ends in the error that is documented for its kind, or is read, and is then what was written.

Every kind of file that a command reads is a `Target`. Its good bytes are changed at random, by seed, and read as the
commands read them. A mutation fails where it raises anything but a ValueError that this project worded in one line,
runs for more than 20 seconds of processor time, allocates more than 4 GiB, or gives other content in spite of a
checksum.

    PHYSALIGN_FUZZ=2000 python -m pytest -n 0 -m slow tests/test_fuzz.py

makes 2,000 mutations of each kind. A failure names the mutation's number, by which `mutation(target, number)` gives its
bytes again, and the place in the code.
"""

import json
import os
import random
import resource
import signal
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from data_pipeline.manifests import Row, read_manifest
from eval import vote
from eval.clips import Clip
from eval.loras import read_lora
from tests.synthetic_groups import replace_sample, sample_bytes, verify, write_synthetic_groups
from train import checkpoint, entry, export
from train.backbones.wan21 import Wan21
from train.clips import VideoConfig, read_clip, write_clip
from train.data import GroupStream
from train.groups import GroupSet, check_group, shard_record, write_index
from train.lora_switch import LoraConfig, LoraSwitch
from train.optimizer import OptimConfig, build_optimizer

COUNT = int(os.environ.get("PHYSALIGN_FUZZ", "200"))  # mutations of each kind
SECONDS = 20  # of processor time
MEMORY = 4 * 2**30  # bytes of address space beyond what the process has
FINGERPRINT = "tiny-random"

Random = random.Random
Mutate = Callable[[bytes, Random], bytes]


@dataclass
class Target:
    """One kind of input. `read` puts the bytes where they belong and reads them, and asserts what must not change then;
    it says whether they count as whole."""

    good: bytes
    mutate: Mutate
    read: Callable[[bytes], bool]


# ---- mutations -------------------------------------------------------------------------------------------------------

DEEP = "[deep]"  # stands for a list in a list, and so on, 100,000 times
VALUES = [None, True, False, 0, 1, -1, 2**31, 2**63, 10**400, 1e308, -0.0, float("nan"), float("inf"), "", "x", "é\n\0"]
VALUES += ["../../etc/passwd", "/dev/zero", "-1", "2000000000", "1e999", "nan", "[]", "\ud800", "a" * 100_000]
VALUES += [[], {}, [[]], {"": None}, [0] * 1000, DEEP]


def mutate_bytes(data: bytes, draw: Random) -> bytes:
    """One to four times: flip, overwrite, insert, delete, repeat or move a few bytes, or cut the end off."""
    changed = bytearray(data)
    for _ in range(draw.randint(1, 4)):
        place = draw.randrange(len(changed) + 1)
        length = draw.choice([1, 1, 2, 4, 8, 64, 512])
        part = bytes(changed[place : place + length])
        noise = draw.choice([draw.randbytes(length), b"\0" * length, b"\xff" * length, b'"', b"-", b"9" * length])
        edit = draw.randrange(7)
        if edit == 0 and part:
            changed[place] ^= 1 << draw.randrange(8)
        elif edit == 1:
            changed[place : place + length] = noise
        elif edit == 2:
            changed[place:place] = noise
        elif edit == 3:
            del changed[place : place + length]
        elif edit == 4:
            changed[place:place] = part
        elif edit == 5:
            del changed[place : place + length]
            place = draw.randrange(len(changed) + 1)
            changed[place:place] = part
        elif draw.random() < 0.3:
            del changed[place:]
    return bytes(changed)


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every container and key in a JSON value."""
    for key in list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield value, key
        yield from places(value[key])


def mutate_json(data: bytes, draw: Random) -> bytes:
    """Half of the time one to three values are replaced, deleted, moved, renamed or nudged; else bytes change."""
    if draw.random() < 0.5:
        return mutate_bytes(data, draw)
    content = [json.loads(data)]
    for _ in range(draw.randint(1, 3)):
        container, key = draw.choice(list(places(content)))
        other, other_key = draw.choice(list(places(content)))
        value, edit = container[key], draw.randrange(6)
        if edit == 0:
            container[key] = deepcopy(draw.choice(VALUES))
        elif edit == 1:
            container[key] = deepcopy(draw.choice([fit for fit in VALUES if type(fit) is type(value)] or VALUES))
        elif edit == 2:
            container[key] = deepcopy(other[other_key])
        elif edit == 3 and container is not content:
            del container[key]
        elif edit == 4 and isinstance(container, dict):
            container[draw.choice([str(other_key), key + "x"])] = container.pop(key)
        elif isinstance(value, int | float):
            container[key] = draw.choice(
                [value + 1, -value, value * 2**40, value - 0.5 if value < 2**60 else 0.5, str(value)]
            )
        elif isinstance(value, list):
            container[key] = draw.choice([value + deepcopy(value), value[:-1], value[::-1], {"0": value}])
        else:
            container[key] = [value]
    text = json.dumps(content[0], ensure_ascii=draw.random() < 0.5)
    return text.replace(json.dumps(DEEP), "[" * 100_000 + "]" * 100_000).encode("utf-8", "surrogatepass")


def mutate_tensors(data: bytes, draw: Random) -> bytes:
    """A safetensors file: mostly its header as JSON, with the right length in front."""
    if draw.random() < 0.2:
        return mutate_bytes(data, draw)
    end = 8 + int.from_bytes(data[:8], "little")
    header = mutate_json(data[8:end], draw)
    return len(header).to_bytes(8, "little") + header + data[end:]


def mutation(target: Target, number: int) -> bytes:
    return target.mutate(target.good, Random(number))


# ---- targets ---------------------------------------------------------------------------------------------------------


def describe_group(group) -> list[Any]:
    tensors = {"winner": group.winner, "losers": group.losers, "text": group.text, **group.extra}
    facts = [group.key, group.prompt, group.action, group.physics_richness, group.source, group.fingerprint]
    return [*facts, group.losers_info, {name: tensor.tolist() for name, tensor in tensors.items()}]


def write_groups(folder: Path, count: int) -> list[Any]:
    write_synthetic_groups(folder, num_groups=count, samples_per_shard=2, fingerprint=FINGERPRINT, targets=True)
    return [describe_group(group) for group in GroupSet(folder)]


def marker(folder: Path) -> Target:
    written = write_groups(folder, 4)
    file = folder / "shard-00000.json"

    def read(data: bytes) -> bool:
        file.write_bytes(data)
        if shard_record(folder, file.stem) is None:
            return False
        write_index(folder, fingerprint=FINGERPRINT, video={"fps": 16.0})
        assert [describe_group(group) for group in GroupSet(folder)] == written
        return True

    return Target(file.read_bytes(), mutate_json, read)


def index(folder: Path) -> Target:
    written = write_groups(folder, 4)
    file = folder / "index.json"

    def read(data: bytes) -> bool:
        file.write_bytes(data)
        problems = verify(folder)
        groups = GroupSet(folder)
        assert all(describe_group(group) in written for group in groups) or problems
        for sample in map(GroupStream(groups, seed=0).__getitem__, range(8)):
            assert 0 <= sample.loser_index < len(sample.group.losers)
        return not problems

    return Target(file.read_bytes(), mutate_json, read)


def shard(folder: Path) -> Target:
    """A sample with checksums that fit it: as it is, or put together anew from one mutated member."""
    write_groups(folder, 1)
    with open(folder / "shard-00000.tar", "rb") as tar:
        good = tar.read()[:-1024]
    json_end = 512 + int(good[124:135], 8)
    start = -(-json_end // 512) * 512 + 512
    tensors_end = start + int(good[start - 512 + 124 : start - 512 + 135], 8)

    def mutate(data: bytes, draw: Random) -> bytes:
        member = draw.randrange(3)
        if member == 0:
            return mutate_bytes(data, draw)
        description, tensors = data[512:json_end], data[start:tensors_end]
        if member == 1:
            return sample_bytes(mutate_json(description, draw), tensors)
        return sample_bytes(description, mutate_tensors(tensors, draw))

    index = (folder / "index.json").read_bytes()

    def read(data: bytes) -> bool:
        (folder / "index.json").write_bytes(index)
        replace_sample(folder, data)
        problems = verify(folder)
        check_group(GroupSet(folder)[0])
        return not problems

    return Target(good, mutate, read)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.to_q, self.to_k = nn.Linear(8, 8), nn.Linear(8, 8)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.attn1 = Attention()


def network() -> nn.Module:
    whole = nn.Module()
    whole.blocks = nn.ModuleList(Block() for _ in range(2))
    return whole


# What a backbone says of itself, for `read_lora`.
SHELL = SimpleNamespace(
    fingerprint=FINGERPRINT,
    fingerprints=(FINGERPRINT,),
    expert_folders=Wan21.expert_folders,
    architecture=Wan21.architectures["tiny"],
)


def write_checkpoint(folder: Path) -> Path:
    switch = LoraSwitch(network(), LoraConfig(rank=2, alpha=2.0, targets=["attn1.to_q"]))
    optimizer = build_optimizer(OptimConfig(), switch.parameters())
    for weight in switch.parameters():
        weight.grad = torch.ones_like(weight)
    optimizer.step()
    run = {"groups": {"folder": "groups", "digest": "0"}, "settings": {"optim.lr": 1.0e-4, "objective.beta": 500}}
    state = {"samples_seen": 16, "skipped": 1, "seed": 3, **run}
    metadata = checkpoint.weights_metadata(switch, fingerprint=FINGERPRINT, expert="transformer")
    more = {"switch": switch, "optimizer": optimizer, "state": state, "metadata": metadata}
    return checkpoint.save(folder, 2, **more, keep=1)


def checkpoint_state(folder: Path) -> Target:
    file = write_checkpoint(folder) / checkpoint.STATE_FILE
    good = file.read_bytes()

    def read(data: bytes) -> bool:
        file.write_bytes(data)
        with warnings.catch_warnings(action="ignore"):
            found = checkpoint.latest(folder)
        if found is not None:
            switch = LoraSwitch(network(), LoraConfig(rank=2, alpha=2.0, targets=["attn1.to_q"]))
            optimizer = build_optimizer(OptimConfig(), switch.parameters())
            more = {"fingerprint": FINGERPRINT, "expert": "transformer"}
            assert checkpoint.load(found, switch=switch, optimizer=optimizer, **more) == json.loads(good)
        return found is not None

    return Target(good, mutate_json, read)


def lora(folder: Path) -> Target:
    good = (write_checkpoint(folder / "run") / LoraSwitch.file).read_bytes()
    file = folder / "given.safetensors"

    def read(data: bytes) -> bool:
        file.write_bytes(data)
        read_lora(str(file), SHELL, key="generate.lora")
        uses = (
            lambda: checkpoint.attach_trained(file, {"transformer": network()}, fingerprint=FINGERPRINT),
            lambda: export.to_diffusers(file, folder / "diffusers.safetensors"),
            lambda: export.to_comfyui(file, folder / "comfyui.safetensors"),
        )
        refused = []
        for use in uses:
            try:
                use()
            except ValueError as error:
                if not entry.is_worded(error):
                    raise
                refused.append(error)
        if refused:
            raise refused[0]
        return True

    return Target(good, mutate_tensors, read)


def manifest_jsonl(folder: Path) -> Target:
    rows = [
        {"clip": "a.mp4", "prompt": "a ball falls", "key": "a", "action": "falling", "start": 1.5},
        {"clip": "b.mp4", "prompt": "ein Glas fällt", "scores": [[0.5, 0.25], [1, 0]], "physics_richness": 0.5},
        {"clip": "c.mp4", "prompt": "a pendulum", "semantic": 0.5, "physical": "0.75"},
    ]
    file = folder / "clips.jsonl"

    def mutate(data: bytes, draw: Random) -> bytes:
        if draw.random() < 0.3:
            return mutate_bytes(data, draw)
        lines = data.splitlines()
        chosen = draw.randrange(len(lines))
        lines[chosen] = mutate_json(lines[chosen], draw)
        return b"\n".join(lines)

    def read(data: bytes) -> bool:
        file.write_bytes(data)
        return all(isinstance(row, Row) for row in list(read_manifest(file, num_losers=2)))

    return Target("\n".join(map(json.dumps, rows)).encode(), mutate, read)


def votes(folder: Path) -> Target:
    """The key of a page and a rater's file, as one JSON value: either may be damaged."""
    for number, model in enumerate(("base", "tuned")):
        for prompt in range(4):
            clip = folder / model / f"p{prompt}-1.mp4"
            write_clip(clip, torch.full((2, 16, 16, 3), 40 * number + prompt, dtype=torch.uint8), 8.0)
            clip.with_suffix(".json").write_text(json.dumps({"prompt": f"ball {prompt}", "seed": 1}), encoding="utf-8")
    vote.write_page(folder / "page", folder / "base", folder / "tuned")
    key = json.loads((folder / "page" / "key.json").read_bytes())
    cast = [{"trial": number, "choice": "left", "seconds": 1.0} for number in range(len(key["trials"]))]
    good = [json.dumps(key), json.dumps({"page": key["page"], "rater": "ann", "votes": cast})]
    files = [folder / "key.json", folder / "votes.json"]
    between = b"\n\n"

    def mutate(data: bytes, draw: Random) -> bytes:
        parts = data.split(between)
        chosen = draw.randrange(2)
        parts[chosen] = mutate_json(parts[chosen], draw).replace(between, b"")
        return between.join(parts)

    def read(data: bytes) -> bool:
        for file, part in zip(files, data.split(between), strict=True):
            file.write_bytes(part)
        return bool(vote.table(vote.analyse_votes(files[0], files[1:])))

    return Target(between.join(part.encode() for part in good), mutate, read)


def sidecar(folder: Path) -> Target:
    settings = {"prompt": "a ball falls", "seed": 3, "sampler": {"steps": 4, "guidance": 5.0}, "fps": 8.0}
    clip = Clip("base", folder / "base" / "a-3.mp4", settings)
    facts = {"key": "a", "seconds": 1.0, "passes": 4.0}
    clip.write(torch.arange(2 * 16 * 16 * 3).view(2, 16, 16, 3).to(torch.uint8), 8.0, facts)
    file = clip.path.with_suffix(".json")

    def read(data: bytes) -> bool:
        file.write_bytes(data)
        if not clip.is_finished():
            return False
        found = clip.record()
        assert {name: found.get(name) for name in settings} == settings
        return True

    return Target(file.read_bytes(), mutate_json, read)


def clip(folder: Path) -> Target:
    video = VideoConfig(height=32, width=32, num_frames=5, fps=8.0)
    file = folder / "clip.mp4"
    write_clip(file, torch.randint(255, (9, 48, 64, 3), dtype=torch.uint8), 8.0)

    def read(data: bytes) -> bool:
        file.write_bytes(data)
        return read_clip(file, video, start=0.25).shape == (5, 32, 32, 3)

    return Target(file.read_bytes(), mutate_bytes, read)


TARGETS = (marker, index, shard, checkpoint_state, lora, manifest_jsonl, votes, sidecar, clip)


# ---- the test --------------------------------------------------------------------------------------------------------


class TooLong(BaseException):
    """Not an Exception, so that no handler of the code under test takes it for its own."""


@contextmanager
def limits() -> Iterator[None]:
    def stop(*_: Any) -> None:
        raise TooLong

    before = signal.signal(signal.SIGPROF, stop)
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, hard))
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        signal.signal(signal.SIGPROF, before)


def failure(target: Target, data: bytes) -> str | None:
    """What is wrong with how `data` was read, with the place; None for an accepted or properly refused input."""
    try:
        with limits():
            target.read(data)
    except (Exception, TooLong) as error:
        if isinstance(error, ValueError) and entry.is_worded(error):
            return f"not one line: {str(error)[:200]!r}" if "\n" in str(error) else None
        frames = [frame for frame in traceback.extract_tb(error.__traceback__) if str(entry.ROOT) in frame.filename]
        return f"{type(error).__name__} at {Path(frames[-1].filename).name}:{frames[-1].lineno}: {str(error)[:200]}"
    return None


@pytest.mark.slow
@pytest.mark.parametrize("kind", TARGETS, ids=lambda kind: kind.__name__)
def test_mutated_inputs_are_refused_in_one_line_or_read_as_written(kind, tmp_path):
    torch.manual_seed(0)
    target = kind(tmp_path)
    assert target.read(target.good)
    found: dict[str, list[str]] = {}
    for number in range(COUNT):
        if problem := failure(target, mutation(target, number)):
            place, _, message = problem.partition(": ")
            found.setdefault(place, []).append(f"mutation {number}: {message}")
    lines = [f"{place}, {len(problems)} times, first {problems[0]}" for place, problems in sorted(found.items())]
    assert not lines, "\n" + "\n".join(lines)
