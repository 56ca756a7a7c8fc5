"""What building a group takes on this GPU, part by part, with random weights of the recipe's architecture.

    python -m data_pipeline.benchmark recipe=wan14b
    python -m data_pipeline.benchmark recipe=wan14b pipeline.losers.steps=50 pipeline.losers.guidance=5

Each part runs as the build's stages run it, once to compile and allocate and then on REPEATS other rows:

    text      prompts through the text encoder
    encode    a winner through the VAE
    loser     all losers of a row, as `pipeline.losers` says but from noise and without a cache: passes, seconds per
              pass, and the limit (matrix products and attention alone, at the rates that the GPU sustains)
    decode    a loser's pixels, for a judge
    targets   a winner's, where the recipe has any and their weights are here

<output>/build_benchmark.json holds seconds, peak memory and what was compiled after the first row; <output>/rates.json
the rates by which dry runs of this output folder count their bill (`train.cost`).
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

import recipes
from data_pipeline.config import Config, Setup
from data_pipeline.own_clips import ClipMaker
from data_pipeline.stages.targets import TargetMaker
from train import entry
from train.backbones import text_tokens
from train.clips import from_pixels
from train.cost import megapixels, operations, save_rates
from train.files import write_text
from train.parallel import build_accelerator
from train.sampling import sampling_passes
from train.tools.baselines import forward_limit, measure_ceilings
from train.tools.breakdown import time_step

REPEATS = 2  # rows after the first


class Measured:
    """The recipe's clip maker and frames of noise, as its rows would have them."""

    def __init__(self, config: Config, device: torch.device):
        self.config, self.device = config, device
        setup, video = Setup(config, device), config.video
        self.maker = ClipMaker(setup, setup.losers, setup.pipeline.losers.count, setup.loser_sampler)
        self.rows = ({"key": f"row {n}", "prompt": f"ball number {n} falls into a bucket"} for n in range(1000))
        generator = torch.Generator().manual_seed(config.seed)
        shape = (video.num_frames, video.height, video.width, 3)
        self.frames = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
        self.first = self.frames[: setup.prefix_frames] if setup.first_frame else None

    def parts(self) -> Iterator[tuple[str, Callable[[], Any]]]:
        """Each part's name and what runs it for another row."""
        backbone, config, latents = self.maker.backbone, self.config, []
        clip = from_pixels(self.frames[None].to(self.device))
        yield "text", lambda: backbone.encode_texts([next(self.rows)["prompt"]])
        yield "encode", lambda: latents.append(backbone.encode_video(clip).cpu())
        if config.pipeline.losers.count:
            yield "loser", lambda: self.maker.generate([next(self.rows)], [self.first])
        yield "decode", lambda: backbone.decode_latents(latents[0])
        if config.targets.tracks:
            try:
                maker = TargetMaker(config.targets, config.video, self.device)
                maker.make(self.frames)
            except (OSError, ValueError) as error:
                print(f"targets are not measured: {entry.first_line(error)}")
            else:
                yield "targets", lambda: maker.make(self.frames)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    config = recipes.load(Config, argv)
    if config.dry_run:
        raise ValueError("dry_run=true: this command measures; python -m data_pipeline.build --dry-run prints the bill")
    config.backbone.random_weights, config.backbone.path = True, ""  # neither speed nor memory depends on their values
    losers = config.pipeline.losers
    if losers.sampler(config.sampler).cache:  # but which passes the cache ends early does
        print("cache: left out, for which passes it ends early depends on the weights")
        losers.cache = 0.0
    device = build_accelerator().device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    results: dict[str, Any] = {"device": name, "torch": torch.__version__, "architecture": config.backbone.architecture}
    measured = Measured(config, device)
    backbone = measured.maker.backbone
    for part, run in measured.parts():
        with torch.no_grad():
            results[part] = time_step(run, device, REPEATS, where=False)
        if part == "loser":
            passes = losers.count * sampling_passes(backbone, measured.maker.sampler)
            limit = forward_limit(config, measure_ceilings(config, backbone), kind="_sustained")
            results[part] |= {"passes": passes, "pass_seconds": results[part]["seconds"] / passes, "pass_limit": limit}
        numbers = (f"{key} {value:.4g}" for key, value in results[part].items())
        print(f"{part:<8}", "  ".join(numbers), flush=True)
    output = Path(config.output)
    write_text(output / "build_benchmark.json", json.dumps(results, indent=1) + "\n")
    channels, pixels = str(backbone.architecture["z_dim"]), megapixels(config.video)
    rates: dict[str, Any] = {part: {channels: pixels / results[part]["seconds"]} for part in ("encode", "decode")}
    if "loser" in results:
        forward, _ = operations(backbone.architecture, config.video, text_tokens(config.backbone))
        rates["sampling"] = forward / results["loser"]["pass_seconds"]
    if "targets" in results:
        rates["targets"] = 1 / results["targets"]["seconds"]
    print(f"wrote {output / 'build_benchmark.json'} and {save_rates(config.output, name, rates)}")
    return results


if __name__ == "__main__":
    entry.run(main)
