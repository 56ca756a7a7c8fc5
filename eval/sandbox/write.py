"""Simulated clips as files, with the manifest that `data_pipeline.build` reads.

    python -m eval.sandbox.write --folder runs/tiny/clips --count 12

Writes <folder>/<scene>-<number>.mp4 and <folder>/manifest.csv with the columns key, clip, prompt and action.
"""

import argparse
import csv
from pathlib import Path

import torch

from eval.sandbox.clips import SCENES, simulate
from train import entry
from train.clips import VideoConfig, write_clip
from train.files import atomic


def write_clips(folder: Path, *, scene: str, count: int, seed: int, video: VideoConfig) -> Path:
    """Simulate `count` clips of a scene ("mixed": of all in turn) and write them; returns the manifest's path."""
    generator = torch.Generator().manual_seed(seed)
    size = {"height": video.height, "width": video.width, "num_frames": video.num_frames, "fps": video.fps}
    clips = simulate(scene, count, generator, **size)
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for number, (frames, prompt, name) in enumerate(zip(clips.frames, clips.prompts, clips.scenes, strict=True)):
        key = f"{name}-{number:05d}"
        write_clip(folder / f"{key}.mp4", frames, video.fps)
        rows.append({"key": key, "clip": f"{key}.mp4", "prompt": prompt, "action": name})
    with atomic(folder / "manifest.csv") as aside, aside.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=["key", "clip", "prompt", "action"])
        writer.writeheader()
        writer.writerows(rows)
    return folder / "manifest.csv"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--scene", default="mixed", choices=["mixed", *SCENES])
    parser.add_argument("--count", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--height", type=int, default=64)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--num-frames", type=int, default=17)
    parser.add_argument("--fps", type=float, default=8.0)
    arguments = parser.parse_args(argv)
    video = VideoConfig(arguments.height, arguments.width, arguments.num_frames, arguments.fps)
    manifest = write_clips(
        arguments.folder, scene=arguments.scene, count=arguments.count, seed=arguments.seed, video=video
    )
    print(f"wrote {arguments.count} clips and {manifest}")


if __name__ == "__main__":
    entry.run(main)
