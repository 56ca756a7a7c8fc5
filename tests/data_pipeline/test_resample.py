"""The sampling rule against values worked by hand, and the choice of rows."""

import csv
import hashlib
import math
from collections import Counter

import numpy as np
import pytest

from data_pipeline.config import ResampleConfig
from data_pipeline.histogram import write_histogram
from data_pipeline.stages.difficulty import representatives
from data_pipeline.stages.resample import choose, difficulties, targets

FIVE = {"available": np.array([100, 10, 30, 24, 5]), "difficulty": np.array([0, 0.5, 1, 0.5, 0])}


def test_five_actions_by_hand():
    """tau = ln 4, so r = 4^d = 1, 2, 4, 2, 1, sum 10. N = 120: shares 12, 24, 48, 24, 12.

    Capped by 100, 10, 30, 24, 5: 12 + 10 + 30 + 24 + 5 = 81. Redistributed: 2, 3 and 5 give all they have, 45; of
    the 75 left, 1 and 4 with r = 1, 2 get 25 and 50; 4 gives all, 24; 1 gets the 51 that are left: 120 in all.
    With N = 125 the shares are 12.5, 25, 50, 25, 12.5, and the half is lost: 12.
    """
    tau = math.log(4)
    assert targets(**FIVE, tau=tau, budget=120).tolist() == [12, 10, 30, 24, 5]
    assert targets(**FIVE, tau=tau, budget=120, redistribute=True).tolist() == [51, 10, 30, 24, 5]
    assert targets(**FIVE, tau=tau, budget=125).tolist() == [12, 10, 30, 24, 5]
    assert targets(**FIVE, tau=tau, budget=10**6, redistribute=True).tolist() == [100, 10, 30, 24, 5]
    assert targets(**FIVE, tau=0.0, budget=50).tolist() == [10, 10, 10, 10, 5]  # all alike


@pytest.mark.parametrize("redistribute", [False, True])
def test_targets_against_a_slow_reference(redistribute):
    """One clip at a time to whoever has the least for its weight: the limit of the redistributed rule."""
    rng = np.random.default_rng(0)
    for _ in range(20):
        available = rng.integers(0, 60, 7)
        difficulty = rng.random(7)
        found = targets(available, difficulty, tau=3.0, budget=100, redistribute=redistribute)
        assert (found <= available).all() and found.sum() <= 100
        weight = [math.exp(3 * d) for d in difficulty]
        if not redistribute:
            expected = [min(a, math.floor(100 * w / math.fsum(weight))) for a, w in zip(available, weight, strict=True)]
            assert found.tolist() == expected
            continue
        assert found.sum() > min(100, available.sum()) - 7
        level = np.array([f / w for f, w in zip(found, weight, strict=True)])
        open_ = found < available
        if open_.any():  # nobody who gave all it has stands above those who still have more
            assert level[~open_].max(initial=0) <= (level[open_] + 1 / np.array(weight)[open_]).max() + 1e-9


def test_the_papers_budget_on_a_long_tail_gives_what_the_caps_leave():
    """135K clips, Zipf over 200 actions: N = 20000 less what the small actions lack."""
    ranks = np.arange(1, 201)
    available = np.floor(135_000 / ranks / (1 / ranks).sum()).astype(int)
    difficulty = np.random.default_rng(0).uniform(0.3, 0.8, 200)
    taken = targets(available, difficulty, tau=3.0, budget=20_000)
    share = 20_000 * np.exp(3 * difficulty) / np.exp(3 * difficulty).sum()
    lacking = np.maximum(share - available, 0).sum()
    assert 20_000 - lacking - 200 <= taken.sum() <= 20_000 - lacking
    assert 15_000 < taken.sum() < 20_000


def test_representatives_are_the_best_matches():
    index = np.array([0, 0, 0, 1, 1, 2])
    scores = np.array([0.5, 0.9, 0.5, 0.1, np.nan, 0.3])
    keys = ["c", "b", "a", "x", "y", "z"]
    assert representatives(index, scores, keys, 2).tolist() == [False, True, True, True, True, True]  # a before c
    assert representatives(index, scores, keys, 1).tolist() == [False, True, False, True, False, True]
    assert representatives(np.array([], dtype=int), np.array([]), [], 3).tolist() == []


def test_choice_is_by_hash_and_does_not_depend_on_order_or_other_rows():
    keys = [f"k{i}" for i in range(300)]
    index = np.arange(300) % 3
    counts = np.array([40, 0, 100])
    chosen = choose(index, keys, counts, seed=7)
    assert Counter(index[chosen].tolist()) == {0: 40, 2: 100}

    def lot(key):
        return hashlib.sha256(f"7\0{key}".encode()).digest()

    assert {keys[i] for i in np.flatnonzero(chosen & (index == 0))} == set(sorted(keys[::3], key=lot)[:40])
    order = np.random.default_rng(0).permutation(300)
    again = choose(index[order], [keys[i] for i in order], counts, seed=7)
    assert (again == chosen[order]).all()
    more = choose(index, keys, counts + [1, 0, -50], seed=7)
    assert (more & (index == 0) >= chosen & (index == 0)).all()  # grows by one and loses none
    assert (choose(index, keys, counts, seed=8) != chosen).any()


def test_difficulty_is_one_less_the_mean_score():
    index = np.array([0, 0, 1, 1, 2])
    trials = np.array([0.2, 0.4, 0.9, np.nan, np.nan])
    assert difficulties(index, trials, 3) == pytest.approx([0.7, 0.1, 1 - (0.3 + 0.9) / 2])
    with pytest.raises(ValueError, match="no clip of the model was judged"):
        difficulties(index, np.full(5, np.nan), 3)


@pytest.mark.parametrize(
    "change, message",
    [({"budget": -1}, "resample.budget=-1"), ({"tau": -1.0}, "resample.tau"), ({"tau": math.nan}, "resample.tau")]
    + [({"representatives": 0}, "resample.representatives=0")],
)
def test_settings_that_cannot_work(change, message):
    with pytest.raises(ValueError, match=message):
        ResampleConfig(**change)


def test_the_histogram_is_written_as_table_and_picture(tmp_path):
    actions = [f"action {i}" for i in range(50)] + ['a "quoted", $dollar$ name']
    available = np.arange(51)
    columns = {"action": actions, "available": available, "taken": available // 2}
    write_histogram(tmp_path / "actions", columns, ("available", "taken"), available / 51)
    with (tmp_path / "actions.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert rows[0] == {"action": actions[50], "available": "50", "taken": "25"}
    assert [int(row["available"]) for row in rows] == list(range(50, -1, -1))
    assert (tmp_path / "actions.png").read_bytes().startswith(b"\x89PNG")
    assert len(list(tmp_path.iterdir())) == 2
    before = (tmp_path / "actions.csv").read_bytes(), (tmp_path / "actions.png").read_bytes()
    turned = {name: values[::-1] for name, values in columns.items()}
    write_histogram(tmp_path / "actions", turned, ("available", "taken"), available[::-1] / 51)
    assert ((tmp_path / "actions.csv").read_bytes(), (tmp_path / "actions.png").read_bytes()) == before


@pytest.mark.parametrize("counts", [[], [3], [0]])
def test_a_small_histogram_is_drawn_too(tmp_path, counts):
    columns = {"action": ["other"] * len(counts), "category": ["other"] * len(counts), "count": counts}
    write_histogram(tmp_path / "new" / "h_f.before", columns, ("count",))
    table = (tmp_path / "new" / "h_f.before.csv").read_text("utf-8").splitlines()
    assert table == ["action,category,count", *(f"other,other,{count}" for count in counts)]
    assert (tmp_path / "new" / "h_f.before.png").stat().st_size > 1000
