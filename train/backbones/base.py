"""The backbone contract: one video generator, hidden behind seven calls, whatever its family.

A family is one file with a subclass of `Backbone`; `train.backbones.BACKBONES` names them. All that differs between
networks is asked of it: its diffusers classes (`kind`, `vae_class`, `pipelines`), its texts and encoders, how its
latents are normalised (`latent_moments`), what its network is called with (`network_arguments`, `timescale`). Weights
are read by `train.backbones.loading`, never here, so everything about shapes also works without any (`--dry-run`).

Shapes: B batch, C latent channels, F latent frames, H W latent rows and columns, T video frames, L text tokens,
D width.
Time t is in [0, 1] and 1 is noise; the network is fed `timescale` t. It predicts the velocity noise - clean.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import InitVar, dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from train.backbones.architecture import NetworkKind, latent_shape, num_tokens, shape_of
from train.backbones.conditioning import Conditioning as Conditioning
from train.backbones.config import BackboneConfig as BackboneConfig
from train.backbones.config import BaseLora as BaseLora
from train.backbones.host_weights import HostWeights
from train.backbones.tokenizer import build_tokenizer
from train.experts import BOTH as BOTH

TRAIN_TIMESTEPS = 1000.0  # the clock of diffusers' schedulers, and of most networks


def _cached(expert: nn.Module, name: str) -> AbstractContextManager[None]:
    """Around a pass of a network whose residual cache is on (`train.residual_cache`): which of a step's."""
    return expert.cache_context(name) if getattr(expert, "is_cache_enabled", False) else nullcontext()


@dataclass(eq=False, repr=False)
class Backbone:
    """A loaded (or partly loaded) generator; subclasses say what their network is fed.

    Everything is in eval mode and frozen. `expert` names the expert that trains and `transformer` is it; one-expert
    families have one, named "transformer". Where both train, `trained` is "both" and `expert` changes: `serve`. A part
    that was not loaded is None, or absent from `experts`. With `host` the experts take turns on the device.
    """

    kind: ClassVar[NetworkKind]
    vae_class: ClassVar[type]
    vae_facts: ClassVar[dict[str, tuple[str, int]]]  # what an architecture says of the VAE: its config's key, default
    network_defaults: ClassVar[dict[str, Any]]  # of keys that a transformer's config may lack: those of its class
    encoder_classes: ClassVar[dict[str, type[nn.Module]]]  # of texts and images, by the backbone's fields
    processor_classes: ClassVar[dict[str, type]] = {}  # what prepares pictures for them
    tokenizers: ClassVar[dict[str, Callable[[], Any]]] = {"tokenizer": build_tokenizer}  # each makes a small one
    pipelines: ClassVar[tuple[str, ...]]  # diffusers' classes, as model_index.json names them
    timescale: ClassVar[float] = TRAIN_TIMESTEPS  # what the network is told of t is t times that
    more_texts: ClassVar[dict[str, int]] = {}  # beside the text: name -> tokens, see `Conditioning.more`
    architectures: ClassVar[dict[str, dict[str, Any]]]
    expert_folders: ClassVar[dict[str, str]] = {"transformer": "transformer"}  # expert name -> folder in the pipeline
    first_frame: ClassVar[tuple[bool, ...]] = (False,)  # may clips begin with an image, must they; first the default
    takes_prefix: ClassVar[bool] = False  # may they begin with more than one frame
    image_tokens: ClassVar[int] = 0  # of an image encoder, which the network reads beside the texts'
    default_boundary: ClassVar[float | None] = None  # two experts: high_noise where t >= boundary

    config: InitVar[BackboneConfig]
    architecture: dict[str, Any]
    device: torch.device
    # Of the pipeline's folder, and after each of backbone.loras of the folder with the LoRAs up to that one.
    fingerprints: tuple[str, ...]
    encoders: str  # fingerprint of VAE and text encoder alone, on which latents and text embeddings depend
    experts: dict[str, nn.Module]
    boundary: float | None = None
    vae: nn.Module | None = None
    text_encoder: nn.Module | None = None
    tokenizer: PreTrainedTokenizerBase | None = None
    host: HostWeights | None = None

    def __post_init__(self, config: BackboneConfig) -> None:
        self.text_length, self.expert = config.text_length, self.training_expert(config)
        self.check_prefix(config.prefix_frames, "backbone.prefix_frames")
        whole = self.experts.keys() == self.expert_folders.keys()
        self.trained = BOTH if config.expert == BOTH and whole else self.expert

    @property
    def fingerprint(self) -> str:
        """Of all that a clip depends on: the folder and the LoRAs in its networks."""
        return self.fingerprints[-1]

    @property
    def group_fingerprints(self) -> tuple[str, ...]:
        """Those of the groups that suit it: of their encoders or, in groups of earlier versions, of the folder."""
        return self.encoders, self.fingerprints[0]

    # What a family is

    @classmethod
    def training_expert(cls, config: BackboneConfig) -> str:
        """Name of the expert that trains, the first of both; ValueError for one that the family has not."""
        first, *more = cls.expert_folders
        if config.expert == BOTH and not more:
            raise ValueError(f"backbone.expert=both, but backbone.family={config.family} has one expert: leave it out")
        if more and config.expert not in (known := (first, *more, BOTH)):
            raise ValueError(f"backbone.expert={config.expert!r} is unknown: use one of {', '.join(known)}")
        return config.expert if config.expert in cls.expert_folders else first

    @classmethod
    def input_channels(cls, architecture: dict[str, Any]) -> int:
        """Channels of the network's input; more than the latents' where image latents are stacked on them."""
        return architecture["z_dim"]

    @classmethod
    def mismatch(cls, model_index: dict[str, Any], architecture: dict[str, Any]) -> str:
        """Why a pipeline (its model_index.json and what its configs say) is not of this family; empty when it is."""
        if (name := model_index["_class_name"]) not in cls.pipelines:
            return f"it is a {name}"
        transformer, z_dim = architecture["transformer"], architecture["z_dim"]
        channels, outputs, wanted = transformer["in_channels"], transformer["out_channels"], len(cls.expert_folders)
        num_experts = 2 if (model_index.get("transformer_2") or [None])[0] else 1
        inputs = cls.input_channels(architecture)
        unfit = channels != inputs
        problems = {
            f"model_index.json lists {num_experts} expert(s), not {wanted}": num_experts != wanted,
            f"the transformer has in_channels={channels}, but beside a VAE of z_dim={z_dim} needs {inputs}": unfit,
            f"the transformer has out_channels={outputs}, but the VAE z_dim={z_dim}": outputs != z_dim,
        }
        return "; ".join(problem for problem, found in problems.items() if found)

    @classmethod
    def whole_config(cls, config: dict[str, Any]) -> dict[str, Any]:
        """A transformer's config with the keys that it lacks."""
        return cls.network_defaults | config

    @classmethod
    def check_text(cls, folder: Path, architecture: dict[str, Any]) -> None:
        """ValueError where a pipeline's text encoder is not one that its transformer reads."""

    @classmethod
    def random_encoders(cls, architecture: dict[str, Any], words: int) -> dict[str, Any]:
        """Encoders with the random weights of their classes, and what prepares pictures for them, by the backbone's
        fields; of widths that no checkpoint has, small ones, whose tokenizer has `words` tokens."""
        raise NotImplementedError

    @classmethod
    def fill_buffers(cls, encoders: dict[str, Any], device: torch.device) -> None:
        """Give `random_encoders` that were made without storage the buffers that no checkpoint holds."""

    @classmethod
    def vae_config(cls, architecture: dict[str, Any]) -> dict[str, Any]:
        """Keyword arguments of `vae_class` for an architecture without weights."""
        raise NotImplementedError

    @classmethod
    def text_lengths(cls, text_length: int) -> dict[str, int]:
        """Tokens of each text that the network reads, after padding, by name; the first is `text_length`."""
        return {"text": text_length, **cls.more_texts}

    # Parts

    @property
    def transformer(self) -> nn.Module:
        if self.expert not in self.experts:
            raise ValueError(f"the {self.expert} transformer is not loaded: name 'transformer' or 'expert' in parts")
        return self._on_device(self.expert)

    def _on_device(self, expert: str) -> nn.Module:
        if self.host is not None:
            self.host.bring(expert)
        return self.experts[expert]

    def serve(self, t: Tensor) -> None:
        """Where both experts train, make `expert` the one that serves the times t (B,): on one side of the boundary."""
        if self.trained == BOTH:
            (self.expert,) = {self._expert_at(one) for one in t}

    @property
    def blocks(self) -> nn.ModuleList:
        return self.kind.blocks_of(self.transformer)

    def latent_shape(self, height: int, width: int, num_frames: int) -> tuple[int, int, int, int]:
        """(C, F, H, W), see `train.backbones.architecture.latent_shape`."""
        return latent_shape(self.architecture, height, width, num_frames)

    def num_tokens(self, height: int, width: int, num_frames: int) -> int:
        """Transformer sequence length, see `train.backbones.architecture.num_tokens`."""
        return num_tokens(self.architecture, height, width, num_frames)

    # Conditioning

    def text_shapes(self) -> dict[str, tuple[int, int]]:
        """(tokens, width) of each text that the network reads."""
        raise NotImplementedError

    def encode_texts(self, prompts: list[str]) -> Conditioning:
        """Prompts -> their texts, zero beyond each prompt's tokens, in the text encoder's dtype."""
        raise NotImplementedError

    def count_tokens(self, prompts: list[str]) -> list[int]:
        """How many tokens each prompt has, at least where they are more than text_length. Needs the tokenizer alone."""
        raise NotImplementedError

    def check_prompts(self, prompts: list[str]) -> None:
        """ValueError where there is nothing to encode them with, or they are no list."""
        if self.text_encoder is None or self.tokenizer is None:
            raise ValueError("the text encoder is not loaded: name 'text' in parts, or pass a Conditioning")
        if isinstance(prompts, str):
            raise ValueError(f"prompts={prompts!r} is one string: give a list of prompts")

    def cut_prompts(self, prompts: Mapping[str, str]) -> str:
        """A warning of the prompts that `encode_texts` does not read to their end, which it cuts; empty where none is.

        prompts: by what names them in the warning. Needs the tokenizer alone.
        """
        counts = self.count_tokens(list(prompts.values())) if prompts else []
        long = [name for name, count in zip(prompts, counts, strict=True) if count > self.text_length]
        if not long:
            return ""
        are = "prompts are" if len(long) > 1 else "prompt is"
        reads = f"longer than the {self.text_length} tokens that the text encoder reads, and cut there"
        return f"warning: {len(long)} {are} {reads}; the first is {long[0]}"

    @classmethod
    def check_prefix(cls, frames: int, key: str, num_frames: int | None = None) -> None:
        """ValueError, naming `key`, where a clip (of `num_frames`) cannot begin with that many given frames."""
        if frames > 1 and not cls.takes_prefix:
            raise ValueError(f"{key}={frames}: {cls.__name__} takes one frame at most; set it to 1")
        (step,) = {one["vae_scale_temporal"] for one in cls.architectures.values()}
        if frames < 1 or (frames - 1) % step:
            fit = max(0, frames - 1) // step * step + 1
            raise ValueError(f"{key}={frames}: latent frames stand for 1, then {step} each; use {fit} or {fit + step}")
        if num_frames is not None and 1 < num_frames <= frames:
            raise ValueError(f"{key}={frames} leaves nothing to generate of {num_frames} frames: use fewer")

    @classmethod
    def first_frame_shapes(
        cls, architecture: dict[str, Any], clip: tuple[int, ...], prefix_frames: int = 1
    ) -> dict[str, tuple[int, ...]]:
        """Shapes of what the network is told of the first frames of latents `clip` (C, F, H, W), by the names of
        `Conditioning.named`, without a batch axis."""
        return {}

    def encode_first_frame(self, first_frame: Tensor, num_frames: int) -> Tensor:
        """First frame (B, 3, H, W) or prefix (B, 3, n, H, W), in [-1, 1] -> `Conditioning.image`; else ValueError."""
        raise ValueError(f"{type(self).__name__} generates from text alone: leave out first_frame")

    def condition(
        self, prompts: list[str], first_frame: Tensor | None = None, *, num_frames: int | None = None
    ) -> Conditioning:
        """Text, and with a first frame (B, 3, H, W) in [-1, 1], or a prefix of n frames (B, 3, n, H, W), also image
        latents for a video of `num_frames` frames.

        ValueError for frames that the family does not take, or that do not number as the prompts do.
        """
        told = self.encode_texts(prompts)
        if first_frame is None:
            return told
        if len(first_frame) != len(prompts):
            raise ValueError(f"{len(first_frame)} first frames for {len(prompts)} prompts: give one per prompt")
        if num_frames is None:
            raise ValueError("a first frame needs num_frames, the length of the video that it begins")
        if first_frame.dim() == 5:
            self.check_prefix(count := first_frame.shape[2], "first frames", num_frames)
            first_frame = first_frame if count > 1 else first_frame[:, :, 0]
        return self.begin(told, first_frame, num_frames)

    def begin(self, told: Conditioning, first_frame: Tensor, num_frames: int) -> Conditioning:
        """`told` with what the network is told of the first frame, or of a prefix, besides."""
        return replace(told, image=self.encode_first_frame(first_frame, num_frames))

    # Latents. Neither call disables gradients (guidance needs them); frozen weights build no graph by themselves.

    def encode_video(self, frames: Tensor, *, batch_size: int = 1) -> Tensor:
        """Frames (B, 3, T, H, W) in [-1, 1] -> normalised latents (B, C, F, H, W) float32: (mode - mean) / std.

        The posterior's mode, not a sample. The VAE runs in float32, as diffusers advises for Wan, on `batch_size`
        clips at a time.
        """
        vae, mean, std = self._vae()
        self.latent_shape(frames.shape[3], frames.shape[4], frames.shape[2])
        frames = frames.to(self.device, torch.float32)
        latents = torch.cat([vae.encode(clips).latent_dist.mode() for clips in frames.split(batch_size)])
        return (latents - mean) / std

    def decode_latents(self, latents: Tensor, *, batch_size: int = 1) -> Tensor:
        """Normalised latents (B, C, F, H, W) -> frames (B, 3, T, H, W) float32 in [-1, 1], `batch_size` clips at a
        time."""
        vae, mean, std = self._vae()
        latents = latents.to(self.device, torch.float32) * std + mean
        return torch.cat([vae.decode(clips).sample for clips in latents.split(batch_size)]).clamp(-1, 1)

    def _vae(self) -> tuple[nn.Module, Tensor, Tensor]:
        """The VAE and its latents' mean and standard deviation."""
        if self.vae is None:
            raise ValueError("the VAE is not loaded: name 'vae' in parts")
        return self.vae, *self.latent_moments()

    def latent_moments(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the loaded VAE's latents, which broadcast to (1, C, 1, 1, 1)."""
        raise NotImplementedError

    # The network

    def velocity(
        self, latents: Tensor, t: Tensor, conditioning: Conditioning, *, features_at: int | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Velocity (B, C, F, H, W) float32 of the training expert at latents (B, C, F, H, W) and t (B,) in [0, 1].

        With `features_at` also that block's output as a grid (B, D, F', H', W') in the block's dtype, from the same
        pass. Differentiable in the latents and in anything inside; inputs are cast to the transformer's dtype, no
        autocast.
        """
        if features_at is None:
            return self._network(self.transformer, latents, t, conditioning)
        if not 0 <= features_at < len(self.blocks):
            raise ValueError(f"features_at={features_at} is no block: use 0 to {len(self.blocks) - 1}")
        captured: list[Tensor] = []
        # Only for this call: with activation checkpointing the block runs again during backward, unobserved.
        with self.blocks[features_at].register_forward_hook(lambda block, inputs, output: captured.append(output)):
            velocity = self._network(self.transformer, latents, t, conditioning)
        (output,) = captured
        tokens = output[0] if isinstance(output, tuple) else output  # (B, N, D), of the video alone
        grid = [n // p for n, p in zip(latents.shape[2:], shape_of(self.architecture).patch, strict=True)]
        return velocity, tokens.transpose(1, 2).unflatten(2, grid)

    def _network(self, expert: nn.Module, latents: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        """One pass of any expert, shared by `velocity` and `velocity_at`."""
        batch = latents.shape[0]
        if t.shape != (batch,) or len(conditioning) != batch:
            raise ValueError(f"{batch} latents with t of shape {tuple(t.shape)} and {len(conditioning)} conditionings")
        texts, lengths = conditioning.texts(), self.text_lengths(self.text_length)
        if texts["text"].shape[1] != self.text_length:
            raise ValueError(
                f"the text has {texts['text'].shape[1]} tokens but backbone.text_length={self.text_length}: zero-pad it"
                " to that, for the network attends to the padding too"
            )
        if {name: text.shape[1] for name, text in texts.items()} != lengths:
            found = {name: tuple(text.shape[1:]) for name, text in texts.items()}
            raise ValueError(f"{type(self).__name__} reads texts of {lengths} tokens, given are {found}")
        arguments = self.network_arguments(latents, self.timescale * t.float(), conditioning, expert.dtype)
        return expert(**arguments, return_dict=False)[0].float()

    def network_arguments(
        self, latents: Tensor, timestep: Tensor, conditioning: Conditioning, dtype: torch.dtype
    ) -> dict[str, Tensor]:
        """What the network is called with, by diffusers' names: latents (B, C, F, H, W), timestep (B,) on its clock."""
        raise NotImplementedError

    # A sampling step, see `train.sampling`

    def velocity_at(
        self,
        latents: Tensor,
        t: Tensor | float,
        conditioning: Conditioning,
        *,
        negative: Conditioning | None = None,
        guidance: float = 1.0,
        guidance_low: float | None = None,
    ) -> Tensor:
        """Velocity (B, C, F, H, W) float32 of the expert that serves time t, a scalar in [0, 1]: one sampling step's.

        With classifier-free guidance: v = v_negative + guidance (v - v_negative), `negative` being the encoded negative
        prompt of 1 or B clips; that pass is left out where guidance is 1. Differentiable in the latents. ValueError
        where that expert is not loaded.
        """
        t = torch.as_tensor(t, dtype=torch.float32)
        expert, scale = self.expert_serving(t), self.guidance_at(t, guidance, guidance_low)
        batch = latents.shape[0]
        times = t.expand(batch).to(latents.device)
        with _cached(expert, "cond"):
            velocity = self._network(expert, latents, times, conditioning)
        if scale == 1:
            return velocity
        if negative is None:
            raise ValueError(f"guidance={scale:g} at t={t:.3f} needs the encoded negative prompt")
        without = conditioning.with_texts_of(negative.to(self.device).expand(batch))
        with _cached(expert, "uncond"):
            negative_velocity = self._network(expert, latents, times, without)
        return negative_velocity + scale * (velocity - negative_velocity)

    def expert_serving(self, t: Tensor | float) -> nn.Module:
        """The network that serves time t, a scalar in [0, 1]; ValueError where it is not loaded."""
        name = self._expert_at(torch.as_tensor(t, dtype=torch.float32))
        if name not in self.experts:
            raise ValueError(f"t={t:.3f} needs the {name} expert: load the part 'transformer'")
        return self._on_device(name)

    def guidance_at(self, t: Tensor | float, guidance: float, guidance_low: float | None) -> float:
        """The guidance scale at time t: `guidance_low`, where there is one, for a low-noise expert."""
        low = self._expert_at(torch.as_tensor(t, dtype=torch.float32)) == "low_noise"
        return guidance_low if low and guidance_low is not None else guidance

    def start(self, latents: Tensor, conditioning: Conditioning) -> Tensor:
        """The initial noise, with whatever the family holds fixed put in its place."""
        return latents

    def _expert_at(self, t: Tensor) -> str:
        """Name of the expert that serves time t, a scalar in [0, 1]."""
        return self.expert
