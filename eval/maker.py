"""Making clips: of the base and a tuned model, from the same noise, on every rank its share of what is missing.

Clips that are sampled together change each other by rounding. So batches are formed by place among all clips, finished
or not (`batches`), and a batch of which any clip is missing is sampled as a whole: a run that was stopped makes the
clips that it would have made. How latents are sampled is one function of a `Model`; a search over several candidates is
another such function (`eval.search.searcher`).
"""

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, astuple, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils.memory import clear_device_cache
from torch import Tensor, nn
from tqdm import tqdm

from eval.clips import Clip
from eval.loras import Lora, attach
from eval.prompts import Prompt
from train.backbones import BACKBONES, load_backbone
from train.backbones.base import Backbone, BackboneConfig, Conditioning
from train.backbones.fused.inference import fuse
from train.clips import VideoConfig, from_pixels, read_clip, to_pixels
from train.files import sha256
from train.sampling import SamplerConfig, sample_clips

BASE, TUNED = "base", "tuned"


@dataclass(frozen=True)
class Request:
    """A clip to sample. Those of one call have one video size."""

    clip: Clip
    prompt: Prompt
    seed: int  # of the initial noise
    video: VideoConfig


def sample(
    backbone: Backbone,
    conditioning: Conditioning,
    requests: Sequence[Request],
    sampler: SamplerConfig,
    negative: Conditioning,
) -> tuple[Tensor, list[dict[str, Any]]]:
    """One clip from each request's seed."""
    seeds, video = [request.seed for request in requests], requests[0].video
    latents = sample_clips(backbone, conditioning, seeds, video, sampler, negative=negative, progress=False)
    return latents, [{} for _ in requests]


@dataclass(frozen=True)
class Model:
    """What clips are made by: trained weights on (or None: off), and how latents are sampled."""

    name: str  # of the clips' folder
    lora: Lora | None = None
    # Latents (B, C, F, H, W) float32, one clip per request, and facts about each for its sidecar, as plain JSON values;
    # (backbone, conditioning of B clips, requests, sampler, negative), under the weights that are switched on.
    strategy: Callable[..., tuple[Tensor, list[dict[str, Any]]]] = sample
    settings: Mapping[str, Any] = field(default_factory=dict)  # all that the strategy depends on, as plain JSON values


def batches(requests: Sequence[Request], size: int) -> list[list[Request]]:
    """Those of one model's requests that have to be made, as they are sampled together: at most `size` in a row of one
    video size, by place among all. A search samples its clips one by one, so finished ones are not sampled again."""
    if requests and "strategy" in requests[0].clip.settings:
        requests = [request for request in requests if not request.clip.is_finished()]
    found: list[list[Request]] = []
    for request in requests:
        if not found or len(found[-1]) == size or request.video != found[-1][0].video:
            found.append([])
        found[-1].append(request)
    return [batch for batch in found if not all(request.clip.is_finished() for request in batch)]


def build_request(
    config: Any,
    fingerprint: str,
    model: Model,
    path: Path,
    prompt: Prompt,
    seed: int,
    video: VideoConfig,
    *,
    lossless: bool = False,
) -> Request:
    """The request for a clip at `path` from noise `seed`, with all that its frames depend on.

    config: of an entry point, with `backbone`, of this fingerprint, and `sampler`. OSError where the prompt's image
    cannot be read.
    """
    settings = {
        "prompt": prompt.text,
        "seed": seed,
        "image_sha256": sha256(prompt.image) if prompt.image else None,
        "lora_sha256": model.lora.sha256 if model.lora else None,
        "backbone": fingerprint,
        "dtype": config.backbone.dtype,
        "text_length": config.backbone.text_length,
        "sampler": config.sampler.settings(),
        "video": asdict(video),
    }
    settings |= {"prefix_frames": prompt.frames} if prompt.frames > 1 else {}
    settings |= {"strategy": dict(model.settings)} if model.settings else {}
    settings |= {"lossless": True} if lossless else {}
    return Request(Clip(model.name, path, settings, lossless), prompt, seed, video)


def image_problem(config: BackboneConfig, prompts: Sequence[Prompt]) -> str:
    """Why the backbone's family cannot make clips of these prompts with or without images; empty where it can."""
    family = BACKBONES[config.family]
    given = [prompt for prompt in prompts if prompt.image]
    if given and True not in family.first_frame:
        others = [name for name, other in BACKBONES.items() if True in other.first_frame]
        return (
            f"{given[0].key} has an image, but backbone.family={config.family} generates from text alone: leave images"
            f" out, or use {' or '.join(others)}"
        )
    if len(given) < len(prompts) and False not in family.first_frame:
        return f"backbone.family={config.family} needs an image for each prompt"
    if (several := [prompt for prompt in given if prompt.frames > 1]) and not family.takes_prefix:
        others = [name for name, other in BACKBONES.items() if other.takes_prefix]
        return (
            f"{several[0].key} begins with {several[0].frames} frames, but backbone.family={config.family} takes no"
            f" more than one: use {' or '.join(others)}"
        )
    return ""


def first_frames(prompt: Prompt, video: VideoConfig) -> Tensor:
    """(1, 3, n, H, W) in [-1, 1], `prompt.frames` of its clip or picture; ClipError, a ValueError, where they cannot be
    read."""
    return from_pixels(read_clip(prompt.image, replace(video, num_frames=prompt.frames)))[None]


def condition(backbone: Backbone, prompt: Prompt, video: VideoConfig) -> Conditioning:
    """What the network is told of a prompt, of one clip."""
    frames = first_frames(prompt, video) if prompt.image else None
    return backbone.condition([prompt.text], frames, num_frames=video.num_frames)


def warn_of_cut_prompts(config: BackboneConfig, prompts: Sequence[Prompt]) -> None:
    """Print which prompts are longer than the text encoder reads."""
    tokenizer = load_backbone(config, "cpu", parts=("tokenizer",))
    if warning := tokenizer.cut_prompts({f"prompt {prompt.key}": prompt.text for prompt in prompts}):
        print(warning)


def make_clips(
    config: Any,
    models: Sequence[Model],
    todo: Sequence[list[Request]],
    lora: Lora | None,
    accelerator: Accelerator,
    *,
    decode_batch: int = 1,
) -> None:
    """Make this rank's share of the batches, which are the same on all ranks; what is finished in them stays.

    config: of an entry point, with `backbone` and `sampler`; models: those that the clips' folders are named after.
    Every model's `lora` is this one or None. Weights are loaded only where there is anything to make, and are gone
    afterwards. ValueError as `load_backbone` and `attach` raise it.
    """
    mine, device = todo[accelerator.process_index :: accelerator.num_processes], accelerator.device
    if not mine:
        return
    known, requests = {model.name: model for model in models}, [request for batch in mine for request in batch]
    if main := accelerator.is_main_process:
        print(f"encoding prompts and loading the network for {len(requests)} clips on this rank")
    maker = Maker(config, lora, requests, device, decode_batch=decode_batch)
    with tqdm(total=len(requests), desc="clips", unit="clip", smoothing=0, disable=not main) as bar:
        for batch in mine:
            maker.make(known[batch[0].clip.which], batch)
            bar.update(len(batch))
    del maker
    clear_device_cache(garbage_collection=True)  # a judge may need it


class Maker:
    """Networks and VAE on one device, trained weights attached to the expert that they belong to.

    What the network is told of each request is encoded before it is loaded, and kept on the CPU; text encoder and image
    encoder are gone afterwards. One prompt at a time, so that its embedding does not depend on the others.
    """

    def __init__(
        self, config: Any, lora: Lora | None, requests: Sequence[Request], device: torch.device, *, decode_batch: int
    ):
        self.sampler, self.decode_batch = config.sampler, decode_batch
        images = any(request.prompt.image for request in requests)
        backbone = load_backbone(config.backbone, device, parts=("text", "vae") if images else ("text",))
        self._encoded: dict[tuple, Conditioning] = {}  # of one clip each
        for request in requests:
            if (key := _told(request)) not in self._encoded:
                self._encoded[key] = condition(backbone, request.prompt, request.video).to("cpu")
        self.negative = backbone.condition([config.sampler.negative_prompt]).to("cpu")
        del backbone
        clear_device_cache(garbage_collection=True)
        self.backbone = load_backbone(config.backbone, device, parts=("vae", "transformer"))
        self.passes = 0  # network passes so far, of one clip each
        for expert in self.backbone.experts.values():
            expert.register_forward_hook(self._count)
        self.switch = attach(lora, self.backbone) if lora else None
        if config.backbone.compile and (reason := fuse(self.backbone, self.switch)):
            print(f"blocks are not fused: {reason}")

    def _count(self, network: nn.Module, inputs: tuple, output: Any) -> None:
        self.passes += len(output[0])

    @torch.no_grad()
    def make(self, model: Model, requests: Sequence[Request]) -> None:
        """Sample the requests' clips together, all of one video size, and write those that are not finished."""
        started, passes = time.perf_counter(), self.passes
        conditioning = Conditioning.cat([self._encoded[_told(request)] for request in requests])
        with self.switch.reference() if self.switch and model.lora is None else nullcontext():
            latents, found = model.strategy(self.backbone, conditioning, requests, self.sampler, self.negative)
        frames = [
            clip
            for part in latents.split(self.decode_batch)
            for clip in to_pixels(self.backbone.decode_latents(part, batch_size=self.decode_batch)).cpu()  # (T,H,W,3)
        ]
        seconds = round((time.perf_counter() - started) / len(requests), 3)
        for request, clip, more in zip(requests, frames, found, strict=True):
            if request.clip.is_finished():
                continue
            prompt = request.prompt
            facts = {"key": prompt.key, "seconds": seconds, "passes": (self.passes - passes) / len(requests)}
            facts |= {"image": str(prompt.image)} if prompt.image else {}
            facts |= {"lora": model.lora.path} if model.lora else {}
            facts |= more
            request.clip.write(clip, request.video.fps, facts)


def _told(request: Request) -> tuple:
    """What conditioning depends on."""
    prompt = request.prompt
    return (prompt.text, prompt.image, (prompt.frames, astuple(request.video)) if prompt.image else None)
