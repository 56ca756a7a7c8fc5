"""The loop that every trainer shares: load, attach, resume, then step, log, save.

    for each step:  gradients = mean over the step's groups, over all ranks, of `step(config, policy, batch)`
                    skip it if anything is not finite, else clip (adapters and heads apart), AdamW, log,
                    and now and then a checkpoint and clips

What a method adds is two functions: `prepare(config, sample) -> tensors`, which draws noise and time in the loader's
processes, and `step(config, policy, batch) -> gradients, metrics`. Groups are read by their position in one global
stream and every draw is seeded by (seed, position), so a run is the same on any number of ranks, and resuming needs
only the number of samples seen.
"""

import math
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from train import checkpoint, export, parallel, resume
from train.backbones import BACKBONES, load_backbone
from train.backbones.architecture import latent_shape
from train.backbones.base import BOTH, Backbone
from train.backbones.fused.prepare import fuses, prepare_network
from train.data import Batches, GroupStream, Sample, Tensors, build_loader
from train.full_parameters import FullParameters
from train.groups import GroupSet
from train.host_memory import GIB
from train.optimizer import build_optimizer, learning_rate
from train.policy import Policy, attach_parameters
from train.reference_cache import ReferenceCache
from train.terms.live_targets import LiveTargets
from train.terms.physics import build_heads, lacks_targets
from train.timesteps import turns_of
from train.tracking import Pace, Tracker, check_trackers
from train.validation import Validation

MAX_NONFINITE = 10  # steps in a row that may be skipped for a non-finite loss before the run stops


@dataclass
class TrainConfig:
    groups: str = "${output}/groups"  # folder of preference groups with their index.json
    folder: str = "${output}/train"  # checkpoints, metrics, validation clips and the exported LoRA go here
    parameters: str = "lora"  # lora | full: all weights of the network, in float32
    pairs_per_pass: int = 1  # groups in one network pass, per GPU; 1 keeps one sample's activations at a time
    activation_checkpointing: bool = True  # keep only each block's input, recompute the rest in backward
    # With backbone.compile and LoRA: the peak that a step may reach, GiB per GPU; what fits is kept instead of
    # recomputed, each block's input at least. 0: nine tenths of the GPU, on a CPU no limit; never more than 95 % of it.
    memory_budget_gib: float = 0.0
    # With backbone.compile and LoRA on a GPU: host memory, page-locked, per GPU, for activations that go there and come
    # back while other blocks compute. Less is taken where less does, or where the host has less. 0: none.
    offload_gib: float = 0.0
    # With backbone.compile, LoRA and bfloat16: products with the frozen weights in 8 bits
    # (train.backbones.fused.float8). Faster; the adapters' gradients differ by about 5 %, the policy's distance to its
    # reference by more.
    float8: bool = False
    # Folder of the reference's flow errors: read where a run with the same groups and seed has left them, else written.
    # Then beta, learning rate, anchor or rank may change without their passes. Empty: none.
    reference_cache: str = ""
    num_workers: int = 2  # loader processes per GPU
    checkpoint_every: int = 200  # steps
    keep_checkpoints: int = 3  # newest checkpoints kept
    # Accelerate trackers besides metrics.jsonl: tensorboard, wandb, trackio.
    trackers: list[str] = field(default_factory=list)


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
    """Train and return the exported LoRA file. `config` is a `train.gdpo.Config`, `check_groups` may refuse a group
    set, `shown` names the metrics of the progress bar; `keep_reference`: full fine-tuning needs the untrained weights.

    Raises ValueError for what a user can fix: groups of another backbone, a batch that does not divide, a folder that
    another run holds, another run's checkpoint, a full disk, a damaged group, losses that stay non-finite.
    """
    accelerator, folder = start(config), Path(config.train.folder)
    rank, world, device = accelerator.process_index, accelerator.num_processes, accelerator.device
    with resume.claimed(folder, accelerator):
        newest = resume.newest(config)
        live = LiveTargets(config, device, accelerator.print) if lacks_targets(config) else None
        validation = Validation(config, accelerator, folder / "validation")
        backbone = load(config, accelerator, clips=validation.enabled, vae=validation.enabled or live is not None)
        groups = open_groups(config, backbone)
        check_groups(config, groups)
        policy, engines = attach(config, accelerator, backbone, groups, keep_reference=keep_reference)
        clips, passes = config.objective.clips_per_group(groups.num_losers(0)), accumulation_steps(config, world)
        if reason := prepare_networks(config, policy, gradients=gradient_sets(config, clips, passes)):
            accelerator.print(f"blocks are not fused, and keep to no memory budget: {reason}")
        rates = {"heads": policy.all_heads(), "head_lr": config.physics.head_lr}
        optimizer = build_optimizer(config.optim, policy.switch.parameters(), **rates)
        run = resume.Checkpoint(config, policy, optimizer, groups, accelerator)
        run.load(newest)
        loader = build_loader(config, groups, prepare, policy.turns, start=run.samples_seen, rank=rank, world=world)
        batches = Batches(loader, device, partial(live.complete, backbone=backbone) if live else None)
        tracker, pace = Tracker(accelerator, config, start=run.step), Pace(config, backbone, clips, device)
        stopping = StopSignal(run.save)
        if run.step == 0 or run.step >= config.optim.steps or validation.due(run.step):
            validation.catch_up(run.step, policy)

        for number in range(run.step, config.optim.steps):
            with saved_on_error(run, stopping):  # as with a group that this rank, or another, cannot read
                gradients, metrics = accumulate(config, policy, batches, passes, step, device)
            for engine in engines:
                parallel.release(engine)
            asked_to_stop = torch.tensor([float(stopping.asked)], device=device)
            parallel.average_([*gradients, *metrics.values(), asked_to_stop])
            values = {name: value.item() for name, value in metrics.items()}
            norms = set_gradients(config, policy, optimizer, gradients, number)
            finite = all(map(math.isfinite, (values["loss"], *norms.values())))  # averages: the same on all ranks
            with stopping.held():  # weights, moments and counters change together
                if finite:
                    optimizer.step()
                run.advance(finite=finite)
            optimizer.zero_grad(set_to_none=True)
            values |= norms | {"lr": optimizer.param_groups[0]["lr"], "skipped": run.skipped}
            tracker.log(number, values | pace.measure() | {"data_seconds": batches.waited()}, shown=shown)
            if not finite:
                report_skipped(config, run, loader.dataset.stream, accelerator)
            done, stop = run.step == config.optim.steps, asked_to_stop.item() > 0
            if done or stop or run.step % config.train.checkpoint_every == 0:
                with stopping.held(), parallel.together(device):
                    run.save()
            if stop and not done:
                accelerator.print(f"stopped by signal after step {run.step}; run the same command to continue")
                break
            if done or validation.due(run.step):
                validation.run(run.step, policy)
            pace.restart()  # checkpoints and clips are not training time
        return finish(config, run, accelerator, tracker, validation)


def start(config: Any) -> Accelerator:
    """The accelerator of this launch. ValueError for settings that cannot work in it, before anything is read."""
    trackers = [name for name in config.train.trackers if name]
    check_trackers(trackers)
    accelerator = parallel.build_accelerator(log_with=trackers or None, project_dir=str(config.train.folder))
    accumulation_steps(config, accelerator.num_processes)
    check_intervals(config)
    if config.ranks not in (0, accelerator.num_processes):
        raise ValueError(f"ranks={config.ranks} is for --dry-run: {accelerator.num_processes} processes were launched")
    check_frozen(config, sharded=parallel.sharding(accelerator) is not None)
    return accelerator


def check_frozen(config: Any, *, sharded: bool) -> None:
    """ValueError where what is frozen can be neither `sharded` by ZeRO-3 nor streamed as the recipe says."""
    full = config.train.parameters == "full"
    if full and sharded:
        raise ValueError(
            "train.parameters=full cannot train under ZeRO-3, which shards what is frozen: launch with launch/ddp.yaml"
        )
    if config.backbone.stream and (full or sharded):
        raise ValueError(
            "backbone.stream=true needs train.parameters=lora and a launch without ZeRO-3 (launch/ddp.yaml), for it"
            " streams a whole frozen network from host memory: change these, or set it to false"
        )
    if full and config.backbone.dtype != "float32":
        raise ValueError(
            f"train.parameters=full needs backbone.dtype=float32, not {config.backbone.dtype}: updates are lost in less"
        )
    if config.backbone.stream and not (config.train.activation_checkpointing or fuses(config)):
        raise ValueError(
            "backbone.stream=true keeps no block's weights for its backward pass: set"
            " train.activation_checkpointing=true"
        )


def load(config: Any, accelerator: Accelerator, *, clips: bool, vae: bool) -> Backbone:
    """The recipe's backbone: the expert that trains, or with `clips` every one; where needed its VAE. Where both
    experts train and are not sharded, only one at a time is on the device."""
    both, sharding = config.backbone.expert == BOTH, parallel.sharding(accelerator)
    parts = ["transformer" if clips or both else "expert"] + (["vae"] if vae else [])
    host = both and sharding is None
    return load_backbone(config.backbone, accelerator.device, parts=parts, sharding=sharding, together=True, host=host)


def attach(
    config: Any, accelerator: Accelerator, backbone: Backbone, groups: GroupSet, *, keep_reference: bool
) -> tuple[Policy, list[nn.Module | None]]:
    """The policy, with the reference's errors that are known, and the DeepSpeed engines of the backbone's networks,
    which must outlive training."""
    switch = attach_parameters(config, backbone, keep_reference=keep_reference)
    policy = Policy(backbone, switch, build_heads(config, backbone), turns=turns_of(config, backbone))
    blocks_of = backbone.kind.blocks_of
    engines = [parallel.partition(accelerator, expert, blocks_of(expert)) for expert in backbone.experts.values()]
    whole = "sharded over the ranks" if engines[0] else "whole on every rank"
    if config.backbone.stream:
        whole = f"streamed from {backbone.transformer.streamed.ring.taken / GIB:.1f} GiB of host memory"
    accelerator.print(
        f"{accelerator.distributed_type.value}: {accelerator.num_processes} ranks, frozen network {whole}"
    )
    if config.train.reference_cache:
        policy.cache = ReferenceCache(config, groups, backbone.fingerprint, accelerator, policy.turns)
    return policy, engines


def prepare_networks(config: Any, policy: Policy, *, gradients: int) -> str:
    """`prepare_network` for all that train."""
    first, *others = policy.networks()
    return prepare_network(first, policy.switch, config, gradients=gradients, others=others)


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
    """The recipe's groups, checked against the backbone and the recipe's clips."""
    groups = GroupSet(config.train.groups, fingerprint=backbone.group_fingerprints)
    check_clips(config, groups, backbone.architecture)
    return groups


def check_clips(config: Any, groups: GroupSet, architecture: dict[str, Any]) -> None:
    """ValueError for groups of clips of another size, or with other given frames, than the recipe says."""
    video, frames = config.video, config.backbone.prefix_frames
    expected = latent_shape(architecture, video.height, video.width, video.num_frames)
    if groups.latent_shape[0] != expected[0]:
        raise ValueError(
            f"the groups in {config.train.groups} hold latents of {groups.latent_shape[0]} channels, those of"
            f" backbone.family={config.backbone.family} have {expected[0]}: they are another VAE's, build them again"
        )
    if groups.latent_shape != tuple(expected):
        raise ValueError(
            f"the groups in {config.train.groups} hold latents of shape {groups.latent_shape}, the recipe's video"
            f" section gives {tuple(expected)}: set video.height, video.width, video.num_frames to what they were"
            " built with, or build them again"
        )
    condition = groups[0].condition if BACKBONES[config.backbone.family].takes_prefix else None
    begin = 0 if condition is None else (condition.shape[1] - 1) * architecture["vae_scale_temporal"] + 1
    if begin != frames and (begin or frames > 1):
        raise ValueError(
            f"the groups in {config.train.groups} begin with {begin or 'no'} given frames, the recipe says"
            f" backbone.prefix_frames={frames}: set it to {begin or 1}, or build them again"
        )


def accumulate(
    config: Any, policy: Policy, batches: Iterator[Tensors], passes: int, step: Step, device: torch.device
) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Mean gradients and metrics of this rank's share of one step; where both experts train, of the one that serves
    its times."""
    total: list[Tensor] | None = None
    sums: dict[str, Tensor] = {}
    for _ in range(passes):
        batch = next(batches)
        policy.backbone.serve(batch["t"])
        batch = {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}
        gradients, metrics = step(config, policy, batch)
        if total is None:
            total = gradients
        else:
            for sum_, gradient in zip(total, gradients, strict=True):
                sum_ += gradient
        for name, value in metrics.items():
            sums[name] = sums.get(name, 0) + value.detach().float()
    if policy.backbone.trained == BOTH:
        sums["high_noise"] = torch.tensor(float(passes * (policy.backbone.expert == "high_noise")), device=device)
    for gradient in total:
        gradient /= passes
    return total, {name: value / passes for name, value in sums.items()}


@contextmanager
def saved_on_error(run: resume.Checkpoint, stopping: "StopSignal") -> Iterator[None]:
    """Save the steps made before an error for users goes on its way."""
    try:
        yield
    except (ValueError, OSError, SystemExit):
        with stopping.held():
            run.save()
        raise


def set_gradients(
    config: Any, policy: Policy, optimizer: torch.optim.AdamW, gradients: list[Tensor], number: int
) -> dict[str, float]:
    """Hand step `number`'s gradients to the weights, clipped, and set the learning rates. Returns the gradients' norms
    before clipping; the list is emptied, so that it keeps no gradient alive."""
    for weight, gradient in zip(policy.parameters(), gradients, strict=True):
        weight.grad = gradient
    gradients.clear()
    norms = {"grad_norm": nn.utils.clip_grad_norm_(policy.weights(), config.optim.max_grad_norm).item()}
    if heads := policy.head_parameters():  # apart: random at first, they would leave the adapters no share of the norm
        norms["head_grad_norm"] = nn.utils.clip_grad_norm_(heads, config.optim.max_grad_norm).item()
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(config.optim, number) * group["scale"]
    return norms


def report_skipped(config: Any, run: resume.Checkpoint, stream: GroupStream, accelerator: Accelerator) -> None:
    """Name the groups of the step that was just skipped; ValueError after more than MAX_NONFINITE in a row."""
    met = range(run.samples_seen - config.optim.batch_size, run.samples_seen)
    number, keys = run.step - 1, ", ".join(stream.key(position) for position in met)
    accelerator.print(f"step {number} is skipped, its loss or gradient is not finite; its groups: {keys}")
    if run.nonfinite > MAX_NONFINITE:
        raise ValueError(
            f"the loss or its gradient was not finite for {run.nonfinite} steps in a row, last at step {number}. The"
            f" last good checkpoint is {checkpoint.latest(run.folder)}. Lower optim.lr or objective.beta, and check the"
            f" groups with python -m data_pipeline.browse {config.train.groups}."
        )


def finish(
    config: Any, run: resume.Checkpoint, accelerator: Accelerator, tracker: Tracker, validation: Validation
) -> Path:
    """Export what a finished run trained and say where everything is; a run that was stopped ends with status 0."""
    folder, done = Path(config.train.folder), run.step >= config.optim.steps
    full = isinstance(run.policy.switch, FullParameters)
    exported = folder / "transformer" if full else folder / "lora" / export.DIFFUSERS_FILE
    if accelerator.is_main_process and done:
        if full:
            export.save_network(run.policy.backbone.transformer, exported)
        else:
            export.to_diffusers(run.folder, exported)
    accelerator.wait_for_everyone()
    tracker.close()  # ends the process group
    if not done:
        raise SystemExit(0)
    accelerator.print(f"weights  {exported}\nmetrics  {tracker.path}")
    if validation.enabled:
        accelerator.print(f"clips    {validation.folder}")
    return exported


class StopSignal:
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
