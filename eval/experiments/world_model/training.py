"""Trains a world model: a small V-JEPA 2 (Assran et al., 2025) on simulated clips that obey physics.

    python -m eval.experiments.world_model.training --output runs/world_model --seed 0
    python -m eval.experiments.world_model.training --world robots --output runs/robots_world_model \
        --recordings runs/robots_base/demonstrations

--world (`SOURCES`): scenes of the sandbox, or the robots' demonstrations, which are read where --recordings has them,
by default <output>/demonstrations, and recorded there where it has not.

    loss = smooth_l1(p, norm(teacher(x))[hidden]) + PIXELS (|decode(p) - x[hidden]|^2 + |decode(norm(z)) - x[seen]|^2)
    z = encoder(x[seen]),  p = predictor(z, seen, hidden)

The encoder sees some tokens of a window, the predictor says what the teacher, a moving average of the encoder that sees
them all, finds at the hidden ones; norm is a layer norm without an affine part. Each step draws a window's length and
a mask: mostly the future, which is what `eval.search.world_model` asks at test time, else blocks in space and time.

Deviations from the paper: causal masks beside the blocks; one mask for all windows of a step; the average's momentum
rises; smooth L1; and the linear map `decode` to a token's pixels, thrown away afterwards, which is there to put what
moves into the features within minutes, since a still background fills most tokens.
Clips of the sandbox are mirrored and their colour channels permuted, under which that world is symmetric.

Writes <output>/config.json and model.safetensors (float16), which `VJEPA2Model.from_pretrained` loads, with the
teacher as the encoder, and training.json (settings and figures). A training that was stopped (SIGTERM) continues.
"""

import argparse
import copy
import json
import math
import os
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import VJEPA2Config, VJEPA2Model
from transformers.image_utils import IMAGENET_DEFAULT_MEAN as MEAN
from transformers.image_utils import IMAGENET_DEFAULT_STD as STD

from eval.experiments.world_model.sources import SOURCES, Kind, Source
from eval.robots.recordings import FOLDER
from eval.small_wan.training import GRADIENT_NORM, Checkpoint, Settings, command_line, seeded
from train import entry
from train.files import temporary

BLOCKS = 4
PIXELS = 1.0  # weight of the errors in normalised pixels
MOMENTUM = (0.99, 0.999)  # of the teacher, at the first and the last step
WARMUP = 200  # steps
CHECKPOINT = "training.safetensors"  # in the output folder

Inputs = tuple[Tensor, Tensor, Tensor]
Outputs = tuple[Tensor, Tensor, Tensor]


def train_world_model(
    settings: Settings, device: torch.device | str, source: Source, *, output: Path, recordings: Path
) -> tuple[VJEPA2Model, dict[str, float]] | None:
    """A model trained by `settings` in eval mode, its encoder the teacher, and the last figures printed; None where it
    was asked to stop before its last step. output: of its checkpoint, from which it continues.

    The same seed, steps and device give the same weights, up to the order in which a GPU adds.
    """
    device, started = torch.device(device), time.monotonic()
    pool = source.make_pool(settings.pool, settings.seed, device, recordings)
    print(f"{len(pool)} clips simulated or read in {time.monotonic() - started:.1f} s", flush=True)
    checkpoint = Checkpoint(output / CHECKPOINT, settings, clips=str(source.video))
    started = time.monotonic()
    trainer = Trainer(settings, device, source)
    choices, draws = random.Random(settings.seed), torch.Generator(device).manual_seed(settings.seed)

    def draw(kind: Kind) -> Inputs:
        return draw_step(pool, settings.batch, kind, choices, draws, source)

    steps = {kind: trainer.prepare(draw(kind)) for kind in source.kinds}
    print(f"prepared in {time.monotonic() - started:.1f} s", flush=True)
    figures: dict[str, float] = {}

    started, count = time.monotonic(), settings.steps
    first = checkpoint.load(trainer.networks, trainer.optimizer, draws, choices)
    for step in range(first, count):
        trainer.rate.fill_(settings.rate(step, warmup=WARMUP))
        trainer.forgetting.fill_(1 - (MOMENTUM[0] + (MOMENTUM[1] - MOMENTUM[0]) * step / count))
        kind = choices.choice(source.kinds)
        latent, pixel, target = steps[kind](draw(kind))
        if (step + 1) % 250 == 0 or step + 1 == count:
            # The features' spread over clips at the same token: 0 is a collapse, 1 the most.
            spread = target.std(dim=0).mean().item()
            figures = {"loss": latent.item(), "pixel_loss": pixel.item(), "feature_std": spread}
            shown = ", ".join(f"{name} {value:.4f}" for name, value in figures.items())
            settings.show(step, f" {kind}: {shown}", started, first=first)
        if checkpoint.due(step + 1, count):
            checkpoint.save(step + 1, trainer.networks, trainer.optimizer, draws, choices)
            if checkpoint.stopping:
                return None
    trainer.model.encoder.load_state_dict(trainer.teacher.state_dict())
    return trainer.model.eval().requires_grad_(False), figures


class Trainer:
    """Model, teacher and optimizer. On a GPU a step is captured as a graph for each kind, since launching its
    thousand small kernels takes several times longer than running them."""

    def __init__(self, settings: Settings, device: torch.device, source: Source):
        self.model = new_model(settings.seed, source).to(device).train()
        config = self.model.config
        self.teacher = copy.deepcopy(self.model.encoder).requires_grad_(False)
        self.decode = nn.Linear(config.hidden_size, 3 * config.tubelet_size * config.patch_size**2, device=device)
        nn.init.zeros_(self.decode.weight)
        nn.init.zeros_(self.decode.bias)
        self.on_gpu, self.memory = device.type == "cuda", None
        if self.on_gpu:  # layer by layer: they are all alike, so this takes seconds
            for layer in (*self.model.encoder.layer, *self.model.predictor.layer, *self.teacher.layer):
                layer.compile(dynamic=True)
        self.trained = [*self.model.parameters(), *self.decode.parameters()]
        self.networks = nn.ModuleDict({"model": self.model, "teacher": self.teacher, "decode": self.decode})
        self.rate = torch.zeros((), device=device)  # of learning
        self.forgetting = torch.zeros((), device=device)  # 1 - the teacher's momentum
        self.optimizer = torch.optim.AdamW(
            self.trained, lr=self.rate, betas=(0.9, 0.99), weight_decay=0.04, fused=True, capturable=self.on_gpu
        )

    def prepare(self, example: Inputs) -> Callable[[Inputs], Outputs]:
        """A function that does one step with inputs of the example's shapes. Its outputs hold until the next call."""
        if not self.on_gpu:
            return lambda inputs: self.step(*inputs)
        fixed = tuple(part.clone() for part in example)
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(3):  # at rate 0: compiles, and fills the optimizer's averages a little
                self.step(*fixed)
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.memory):
            outputs = self.step(*fixed)
        self.memory = graph.pool()

        def replay(inputs: Inputs) -> Outputs:
            for place, value in zip(fixed, inputs, strict=True):
                place.copy_(value)
            graph.replay()
            return outputs

        return replay

    def step(self, pixels: Tensor, seen: Tensor, hidden: Tensor) -> Outputs:
        """Update the weights by one batch: (latent loss (), pixel loss (), the teacher's normed tokens (B,N,D))."""
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast(pixels.device.type, torch.bfloat16, enabled=self.on_gpu):
            patches = patchify(pixels, self.model.config.tubelet_size, self.model.config.patch_size)
            with torch.no_grad():
                target = norm(encode(self.teacher, patches, torch.arange(patches.shape[1], device=pixels.device)))
            context = encode(self.model.encoder, patches[:, seen], seen)
            predicted = predict(self.model.predictor, context, seen, hidden)
            latent = F.smooth_l1_loss(predicted.float(), target[:, hidden])
            pixel = F.mse_loss(self.decode(predicted).float(), patches[:, hidden])
            pixel = pixel + F.mse_loss(self.decode(norm(context)).float(), patches[:, seen])
        (latent + PIXELS * pixel).backward()
        torch.nn.utils.clip_grad_norm_(self.trained, GRADIENT_NORM)
        self.optimizer.step()
        with torch.no_grad():
            for average, weight in zip(self.teacher.parameters(), self.model.encoder.parameters(), strict=True):
                average.lerp_(weight, self.forgetting)
        return latent.detach(), pixel.detach(), target


def new_model(seed: int, source: Source) -> VJEPA2Model:
    """An untrained model."""
    with seeded(seed):
        return VJEPA2Model(VJEPA2Config(**source.architecture))


def draw_step(
    pool: Tensor, count: int, kind: Kind, choices: random.Random, draws: torch.Generator, source: Source
) -> Inputs:
    """Normalised windows (count,L,3,H,W) of random clips, and the ids of the tokens seen (N,) and hidden (K,).

    All tensors are drawn on the pool's device: a copy would wait for the GPU.
    """
    length, context = kind
    start = choices.randrange(pool.shape[1] - length + 1)
    chosen = torch.randint(len(pool), (count,), generator=draws, device=pool.device)
    pixels = pool[chosen, start : start + length].permute(0, 1, 4, 2, 3)
    if source.symmetric:
        pixels = pixels[:, :, torch.randperm(3, generator=draws, device=pool.device)]
    pixels = pixels / 255
    if source.symmetric and choices.random() < 0.5:
        pixels = pixels.flip(4)
    for channel, (mean, std) in enumerate(zip(MEAN, STD, strict=True)):
        pixels[:, :, channel].sub_(mean).div_(std)
    tubelet = source.architecture["tubelet_size"]
    side = source.architecture["crop_size"] // source.architecture["patch_size"]
    grid = (length // tubelet, side, side)
    if context:
        tokens = torch.arange(math.prod(grid), device=pool.device)
        first = context // tubelet * side**2
        return pixels, tokens[:first], tokens[first:]
    mask = block_mask(grid, choices, pool.device).flatten()
    order = (mask + torch.rand(mask.shape, generator=draws, device=pool.device)).argsort()  # what is in no block first
    return pixels, order[: len(order) // 4], order[len(order) // 2 :]


def block_mask(grid: tuple[int, int, int], choices: random.Random, device: torch.device | str) -> Tensor:
    """(F,H,W) bool, true in the union of BLOCKS boxes: half the window or more long, 3/8 to 6/8 of it high and wide."""
    mask = torch.zeros(grid, dtype=torch.bool, device=device)
    shortest, longest = 3 * grid[1] // 8, 6 * grid[1] // 8
    for _ in range(BLOCKS):
        sizes = (choices.randint(-(-grid[0] // 2), grid[0]), *(choices.randint(shortest, longest) for _ in range(2)))
        first = [choices.randint(0, length - size) for length, size in zip(grid, sizes, strict=True)]
        mask[tuple(slice(start, start + size) for start, size in zip(first, sizes, strict=True))] = True
    return mask


def norm(tokens: Tensor) -> Tensor:
    """Layer norm without an affine part, in float32."""
    return F.layer_norm(tokens.float(), tokens.shape[-1:])


def patchify(pixels: Tensor, tubelet: int, patch: int) -> Tensor:
    """(B,T,3,H,W) -> (B,N,3 x tubelet x patch x patch), what the model's convolution multiplies with its weights."""
    boxes = pixels.unflatten(4, (-1, patch)).unflatten(3, (-1, patch)).unflatten(1, (-1, tubelet))
    return boxes.permute(0, 1, 4, 6, 3, 2, 5, 7).flatten(4).flatten(1, 3)  # (B,F,t,3,h,p,w,q) -> (B,F,h,w,3,t,p,q)


def encode(encoder: nn.Module, patches: Tensor, ids: Tensor) -> Tensor:
    """`encoder` on the tokens `ids` (N,) alone, whose patches (B,N,P) are given: (B,N,D).

    The model's own forward takes whole windows. The sums of the residual stream stay in float32.
    """
    embed = encoder.embeddings.patch_embeddings.proj
    hidden = F.linear(patches, embed.weight.flatten(1), embed.bias).float()
    for layer in encoder.layer:
        hidden = layer(hidden, ids[None])[0]
    return encoder.layernorm(hidden)


def predict(predictor: nn.Module, context: Tensor, seen: Tensor, hidden: Tensor) -> Tensor:
    """The tokens `hidden` (K,) from the context (B,N,D) at the tokens `seen` (N,): (B,K,D).

    Equals the predictor's own forward, which takes the tokens of the whole window and masks for each clip.
    """
    embeddings = predictor.embeddings
    query = embeddings.mask_tokens[1 % embeddings.num_mask_tokens]  # (1,1,D); its forward always takes this one
    tokens = torch.cat(
        [embeddings.predictor_embeddings(context).float(), query.expand(len(context), len(hidden), -1)], dim=1
    )
    positions = torch.cat([seen, hidden])[None]
    for layer in predictor.layer:
        tokens = layer(tokens, positions)[0]
    return predictor.proj(predictor.layernorm(tokens[:, len(seen) :]))


def write_world_model(
    output: Path, settings: Settings, device: torch.device | str, source: Source, recordings: Path
) -> dict[str, Any] | None:
    """Train and write the folder, the weights last; returns the figures, or None as `train_world_model`."""
    started = time.monotonic()
    trained = train_world_model(settings, device, source, output=output, recordings=recordings)
    if trained is None:
        return None
    model, figures = trained
    report = figures | {
        "seconds": time.monotonic() - started,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
    }
    training = {"settings": vars(settings), "device": torch.device(device).type, **report}
    aside = temporary(output / "world_model")
    model.half().save_pretrained(aside)
    (aside / "training.json").write_text(json.dumps(training, indent=2) + "\n", encoding="utf-8")
    for name in ("training.json", "config.json", "model.safetensors"):
        os.replace(aside / name, output / name)
    aside.rmdir()
    (output / CHECKPOINT).unlink(missing_ok=True)
    return report


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--world", choices=SOURCES, default="sandbox", help="of the clips; it says the other defaults")
    parser.add_argument("--recordings", type=Path, help=f"folder of recorded clips (default: <output>/{FOLDER})")
    given, _ = parser.parse_known_args(argv)
    source = SOURCES[given.world]
    output, settings, device = command_line(__doc__, "output", source.defaults, argv, parser)
    if settings.batch < 2:
        raise ValueError("--batch is 1: the features' spread over a step's clips is measured: use 2 or more")
    figures = write_world_model(output, settings, device, source, given.recordings or output / FOLDER)
    if figures is None:
        return
    print(
        f"{output}: {figures['parameters'] / 1e6:.2f}M parameters, latent loss {figures['loss']:.4f}, "
        f"pixel loss {figures['pixel_loss']:.4f}, std of features {figures['feature_std']:.2f}, "
        f"{figures['seconds']:.0f} s"
    )


if __name__ == "__main__":
    entry.run(main)
