"""Clips as files: what each was made from, which are missing, and the making of those, of the base and a tuned model.

    <folder>/<model>/<key>-<seed>.mp4    a clip, and beside it <key>-<seed>.json, its sidecar: all that its frames
                                         depend on, with a digest, and what making it took; written last

A clip whose sidecar shows the same settings is finished: whoever is stopped continues. Clips that are sampled together
change each other by rounding, so batches are formed by place among all clips, finished or not (`batches`), and a batch
of which any clip is missing is sampled as a whole: a run that was stopped makes the clips that it would have made. How
latents are sampled is one
function of a `Model`, its `Strategy`; a search over several candidates is another such function
(`eval.search.searcher`).
"""

import gc
import json
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, astuple, dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from pydantic import ConfigDict, FiniteFloat
from torch import Tensor, nn
from typing_extensions import TypedDict

from eval.prompts import Prompt
from train.backbones import BACKBONES, load_backbone
from train.backbones.base import Backbone, BackboneConfig, Conditioning
from train.checkpoint import attach_trained, lora_config, read_weights_metadata, weights_path
from train.clips import VideoConfig, from_pixels, motion_energy, read_clip, to_pixels, write_clip
from train.files import digest, read_json, sha256, write_text
from train.fused.inference import fuse
from train.lora_switch import LoraConfig
from train.sampling import SamplerConfig, sample_clips

BASE, TUNED = "base", "tuned"


@dataclass(frozen=True)
class Lora:
    """Trained weights: a LoRA or, where `config` is None, all weights of a network."""

    path: Path  # of the file
    sha256: str
    expert: str  # the network that it was trained on
    config: LoraConfig | None


def read_lora(path: str, fingerprint: str, *, key: str) -> Lora:
    """What trained weights say of themselves; `key` is the recipe's, for messages.

    ValueError where there are none, or they belong to another backbone than `fingerprint` ("": unchecked).
    """
    try:
        file = weights_path(path)
        metadata = read_weights_metadata(file)
    except ValueError as error:
        raise ValueError(f"{key}={path}: {error}; exports and LoRAs of other tools are not read") from None
    if fingerprint and metadata["fingerprint"] != fingerprint:
        raise ValueError(
            f"{key}={path} was trained on backbone {metadata['fingerprint']}, but backbone.path is"
            f" {fingerprint}: use the backbone it was trained on"
        )
    shape = lora_config(metadata) if "rank" in metadata else None
    return Lora(file, sha256(file), metadata["expert"], shape)


class Sidecar(TypedDict):
    """What is kept of a clip beside the settings that it was made with, which stand among these."""

    __pydantic_config__ = ConfigDict(extra="allow")
    which: str  # the folder's name
    path: str  # below the folder of all models
    motion: FiniteFloat  # energy
    seconds: FiniteFloat  # that making it took
    passes: FiniteFloat  # of the network
    bytes: int  # of the clip
    digest: str  # of the settings


@dataclass(frozen=True)
class Clip:
    """A file that is wanted. `settings` is all that its frames depend on, as plain JSON values."""

    which: str  # the folder's name
    path: Path
    settings: dict[str, Any]
    lossless: bool = False

    @property
    def digest(self) -> str:
        return digest(self.settings)

    def record(self) -> Sidecar | None:
        """The sidecar of the clip that lies at `path`, made with whatever settings; None where either is not whole."""
        try:
            record = read_json(self.path.with_suffix(".json"), Sidecar, remedy="the clip is made again")
            return record if record["bytes"] == self.path.stat().st_size else None
        except (OSError, ValueError):
            return None

    def is_finished(self) -> bool:
        """Whether the clip that lies at `path` was made with these settings; a sidecar edited since says nothing."""
        record = self.record()
        if record is None or record["digest"] != self.digest:
            return False
        return digest({name: record.get(name) for name in self.settings}) == self.digest

    def write(self, frames: Tensor, fps: float, facts: Mapping[str, Any]) -> None:
        """Write frames (T, H, W, 3) uint8, then the sidecar: `settings` and `facts`."""
        sidecar = self.path.with_suffix(".json")
        sidecar.unlink(missing_ok=True)  # a kill between clip and sidecar must not leave new frames under old settings
        write_clip(self.path, frames, fps, lossless=self.lossless)
        place = f"{self.which}/{self.path.name}"
        record = {"which": self.which, "path": place} | dict(facts) | self.settings
        record |= {"motion": round(motion_energy(frames), 7)}
        record |= {"bytes": self.path.stat().st_size, "digest": self.digest}
        write_text(sidecar, json.dumps(record, ensure_ascii=False, indent=1) + "\n")


@dataclass(frozen=True)
class Request:
    """A clip to sample."""

    clip: Clip
    prompt: Prompt
    seed: int  # of the initial noise
    video: VideoConfig


class Strategy(Protocol):
    """How latents are sampled, under the weights that are switched on."""

    def __call__(
        self,
        backbone: Backbone,
        conditioning: Conditioning,
        requests: Sequence[Request],
        sampler: SamplerConfig,
        negative: Conditioning,
    ) -> tuple[Tensor, list[dict[str, Any]]]:
        """Latents (B, C, F, H, W) float32, one clip a request, and facts about each for its sidecar, as plain JSON
        values; conditioning is of B clips, all of one video size."""


def sample(
    backbone: Backbone,
    conditioning: Conditioning,
    requests: Sequence[Request],
    sampler: SamplerConfig,
    negative: Conditioning,
) -> tuple[Tensor, list[dict[str, Any]]]:
    """The plain strategy: one clip from each request's seed."""
    seeds, video = [request.seed for request in requests], requests[0].video
    latents = sample_clips(backbone, conditioning, seeds, video, sampler, negative=negative, progress=False)
    return latents, [{} for _ in requests]


@dataclass(frozen=True)
class Model:
    """What clips are made by: trained weights on (or None: off), and a strategy."""

    name: str  # of the clips' folder
    lora: Lora | None = None
    strategy: Strategy = sample
    settings: Mapping[str, Any] = field(default_factory=dict)  # all that the strategy depends on, as plain JSON values


def batches(model: Model, requests: Sequence[Request], size: int) -> list[list[Request]]:
    """Those of a model's requests that have to be made, as they are sampled together: at most `size` in a row of one
    video size, by place among all. A search samples its clips one by one, so finished ones are not sampled again."""
    if model.strategy is not sample:
        requests = [request for request in requests if not request.clip.is_finished()]
    found: list[list[Request]] = []
    for request in requests:
        if not found or len(found[-1]) == size or request.video != found[-1][0].video:
            found.append([])
        found[-1].append(request)
    return [batch for batch in found if not all(request.clip.is_finished() for request in batch)]


class Requests:
    """Builds requests: gathers all that a clip's frames depend on."""

    def __init__(self, backbone: BackboneConfig, sampler: SamplerConfig, fingerprint: str):
        self.common = {
            "backbone": fingerprint,
            "dtype": backbone.dtype,
            "text_length": backbone.text_length,
            "sampler": asdict(sampler),
        }
        self._images: dict[Path, str] = {}  # sha256

    def build(
        self, model: Model, path: Path, prompt: Prompt, seed: int, video: VideoConfig, *, lossless: bool = False
    ) -> Request:
        """The request for a clip at `path` from noise `seed`; OSError where the prompt's image cannot be read."""
        image = prompt.image
        if image and image not in self._images:
            self._images[image] = sha256(image)
        settings = {
            "prompt": prompt.text,
            "seed": seed,
            "image_sha256": self._images[image] if image else None,
            "lora_sha256": model.lora.sha256 if model.lora else None,
            **self.common,
            "video": asdict(video),
        }
        settings |= {"strategy": dict(model.settings)} if model.settings else {}
        settings |= {"lossless": True} if lossless else {}
        return Request(Clip(model.name, path, settings, lossless), prompt, seed, video)


def outdated(clips: Iterable[Clip], folder: Path) -> str:
    """A line about those of the unfinished `clips` that lie there, made with other settings; empty where none does."""
    found = [(clip, record) for clip in clips if (record := clip.record())]
    if not found:
        return ""
    clip, record = found[0]
    changed = ", ".join(name for name, value in clip.settings.items() if record.get(name) != value)
    return (
        f"{len(found)} clips in {folder} were made with other settings and are made again, the first is"
        f" {clip.path} (other: {changed})"
    )


def image_problem(config: BackboneConfig, prompts: Sequence[Prompt], shell: Backbone) -> str:
    """Why the backbone's family cannot make clips of these prompts with or without images; empty where it can."""
    family = BACKBONES[config.family]
    given = [prompt for prompt in prompts if prompt.image]
    if given and family.encode_first_frame is Backbone.encode_first_frame:
        return (
            f"{given[0].key} has an image, but backbone.family={config.family} generates from text alone: leave images"
            " out, or use wan22_ti2v or wan22_i2v"
        )
    if len(given) < len(prompts) and family.input_channels(shell.architecture) > shell.architecture["z_dim"]:
        return f"backbone.family={config.family} needs an image for each prompt"
    return ""


def first_frame(prompt: Prompt, video: VideoConfig) -> Tensor:
    """(1, 3, H, W) in [-1, 1] of the prompt's clip or picture; ClipError, a ValueError, where it cannot be read."""
    return from_pixels(read_clip(prompt.image, replace(video, num_frames=1)))[None, :, 0]


class Conditionings:
    """What the network is told, of one clip each and on the CPU: text and image encoded before the network is loaded.

    Text encoder and VAE are gone afterwards. One prompt at a time, so that its embedding does not depend on the others.
    """

    def __init__(
        self, config: BackboneConfig, sampler: SamplerConfig, requests: Sequence[Request], device: torch.device
    ):
        images = any(request.prompt.image for request in requests)
        backbone = load_backbone(config, device, parts=("text", "vae") if images else ("text",))
        self._encoded: dict[tuple, Conditioning] = {}
        for request in requests:
            key, prompt, video = self._key(request), request.prompt, request.video
            if key not in self._encoded:
                frame = first_frame(prompt, video) if prompt.image else None
                encoded = backbone.condition([prompt.text], frame, num_frames=video.num_frames)
                self._encoded[key] = encoded.to("cpu")
        self.negative = backbone.condition([sampler.negative_prompt]).to("cpu")
        del backbone
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()

    def of(self, requests: Sequence[Request]) -> Conditioning:
        return Conditioning.cat([self._encoded[self._key(request)] for request in requests])

    @staticmethod
    def _key(request: Request) -> tuple:
        image = request.prompt.image
        return (request.prompt.text, image, astuple(request.video) if image else None)


class Maker:
    """Networks and VAE on one device, trained weights attached to the expert that they belong to.

    Every model's `lora` is this one or None. ValueError as `load_backbone` and `attach_trained` raise it.
    """

    def __init__(
        self,
        config: BackboneConfig,
        sampler: SamplerConfig,
        lora: Lora | None,
        conditionings: Conditionings,
        device: torch.device,
        *,
        decode_batch: int = 1,
        fused: bool = False,
    ):
        self.sampler, self.conditionings, self.decode_batch = sampler, conditionings, decode_batch
        self.backbone = load_backbone(config, device, parts=("vae", "transformer"))
        self.passes = 0  # network passes so far, of one clip each
        for expert in self.backbone.experts.values():
            expert.register_forward_hook(self._count)
        self.switch = None
        if lora:
            self.switch = attach_trained(lora.path, self.backbone.experts, fingerprint=self.backbone.fingerprint)
        if fused and (reason := fuse(self.backbone, self.switch)):
            print(f"blocks are not fused: {reason}")

    def _count(self, network: nn.Module, inputs: tuple, output: Any) -> None:
        self.passes += len(output[0])

    @torch.no_grad()
    def make(self, model: Model, requests: Sequence[Request]) -> None:
        """Sample the requests' clips together, all of one video size, and write those that are not finished."""
        started, passes = time.perf_counter(), self.passes
        conditioning, negative = self.conditionings.of(requests), self.conditionings.negative
        with self.switch.reference() if self.switch and model.lora is None else nullcontext():
            latents, found = model.strategy(self.backbone, conditioning, requests, self.sampler, negative)
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
            facts |= {"lora": str(model.lora.path)} if model.lora else {}
            facts |= more
            request.clip.write(clip, request.video.fps, facts)
