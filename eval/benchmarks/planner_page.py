"""The planner's page and sheet: of the first episodes what each model imagined, what came of it, and the expert."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from train.clips import ClipError, VideoConfig, contact_sheet, read_clip
from train.files import read_json, render, write_text

TEMPLATE = Path(__file__).with_name("planner_page.html")
PLAYED = ("imagined", "executed")  # clips of a model; the expert's, `true`, are the same of all
ON_SHEET = 6  # episodes


def write(
    path: Path,
    prompts: Mapping[str, str],
    scores: Sequence[Mapping[str, Any]],
    clips: Mapping[str, Path],
    video: VideoConfig,
    horizon: int,
) -> None:
    """prompts: instructions by key of the episodes to show. scores: lines of scores.jsonl. clips: of each model the
    folder of its episodes' clips, below the page's. horizon: frames that are executed at a look. The sheet lies beside
    the page."""
    models = {model: {line["key"]: line for line in scores if line["model"] == model} for model in clips}
    episodes = []
    for key, prompt in prompts.items():
        found = {model: find_clips(path.parent, folder, key) for model, folder in clips.items()}
        played = [
            {"name": model, "clips": found[model], "outcome": outcome(lines.get(key), found[model], horizon)}
            for model, lines in models.items()
        ]
        true = next((own["true"] for own in found.values() if "true" in own), None)
        episodes.append({"key": key, "prompt": prompt, "models": played, "true": true})
    totals = {model: count_solved(lines.values()) for model, lines in models.items()}
    write_text(path, render(TEMPLATE, episodes=episodes, totals=totals, played=PLAYED, video=video))
    write_sheet(path.with_name("sheet.png"), episodes[:ON_SHEET], video)


def write_sheet(path: Path, episodes: Sequence[Mapping[str, Any]], video: VideoConfig) -> None:
    """A row of frames for each clip that `write` found and that can be read; no file where there is none."""
    rows = []
    for episode in episodes:
        clips = {f"{one['name']} {name}": one["clips"].get(name) for one in episode["models"] for name in PLAYED}
        for label, clip in (clips | {"true": episode["true"]}).items():
            if clip:
                with suppress(ClipError):
                    frames = read_clip(path.parent / clip["source"], replace(video, num_frames=clip["frames"]))
                    rows.append((f"{label}: {episode['prompt']}", frames))
    if rows:
        contact_sheet(path, rows)


def find_clips(page: Path, folder: Path, key: str) -> dict[str, dict[str, Any]]:
    """Number of frames, and source as seen from the folder `page`, of the clips of an episode by name; of what is not
    there nothing."""
    lengths: dict[str, int] = {}
    with suppress(ValueError):
        lengths = read_json(folder / f"{key}.json", dict[str, int], remedy="the page goes without")
    files = {name: folder / f"{key}-{name}.mp4" for name in lengths}
    return {
        name: {"frames": lengths[name], "source": file.relative_to(page).as_posix()}
        for name, file in files.items()
        if file.exists()
    }


def outcome(line: Mapping[str, Any] | None, clips: Mapping[str, Mapping[str, Any]], horizon: int) -> str:
    """How an episode went, in words."""
    if line is None:
        return "not played yet"
    if line["error"]:
        return line["error"]
    solved = "solved" if line["values"]["success"] else "not solved"
    if "executed" not in clips:
        return f"{solved}; no clips were kept"
    looks = -(-(clips["executed"]["frames"] - 1) // horizon)
    return f"{solved}, {looks} look{'s' if looks != 1 else ''}"


def count_solved(lines: Sequence[Mapping[str, Any]]) -> str:
    known = [bool(line["values"]["success"]) for line in lines if not line["error"]]
    return f"{sum(known)} of {len(known)} episodes solved"
