"""What search costs at full size: seconds and memory to generate a clip, to score it, and for one refinement step.

    python -m eval.experiments.search.benchmark recipe=wan14b   # random weights of the recipe's architecture, one GPU
    python -m eval.experiments.search.benchmark recipe=wan22_5b search_benchmark.parts=[generate,score]

    generate   the first step, two network passes where it is guided, timed and multiplied by sampler.steps
    score      one candidate by `search.chosen_by` with the recipe's levels and draws; its share of `generate`, and
               that of a race, which takes RACE_SHARE of the passes
    refine     one update of the recipe's refinement of the noise, its few-step sampler without guidance, as distilled
               generators run; activations of one block are held at a time

Latents are scored, so neither VAE nor text encoder is needed; text is random. Seconds are medians over
REPEATS runs after a first that compiles; memory is the peak allocated on the device. Results go to
`<output>/search_benchmark.json`.
"""

import json
import resource
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import recipes
from eval.experiments.search.report import line
from eval.search.candidates import Candidates
from eval.search.config import SearchConfig
from eval.search.noise_refinement import refine
from eval.search.searcher import Searcher
from train import entry
from train.backbones import load_backbone
from train.backbones.base import BackboneConfig, Conditioning
from train.backbones.fused.inference import fuse
from train.clips import VideoConfig
from train.files import write_text
from train.parallel import build_accelerator
from train.sampling import SamplerConfig, Stepper, sampling_passes

PARTS = ("generate", "score", "refine")
REPEATS = 2  # timed runs, after one that compiles and allocates
RACE_SHARE = 0.61  # of full scoring's passes that a race took on the sandbox: 2 levels; 0.46 with 4


@dataclass
class BenchmarkConfig:
    parts: list[str] = field(default_factory=lambda: list(PARTS))  # of PARTS


@dataclass
class Config:
    recipe: str = ""  # name or path of a recipe
    output: str = "runs/default"  # everything goes below this folder
    seed: int = 0  # of latents, noise and text
    dry_run: bool = False  # print sizes and stop
    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    video: VideoConfig = field(default_factory=VideoConfig)
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    search: SearchConfig = field(default_factory=SearchConfig)
    search_benchmark: BenchmarkConfig = field(default_factory=BenchmarkConfig)


def main(argv: list[str] | None = None) -> dict[str, Any] | None:
    config = recipes.load(Config, argv)
    settings, video = config.search_benchmark, config.video
    if unknown := set(settings.parts) - set(PARTS):
        raise ValueError(
            f"search_benchmark.parts: unknown {', '.join(sorted(unknown))}; use some of {', '.join(PARTS)}"
        )
    config = replace(config, backbone=replace(config.backbone, path="", random_weights=True))
    if config.dry_run:
        shell, size = load_backbone(config.backbone, "cpu", parts=()), (video.height, video.width, video.num_frames)
        print(f"latents {shell.latent_shape(*size)}, {shell.num_tokens(*size)} tokens; {', '.join(settings.parts)}")
        return None
    bench = Bench(config, build_accelerator().device)
    results = bench.facts | {"settings": recipes.redacted(asdict(config))}
    path = Path(config.output) / "search_benchmark.json"
    for part in [part for part in PARTS if part in settings.parts]:
        results[part] = attempt(getattr(bench, part))
        share(results)
        write_text(path, json.dumps(results, indent=1) + "\n")  # what was measured outlives a time limit
        print(row(part, results[part]), flush=True)
    print(table(results) + f"\nresults  {path}")
    return results


class Bench:
    """One random network with what it is fed."""

    def __init__(self, config: Config, device: torch.device):
        self.config, self.device = config, device
        self.backbone = load_backbone(config.backbone, device, parts=("expert",))
        reason = fuse(self.backbone) if config.backbone.compile else "backbone.compile=false"
        network, size = self.backbone.transformer, (config.video.height, config.video.width, config.video.num_frames)
        self.backbone.experts = {name: network for name in self.backbone.expert_folders}  # the other is no dearer
        generator, shape = torch.Generator().manual_seed(config.seed), self.backbone.latent_shape(*size)
        self.latents = torch.randn((1, *shape), generator=generator)
        texts = {
            name: torch.randn(2, *shape, generator=generator) for name, shape in self.backbone.text_shapes().items()
        }
        backbone = self.backbone
        given = backbone.first_frame_shapes(backbone.architecture, shape) if backbone.first_frame[0] else {}
        first = {name: torch.randn((1, *size), generator=generator) for name, size in given.items()}
        text = texts.pop("text")
        both = [Conditioning(text, more=texts)[n : n + 1] for n in range(2)]
        self.conditioning, self.negative = (Conditioning.of(one.named() | first).to(device) for one in both)
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
        self.facts = {"device": name, "torch": torch.__version__, "tokens": self.backbone.num_tokens(*size)}
        self.facts |= {"fused": not reason, "not_fused": reason}

    def generate(self) -> dict[str, Any]:
        sampler, latents = self.config.sampler, self.latents.to(self.device)

        @torch.no_grad()
        def run() -> None:
            stepper = Stepper(self.backbone, self.conditioning, sampler, self.negative, seeds=[self.config.seed])
            stepper.velocity(stepper.start(latents), 0)

        found = self.measure(run)
        passes = sampling_passes(self.backbone, sampler)
        steps = {"step_seconds": found["seconds"], "steps": sampler.steps, "passes": passes}
        return found | {"seconds": found["seconds"] * sampler.steps} | steps

    def score(self) -> dict[str, Any]:
        config, passes = self.config.search, []
        scorer = Searcher(config, self.backbone, self.config.video, self.config.sampler).scorer(config.chosen_by)

        def run() -> None:
            candidates = Candidates("one", "a clip", self.latents, self.conditioning, refuse, self.config.video.fps)
            passes.append(candidates.measure(scorer)[1].passes)

        settings = {"levels": config.residuals.levels, "draws": config.residuals.draws}
        return self.measure(run) | {"scorer": config.chosen_by} | settings | {"passes": passes[-1]}

    def refine(self) -> dict[str, Any]:
        """One update of the recipe's refinement: what `updates=1` takes more than `updates=0`."""
        settings, found, made = self.config.search.refine, [], []
        few = replace(self.config.sampler, steps=settings.steps, guidance=1.0, guidance_low=None)
        given = {"seeds": [self.config.seed]}

        def run(updates: int) -> None:
            config = replace(settings, updates=updates)
            made.append(refine(self.backbone, self.conditioning, self.latents, few, config, **given))

        if not self.facts["fused"]:  # fused blocks hold the activations of one block anyway
            self.backbone.transformer.enable_gradient_checkpointing()
        for updates in (0, 1):
            found.append(self.measure(partial(run, updates)) | {"refined": made[-1]})
        if not self.facts["fused"]:
            self.backbone.transformer.disable_gradient_checkpointing()
        before, after = (one.pop("refined") for one in found)
        passes = {"passes": after.passes - before.passes, "backward": after.backward - before.backward}
        seconds = found[1]["seconds"] - found[0]["seconds"]
        return {"seconds": seconds, "memory_gib": found[1]["memory_gib"]} | passes

    def measure(self, run: Callable[[], Any]) -> dict[str, float]:
        """Median seconds of `run`, the first one left out, and the peak GiB allocated on the device, or resident."""
        times, on_gpu = [], self.device.type == "cuda"
        for _ in range(REPEATS + 1):
            if on_gpu:
                torch.cuda.synchronize(self.device)
                torch.cuda.reset_peak_memory_stats(self.device)
            started = time.perf_counter()
            run()
            if on_gpu:
                torch.cuda.synchronize(self.device)
            times.append(time.perf_counter() - started)
        resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        memory = torch.cuda.max_memory_allocated(self.device) / 2**30 if on_gpu else resident
        return {"seconds": statistics.median(times[1:]), "memory_gib": memory}


def refuse(latents: Tensor) -> Tensor:
    raise ValueError("this scorer looks at decoded clips, and random weights have no VAE: take one that scores latents")


def attempt(make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """A part's figures, or that it does not fit the device."""
    try:
        return make()
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        return {"refused": "does not fit the device's memory"}


def share(results: dict[str, Any]) -> None:
    """Add what scoring takes of generating; by hand: 16 s and 100 s are 0.16, in a race 0.61 of that."""
    if "seconds" in results.get("generate", {}) and "seconds" in results.get("score", {}):
        results["score"]["share"] = results["score"]["seconds"] / results["generate"]["seconds"]
        results["score"]["race_share"] = RACE_SHARE * results["score"]["share"]


def row(part: str, found: dict[str, Any]) -> str:
    """One part's line of the table."""
    if "refused" in found:
        return f"{part:<14}{found['refused']}"
    numbers = (f"{found['seconds']:.3f}", f"{found['memory_gib']:.1f}", str(found["passes"]))
    return line(part, 14, [*numbers, str(found.get("backward", 0))], (12, 14, 10, 10))


def table(results: dict[str, Any]) -> str:
    """The figures as text."""
    lines = [f"{results['device']}, {results['tokens']} tokens, blocks " + ("fused" if results["fused"] else "plain")]
    lines.append(line("", 14, ("seconds", "memory, GiB", "forward", "backward"), (12, 14, 10, 10)))
    lines += [row(part, results[part]) for part in PARTS if part in results]
    if "share" in results.get("score", {}):
        score = results["score"]
        lines.append(f"scoring one candidate by {score['scorer']}: {score['share']:.1%} of generating it,")
        lines[-1] += f" in a race {score['race_share']:.1%}"
    return "\n".join(lines)


if __name__ == "__main__":
    entry.run(main)
