"""Which way to spread a run over a cluster is fastest among those that fit, and what each other way loses."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from heapq import heapify, heappop, heappush
from typing import Any

import torch

from mtraining.errors import UserError
from mtraining.layout import build_layout
from mtraining.model.recompute import RECOMPUTE
from mtraining.pattern import ToeplitzRandom
from mtraining.predict.measured import Link, Rates
from mtraining.predict.memory import GIB, Prediction, Traces, Unpredictable, Workload, predict
from mtraining.predict.recompute import Choice, Room, choose_policies
from mtraining.predict.ring import Network, Simulated
from mtraining.predict.step_time import ModelShape, Setting, StepTime, attention_passes, step_time
from mtraining.predict.work import Index, LayerWork
from mtraining.sizes import size_text

LAYOUTS = ("striped", "zigzag", "contiguous")


@dataclass(frozen=True)
class Cluster:
    """GPUs of one kind: ``nodes`` of ``node_size``, with what was measured of them."""

    nodes: int
    node_size: int
    rates: Rates
    network: Network

    @property
    def world(self) -> int:
        return self.nodes * self.node_size

    @staticmethod
    def of(gpus: str, rates: Rates, intra: Link | None = None, inter: Link | None = None) -> Cluster:
        """
        Args:
            gpus: ``4x8`` for four nodes of eight, or ``8`` for one node.
            intra, inter: links, in place of those of the rates.

        Raises:
            UserError: no such number of GPUs, or a link that is needed and not known.
        """
        found = re.fullmatch(r"(?:(\d+)x)?(\d+)", gpus.strip())
        nodes, size = (int(found[1] or 1), int(found[2])) if found else (0, 0)
        if nodes < 1 or size < 1:
            raise UserError(
                f"--gpus: {gpus!r} is no cluster; use 4x8 for four nodes of eight GPUs, or 8 for one."
            )
        intra, inter = intra or rates.intra, inter or rates.inter
        for option, example, link, needed in (
            ("--intra", "300GB/s", intra, size > 1),
            ("--inter", "25GB/s", inter, nodes > 1),
        ):
            if needed and link is None:
                raise UserError(
                    f"{option} is missing: no such link of {rates.gpu}s was measured; give the rate of one GPU's link, "
                    f"such as {option} {example}, or --rates with a file that has it."
                )
        unused = Link.of_rate(torch.inf)
        return Cluster(nodes, size, rates, Network(size, intra or unused, inter or unused))


@dataclass(frozen=True, eq=False)
class Job:
    """What is to be trained.

    Attributes:
        index: what a sparse layer attends to.
        pattern: what prescribes the index; its columns count for memory.
        works: attention of a saved run by (layout, ranks, outer), in place of that of ``index``; only these are
            planned.
        slowest: how many times slower one GPU of each ring is.
        batch: sequences a step at most.
    """

    hf_model: Any
    index: Index
    pattern: ToeplitzRandom
    fused: str = "liger"
    works: dict[tuple[str, int, int], LayerWork] = field(default_factory=dict)
    slowest: float = 1.0
    batch: int | None = None

    @property
    def seq_len(self) -> int:
        return self.index.seq_len


@dataclass(frozen=True)
class Outcome:
    """A way to spread the run, and what a step of it takes."""

    setting: Setting
    time: StepTime
    seq_len: int

    @property
    def tokens_per_second(self) -> float:
        return self.setting.dp * self.seq_len / self.time.seconds


@dataclass(frozen=True)
class Alternative:
    """Another value of one choice, all else as in the best way.

    Attributes:
        choice, value: what is chosen otherwise.
        outcome: its time; None where that cannot be told.
        loss: share of the best way's tokens/s that it loses; negative for one that is faster and does not fit.
        why: in words.
    """

    choice: str
    value: str
    outcome: Outcome | None
    loss: float | None
    why: str


@dataclass(frozen=True)
class Plan:
    """The fastest way that fits.

    Attributes:
        memory: of each GPU.
        dense: the same GPUs with dense attention in its own best layout, whether or not it fits.
        alternatives: by choice.
    """

    best: Outcome
    memory: Prediction
    dense: Outcome
    alternatives: list[Alternative]


class Planner:
    """Times and memory of the ways to spread one job over one cluster, each found once."""

    def __init__(self, job: Job, cluster: Cluster) -> None:
        self.job, self.cluster = job, cluster
        self.shape = ModelShape.of(job.hf_model)
        cluster.rates.attention_at(self.shape.head_dim)
        self._passes: dict[tuple[str, int, int, bool], tuple[Simulated, Simulated]] = {}
        self._memory: dict[Setting, Prediction] = {}
        self._traces: dict[tuple[int, int], Traces] = {}
        self._chosen: dict[Setting, Choice | None] = {}
        self._dense = Index.all_tiles(job.seq_len, job.index.block_size)

    def settings(self) -> Iterator[Setting]:
        """Every way: sequences x ranks of a sequence, rings, layouts, what is kept."""
        size, job = self.cluster.node_size, self.job
        for cp in (n for n in range(1, self.cluster.world + 1) if self.cluster.world % n == 0):
            if (cp > size and cp % size) or (cp <= size and size % cp):
                continue
            if job.batch is not None and self.cluster.world // cp > job.batch:
                continue
            for outer in {1, max(1, cp // size)}:
                for name in LAYOUTS:
                    layout = build_layout(name, job.index.block_size)
                    try:
                        layout.check(job.seq_len, cp, job.index.block_size)
                    except UserError:
                        continue  # too few blocks for so many ranks
                    if job.works and (name, cp, outer) not in job.works:
                        continue
                    for recompute in ("auto", *RECOMPUTE):
                        for offload in (False, True) if self._can_offload(recompute) else (False,):
                            yield Setting(
                                self.cluster.world // cp, cp, outer, layout, recompute, offload, job.fused
                            )

    def _can_offload(self, recompute: str) -> bool:
        return recompute != "none" and self.cluster.rates.host_gb_per_s is not None

    def outcome(self, setting: Setting, dense: bool = False) -> Outcome:
        """A step's time under a setting; simulated once for each ring and layout. With ``recompute: auto`` it is that
        of a step that keeps everything, until `resolved` has chosen what is kept."""
        index = self._dense if dense else self.job.index
        key = (setting.layout.name, setting.cp, setting.outer, dense)
        if key not in self._passes:
            shape = self.shape
            work = None if dense else self.job.works.get(key[:3])
            if work is None:
                work = LayerWork.of(
                    index, setting.layout, setting.cp, shape.heads, shape.kv_heads, shape.head_dim
                )
            slow = [1.0] * (setting.cp - 1) + [self.job.slowest] if self.job.slowest != 1 else None
            self._passes[key] = attention_passes(
                work, setting.outer, self.cluster.rates, self.cluster.network, slow
            )
        timed = setting
        if setting.recompute == "auto" and setting.policies is None:
            timed = replace(setting, recompute="none", offload=False)
        time = step_time(
            self.shape, index, timed, self.cluster.rates, self.cluster.network, self._passes[key]
        )
        return Outcome(setting, time, self.job.seq_len)

    def memory(self, setting: Setting) -> Prediction:
        """Of each GPU; the same in all layouts.

        Raises:
            Unpredictable: a model whose code reads numbers.
        """
        setting = self._any_layout(setting)
        if setting not in self._memory:
            self._memory[setting] = predict(*self._work(setting))
        return self._memory[setting]

    def resolved(self, way: Outcome) -> Outcome | None:
        """The way, with what each layer keeps where ``recompute: auto`` has yet to choose that; None where nothing
        fits. It is never faster than it was before, as if everything were kept."""
        setting = way.setting
        if setting.recompute != "auto" or setting.policies is not None:
            return way
        key = self._any_layout(setting)
        if key not in self._chosen:
            try:
                work, traces = self._work(key)
                self._chosen[key] = choose_policies(work, Room.of(self._budget), self.cluster.rates, traces)
            except Unpredictable:
                raise
            except UserError:
                self._chosen[key] = None
        chosen = self._chosen[key]
        return None if chosen is None else self.outcome(replace(setting, policies=chosen.policies))

    def _any_layout(self, setting: Setting) -> Setting:
        return replace(setting, layout=build_layout("striped", self.job.index.block_size))

    def _work(self, setting: Setting) -> tuple[Workload, Traces]:
        """Layers are traced once for each ring, and each way to recompute."""
        job, ring = self.job, (setting.outer, setting.cp // setting.outer)
        work = Workload(
            job.hf_model,
            world=setting.world,
            ring=ring,
            seq_len=job.seq_len,
            batch=1,
            accumulation=1,
            patterns=[job.pattern],
            layout=setting.layout,
            recompute=setting.recompute if setting.policies is None else setting.policies,
            offload=setting.offload and setting.policies is None,
            fused=setting.fused,
            compute=torch.bfloat16,
        )
        return work, self._traces.setdefault(ring, Traces(work))

    def plan(self) -> Plan:
        """The fastest way that fits without running short of memory; where none does, the fastest that fits.

        Raises:
            UserError: none fits, or the sequence cannot be dealt to these GPUs.
        """
        ways = sorted(
            (self.outcome(setting) for setting in self.settings()), key=lambda way: -way.tokens_per_second
        )
        if not ways:
            raise UserError(
                f"--seq-len: {self.job.seq_len} tokens cannot be dealt to the ranks of {self.cluster.world} GPUs in "
                f"blocks of {self.job.index.block_size}, with at most --batch sequences at a time; choose a multiple "
                f"of {2 * self.job.index.block_size * self.cluster.world}, or a larger --batch."
            )
        best = self._fastest(ways)
        if best is None:
            fixed = [way.setting for way in ways if way.setting.recompute != "auto"]
            least = min((self.memory(setting) for setting in fixed), key=lambda memory: memory.needed)
            raise UserError(
                f"no way to spread {self.job.seq_len} tokens over {self.cluster.world} GPUs fits: the least needs "
                f"{size_text(least.needed)} of {size_text(self._budget)} on each GPU; use more GPUs or a shorter "
                "--seq-len."
            )
        zigzag = build_layout("zigzag", self.job.index.block_size)
        dense = self.outcome(replace(best.setting, layout=zigzag), dense=True)
        return Plan(best, self.memory(best.setting), dense, list(self._alternatives(best, ways)))

    def _fastest(self, ways: Iterable[Outcome]) -> Outcome | None:
        """The fastest of some ways that never runs short of memory; where none does, the fastest that fits."""
        tight = None
        # Stable: of equals, the one that was given first.
        waiting = [(-way.tokens_per_second, number, way) for number, way in enumerate(ways)]
        heapify(waiting)
        while waiting:
            _, number, way = heappop(waiting)
            resolved = self.resolved(way)
            if resolved is not None and resolved is not way:
                heappush(waiting, (-resolved.tokens_per_second, number, resolved))
            elif resolved is not None and self._roomy(way):
                return way
            elif resolved is not None and tight is None and self._fits(way):
                tight = way
        return tight

    def _alternatives(self, best: Outcome, ways: list[Outcome]) -> Iterator[Alternative]:
        """The ways that differ from the best one in one choice."""
        at = best.setting
        choices: dict[str, Callable[[Setting], str]] = {
            "ring": ring_text,
            "layout": lambda s: s.layout.name,
            "recompute": lambda s: s.recompute,
            "offload": lambda s: "on" if s.offload else "off",
        }
        for choice, value in choices.items():
            others = [
                way for way in ways
                if value(way.setting) != value(at)
                and (way.setting.dp, way.setting.cp) == (at.dp, at.cp)
                and all(other(way.setting) == other(at) for name, other in choices.items() if name != choice)
            ]  # fmt: skip
            yield from (self._alternative(choice, value(way.setting), way, best) for way in others)
        if self.cluster.rates.host_gb_per_s is None:
            yield Alternative(
                "offload", "on", None, None, "copies to host memory were not measured on this GPU"
            )
        # Of another split the fastest way that fits, for a ring and what is kept go with it.
        for dp, cp in dict.fromkeys((way.setting.dp, way.setting.cp) for way in ways):
            if (dp, cp) != (at.dp, at.cp):
                same = [way for way in ways if (way.setting.dp, way.setting.cp) == (dp, cp)]
                other = self._fastest(same) or next(
                    way for way in reversed(same) if way.setting.recompute != "auto"
                )
                yield self._alternative(
                    "dp x cp", f"{dp} x {cp}, ring {ring_text(other.setting)}", other, best
                )

    @property
    def _budget(self) -> float:
        """Bytes of a GPU."""
        return self.cluster.rates.memory_gib * GIB

    def _fits(self, way: Outcome) -> bool:
        return self.memory(way.setting).needed <= self._budget

    def _roomy(self, way: Outcome) -> bool:
        """Whether so much stays free that PyTorch never runs short; steps that do are slower than predicted."""
        return self.memory(way.setting).wanted <= self._budget

    def _alternative(self, choice: str, value: str, way: Outcome, best: Outcome) -> Alternative:
        found = self.resolved(way)
        if found is None:
            return Alternative(choice, value, None, None, "does not fit, whatever is recomputed")
        way = found
        loss = 1 - way.tokens_per_second / best.tokens_per_second
        if not self._fits(way):
            needed = size_text(self.memory(way.setting).needed)
            return Alternative(choice, value, way, loss, f"does not fit: needs {needed} on each GPU")
        if not self._roomy(way):
            wanted = size_text(self.memory(way.setting).wanted)
            return Alternative(choice, value, way, loss, f"may run short of memory: {wanted} would be enough")
        return Alternative(choice, value, way, loss, _reason(way, best))


def ring_text(setting: Setting) -> str:
    """``flat``, or OUTERxINNER."""
    return f"{setting.outer}x{setting.cp // setting.outer}" if setting.outer > 1 else "flat"


def _reason(way: Outcome, best: Outcome) -> str:
    """The part of the step that grows most, for each token."""

    def each(outcome: Outcome) -> dict[str, float]:
        return {name: seconds / outcome.setting.dp for name, seconds in outcome.time.parts.items()}

    mine, theirs = each(way), each(best)
    grown = {name: mine.get(name, 0.0) - theirs.get(name, 0.0) for name in {*mine, *theirs}}
    name = max(grown, key=lambda part: grown[part])
    if sum(grown.values()) < 1e-3 * best.time.seconds / best.setting.dp:
        return "no slower"
    waits = [
        max(one.time.forward.exposed_fraction, one.time.backward.exposed_fraction) for one in (way, best)
    ]
    waiting = (
        f"; ranks wait {waits[0]:.0%} of attention, not {waits[1]:.0%}" if waits[0] > waits[1] + 0.01 else ""
    )
    return f"{name} takes longer{waiting}"


def prescribed_pattern(density: float, columns: int, seq_len: int, block_size: int = 128) -> ToeplitzRandom:
    """Slashes and columns that together compute ``density`` of the causal tiles.

    Raises:
        UserError: columns alone are more than that.
    """
    slashes = density - columns / seq_len
    if not 0 < density <= 1 or slashes <= 0:
        raise UserError(
            f"--density: {density} must be at most 1, and more than the {columns / seq_len:.4f} that --columns "
            f"{columns} are of {seq_len} tokens; use a larger density or fewer columns."
        )
    return ToeplitzRandom(block_size, density=slashes, columns=columns)
