"""Measured speed and memory of one preference step, beside what it could be at best and what plain code makes of it.

    python -m train.tools.benchmark recipe=wan14b                                 # random weights, one GPU
    python -m train.tools.benchmark recipe=wan1_3b benchmark.parts=[ceilings,ours,copy]
    accelerate launch --config_file launch/zero3.yaml --num_processes 4 train/tools/benchmark.py recipe=wan14b \\
        benchmark.parts=[ours,zero3]

In one run, on one device: its ceilings (a matrix product and attention at the model's own shapes), the step as
diffusers and peft give it (`plain`), `train.gdpo.step` (`ours`), the same keeping only each block's input
(`low_memory`), with the frozen network in host memory and no more on the device than `train.memory_budget_gib`
(`streamed`), with the reference's errors known (`cached`, as train.reference_cache does), with 8-bit products
(`float8`) and with the exact eq. 6 over four losers (`groupwise`), and full fine-tuning against a copied reference,
which is what the LoRA switch replaces (`copy`); `ours` with the physics terms on stored targets (`physics`), and in a
step in which the self-score regulariser is due (`self_score`; `amortised` is over `self_score.every` steps). Launched
on several GPUs every rank measures on its own GPU at the same time as the others, and the first rank's figures are
kept; `zero3` is `ours` with the frozen network sharded over them, a group on each. What follows `ours` has its ratio to
it in the same run, `streamed` its ratio to `low_memory`. The arithmetic limit is counted, without recomputation, at the
ceilings' rates:

    pair = 2 reference forwards + 2 policy forwards + 2 backwards,  forward = W / matrix + A / attention,  backward =
    W / matrix + 2.5 A / backward

The ceilings are measured twice: in a burst of a few products, as a cool chip runs them, and `sustained` over seconds,
at which the chip's power limit lowers its clock; the limit is counted at either.

Clips that may begin with given frames have none, or, where that is more than 1, `backbone.prefix_frames` of them.

`fits` is the step that train.tools.what_fits plans, for each of its cards, with the recipe's self-score; a card that
runs out of memory is a row with the error. `fits` and `streamed` cap the allocator at budget and `train.plan.SLACK`.

`streamed` also says whether its gradients are, to the bit, those of the network that stays on the device
(`same_gradients`), in two steps that both keep only block inputs, on a GPU with PyTorch's flash attention, whose
backward pass can be made deterministic; `repeated_gradients` says so of that network and itself. `time.copies_hidden`
are the seconds of copies beside which the device computes, of `time.copies`.

Results go to `<output>/benchmark.json`, with each step's device time by kind (`time`; a collective's includes waiting
for the other ranks), as bars to `.png`, a second of `streamed` to `streamed_timeline.png`, and the rate of `ours` to
`rates.json`, for the bill (`train.cost`). Seconds are medians over `benchmark.repeats` steps after a first one,
optimizer included.
"""

import gc
import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

import recipes
from train import entry, gdpo
from train.backbones import find_architecture, load_backbone, text_tokens
from train.backbones.base import Backbone
from train.backbones.conditioning import CONDITION
from train.backbones.fused.prepare import prepare_network
from train.cost import operations, save_rates
from train.data import Sample
from train.files import write_text
from train.group_sample import MORE
from train.groups import Loser
from train.host_memory import GIB
from train.loop import set_gradients
from train.lora_switch import LoraSwitch
from train.optimizer import build_optimizer
from train.parallel import average_, build_accelerator, partition, release, sharding
from train.plan import CARDS, SLACK, card_arguments, dearest_blocks, on_card
from train.policy import Policy
from train.teachers.points import pack, query_grid
from train.terms.physics import build_heads
from train.tools.baselines import CopiedReference, limit, measure_ceilings, plain
from train.tools.breakdown import draw_chart, draw_timeline, time_step

PARTS = (
    "ceilings",
    "plain",
    "ours",
    "low_memory",
    "streamed",
    "fits",
    "float8",
    "groupwise",
    "copy",
    "cached",
    "physics",
    "self_score",
    "zero3",
)
OTHER_PASSES = ("self_score", "cached")  # than the limit counts
KINDS = ("", "_sustained")  # of ceilings
LOSERS = 4  # of `groupwise`
# What the recipe's step is measured with, by section, and what else some parts change.
NO_TERMS = {
    "objective": {"loss": "bound"},
    "physics": {"trajectory": 0.0, "relational": 0.0},
    "self_score": {"strength": 0.0},
    "train": {"reference_cache": ""},
}
CHANGES = {
    "plain": {"backbone": {"attention": "native"}},
    "low_memory": {"train": {"memory_budget_gib": 1e-3, "offload_gib": 0.0}},
    "streamed": {"backbone": {"stream": True}},
    "cached": {"train": {"reference_cache": "known"}},
    "float8": {"train": {"float8": True}},
    "groupwise": {"objective": {"loss": "plackett_luce"}},
    "physics": {"physics": {"trajectory": 1.0, "relational": 1.0}},
    "self_score": {"self_score": {"strength": 1.0}},
}
RELATION_GRID, RELATION_WIDTH = (32, 16, 16), 1024  # of `physics`: V-JEPA 2 ViT-L's tokens; a group has 512 of them


@dataclass
class BenchmarkConfig:
    parts: list[str] = field(default_factory=lambda: ["ceilings", "plain", "ours", "groupwise"])  # of PARTS
    repeats: int = 3  # timed steps, after one that compiles and allocates


@dataclass
class Config(gdpo.Config):
    benchmark: BenchmarkConfig = field(default_factory=BenchmarkConfig)


def random_batch(config: Config, backbone: Backbone, losers: int) -> dict[str, Tensor]:
    """A batch of one group of random latents, as training makes it, on the device; with the recipe's terms."""
    video = config.video
    shape = backbone.latent_shape(video.height, video.width, video.num_frames)
    generator = torch.Generator().manual_seed(config.seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).bfloat16()

    text, *more = backbone.text_shapes().items()
    given, frames = {}, config.backbone.prefix_frames
    if backbone.first_frame[0] or frames > 1:
        given = backbone.first_frame_shapes(backbone.architecture, shape, frames)
    group = SimpleNamespace(
        winner=random(*shape),
        losers=random(losers, *shape),
        losers_info=[Loser(seed, semantic=0.5, physical=0.5) for seed in range(losers)],
        text=random(*text[1]),
        condition=random(*given.pop(CONDITION)) if CONDITION in given else None,
        conditioning={name.removeprefix(MORE): random(*shape) for name, shape in (*more, *given.items())},
        extra=random_targets(config, generator),
    )
    tensors = gdpo.prepare(config, Sample(0, group, 0))
    return {name: tensor[None].to(backbone.device) for name, tensor in tensors.items()}


def random_targets(config: Config, generator: torch.Generator) -> dict[str, Tensor]:
    """A clip's physics targets, all that it may have: points on straight random paths, every relation token."""
    points, frames = config.targets.grid**2, config.video.num_frames
    time = torch.linspace(0, 1, frames)[:, None, None]
    start, goal = query_grid(config.targets.grid), torch.rand(points, 2, generator=generator)
    places = math.prod(RELATION_GRID)
    count = min(config.targets.max_tokens, places)
    return {
        "tracks": pack((1 - time) * start + time * goal),
        "visible": torch.ones(frames, points, dtype=torch.bool),
        "keep": torch.ones(points, dtype=torch.bool),
        "relation_tokens": torch.randn(count, RELATION_WIDTH, generator=generator).bfloat16(),
        "relation_indices": torch.randperm(places, generator=generator)[:count].int(),
        "relation_grid": torch.tensor(RELATION_GRID, dtype=torch.int32),
    }


def ours(
    config: Config, backbone: Backbone, *, losers: int = 1, ranks: Accelerator | None = None, where: bool = True
) -> dict[str, Any]:
    """`gdpo.step`, optimizer included. `ranks`: those to shard the frozen network over; `where`: of `time_step`."""
    switch = LoraSwitch(backbone.transformer, config.lora, seed=config.seed)
    policy = Policy(backbone, switch, build_heads(config, backbone))
    if config.train.reference_cache:
        policy.cache = SimpleNamespace(read=lambda _: torch.ones(1, 1 + losers, device=backbone.device))
    engine = None if ranks is None else partition(ranks, backbone.transformer, backbone.blocks)
    prepare_network(backbone.transformer, switch, config, gradients=1 + losers)
    measured = _preference_step(config, policy, losers, engine, where=where)
    return measured if ranks is None else measured | {"ranks": ranks.num_processes}


def against_ours(config: Config, part: str, results: dict[str, Any]) -> dict[str, float]:
    """What a part costs beside `ours`, and `streamed` beside `low_memory`, if that came before: ratio of seconds, GiB
    more, and for the regulariser the ratio over all steps."""
    other = "low_memory" if part == "streamed" else "ours"
    if other not in results or part == other or "seconds" not in results[part]:
        return {}
    measured, plain = results[part], results[other]
    ratio = measured["seconds"] / plain["seconds"]
    compared = {"ratio": ratio, "more_gib": measured["memory_gib"] - plain["memory_gib"]}
    return compared | ({"amortised": 1 + (ratio - 1) / config.self_score.every} if part == "self_score" else {})


def streamed(config: Config, accelerator: Accelerator) -> dict[str, Any]:
    """`ours` with blocks in host memory, `capped`; and how its gradients compare."""
    device = accelerator.device
    attention = "_native_flash" if device.type == "cuda" else config.backbone.attention
    least = replace(config, train=replace(config.train, memory_budget_gib=1e-3, offload_gib=0.0))
    with deterministic():
        whole, again, found = (
            first_gradients(
                replace(least, backbone=replace(config.backbone, stream=stream, attention=attention)), device
            )
            for stream in (False, False, True)
        )
    same = {"same_gradients": equal(found, whole), "repeated_gradients": equal(again, whole)}
    print("streamed", *(f"{key} {value}" for key, value in same.items()), flush=True)  # `capped` may run out of memory
    return capped(config, device) | same


def capped(config: Config, device: torch.device, *, where: bool = True) -> dict[str, Any]:
    """`ours` while the allocator gives no more than train.memory_budget_gib and SLACK."""
    cap, cuda = config.train.memory_budget_gib + SLACK, device.type == "cuda"
    if cuda:
        device = torch.device("cuda", torch.cuda.current_device())  # the allocator's cap asks for an index
        total = torch.cuda.mem_get_info(device)[1]
        torch.cuda.set_per_process_memory_fraction(min(1.0, cap * GIB / total), device)
    try:
        backbone = load_backbone(config.backbone, device, parts=("expert",), together=True)
        measured = ours(config, backbone, where=where) | {"cap_gib": cap}
        return measured | ({"reserved_gib": torch.cuda.max_memory_reserved(device) / GIB} if cuda else {})
    finally:
        if cuda:
            torch.cuda.set_per_process_memory_fraction(1.0, device)


def fits(config: Config, device: torch.device) -> dict[str, dict[str, Any]]:
    """By card in GB, what `capped` measures there; {} where no plan fits."""
    rows: dict[str, dict[str, Any]] = {}
    for size in CARDS:
        chosen = on_card(config, size)
        planned = {"planned_gib": dearest_blocks(chosen).peak / GIB, "arguments": card_arguments(chosen)}
        found = planned["planned_gib"] <= chosen.train.memory_budget_gib
        try:
            rows[str(size)] = capped(chosen, device, where=False) | planned if found else {}
        except (torch.OutOfMemoryError, ValueError) as error:  # the next card may fit
            rows[str(size)] = planned | {"error": entry.first_line(error)}
        words = [f"{key} {value:.4g}" for key, value in rows[str(size)].items() if isinstance(value, float)]
        words.append(rows[str(size)].get("error", "" if found else "does not fit"))
        print(f"{size:3} GB  {planned['arguments']}: {'  '.join(words)}", flush=True)
        clean(device)
    return rows


@contextmanager
def deterministic() -> Iterator[None]:
    """Inside, kernels add in one order; those that cannot raise. Flash attention's backward pass asks for no less."""
    settings = torch.utils.deterministic
    filling, settings.fill_uninitialized_memory = settings.fill_uninitialized_memory, False
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        settings.fill_uninitialized_memory = filling
        torch.use_deterministic_algorithms(False)


def first_gradients(config: Config, device: torch.device) -> list[Tensor]:
    """Of one step, on the CPU, by a policy that has moved away from its reference."""
    backbone = load_backbone(config.backbone, device, parts=("expert",), together=True)
    switch = LoraSwitch(backbone.transformer, config.lora, seed=config.seed)
    generator = torch.Generator().manual_seed(config.seed)
    with torch.no_grad():
        for weight in switch.parameters():
            weight.copy_(0.03 * torch.randn(weight.shape, generator=generator))
    prepare_network(backbone.transformer, switch, config)
    gradients, _ = gdpo.step(config, Policy(backbone, switch), random_batch(config, backbone, 1))
    found = [gradient.cpu() for gradient in gradients]
    del backbone, switch, gradients
    clean(device)
    return found


def equal(found: list[Tensor], others: list[Tensor]) -> bool:
    return all(torch.equal(one, other) for one, other in zip(found, others, strict=True))


def clean(device: torch.device) -> None:
    """Free what a part leaves, compiled graphs included."""
    gc.collect()
    torch._dynamo.reset()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def copied(config: Config, backbone: Backbone) -> dict[str, Any]:
    """Full fine-tuning with a copied reference: the same step and losses."""
    switch = CopiedReference(backbone.transformer)
    prepare_network(backbone.transformer, switch, config)
    return _preference_step(config, Policy(backbone, switch), 1)


def _preference_step(
    config: Config, policy: Policy, losers: int, engine: nn.Module | None = None, *, where: bool = True
) -> dict[str, Any]:
    batch, heads = random_batch(config, policy.backbone, losers), policy.head_parameters()
    optimizer = build_optimizer(config.optim, policy.switch.parameters(), heads=heads, head_lr=config.physics.head_lr)
    gaps = []

    def run() -> None:
        gradients, metrics = gdpo.step(config, policy, batch)
        release(engine)
        if engine is not None:
            average_(gradients)
        gaps.append(abs(metrics["policy_winner"] - metrics["reference_winner"]).item())
        set_gradients(config, policy, optimizer, gradients, 0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        assert torch.isfinite(metrics["loss"]).item()

    measured = time_step(run, policy.backbone.device, config.benchmark.repeats, where=where)
    # Before the first update policy and reference are equal, so the gap should be 0.
    return measured | {"untrained_gap": gaps[0]}


def main(argv: list[str] | None = None) -> dict[str, Any]:
    config = recipes.load(Config, argv)
    if unknown := set(config.benchmark.parts) - set(PARTS):
        raise ValueError(f"benchmark.parts: unknown {', '.join(sorted(unknown))}; known: {', '.join(PARTS)}")
    if "streamed" in config.benchmark.parts and config.train.memory_budget_gib <= 0:
        raise ValueError("benchmark.parts: streamed keeps to train.memory_budget_gib: give one, 21 for a 24 GB card")
    if "streamed" in config.benchmark.parts:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # of `deterministic`; read at the first product
    config.backbone.stream = False  # but in its own part
    config.backbone.random_weights = True  # speed and memory do not depend on what the weights are
    accelerator = build_accelerator()
    if "zero3" in config.benchmark.parts and sharding(accelerator) is None:
        raise ValueError(
            "benchmark.parts: zero3 shards over the ranks of a DeepSpeed launch: accelerate launch --config_file"
            " launch/zero3.yaml --num_processes N train/tools/benchmark.py ..."
        )
    device, video = accelerator.device, config.video
    results: dict[str, Any] = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        "torch": torch.__version__,
        "architecture": config.backbone.architecture,
        "video": [video.height, video.width, video.num_frames],
    }
    size, devices = "x".join(map(str, results["video"])), f"{accelerator.num_processes} x {results['device']}"
    accelerator.print(f"{config.backbone.family} {config.backbone.architecture}, {size}, on {devices}")
    path = Path(config.output) / "benchmark.json"
    for part in config.benchmark.parts:
        results[part] = measure(config, part, accelerator)
        if "ceilings" in results and part not in ("ceilings", *OTHER_PASSES):
            clips = 1 + LOSERS if part == "groupwise" else 2
            results[part]["limit_seconds"] = limit(config, results["ceilings"], clips=clips)
        results[part] |= against_ours(config, part, results)
        measured = results[part] | results[part].get("time", {})
        numbers = (f"{key} {value:.4g}" for key, value in measured.items() if isinstance(value, int | float))
        accelerator.print(part, "  ".join(numbers), flush=True)
        if part == "ours" and accelerator.is_main_process:
            forward, backward = operations(find_architecture(config.backbone), video, text_tokens(config.backbone))
            pair = 2 * (2 * forward + backward)
            save_rates(config.output, results["device"], {"training": pair / results[part]["seconds"]})
        if accelerator.is_main_process:
            write_text(path, json.dumps(results, indent=1))
        clean(device)
    if accelerator.is_main_process:
        draw_chart(results, path.with_suffix(".png"))
        if timeline := results.get("streamed", {}).get("timeline"):
            draw_timeline(timeline, path.with_name("streamed_timeline.png"))
    accelerator.print(f"wrote {path} and {path.with_suffix('.png').name}")
    return results


def changed(config: Config, part: str) -> Config:
    """The recipe of a part of `ours`."""
    for changes in (NO_TERMS, CHANGES.get(part, {})):
        sections = {name: replace(getattr(config, name), **values) for name, values in changes.items()}
        config = replace(config, **sections)
    return config


def measure(config: Config, part: str, accelerator: Accelerator) -> dict[str, Any]:
    """Figures of one of PARTS, from a network of its own."""
    terms, config = config.self_score, changed(config, part)
    if part == "streamed":
        return streamed(config, accelerator)
    if part == "fits":
        return fits(replace(config, self_score=terms), accelerator.device)
    ranks = accelerator if part == "zero3" else None
    backbone = load_backbone(config.backbone, accelerator.device, parts=("expert",), sharding=ranks and sharding(ranks))
    if part == "ceilings":
        rates = measure_ceilings(config, backbone)
        both = {f"pair_limit{kind}_seconds": limit(config, rates, clips=2, kind=kind) for kind in KINDS}
        return rates | both
    if part == "plain":
        return plain(config, backbone, random_batch(config, backbone, 1), config.benchmark.repeats)
    if part == "copy":
        return copied(config, backbone)
    return ours(config, backbone, losers=LOSERS if part == "groupwise" else 1, ranks=ranks)


if __name__ == "__main__":
    entry.run(main)
