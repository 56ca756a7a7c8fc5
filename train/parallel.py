"""One process or many: the accelerator, the ZeRO-3 partition of the frozen network, and averages over ranks.

What is trained, the adapters, is a few megabytes and stays whole on every rank; what is frozen, the network, is what
ZeRO-3 shards. So gradients are averaged here, once a step and in one message, the optimizer is plain PyTorch, and a
checkpoint has the same files on one CPU, under data parallelism and under ZeRO-3. Every rank must run the same number
of network passes.
"""

import atexit
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from accelerate import Accelerator, DistributedType, InitProcessGroupKwargs
from torch import Tensor, nn

from train import compile_cache, watch

TIMEOUT = timedelta(days=30)  # ranks may wait for one that builds, writes clips or downloads weights: see train.watch


def build_accelerator(**options) -> Accelerator:
    """An Accelerator for this launch; its processes talk over gloo where there is no GPU, and watch each other.

    Raises ValueError for a ZeRO stage other than 3.
    """
    watch.timeout_minutes()  # raises before anything is waited for
    launched = "LOCAL_RANK" in os.environ  # by accelerate launch or torchrun; a bare process has no group to set up
    gpu = torch.cuda.is_available()
    handlers = [InitProcessGroupKwargs(backend=None if gpu else "gloo", timeout=TIMEOUT)]
    # Without cpu=True several ranks on a machine without GPUs pass for one; with it, DeepSpeed is silently left out.
    sharded = os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true"
    cpu = not gpu and not sharded
    if sharded:
        compile_cache.heal()  # DeepSpeed compiles operators
    accelerator = Accelerator(cpu=cpu, kwargs_handlers=handlers if launched else [], **options)
    atexit.register(_end_gloo)
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        import deepspeed
        from transformers.integrations.deepspeed import unset_hf_deepspeed_config

        unset_hf_deepspeed_config()  # else transformers shards whatever it loads; only the trained network is to be
        deepspeed.logger.setLevel("WARNING")
        stage = accelerator.state.deepspeed_plugin.zero_stage
        if stage != 3:
            raise ValueError(
                f"DeepSpeed zero stage {stage}: only stage 3 shards the frozen network, and nothing else is large here."
                " Launch with launch/zero3.yaml, or launch/ddp.yaml for plain data parallelism."
            )
    watch.start()
    return accelerator


def _end_gloo() -> None:
    """Close what an error or a short command leaves open: a thread of gloo that is still at work while the interpreter
    ends aborts the process (SIGABRT). NCCL's group is left to a command's regular end: it might wait for the others."""
    if dist.is_available() and dist.is_initialized() and dist.get_backend() == "gloo":
        dist.destroy_process_group()


class Sharding:
    """Spreads a network over the ranks of ZeRO-3 while it is made: the first rank reads, every rank keeps its share.

    One module's parameters are whole at a time. `partition` does the rest.
    """

    def __init__(self, accelerator: Accelerator):
        self.reads = accelerator.is_main_process

    def take(self, parameters: list[nn.Parameter]) -> None:
        """Replace each parameter's values, on every rank, by this rank's share of the first rank's."""
        from deepspeed import zero

        zero.Init(module=nn.ParameterList(parameters), mem_efficient_linear=False)


def sharding(accelerator: Accelerator) -> Sharding | None:
    """How networks are to be loaded in this launch; None: whole."""
    return Sharding(accelerator) if accelerator.distributed_type == DistributedType.DEEPSPEED else None


def partition(accelerator: Accelerator, network: nn.Module, blocks: nn.ModuleList) -> nn.Module | None:
    """Shard `network`, whose `blocks` are these, over the ranks when launched with DeepSpeed ZeRO-3, else do nothing.

    Returns the DeepSpeed engine, which must outlive training; the network itself is called as before, its hooks
    gather a whole transformer block when it runs. Parameters keep their dtypes.
    """
    if accelerator.distributed_type != DistributedType.DEEPSPEED:
        return None
    from deepspeed.utils import set_z3_leaf_modules

    set_z3_leaf_modules(network, [type(blocks[0])])
    engine = accelerator.prepare(network)
    assert is_partitioned(network), "ZeRO-3 left parameters whole"
    return engine


def release(engine: nn.Module | None) -> None:
    """Free what ZeRO-3 gathered for modules whose input carried no gradient: their own release never comes."""
    if engine is not None:
        engine.optimizer.release_backward_leftovers()


def is_partitioned(network: nn.Module) -> bool:
    """Whether each rank holds only its part of every parameter."""
    return all(getattr(p, "ds_tensor", None) is not None and p.numel() == 0 for p in network.parameters())


def average_(tensors: list[Tensor]) -> None:
    """Replace each tensor by its mean over the ranks, in place, with one all-reduce. All on one device and of one
    dtype."""
    if _alone():
        return
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    for tensor, part in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
        tensor.copy_(part.view_as(tensor))


def _alone() -> bool:
    return not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1


def any_rank(flag: bool, device: torch.device) -> bool:
    """Whether `flag` is true on at least one rank; the same answer on all."""
    if _alone():
        return flag
    value = torch.tensor([float(flag)], device=device)
    average_([value])
    return bool(value.item() > 0)


@contextmanager
def together(device: torch.device) -> Iterator[None]:
    """A ValueError or OSError inside, on whichever rank, ends all: see `stop_together`. Enter on every rank."""
    problem = None
    try:
        yield
    except (ValueError, OSError) as error:
        problem = error
    stop_together(problem, device)


def stop_together(problem: Exception | None, device: torch.device) -> None:
    """Raise `problem` on the rank that has one and end the others without a word, status 1. Call on every rank."""
    if any_rank(problem is not None, device):
        raise problem or SystemExit(1)
