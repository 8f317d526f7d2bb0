"""Seconds of a training step, from the shapes of a model and a GPU's measured rates.

A step is, for each layer, attention (a simulated ring), products of matrices, and what surrounds them. Then come the
loss and the optimizer. Transfers of parameters and gradients are hidden by the layer beside them; the rest is added.

Not counted: that a transfer takes multiprocessors from a kernel beside it, launching, the data loader, checkpoints.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from mtraining.errors import UserError
from mtraining.layout import Layout
from mtraining.model.products import MLP, PROJECTIONS
from mtraining.model.recompute import ATTENTION, LayerPolicy, layer_policies
from mtraining.model.support import attention_modules, decoder_of, head_dim_of
from mtraining.predict.measured import Link, Rates
from mtraining.predict.moments import EIGHT_BITS, FULL, OFFLOAD
from mtraining.predict.ring import Network, Simulated, simulate, slowed
from mtraining.predict.work import Index, LayerWork

# Numbers of the residual stream and of the gated MLP that one token of a layer reads and writes, (forward, backward):
# two norms, two sums and rotary positions; the gate reads two and writes one, its backward reads three, writes two.
AROUND_HIDDEN, AROUND_MLP = (10, 10), (3, 5)
# AdamW in fp32: the gradient is read for the norm, clipped, and read again; parameter and two moments read and written.
# Moments in 8 bits take a byte each; those in host memory are written to the device and read from it once more.
_OPTIMIZER_BYTES = {FULL: 36, EIGHT_BITS: 24, OFFLOAD: 52}
# A parameter copied to bf16 for forward and for backward (4 + 2 bytes each), its gradient to fp32 (2 + 4).
_SHARD_COPY_BYTES = 18


@dataclass(frozen=True)
class ModelShape:
    """What time depends on.

    Attributes:
        linear: parameters of the products of a layer; ``projections``: those in its attention module.
        last: of them, those of its last product, which eager recompute leaves out: nobody needs what it gives.
        layer: parameters of a layer, ``total``: of the model.
        mlp: width of the gated MLP.
    """

    layers: int
    hidden: int
    mlp: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    linear: int
    projections: int
    last: int
    layer: int
    total: int

    @staticmethod
    def of(hf_model: Any) -> ModelShape:
        """Of a transformers model, on any device.

        Raises:
            UserError: a mixture of experts: which products a token takes is not in the shapes.
        """
        config = hf_model.config
        experts = [
            name
            for name in ("num_experts", "num_local_experts", "n_routed_experts")
            if getattr(config, name, 0)
        ]
        if experts:
            raise UserError(
                f"plan: {config.model_type} routes tokens to experts ({experts[0]}), whose time was not measured; plan "
                "for a model without experts, or time one layer with `mtraining bench train`."
            )
        layers = decoder_of(hf_model).layers

        def products(module: nn.Module) -> list[int]:
            return [one.weight.numel() for one in module.modules() if isinstance(one, nn.Linear)]

        linear, (_, attention) = products(layers[0]), next(attention_modules(hf_model))
        return ModelShape(
            layers=len(layers),
            hidden=config.hidden_size,
            mlp=config.intermediate_size,
            heads=config.num_attention_heads,
            kv_heads=config.num_key_value_heads,
            head_dim=head_dim_of(config),
            vocab=config.vocab_size,
            linear=sum(linear),
            projections=sum(products(attention)),
            last=linear[-1],
            layer=sum(p.numel() for p in layers[0].parameters()),
            total=sum(p.numel() for p in hf_model.parameters()),
        )


@dataclass(frozen=True)
class Setting:
    """How a step is spread and what it keeps.

    Attributes:
        dp: sequences at a time; cp: ranks that share one, in ``outer`` rings.
        recompute: a name of `mtraining.model.recompute.RECOMPUTE`, or ``auto`` with the policies that were chosen.
        optimizer_state: where AdamW's moments are and in what form.
    """

    dp: int
    cp: int
    outer: int
    layout: Layout
    recompute: str = "keep_attention"
    offload: bool = False
    fused: str = "liger"
    policies: tuple[LayerPolicy, ...] | None = None
    optimizer_state: str = FULL

    def by_layer(self, layers: int) -> Sequence[LayerPolicy]:
        """The policy of each of so many layers."""
        return self.policies or layer_policies(self.recompute, self.offload, layers)

    @property
    def world(self) -> int:
        return self.dp * self.cp


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step, by part; the parts add up.

    Attributes:
        forward, backward: one layer's pass over the ring, simulated.
    """

    parts: dict[str, float]
    forward: Simulated
    backward: Simulated

    @property
    def seconds(self) -> float:
        return sum(self.parts.values())


def attention_passes(
    work: LayerWork, outer: int, rates: Rates, network: Network, stragglers: list[float] | None = None
) -> tuple[Simulated, Simulated]:
    """One layer's forward and backward over the ring.

    Args:
        stragglers: how many times slower each rank is.
    """
    world = len(work.tiles)
    cost = work.cost(rates) if stragglers is None else slowed(work.cost(rates), stragglers)
    sizes = work.messages()
    forward = simulate(outer, world // outer, "forward", cost, sizes, network, watched=world - 1)
    backward = simulate(outer, world // outer, "backward", cost, sizes, network, watched=world - 1)
    return forward, backward


def step_time(
    shape: ModelShape, index: Index, setting: Setting, rates: Rates, network: Network,
    passes: tuple[Simulated, Simulated] | None = None, estimated: bool = True,
) -> StepTime:  # fmt: skip
    """A step of one sequence for each of ``setting.dp`` groups.

    Args:
        passes: of a layer's attention, where they were simulated before.
        estimated: whether an index is estimated in each layer; a dense index never is.

    Raises:
        UserError: rates that are needed and were not measured.
    """
    if passes is None:
        work = LayerWork.of(index, setting.layout, setting.cp, shape.heads, shape.kv_heads, shape.head_dim)
        passes = attention_passes(work, setting.outer, rates, network)
    forward, backward = passes
    tokens = index.seq_len // setting.cp
    flops = 1e12 * rates.matmul_tflops
    logit, around = rates.around(setting.fused)
    policies = setting.by_layer(shape.layers)
    # Means over layers. A compiled layer is recomputed to its end, an eager one up to the last tensor that backward
    # needs.
    again = sum(not policy.everything for policy in policies) / shape.layers
    unneeded = shape.last if setting.fused != "compile" else 0
    repeated = sum(_repeated(shape, policy, unneeded) for policy in policies) / shape.layers
    attended = sum(policy.everything or ATTENTION in policy.parts for policy in policies) / shape.layers
    products = [2 * shape.linear * tokens / flops, (4 * shape.linear + 2 * repeated) * tokens / flops]
    # Activations are in two bytes.
    traffic = [2 * (AROUND_HIDDEN[i] * shape.hidden + AROUND_MLP[i] * shape.mlp) for i in range(2)]
    surround = [tokens * traffic[0] / around, tokens * (traffic[1] + again * traffic[0]) / around]
    estimate = 0.0 if index.dense or not estimated else 1e-9 * rates.estimate_ns * tokens * shape.heads
    replay = forward.seconds * (1 - attended)
    layer = [
        products[0] + surround[0] + forward.seconds + estimate,
        products[1] + surround[1] + backward.seconds + replay,
    ]
    parts = {
        "attention forward": shape.layers * forward.seconds,
        "attention backward": shape.layers * backward.seconds,
        "attention again, for recompute": shape.layers * replay,
        "estimation": shape.layers * estimate,
        "products of layers": shape.layers * sum(products),
        "norms, rotary, gated MLP": shape.layers * sum(surround),
        "loss": tokens * shape.vocab * (6 * shape.hidden / flops + logit),
        "optimizer": _optimizer(shape, setting, rates),
        "parameters not hidden": _sharding(shape, setting.world, network, layer),
    }
    if any(policy.offload for policy in policies):
        parts["offload not hidden"] = _offload(shape, policies, tokens, rates, layer)
    return StepTime({name: seconds for name, seconds in parts.items() if seconds}, forward, backward)


def _optimizer(shape: ModelShape, setting: Setting, rates: Rates) -> float:
    """The update, and copies of parameters and gradients between dtypes.

    Raises:
        UserError: moments in host memory, and the host's rate was not measured.
    """
    bytes_ = _OPTIMIZER_BYTES[setting.optimizer_state] * shape.total / setting.world
    device = (bytes_ + _SHARD_COPY_BYTES * shape.total) / (1e9 * rates.memory_gb_per_s)
    if setting.optimizer_state != OFFLOAD:
        return device
    # Two moments in fp32; the way back is beside the way in.
    return device + 8.0 * shape.total / setting.world / _host_rate(rates, "optimizer_state: offload")


def _host_rate(rates: Rates, what: str) -> float:
    """Bytes a second."""
    if rates.host_gb_per_s is None:
        raise UserError(
            f"plan: copies to host memory were not measured on {rates.gpu}, so {what} cannot be planned; leave it "
            "out, or measure with `mtraining bench rates`."
        )
    return 1e9 * rates.host_gb_per_s


def _sharding(shape: ModelShape, world: int, network: Network, layer: list[float]) -> float:
    """Gathers of parameters, in bf16 in each pass, and sums of gradients, in fp32, that no layer hides."""
    if world == 1:
        return 0.0
    gather, total = 2.0 * shape.layer, 4.0 * shape.layer
    root = 6.0 * (shape.total - shape.layers * shape.layer)
    forward, backward = (shard_seconds(size, world, network) for size in (gather, gather + total))
    return shard_seconds(root, world, network) + shape.layers * (
        max(0.0, forward - layer[0]) + max(0.0, backward - layer[1])
    )


def shard_seconds(size: float, world: int, network: Network) -> float:
    """An all-gather or reduce-scatter of ``size`` bytes over all GPUs: a ring through each node, over every GPU's link
    to the next node at once."""
    seconds = network.intra.seconds(size * (world - 1) / world)
    if world > network.node_size:
        across = size * (world - 1) / world / network.node_size
        seconds = max(seconds, network.inter.seconds(across))
    return seconds


def _repeated(shape: ModelShape, policy: LayerPolicy, unneeded: int) -> int:
    """Parameters of the products that recompute repeats in a layer; of all but ``unneeded`` where none is kept."""
    if policy.everything:
        return 0
    projections = 0 if PROJECTIONS in policy.parts else shape.projections
    return projections + (0 if MLP in policy.parts else shape.linear - shape.projections - unneeded)


def _offload(
    shape: ModelShape, policies: Sequence[LayerPolicy], tokens: int, rates: Rates, layer: list[float]
) -> float:
    """Copies of what layers keep that no layer hides.

    Raises:
        UserError: the host's rate was not measured.
    """
    total, rate = 0.0, _host_rate(rates, "offload")
    for policy in policies:
        if policy.offload:
            attention = shape.heads * (2 * shape.head_dim + 4) if ATTENTION in policy.parts else 0
            seconds = tokens * (2.0 * shape.hidden + attention) / rate
            total += sum(max(0.0, seconds - beside) for beside in layer)
    return total


def one_machine(rates: Rates, gpus: int) -> Network:
    """The GPUs of one machine, by their measured link.

    Raises:
        UserError: several GPUs, whose link was not measured.
    """
    if rates.intra is None and gpus > 1:
        raise UserError(
            f"plan: links between {rates.gpu}s of a machine were not measured; give --intra, such as --intra 300GB/s."
        )
    link = rates.intra or Link.of_rate(torch.inf)
    return Network(gpus, link, link)
