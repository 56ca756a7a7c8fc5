"""The policy and its reference: what a step acts on, its passes over the clips of a batch, and their flow errors.

A batch of one group goes through the network clip by clip, and only one clip's activations are alive at a time: the
gradient of a loser's error is taken right after its pass and kept (`Settled`: a few hundred megabytes per loser), and
is weighted by the loss's gradient with respect to that error once all errors are known. The winner comes last, so that
the terms can read its pass. Several groups go through the network together.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from losses.flow_matching import flow_error, interpolate
from train.backbones.base import BOTH, Backbone, Conditioning
from train.backbones.fused.memory import waiting
from train.experts import as_one
from train.full_parameters import FullParameters
from train.lora_switch import LoraSwitch
from train.reference_cache import ReferenceCache
from train.timesteps import Turns
from train.weight_files import Trainable


class Reference(Protocol):
    """What holds the reference beside the weights that train: the LoRA switch, or a copy of all weights."""

    def parameters(self) -> list[nn.Parameter]:
        """The weights that train."""

    def reference(self) -> AbstractContextManager[None]:
        """Inside, the network is the reference, and gradients pass through it to its inputs."""

    def frozen_reference(self) -> AbstractContextManager[None]:
        """The same for passes whose gradients are not needed; detach what they give."""

    def share_graph(self) -> None:
        """Policy and reference run the same compiled graph. Call before the network is compiled."""

    def checkpoint(self, function: Callable, *args: Any) -> Any:
        """`torch.utils.checkpoint`, whose recompute runs policy or reference as the forward pass did."""


@dataclass
class Policy:
    """The backbone's transformer is the policy, and inside `switch.reference()` the reference. Where both experts
    train, a step's are those of the one that serves."""

    backbone: Backbone
    switch: Reference
    heads: nn.Module | None = None  # of the physics terms, where the recipe has any
    cache: ReferenceCache | None = None  # of the reference's errors
    turns: Turns | None = None  # of the experts, where both train

    def parameters(self) -> list[nn.Parameter]:
        """What a step returns gradients of, in this order: the adapters (or all weights), then the heads'."""
        return self.weights() + self.head_parameters()

    def networks(self) -> list[nn.Module]:
        """Those that train, in one step or another."""
        backbone = self.backbone
        return list(backbone.experts.values()) if backbone.trained == BOTH else [backbone.transformer]

    def weights(self) -> list[nn.Parameter]:
        """The adapters, or all weights."""
        if self.backbone.trained != BOTH:
            return self.switch.parameters()
        return [weight for name, weight in self.switch.weights.items() if name.startswith(self._prefix())]

    def head_parameters(self) -> list[nn.Parameter]:
        if self.heads is None or self.backbone.trained != BOTH:
            return self.all_heads()
        return [weight for name, weight in self.heads.named_parameters() if name.startswith(self._prefix())]

    def all_heads(self) -> list[nn.Parameter]:
        return [] if self.heads is None else list(self.heads.parameters())

    def _prefix(self) -> str:
        """What the names of the serving expert's weights begin with."""
        return f"{self.backbone.expert_folders[self.backbone.expert]}."


@dataclass
class Prediction:
    error: Tensor  # (N,) flow error of what is generated: an image that is held as the first frame has none
    x_t: Tensor  # (N,C,F,H,W) what the network saw
    velocity: Tensor  # (N,C,F,H,W) float32
    features: Tensor | None  # (N,D,F',H',W') of the block that the physics terms read

    def every(self, members: int) -> "Prediction":
        """The first of every `members` clips."""
        features = None if self.features is None else self.features[::members]
        return Prediction(self.error[::members], self.x_t[::members], self.velocity[::members], features)


def attach_parameters(config: Any, backbone: Backbone, *, keep_reference: bool) -> Trainable:
    """What trains: the recipe's adapters, or with train.parameters=full every weight, beside a copy of them for
    `keep_reference`. Adapters always have the network itself as their reference."""
    if config.train.parameters not in ("lora", "full"):
        raise ValueError(f"train.parameters={config.train.parameters!r}: must be lora or full")
    if config.train.parameters == "full":
        return FullParameters(backbone.transformer, keep_reference=keep_reference)
    network = as_one(backbone.experts) if backbone.trained == BOTH else backbone.transformer
    return LoraSwitch(network, config.lora, seed=config.seed, device=backbone.device)


def winner_passes(batch: dict[str, Tensor]) -> AbstractContextManager[None]:
    """Around passes over winners, the policy's and the reference's: they see a clip through the same graphs, which
    depend on the passes whose activations wait for their backward at once. Where a self-score is due, its judge's pass
    waits with the winner's."""
    return waiting(2 if "score_t" in batch else 1)


def predict(
    policy: Policy, clips: Tensor, noise: Tensor, batch: dict[str, Tensor], *, features_at: int | None = None
) -> Prediction:
    """One pass over clips (N,C,F,H,W) with their noise, at the batch's t and text; N is a multiple of its B groups,
    whose clips stand together."""
    copies = len(clips) // len(batch["t"])
    t = batch["t"].repeat_interleave(copies)
    conditioning = Conditioning.of(batch).repeated(copies)
    x_t, features = interpolate(clips, noise, t), None
    if features_at is None:
        velocity = policy.backbone.velocity(x_t, t, conditioning)
    else:
        velocity, features = policy.backbone.velocity(x_t, t, conditioning, features_at=features_at)
    error = flow_error(*map(conditioning.generated, (velocity, clips, noise)))
    return Prediction(error, x_t, velocity, features)


def reference_errors(policy: Policy, batch: dict[str, Tensor]) -> Tensor:
    """Flow errors (B,1+M') of the batch's clips under the reference, the winner's first, without a graph; from the
    policy's cache where it knows them."""
    if policy.cache is not None and (known := policy.cache.read(batch["position"])) is not None:
        return known
    with policy.switch.frozen_reference():
        errors = []
        for number, part in enumerate(_passes(batch)):
            with winner_passes(batch) if number == 0 else nullcontext():
                errors.append(predict(policy, *part, batch).error.detach())
    errors = torch.cat([error.view(len(batch["t"]), -1) for error in errors], dim=1)
    if policy.cache is not None:
        policy.cache.write(batch["position"], errors)
    return errors


@dataclass
class Settled:
    """A loser whose own graph is gone: its flow error (1,), a leaf of the loss's graph, and what that error's gradient
    with respect to the weights that train was."""

    error: Tensor
    gradients: tuple[Tensor, ...]


def policy_errors(
    policy: Policy, batch: dict[str, Tensor], *, features_at: int | None = None
) -> tuple[Tensor, Prediction, list[Settled]]:
    """Flow errors (B,1+M') of the batch's clips under the policy, the winner's first, with their gradient; the pass
    over the winners, with the features of block `features_at`; and the losers that went through the network alone."""
    first, *others = _passes(batch)
    weights, settled = policy.weights(), []
    for part in others:
        error = predict(policy, *part, batch).error
        settled.append(Settled(error.detach().requires_grad_(), torch.autograd.grad(error.sum(), weights)))
        del error  # and its graph, before the next pass
    with winner_passes(batch):
        prediction = predict(policy, *first, batch, features_at=features_at)
    groups = len(batch["t"])
    errors = [prediction.error, *(loser.error for loser in settled)]
    errors = torch.cat([error.view(groups, -1) for error in errors], dim=1)
    return errors, prediction.every(len(prediction.error) // groups), settled


def gradients(loss: Tensor, policy: Policy, settled: Sequence[Settled] = ()) -> list[Tensor]:
    """Gradients of `loss` () with respect to `policy.parameters()`, through the settled losers too."""
    weights = policy.parameters()
    found = torch.autograd.grad(loss, [*weights, *(loser.error for loser in settled)])
    total, coefficients = list(found[: len(weights)]), found[len(weights) :]
    for loser, coefficient in zip(settled, coefficients, strict=True):
        for sum_, gradient in zip(total, loser.gradients, strict=False):  # heads come last and have no part in it
            sum_.addcmul_(gradient, coefficient.squeeze())
    return total


def _passes(batch: dict[str, Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Clips (N,C,F,H,W) and their noise for each pass: all of several groups, or each of a group alone, the winner's
    first."""
    both = torch.cat([batch["winner"].unsqueeze(1), batch["losers"]], dim=1), batch["noise"]  # (B,1+M',C,F,H,W)
    clips, noise = (tensor.flatten(0, 1) for tensor in both)
    size = 1 if len(batch["t"]) == 1 else len(clips)
    return list(zip(clips.split(size), noise.split(size), strict=True))
