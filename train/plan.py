"""`--dry-run`: the numbers that follow from a recipe, printed without loading any weights."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from train.backbones import BACKBONES, DTYPES, FLOAT8, base_loras, find_architecture
from train.backbones.architecture import (
    bytes_outside_blocks,
    latent_shape,
    num_tokens,
    parameter_count,
    shape_of,
    without_storage,
)
from train.backbones.base import BOTH
from train.backbones.fused.memory import GATHERED, INPUT_OFFLOADED, OFFLOADED, Sizes, choose_levels, predict
from train.backbones.fused.prepare import fuses
from train.backbones.streaming import SLOTS, BlockLayout
from train.cost import bill
from train.groups import GroupSet
from train.host_memory import GIB, HOST_SHARE, host_memory
from train.loop import accumulation_steps, check_clips, check_frozen, gradient_sets
from train.lora_start import read_start
from train.lora_switch import adapter_shapes
from train.parallel import build_accelerator
from train.terms.physics import feature_block
from train.timesteps import EXPERT_STEPS, Turns

LOSERS = 4  # a group, for the estimate of objective.loss=plackett_luce
CARDS = (12, 16, 24, 32, 48, 80, 141)  # GB
# GiB that the allocator may take above train.memory_budget_gib: plans are up to 0.4 too low, and it held up to 0.9 more
# than was allocated.
SLACK = 1.5


def print_plan(config: Any, argv: list[str] | None, *, supervised: bool = False) -> None:
    """Print parameters, tokens, steps, samples, an estimate of memory per device and the bill (`train.cost`).

    ValueError if it cannot work. argv: the arguments that gave the config. supervised: training on winners alone.
    """
    accelerator = build_accelerator()
    world, sharded = accelerator.num_processes, accelerator.distributed_type.value == "DEEPSPEED"
    check_frozen(config, sharded=sharded)
    if config.ranks < 0:
        raise ValueError(f"ranks={config.ranks}: give the processes to plan for, or 0 for those of this launch")
    if config.ranks:
        world, sharded = config.ranks, config.ranks > 1 and not config.backbone.stream
    family, loras = BACKBONES[config.backbone.family], config.backbone.loras
    family.check_prefix(config.backbone.prefix_frames, "backbone.prefix_frames", config.video.num_frames)
    base_loras.read(loras, family.expert_folders, "", find_architecture(config.backbone))
    if config.lora.start:
        read_start(config)
    costs = bill(argv, groups=find_groups(config)[1], supervised=supervised)
    for line in [*plan(config, world=world, sharded=sharded), *costs]:
        accelerator.print(line)


def plan(config: Any, *, world: int, sharded: bool) -> list[str]:
    """The lines of `print_plan` for `world` ranks; `sharded` says whether ZeRO-3 splits the frozen network."""
    architecture = find_architecture(config.backbone)
    own, video = shape_of(architecture), config.video
    shape = latent_shape(architecture, video.height, video.width, video.num_frames)
    tokens = num_tokens(architecture, video.height, video.width, video.num_frames)
    accumulation = accumulation_steps(config, world)
    parameters = parameter_count(architecture)
    adapters = lora_parameters(architecture, config.lora)
    both = config.backbone.expert == BOTH
    memory = memory_estimate(config, world=world if sharded else 1)
    largest = own.width * own.ffn * (bytes_a_number(config) + 4)  # one tensor, as it is and as it is stored
    samples = config.optim.steps * config.optim.batch_size
    place = "shared out over them (ZeRO-3)" if sharded else "whole on each"
    place = "streamed to each from host memory" if config.backbone.stream else place
    lines = [
        f"ranks           {world}, the frozen network {place}"
        + ("; ranks=16 plans for 16 under ZeRO-3" if world == 1 and not config.backbone.stream else ""),
        f"backbone        {config.backbone.family} {config.backbone.architecture}:"
        f" {parameters / 1e6:,.2f} M parameters, {own.layers} blocks of width {own.width}",
        f"adapters        rank {config.lora.rank}: {adapters / 1e6:.2f} M parameters trained"
        + (" for each of two experts" if both else ""),
        f"clip            {video.height}x{video.width}, {video.num_frames} frames at {video.fps:g} fps ->"
        f" latents {shape}, {tokens} tokens",
        f"step            {config.optim.batch_size} groups = {world} ranks x {config.train.pairs_per_pass} a pass"
        f" x {accumulation} accumulation",
        f"run             {config.optim.steps} steps, {samples} groups drawn",
        f"learning rate   {config.optim.lr:g}, {config.optim.schedule}"
        + (f" to {config.optim.lr_end:g}" if config.optim.schedule == "cosine" else ""),
        "memory a device "
        + " + ".join(f"{name} {size / GIB:.1f}" for name, size in memory.items())
        + f" = {sum(memory.values()) / GIB:.1f} GiB (estimate)",
        f"loading         at most {(memory['weights'] + largest) / GIB:.1f} GiB a device: its weights and one tensor",
    ]
    if both:
        lines += experts_lines(config, sharded=sharded)
    if fuses(config) and config.train.memory_budget_gib:
        lines.append(f"blocks          {kept_by_blocks(config, world=world, sharded=sharded)}")
    if config.backbone.stream:
        lines.append(f"host memory     {on_the_host(config)}")
    block = feature_block(config.physics, own.layers)
    if block is not None:
        weights = f"trajectory {config.physics.trajectory:g}, relational {config.physics.relational:g}"
        terms = f"{weights}, heads on block {block}"
        lines.append(f"physics terms   {terms}, their learning rate {config.physics.head_lr:g}")
    if config.self_score.strength > 0:
        every = config.self_score.every
        steps = "in every step" if every == 1 else f"every {every} steps"
        lines.append(f"self-score      strength {config.self_score.strength:g}, {steps}")
    return [*lines, f"groups          {find_groups(config)[0]}"]


def find_groups(config: Any) -> tuple[str, int]:
    """The recipe's groups in words, and their number: 0 where there are none yet. ValueError as `check_clips`."""
    try:
        groups = GroupSet(config.train.groups)
    except ValueError as error:
        if (Path(config.train.groups) / "index.json").is_file():  # damaged
            raise
        return f"none yet: {error}", 0
    check_clips(config, groups, find_architecture(config.backbone))
    epochs = config.optim.steps * config.optim.batch_size / len(groups)
    size = f"{groups.total_bytes / GIB:.2f} GiB"
    return f"{len(groups)} in {groups.folder} ({size}), backbone {groups.fingerprint}: {epochs:.2f} epochs", len(groups)


def experts_lines(config: Any, *, sharded: bool) -> list[str]:
    """Whose steps the steps are, and where the expert whose turn it is not lies."""
    boundary = BACKBONES[config.backbone.family].default_boundary
    turns, steps = Turns(config, boundary), config.optim.steps
    high = sum(turns.of_step(step).expert == "high_noise" for step in range(steps))
    host = weights_on_host(config) / GIB
    place = "both sharded" if sharded else f"one at a time on the device, {host:.1f} GiB of host memory a device"
    place = "both streamed" if config.backbone.stream else place
    said = f"high_noise (t >= {boundary:g}) in {high} steps, low_noise in {steps - high}, {EXPERT_STEPS} in a row"
    return [f"experts         {said}; {place}"]


@dataclass(frozen=True)
class BlockPlan:
    """What the blocks of a step keep for their backward pass, each by its level (`train.backbones.fused.memory`), and
    the bytes that this takes: the peak on the device, and the activations that wait on the host."""

    levels: list[int]
    peak: float
    host: float

    def __str__(self) -> str:
        names = ("their input", "attention", "hidden states", "everything", "everything in host memory")
        names += ("their input in host memory",)
        return ", ".join(
            f"{self.levels.count(level)} {name}" for level, name in enumerate(names) if level in self.levels
        )


def plan_blocks(config: Any, *, world: int = 1, sharded: bool = False, passes: int = 1) -> BlockPlan:
    """Fused blocks in a step of `world` ranks, where the host has what train.offload_gib asks for. passes: those whose
    activations wait at once, two in the steps of the self-score."""
    architecture, video, train = find_architecture(config.backbone), config.video, config.train
    own, tokens = shape_of(architecture), num_tokens(architecture, video.height, video.width, video.num_frames)
    adapters = lora_parameters(architecture, config.lora)
    memory = memory_estimate(config, world=world if sharded else 1)
    clips, accumulation = config.objective.clips_per_group(LOSERS), accumulation_steps(config, world)
    gradients = gradient_sets(config, clips, accumulation)
    both = config.backbone.expert == BOTH
    resident = memory["weights"] + adapters * 4 * (3 * (1 + both) + gradients)  # weights, AdamW's moments, too
    resident += memory.get("gathered", 0)
    sizes = Sizes(
        tokens=tokens * clips_in_a_pass(config),
        width=own.width,
        ffn=own.ffn,
        heads=own.heads,
        blocks=own.layers,
        hidden_bytes=bytes_a_number(config),
    )
    room, host = train.memory_budget_gib * GIB - resident, train.offload_gib * GIB
    levels = choose_levels(sizes, room, host, passes, inputs=config.backbone.stream)
    waiting = levels.count(OFFLOADED) * sizes.offloaded + levels.count(INPUT_OFFLOADED) * sizes.hidden
    return BlockPlan(levels, resident + predict(sizes, levels, passes), passes * waiting)


def dearest_blocks(config: Any) -> BlockPlan:
    """`plan_blocks` of the recipe's step with the highest peak."""
    passes = (1, 2) if config.self_score.strength > 0 else (1,)
    return max((plan_blocks(config, passes=count) for count in passes), key=lambda found: found.peak)


def on_card(config: Any, size: int) -> Any:
    """The recipe on a card of `size` GB, as if they were GiB: a sixteenth is left to CUDA, and SLACK. Streamed where
    its step fits no other way, or not at all. ValueError for one that keeps to no budget."""
    if not fuses(config):
        family = BACKBONES[config.backbone.family]
        unfit = "" if family.kind.fused else f"backbone.family={config.backbone.family} has no fused blocks"
        given = f"backbone.compile={str(config.backbone.compile).lower()}, train.parameters={config.train.parameters}"
        raise ValueError(f"only fused blocks keep to a memory budget, but {unfit or f'{given}: set true and lora'}")
    budget = size * 15 / 16 - SLACK
    config = replace(config, train=replace(config.train, memory_budget_gib=budget))
    whole, streamed = (replace(config, backbone=replace(config.backbone, stream=stream)) for stream in (False, True))
    return whole if dearest_blocks(whole).peak <= budget * GIB else streamed


def card_arguments(config: Any) -> str:
    """What `on_card` set, for a command line."""
    stream, budget = config.backbone.stream, config.train.memory_budget_gib
    return f"backbone.stream={str(stream).lower()} train.memory_budget_gib={budget:g}"


def kept_by_blocks(config: Any, *, world: int, sharded: bool) -> str:
    """How many blocks keep what, and the peak; what streaming makes of it where that is more than the budget."""
    budget, found = config.train.memory_budget_gib, plan_blocks(config, world=world, sharded=sharded)
    line = f"keep {found}: peak {found.peak / GIB:.1f} GiB, train.memory_budget_gib {budget:g}"
    if found.peak <= budget * GIB or config.backbone.stream:
        return line
    streamed = plan_blocks(replace(config, backbone=replace(config.backbone, stream=True)), world=world)
    return f"{line}; backbone.stream=true: {streamed.peak / GIB:.1f} GiB"


def on_the_host(config: Any) -> str:
    """What streaming keeps in host memory."""
    weights = streamed_bytes(config) / GIB
    line = f"{weights:.1f} GiB of weights, page-locked, one copy for the processes of a host"
    if fuses(config):
        line += f"; up to {config.train.offload_gib:g} GiB of activations for each (train.offload_gib)"
    return f"{line}. A job may lock {HOST_SHARE * host_memory() / GIB:.1f} GiB on this one"


def weights_on_host(config: Any) -> int:
    """Of what one process on one GPU keeps there: streamed blocks, or both experts where both train."""
    if config.backbone.stream:
        return streamed_bytes(config)
    both = config.backbone.expert == BOTH
    return both * 2 * parameter_count(find_architecture(config.backbone)) * bytes_a_number(config)


def streamed_bytes(config: Any) -> int:
    """Of the blocks of all experts that are loaded, whose copy on the host this is."""
    architecture = find_architecture(config.backbone)
    return experts_loaded(config) * shape_of(architecture).layers * block_layout(config).host.size


def block_layout(config: Any) -> BlockLayout:
    """Of a block that is streamed."""
    architecture, dtype = find_architecture(config.backbone), config.backbone.dtype
    return BlockLayout(architecture["kind"], without_storage(architecture), DTYPES[dtype], float8=dtype == FLOAT8)


def experts_loaded(config: Any) -> int:
    """The one that trains, or every one where both train or validation makes clips."""
    every = config.validation.prompts or config.backbone.expert == BOTH
    return len(BACKBONES[config.backbone.family].expert_folders) if every else 1


def bytes_a_number(config: Any) -> int:
    """Of frozen weights and hidden states."""
    return 4 if config.backbone.dtype == "float32" else 2


def clips_in_a_pass(config: Any) -> int:
    pairs = config.train.pairs_per_pass
    return 1 if pairs == 1 else pairs * config.objective.clips_per_group(LOSERS)


def lora_parameters(architecture: dict[str, Any], lora: Any) -> int:
    """Trained parameters, counted by attaching the adapters' shapes to a network without storage."""
    return sum(rows * columns for rows, columns in adapter_shapes(without_storage(architecture), lora).values())


def memory_estimate(config: Any, *, world: int) -> dict[str, float]:
    """Bytes per device by part: weights, gathered, adapters, activations.

    Weights: frozen, over `world` shards; of the expert that trains, or of every expert where validation makes clips;
    where both train and are not sharded, of one; with backbone.stream SLOTS blocks of one of them, one more in 8 bits
    where they are, and what is outside of their blocks. Gathered: under ZeRO-3, blocks that are whole while they run.
    Adapters: weights, two moments and gradients, in float32; the gradients of one expert.
    Activations: each block's input for the clips of one pass, and about 34 widths and 4 feed-forward widths a token
    while one block is recomputed; without checkpointing the latter for every block.
    """
    architecture, video, size = find_architecture(config.backbone), config.video, bytes_a_number(config)
    layers, _, width, ffn, _ = shape_of(architecture)
    tokens = num_tokens(architecture, video.height, video.width, video.num_frames)
    parameters, adapters = parameter_count(architecture), lora_parameters(architecture, config.lora)
    block = tokens * (34 * width + 4 * ffn) * size
    kept = layers * tokens * width * size + block if config.train.activation_checkpointing else layers * block
    both, experts = config.backbone.expert == BOTH, experts_loaded(config)
    weights = (1 if both and world == 1 else experts) * parameters * size / world
    if config.backbone.stream:
        layout, dtype = block_layout(config), DTYPES[config.backbone.dtype]
        arrived = layout.host.size if layout.scales else 0
        weights = SLOTS * layout.device.size + arrived + experts * bytes_outside_blocks(architecture, dtype)
    gathered = {"gathered": GATHERED * parameters / layers * size} if world > 1 else {}
    return {
        "weights": weights,
        **gathered,
        "adapters": adapters * 4 * (9 if both else 6),
        "activations": clips_in_a_pass(config) * kept,
    }
