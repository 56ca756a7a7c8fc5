"""Clips during training: the same prompts and seeds every time, reference beside policy.

    <folder>/step_00000500/00-<seed>.mp4     base | tuned, side by side
    <folder>/step_00000500/sheet.png         both, frame by frame, for every prompt and seed

The reference's clips are made once, at the first call of a process, and kept in memory. Prompts are encoded once, by
the main process.
"""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file

from train import files, parallel
from train.backbones import BACKBONES, load_backbone
from train.backbones.base import Conditioning
from train.clips import contact_sheet, from_pixels, read_clip, side_by_side, to_pixels, write_clip
from train.group_sample import beginning
from train.sampling import sample_clips


@dataclass
class ValidationConfig:
    prompts: list[str] = field(default_factory=list)  # none: no validation clips
    # Image-to-video families: a clip or picture per prompt, of which the first backbone.prefix_frames are used.
    images: list[str] = field(default_factory=list)
    seeds: list[int] = field(default_factory=lambda: [0])  # clips per prompt
    every: int = 500  # steps; also before the first and after the last


def check(config: Any) -> None:
    """ValueError, before weights are read, where pictures and prompts do not go together."""
    family, frames, video = BACKBONES.get(config.backbone.family), config.backbone.prefix_frames, config.video
    config = config.validation
    if family is not None and (config.images or config.prompts and frames > 1):
        family.check_prefix(frames, "backbone.prefix_frames", video.num_frames)
    if config.prompts and not config.images and frames > 1:
        raise ValueError(
            f"backbone.prefix_frames={frames}: no clip of validation.prompts begins with one; name clips in"
            " validation.images, or set validation.prompts=[]"
        )
    if config.images and len(config.images) != len(config.prompts):
        raise ValueError(
            f"validation.images names {len(config.images)} files for {len(config.prompts)} prompts: give one a prompt"
        )
    if config.images and family is not None and True not in family.first_frame:
        raise ValueError(
            f"validation.images={config.images}: this backbone.family generates from text alone; leave the key out"
        )
    if config.prompts and not config.images and family is not None and family.first_frame == (True,):
        raise ValueError(
            f"validation.prompts={config.prompts}: this backbone.family begins every clip with an image; name a clip or"
            " picture for each in validation.images, or set validation.prompts=[]"
        )


class Validation:
    """Makes the clips of `config.validation`. Every rank runs equally many passes, as ZeRO-3 needs: the last ones are
    repeated."""

    def __init__(self, config: Any, accelerator: Accelerator, folder: Path):
        self.config, self.accelerator, self.folder = config, accelerator, folder
        self.enabled = bool(config.validation.prompts)
        if self.enabled:
            self.conditioning, self.negative = self._encode()
        jobs = [(p, s) for p in range(len(config.validation.prompts)) for s in config.validation.seeds]
        rank, world = accelerator.process_index, accelerator.num_processes
        own, rounds = jobs[rank::world], -(-len(jobs) // world)
        self.jobs, self.own = own + jobs[-1:] * (rounds - len(own)), len(own)
        self.base: list[torch.Tensor] = []

    def due(self, step: int) -> bool:
        return self.enabled and step % self.config.validation.every == 0

    def catch_up(self, step: int, policy: Any) -> None:
        """Make the clips of `step`, from which training starts, unless a run before made all of them."""
        wanted = [self._clip_path(step, *job) for job in self.jobs[: self.own]]
        wanted += [self._sheet_path(step)] if self.own else []
        missing = step == 0 or not all(path.exists() for path in wanted)
        if parallel.any_rank(self.enabled and missing, self.accelerator.device):
            self.run(step, policy)

    def run(self, step: int, policy: Any) -> None:
        """Make the clips of `step` and, on the main process, the contact sheet of all ranks' clips."""
        if not self.enabled:
            return
        backbone = policy.backbone
        backbone.vae.to(self.accelerator.device)
        if not self.base:
            with policy.switch.reference():
                self.base = [self._clip(backbone, *job) for job in self.jobs]
        tuned = [self._clip(backbone, *job) for job in self.jobs]
        backbone.vae.to("cpu")
        rows = []
        for (prompt, seed), base, clip in list(zip(self.jobs, self.base, tuned, strict=True))[: self.own]:
            both = side_by_side([base, clip], ["base", f"step {step}"])
            write_clip(self._clip_path(step, prompt, seed), both, self.config.video.fps)
            title = f"{self.config.validation.prompts[prompt][:60]} (seed {seed})"
            rows += [(f"base: {title}", base), (f"tuned: {title}", clip)]
        if rows:
            contact_sheet(self._sheet_path(step), rows)  # last: what `catch_up` finds is whole
        self.accelerator.wait_for_everyone()

    def _clip_path(self, step: int, prompt: int, seed: int) -> Path:
        return self.folder / f"step_{step:08d}" / f"{prompt:02d}-{seed}.mp4"

    def _sheet_path(self, step: int) -> Path:
        """Of this rank."""
        name = "sheet.png" if self.accelerator.num_processes == 1 else f"sheet-{self.accelerator.process_index}.png"
        return self.folder / f"step_{step:08d}" / name

    @torch.no_grad()
    def _clip(self, backbone: Any, prompt: int, seed: int) -> torch.Tensor:
        latents = sample_clips(
            backbone,
            self.conditioning[prompt : prompt + 1].to(self.accelerator.device),
            [seed],
            self.config.video,
            self.config.sampler,
            negative=self.negative,
            progress=False,
        )
        return to_pixels(backbone.decode_latents(latents))[0].cpu()

    def _encode(self) -> tuple[Conditioning, Conditioning]:
        """Embeddings of the prompts and the negative prompt, encoded by the main process into a file that all read."""
        path = self.folder / "prompts.safetensors"
        config = self.config.validation
        if self.accelerator.is_main_process:
            parts = ("text", "vae") if config.images else ("text",)
            backbone = load_backbone(self.config.backbone, self.accelerator.device, parts=parts)
            first = None
            if config.images:
                given = replace(self.config.video, num_frames=self.config.backbone.prefix_frames)
                first = torch.stack([from_pixels(read_clip(path, given)) for path in config.images])  # (P,3,n,H,W)
            conditioning = backbone.condition(list(config.prompts), first, num_frames=self.config.video.num_frames)
            negative = backbone.condition([self.config.sampler.negative_prompt])
            both = {"prompts": conditioning.named(), "negative": negative.named()}
            tensors = {f"{which}/{name}": value for which, named in both.items() for name, value in named.items()}
            with files.atomic(path) as aside:
                save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, aside)
            del backbone
        self.accelerator.wait_for_everyone()
        if not path.exists():
            raise ValueError(
                f"{path}, which the main process has written, is not there: output={self.config.output} must lie on one"
                " file system that all nodes share"
            )
        found = load_file(path)
        return tuple(Conditioning.of(beginning(f"{which}/", found)) for which in ("prompts", "negative"))
