"""HunyuanVideo 1.5, image to video (8.3B): the network of `train.backbones.hunyuan15` with a first frame.

The network is told of the frame twice. Its latents and a mask, which is 1 there, stand in the first latent frame of
what is stacked on the noisy latents; every later one is zero. And SigLIP's tokens of it, 729 of the real encoder's 384
x 384 pixels, are joined with the texts' tokens; the negative prompt has the same ones. All latent frames are generated,
the first too. Both stand in `Conditioning.more`: image_latents (B, C, 1, H, W) and image (B, 729, 1152).

Facts from diffusers' HunyuanVideo15ImageToVideoPipeline and the public google/siglip-so400m-patch14-384. Deviation: the
frame is cut and scaled to the clip's size by `train.clips`, where diffusers chooses a size by the picture.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import SiglipVisionConfig, SiglipVisionModel

from train.backbones.base import Conditioning
from train.backbones.hunyuan15 import TINY, Hunyuan15, hunyuan15_architecture
from train.clips import to_pixels
from train.group_sample import MORE

try:
    from transformers import SiglipImageProcessorPil
except ImportError:  # older versions' own name for it
    from transformers import SiglipImageProcessor as SiglipImageProcessorPil

REAL = 1152  # width of SigLIP, of which VISION holds the rest
VISION = {"intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16}
VISION |= {"image_size": 384, "patch_size": 14}
SMALL = {"num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}


def vision_config(width: int) -> SiglipVisionConfig:
    """The image encoder's config; of a width that no checkpoint has, a small one of 4 tokens."""
    return SiglipVisionConfig(
        hidden_size=width, **(VISION if width == REAL else SMALL | {"intermediate_size": 2 * width})
    )


def image_processor(config: SiglipVisionConfig) -> SiglipImageProcessorPil:
    """What scales pictures to the encoder's size: with Pillow, whether torchvision is installed or not."""
    return SiglipImageProcessorPil(size={"height": config.image_size, "width": config.image_size})


@dataclass(eq=False, repr=False)
class Hunyuan15I2V(Hunyuan15):
    encoder_classes = {**Hunyuan15.encoder_classes, "image_encoder": SiglipVisionModel}
    processor_classes = {"feature_extractor": SiglipImageProcessorPil}
    pipelines = ("HunyuanVideo15ImageToVideoPipeline",)
    first_frame = (True,)
    image_tokens = 729
    architectures = {
        "tiny": hunyuan15_architecture(4, 8, task_type="i2v", **TINY),
        "8.3B": hunyuan15_architecture(32, 16, task_type="i2v"),
    }

    image_encoder: nn.Module | None = None
    feature_extractor: SiglipImageProcessorPil | None = None

    @classmethod
    def random_encoders(cls, architecture: dict[str, Any], words: int) -> dict[str, Any]:
        """SigLIP, too, drawn after the others."""
        found = super().random_encoders(architecture, words)
        config = vision_config(architecture["transformer"]["image_embed_dim"])
        return found | {"image_encoder": SiglipVisionModel(config), "feature_extractor": image_processor(config)}

    @classmethod
    def fill_buffers(cls, encoders: dict[str, Any], device: torch.device) -> None:
        super().fill_buffers(encoders, device)
        (table,) = encoders["image_encoder"].buffers()  # of positions
        table.copy_(torch.arange(table.shape[1], device=device))

    @classmethod
    def first_frame_shapes(
        cls, architecture: dict[str, Any], clip: tuple[int, ...], prefix_frames: int = 1
    ) -> dict[str, tuple[int, ...]]:
        channels, _, *size = clip
        width = architecture["transformer"]["image_embed_dim"]
        config = vision_config(width)
        tokens = (config.image_size // config.patch_size) ** 2
        return {f"{MORE}image_latents": (channels, 1, *size), f"{MORE}image": (tokens, width)}

    def encode_first_frame(self, first_frame: Tensor, num_frames: int) -> Tensor:
        """First frame (B, 3, H, W) in [-1, 1] -> its latent frame (B, C, 1, H, W), whatever `num_frames` is."""
        return self.encode_video(first_frame.unsqueeze(2))

    @torch.no_grad()
    def embed(self, first_frame: Tensor) -> Tensor:
        """First frame (B, 3, H, W) in [-1, 1] -> tokens (B, N, D) in the image encoder's dtype."""
        if self.image_encoder is None:
            raise ValueError("the image encoder is not loaded: name 'text' in parts, or pass a Conditioning")
        pictures = list(to_pixels(first_frame.unsqueeze(2))[:, 0].cpu().numpy())  # (H, W, 3) uint8 each
        read = self.feature_extractor.preprocess(images=pictures, do_resize=True, return_tensors="pt")
        return self.image_encoder(read.pixel_values.to(self.device, self.image_encoder.dtype)).last_hidden_state

    def begin(self, told: Conditioning, first_frame: Tensor, num_frames: int) -> Conditioning:
        """Not as `image`: a single latent frame there is one that is held."""
        latents = self.encode_first_frame(first_frame, num_frames)
        return replace(told, more=told.more | {"image_latents": latents, "image": self.embed(first_frame)})

    def _given(self, latents: Tensor, conditioning: Conditioning) -> tuple[Tensor, Tensor]:
        if "image" not in conditioning.more:
            raise ValueError("hunyuan15_i2v needs a first frame: give condition or sample one, or a Conditioning of it")
        given, _ = super()._given(latents, conditioning)
        given[:, :-1, :1] = conditioning.more["image_latents"].to(given)
        given[:, -1:, :1] = 1
        return given, conditioning.more["image"].to(latents.device)
