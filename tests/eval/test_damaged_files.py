"""JSON that evaluation reads, with every value replaced by one of another type and with random bytes changed: what is
damaged counts as not there, or is one clear line. No other exception, and no changed answer of a model."""

import copy
import itertools
import json
import os
import random

import pytest
import torch

from eval.benchmarks.base import Row
from eval.clips import Clip
from eval.report import compare
from eval.report.rows import RowFile
from eval.vlm.backend import Reply
from eval.vlm.cache import Cache
from eval.vote import analyse_votes
from tests.eval.test_compare import BASE, scores, write_run

WRONG = (None, True, -1, 1e300, "x", [], {}, [[]])
MUTATIONS = int(os.environ.get("PHYSALIGN_MUTATIONS", "50"))  # of the bytes of each file


def replaced(value):
    """Copies of a JSON value, each with one value at any depth replaced, removed, or NaN."""
    for path in paths(value):
        for wrong in (*WRONG, float("nan"), ...):
            changed = copy.deepcopy(value)
            place = changed
            for step in path[:-1]:
                place = place[step]
            if path and wrong is ...:
                del place[path[-1]]
            elif path:
                place[path[-1]] = copy.deepcopy(wrong)
            yield json.dumps(changed if path else wrong if wrong is not ... else 0).encode()


def paths(value, path=()):
    yield path
    steps = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for step, inner in steps:
        yield from paths(inner, (*path, step))


def mutated(data: bytes):
    generator = random.Random(0)
    for _ in range(MUTATIONS):
        changed = bytearray(data)
        for _ in range(generator.randint(1, 4)):
            place = generator.randrange(len(changed))
            match generator.randrange(3):
                case 0:
                    changed[place] = generator.randrange(256)
                case 1:
                    changed[place:place] = generator.choice([b"[", b"{", b'"', b"9" * 400, b"null", b"\x00", b"1e999"])
                case _:
                    del changed[place : place + generator.randint(1, 40)]
                    changed = changed or bytearray(b" ")
        yield bytes(changed)


def every(path):
    data = path.read_bytes()
    yield from itertools.chain(replaced(json.loads(data)), mutated(data))


def one_line(function, *arguments):
    try:
        function(*arguments)
    except ValueError as error:
        assert "\n" not in str(error) and len(str(error)) > 20


def test_a_damaged_sidecar_is_a_clip_to_make_again(tmp_path):
    clip = Clip("base", tmp_path / "a-0.mp4", {"prompt": "a ball", "seed": 3})
    clip.write(torch.zeros(2, 16, 16, 3, dtype=torch.uint8), 8.0, {"seconds": 1.5, "passes": 4.0})
    assert clip.is_finished()
    sidecar = tmp_path / "a-0.json"
    whole = json.loads(sidecar.read_bytes())
    for data in every(sidecar):
        sidecar.write_bytes(data)
        if clip.is_finished():  # then all that is read of it is what it was of
            record = clip.record()
            assert record["motion"] + record["seconds"] + record["passes"] < 1e301 and record["digest"] == clip.digest
    sidecar.write_text(json.dumps(whole | {"motion": "0.5"}), encoding="utf-8")
    assert not clip.is_finished()


def test_a_damaged_row_is_scored_again(tmp_path):
    path = tmp_path / "rows.jsonl"
    with RowFile(path) as rows:
        rows.append("digest", Row("a", 0, {"score": 0.5}), {"motion": 0.1, "seconds": 0.2})
    for data in every(path):
        path.write_bytes(data.replace(b"\n", b" ") + b"\n")
        with RowFile(path) as rows:
            row = rows.find("digest", "a", 0)
            assert row is None or (isinstance(row["values"], dict) and isinstance(row["error"], str))


def test_a_changed_answer_in_the_cache_counts_as_absent(tmp_path):
    name, reply = f"{7:064x}", Reply("A ball falls.", (("Yes", -0.25), ("No", -1.75)))
    Cache(tmp_path).put(name, reply)
    (path,) = tmp_path.glob("*.jsonl")
    assert Cache(tmp_path).get(name) == reply
    for data in every(path):
        path.write_bytes(data.rstrip() + b"\n")
        assert Cache(tmp_path).get(name) in (None, reply)


def test_an_answer_of_an_earlier_version_is_not_asked_for_again(tmp_path):
    name = f"{7:064x}"
    line = {"digest": name, "text": "A ball falls.", "first_token": [["Yes", -0.25]]}
    (tmp_path / "answers-1.jsonl").write_text(json.dumps(line) + "\n")
    assert Cache(tmp_path).get(name) == Reply("A ball falls.", (("Yes", -0.25),))
    (tmp_path / "answers-1.jsonl").write_text(json.dumps(line | {"chack": "0"}) + "\n")
    assert Cache(tmp_path).get(name) is None


def test_damaged_results_are_one_line(tmp_path):
    folder = write_run(tmp_path / "run", scores("base", BASE) + scores("tuned", [0.5, 0.75, 1.0, 0.75]))
    for name in ("results.json", "scores.jsonl"):
        path = tmp_path / "run" / "eval" / name
        data = path.read_bytes()
        first, rest = (data, b"") if name == "results.json" else data.split(b"\n", 1)
        path.write_bytes(first)
        changed = list(every(path)) if rest else list(mutated(first))
        if not rest:
            found = json.loads(first)
            found["settings"]["run"] = {"sandbox": found["settings"]["run"]["sandbox"]}  # what is read of it
            del found["benchmarks"]["sandbox"]["gains"]
            for one in found["benchmarks"]["sandbox"]["models"].values():
                one["categories"] = {}
            changed += list(replaced(found))[:: 1 if MUTATIONS > 1000 else 20]
        for data in changed:
            path.write_bytes(data + b"\n" + rest)
            one_line(lambda: compare.tables.comparison_markdown(compare.compare([compare.Run(folder)])))
        path.write_bytes(first + b"\n" + rest)


@pytest.mark.parametrize("which", ["key", "votes"])
def test_damaged_votes_are_one_line(tmp_path, which):
    trial = {"pair": 0, "left": "0001.mp4", "right": "0002.mp4", "second_is": "left"}
    trial |= {"key": "a", "seed": "0", "category": "", "prompt": "a ball"}
    again = trial | {"left": "0002.mp4", "right": "0001.mp4", "second_is": "right"}
    key = {"page": "0" * 64, "models": ["base", "tuned"], "seed": 0, "left_out": [], "trials": [trial, again]}
    votes = {"page": key["page"], "rater": "Ann", "votes": [{"trial": n, "choice": "left"} for n in (0, 1)]}
    places = {"key": tmp_path / "key.json", "votes": tmp_path / "votes.json"}
    for name, content in (("key", key), ("votes", votes)):
        places[name].write_text(json.dumps(content), encoding="utf-8")
    analyse_votes(places["key"], [places["votes"]])
    for data in every(places[which]):
        places[which].write_bytes(data)
        one_line(analyse_votes, places["key"], [places["votes"]])
