"""LikePhys (Yuan et al., ICLR 2026, arXiv 2510.11512): does the model find what is impossible less likely?

No clip is made. The denoising loss stands for the negative log-likelihood of a clip: true and violated clips of one
scene are noised to the same levels with the same noise, and the Plausibility Preference Error is the share of pairs in
which the violated clip has the LOWER loss. 0.5 is chance, lower is better.

    loss(x) = mean over levels t and draws of |noise - predicted noise|^2 = (1 - t)^2 |velocity - (noise - x)|^2

As in the release (github.com/YuanJianhao508/LikePhys): ten levels evenly spaced over all of them, one draw of noise a
level, shared by all clips of a scene; every true clip of a scene with every violated one of a kind; the mean over
scenes and then over kinds, each kind of each scenario with equal weight; six kinds left out (`LEFT_OUT`); one prompt a
scenario; frames picked evenly from the whole clip and stretched to the model's size.

Deviations. The release noises Wan's latents along another path (x + sigma noise, scaled to unit variance) than the
one Wan was trained on; here it is the model's own, (1 - t) x + t noise. It applies classifier-free guidance to the
prediction; here there is none. Equal losses count half, there as no error.

Two sources of clips. `sandbox`: simulated scenes with held-out prompts and their planted violations, equally many pairs
of each kind, figures by kind. `folder`: the published clips, figures by scenario. All figures are means over rows, one
for each kind of a scene: in the published clips kinds weigh the same where they have equally many scenes.

The losses of finished scenes are kept in `<folder>/losses.jsonl`. Nothing in a backbone says which LoRA is on, so the
first scene is always asked again, and the others are taken over only if it gives the very same losses.
"""

import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Set
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from eval.benchmarks.base import Benchmark, Requirement, Row
from eval.sandbox.clips import SCENES, Clips, simulate
from eval.sandbox.prompts import TEMPLATES, write_prompt
from eval.sandbox.splits import is_held_out, smallest
from eval.sandbox.world import VIOLATIONS
from eval.search.candidates import Candidates
from eval.search.residuals import SEED as NOISE_SEED
from eval.search.residuals import ResidualConfig, Residuals
from train.backbones.base import Backbone
from train.clips import ClipError, VideoConfig, from_pixels
from train.files import digest, seed_of, write_text

VALID = "valid"
# Scenario: folder of the published dataset, and the prompt that the release gives to all of its clips.
SCENARIOS: dict[str, tuple[str, str]] = {
    "ball_drop": ("ball_drop_videos", "ball dropping and colliding with the ground, in empty background"),
    "ball_collision": ("ball_collision_videos", "two balls colliding with each other"),
    "pendulum": ("pendulum_videos", "a pendulum swinging"),
    "block_slide": ("block_slide_videos", "a block sliding on a slope"),
    "pyramid": ("pyramid_videos", "a cube crash into a pile of spheres"),
    "cloth": ("cloth_drape_videos", "a piece of cloth dropping to the obstacle on the ground"),
    "flag": ("flag_videos", "a piece of cloth waving in the wind"),
    "fluid": ("fluid_videos", "a droplet falling"),
    "faucet": ("faucet_videos", "fluid flowing from a faucet"),
    "river": ("river_videos", "fluid flowing in a tank with obstacles"),
    "shadow": ("shadow_videos", "light source moving around an object showing its shadow"),
    "shadowm": ("shadow_camera_videos", "camera moving around an object"),
}
# Kinds that the release's analysis does not count.
LEFT_OUT = {
    "shadowm": ("shadow_disconnection",),
    "pendulum": ("reverse_gravity", "break_conservation_energy"),
    "river": ("color_change", "teleporting_fluid", "negative_viscosity"),
}
BLOCK = 8  # scenes simulated together
DATASET = "huggingface.co/datasets/JianhaoDYDY/LikePhys-Benchmark"


NUM_FRAMES = 33  # of a published clip; what the release takes for Wan 2.1
SEED = 0  # of the simulated scenes
LEVELS = ResidualConfig(levels=10, first=0.001, last=0.901, shift=1.0, draws=1)  # timesteps 999, 899, ... 99 of 1000


@dataclass
class LikePhysConfig:
    folder: str = ""  # of the published clips, with ball_drop_videos and so on; empty: simulated scenes instead
    pairs: int = 64  # of each of the sandbox's kinds, from all scenes that know it
    # Of the planted violations, in (0, 1]. Gross ones are too easy to compare models by: the error of the shipped
    # sandbox model is 0.002 at severity 1, 0.087 at 0.3 and 0.266 at 0.1.
    severity: float = 0.1


@dataclass(frozen=True)
class Group:
    """True and violated clips of one scene, under one prompt."""

    key: str  # names rows, and the noise that all of its clips share
    figure: str  # column of all of its rows; "": each row's own kind
    prompt: str
    clips: Mapping[tuple[str, str], Callable[[], Tensor]]  # (kind or "valid", name) -> frames (T, H, W, 3) uint8


class LikePhys(Benchmark):
    name = "likephys"
    of_clips = False

    def __init__(self, settings: LikePhysConfig, video: VideoConfig, *judges: Any):
        super().__init__(settings, video, *judges)
        if settings.pairs < 1:
            raise ValueError(f"run.likephys.pairs={settings.pairs}: use 1 or more")
        self._parts = tuple(SCENARIOS) if settings.folder else tuple(VIOLATIONS)
        # margin: by how much the violated clips' mean loss is above the true ones', as a share of the latter
        self.columns = ("error", "margin", *self._parts)
        self.figures = self.columns
        self.lower_is_better = ("error", *self._parts)

    @property
    def recorded(self) -> dict[str, Any]:
        """With what had keys of its own, and with the keys' names of then; the batch is the sandbox's of then."""
        source = "folder" if self.settings.folder else "sandbox"
        levels = asdict(LEVELS) | {"batch_size": 9, "seed": NOISE_SEED}
        return super().recorded | {"source": source, "num_frames": NUM_FRAMES, "seed": SEED, "residuals": levels}

    def requirements(self) -> list[Requirement]:
        if not self.settings.folder:
            return []
        remedy = f"download {DATASET} and name its folder in run.likephys.folder, or none for simulated scenes"
        where = f"run.likephys.folder={self.settings.folder!r}"
        licence = "none stated; see the dataset's page"
        return [Requirement("the LikePhys clips", licence, where, self._root() is not None, remedy)]

    def check(self, shell: Backbone) -> None:
        if False not in shell.first_frame:
            name = type(shell).__name__
            raise ValueError(f"{name} needs an image with each prompt: use a text-to-video backbone")

    def probe(self, backbone: Backbone, folder: Path, done: Set[str] = frozenset()) -> Iterator[Row]:
        """A row for every scene and kind: the share of its pairs that are ranked wrongly. A scene's rows share its true
        clips, so they are one cluster."""
        residuals = Residuals(backbone, LEVELS, self.batch_size)
        kept = _Kept(folder / "losses.jsonl", [self.recorded, asdict(self.model_video), backbone.fingerprint])
        for group in self.groups():
            losses = kept.find(group.key)
            errors: dict[tuple[str, str], str] = {}
            if losses is None:
                losses, errors = self._ask(residuals, group)
                if not errors:
                    kept.add(group.key, losses)
            yield from self._rows(group, losses, errors)

    def groups(self) -> Iterator[Group]:
        """All scenes, in a fixed order; clips are simulated or read when they are asked for."""
        return self._published() if self.settings.folder else self._simulated()

    def _simulated(self) -> Iterator[Group]:
        video = self.model_video
        small = smallest(video)
        for scene, quota in share_pairs(self.settings.pairs).items():
            found, wanted = 0, max(quota.values(), default=0)
            for block in itertools.count():
                if found == wanted:
                    break
                attributes = self._block(scene, block, None, small).attributes
                prompts = {index: _held_out_prompt(scene, shown) for index, shown in enumerate(attributes)}
                prompts = {index: prompt for index, prompt in prompts.items() if prompt}
                frames = cache(lambda kind, scene=scene, block=block: self._block(scene, block, kind, video).frames)
                for index, prompt in list(prompts.items())[: wanted - found]:
                    clips = {
                        (kind or VALID, ""): lambda kind=kind, index=index, frames=frames: frames(kind)[index]
                        for kind in (None, *(kind for kind, pairs in quota.items() if pairs > found))
                    }
                    yield Group(f"{scene}-{block:04d}-{index}", "", prompt, clips)
                    found += 1

    def _block(self, scene: str, block: int, kind: str | None, video: VideoConfig) -> Clips:
        """BLOCK clips, the same scenes with every kind."""
        generator = torch.Generator().manual_seed(seed_of("likephys", scene, SEED, block))
        return simulate(scene, BLOCK, generator, **asdict(video), violation=kind, severity=self.settings.severity)

    def _published(self) -> Iterator[Group]:
        root = self._root()
        if root is None:
            raise ValueError(f"likephys: {self.requirements()[0].where} lacks clips: {self.requirements()[0].remedy}")
        video = replace(self.model_video, num_frames=NUM_FRAMES)
        for scenario, (place, prompt) in SCENARIOS.items():
            for scene in sorted(path for path in (root / place).glob("*") if path.is_dir()):
                clips = {}
                for path in sorted(scene.glob("*.mp4")):
                    kind = path.stem.rpartition("_")[0]
                    if kind not in LEFT_OUT.get(scenario, ()):
                        clips[kind, path.name] = lambda path=path: read_evenly(path, video)
                yield Group(f"{scenario}-{scene.name}", scenario, prompt, clips)

    def _root(self) -> Path | None:
        """The folder of the published clips, where all scenarios are there."""
        if not self.settings.folder:
            return None
        root = Path(self.settings.folder).expanduser()
        whole = all(any((root / place).glob("*/valid_*.mp4")) for place, _ in SCENARIOS.values())
        return root if whole else None

    def _ask(
        self, residuals: Residuals, group: Group
    ) -> tuple[dict[tuple[str, str], float], dict[tuple[str, str], str]]:
        """The loss of every clip of the group; of a clip that cannot be read the reason."""
        backbone, latents, errors = residuals.backbone, {}, {}
        for name, frames in group.clips.items():
            try:
                latents[name] = backbone.encode_video(from_pixels(frames())[None]).cpu()
            except ClipError as error:
                errors[name] = str(error)
        if not latents:
            return {}, errors
        told, stacked = backbone.condition([group.prompt]), torch.cat(list(latents.values()))
        decode, fps = backbone.decode_latents, self.model_video.fps
        candidates = Candidates(group.key, group.prompt, stacked, told, decode, fps)
        return dict(zip(latents, losses_of(residuals, candidates).tolist(), strict=True)), errors

    def _rows(
        self, group: Group, losses: Mapping[tuple[str, str], float], errors: Mapping[tuple[str, str], str]
    ) -> Iterator[Row]:
        for kind in dict.fromkeys(kind for kind, _ in group.clips if kind != VALID):
            key = f"{group.key}-{kind}".lower().replace("_", "-")
            concerned = [name for name in group.clips if name[0] in (VALID, kind)]
            error = next((errors[name] for name in concerned if name in errors), "")
            if not error and not any(which == VALID for which, _ in concerned):
                error = f"{group.key} holds no valid_*.mp4: download the dataset again"
            if error:
                yield Row(key, SEED, error=error, cluster=group.key)
                continue
            true, violated = ([losses[name] for name in concerned if name[0] == which] for which in (VALID, kind))
            share = preference_error(true, violated)
            margin = float(np.mean(violated) / np.mean(true) - 1)
            values = {"error": share, "margin": margin, group.figure or kind: share}
            yield Row(key, SEED, values, cluster=group.key)


def share_pairs(pairs: int) -> dict[str, dict[str, int]]:
    """By scene and kind: `pairs` of each kind, shared evenly by the scenes that know it, the first ones one more."""
    shares: dict[str, dict[str, int]] = {scene: {} for scene in SCENES}
    for kind in VIOLATIONS:
        knowing = [scene for scene in SCENES if kind in SCENES[scene].violations]
        for place, scene in enumerate(knowing):
            shares[scene][kind] = pairs // len(knowing) + (place < pairs % len(knowing))
    return shares


def _held_out_prompt(scene: str, attributes: dict[str, str]) -> str:
    """The first paraphrase that no training set holds; empty: there is none."""
    paraphrases = (write_prompt(scene, attributes, number) for number in range(len(TEMPLATES[scene])))
    return next((prompt for prompt in paraphrases if is_held_out(prompt)), "")


def losses_of(residuals: Residuals, candidates: Candidates) -> Tensor:
    """(N,) float64: mean squared error of the predicted noise over levels, draws, and what is generated of the clip.

    With x_t = (1 - t) x + t noise a velocity v predicts the noise x_t + (1 - t) v, which is off by 1 - t times what
    the velocity is off by.
    """
    maps = residuals.maps(candidates).double()  # (N, levels, draws, F, H, W), of the velocity
    held = candidates.conditioning.held_frames(maps.shape[3])
    errors = maps[:, :, :, held:].mean(dim=(2, 3, 4, 5))  # (N, levels)
    return (errors * (1 - torch.tensor(residuals.times, dtype=torch.float64)).square()).mean(dim=1)


def preference_error(true: list[float], violated: list[float]) -> float:
    """Share of all pairs in which the violated clip's loss is lower; equal losses count half.

    By hand: true 2 and 4, violated 1 and 4: 2 > 1, 2 < 4, 4 > 1, 4 = 4, so (1 + 0 + 1 + 0.5) / 4 = 0.625.
    """
    difference = np.subtract.outer(np.asarray(true, np.float64), np.asarray(violated, np.float64))
    return float((np.sign(difference) + 1).mean() / 2)


def read_evenly(path: Path, video: VideoConfig) -> Tensor:
    """`num_frames` frames picked evenly from first to last, stretched to the size: (T, H, W, 3) uint8.

    A short clip repeats frames. ClipError, a ValueError, where it cannot be decoded.
    """
    try:
        with av.open(str(path), options={"protocol_whitelist": "file"}) as container:
            frames = [
                frame.to_image().resize((video.width, video.height), Image.Resampling.BICUBIC)
                for frame in container.decode(video=0)
            ]
    except (av.error.FFmpegError, OSError, IndexError) as error:
        raise ClipError(path, "unreadable", f"no video file, or damaged ({error}); download it again") from error
    if not frames:
        raise ClipError(path, "unreadable", "it holds no frame; download it again")
    chosen = np.round(np.linspace(0, len(frames) - 1, video.num_frames)).astype(int)
    return torch.from_numpy(np.stack([np.asarray(frames[number]) for number in chosen]))


class _Kept:
    """Losses of finished scenes on disk, a line each, of one model under one set of settings."""

    def __init__(self, path: Path, settings: list):
        self._path = path
        self._digest = digest(settings)
        self._losses: dict[str, dict[tuple[str, str], float]] = {}
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        for line in lines:
            try:
                record = json.loads(line)
                if record["digest"] == self._digest:
                    self._losses[record["group"]] = {(kind, name): loss for kind, name, loss in record["losses"]}
            except (ValueError, KeyError, TypeError):  # a line that a kill cut short
                continue
        self._confirmed = False

    def find(self, group: str) -> dict[tuple[str, str], float] | None:
        """None for a scene that has to be asked: a new one, and the first of all."""
        return self._losses.get(group) if self._confirmed else None

    def add(self, group: str, losses: dict[tuple[str, str], float]) -> None:
        if not self._confirmed and self._losses.get(group) != losses:
            self._losses = {}  # another model's
        self._confirmed = True
        self._losses[group] = losses
        write_text(self._path, "".join(map(self._line, self._losses)))

    def _line(self, group: str) -> str:
        losses = [[*name, loss] for name, loss in self._losses[group].items()]
        return json.dumps({"group": group, "digest": self._digest, "losses": losses}, ensure_ascii=False) + "\n"
