"""Which clips do people prefer? A page for blinded pairwise votes, and their analysis.

    python -m eval.vote page runs/wan14b/clips/base runs/wan14b/clips/tuned --folder vote
    python -m eval.vote analyse vote/key.json votes-*.json --json vote/results.json

    vote/page/index.html       works offline in any browser, from anywhere: give this folder to the raters
    vote/page/clips/0001.mp4   the clips under neutral names
    vote/key.json              which clip is whose; stays with you

The two folders hold clips of the same prompts and seeds, `<key>-<seed>.mp4` with sidecars, as `eval/generate.py` and
`eval/run.py` write them. A pair is shown once, in random order with random sides; a share of them is shown again later
with sides swapped. Votes lie in the rater's browser until they are saved as a file.

The win rate of the second model is the mean over prompts of the mean over a prompt's votes, a tie counting half;
repeated pairs count for consistency only. Intervals are 95%: bootstrap over prompts, and for shares of votes
Wilson's.
"""

import argparse
import csv
import json
import math
import shutil
import sys
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal, NotRequired

import av
import numpy as np
import torch
from typing_extensions import TypedDict

from eval.report.intervals import Estimate, bootstrap_mean, wilson
from train import entry
from train.clips import ClipError, write_clip
from train.files import digest, lock, read_json, render, sha256, write_text

TEMPLATE = Path(__file__).with_name("vote.html")
SWAPPED = {"left": "right", "right": "left", "tie": "tie"}
OUTCOMES = {0.0: "first", 0.5: "tie", 1.0: "second"}  # by the score of a vote, which counts for the second model


class Prompted(TypedDict):
    """What is read of a clip's sidecar."""

    prompt: str


class Trial(TypedDict):
    """A pair as it is shown once."""

    pair: int
    second_is: Literal["left", "right"]
    key: str  # of the prompt
    category: str
    prompt: str


class Key(TypedDict):
    """What is read of key.json."""

    page: str
    models: tuple[str, str]
    trials: list[Trial]


class Vote(TypedDict):
    trial: int
    choice: Literal["left", "right", "tie"]


class Saved(TypedDict):
    """A rater's file."""

    page: str
    rater: NotRequired[str | None]
    votes: list[Vote]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m eval.vote", description="Blinded pairwise votes on clips.")
    commands = parser.add_subparsers(dest="command", required=True)
    page = commands.add_parser("page", help="write the page for the raters, and its key")
    page.add_argument("first", type=Path, metavar="FIRST", help="folder of one model's clips")
    page.add_argument("second", type=Path, metavar="SECOND", help="of the other's; win rates are this one's")
    page.add_argument("--folder", type=Path, required=True, help="page and key are written there")
    page.add_argument("--seed", type=int, default=0, help="of the order, the sides and the repeated pairs")
    page.add_argument("--repeat", type=float, default=0.1, help="share of pairs that is shown twice")
    page.add_argument("--count", type=int, default=0, help="pairs to show, drawn at random; 0: all")
    page.add_argument("--categories", type=Path, help="CSV with the columns key and category")
    analyse = commands.add_parser("analyse", help="win rate, agreement, consistency, side bias")
    analyse.add_argument("key", type=Path, metavar="KEY", help="key.json of the page")
    analyse.add_argument("votes", type=Path, nargs="+", metavar="VOTES", help="saved votes, a file a rater")
    analyse.add_argument("--json", type=Path, help="also write the results there")
    options = parser.parse_args(argv)
    if options.command == "page":
        given = {name: getattr(options, name) for name in ("seed", "repeat", "count")}
        given["categories"] = read_categories(options.categories) if options.categories else {}
        with lock(options.folder):
            place = write_page(options.folder, options.first, options.second, **given)
        print(f"page  {place}\nkey   {options.folder / 'key.json'}  (not for the raters)")
    else:
        results = analyse_votes(options.key, options.votes)
        if options.json:
            write_text(options.json, json.dumps(results, ensure_ascii=False, indent=1) + "\n")
        print(table(results))


# ---- the page --------------------------------------------------------------------------------------------------------


def write_page(
    folder: Path,
    first: Path,
    second: Path,
    *,
    seed: int = 0,
    repeat: float = 0.1,
    count: int = 0,
    categories: Mapping[str, str] | None = None,
) -> Path:
    """Write `page` and `key.json` into the folder; the page's path. The same clips and options give the same page.

    Clips without a partner in the other folder are named and left out. Raises ValueError for options that cannot work,
    folders without pairs, and a folder that already holds another page, whose key would be lost.
    """
    if not 0 <= repeat <= 1 or count < 0 or seed < 0:
        raise ValueError(f"--repeat {repeat}, --count {count}, --seed {seed}: repeat lies in [0, 1], the others from 0")
    models = [first.resolve().name, second.resolve().name]
    if models[0] == models[1]:
        raise ValueError(f"both folders are called {models[0]}: rename one, results go by these names")
    found = [{path.stem: path for path in sorted(place.glob("*.mp4"))} for place in (first, second)]
    alone = [str(path) for own, other in (found, found[::-1]) for name, path in own.items() if name not in other]
    if alone:
        print(f"left out, without a partner: {len(alone)} clips: {', '.join(alone)}", file=sys.stderr)
    names = [name for name in found[0] if name in found[1]]
    if not names:
        raise ValueError(f"{first} and {second} have no clips of the same name (<key>-<seed>.mp4)")
    generator = np.random.default_rng(seed)
    names = [names[number] for number in generator.permutation(len(names))[: count or None]]
    trials = order_trials(len(names), repeat, generator)
    clips = [path for name in names for path in (found[0][name], found[1][name])]
    neutral = [f"{number + 1:04d}.mp4" for number in generator.permutation(len(clips))]  # of the clips
    facts = [_facts(found[0][name], found[1][name], categories or {}) for name in names]
    key: dict[str, Any] = {"models": models, "seed": seed, "left_out": alone, "trials": []}
    for pair, second_left in trials:
        sides = [2 * pair + int(second_left), 2 * pair + int(not second_left)]
        seen = {"left": neutral[sides[0]], "right": neutral[sides[1]], "second_is": ["right", "left"][second_left]}
        key["trials"].append({"pair": pair, **seen, **facts[pair]})
    key["clips"] = {neutral[number]: sha256(path) for number, path in enumerate(clips)}
    key = {"page": digest(key), **key}

    place = folder / "key.json"
    other = "give another --folder, or remove it"
    if place.exists() and (old := read_json(place, Key, remedy=other)["page"]) != key["page"]:
        raise ValueError(f"{place} is the key of another page ({old[:12]}): {other}")
    page = folder / "page"
    (page / "clips").mkdir(parents=True, exist_ok=True)
    for name, path in sorted(zip(neutral, clips, strict=True)):  # so that times tell nothing either
        copy_clip(path, page / "clips" / name)
    write_text(place, json.dumps(key, ensure_ascii=False, indent=1) + "\n")
    shown = [{name: trial[name] for name in ("prompt", "left", "right")} for trial in key["trials"]]
    write_text(page / "index.html", render(TEMPLATE, page=key["page"], trials=shown))
    return page / "index.html"


def copy_clip(source: Path, target: Path) -> None:
    """The clip as it is where browsers play its pixel format, else encoded anew (clips without loss are RGB).

    Raises ClipError, a ValueError, where it cannot be read.
    """
    try:
        with av.open(str(source), options={"protocol_whitelist": "file"}) as container:
            stream = container.streams.video[0]
            if stream.codec_context.pix_fmt == "yuv420p":
                shutil.copyfile(source, target)
                return
            frames = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(stream)])
            write_clip(target, torch.from_numpy(frames), float(stream.average_rate))
    except (av.error.FFmpegError, IndexError, ValueError) as error:
        raise ClipError(source, "unreadable", f"no video file, or damaged ({error}); make it again") from error


def order_trials(pairs: int, repeat: float, generator: np.random.Generator) -> list[tuple[int, bool]]:
    """(pair, whether the second model is on the left) of each trial.

    Repeated pairs come from the first half and are shown again, swapped, somewhere in the second. Each model is on the
    left equally often, to one.
    """
    sides = generator.permutation(np.arange(pairs) % 2 == 0)
    trials = [(pair, bool(sides[pair])) for pair in range(pairs)]
    half = max(pairs // 2, 1)
    again = generator.permutation(half)[: min(round(repeat * pairs), half)]
    places = np.sort(generator.integers(half, pairs + 1, len(again)))
    for pair, place in zip(again.tolist(), places[::-1].tolist(), strict=True):  # from the back: places stay right
        trials.insert(place, (pair, not sides[pair]))
    return trials


def _facts(first: Path, second: Path, categories: Mapping[str, str]) -> dict[str, Any]:
    """Prompt, prompt's key and seed of a pair, out of its sidecars; ValueError where they disagree or are missing."""
    remedy = "make the clip again with eval.generate or eval.run"
    sidecars = (read_json(path.with_suffix(".json"), Prompted, remedy=remedy) for path in (first, second))
    prompt, other = (sidecar["prompt"] for sidecar in sidecars)
    if prompt != other:
        raise ValueError(f"{first} and {second} show different prompts, {prompt!r} and {other!r}")
    name, _, seed = first.stem.rpartition("-")
    return {"key": name, "seed": seed, "category": categories.get(name, ""), "prompt": prompt}


def read_categories(path: Path) -> dict[str, str]:
    """By the prompt's key; ValueError without both columns."""
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file)
        if not {"key", "category"} <= set(reader.fieldnames or []):
            raise ValueError(f"{path} needs the columns key and category, not {reader.fieldnames}")
        return {row["key"]: row["category"] or "" for row in reader}


# ---- the votes -------------------------------------------------------------------------------------------------------


def analyse_votes(key_file: Path, files: Sequence[Path]) -> dict[str, Any]:
    """The results, as `table` prints them. ValueError for votes of another page or no votes, naming the files."""
    key = read_json(key_file, Key, remedy="give the key.json that was written with the page")
    votes = read_votes(key, key_file, files)
    trials, scores = key["trials"], defaultdict(list)
    firsts: dict[int, int] = {}  # by pair, number of the trial that shows it first
    shown = [(number, firsts.setdefault(trial["pair"], number)) for number, trial in enumerate(trials)]
    repeated = [(number, first) for number, first in shown if number != first]
    originals = {rater: {n: choices[n] for n in firsts.values() if n in choices} for rater, choices in votes.items()}
    for choices in originals.values():
        for number, choice in choices.items():
            scores[number].append(0.5 if choice == "tie" else float(choice == trials[number]["second_is"]))
    if not scores:
        raise ValueError(f"{', '.join(str(file) for file in files)}: no votes in them")
    consistent = {
        rater: [choices[again] == SWAPPED[choices[one]] for again, one in repeated if {again, one} <= set(choices)]
        for rater, choices in votes.items()
    }
    every = [choice for choices in votes.values() for choice in choices.values()]
    left, right = every.count("left"), every.count("right")
    return {
        "page": key["page"],
        "models": key["models"],
        "raters": {rater: len(choices) for rater, choices in votes.items()},
        "trials": len(trials),
        "choices": dict(Counter(OUTCOMES[value] for values in scores.values() for value in values)),
        "win_rate": win_rate(scores, trials),
        "categories": {
            category: win_rate({n: s for n, s in scores.items() if trials[n]["category"] == category}, trials)
            for category in sorted({trial["category"] for trial in trials} - {""})
        },
        "agreement": agreement(originals),
        "consistency": {
            "all": share(sum(map(sum, consistent.values())), sum(map(len, consistent.values()))),
            **{rater: share(sum(same), len(same)) for rater, same in consistent.items()},
        },
        "left": share(left, left + right),
    }


def read_votes(key: Key, key_file: Path, files: Sequence[Path]) -> dict[str, dict[int, str]]:
    """Choices by rater and trial."""
    votes: dict[str, dict[int, str]] = {}
    for file in files:
        saved = read_json(file, Saved, remedy="save the votes again")
        if saved["page"] != key["page"]:
            raise ValueError(
                f"{file} holds votes of page {saved['page'][:12]}, but {key_file} is the key of page"
                f" {key['page'][:12]}: give the key that was written with its page"
            )
        rater = saved.get("rater") or file.stem
        if rater in votes:
            raise ValueError(f"{file}: rater {rater!r} is in an earlier file too: give the last file of each rater")
        votes[rater] = {}
        for vote in saved["votes"]:
            number = vote["trial"]
            if not 0 <= number < len(key["trials"]) or number in votes[rater]:
                raise ValueError(f"{file}: vote {vote} is none of this page's, or there twice: save the votes again")
            votes[rater][number] = vote["choice"]
    return votes


def win_rate(scores: Mapping[int, Sequence[float]], trials: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Mean over prompts of scores by trial, with the bootstrap interval over prompts and Wilson's for as many votes.

    A prompt is its text: its seeds, and views of one scene that share a description, are one observation. Where all
    prompts agree the bootstrap's has no width; Wilson's then says how little a few prompts prove.
    """
    by_prompt = defaultdict(list)
    for number, values in scores.items():
        by_prompt[trials[number]["prompt"]] += values
    if not by_prompt:
        return None
    estimate = bootstrap_mean(np.array([np.mean(values) for values in by_prompt.values()]))
    interval = wilson(estimate.mean * len(by_prompt), len(by_prompt))
    votes = sum(map(len, by_prompt.values()))
    return {**asdict(estimate), "wilson": [interval.low, interval.high], "prompts": len(by_prompt), "votes": votes}


def share(successes: int, count: int) -> dict[str, Any] | None:
    return {**asdict(wilson(successes, count)), "count": count} if count else None


def agreement(votes: Mapping[str, Mapping[int, str]]) -> dict[str, Any] | None:
    """Share of equal choices over pairs of raters and trials, and Krippendorff's alpha (nominal): 1 is full, 0 chance.

    By hand: left left, left right, tie tie: 2 of 3 equal. 6 values, left 3, right 1, tie 2: of 30 ordered pairs of
    different values 2 (3 + 6 + 2) = 22 differ, of those within a trial 1 in 3: alpha = 1 - (1 / 3) / (22 / 30) = 6/11.
    """
    units = defaultdict(Counter)
    for choices in votes.values():
        for number, choice in choices.items():
            units[number][choice] += 1
    units = [unit for unit in units.values() if unit.total() > 1]
    if not units:
        return None
    totals = sum(units, Counter())
    pairs = sum(math.comb(unit.total(), 2) for unit in units)
    # A trial of m choices has weight m: its m (m - 1) ordered pairs count 1 / (m - 1) each.
    seen = sum(_differing(unit) / (unit.total() - 1) for unit in units)
    chance = _differing(totals) / (totals.total() - 1)
    alpha = 1 - seen / chance if chance else None  # all choices the same: nothing to tell
    return {"equal": (pairs - sum(map(_differing, units)) // 2) / pairs, "pairs": pairs, "alpha": alpha}


def _differing(choices: Counter) -> int:
    """Ordered pairs of different choices."""
    return choices.total() ** 2 - sum(count**2 for count in choices.values())


def table(results: Mapping[str, Any]) -> str:
    """The results as text."""

    def shown(found: Mapping[str, Any] | None) -> str:
        return f"{Estimate(found['mean'], found['low'], found['high'])}" if found else "none"

    (first, second), whole = results["models"], results["win_rate"]
    lines = [
        f"{second} against {first}: {whole['votes']} votes on {whole['prompts']} prompts, 95% intervals",
        f"{'win rate of ' + second:<32}{shown(whole)}  Wilson [{whole['wilson'][0]:.3f}, {whole['wilson'][1]:.3f}]",
        *(f"{'  ' + name:<32}{shown(found)}" for name, found in results["categories"].items()),
        f"{'choices':<32}"
        + ", ".join(
            f"{name} {results['choices'].get(kind, 0)}"
            for name, kind in ((first, "first"), (second, "second"), ("tie", "tie"))
        ),
        f"{'left side, of decided votes':<32}{shown(results['left'])}",
        f"{'same choice on repeated pairs':<32}{shown(results['consistency']['all'])}",
    ]
    if found := results["agreement"]:
        alpha = "none" if found["alpha"] is None else f"{found['alpha']:.3f}"
        lines.append(f"{'agreement of raters':<32}{found['equal']:.3f}, Krippendorff's alpha {alpha}")
    for rater, count in results["raters"].items():
        own = shown(results["consistency"][rater])
        lines.append(f"{'  ' + rater:<32}{count} of {results['trials']} votes, consistent {own}")
    return "\n".join(lines)


if __name__ == "__main__":
    entry.run(main)
