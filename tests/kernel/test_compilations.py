"""What is compiled is counted, and a process after the first finds it in the cache. Compiled only: no GPU is needed."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mtraining.kernel.compilations import Compilations, counting_compilations
from processes import run_command

pytest.importorskip("triton")

from triton import knobs

COMPILE = """
import json, sys
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from mtraining.kernel.compilations import counting_compilations
from mtraining.kernel.triton.compact import invert_kernel as kernel

kinds = dict(zip(kernel.arg_names, ["*i32"] * 3 + ["i32"] * 3 + ["constexpr"]))
with counting_compilations() as counter:
    for rows in (64, 128):
        source = ASTSource(kernel, kinds, constexprs={(6,): rows})
        compile(source, target=GPUTarget("cuda", 90, 32))
found = counter.take()
json.dump([dict(found.compiled), dict(found.loaded), found.seconds], sys.stdout)
"""


def test_a_second_process_compiles_nothing(tmp_path: Path) -> None:
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    told = [run_command([sys.executable, "-c", COMPILE], env=environment).stdout for _ in range(2)]
    (compiled, loaded, seconds), (again, from_cache, fewer) = map(json.loads, told)
    assert (compiled, loaded) == ({"invert_kernel": 2}, {})
    assert (again, from_cache) == ({}, {"invert_kernel": 2})
    assert seconds > fewer >= 0


def heard(name: str, microseconds: int, cache_hit: bool) -> None:
    listener: Any = knobs.compilation.listener
    listener(
        src=None, metadata={"name": name}, metadata_group={}, times=SimpleNamespace(total=microseconds),
        cache_hit=cache_hit,
    )  # fmt: skip


def test_counts_run_from_take_to_take_and_an_earlier_listener_hears_all(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    others: list[str] = []
    monkeypatch.setattr(knobs.compilation, "listener", lambda **told: others.append(told["metadata"]["name"]))
    before = knobs.compilation.listener
    with counting_compilations() as counter:
        heard("one", 1_500_000, False)
        heard("one", 500_000, False)
        heard("two", 1_000, True)
        first = counter.take()
        heard("three", 2_000_000, False)
        second = counter.take()
    assert knobs.compilation.listener is before
    assert others == ["one", "one", "two", "three"]
    assert first.render() == "2 kernels compiled and 1 from the cache in 2.0 s"
    assert first.compiled == {"one": 2} and first.loaded == {"two": 1} and first.any_compiled
    assert second.compiled == {"three": 1} and second.numbers()["kernel_seconds"] == 2.0
    assert counter.take() == Compilations() and not Compilations().any_compiled
    assert Compilations().render() == ""


def test_graphs_of_torch_compile_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._dynamo import utils

    counts, times = utils.counters["inductor"].copy(), dict(utils.compilation_time_metrics)
    monkeypatch.setitem(utils.counters, "inductor", counts)
    monkeypatch.setattr(utils, "compilation_time_metrics", times)
    with counting_compilations(triton=False) as counter:
        counts["fxgraph_cache_miss"] += 3
        counts["fxgraph_cache_hit"] += 2
        times["_compile.compile_inner"] = [*times.get("_compile.compile_inner", []), 4.0]
        found = counter.take()
    assert found.render() == "3 graphs compiled and 2 from the cache in 4.0 s"
    assert found.any_compiled
    assert found.numbers()["graphs_from_cache"] == 2
