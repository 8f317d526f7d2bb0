"""AdamW and the global gradient norm, for plain and for sharded (DTensor) parameters alike."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from mtraining.predict.moments import EIGHT_BITS, OFFLOAD, block_of
from mtraining.train.moments import AdamW8bit, OffloadedAdamW

if TYPE_CHECKING:
    from mtraining.train.config import TrainSection


def build_optimizer(model: nn.Module, options: TrainSection, device: torch.device) -> torch.optim.AdamW:
    """AdamW over every trainable parameter; weight decay spares vectors (norms and biases).

    `options.optimizer_state` says where the moments are and in what form. `full` is fused: one kernel, which
    `step_where_finite` can hold back on the device itself; on the meta device there is none.

    Raises:
        UserError: a package or memory that is missing.
    """
    trainable = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.ndim >= 2], "weight_decay": options.weight_decay},
        {"params": [p for p in trainable if p.ndim < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    adam: dict[str, Any] = {"lr": options.lr, "betas": options.betas, "eps": options.eps}
    adam["fused"] = device.type != "meta"
    if options.optimizer_state == EIGHT_BITS:
        return AdamW8bit(groups, compiled=device.type == "cuda", **adam)
    if options.optimizer_state == OFFLOAD:
        return OffloadedAdamW(groups, **adam)
    return torch.optim.AdamW(groups, **adam)


def state_sentence(options: TrainSection, model: nn.Module) -> str:
    """For the log: which share of the moments `optimizer_state: 8bit` holds in 8 bits; empty for other forms."""
    if options.optimizer_state != EIGHT_BITS:
        return ""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    blocked = sum(parameter.numel() for parameter in trained if block_of(parameter.shape))
    total = sum(parameter.numel() for parameter in trained)
    return (
        f"optimizer state: {blocked / total:.1%} of the moments in 8 bits, the rest (vectors, small parameters, and "
        "rows that do not come in blocks of 64) in fp32"
    )


@contextmanager
def options_kept(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """What is loaded inside gives moments and step counts; betas, eps, weight decay and how updates are computed stay
    what this run's configuration has made them."""
    options = [
        {name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups
    ]
    yield
    for group, own in zip(optimizer.param_groups, options, strict=True):
        group.update(own)


def updates_lost(parameters: Iterable[nn.Parameter], lr: float) -> torch.Tensor:
    """How many weights stay what they are when `lr`, the size of one AdamW update, is added to them or taken away.

    Returns:
        float64 (parameters, 2), on their device: how many of this process's weights, and how many it has.
    """
    rows = []
    for parameter in parameters:
        weights = (parameter.to_local() if isinstance(parameter, DTensor) else parameter).detach()
        lost = ((weights + lr == weights) & (weights - lr == weights)).sum()
        rows.append(torch.stack([lost, torch.full_like(lost, weights.numel())]))
    return torch.stack(rows).double()


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set one learning rate for every parameter group."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def gradient_norm(parameters: Iterable[nn.Parameter]) -> torch.Tensor:
    """The 2-norm of all gradients over all ranks, an fp32 scalar equal on every rank. Collective when sharded."""
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def layer_gradient_norms(layers: nn.ModuleList) -> torch.Tensor:
    """:func:`gradient_norm` of each layer: fp32 (layers,), 0 for one without gradients.

    Collective when sharded: one sum over the shards for all layers together.
    """
    grads = [
        (place, p.grad)
        for place, layer in enumerate(layers)
        for p in layer.parameters()
        if p.grad is not None
    ]
    if not grads:
        return torch.zeros(len(layers))
    local = [grad.to_local() if isinstance(grad, DTensor) else grad for _, grad in grads]
    squares = torch.stack(torch._foreach_norm(local, 2, torch.float32)).square().unbind()
    # By the groups over which shards are to be summed: as a rule one, and none without sharding.
    by_groups: dict[tuple[Any, ...], list[list[torch.Tensor]]] = {}
    for (place, grad), square in zip(grads, squares, strict=True):
        by_groups.setdefault(_shard_groups(grad), [[] for _ in layers])[place].append(square)
    found = squares[0].new_zeros(len(layers))
    for groups, of_layers in by_groups.items():
        zero = found.new_zeros(())
        sums = torch.stack([torch.stack(of_layer).sum() if of_layer else zero for of_layer in of_layers])
        for group in groups:
            torch.distributed.all_reduce(sums, group=group)
        found += sums
    return found.sqrt()


def _shard_groups(grad: torch.Tensor) -> tuple[Any, ...]:
    """Process groups over which a gradient is cut."""
    if not isinstance(grad, DTensor):
        return ()
    assert not any(placement.is_partial() for placement in grad.placements), "reduce gradients first"
    mesh = grad.device_mesh
    return tuple(mesh.get_group(dim) for dim, placement in enumerate(grad.placements) if placement.is_shard())


def clip_gradients(parameters: Iterable[nn.Parameter], norm: torch.Tensor, limit: float | None) -> None:
    """Scale all gradients so that their global norm is at most `limit`; None leaves them alone, and so does a norm that
    is not finite, so that one can still see where they went wrong."""
    if limit is not None:
        usable = torch.where(norm.isfinite(), norm, torch.zeros_like(norm))
        torch.nn.utils.clip_grads_with_norm_(parameters, limit, usable)


def step_where_finite(optimizer: torch.optim.AdamW, finite: torch.Tensor) -> None:
    """Update if `finite` (0-d bool, on the parameters' device) is true, else change nothing, moments and step counts
    included. The device decides: the host does not wait for the answer."""
    optimizer.found_inf = (~finite).float()  # type: ignore[attr-defined]  # what gradient scalers give to fused kernels
    optimizer.step()
