"""Blinded votes: the page and its key, the analysis by hand, and the whole way through a real browser."""

import hashlib
import json
import re

import av
import numpy as np
import pytest
import torch

from eval import vote
from eval.vote import agreement, analyse_votes, copy_clip, order_trials, wilson, write_page
from tests.chromium import Chromium, is_installed
from train.clips import VideoConfig, read_clip, write_clip

PROMPTS = ["a ball falls", "</script><b>a ramp</b>", 'two "balls" meet & part']
LEFT, RIGHT, DOWN, BACKSPACE, ENTER = "\ue012", "\ue014", "\ue015", "\ue003", "\ue007"


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """Folders base and tuned: 6 prompts with 2 seeds, and one clip without a partner."""
    folder = tmp_path_factory.mktemp("clips")
    for model, shade in (("base", 40), ("tuned", 200)):
        for number in range(6):
            for seed in (1, 2):
                stem = folder / model / f"p{number}-x-{seed}"
                write_clip(stem.with_suffix(".mp4"), torch.full((4, 32, 48, 3), shade + number, dtype=torch.uint8), 8.0)
                record = {"prompt": f"{PROMPTS[number % 3]} {number}", "seed": seed, "which": model}
                stem.with_suffix(".json").write_text(json.dumps(record), encoding="utf-8")
    write_clip(folder / "tuned" / "alone-1.mp4", torch.zeros((4, 32, 48, 3), dtype=torch.uint8), 8.0)
    return folder


def make(clips, folder, **options):
    page = write_page(folder, clips / "base", clips / "tuned", **options)
    return page, json.loads((folder / "key.json").read_text(encoding="utf-8"))


def save(path, key, rater, choose, trials=None):
    """A rater's file; choose(trial) -> choice."""
    numbers = range(len(key["trials"])) if trials is None else trials
    votes = [{"trial": number, "choice": choose(key["trials"][number]), "seconds": 1.0} for number in numbers]
    path.write_text(json.dumps({"page": key["page"], "rater": rater, "votes": votes}), encoding="utf-8")
    return path


# The page


def test_the_page_is_blind_and_the_key_is_not(clips, tmp_path, capsys):
    page, key = make(clips, tmp_path, repeat=0.25)
    assert "alone-1.mp4" in capsys.readouterr().err
    assert key["models"] == ["base", "tuned"] and len(key["trials"]) == 12 + 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["key.json", "page"]
    names = sorted(path.name for path in (page.parent / "clips").iterdir())
    assert names == [f"{number:04d}.mp4" for number in range(1, 25)]
    text = page.read_text(encoding="utf-8")
    assert not re.search(r"base|tuned|p\d-x|\bseed\b", text) and "</script><b>" not in text
    assert not re.search(r"https?:|//cdn", text)
    for trial in key["trials"]:  # the key tells the truth
        for side in ("left", "right"):
            model = "tuned" if trial["second_is"] == side else "base"
            original = (clips / model / f"{trial['key']}-{trial['seed']}.mp4").read_bytes()
            assert (page.parent / "clips" / trial[side]).read_bytes() == original
            assert key["clips"][trial[side]] == hashlib.sha256(original).hexdigest()
    # Neither the names' order nor the sides' tells which model is whose.
    first = {trial["left" if trial["second_is"] == "right" else "right"] for trial in key["trials"]}
    assert 3 < sum(name <= "0012.mp4" for name in first) < 9


def test_the_same_call_gives_the_same_page_and_another_is_refused(clips, tmp_path):
    page, key = make(clips, tmp_path)
    text = page.read_bytes()
    assert make(clips, tmp_path) == (page, key) and page.read_bytes() == text
    with pytest.raises(ValueError, match="key of another page"):
        make(clips, tmp_path, seed=1)
    assert make(clips, tmp_path / "other", seed=1)[1]["page"] != key["page"]
    assert len(make(clips, tmp_path / "few", count=5, repeat=0)[1]["trials"]) == 5


def test_order_and_sides():
    for pairs, repeat in ((1, 0.0), (2, 1.0), (40, 0.2), (41, 0.9)):
        trials = order_trials(pairs, repeat, np.random.default_rng(3))
        first = {pair: number for number, (pair, _) in reversed(list(enumerate(trials)))}
        again = [number for number, (pair, _) in enumerate(trials) if number != first[pair]]
        assert sorted(first) == list(range(pairs)) and list(sorted(first.values())) == sorted(first.values())
        assert len(again) == min(round(repeat * pairs), max(pairs // 2, 1))
        for number in again:
            pair, second_left = trials[number]
            assert number > first[pair] and second_left != trials[first[pair]][1]
        assert abs(2 * sum(trials[number][1] for number in first.values()) - pairs) <= 1


def test_clips_that_browsers_do_not_play_are_encoded_anew(tmp_path):
    frames = np.full((4, 32, 48, 3), (200, 40, 40), dtype=np.uint8)
    with av.open(str(tmp_path / "rgb.mp4"), "w") as container:
        stream = container.add_stream("libx264rgb", rate=8, options={"qp": "0"})
        stream.width, stream.height, stream.pix_fmt = 48, 32, "rgb24"
        for pixels in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    copy_clip(tmp_path / "rgb.mp4", tmp_path / "copy.mp4")
    with av.open(str(tmp_path / "copy.mp4")) as container:
        assert container.streams.video[0].codec_context.pix_fmt == "yuv420p"
    found = read_clip(tmp_path / "copy.mp4", VideoConfig(32, 48, 4, 8.0)).numpy()
    assert np.abs(found.astype(int) - frames).max() < 8
    (tmp_path / "broken.mp4").write_bytes(b"no clip")
    with pytest.raises(ValueError, match="broken.mp4.*make it again"):
        copy_clip(tmp_path / "broken.mp4", tmp_path / "copy.mp4")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"repeat": 1.5}, "repeat"),
        ({"count": -1}, "count"),
        ({"second": "base"}, "rename one"),
        ({"second": "empty"}, "no clips of the same name"),
    ],
)
def test_what_makes_no_page(clips, tmp_path, change, message):
    (clips / "empty").mkdir(exist_ok=True)
    second = clips / change.pop("second", "tuned")
    with pytest.raises(ValueError, match=message):
        write_page(tmp_path, clips / "base", second, **change)


# The analysis


def test_a_planted_preference_is_recovered(clips, tmp_path):
    (tmp_path / "categories.csv").write_text(
        "key,category\n" + "".join(f"p{number}-x,{'solid' if number < 3 else 'fluid'}\n" for number in range(6)),
        encoding="utf-8",
    )
    categories = vote.read_categories(tmp_path / "categories.csv")
    _, key = make(clips, tmp_path / "vote", repeat=0.25, categories=categories)

    def prefers(trial):  # the second model on solids, a tie on fluids' seed 1, the first on seed 2
        if trial["category"] == "solid":
            return trial["second_is"]
        return "tie" if trial["seed"] == "1" else vote.SWAPPED[trial["second_is"]]

    files = [save(tmp_path / f"{rater}.json", key, rater, prefers) for rater in ("ann", "bob")]
    files.append(save(tmp_path / "cy.json", key, "cy", lambda trial: "left"))
    results = analyse_votes(tmp_path / "vote" / "key.json", files[:2])
    assert results["win_rate"]["mean"] == pytest.approx((3 * 1 + 3 * 0.25) / 6)
    assert results["win_rate"]["votes"] == 24 and results["win_rate"]["prompts"] == 6
    assert results["categories"]["solid"]["mean"] == 1 and results["categories"]["fluid"]["mean"] == 0.25
    assert results["categories"]["solid"]["low"] == 1 and results["categories"]["solid"]["wilson"][0] < 0.5
    assert results["choices"] == {"second": 12, "tie": 6, "first": 6}
    assert results["consistency"]["all"]["mean"] == 1 and results["consistency"]["all"]["count"] == 6
    assert results["agreement"] == {"equal": 1.0, "pairs": 12, "alpha": 1.0}
    assert results["left"]["low"] < 0.5 < results["left"]["high"]

    one = analyse_votes(tmp_path / "vote" / "key.json", files[2:])
    assert one["left"]["mean"] == 1 and one["consistency"]["all"]["mean"] == 0
    assert abs(one["win_rate"]["mean"] - 0.5) < 0.3 and one["agreement"] is None
    text = vote.table(analyse_votes(tmp_path / "vote" / "key.json", files))
    assert "tuned against base: 36 votes on 6 prompts" in text and "Krippendorff" in text and "cy" in text


def test_shares_and_agreement_by_hand():
    found = wilson(8, 10)
    assert (found.mean, round(found.low, 3), round(found.high, 3)) == (0.8, 0.490, 0.943)
    assert wilson(0, 5).low == pytest.approx(0) and wilson(5, 5).high == pytest.approx(1)
    votes = {"ann": {0: "left", 1: "left", 2: "tie"}, "bob": {0: "left", 1: "right", 2: "tie", 3: "left"}}
    found = agreement(votes)
    assert found["equal"] == pytest.approx(2 / 3) and found["alpha"] == pytest.approx(6 / 11) and found["pairs"] == 3
    assert agreement({"ann": {0: "left"}, "bob": {0: "left"}})["alpha"] is None
    assert agreement({"ann": {0: "left"}, "bob": {1: "left"}}) is None


def test_votes_that_do_not_fit_are_refused(clips, tmp_path):
    _, key = make(clips, tmp_path / "one", repeat=0)
    _, other = make(clips, tmp_path / "two", seed=7, repeat=0)
    place, votes = tmp_path / "one" / "key.json", tmp_path / "votes.json"
    save(votes, other, "ann", lambda trial: "left")
    with pytest.raises(ValueError, match=f"{other['page'][:12]}.*{key['page'][:12]}"):
        analyse_votes(place, [votes])
    save(votes, key, "ann", lambda trial: "left")
    with pytest.raises(ValueError, match="'ann' is in an earlier file"):
        analyse_votes(place, [votes, votes])
    save(votes, key, "ann", lambda trial: "both")
    with pytest.raises(ValueError, match="votes.0.choice: Input should be 'left', 'right' or 'tie'"):
        analyse_votes(place, [votes])
    save(votes, key, "ann", lambda trial: "left", trials=[0, 0])
    with pytest.raises(ValueError, match="there twice"):
        analyse_votes(place, [votes])
    save(votes, key, "ann", lambda trial: "left", trials=[])
    with pytest.raises(ValueError, match="no votes"):
        analyse_votes(place, [votes])


def test_the_command_line(clips, tmp_path, capsys):
    vote.main(["page", str(clips / "base"), str(clips / "tuned"), "--folder", str(tmp_path / "vote")])
    key = json.loads((tmp_path / "vote" / "key.json").read_text(encoding="utf-8"))
    file = save(tmp_path / "ann.json", key, "ann", lambda trial: trial["second_is"])
    vote.main(["analyse", str(tmp_path / "vote" / "key.json"), str(file), "--json", str(tmp_path / "results.json")])
    assert "win rate of tuned" in capsys.readouterr().out
    assert json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))["win_rate"]["mean"] == 1
    with pytest.raises(ValueError, match="none.json cannot be read .*give the key.json"):
        vote.main(["analyse", str(tmp_path / "none.json"), str(file)])


# In a browser


@pytest.mark.slow
@pytest.mark.skipif(not is_installed(), reason="needs chromium and chromedriver")
def test_votes_cast_in_a_browser(clips, tmp_path):
    page, key = make(clips, tmp_path / "vote", repeat=0.25)
    trials = key["trials"]
    browser = Chromium(tmp_path / "browser")

    def progress():
        return browser.run("return document.getElementById('progress').textContent")

    def playing():
        return browser.run(
            "return [...document.querySelectorAll('video')].map((clip) => [clip.getAttribute('src'), clip.currentTime,"
            " clip.videoWidth, clip.error && clip.error.message, clip.paused])"
        )

    def arrow(trial, planted=True):
        side = trial["second_is"] if planted else vote.SWAPPED[trial["second_is"]]
        return LEFT if side == "left" else RIGHT

    try:
        browser.open(page.as_uri())
        assert progress() == f"0 of {len(trials)}"
        # Both clips of the first pair play, in step, again and again.
        assert [clip[0] for clip in playing()] == [f"clips/{trials[0][side]}" for side in ("left", "right")]
        browser.wait(lambda: all(clip[2] == 48 and clip[1] > 0.25 for clip in playing()))
        browser.wait(lambda: all(clip[1] < 0.2 for clip in playing()))
        browser.wait(lambda: all(clip[1] > 0.25 for clip in playing()))
        assert abs(playing()[0][1] - playing()[1][1]) < 0.2 and not any(clip[3] for clip in playing())
        source = browser.run("return document.documentElement.outerHTML")
        assert not re.search(r"base|tuned|p\d-x", source) and PROMPTS[0] in source

        # Votes need no name, the file does. In the name's field keys are letters.
        browser.press("s")
        assert "name" in browser.run("return document.getElementById('message').textContent")
        browser.press("A", "n", "n", BACKSPACE, "n", ENTER)
        assert progress().startswith("0 of")
        for trial in trials[:4]:
            browser.press(arrow(trial))
        browser.press(DOWN, BACKSPACE)  # a tie, taken back
        browser.press("r")
        assert progress() == f"4 of {len(trials)}"

        browser.reload()
        assert progress() == f"4 of {len(trials)}"
        assert browser.run("return document.getElementById('rater').value") == "Ann"
        assert [clip[0] for clip in playing()] == [f"clips/{trials[4][side]}" for side in ("left", "right")]
        pairs = {}
        for trial in trials[4:]:  # every third pair goes to the other model, consistently
            pairs.setdefault(trial["pair"], len(pairs) % 3 != 2 or trial["pair"] in {t["pair"] for t in trials[:4]})
            browser.press(arrow(trial, pairs[trial["pair"]]))
        assert progress() == f"{len(trials)} of {len(trials)}"
        assert browser.run("return document.getElementById('trial').hidden")
        browser.press("s")
        saved = browser.wait(lambda: list(browser.downloads.glob("votes-Ann-*.json")))[0]
        browser.press(BACKSPACE)
        assert progress() == f"{len(trials) - 1} of {len(trials)}"
    finally:
        browser.close()

    results = analyse_votes(tmp_path / "vote" / "key.json", [saved])
    assert results["raters"] == {"Ann": len(trials)}
    kept = {trial["pair"]: pairs.get(trial["pair"], True) for trial in trials}
    means = {}
    for trial in trials:
        means.setdefault(trial["key"], {})[trial["pair"]] = kept[trial["pair"]]
    expected = np.mean([np.mean(list(found.values())) for found in means.values()])
    assert results["win_rate"]["mean"] == pytest.approx(expected) and expected > 0.5
    assert results["consistency"]["all"]["mean"] == 1
    assert results["left"]["low"] < 0.5 < results["left"]["high"]
