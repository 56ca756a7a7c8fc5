"""Did it help? Generate on a benchmark's prompts with base and tuned model, score, and print one table.

    accelerate launch eval/run.py recipe=sandbox run.lora=runs/sandbox/train

    <folder>/clips-<model>.safetensors   the clips, model by model; a model whose clips are there is not sampled again
    <folder>/scores.jsonl                a line for every model and clip
    <folder>/results.json                means, paired differences, 95% bootstrap intervals, settings
    <folder>/comparison.mp4, sheet.png   true | base | tuned, for the first clips

Base and tuned get the same prompts and the same initial noise, so their difference is tested in pairs.
"""

import hashlib
import json
import os
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

import recipes
from eval.benchmarks import sandbox
from eval.benchmarks.sandbox import SandboxConfig
from eval.intervals import bootstrap_mean
from train.backbones import load_backbone
from train.backbones.base import Backbone, BackboneConfig
from train.checkpoint import Trainable, attach_trained, weights_path
from train.clips import VideoConfig, contact_sheet, side_by_side, to_pixels, write_clip
from train.parallel import build_accelerator
from train.sampling import SamplerConfig, sample_clips

SHOWN = 6  # clips in the comparison and the sheet
SCORES = ("physical", "semantic")


@dataclass
class RunConfig:
    lora: str = ""  # LoRA file, checkpoint folder or training folder (of full weights too); empty: the base model alone
    folder: str = "${output}/eval"  # everything goes here
    batch_size: int = 16  # clips sampled together, per GPU
    sandbox: SandboxConfig = field(default_factory=SandboxConfig)


@dataclass
class Config:
    recipe: str = ""  # name or path of a recipe
    output: str = "runs/default"  # everything goes below this folder
    seed: int = 0  # unused: the benchmark has its own
    dry_run: bool = False  # print what would be made and stop
    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    video: VideoConfig = field(default_factory=VideoConfig)
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    run: RunConfig = field(default_factory=RunConfig)


def main(argv: list[str] | None = None) -> dict[str, Any] | None:
    config = recipes.load(Config, argv)
    models = ["base", "tuned"] if config.run.lora else ["base"]
    texts, true = sandbox.prompts(config.run.sandbox, config.video)
    if config.dry_run:
        print(f"{len(texts)} prompts, clips of {', '.join(models)}, {config.sampler.steps} steps each")
        return None
    started = time.perf_counter()
    accelerator = build_accelerator()
    folder = Path(config.run.folder)
    rank, world = accelerator.process_index, accelerator.num_processes
    backbone = load_backbone(config.backbone, accelerator.device)
    switch = None
    if config.run.lora:
        switch = attach_trained(config.run.lora, backbone.experts, fingerprint=backbone.fingerprint)
    for model in models:
        part = folder / f"clips-{model}-{rank}of{world}.safetensors"
        make_clips(config, backbone, switch, model, texts[rank::world], rank, world, part)
    accelerator.wait_for_everyone()
    if not accelerator.is_main_process:
        return None
    clips = {"true": true}
    for model in models:
        clips[model] = torch.empty_like(true)
        for other in range(world):
            clips[model][other::world] = load_file(folder / f"clips-{model}-{other}of{world}.safetensors")["clips"]
    results = report(config, clips, texts, folder)
    print(table(results))
    print(f"seconds     {time.perf_counter() - started:.0f}")
    print(f"results     {folder / 'results.json'}")
    print(f"comparison  {folder / 'comparison.mp4'}")
    return results


@torch.no_grad()
def make_clips(
    config: Config,
    backbone: Backbone,
    switch: Trainable | None,
    model: str,
    texts: list[str],
    rank: int,
    world: int,
    path: Path,
) -> None:
    """This rank's clips of one model, as one file that records what it was made with; kept when that is unchanged."""
    settings = [asdict(config.sampler), asdict(config.video), asdict(config.run.sandbox), backbone.fingerprint]
    if model == "tuned":
        settings.append(hashlib.sha256(weights_path(config.run.lora).read_bytes()).hexdigest())
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
    if path.exists() and _digest(path) == digest:
        return
    seeds = sandbox.noise_seeds(config.run.sandbox)[rank::world]
    clips: list[Tensor] = []
    with switch.reference() if switch is not None and model == "base" else nullcontext():
        for start in tqdm(range(0, len(texts), config.run.batch_size), desc=model, unit="batch", disable=rank > 0):
            part = slice(start, start + config.run.batch_size)
            conditioning = backbone.condition(texts[part])
            latents = sample_clips(backbone, conditioning, seeds[part], config.video, config.sampler, progress=False)
            clips.append(to_pixels(backbone.decode_latents(latents, batch_size=config.run.batch_size)).cpu())
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.tmp")
    save_file({"clips": torch.cat(clips)}, aside, metadata={"digest": digest})
    os.replace(aside, path)


def report(config: Config, clips: dict[str, Tensor], texts: list[str], folder: Path) -> dict[str, Any]:
    """Score all clips, write rows, results and pictures; returns the results."""
    scores = {model: sandbox.score(frames, texts, config.video) for model, frames in clips.items()}
    results: dict[str, Any] = {"settings": asdict(config), "clips": len(texts), "models": {}, "gain": {}}
    with (folder / "scores.jsonl").open("w", encoding="utf-8") as file:
        for model, measured in scores.items():
            for number, row in enumerate(measured.rows()):
                file.write(json.dumps({"model": model, "clip": number, "prompt": texts[number], **row}) + "\n")
    for model, measured in scores.items():
        results["models"][model] = {name: asdict(bootstrap_mean(getattr(measured, name).numpy())) for name in SCORES}
    if "tuned" in scores:
        for name in SCORES:
            difference = getattr(scores["tuned"], name) - getattr(scores["base"], name)
            results["gain"][name] = asdict(bootstrap_mean(difference.numpy()))
    (folder / "results.json").write_text(json.dumps(results, indent=1), encoding="utf-8")
    shown = range(min(SHOWN, len(texts)))
    compared = [side_by_side([frames[i] for frames in clips.values()], list(clips)) for i in shown]
    write_clip(folder / "comparison.mp4", torch.cat(compared), config.video.fps)
    rows = [(f"{model}: {texts[i]}", frames[i]) for i in shown for model, frames in clips.items()]
    contact_sheet(folder / "sheet.png", rows)
    return results


def table(results: dict[str, Any]) -> str:
    """The results as text, means with 95% intervals."""
    lines = [f"{results['clips']} held-out prompts{'':<8}" + "".join(f"{name:<26}" for name in SCORES)]
    for name, row in [*results["models"].items(), *([("gain, paired", results["gain"])] if results["gain"] else [])]:
        cells = "".join(f"{v['mean']:.3f} [{v['low']:.3f}, {v['high']:.3f}]".ljust(26) for v in row.values())
        lines.append(f"{name:<{len(lines[0]) - 26 * len(SCORES)}}{cells}")
    return "\n".join(lines)


def _digest(path: Path) -> str:
    with safe_open(path, framework="pt") as file:
        return (file.metadata() or {}).get("digest", "")


if __name__ == "__main__":
    main()
