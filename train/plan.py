"""`--dry-run`: the numbers that follow from a recipe, printed without loading any weights."""

from typing import Any

import torch
from diffusers import WanTransformer3DModel

from train.backbones import BACKBONES, find_architecture
from train.backbones.architecture import latent_shape, num_tokens, parameter_count
from train.backbones.base import BOTH
from train.cost import bill
from train.fused.memory import GATHERED, GIB, Sizes, choose_levels, predict
from train.groups import GroupSet
from train.loop import accumulation_steps, gradient_sets
from train.lora_switch import adapter_shapes
from train.parallel import build_accelerator
from train.terms.physics import feature_block
from train.timesteps import EXPERT_STEPS, Turns

LOSERS = 4  # a group, for the estimate of objective.loss=plackett_luce


def print_plan(config: Any, argv: list[str] | None, *, supervised: bool = False) -> None:
    """Print parameters, tokens, steps, samples, an estimate of memory per device and the bill (`train.cost`).

    ValueError if it cannot work. argv: the arguments that gave the config. supervised: training on winners alone.
    """
    accelerator = build_accelerator()
    world, sharded = accelerator.num_processes, accelerator.distributed_type.value == "DEEPSPEED"
    if config.ranks < 0:
        raise ValueError(f"ranks={config.ranks}: give the processes to plan for, or 0 for those of this launch")
    if config.ranks:
        world, sharded = config.ranks, config.ranks > 1
    costs = bill(argv, groups=find_groups(config)[1], supervised=supervised)
    for line in [*plan(config, world=world, sharded=sharded), *costs]:
        accelerator.print(line)


def plan(config: Any, *, world: int, sharded: bool) -> list[str]:
    """The lines of `print_plan` for `world` ranks; `sharded` says whether ZeRO-3 splits the frozen network."""
    architecture = find_architecture(config.backbone)
    network, video = architecture["transformer"], config.video
    shape = latent_shape(architecture, video.height, video.width, video.num_frames)
    tokens = num_tokens(architecture, video.height, video.width, video.num_frames)
    accumulation = accumulation_steps(config, world)
    width, layers = network["num_attention_heads"] * network["attention_head_dim"], network["num_layers"]
    parameters = parameter_count(architecture)
    adapters = lora_parameters(architecture, config.lora)
    both = config.backbone.expert == BOTH
    memory = memory_estimate(config, architecture, tokens, parameters, adapters, world=world if sharded else 1)
    largest = width * network["ffn_dim"] * (bytes_a_number(config) + 4)  # one tensor, as it is and as it is stored
    samples = config.optim.steps * config.optim.batch_size
    place = "shared out over them (ZeRO-3)" if sharded else "whole on each"
    lines = [
        f"ranks           {world}, the frozen network {place}"
        + ("; ranks=16 plans for 16 under ZeRO-3" if world == 1 else ""),
        f"backbone        {config.backbone.family} {config.backbone.architecture}:"
        f" {parameters / 1e6:,.2f} M parameters, {layers} blocks of width {width}",
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
        lines += experts_lines(config, parameters, sharded=sharded)
    if config.backbone.compile and config.train.parameters == "lora" and config.train.memory_budget_gib:
        gradients = gradient_sets(config, config.objective.clips_per_group(LOSERS), accumulation)
        resident = memory["weights"] + adapters * 4 * (3 * (1 + both) + gradients)  # weights, AdamW's moments, too
        resident += memory.get("gathered", 0)
        lines.append(f"blocks          {kept_by_blocks(config, network, tokens, resident)}")
    block = feature_block(config.physics, layers)
    if block is not None:
        weights = f"trajectory {config.physics.trajectory:g}, relational {config.physics.relational:g}"
        terms = f"{weights}, heads on block {block}"
        lines.append(f"physics terms   {terms}, their learning rate {config.physics.head_lr:g}")
    if config.self_score.strength > 0:
        terms = f"strength {config.self_score.strength:g}, every {config.self_score.every} steps"
        lines.append(f"self-score      {terms}")
    return [*lines, f"groups          {find_groups(config)[0]}"]


def find_groups(config: Any) -> tuple[str, int]:
    """The recipe's groups in words, and their number: 0 where there are none yet."""
    try:
        groups = GroupSet(config.train.groups)
    except ValueError as error:
        return f"none yet: {error}", 0
    epochs = config.optim.steps * config.optim.batch_size / len(groups)
    size = f"{groups.total_bytes / GIB:.2f} GiB"
    return f"{len(groups)} in {groups.folder} ({size}), backbone {groups.fingerprint}: {epochs:.2f} epochs", len(groups)


def experts_lines(config: Any, parameters: int, *, sharded: bool) -> list[str]:
    """Whose steps the steps are, and where the expert whose turn it is not lies."""
    boundary = BACKBONES[config.backbone.family].default_boundary
    turns, steps = Turns(config, boundary), config.optim.steps
    high = sum(turns.of_step(step).expert == "high_noise" for step in range(steps))
    host = 2 * parameters * bytes_a_number(config) / GIB
    place = "both sharded" if sharded else f"one at a time on the device, {host:.1f} GiB of host memory a device"
    said = f"high_noise (t >= {boundary:g}) in {high} steps, low_noise in {steps - high}, {EXPERT_STEPS} in a row"
    return [f"experts         {said}; {place}"]


def kept_by_blocks(config: Any, network: dict[str, Any], tokens: int, resident: float) -> str:
    """How many blocks keep what for their backward pass beside `resident` bytes, and the peak, where the host has what
    train.offload_gib asks for (`train.fused.memory`)."""
    heads, train = network["num_attention_heads"], config.train
    sizes = Sizes(
        tokens=tokens * clips_in_a_pass(config),
        width=heads * network["attention_head_dim"],
        ffn=network["ffn_dim"],
        heads=heads,
        blocks=network["num_layers"],
        hidden_bytes=bytes_a_number(config),
    )
    levels = choose_levels(sizes, train.memory_budget_gib * GIB - resident, train.offload_gib * GIB)
    names = ("their input", "attention", "hidden states", "everything", "everything in host memory")
    counts = [f"{levels.count(level)} {name}" for level, name in enumerate(names) if level in levels]
    peak = (resident + predict(sizes, levels)) / GIB
    return f"keep {', '.join(counts)}: peak {peak:.1f} GiB, train.memory_budget_gib {train.memory_budget_gib:g}"


def bytes_a_number(config: Any) -> int:
    """Of frozen weights and hidden states."""
    return 4 if config.backbone.dtype == "float32" else 2


def clips_in_a_pass(config: Any) -> int:
    pairs = config.train.pairs_per_pass
    return 1 if pairs == 1 else pairs * config.objective.clips_per_group(LOSERS)


def lora_parameters(architecture: dict[str, Any], lora: Any) -> int:
    """Trained parameters, counted by attaching the adapters' shapes to a network without storage."""
    with torch.device("meta"):
        network = WanTransformer3DModel(**architecture["transformer"])
    return sum(rows * columns for rows, columns in adapter_shapes(network, lora).values())


def memory_estimate(
    config: Any, architecture: dict[str, Any], tokens: int, parameters: int, adapters: int, *, world: int
) -> dict[str, float]:
    """Bytes per device by part: weights, gathered, adapters, activations.

    Weights: frozen, over `world` shards; of the expert that trains, or of every expert where validation makes clips;
    where both train and are not sharded, of one. Gathered: under ZeRO-3, blocks that are whole while they run.
    Adapters: weights, two moments and gradients, in float32; the gradients of one expert.
    Activations: each block's input for the clips of one pass, and about 34 widths and 4 feed-forward widths a token
    while one block is recomputed; without checkpointing the latter for every block.
    """
    network = architecture["transformer"]
    width, layers = network["num_attention_heads"] * network["attention_head_dim"], network["num_layers"]
    size = bytes_a_number(config)
    block = tokens * (34 * width + 4 * network["ffn_dim"]) * size
    kept = layers * tokens * width * size + block if config.train.activation_checkpointing else layers * block
    folders, both = BACKBONES[config.backbone.family].expert_folders, config.backbone.expert == BOTH
    experts = len(folders) if (world > 1 if both else config.validation.prompts) else 1
    gathered = {"gathered": GATHERED * parameters / layers * size} if world > 1 else {}
    return {
        "weights": experts * parameters * size / world,
        **gathered,
        "adapters": adapters * 4 * (9 if both else 6),
        "activations": clips_in_a_pass(config) * kept,
    }
