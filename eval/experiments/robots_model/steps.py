"""The steps of the robots' base model that no other command makes; `eval.experiments.robots_model.run` calls them.

    python -m eval.experiments.robots_model.steps vae --folder runs/robots_base

    begin              record what the VAE sees and what figures are measured on
    record             record all other demonstrations
    vae                train the VAE: <folder>/vae; assemble the pipeline with a fresh DiT: <folder>/start
    inverse_dynamics   train the inverse dynamics model: <folder>/inverse_dynamics.safetensors
    model              assemble the pipeline with the trained DiT: <folder>/model; lay the inverse dynamics model where
                       planners find it; the flow error on held-out demonstrations: <folder>/flow.json

What is there already is not recorded again, and the VAE's training goes on where it was stopped.
"""

import argparse
import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import torch

from eval.robots.model import (
    HELD_OUT,
    NETWORK,
    NOISY,
    STREAM,
    WORDS,
    Size,
    choose,
    coloured,
    train_inverse_dynamics,
    train_vae_on,
)
from eval.robots.planning import GIVEN
from eval.robots.recordings import FOLDER, Recordings, record
from eval.small_wan.pipeline import write_pipeline
from eval.small_wan.training import Checkpoint
from eval.small_wan.vae import describe, write_vae
from losses.flow_matching import flow_error, interpolate
from train import entry
from train.backbones import load_backbone
from train.backbones.base import BackboneConfig
from train.clips import from_pixels
from train.files import write_text

TIMES = (0.1, 0.3, 0.5, 0.7, 0.9)  # of the flow error
BATCH = 50  # clips


def recorded(folder: Path, size: Size, stream: str, count: int) -> Recordings:
    return record(folder / FOLDER, size.demonstrations(stream, count), size.video)


def begin(folder: Path, size: Size, device: str) -> None:
    recorded(folder, size, STREAM, size.vae.pool)
    recorded(folder, size, HELD_OUT, size.held_out)


def record_all(folder: Path, size: Size, device: str) -> None:
    recorded(folder, size, STREAM, size.clips)
    recorded(folder, size, NOISY, size.pool)


def vae(folder: Path, size: Size, device: str) -> None:
    started, checkpoint = time.monotonic(), Checkpoint(folder / "vae-training.safetensors", size.vae)
    shutil.rmtree(folder / "start", ignore_errors=True)  # of another training: this one may be stopped
    trained = train_vae_on(recorded(folder, size, STREAM, size.vae.pool), size, device, checkpoint)
    if trained is None:
        return
    held_out = recorded(folder, size, HELD_OUT, size.held_out)
    clips = torch.from_numpy(held_out.frames(range(len(held_out.listed)))).to(device)
    labels = [one.prompt for one in held_out.listed]
    figures = write_vae(folder / "vae", size.vae, trained, clips, coloured(clips), labels, started=started)
    assemble(folder, "start", None)
    checkpoint.path.unlink(missing_ok=True)
    print(describe(folder / "vae", figures))


def inverse_dynamics(folder: Path, size: Size, device: str) -> None:
    streams = [recorded(folder, size, STREAM, size.clips), recorded(folder, size, NOISY, size.pool)]
    held_out = recorded(folder, size, HELD_OUT, size.held_out)
    error = train_inverse_dynamics(streams, held_out, size, device, folder / GIVEN)
    write_text(folder / "inverse_dynamics.json", json.dumps(error, indent=2) + "\n")
    print(f"{folder / GIVEN}: squared errors {error}")


def assemble(folder: Path, name: str, transformer: Path | None) -> None:
    more = {"transformer_folder": transformer, "words": WORDS, "first_frame": True}
    write_pipeline(folder / "vae", folder / name, NETWORK, **more)


def model(folder: Path, size: Size, device: str) -> None:
    assemble(folder, "model", folder / "train" / "transformer")
    for place in ("model", "eval/planner/scoring", "bounds"):
        (folder / place).mkdir(parents=True, exist_ok=True)
        shutil.copyfile(folder / GIVEN, folder / place / GIVEN)
    megabytes = sum(file.stat().st_size for file in (folder / "model").rglob("*") if file.is_file()) / 1e6
    means = flow_errors(folder, size, device)
    write_text(folder / "flow.json", json.dumps(means, indent=2) + "\n")
    print(f"wrote {folder / 'model'}, {megabytes:.1f} MB; flow error on held-out demonstrations by t: {means}")


@torch.no_grad()
def flow_errors(folder: Path, size: Size, device: str) -> dict[str, float]:
    """Means over the held-out demonstrations by t, and over all of TIMES."""
    settings = BackboneConfig(
        family="wan22_ti2v", path=str(folder / "model"), architecture="robots", dtype="float32", text_length=32
    )
    backbone = load_backbone(settings, device)
    held_out = recorded(folder, size, HELD_OUT, size.held_out)
    noises, errors = torch.Generator().manual_seed(0), {t: [] for t in TIMES}
    for first in range(0, len(held_out.listed), BATCH):
        places = range(first, min(first + BATCH, len(held_out.listed)))
        frames = from_pixels(torch.from_numpy(held_out.frames(places)).to(device))  # (B, 3, T, H, W)
        prompts = [held_out.listed[place].prompt for place in places]
        told = backbone.condition(prompts, frames[:, :, 0], num_frames=frames.shape[2])
        clips = backbone.encode_video(frames, batch_size=len(frames)).float()
        noise = torch.randn(clips.shape, generator=noises).to(device)
        for t, found in errors.items():
            times = torch.full((len(clips),), t, device=device)
            velocity = backbone.velocity(interpolate(clips, noise, times), times, told)
            found += flow_error(*map(told.generated, (velocity, clips, noise))).tolist()
    means = {f"{t:g}": sum(found) / len(found) for t, found in errors.items()}
    return means | {"mean": sum(means.values()) / len(means)}


STEPS: dict[str, Callable[[Path, Size, str], None]] = {
    "begin": begin,
    "record": record_all,
    "vae": vae,
    "inverse_dynamics": inverse_dynamics,
    "model": model,
}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=STEPS, help="as above")
    parser.add_argument("--folder", type=Path, required=True, help="of all steps")
    parser.add_argument("--small", action="store_true", help="hardly anything, to see that all parts fit")
    parser.add_argument("--clips", type=int, default=0, help="demonstrations that the DiT learns from, 0: as usual")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cuda or cpu")
    given = parser.parse_args(argv)
    STEPS[given.step](given.folder, choose(small=given.small, clips=given.clips), given.device)


if __name__ == "__main__":
    entry.run(main)
