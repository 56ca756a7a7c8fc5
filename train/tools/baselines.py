"""What a preference step is measured against: the device's ceilings, plain code, and a copied reference."""

from functools import partial
from typing import Any

import torch
from diffusers.training_utils import cast_training_params
from peft import LoraConfig
from torch import Tensor, nn

from losses.flow_matching import flow_error, interpolate
from losses.preference import pairwise_bound
from train import gdpo
from train.backbones import find_architecture, text_tokens
from train.backbones.architecture import forward_flops, num_tokens, shape_of
from train.backbones.attention_kernels import kernels_on
from train.backbones.base import Backbone, Conditioning
from train.entry import first_line
from train.full_parameters import FullParameters
from train.lora_switch import targeted_layers
from train.tools.breakdown import seconds, sustained, time_step


class CopiedReference(FullParameters):
    """Full fine-tuning against a frozen copy, in whatever dtype the weights have: for speed, not for training."""

    def __init__(self, network: nn.Module):
        self.weights = dict(network.requires_grad_(True).named_parameters())
        self._frozen = {name: weight.detach().clone() for name, weight in self.weights.items()}


def measure_ceilings(config: Any, backbone: Backbone) -> dict[str, float]:
    """TFLOP/s of a matrix product and of attention, forward and backward, at the recipe's shapes; the best attention
    kernel counts."""
    shape, video = shape_of(backbone.architecture), config.video
    tokens = backbone.num_tokens(video.height, video.width, video.num_frames)
    heads, size, width, ffn = shape.heads, shape.width // shape.heads, shape.width, shape.ffn
    generator = torch.Generator(backbone.device).manual_seed(0)
    dtype = backbone.transformer.dtype

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
            for kind, measured in (("", partial(seconds, repeats=5)), ("_sustained", sustained)):
                rates[f"attention_{name}{kind}"] = flops / measured(forward, backbone.device) / 1e12
                rates[f"attention_{name}_backward{kind}"] = 2.5 * flops / measured(backward, backbone.device) / 1e12
        except Exception as error:  # as in `attention_seconds`: whatever another package's compiler raises
            print(f"attention kernel {name} does not run here: {first_line(error)}")
            del kernels[name]
    for kind in ("", "_backward", "_sustained", "_backward_sustained"):
        rates[f"attention{kind}"] = max(rates[f"attention_{name}{kind}"] for name in kernels)
    return rates


def forward_limit(config: Any, rates: dict[str, float], *, kind: str = "") -> float:
    """Seconds of one clip's forward pass at the measured rates (`kind`: "" or "_sustained"), matrix products and
    attention alone. config: with `backbone` and `video`."""
    matrix, attention = _flops(config)
    return (matrix / rates[f"matrix{kind}"] + attention / rates[f"attention{kind}"]) / 1e12


def limit(config: gdpo.Config, rates: dict[str, float], *, clips: int, kind: str = "") -> float:
    """Seconds of a step over `clips` clips likewise, nothing recomputed."""
    matrix, attention = _flops(config)
    backward = (matrix / rates[f"matrix{kind}"] + 2.5 * attention / rates[f"attention_backward{kind}"]) / 1e12
    return clips * (2 * forward_limit(config, rates, kind=kind) + backward)


def _flops(config: Any) -> tuple[float, float]:
    """Of one clip's forward pass: matrix products and attention."""
    architecture, video = find_architecture(config.backbone), config.video
    tokens = num_tokens(architecture, video.height, video.width, video.num_frames)
    return forward_flops(architecture, tokens, text_tokens(config.backbone))


def plain(config: gdpo.Config, backbone: Backbone, batch: dict[str, Tensor], repeats: int) -> dict[str, Any]:
    """What diffusers and peft give without this project: add_adapter, gradient checkpointing, winner and loser in one
    pass. backbone: with attention="native"; batch: of one loser, whose terms are not read."""
    network = backbone.transformer
    rank, alpha = config.lora.rank, config.lora.alpha
    targets = [name for name, _ in targeted_layers(network, config.lora)]
    network.add_adapter(LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets, init_lora_weights="gaussian"))
    cast_training_params(network)
    weights = [parameter for parameter in network.parameters() if parameter.requires_grad]
    network.train()
    network.enable_gradient_checkpointing()
    clips = torch.cat([batch["winner"].unsqueeze(1), batch["losers"]], dim=1)[0]  # (2,C,F,H,W)
    noise, t, conditioning = batch["noise"][0], batch["t"].expand(2), Conditioning.of(batch).repeated(2)
    noisy = interpolate(clips, noise, t)
    given = backbone.network_arguments(noisy, backbone.timescale * t, conditioning, torch.bfloat16)
    optimizer = torch.optim.AdamW(weights, lr=config.optim.lr)

    def errors() -> Tensor:
        with torch.autocast(backbone.device.type, torch.bfloat16):
            velocity = network(**given, return_dict=False)[0]
        return flow_error(velocity, clips, noise)  # (2,)

    def run() -> None:
        with torch.no_grad():
            network.disable_adapters()
            reference = errors()
            network.enable_adapters()
        policy = errors()
        numbers = {"alpha": 0.75, "gamma": 2.66, "beta": config.objective.beta, "group_size": 1}
        loss = pairwise_bound(policy[:1], reference[:1], policy[1:], reference[1:], **numbers)
        loss.mean().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return time_step(run, backbone.device, repeats)
