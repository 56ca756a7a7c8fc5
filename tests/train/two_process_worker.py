"""What the tests run in processes of their own. As a script, on every rank of a launch:

two_process_worker.py FOLDER key=value ...      averaged gradients into FOLDER/gradients, then a training run
"""

import json
import multiprocessing
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

import recipes
from losses.flow_matching import flow_error, interpolate
from train import gdpo, loop, parallel
from train.backbones import load_backbone
from train.backbones.base import Conditioning
from train.backbones.fused.prepare import prepare_network
from train.data import Sample, build_loader
from train.groups import GroupSet
from train.lora_switch import LoraSwitch
from train.policy import Policy
from train.terms.physics import build_heads

TERMS = ("physics.trajectory=2", "physics.relational=0.5", "self_score.strength=3", "self_score.every=2")
NO_TERMS = ("physics.trajectory=0", "physics.relational=0", "self_score.strength=0")
OBJECTIVES = {
    "bound": ("objective.loss=bound", "objective.beta=10", *NO_TERMS),
    "plackett_luce": ("objective.loss=plackett_luce", "objective.beta=10", *NO_TERMS),
    "through_the_reference": ("objective.loss=bound", *NO_TERMS),
    "all_terms": ("objective.loss=bound", "objective.beta=10", "objective.t_min=0.5", *TERMS),
}


def train(entry: str, arguments: list[str]) -> None:
    """Train as `python -m <entry> <arguments>` does, in a process that a fork server made: its loaders fork again."""
    multiprocessing.set_start_method("fork", force=True)
    import_module(entry).main(arguments)


def through_the_reference(
    config: Any, policy: Policy, batch: dict[str, Tensor]
) -> tuple[list[Tensor], dict[str, Tensor]]:
    """A `Step` whose gradient flows through the reference: its error at the policy's prediction of the clean winner."""
    t, noise, conditioning = batch["t"], batch["noise"][:, 0], Conditioning(batch["text"])
    x_t = interpolate(batch["winner"], noise, t)
    clean = x_t - t.view(-1, 1, 1, 1, 1) * policy.backbone.velocity(x_t, t, conditioning)
    with policy.switch.reference():
        velocity = policy.backbone.velocity(interpolate(clean, noise, t.sqrt()), t.sqrt(), conditioning)
        loss = flow_error(velocity, clean, noise).mean()
    return list(torch.autograd.grad(loss, policy.switch.parameters())), {"loss": loss.detach()}


def in_loud_noise(config: Any, sample: Sample) -> dict[str, Tensor]:
    """`gdpo.prepare` in noise of which the predicted winner keeps so much that the judge finds it worse."""
    tensors = gdpo.prepare(config, sample)
    return tensors | {"noise": 9 * tensors["noise"]}


def gradients(arguments: list[str]) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """Gradients and loss of the first step's batch, averaged over the ranks, by objective; and what the launch was.

    The adapters are seeded random ones, so that policy and reference differ.
    """
    accelerator = parallel.build_accelerator()
    config = recipes.load(gdpo.Config, arguments)
    sharding = parallel.sharding(accelerator)
    backbone = load_backbone(config.backbone, accelerator.device, parts=("expert",), sharding=sharding, together=True)
    network, switch = backbone.transformer, LoraSwitch(backbone.transformer, config.lora)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in switch.parameters():
            weight.copy_(0.03 * torch.randn(weight.shape, generator=generator))
    engine = parallel.partition(accelerator, network, backbone.blocks)
    prepare_network(network, switch, config)
    measured = {}
    rank, world = accelerator.process_index, accelerator.num_processes
    facts = {"type": accelerator.distributed_type.value, "ranks": world}
    if config.backbone.stream:
        facts["one copy"] = "memfd:physalign" in Path("/proc/self/maps").read_text(encoding="utf-8")
    if engine is not None:
        facts["stage"] = engine.zero_optimization_stage()
        facts["whole"] = sum(parameter.ds_numel for parameter in network.parameters())
    for name, changes in OBJECTIVES.items():
        config = recipes.load(gdpo.Config, [*arguments, *changes])
        step = through_the_reference if name == "through_the_reference" else gdpo.step
        policy = Policy(backbone, switch, build_heads(config, backbone))
        prepare = in_loud_noise if name == "all_terms" else gdpo.prepare
        loader = build_loader(config, GroupSet(config.train.groups), prepare, start=0, rank=rank, world=world)
        passes = loop.accumulation_steps(config, world)
        means, metrics = loop.accumulate(config, policy, iter(loader), passes, step, accelerator.device)
        parallel.release(engine)
        parallel.average_([*means, metrics["loss"]])
        names = (
            [*switch.weights, *(key for key, _ in policy.heads.named_parameters())] if policy.heads else switch.weights
        )
        measured[name] = dict(zip(names, means, strict=True)) | {"loss": metrics["loss"]}
        assert name != "all_terms" or metrics["self"] > 0  # the regulariser's hinge: or its gradient is none
        if engine is not None:
            facts[f"partitioned after {name}"] = parallel.is_partitioned(network)
            facts["share"] = sum(parameter.ds_tensor.numel() for parameter in network.parameters())
    return measured, facts


def main() -> None:
    folder, arguments = Path(sys.argv[1]), sys.argv[2:]
    measured, facts = gradients(arguments)
    if torch.distributed.get_rank() == 0:
        folder.mkdir(parents=True)
        for name, tensors in measured.items():
            save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, folder / f"{name}.safetensors")
        (folder / "facts.json").write_text(json.dumps(facts), encoding="utf-8")
    gdpo.main(arguments)


if __name__ == "__main__":
    main()
