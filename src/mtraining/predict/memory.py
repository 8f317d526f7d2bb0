"""What a training step will take of a GPU's memory, before any GPU is touched.

Activations are measured on the meta device (`mtraining.predict.trace`); parameters, their gradients and the
optimizer's state follow from FSDP2's sharding. A step has a few moments that may be its peak; the highest one counts.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from inspect import signature
from typing import Any

import torch
from torch import nn

from mtraining.errors import UserError
from mtraining.kernel.reference.attention import accumulation_dtype
from mtraining.layout import Layout
from mtraining.model import parallelize
from mtraining.model.adapters import adapted_like
from mtraining.model.allocator import EXPANDABLE, VARIABLES, reserve_share, segments_expand, slack_share
from mtraining.model.fixed_rope import fix_rope
from mtraining.model.products import MLP, PROJECTIONS, mark_products
from mtraining.model.recompute import ATTENTION, LayerPolicy, layer_policies, runs
from mtraining.model.support import head_dim_of, layers_of
from mtraining.model.windows import band, windows_of
from mtraining.pattern import Pattern
from mtraining.predict.fused import float8_shapes, fuse_shapes
from mtraining.predict.moments import FULL, moment_bytes, update_bytes
from mtraining.predict.trace import LAYERS, META, Trace, shape_call, trace
from mtraining.sizes import size_text

GIB = 2**30
# What PyTorch does not count: the CUDA context, NCCL's buffers, loaded kernels. Seen on two H100s: 1.99 GiB. NCCL takes
# more for more ranks.
OUTSIDE = 2.5 * GIB
_OFFLOAD_MOVING = 2  # offloaded layers whose kept tensors are on the device, on their way
_OFFLOADED = ("kept: layer inputs", "kept: attention outputs")


@dataclass(frozen=True)
class Workload:
    """One training step, as far as memory goes.

    Attributes:
        hf_model: the whole transformers model, on any device (meta will do).
        world: ranks that share parameters (dp x cp).
        ring: (outer, inner) ranks that share a sequence.
        batch: sequences that a rank's forward takes at once.
        accumulation: micro-batches a step; gradients then outlive a backward.
        patterns: of the layers, and of steps that have others; the one with most columns counts, and a dense one.
        recompute: a name of `mtraining.model.recompute.RECOMPUTE`, or the policy of each layer, which says too what is
            offloaded.
        compute: dtype of activations and gathered parameters; ``reduce``: of gradients while they are summed.
        float8: products of layers; what ``emulated`` allocates besides is not counted.
        optimizer_state: where AdamW's moments are and in what form (`mtraining.predict.moments`).
    """

    hf_model: Any
    world: int
    ring: tuple[int, int]
    seq_len: int
    batch: int
    accumulation: int
    patterns: Sequence[Pattern]
    layout: Layout
    recompute: str | Sequence[LayerPolicy]
    offload: bool
    fused: str
    compute: torch.dtype
    loss_chunk: int = signature(parallelize).parameters["loss_chunk"].default
    reduce: torch.dtype = torch.float32
    float8: str = "off"
    optimizer_state: str = FULL

    @property
    def policies(self) -> list[LayerPolicy]:
        """What each layer keeps."""
        return layer_policies(self.recompute, self.offload, len(layers_of(self.hf_model)))


@dataclass(frozen=True)
class Prediction:
    """Bytes on the rank that takes most, at the highest moment of a step.

    Attributes:
        moment: which one it is. components: what is there then, by name; they add up to the peak. moments: the total
        of every moment. attention: what one pass of ring attention has at a time (keys in flight, sums in fp32,
        columns). It is a part of a layer's working set, at the peak or at another moment. host: pinned host memory
        that a rank takes for AdamW's moments. work: what needs the memory, as the subject of a sentence. remedies:
        what a user may do where there is too little.
    """

    moment: str
    components: dict[str, float]
    moments: dict[str, float]
    attention: float
    host: float = 0.0
    work: str = "a step"
    remedies: str = (
        "train.recompute=full, train.offload=true, train.optimizer_state=8bit or offload, more GPUs (parallel.cp), or "
        "a shorter train.seq_len"
    )

    @property
    def peak(self) -> float:
        return sum(self.components.values())

    @property
    def reserve(self) -> float:
        """What must be free beside the peak, since the allocator's memory breaks into pieces; the environment's options
        of PyTorch's allocator decide how much (`mtraining.model.allocator`)."""
        return reserve_share() * self.peak

    @property
    def needed(self) -> float:
        """What a GPU must have: the peak, the reserve and what PyTorch does not count."""
        return self.peak + self.reserve + OUTSIDE

    @property
    def wanted(self) -> float:
        """What a GPU should have, so that PyTorch never runs short: more is kept free than in ``needed``."""
        return (1 + slack_share()) * self.peak + OUTSIDE

    def check(self, memory: float) -> None:
        """Refuse what ``memory`` bytes cannot hold, the reserve included.

        Raises:
            UserError: with the remedies.
        """
        if self.needed <= memory:
            return
        expand = "" if segments_expand() else f"{VARIABLES[0]}={EXPANDABLE}, "
        raise UserError(
            f"{self.work} needs {size_text(self.needed)} on each GPU ({self.moment}; {size_text(self.reserve)} of them "
            f"for memory that breaks into pieces) and there are {size_text(memory)}: use {expand}{self.remedies}."
        )

    def table(self) -> list[tuple[str, float]]:
        """(component, bytes) at the peak, the peak, what comes on top, and all that a GPU must have."""
        return [
            *self.components.items(),
            (f"peak, {self.moment}", self.peak),
            ("of a layer, ring attention at most", self.attention),
            ("kept free: memory breaks into pieces", self.reserve),
            ("beside PyTorch: CUDA context, NCCL", OUTSIDE),
            ("needed", self.needed),
            *([("in host memory, pinned: optimizer state", self.host)] if self.host else []),
        ]


RUNS_SHORT = "PyTorch may give memory back and take it anew, and steps are slower then"


class Unpredictable(UserError):
    """A model whose own code cannot run on shapes alone."""


class Traces:
    """Activations of a workload's layers under one policy or another; each is traced once.

    Args:
        work: its own way to recompute does not matter here.
    """

    def __init__(self, work: Workload) -> None:
        self.work, self.sizes = work, _Parameters.of(work)
        self._found: dict[LayerPolicy, Trace] = {}

    def of(self, policy: LayerPolicy) -> Trace:
        """Of layers that all have ``policy``, none of them offloaded.

        Raises:
            Unpredictable: the model's code reads numbers, as some that route tokens do.
        """
        policy = replace(policy, offload=False)
        if policy not in self._found:
            seen = [
                _traced(self.work, policy, self.sizes.largest, pattern) for pattern in _hungriest(self.work)
            ]
            self._found[policy] = Trace.highest(seen)
        return self._found[policy]

    def kept(self, policy: LayerPolicy) -> dict[str, float]:
        """Bytes that one layer keeps, by kind."""
        kept = float(self.of(policy).kept)
        if policy.everything:
            return {"kept: everything": kept}
        found = {}
        if ATTENTION in policy.parts:
            found["kept: attention outputs"] = _attention_outputs(self.work)
        attention = policy.parts & {ATTENTION}
        if policy.parts != attention:
            found["kept: products of matrices"] = kept - self.of(LayerPolicy(attention)).kept
        return {"kept: layer inputs": kept - sum(found.values())} | found


def predict(work: Workload, traces: Traces | None = None) -> Prediction:
    """The peak of a step once the optimizer has its state, that is from the second step on.

    Args:
        traces: of this workload, where some were made before.

    Raises:
        Unpredictable: the model's code reads numbers, as some that route tokens do.
    """
    traces = Traces(work) if traces is None else traces
    sizes = traces.sizes
    layers, outlives = sizes.layers, work.accumulation > 1
    compute, reduce = work.compute.itemsize, work.reduce.itemsize
    owned, gathered = _owned(work, sizes), _gathered(work, sizes)
    trained = sizes.trained_bytes / work.world
    # Of the layer whose backward runs; and of the one before it, on their way round.
    whole = {"gradients (whole, of a layer)": compute * sizes.trained_layer}
    summed = {"gradients being summed": reduce * sizes.trained_layer} if layers > 1 else {}
    spans = runs(work.policies)

    def shards(done: int) -> dict[str, float]:
        """Gradients of the layers whose backward is done."""
        share = 1.0 if outlives else done * sizes.trained_layer / sizes.trained
        return {"gradients (shard)": share * trained}

    def activations(name: str, number: int, peak: float, counted: int) -> dict[str, float]:
        """What layers up to a number keep, and the rest of a ``peak`` that has what so many traced ones keep."""
        own = traces.of(work.policies[number]).kept
        return _held(traces, spans, number) | {name: peak - counted * own}

    forward, loss, backward = (
        owned | gathered | shards(0),
        owned | gathered | shards(0),
        owned | gathered | whole,
    )
    moments = {"in the loss": loss | activations("loss", layers - 1, traces.of(spans[-1][2]).loss, LAYERS)}
    layer = "working set of a layer"
    # Within a run of layers with one policy, memory rises or falls steadily: its ends tell.
    for first, end, policy in spans:
        seen = traces.of(policy)
        moments[f"in {_named(end, layers)} forward"] = forward | activations(layer, end, seen.forward, LAYERS)
        if end == layers - 1:
            moments["in the last layer's backward"] = (
                backward | shards(0) | activations(layer, end, seen.backward, LAYERS)
            )
        for number in sorted({first, end}):
            if number < layers - 1 or layers == 1:
                moments[f"in {_named(number, layers, first=True)} backward"] = (
                    backward | summed | shards(layers - 1 - number) | activations(layer, number, seen.last, 1)
                )
    moments["when the embeddings' gradients are summed"] = (
        owned | shards(layers)
        | {"gathered parameters": compute * sizes.root}
        | {"gradients being summed": (compute + reduce) * sizes.trained_root}
    )  # fmt: skip
    update = {"update of moments": sizes.update} if sizes.update else {}
    moments["in the optimizer"] = owned | {"gradients (shard)": trained} | update
    totals = {name: sum(parts.values()) for name, parts in moments.items()}
    moment = max(totals, key=lambda name: totals[name])
    attention = max(traces.of(policy).attention for _, _, policy in spans)
    return Prediction(moment, dict(moments[moment]), totals, attention, sizes.host / work.world)


def _named(number: int, layers: int, first: bool = False) -> str:
    """A layer, as a possessive; of a model with one layer, that one is called first or last."""
    if number == layers - 1 and not (first and layers == 1):
        return "the last layer's"
    return f"layer {number}'s" if number else "the first layer's"


def _held(traces: Traces, spans: Sequence[tuple[int, int, LayerPolicy]], number: int) -> dict[str, float]:
    """Bytes on the device that layers up to ``number`` keep, by kind."""
    found: dict[str, float] = {}
    moving = _OFFLOAD_MOVING
    for first, end, policy in reversed(spans):
        layers = min(end, number) - first + 1
        if layers <= 0:
            continue
        here = min(layers, moving) if policy.offload else layers
        moving -= here if policy.offload else 0
        for name, size in traces.kept(policy).items():
            found[name] = found.get(name, 0.0) + size * (here if name in _OFFLOADED else layers)
    return found


def standing(work: Workload) -> dict[str, float]:
    """What is on a rank during any forward, without activations and gradients: its shards, and gathered parameters."""
    sizes = _Parameters.of(work)
    return _owned(work, sizes) | _gathered(work, sizes)


def _owned(work: Workload, sizes: _Parameters) -> dict[str, float]:
    state = {"optimizer state (shard)": sizes.state / work.world} if sizes.state else {}
    return {"parameters (shard)": sizes.stored / work.world} | state


def _gathered(work: Workload, sizes: _Parameters) -> dict[str, float]:
    """The layer that runs, and the next one on its way."""
    return {"gathered parameters": work.compute.itemsize * (sizes.root + min(2, sizes.layers) * sizes.layer)}


@dataclass(frozen=True)
class _Parameters:
    """Numbers of parameters: of the largest layer (``largest`` is its number) and of FSDP's root unit; ``stored``:
    bytes of all. The same of those that are trained, and so have gradients and moments. ``state``, ``host``: bytes of
    all moments, on devices and in host memory; ``update``: what updating them takes of a rank's device besides."""

    layers: int
    largest: int
    layer: int
    root: int
    stored: int
    trained_layer: int
    trained_root: int
    trained: int
    trained_bytes: int
    state: float
    host: float
    update: float

    @staticmethod
    def of(work: Workload) -> _Parameters:
        model = work.hf_model
        layers = [_counts(layer) for layer in layers_of(model)]
        largest = max(range(len(layers)), key=lambda number: layers[number][0])
        (total, trained), (layer, trained_layer) = _counts(model), layers[largest]
        moved = [p for p in model.parameters() if p.requires_grad]
        state, host = moment_bytes(work.optimizer_state, moved)
        return _Parameters(
            layers=len(layers),
            largest=largest,
            layer=layer,
            root=total - sum(one for one, _ in layers),
            stored=sum(p.numel() * p.element_size() for p in model.parameters()),
            trained_layer=trained_layer,
            trained_root=trained - sum(one for _, one in layers),
            trained=trained,
            trained_bytes=sum(p.numel() * p.element_size() for p in moved),
            state=state,
            host=host,
            update=update_bytes(work.optimizer_state, moved, work.world),
        )


def _counts(module: nn.Module) -> tuple[int, int]:
    """Numbers of parameters, and of those that are trained."""
    sizes = [(p.numel(), p.numel() * p.requires_grad) for p in module.parameters()]
    return sum(one for one, _ in sizes), sum(one for _, one in sizes)


def _hungriest(work: Workload) -> list[Pattern]:
    """Those of a workload's patterns that may take most: the one with most columns; a dense one, whose kernel has
    results of its own."""
    most = widest(work.hf_model, work.patterns, work.seq_len)
    dense = [pattern for pattern in work.patterns if pattern.name == "dense"]
    return [most] if most.name == "dense" else [most, *dense[:1]]


def _traced(work: Workload, policy: LayerPolicy, largest: int, pattern: Pattern) -> Trace:
    """Activations of a short model of the same shape, on the meta device, with layers like number ``largest``."""
    short = shortened(work.hf_model, largest).to(work.compute)
    fix_rope(short, work.seq_len)
    model = parallelize(
        short,
        pattern=pattern,
        layout=work.layout,
        recompute=[policy] * LAYERS,
        loss_chunk=work.loss_chunk,
    )
    if not policy.parts & {PROJECTIONS, MLP}:
        mark_products(short)  # for what recompute repeats of them
    if work.fused != "none":
        fuse_shapes(short)
        model.compiled_loss = True
    if work.float8 != "off":
        float8_shapes(short, whole=work.fused == "compile")
    heads, ring = short.config.num_attention_heads, work.ring
    call = shape_call(
        pattern, work.layout, ring, work.seq_len, work.batch, heads, columns_of(pattern, work.seq_len)
    )
    with on_shapes(short, "run two steps, after which the log tells the measured peak"):
        return trace(model, call, work.batch, work.seq_len // (ring[0] * ring[1]))


@contextmanager
def on_shapes(hf_model: Any, remedy: str) -> Iterator[None]:
    """Run a meta model inside.

    Raises:
        Unpredictable: the model's own code reads numbers.
    """
    try:
        yield
    except (NotImplementedError, RuntimeError) as error:
        if "meta" not in str(error):
            raise
        raise Unpredictable(
            f"memory cannot be predicted for {hf_model.config.model_type}, whose own code reads numbers where only "
            f"shapes are known; {remedy}."
        ) from error


def shortened(hf_model: Any, largest: int) -> Any:
    """A model of :data:`LAYERS` layers, each like number ``largest`` of ``hf_model``: experts may begin after a few."""
    config, depth = copy.deepcopy(hf_model.config), len(layers_of(hf_model))
    config.num_hidden_layers = largest + 1
    config._attn_implementation = "eager"  # not yet ours: parallelize sets that
    # A run on its way to the same weights on every rank is not disturbed.
    with torch.random.fork_rng(devices=[]), META:
        model = adapted_like(type(hf_model)(config), hf_model)
    layers, shared = layers_of(model), {id(config): config}
    layer = layers[largest]
    del layers[:]
    layers.extend([layer, *(copy.deepcopy(layer, shared) for _ in range(LAYERS - 1))])
    config.num_hidden_layers = LAYERS
    for field, value in config.to_dict().items():
        if isinstance(value, list) and len(value) == depth:  # of each layer
            setattr(config, field, [value[largest]] * LAYERS)
    return model


def _attention_outputs(work: Workload) -> float:
    """Bytes of out and lse of a layer."""
    config = work.hf_model.config
    rows = work.batch * work.seq_len // (work.ring[0] * work.ring[1])
    lse = accumulation_dtype(work.compute).itemsize
    return rows * config.num_attention_heads * (head_dim_of(config) * work.compute.itemsize + lse)


def widest(hf_model: Any, patterns: Sequence[Pattern], seq_len: int) -> Pattern:
    """The pattern of most columns; a band without any where every layer has a window.

    A layer with a window is counted as one whose keys all travel, so it never takes more.
    """
    widest = max(patterns, key=lambda pattern: columns_of(pattern, seq_len))
    windows = windows_of(hf_model.config, len(layers_of(hf_model)))
    whole = [window for window in windows if window is not None]
    return band(whole[0], widest.block_size) if len(whole) == len(windows) else widest


def columns_of(pattern: Pattern, seq_len: int) -> int:
    """The most columns a head of ``pattern`` may keep: the capacity of its index."""
    if hasattr(pattern, "column_budget"):
        return min(pattern.column_budget(), seq_len)
    parts = [*getattr(pattern, "patterns", ()), *getattr(pattern, "heads", ())]
    if parts:
        return max(columns_of(part, seq_len) for part in parts)
    budgets = (getattr(pattern, name, None) for name in ("columns", "max_columns", "sinks"))
    return min(next((int(budget) for budget in budgets if budget is not None), 0), seq_len)
