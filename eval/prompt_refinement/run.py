"""Prompts that a vision-language model refines round by round, and the clips that come of it.

    accelerate launch --module eval.prompt_refinement.run recipe=wan14b refine_prompts.prompts_file=prompts.txt \\
        vlm.base_url=http://localhost:8000/v1 vlm.model=Qwen/Qwen2.5-VL-72B-Instruct

    <folder>/<key>/round-01.mp4, .json   every round's clip, prompt and critique; choice.json; see prompts.py
    <folder>/results.json                written last: each prompt's rounds, how they ended, the chosen clip

The noise is the same in every round. The chosen clip is the last one or, with `refine_prompts.chosen_by`, that of the
lowest score among all rounds (any scorer of `eval.search.scorers`, of the first description). With
`refine_prompts.search=best_of_n` (or race, prune) every round's clip is itself the best of several. Every rank takes a
share of the prompts; a run that was stopped continues.
"""

import json
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

import recipes
from eval.config import ClipsConfig
from eval.judges import Judging
from eval.loras import attach, read_lora
from eval.maker import TUNED, Model, Request, condition
from eval.prompt_refinement.prompts import ClipScorer, PromptRefineConfig, PromptRefiner
from eval.prompts import Prompt, PromptsConfig, make_key, read_prompts
from eval.search import searcher
from eval.search.candidates import Candidates
from eval.search.scorers import SCORERS
from eval.search.searcher import decoder
from train import entry
from train.backbones import load_backbone
from train.backbones.base import Backbone, Conditioning
from train.clips import from_pixels
from train.files import digest, lock, write_text
from train.parallel import any_rank


@dataclass
class RunConfig(PromptRefineConfig, PromptsConfig):
    lora: Any = ""  # as generate.lora; empty: the base model
    folder: str = "${output}/refined_prompts"  # everything goes here
    chosen_by: str = ""  # scorer that chooses among a prompt's rounds; empty: the last round's clip
    search: str = ""  # best_of_n | race | prune: of every round's clip; see eval.search.searcher
    refine: str = ""  # proprio | guidance, likewise


@dataclass
class Config(ClipsConfig):
    seed: int = 0  # of the initial noise
    refine_prompts: RunConfig = field(default_factory=RunConfig)


def main(argv: list[str] | None = None) -> list[dict[str, Any]] | None:
    config = recipes.load(Config, argv)
    settings = config.refine_prompts
    if settings.chosen_by and settings.chosen_by not in SCORERS:
        raise ValueError(f"refine_prompts.chosen_by={settings.chosen_by!r} is no scorer: use {', '.join(SCORERS)}")
    config.check("refine_prompts")
    prompts = read_prompts(settings, "refine_prompts", config.backbone.prefix_frames)
    results = None
    with entry.launched("refinement") as accelerator:
        if not config.dry_run:
            with lock(settings.folder) if accelerator.is_main_process else nullcontext():
                results = refine(config, prompts, accelerator)
        elif accelerator.is_main_process:
            print(f"{len(prompts)} prompts, at most {settings.rounds} clips each, {config.sampler.steps} steps a clip")
            print(f"search: {searcher.describe(config.method('refine_prompts'), config.search)}")
    return results


def refine(config: Config, prompts: Sequence[Prompt], accelerator: Accelerator) -> list[dict[str, Any]] | None:
    """Refine all prompts on all ranks; results on the main process, in order of the prompts."""
    settings, folder = config.refine_prompts, Path(config.refine_prompts.folder)
    generator = Generator(config, accelerator.device, images=prompts[0].image is not None)
    refiner = PromptRefiner(settings, config.vlm, config.video, folder, generator, made_with=generator.digest)
    scorer = generator.scorer() if settings.chosen_by else None
    refiner.run(prompts[accelerator.process_index :: accelerator.num_processes], scorer)
    any_rank(False, accelerator.device)  # an all-reduce, so all are done
    if not accelerator.is_main_process:
        return None
    results = []
    for prompt in prompts:
        choice = json.loads((folder / prompt.key / "choice.json").read_text(encoding="utf-8"))
        clip = None if choice["chosen"] is None else f"{prompt.key}/round-{choice['chosen']:02d}.mp4"
        results.append({"key": prompt.key} | choice | {"clip": clip})
        print(f"{prompt.key}: {len(choice['clips'])} clips, {choice['ended']}; {clip or 'no clip'}")
    write_text(folder / "results.json", json.dumps(results, ensure_ascii=False, indent=1) + "\n")
    print(f"results {folder / 'results.json'}")
    return results


class Generator:
    """Prompts and texts to clips, one each from the same noise; the network is loaded for the first."""

    def __init__(self, config: Config, device: torch.device, *, images: bool):
        self.config, self.device, self.images = config, device, images  # images: prompts have one, all or none
        shell = load_backbone(config.backbone, "cpu", parts=())
        self.lora = read_lora(config.refine_prompts.lora, shell, key="refine_prompts.lora")
        self.model = config.searching(Model(TUNED), "refine_prompts")
        backbone = [shell.fingerprint, config.backbone.dtype, config.backbone.text_length, config.seed]
        backbone += [config.backbone.prefix_frames] if images and config.backbone.prefix_frames > 1 else []
        weights = self.lora.sha256 if self.lora else ""
        self.digest = digest([backbone, config.sampler.settings(), weights, self.model.settings])

    @cached_property
    def backbone(self) -> Backbone:
        backbone = load_backbone(self.config.backbone, self.device)
        if self.lora:
            attach(self.lora, backbone)
        return backbone

    @torch.no_grad()
    def __call__(self, prompts: list[Prompt]) -> Tensor:
        config, backbone = self.config, self.backbone
        conditioning = Conditioning.cat([condition(backbone, prompt, config.video) for prompt in prompts])
        negative = backbone.condition([config.sampler.negative_prompt])
        requests = [Request(None, prompt, config.seed, config.video) for prompt in prompts]
        latents, _ = self.model.strategy(backbone, conditioning, requests, config.sampler, negative)
        return decoder(backbone, 1)(latents)

    def scorer(self) -> ClipScorer:
        """The scorer `chosen_by`, of clips as they lie on disk."""
        config = self.config
        build = SCORERS[config.refine_prompts.chosen_by]
        score = build(config.search, self.backbone, config.video.fps, Judging.of(config))

        @torch.no_grad()
        def values(description: str, clips: Tensor) -> Tensor:
            frames = from_pixels(clips)  # (R, 3, T, H, W)
            latents = self.backbone.encode_video(frames).cpu()
            count = self.config.backbone.prefix_frames  # with which every round begins, where the prompt has an image
            first = frames[:1, :, :count] if self.images else None
            conditioning = self.backbone.condition([description], first, num_frames=frames.shape[2])
            key, fps = make_key(0, description), self.config.video.fps
            return score(Candidates(key, description, latents, conditioning, lambda _: clips, fps))

        return values


if __name__ == "__main__":
    entry.run(main)
