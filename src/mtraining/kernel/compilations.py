"""How many kernels were compiled for this process, how many came ready from a cache on the disk, and how long it took.

Triton keeps what it compiles in ``TRITON_CACHE_DIR`` (``~/.triton/cache``). torch.compile keeps its graphs in
``TORCHINDUCTOR_CACHE_DIR`` (a folder of the user's in the temporary directory). A kernel is compiled once for each set
of its constants and of the types and alignments of its arguments: a later run with the same shapes finds it there.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

_GRAPHS_COMPILED = ("fxgraph_cache_miss", "fxgraph_cache_bypass")
_GRAPHS_LOADED = ("fxgraph_cache_hit",)


@dataclass
class Compilations:
    """What was compiled and loaded in some time.

    Attributes:
        compiled: Triton kernels by name, with how often each was compiled.
        loaded: Triton kernels that were read from the cache, likewise.
        seconds: spent in Triton's compiler. The small C launcher that Triton builds for each kernel is not in it.
        graphs_compiled: by torch.compile.
        graphs_loaded: graphs that were read from its cache.
        graph_seconds: spent in torch.compile, tracing and reading the cache included.
    """

    compiled: Counter[str] = field(default_factory=Counter)
    loaded: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0
    graphs_compiled: int = 0
    graphs_loaded: int = 0
    graph_seconds: float = 0.0

    @property
    def any_compiled(self) -> bool:
        """Whether something was not in a cache."""
        return bool(self.compiled or self.graphs_compiled)

    def render(self) -> str:
        """A few words for a log; "" where nothing was compiled or loaded."""
        parts = []
        if self.compiled or self.loaded:
            parts.append(
                f"{self.compiled.total()} kernels compiled and {self.loaded.total()} from the cache in "
                f"{self.seconds:.1f} s"
            )
        if self.graphs_compiled or self.graphs_loaded:
            parts.append(
                f"{self.graphs_compiled} graphs compiled and {self.graphs_loaded} from the cache in "
                f"{self.graph_seconds:.1f} s"
            )
        return ", ".join(parts)

    def numbers(self) -> dict[str, float]:
        """The same for a record."""
        return {
            "kernels_compiled": self.compiled.total(),
            "kernels_from_cache": self.loaded.total(),
            "kernel_seconds": round(self.seconds, 3),
            "graphs_compiled": self.graphs_compiled,
            "graphs_from_cache": self.graphs_loaded,
            "graph_seconds": round(self.graph_seconds, 3),
        }


class CompilationCounter:
    """Counts what this process compiles and loads, from one `take` to the next. `counting_compilations` makes it."""

    def __init__(self) -> None:
        self._found = Compilations()
        self._graphs = _graphs()

    def take(self) -> Compilations:
        """What has come since the last call, or since counting began."""
        found, self._found = self._found, Compilations()
        before, self._graphs = self._graphs, _graphs()
        compiled, loaded, seconds = (now - then for now, then in zip(self._graphs, before, strict=True))
        found.graphs_compiled, found.graphs_loaded = round(compiled), round(loaded)
        found.graph_seconds = seconds
        return found

    def heard(self, name: str, seconds: float, from_cache: bool) -> None:
        """Count one Triton kernel."""
        names = self._found.loaded if from_cache else self._found.compiled
        names[name] += 1
        self._found.seconds += seconds


@contextmanager
def counting_compilations(triton: bool = True) -> Iterator[CompilationCounter]:
    """Count what is compiled in this process inside. A listener that Triton has already still hears everything.

    Args:
        triton: False leaves Triton's kernels out, for a process that has none and need not import it.
    """
    counter = CompilationCounter()
    if not triton:
        yield counter
        return
    from triton import knobs

    earlier = knobs.compilation.listener

    def listen(*, metadata: dict[str, Any], times: Any, cache_hit: bool, **rest: Any) -> None:
        counter.heard(str(metadata.get("name", "?")), times.total / 1e6, cache_hit)
        if earlier is not None:
            earlier(metadata=metadata, times=times, cache_hit=cache_hit, **rest)

    knobs.compilation.listener = listen
    try:
        yield counter
    finally:
        knobs.compilation.listener = earlier


def _graphs() -> tuple[float, float, float]:
    """Graphs that torch.compile has compiled and loaded in this process, and its seconds."""
    if "torch._dynamo.utils" not in sys.modules:
        return 0, 0, 0.0
    from torch._dynamo import utils

    counts, times = utils.counters["inductor"], utils.compilation_time_metrics
    return (
        sum(counts.get(name, 0) for name in _GRAPHS_COMPILED),
        sum(counts.get(name, 0) for name in _GRAPHS_LOADED),
        sum(times.get("_compile.compile_inner", ())),
    )
