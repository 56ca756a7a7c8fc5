"""The surprise of a latent world model, V-JEPA 2 by transformers, over windows of a clip (WMReward, Yuan et al., 2026).

Of a clip at most `frames` frames are taken, evenly from the first to the last, 49 as in the release: at 121 frames of
24 a second a context of 8 then spans 0.8 s instead of 0.3. A window slides over these. Of each window the model sees
the first `context` frames and predicts the tokens of the others; the surprise is how far these are from the tokens of
the encoder that saw the whole window, see `losses.surprise`; a clip's surprise is the mean over its windows. Lower is
better.

The context is encoded alone. `VJEPA2Model.forward` would encode the whole window and only then drop the tokens that are
not of the context, and attention has mixed the future into those that stay.

Any clip is squeezed into the model's square, as `train.teachers.vjepa2` does. Frames after the last whole window
are not judged. Between two frames the earlier one is taken.
"""

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from losses.surprise import surprise
from train.teachers.vjepa2 import EXAMPLE, preprocess
from train.teachers.weights import check_path, load_model, read_config

KEY = "world_model.path"
FRAMES = 49  # of a clip, at most: the release's max_frames


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

    @torch.no_grad()
    def surprise(
        self,
        clips: Tensor,
        *,
        window: int = 16,
        context: int = 8,
        stride: int = 8,
        axis: str = "feature",
        frames: int = FRAMES,
        batch: int = 16,
    ) -> Tensor:
        """clips (N,T,H,W,3) uint8 -> (N,) float32 on the model's device.

        frames: of a clip, at most. window, context and stride count these; the first two are multiples of the tubelet;
        axis as in `losses.surprise`; batch is how many clips are judged at once. Raises ValueError for numbers that do
        not fit the clip or the model.
        """
        clips = clips[:, chosen_frames(clips.shape[1], frames)]
        starts = self._starts(clips.shape[1], window, context, stride)
        scores = []
        for part in clips.split(batch):
            part = part.to(self.device)
            windows = [self._window(part[:, start : start + window], context, axis) for start in starts]
            scores.append(torch.stack(windows).mean(dim=0))
        return torch.cat(scores)

    def surprise_with_gradient(
        self,
        decoded: Tensor,
        *,
        window: int = 16,
        context: int = 8,
        stride: int = 8,
        axis: str = "feature",
        frames: int = FRAMES,
    ) -> Tensor:
        """The same of clips (N,3,T,H,W) in [-1, 1], as a VAE decodes them, for guidance: (N,) with gradient to them.

        Gradient flows through prediction and target. Each window is computed anew in the backward pass, so the
        activations of one window are held at a time.
        """
        decoded = decoded[:, :, chosen_frames(decoded.shape[2], frames)]
        starts = self._starts(decoded.shape[2], window, context, stride)
        clips = ((decoded.to(self.device) + 1) * 127.5).permute(0, 2, 3, 4, 1)
        windows = [
            checkpoint(self._window, clips[:, start : start + window], context, axis, use_reentrant=False)
            for start in starts
        ]
        return torch.stack(windows).mean(dim=0)

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
    if most < 2:
        raise ValueError(f"frames={most}: a clip is judged by 2 frames or more")
    count = min(num_frames, most)
    return [number * (num_frames - 1) // max(count - 1, 1) for number in range(count)]
