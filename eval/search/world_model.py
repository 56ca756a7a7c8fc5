"""The surprise of a latent world model, V-JEPA 2 by transformers, over windows of a clip (WMReward, Yuan et al., 2026).

Of a clip at most FRAMES frames are taken, evenly from the first to the last, 49 as in the release: at 121 frames of
24 a second a context of 8 then spans 0.8 s instead of 0.3. A window slides over these. Of each window the model sees
the first `context` frames and predicts the tokens of the others; the surprise is how far these are from the tokens of
the encoder that saw the whole window, see `losses.surprise`; a clip's surprise is the mean over its windows. Lower is
better.

The context is encoded alone. `VJEPA2Model.forward` would encode the whole window and only then drop the tokens that are
not of the context, and attention has mixed the future into those that stay.

Any clip is squeezed into the model's square, as `train.teachers.vjepa2` does. Frames after the last whole window
are not judged. Between two frames the earlier one is taken.
"""

from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from losses.surprise import surprise
from train.teachers.vjepa2 import EXAMPLE, preprocess
from train.teachers.weights import check_path, load_model, read_config

KEY = "world_model.path"
FRAMES = 49  # of a clip, at most: the release's max_frames


@dataclass
class SurpriseConfig:
    path: str = ""  # hub id or folder of a V-JEPA 2 model
    window: int = 16  # of the frames taken, as the next two
    context: int = 8  # frames of a window that are seen
    stride: int = 8  # frames between windows
    axis: str = "feature"  # cosine over features (the paper's text) or over tokens (its released code)

    def settings(self) -> dict[str, Any]:
        """What a surprise depends on beside the clip, as plain JSON values."""
        return asdict(self) | {"frames": FRAMES}


class WorldModel:
    """A frozen V-JEPA 2, encoder and predictor, in float32.

    path: folder or hub id of a checkpoint in transformers' form, facebook/vjepa2-* or the sandbox's
    eval/sandbox/world_model. Raises ValueError when it is missing, incomplete or another model.
    """

    def __init__(self, path: str, device: torch.device | str):
        from transformers import VJEPA2Model

        check_path(KEY, path, EXAMPLE)
        settings = read_config(KEY, path, "vjepa2")
        self.model = load_model(KEY, path, VJEPA2Model, settings, device)
        self.device = torch.device(device)
        self.tubelet = settings.tubelet_size
        self.grid = settings.crop_size // settings.patch_size  # tokens along a side

    def surprise(self, clips: Tensor, config: SurpriseConfig, *, batch: int = 16) -> Tensor:
        """clips (N,T,H,W,3) from 0 to 255, of any number type -> (N,) float32 on the model's device.

        config: window and context are multiples of the tubelet, axis as in `losses.surprise`; its path plays no part.
        batch is how many clips are judged at once. Raises ValueError for numbers that do not fit the clip or the model.

        Where clips ask for a gradient it flows through prediction and target. Each window is computed anew in the
        backward pass, so the activations of one window are held at a time.
        """
        clips = clips[:, chosen_frames(clips.shape[1], FRAMES)]
        starts = self._starts(clips.shape[1], config.window, config.context, config.stride)
        judge = partial(checkpoint, self._window, use_reentrant=False) if clips.requires_grad else self._window
        scores = []
        for part in clips.split(batch):
            part = part.to(self.device)
            windows = [judge(part[:, start : start + config.window], config.context, config.axis) for start in starts]
            scores.append(torch.stack(windows).mean(dim=0))
        return torch.cat(scores)

    def predict(self, clips: Tensor, context: int) -> tuple[Tensor, Tensor]:
        """Predicted tokens and those of the encoder, each (N,K,D) float32, of the frames after the first `context`.

        clips (N,T,H,W,3), 0 to 255, on the model's device; K = (T - context) / tubelet x rows x columns.
        """
        pixels = preprocess(clips.flatten(0, 1), self.grid * self.model.config.patch_size).unflatten(0, clips.shape[:2])
        seen = self.model.encoder(pixel_values_videos=pixels[:, :context]).last_hidden_state
        whole = self.model.encoder(pixel_values_videos=pixels).last_hidden_state
        positions = torch.arange(whole.shape[1], device=pixels.device).expand(len(pixels), -1)
        predicted = self.model.predictor(
            encoder_hidden_states=seen,
            context_mask=[positions[:, : seen.shape[1]]],
            target_mask=[positions[:, seen.shape[1] :]],
        ).last_hidden_state
        return predicted, whole[:, seen.shape[1] :]

    def _window(self, clips: Tensor, context: int, axis: str) -> Tensor:
        return surprise(*self.predict(clips, context), axis=axis)

    def _starts(self, num_frames: int, window: int, context: int, stride: int) -> range:
        """First frames of the windows."""
        if not 0 < context < window:
            raise ValueError(f"context={context} with window={window}: a window holds a context and a future")
        for name, value in (("window", window), ("context", context)):
            if value % self.tubelet:
                raise ValueError(f"{name}={value} is no multiple of the world model's tubelet of {self.tubelet} frames")
        if stride < 1:
            raise ValueError(f"stride={stride}: windows move by 1 frame or more")
        if num_frames < window:
            raise ValueError(f"window={window} is longer than the clip of {num_frames} frames: use a smaller window")
        return range(0, num_frames - window + 1, stride)


def chosen_frames(num_frames: int, most: int) -> list[int]:
    """At most `most` of the frames, evenly from the first to the last. By hand, 3 of 6: 0, 2 (of 2.5), 5."""
    count = min(num_frames, most)
    return [number * (num_frames - 1) // max(count - 1, 1) for number in range(count)]
