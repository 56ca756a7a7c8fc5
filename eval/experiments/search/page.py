"""The page of a search: candidates side by side, their scores, the chosen one marked. For any browser, no server."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from eval.experiments.search import report
from train.clips import VideoConfig
from train.files import render, write_text

TEMPLATE = Path(__file__).with_name("page.html")


def write(folder: Path, records: Sequence[dict[str, Any]], results: dict[str, Any], video: VideoConfig) -> Path:
    """Write index.html beside the folder `clips`; texts are escaped, clips are named by `run.py`."""
    cards = [card(record, results["chosen_by"]) for record in records]
    rows = [(name, row) for name, row in results["scorers"].items()]
    path = folder / "index.html"
    write_text(path, render(TEMPLATE, cards=cards, rows=rows, results=results, video=video, show=report.show))
    return path


def card(record: dict[str, Any], chosen_by: str) -> dict[str, Any]:
    """One prompt: its candidates, best by `chosen_by` first, and who chooses each."""
    scorers = record["scorers"]
    values = scorers[chosen_by]["values"]
    order = sorted(range(len(values)), key=lambda index: values[index])
    candidates = [
        {
            "clip": f"clips/{record['clips'][index]}",
            "seed": record["seeds"][index],
            "chosen": index == scorers[chosen_by]["chosen"],
            "physical": record["truth"]["physical"][index],
            "semantic": record["truth"]["semantic"][index],
            "motion": record["motion"][index],
            "values": [(name, found["values"][index], index == found["chosen"]) for name, found in scorers.items()],
        }
        for index in order
    ]
    return {"key": record["key"], "prompt": record["prompt"], "candidates": candidates}
