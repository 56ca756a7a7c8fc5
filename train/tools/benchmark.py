"""Measured speed and memory of one preference step, beside what it could be at best and what plain code makes of it.

    python -m train.tools.benchmark recipe=wan14b                                 # random weights, one GPU
    python -m train.tools.benchmark recipe=wan1_3b benchmark.parts=[ceilings,ours,copy]
    accelerate launch --config_file launch/zero3.yaml --num_processes 4 train/tools/benchmark.py recipe=wan14b \\
        benchmark.parts=[ours,zero3]

In one run, on one device: its ceilings (a matrix product and attention at the model's own shapes), the step as
diffusers and peft give it (`plain`), `train.gdpo.step` (`ours`), the same keeping only each block's input
(`low_memory`), with 8-bit products (`float8`) and with the exact eq. 6 over four losers (`groupwise`), and full
fine-tuning against a copied reference, which is what the LoRA switch replaces (`copy`); `ours` with the physics terms
on stored targets (`physics`), and in a step in which the self-score regulariser is due (`self_score`; `amortised` is
over `self_score.every` steps). Launched on several GPUs every rank measures on its own GPU at the same time as the
others, and the first rank's figures are kept; `zero3` is `ours` with the frozen network sharded over them, a group on
each. What follows `ours` has its ratio to it in the same run. The arithmetic limit is counted, without recomputation,
at the ceilings' rates:

    pair = 2 reference forwards + 2 policy forwards + 2 backwards,  forward = W / matrix + A / attention,  backward =
    W / matrix + 2.5 A / backward

The ceilings are measured twice: in a burst of a few products, as a cool chip runs them, and `sustained` over seconds,
at which the chip's power limit lowers its clock; the limit is counted at either.

Results go to `<output>/benchmark.json`, with each step's device time by kind (`time`; a collective's includes waiting
for the other ranks), and as bars to `.png`. Seconds are medians over `benchmark.repeats` steps after a first one,
optimizer included.
"""

import gc
import json
import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedType
from peft import LoraConfig as PeftLoraConfig
from torch import Tensor, nn
from torch._dynamo.utils import counters

import recipes
from losses.flow_matching import flow_error, interpolate
from losses.preference import pairwise_bound
from train import entry, gdpo
from train.backbones import load_backbone
from train.backbones.attention_kernels import kernels_on
from train.backbones.base import Backbone
from train.loop import Policy, build_heads, prepare_network
from train.lora_switch import LoraSwitch
from train.optimizer import build_optimizer
from train.parallel import average_, build_accelerator, partition, release
from train.physics import target_tensors
from train.self_score import draws
from train.teachers.points import pack, query_grid
from train.teachers.weights import first_line
from train.tools.breakdown import draw_chart, where_time_goes
from train.tracking import peak_memory_gib, transformer_flops

PARTS = ("ceilings", "plain", "ours", "low_memory", "float8", "groupwise", "copy", "physics", "self_score", "zero3")
KINDS = ("", "_sustained")  # of ceilings


@dataclass
class BenchmarkConfig:
    parts: list[str] = field(default_factory=lambda: ["ceilings", "plain", "ours", "groupwise"])  # of PARTS
    repeats: int = 3  # timed steps, after one that compiles and allocates
    losers: int = 4  # of `groupwise`
    breakdown: bool = True  # one more step each, for the time by kind of kernel
    relation_grid: list[int] = field(default_factory=lambda: [32, 16, 16])  # of `physics`: V-JEPA 2 ViT-L's tokens
    relation_width: int = 1024  # and their width; 512 of them, the most that a group has


@dataclass
class Config(gdpo.Config):
    benchmark: BenchmarkConfig = field(default_factory=BenchmarkConfig)


class CopiedReference:
    """Full fine-tuning against a frozen copy: what stands in a LoRA switch's place without it. Same interface for
    `gdpo.step`."""

    def __init__(self, backbone: Backbone, copy: nn.Module):
        self.backbone, self.copy = backbone, copy
        backbone.transformer.requires_grad_(True)

    def parameters(self) -> list[nn.Parameter]:
        return list(self.backbone.transformer.parameters())

    @contextmanager
    def frozen_reference(self):
        experts, name = self.backbone.experts, self.backbone.expert
        policy, experts[name] = experts[name], self.copy
        try:
            with torch.no_grad():
                yield
        finally:
            experts[name] = policy

    def share_graph(self) -> None:
        """Nothing to share: the two networks are two."""

    def sharing(self, passes: int) -> AbstractContextManager[None]:
        return nullcontext()

    @staticmethod
    def checkpoint(function: Callable, *args):
        return torch.utils.checkpoint.checkpoint(function, *args, use_reentrant=False)


def measure_ceilings(config: Config, backbone: Backbone) -> dict[str, float]:
    """TFLOP/s of a matrix product and of attention, forward and backward, at the recipe's shapes; the best attention
    kernel counts."""
    network, video = backbone.architecture["transformer"], config.video
    tokens = backbone.num_tokens(video.height, video.width, video.num_frames)
    heads, size = network["num_attention_heads"], network["attention_head_dim"]
    width, ffn = heads * size, network["ffn_dim"]
    generator = torch.Generator(backbone.device).manual_seed(0)
    dtype = next(backbone.blocks[0].ffn.parameters()).dtype

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, device=backbone.device, dtype=dtype, generator=generator)

    left, right = random(tokens, width), random(width, ffn)
    warmup = 50 if backbone.device.type == "cuda" else 2  # the first to run here finds an idle chip's clock
    burst = seconds(lambda: left @ right, backbone.device, 10, warmup=warmup)
    rates = {"matrix": 2 * tokens * width * ffn / burst / 1e12}
    rates["matrix_sustained"] = 2 * tokens * width * ffn / sustained(lambda: left @ right, backbone.device) / 1e12
    query, key, value, grad = (random(1, tokens, heads, size).transpose(1, 2) for _ in range(4))
    flops = 4 * tokens**2 * width
    kernels = kernels_on(backbone.device)
    for name, kernel in list(kernels.items()):
        forward = partial(kernel.forward, query, key, value)
        try:
            backward = partial(kernel.backward, grad, query, key, value, *forward())
            rates[f"attention_{name}"] = flops / seconds(forward, backbone.device, 5) / 1e12
            rates[f"attention_{name}_backward"] = 2.5 * flops / seconds(backward, backbone.device, 5) / 1e12
            rates[f"attention_{name}_sustained"] = flops / sustained(forward, backbone.device) / 1e12
            rates[f"attention_{name}_backward_sustained"] = 2.5 * flops / sustained(backward, backbone.device) / 1e12
        except Exception as error:  # as in `attention_seconds`: whatever another package's compiler raises
            print(f"attention kernel {name} does not run here: {first_line(error)}")
            del kernels[name]
    for kind in ("", "_backward", "_sustained", "_backward_sustained"):
        rates[f"attention{kind}"] = max(rates[f"attention_{name}{kind}"] for name in kernels)
    return rates


def limit(config: Config, backbone: Backbone, rates: dict[str, float], *, clips: int, kind: str = "") -> float:
    """Seconds of a step over `clips` clips at the measured rates (`kind`: "" or "_sustained"), nothing recomputed,
    nothing but matrix products and attention."""
    network, video = backbone.architecture["transformer"], config.video
    width = network["num_attention_heads"] * network["attention_head_dim"]
    tokens = backbone.num_tokens(video.height, video.width, video.num_frames)
    matrix, attention = transformer_flops(
        tokens, config.backbone.text_length, width, network["ffn_dim"], network["num_layers"]
    )
    forward = matrix / rates[f"matrix{kind}"] + attention / rates[f"attention{kind}"]
    backward = matrix / rates[f"matrix{kind}"] + 2.5 * attention / rates[f"attention_backward{kind}"]
    return clips * (2 * forward + backward) / 1e12


def random_batch(config: Config, backbone: Backbone, losers: int) -> dict[str, Tensor]:
    """One group of random latents in the shapes that `gdpo.prepare` gives, on the device; with the recipe's terms."""
    video, device = config.video, backbone.device
    shape = backbone.latent_shape(video.height, video.width, video.num_frames)
    generator = torch.Generator().manual_seed(config.seed)
    clips = torch.randn(1, 1 + losers, *shape, generator=generator).to(device, torch.bfloat16)
    text = torch.randn(
        1, config.backbone.text_length, backbone.architecture["transformer"]["text_dim"], generator=generator
    )
    batch = {
        "winner": clips[:, 0],
        "losers": clips[:, 1:],
        "text": text.to(device, torch.bfloat16),
        "t": torch.full((1,), 0.6, device=device),
        "noise": torch.randn(1, 1, *shape, generator=generator).to(device).expand(1, 1 + losers, *shape),
        "semantic": torch.full((1, losers), 0.5, device=device),
        "physical": torch.full((1, losers), 0.5, device=device),
        "group_size": torch.full((1,), float(losers), device=device),
    }
    if config.backbone.family == "wan22_i2v":
        batch["condition"] = torch.randn(1, *shape, generator=generator).to(device, torch.bfloat16)
    terms = target_tensors(config.physics, random_targets(config, generator), shape[1])
    terms |= draws(config.self_score, position=0, batch_size=1, shape=shape, generator=generator)
    return batch | {name: tensor[None].to(device) for name, tensor in terms.items()}


def random_targets(config: Config, generator: torch.Generator) -> dict[str, Tensor]:
    """A clip's physics targets, all that it may have: points on straight random paths, every relation token."""
    points, frames = config.physics.targets.grid**2, config.video.num_frames
    time = torch.linspace(0, 1, frames)[:, None, None]
    start, goal = query_grid(config.physics.targets.grid), torch.rand(points, 2, generator=generator)
    places = config.benchmark.relation_grid[0] * config.benchmark.relation_grid[1] * config.benchmark.relation_grid[2]
    count = min(config.physics.targets.max_tokens, places)
    return {
        "tracks": pack((1 - time) * start + time * goal),
        "visible": torch.ones(frames, points, dtype=torch.bool),
        "keep": torch.ones(points, dtype=torch.bool),
        "relation_tokens": torch.randn(count, config.benchmark.relation_width, generator=generator).bfloat16(),
        "relation_indices": torch.randperm(places, generator=generator)[:count].int(),
        "relation_grid": torch.tensor(config.benchmark.relation_grid, dtype=torch.int32),
    }


def time_step(run: Callable[[], Any], config: Config, device: torch.device) -> dict[str, Any]:
    """First-step seconds, median seconds of the next ones, their peak memory and graphs that only they compiled, and
    the time by kind of one more step."""
    first = seconds(run, device, 1, warmup=0)
    graphs = counters["stats"]["unique_graphs"]
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    measured = {
        "seconds": seconds(run, device, config.benchmark.repeats, warmup=0),
        "first_seconds": first,
        "memory_gib": peak_memory_gib(device),
        "compiled_later": counters["stats"]["unique_graphs"] - graphs,
    }
    return measured | ({"time": where_time_goes(run, device)} if config.benchmark.breakdown else {})


def ours(
    config: Config,
    backbone: Backbone,
    *,
    losers: int = 1,
    loss: str = "bound",
    physics: bool = False,
    self_score: bool = False,
    ranks: Accelerator | None = None,
) -> dict[str, float]:
    """`gdpo.step`, optimizer included; with the terms that are asked for and no others, whatever the recipe's. `ranks`:
    those to shard the frozen network over."""
    weight = 1.0 if physics else 0.0
    config = replace(
        config,
        objective=replace(config.objective, loss=loss),
        physics=replace(config.physics, w_pix=weight, w_sem=weight),
        self_score=replace(config.self_score, weight=1.0 if self_score else 0.0),
    )
    switch = LoraSwitch(backbone.transformer, config.lora, seed=config.seed)
    policy = Policy(backbone, switch, build_heads(config, backbone))
    engine = None if ranks is None else partition(ranks, backbone.transformer)
    prepare_network(backbone.transformer, switch, config.train, gradients=1 + losers)
    measured = _preference_step(config, policy, losers, engine)
    return measured if ranks is None else measured | {"ranks": ranks.num_processes}


def against_ours(config: Config, part: str, results: dict[str, Any]) -> dict[str, float]:
    """What a part costs beside `ours`, if that came before: ratio of seconds, GiB more, and for the regulariser the
    ratio over all steps."""
    if "ours" not in results or part == "ours":
        return {}
    measured, plain = results[part], results["ours"]
    ratio = measured["seconds"] / plain["seconds"]
    compared = {"ratio": ratio, "more_gib": measured["memory_gib"] - plain["memory_gib"]}
    return compared | ({"amortised": 1 + (ratio - 1) / config.self_score.every} if part == "self_score" else {})


def copied(config: Config, backbone: Backbone) -> dict[str, float]:
    """Full fine-tuning with a copied reference: the same step and losses, without terms."""
    config = replace(config, physics=replace(config.physics, w_pix=0.0, w_sem=0.0))
    config = replace(config, self_score=replace(config.self_score, weight=0.0))
    reference = load_backbone(config.backbone, backbone.device, parts=("expert",)).transformer
    switch = CopiedReference(backbone, reference)
    for network in (reference, backbone.transformer):
        prepare_network(network, switch, config.train)
    return _preference_step(config, Policy(backbone, switch), 1)


def _preference_step(config: Config, policy: Policy, losers: int, engine: nn.Module | None = None) -> dict[str, float]:
    batch, heads = random_batch(config, policy.backbone, losers), policy.head_parameters()
    optimizer = build_optimizer(config.optim, policy.switch.parameters(), heads=heads, head_lr=config.physics.head_lr)
    gaps = []

    def run() -> None:
        gradients, metrics = gdpo.step(config, policy, batch)
        if engine is not None:
            release(engine)
            average_(gradients)
        gaps.append(abs(metrics["policy_winner"] - metrics["reference_winner"]).item())
        for weight, gradient in zip(policy.parameters(), gradients, strict=True):
            weight.grad = gradient
        nn.utils.clip_grad_norm_(policy.switch.parameters(), config.optim.max_grad_norm)
        nn.utils.clip_grad_norm_(heads, config.optim.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        assert torch.isfinite(metrics["loss"]).item()

    measured = time_step(run, config, policy.backbone.device)
    # Before the first update policy and reference are equal, so the gap should be 0.
    return measured | {"untrained_gap": gaps[0]}


def plain(config: Config, backbone: Backbone) -> dict[str, float]:
    """What diffusers and peft give without this project: add_adapter, gradient checkpointing, winner and loser as one
    batch."""
    network = backbone.transformer
    network.reset_attention_backend()
    targets = "|".join(target.replace(".", r"\.") for target in config.lora.targets)
    network.add_adapter(
        PeftLoraConfig(
            r=config.lora.rank,
            lora_alpha=config.lora.alpha,
            target_modules=rf".*\.({targets})",
            init_lora_weights="gaussian",
        )
    )
    weights = [parameter for name, parameter in network.named_parameters() if "lora_" in name]
    for weight in weights:
        weight.data = weight.data.float()
    network.train()
    network.enable_gradient_checkpointing()
    batch = random_batch(config, backbone, 1)  # of which the terms are not read
    clips = torch.cat([batch["winner"].unsqueeze(1), batch["losers"]], dim=1)[0]  # (2,C,F,H,W)
    noise, t, text = batch["noise"][0], batch["t"].expand(2), batch["text"].expand(2, -1, -1)
    noisy = interpolate(clips, noise, t).to(torch.bfloat16)
    optimizer = torch.optim.AdamW(weights, lr=config.optim.lr)

    def errors() -> Tensor:
        with torch.autocast(backbone.device.type, torch.bfloat16):
            velocity = network(noisy, 1000 * t, text, return_dict=False)[0]
        return flow_error(velocity, clips, noise)  # (2,)

    def run() -> None:
        with torch.no_grad():
            network.disable_adapters()
            reference = errors()
            network.enable_adapters()
        policy = errors()
        loss = pairwise_bound(
            policy[:1],
            reference[:1],
            policy[1:],
            reference[1:],
            alpha=0.75,
            gamma=2.66,
            beta=config.objective.beta,
            group_size=1,
        )
        loss.mean().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return time_step(run, config, backbone.device)


def seconds(run: Callable[[], Any], device: torch.device, repeats: int, *, warmup: int = 2) -> float:
    """Median wall seconds of `run`, the device's work included."""
    times = []
    for index in range(warmup + repeats):
        _synchronize(device)
        start = time.perf_counter()
        run()
        _synchronize(device)
        if index >= warmup:
            times.append(time.perf_counter() - start)
    return statistics.median(times)


def sustained(run: Callable[[], Any], device: torch.device, *, span: float = 1.5) -> float:
    """Mean wall seconds of `run` in the second half of `span` seconds (on a CPU of two runs) without a pause."""
    repeats = max(2, round(span / seconds(run, device, 1, warmup=0))) if device.type == "cuda" else 2
    for index in range(repeats):
        if index == repeats // 2:
            _synchronize(device)
            start = time.perf_counter()
        run()
    _synchronize(device)
    return (time.perf_counter() - start) / (repeats - repeats // 2)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    config = recipes.load(Config, argv)
    unknown = set(config.benchmark.parts) - set(PARTS)
    if unknown:
        raise ValueError(f"benchmark.parts: unknown {', '.join(sorted(unknown))}; known: {', '.join(PARTS)}")
    config.backbone.random_weights = True  # speed and memory do not depend on what the weights are
    accelerator = build_accelerator()
    if "zero3" in config.benchmark.parts and accelerator.distributed_type != DistributedType.DEEPSPEED:
        raise ValueError(
            "benchmark.parts: zero3 shards over the ranks of a DeepSpeed launch: accelerate launch --config_file"
            " launch/zero3.yaml --num_processes N train/tools/benchmark.py ..."
        )
    device = accelerator.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    video = config.video
    results: dict[str, Any] = {
        "device": name,
        "torch": torch.__version__,
        "architecture": config.backbone.architecture,
        "video": [video.height, video.width, video.num_frames],
    }
    accelerator.print(
        f"{config.backbone.family} {config.backbone.architecture},"
        f" {video.height}x{video.width}x{video.num_frames}, on {accelerator.num_processes} x {name}"
    )
    measures = {
        "plain": plain,
        "ours": ours,
        "low_memory": lambda c, b: ours(replace(c, train=replace(c.train, memory_budget_gib=1e-3)), b),
        "float8": lambda c, b: ours(replace(c, train=replace(c.train, float8=True)), b),
        "groupwise": lambda c, b: ours(c, b, losers=c.benchmark.losers, loss="plackett_luce"),
        "copy": copied,
        "physics": lambda c, b: ours(c, b, physics=True),
        "self_score": lambda c, b: ours(c, b, self_score=True),
        "zero3": lambda c, b: ours(c, b, ranks=accelerator),
    }
    path = Path(config.output) / "benchmark.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    for part in config.benchmark.parts:
        backbone = load_backbone(config.backbone, device, parts=("expert",))
        if part == "ceilings":
            rates = measure_ceilings(config, backbone)
            both = {f"pair_limit{kind}_seconds": limit(config, backbone, rates, clips=2, kind=kind) for kind in KINDS}
            results[part] = rates | both
        else:
            results[part] = measures[part](config, backbone)
            if "ceilings" in results and part != "self_score":  # of which the judge's passes are not counted
                clips = 1 + config.benchmark.losers if part == "groupwise" else 2
                results[part]["limit_seconds"] = limit(config, backbone, results["ceilings"], clips=clips)
            results[part] |= against_ours(config, part, results)
        measured = results[part] | results[part].get("time", {})
        numbers = (f"{key} {value:.4g}" for key, value in measured.items() if isinstance(value, int | float))
        accelerator.print(part, "  ".join(numbers), flush=True)
        if accelerator.is_main_process:
            path.write_text(json.dumps(results, indent=1), encoding="utf-8")
        del backbone
        gc.collect()
        torch._dynamo.reset()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    if accelerator.is_main_process:
        draw_chart(results, path.with_suffix(".png"))
    accelerator.print(f"wrote {path} and {path.with_suffix('.png').name}")
    return results


if __name__ == "__main__":
    entry.run(main)
