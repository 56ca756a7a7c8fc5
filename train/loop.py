"""The loop that every trainer shares: load, attach, resume, then step, log, save.

    for each step:  gradients = mean over the step's groups, over all ranks, of `step(config, policy, batch)`
                    skip it if anything is not finite, else clip (adapters and heads apart), AdamW, log,
                    and now and then a checkpoint and clips

What a method adds is two functions: `prepare(sample) -> tensors` (run in the loader's workers, draws noise and time)
and `step(config, policy, batch) -> gradients, metrics`. Groups are read by their position in one global stream and
every draw is seeded by (seed, position), so a run is the same on any number of ranks, and resuming needs only the
number of samples seen.
"""

import math
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from train import checkpoint, compile_cache, export, parallel, resume
from train.backbones import load_backbone
from train.backbones.base import Backbone
from train.batches import Batches, Tensors, build_loader
from train.checkpoint import Trainable
from train.full_parameters import FullParameters
from train.fused import float8, memory
from train.fused.fused_block import fuse_blocks, unfit
from train.fused.offload import HostStore, affordable
from train.groups import GroupSet, Sample
from train.live_targets import LiveTargets
from train.lora_switch import LoraSwitch
from train.optimizer import build_optimizer, learning_rate
from train.policy import Policy
from train.terms.physics import PhysicsHeads, feature_block, lacks_targets
from train.tracking import Tracker, check_trackers, device_peak_tflops, peak_memory_gib, transformer_flops
from train.validation import Validation


@dataclass
class TrainConfig:
    groups: str = "${output}/groups"  # folder of preference groups with their index.json
    folder: str = "${output}/train"  # checkpoints, metrics, validation clips and the exported LoRA go here
    parameters: str = "lora"  # lora | full: all weights of the network, in float32
    pairs_per_pass: int = 1  # groups in one network pass, per GPU; 1 keeps one sample's activations at a time
    activation_checkpointing: bool = True  # keep only each block's input, recompute the rest in backward
    compile: bool = False  # torch.compile the transformer block, once for all layers
    # With compile and LoRA: the peak that a step may reach, GiB per GPU; what fits is kept instead of recomputed, each
    # block's input at least. 0: nine tenths of the GPU, on a CPU no limit; never more than 95 % of the GPU.
    memory_budget_gib: float = 0.0
    # With compile and LoRA on a GPU: host memory, page-locked, per GPU, for activations that go there and come back
    # while other blocks compute. Less is taken where less does, or where the host has less. 0: none.
    offload_gib: float = 0.0
    # With compile, LoRA and bfloat16: products with the frozen weights in 8 bits (train.fused.float8). Faster; the
    # adapters' gradients differ by about 5 %, the policy's distance to its reference by more.
    float8: bool = False
    num_workers: int = 2  # loader processes per GPU
    checkpoint_every: int = 200  # steps
    keep_checkpoints: int = 3  # newest checkpoints kept
    resume: bool = True  # continue from the newest checkpoint in `folder`; false: refuse a folder that has one
    max_nonfinite: int = 10  # steps in a row that may be skipped for a non-finite loss before the run stops
    trackers: list[str] = field(
        default_factory=list
    )  # accelerate trackers besides metrics.jsonl: tensorboard, wandb, trackio


Step = Callable[[Any, Policy, Tensors], tuple[list[Tensor], dict[str, Tensor]]]


def fit(
    config: Any,
    *,
    step: Step,
    prepare: Callable[[Any, Sample], Tensors],
    check_groups: Callable[[Any, GroupSet], None],
    shown: tuple[str, ...],
    keep_reference: bool = False,
) -> Path:
    """Train and return the exported LoRA file. `config` holds the sections backbone, video, lora, objective, physics,
    self_score, optim, sampler, validation and train; `check_groups` may refuse a group set; `shown` names the metrics
    of the progress bar; `keep_reference`: full fine-tuning needs the untrained weights.

    Raises ValueError for what a user can fix: groups of another backbone, a batch that does not divide over the
    ranks, a folder that another run holds, a checkpoint of another run, a full disk, a damaged group, a run whose
    losses stay non-finite.
    """
    trackers = [name for name in config.train.trackers if name]
    check_trackers(trackers)
    folder = Path(config.train.folder)
    accelerator = parallel.build_accelerator(log_with=trackers or None, project_dir=str(folder))
    device = accelerator.device
    accumulation = accumulation_steps(config, accelerator.num_processes)
    check_intervals(config)
    if config.ranks not in (0, accelerator.num_processes):
        raise ValueError(f"ranks={config.ranks} is for --dry-run: {accelerator.num_processes} processes were launched")
    sharding = parallel.sharding(accelerator)
    if sharding is not None and config.train.parameters == "full":
        raise ValueError(
            "train.parameters=full cannot train under ZeRO-3, which shards what is frozen: launch with launch/ddp.yaml"
        )
    with resume.claimed(folder, accelerator):
        newest = resume.newest(config, accelerator)

        live = None
        if lacks_targets(config.physics, config.train.groups):
            live = LiveTargets(config.physics, config.video, device, accelerator.print)
        validation = Validation(config, accelerator, folder / "validation")
        parts = ["transformer" if validation.enabled else "expert"]
        parts += ["vae"] if validation.enabled or live else []
        backbone = load_backbone(config.backbone, device, parts=parts, sharding=sharding)
        groups = open_groups(config, backbone)
        check_groups(config, groups)
        policy = Policy(
            backbone,
            attach_parameters(config, backbone.transformer, keep_reference=keep_reference),
            build_heads(config, backbone),
        )
        engines = [parallel.partition(accelerator, expert) for expert in backbone.experts.values()]
        whole = "sharded over the ranks" if engines[0] else "whole on every rank"
        accelerator.print(
            f"{accelerator.distributed_type.value}: {accelerator.num_processes} ranks, frozen network {whole}"
        )
        clips = config.objective.clips_per_group(groups.num_losers(0))
        gradients = gradient_sets(config, clips, accumulation)
        prepare_network(backbone.transformer, policy.switch, config.train, gradients=gradients)
        heads = policy.head_parameters()
        optimizer = build_optimizer(
            config.optim, policy.switch.parameters(), heads=heads, head_lr=config.physics.head_lr
        )

        checkpoints = resume.checkpoint_folder(config)
        metadata = checkpoint.weights_metadata(policy.switch, fingerprint=backbone.fingerprint, expert=backbone.expert)
        start, state = resume.restore(config, newest, policy, optimizer, groups, accelerator)

        rank, world = accelerator.process_index, accelerator.num_processes
        loader = build_loader(config, groups, prepare, start=state["samples_seen"], rank=rank, world=world)
        batches = Batches(loader, device, partial(live.complete, backbone=backbone) if live else None)
        tracker = Tracker(
            accelerator, folder, start=start, total=config.optim.steps, trackers=trackers, config=asdict(config)
        )
        pace = _Pace(config, backbone, clips, device)

        saved = start

        def save(step_number: int) -> None:  # on the main process alone
            nonlocal saved
            if accelerator.is_main_process and step_number > saved:
                keep = config.train.keep_checkpoints
                options = {
                    "switch": policy.switch,
                    "optimizer": optimizer,
                    "state": state,
                    "metadata": metadata,
                    "keep": keep,
                    "heads": policy.heads,
                }
                checkpoint.save(checkpoints, step_number, **options)
                saved = step_number

        completed = start
        stopping = _StopSignal(lambda: save(completed))
        if start == 0 or start >= config.optim.steps or validation.due(start):
            validation.catch_up(start, policy)
        bad_in_a_row = 0
        for number in range(start, config.optim.steps):
            optimizer.zero_grad(set_to_none=True)
            try:
                gradients, metrics = _accumulate(config, policy, batches, accumulation, step, device)
            except (ValueError, OSError, SystemExit):  # a group that this rank, or another, cannot read
                with stopping.held():
                    save(completed)
                raise
            for engine in engines:
                parallel.release(engine)
            asked_to_stop = torch.tensor([float(stopping.asked)], device=device)
            parallel.average_([*gradients, *metrics.values(), asked_to_stop])
            for weight, gradient in zip(policy.parameters(), gradients, strict=True):
                weight.grad = gradient
            norm = nn.utils.clip_grad_norm_(policy.switch.parameters(), config.optim.max_grad_norm)
            norms = {"grad_norm": norm.item()}
            if heads:  # apart: random weights at first, whose gradients would leave the adapters no share of the norm
                norms["head_grad_norm"] = nn.utils.clip_grad_norm_(heads, config.optim.max_grad_norm).item()
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(config.optim, number) * group["scale"]
            finite = all(math.isfinite(value) for value in (*norms.values(), metrics["loss"].item()))
            if not finite:
                met = range(state["samples_seen"], state["samples_seen"] + config.optim.batch_size)
                keys = ", ".join(loader.dataset.stream.key(position) for position in met)
                accelerator.print(f"step {number} is skipped, its loss or gradient is not finite; its groups: {keys}")
            with stopping.held():  # weights, moments and counters change together
                if finite:  # the same on all ranks: both numbers are averages over them
                    optimizer.step()
                state["skipped"] += not finite
                state["samples_seen"] += config.optim.batch_size
                completed = number + 1
            bad_in_a_row = 0 if finite else bad_in_a_row + 1

            values = {name: value.item() for name, value in metrics.items()}
            values |= norms | {"lr": optimizer.param_groups[0]["lr"], "skipped": state["skipped"]}
            values |= pace.measure() | {"data_seconds": batches.waited()}
            tracker.log(number, values, shown=shown)
            if bad_in_a_row > config.train.max_nonfinite:
                raise ValueError(
                    f"the loss or its gradient was not finite for {bad_in_a_row} steps in a row (train.max_nonfinite="
                    f"{config.train.max_nonfinite}), last at step {number}. The last good checkpoint is"
                    f" {checkpoint.latest(checkpoints)}. Lower optim.lr or objective.beta,"
                    " and check the groups with train.groups.verify."
                )
            done, stop = completed == config.optim.steps, asked_to_stop.item() > 0
            if done or stop or completed % config.train.checkpoint_every == 0:
                problem = None
                with stopping.held():
                    try:
                        save(completed)
                    except ValueError as error:
                        problem = error
                parallel.stop_together(problem, device)
            if stop and not done:
                accelerator.print(f"stopped by signal after step {completed}; run the same command to continue")
                break
            if done or validation.due(completed):
                validation.run(completed, policy)
            pace.restart()  # checkpoints and clips are not training time
        full = isinstance(policy.switch, FullParameters)
        exported = folder / "transformer" if full else folder / "lora" / export.DIFFUSERS_FILE
        if accelerator.is_main_process and completed >= config.optim.steps:
            if full:
                export.save_network(backbone.transformer, exported)
            else:
                export.to_diffusers(checkpoints, exported)
        accelerator.wait_for_everyone()
        tracker.close()  # ends the process group
        if completed < config.optim.steps:
            raise SystemExit(0)
        accelerator.print(f"weights  {exported}\nmetrics  {tracker.path}")
        if validation.enabled:
            accelerator.print(f"clips    {validation.folder}")
        return exported


def attach_parameters(config: Any, network: nn.Module, *, keep_reference: bool) -> Trainable:
    """What trains: the recipe's adapters, or with train.parameters=full every weight, beside a copy of them for
    `keep_reference`. Adapters always have the network itself as their reference."""
    if config.train.parameters not in ("lora", "full"):
        raise ValueError(f"train.parameters={config.train.parameters!r}: must be lora or full")
    if config.train.parameters == "full":
        return FullParameters(network, keep_reference=keep_reference)
    return LoraSwitch(network, config.lora, seed=config.seed)


def build_heads(config: Any, backbone: Backbone) -> PhysicsHeads | None:
    """The heads of the recipe's physics terms, whole on every rank; None without such terms. ValueError for a block
    that the network has not."""
    if feature_block(config.physics, len(backbone.blocks)) is None:
        return None
    network = backbone.architecture["transformer"]
    width = network["num_attention_heads"] * network["attention_head_dim"]
    return PhysicsHeads(config.physics, width, seed=config.seed).to(backbone.device)


def check_intervals(config: Any) -> None:
    """ValueError for a count of steps or checkpoints below 1."""
    intervals = {
        "train.checkpoint_every": config.train.checkpoint_every,
        "train.keep_checkpoints": config.train.keep_checkpoints,
        "validation.every": config.validation.every,
    }
    for key, value in intervals.items():
        if value < 1:
            raise ValueError(f"{key}={value}: must be at least 1 (validation.prompts=[] makes no clips)")


def accumulation_steps(config: Any, world: int) -> int:
    """Network passes over `pairs_per_pass` groups that one rank makes a step. ValueError where the batch does not
    divide."""
    if config.train.pairs_per_pass < 1 or config.optim.batch_size < 1:
        raise ValueError(
            f"train.pairs_per_pass={config.train.pairs_per_pass} and optim.batch_size={config.optim.batch_size}:"
            " both must be at least 1"
        )
    per_round = world * config.train.pairs_per_pass
    if config.optim.batch_size % per_round:
        lower = config.optim.batch_size // per_round * per_round
        nearest = f"{lower} or {lower + per_round}" if lower else f"{per_round}"
        raise ValueError(
            f"optim.batch_size={config.optim.batch_size} does not divide over {world} ranks x train.pairs_per_pass="
            f"{config.train.pairs_per_pass}: use optim.batch_size={nearest}"
        )
    return config.optim.batch_size // per_round


def gradient_sets(config: Any, clips: int, accumulation: int) -> int:
    """Sets of the adapters' gradients that a step of `clips` clips a group holds at once: each clip's, or one of them
    all, and the sum over the passes before."""
    return (clips if config.train.pairs_per_pass == 1 else 1) + (accumulation > 1)


def open_groups(config: Any, backbone: Backbone) -> GroupSet:
    """The recipe's groups, checked against the backbone and the recipe's video size."""
    groups = GroupSet(config.train.groups, fingerprint=backbone.fingerprint)
    video = config.video
    expected = backbone.latent_shape(video.height, video.width, video.num_frames)
    if groups.latent_shape != tuple(expected):
        raise ValueError(
            f"the groups in {config.train.groups} hold latents of shape {groups.latent_shape}, the recipe's video"
            f" section gives {tuple(expected)}: set video.height, video.width, video.num_frames to what they were"
            " built with, or build them again"
        )
    return groups


def prepare_network(network: nn.Module, switch: Trainable, config: TrainConfig, *, gradients: int = 2) -> None:
    """Switch on activation checkpointing and compilation, as configured; `gradients`: sets of the adapters' gradients
    that a step holds at once, for the memory plan.

    Raises ValueError for negative memory, and for float8 where blocks cannot be fused.
    """
    for key in ("memory_budget_gib", "offload_gib"):
        if getattr(config, key) < 0:
            raise ValueError(f"train.{key}={getattr(config, key)}: give GiB per GPU, or 0 for the default")
    reason = unfit(network, switch) if config.compile else "train.compile is false"
    if not reason:
        adapters = switch.parameters()
        device = adapters[0].device
        config = replace(config, offload_gib=affordable(config.offload_gib) if device.type == "cuda" else 0.0)
        plan = memory.plan(network, adapters, config, gradients=gradients)
        if config.float8:
            float8.check(device)
        store = HostStore(int(config.offload_gib * memory.GIB), device) if config.offload_gib else None
        fuse_blocks(network, switch, plan, store=store, float8=config.float8)
        return
    if config.float8:
        raise ValueError(f"train.float8 needs compiled blocks with LoRA, but {reason}: set it to false")
    if config.activation_checkpointing:
        network.enable_gradient_checkpointing(gradient_checkpointing_func=switch.checkpoint)
    if config.compile:
        compile_cache.heal()
        switch.share_graph()
        # The forward, not the module: hooks (features, ZeRO-3) stay outside the graph, and all blocks share one graph
        # per mode.
        for block in network.blocks:
            block.forward = torch.compile(block.forward, dynamic=False)


def _accumulate(
    config, policy, batches, accumulation: int, step: Step, device
) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Mean gradients and metrics of this rank's share of one step."""
    total: list[Tensor] | None = None
    sums: dict[str, Tensor] = {}
    for _ in range(accumulation):
        batch = {name: tensor.to(device, non_blocking=True) for name, tensor in next(batches).items()}
        gradients, metrics = step(config, policy, batch)
        if total is None:
            total = gradients
        else:
            for sum_, gradient in zip(total, gradients, strict=True):
                sum_ += gradient
        for name, value in metrics.items():
            sums[name] = sums.get(name, 0) + value.detach().float()
    for gradient in total:
        gradient /= accumulation
    return total, {name: value / accumulation for name, value in sums.items()}


class _StopSignal:
    """SIGTERM (preemption): the main process saves the last completed step at once, since a launcher may kill in
    seconds; then the run ends at the end of the step under way, on all ranks alike. Inside `held()` the save waits
    for the end of the block."""

    def __init__(self, save: Callable[[], None]):
        self.asked = False
        self._save, self._holding = save, False
        signal.signal(signal.SIGTERM, self._ask)

    def _ask(self, *_) -> None:
        first, self.asked = not self.asked, True
        if first and not self._holding:
            self._save()

    @contextmanager
    def held(self) -> Iterator[None]:
        asked, self._holding = self.asked, True
        try:
            yield
        finally:
            self._holding = False
        if self.asked and not asked:
            self._save()


class _Pace:
    """Tokens a second, arithmetic rate and its share of the device's peak, memory; of `clips` clips a group."""

    def __init__(self, config: Any, backbone: Backbone, clips: int, device: torch.device):
        video, network = config.video, backbone.transformer.config
        self.device = device
        tokens = backbone.num_tokens(video.height, video.width, video.num_frames)
        width = network.num_attention_heads * network.attention_head_dim
        matrix, attention = transformer_flops(
            tokens, config.backbone.text_length, width, network.ffn_dim, network.num_layers
        )
        clips *= config.optim.batch_size
        passes = config.objective.reference_passes
        self.tokens = tokens * clips
        self.flops = clips * (
            (2 + passes) * matrix + (1 + passes + 2.5) * attention
        )  # forward, reference forward, backward
        self.restart()

    def restart(self) -> None:
        self.clock = time.perf_counter()

    def measure(self) -> dict[str, float]:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        seconds = time.perf_counter() - self.clock
        world = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
        tflops = self.flops / seconds / world / 1e12
        peak = device_peak_tflops(self.device)
        measured = {
            "seconds": seconds,
            "tokens_per_second": self.tokens / seconds,
            "tflops_per_device": tflops,
            "memory_gib": peak_memory_gib(self.device),
        }
        return measured | ({"share_of_peak": tflops / peak} if peak else {})
