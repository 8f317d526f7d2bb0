"""What each layer should keep, so that a step fits a GPU and repeats as little as it can: `train.recompute: auto`.

A part of a layer saves the time of computing it again and costs the bytes that it takes. Parts are kept in the order of
seconds saved per byte, each by as many layers as fit. The last layers keep most: their backward comes first, and what
it frees is there when the first layers are recomputed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from mtraining.errors import UserError
from mtraining.model.allocator import reserve_share, slack_share
from mtraining.model.products import MLP, PROJECTIONS
from mtraining.model.recompute import ATTENTION, LayerPolicy, runs
from mtraining.model.support import head_dim_of, layers_of
from mtraining.pattern import Pattern
from mtraining.predict.measured import Rates
from mtraining.predict.memory import (
    OUTSIDE,
    RUNS_SHORT,
    Prediction,
    Traces,
    Workload,
    columns_of,
    predict,
    widest,
)
from mtraining.predict.step_time import AROUND_HIDDEN, AROUND_MLP
from mtraining.sizes import size_text

_TILE = 128
_EVERYTHING = "everything"
_GUESSED_DENSITY = 0.05  # of a pattern that decides by what it sees
_WORDS = {ATTENTION: "attention", PROJECTIONS: "its products", MLP: "MLP inner"}


class Room(NamedTuple):
    """What a step may take of a GPU: bytes of its ``peak`` without ever running short, the ``most`` that fits at all,
    and all of the GPU's ``memory``."""

    peak: float
    most: float
    memory: float

    @staticmethod
    def of(memory: float) -> Room:
        """Of a GPU of this size: what is kept free, and what PyTorch does not count, are left out."""
        left = memory - OUTSIDE
        return Room(left / (1 + slack_share()), left / (1 + reserve_share()), memory)


@dataclass(frozen=True)
class Choice:
    """What each layer keeps.

    Attributes:
        policies: of each layer.
        prediction: of a step under them.
        again: of a step, the time of what is computed again; seconds where ``rates`` are known, else floating-point
            operations of a GPU.
        basis: in words, what the order was decided by.
    """

    policies: tuple[LayerPolicy, ...]
    prediction: Prediction
    again: float
    basis: str

    def render(self, room: Room) -> str:
        """One line for a log."""
        taken = self.prediction.peak + OUTSIDE
        tight = f", which is little: {RUNS_SHORT}" if self.prediction.peak > room.peak else ""
        return (
            f"train.recompute=auto: {policies_text(self.policies)}; predicted {size_text(taken)} of "
            f"{size_text(room.memory)}, {size_text(room.memory - taken)} stay free{tight}; order by {self.basis}"
        )


@dataclass(frozen=True)
class _Part:
    """What of a layer may be kept: the time that saves, and its bytes."""

    name: str
    saves: float
    size: float


@dataclass(frozen=True)
class _Costs:
    """Times of a layer, in the unit of ``basis``.

    Attributes:
        parts: most time saved per byte first.
        rest: of what is recomputed though all parts are kept: norms, rotary embedding, gates.
        copies: seconds of an offloaded layer's copies that nothing hides, without and with attention's outputs; zero
            where the rate of copies is not known.
    """

    parts: list[_Part]
    rest: float
    copies: tuple[float, float]
    basis: str


def choose_policies(
    work: Workload, room: Room, rates: Rates | None = None, traces: Traces | None = None
) -> Choice:
    """The policy of every layer that costs least time among those that fit.

    Args:
        work: its ``recompute`` does not matter; ``offload``: layers may keep their inputs and attention's outputs in
            host memory.
        room: of the GPU with least memory. Ranks that are given the same numbers choose the same.
        rates: of the GPU; None where they are not known: times are then floating-point operations.

    Raises:
        Unpredictable: the model's code reads numbers.
        UserError: not even the least fits; with the least and the remedies.
    """
    traces = Traces(work) if traces is None else traces
    layers = len(layers_of(work.hf_model))

    def predicted(policies: Sequence[LayerPolicy]) -> Prediction:
        return predict(replace(work, recompute=policies, offload=False), traces)

    everything = (LayerPolicy(everything=True),) * layers
    prediction = predicted(everything)
    if prediction.peak <= room.peak:
        return Choice(everything, prediction, 0.0, "nothing, since all fits")
    costs = _costs(work, traces, rates)
    found: list[tuple[float, int, tuple[LayerPolicy, ...]]] = []
    for away in range(layers if work.offload else 1):
        kept = _kept(costs, layers, away, lambda policies: predicted(policies).peak <= room.peak)
        if kept is not None:
            found.append((_time(costs, kept), away, kept))
    if not found:
        least = (LayerPolicy(offload=work.offload),) * (layers - 1) + (LayerPolicy(),)
        prediction = predicted(least)
        if prediction.peak > room.most:
            raise UserError(_nothing_fits(prediction, room, work.offload))
        return Choice(least, prediction, _time(costs, least), costs.basis)
    time, _, best = min(found, key=lambda one: one[:2])
    return Choice(best, predicted(best), time, costs.basis)


def _kept(
    costs: _Costs, layers: int, away: int, fits: Callable[[Sequence[LayerPolicy]], bool]
) -> tuple[LayerPolicy, ...] | None:
    """Policies that fit, with as much kept as there is room for; None where nothing fits.

    Args:
        away: the first layers, whose inputs and attention's outputs wait in host memory.
    """
    kinds = [*(part.name for part in costs.parts), _EVERYTHING]
    counts = dict.fromkeys(kinds, 0)

    def policies() -> tuple[LayerPolicy, ...]:
        """``counts`` are of the last layers."""
        from_end = range(layers, 0, -1)
        return tuple(
            LayerPolicy(everything=True)
            if number <= counts[_EVERYTHING]
            else LayerPolicy(
                frozenset(part.name for part in costs.parts if number <= counts[part.name]),
                offload=layers - number < away,
            )
            for number in from_end
        )

    def most(kind: str) -> int:
        """The largest count that fits, at least the one that does already: what fits also fits with less kept."""
        low, high = counts[kind], layers
        while low < high:
            counts[kind] = (low + high + 1) // 2
            low, high = (counts[kind], high) if fits(policies()) else (low, counts[kind] - 1)
        return low

    if not fits(policies()):
        return None
    before: dict[str, int] = {}
    # A layer that keeps more is recomputed in less memory, which may make room for what did not fit before.
    while before != counts:
        before = dict(counts)
        for kind in kinds:
            counts[kind] = most(kind)
    return policies()


def _time(costs: _Costs, policies: Sequence[LayerPolicy]) -> float:
    """Of a step, what is computed again, and copies that nothing hides."""
    total = 0.0
    for policy in policies:
        if policy.everything:
            continue
        total += costs.rest + sum(part.saves for part in costs.parts if part.name not in policy.parts)
        total += costs.copies[ATTENTION in policy.parts] if policy.offload else 0.0
    return total


def _costs(work: Workload, traces: Traces, rates: Rates | None) -> _Costs:
    config = work.hf_model.config
    heads, head_dim = config.num_attention_heads, head_dim_of(config)
    rows = work.batch * work.seq_len // (work.ring[0] * work.ring[1])
    pattern = widest(work.hf_model, work.patterns, work.seq_len)
    pairs = rows * heads * _keys_read(pattern, work.seq_len)
    # Products in float8 are counted as those in bf16: their rates are not measured.
    plain = traces if work.float8 == "off" else Traces(replace(work, float8="off"))
    again = plain.of(LayerPolicy()).again
    known = rates is not None and head_dim in rates.attention and work.fused in rates.around_gb_per_s
    if rates is not None and known:
        kernel = rates.attention[head_dim]
        tile = (kernel.dense_ns if pattern.name == "dense" else kernel.tile_ns)[0]
        attention = 1e-9 * tile * pairs / _TILE**2
        flop = 1 / (1e12 * rates.matmul_tflops)
        traffic = 2 * (AROUND_HIDDEN[0] * config.hidden_size + AROUND_MLP[0] * config.intermediate_size)
        rest = rows * traffic / (1e9 * rates.around_gb_per_s[work.fused])
        basis = f"measured rates of {rates.gpu}"
    else:
        attention, flop, rest = 4.0 * pairs * head_dim, 1.0, 0.0
        basis = "floating-point operations"
    attended = traces.kept(LayerPolicy(frozenset({ATTENTION})))["kept: attention outputs"]
    parts = [_Part(ATTENTION, attention, attended)]
    parts += [_Part(name, flop * one.flops, one.size) for name, one in again.items()]
    forward = rest + sum(part.saves for part in parts)
    copies = (0.0, 0.0)
    if rates is not None and known and rates.host_gb_per_s is not None:
        sizes = traces.kept(LayerPolicy())["kept: layer inputs"], attended
        taken = [size / (1e9 * rates.host_gb_per_s) for size in (sizes[0], sum(sizes))]
        copies = tuple(max(0.0, one - forward) + max(0.0, one - 2 * forward) for one in taken)
    elif work.offload:
        basis += ", with copies to host memory taken to be hidden"
    if work.fused == "compile" or work.float8 != "off":  # they keep attention's outputs or everything
        rest += sum(part.saves for part in parts[1:])
        del parts[1:]
    parts.sort(key=lambda part: -part.saves / part.size)
    return _Costs(parts, rest, copies, basis)


def _keys_read(pattern: Pattern, seq_len: int) -> float:
    """How many keys a query of ``pattern`` reads, about, where that depends on what it sees."""
    causal = seq_len / 2
    if pattern.name == "dense":
        return causal
    columns = columns_of(pattern, seq_len)
    density = getattr(pattern, "density", None)
    if isinstance(density, float):
        return min(causal, columns + density * causal)
    return min(causal, max(2 * columns, _GUESSED_DENSITY * causal))


def policies_text(policies: Sequence[LayerPolicy]) -> str:
    """`layers 0-11 keep their input, 12-30 attention and MLP inner, 31-35 everything`."""
    spans, alike = [], runs(policies)
    for first, end, policy in alike:
        kept = [word for part, word in _WORDS.items() if part in policy.parts]
        if policy.everything:
            what = "everything"
        elif not kept:
            what = "nothing but the input"
        else:
            what = " and ".join(filter(None, [", ".join(kept[:-1]), kept[-1]]))
        where = f"{first}-{end} keep" if end > first else f"{first} keeps"
        spans.append(f"{where} {what}{' (offloaded)' if policy.offload else ''}")
    only_one_at_first = alike[0][1] == 0
    return ("layer " if only_one_at_first else "layers ") + ", ".join(spans)


def _nothing_fits(least: Prediction, room: Room, offload: bool) -> str:
    more = "" if offload else "train.offload=true, "
    return (
        f"train.recompute=auto: a step needs at least {size_text(least.needed)} on each GPU, with every layer "
        f"recomputed from its input, and there are {size_text(room.memory)}: use {more}more GPUs (parallel.cp), or a "
        "shorter train.seq_len."
    )
