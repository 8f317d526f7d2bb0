"""What the backends hand to a kernel at launch compiles for a GPU, on a machine with none.

A launch binds its arguments to types, compiles for these, and makes a small C launcher. All but the last call into the
driver runs here, so a bundle that Triton would bind in another way than the kernel expects is an error.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")
pytest.importorskip("triton.experimental.gluon")

from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import driver
from triton.backends.nvidia.compiler import CUDABackend
from triton.compiler import ASTSource
from triton.compiler import compile as compile_kernel
from triton.experimental.gluon._runtime import GluonASTSource
from triton.runtime.jit import JITFunction, compute_cache_key, create_function_from_signature

import mtraining.kernel as kernel_package
from decode_cases import decode_case
from mtraining.kernel.external.partial import block_lists
from mtraining.kernel.hopper import backend as hopper_backend
from mtraining.kernel.hopper.backend import HopperBackend
from mtraining.kernel.triton import backend as triton_backend
from mtraining.kernel.triton import delta
from mtraining.kernel.triton.backend import TritonBackend
from mtraining.kernel.triton.common import strided
from mtraining.kernel.triton.decode import decode_attention
from mtraining.kernel.triton.launch import ALWAYS
from triton_cases import Case, build, solve, whole

pytestmark = pytest.mark.skipif(
    not hasattr(driver, "make_launcher"), reason="newer releases of Triton make their launchers elsewhere"
)
TARGET = GPUTarget("cuda", 90, 32)
SMALL = {"size": 128, "dim": 64, "dtype": torch.bfloat16}
CASES = {
    "columns": whole(3, columns=150, q_heads=4, kv_heads=2, **SMALL),
    "block lists": Case((1, 4), (0, 4), 6, columns=0, q_heads=2, block_share=0.5, **SMALL),
    "starts": whole(3, columns=150, q_heads=4, kv_heads=2, starts="anywhere", **SMALL),
    "block lists with starts": Case(
        (1, 4), (0, 4), 6, columns=0, q_heads=2, block_share=0.5, starts="anywhere", **SMALL
    ),
}


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> dict[str, dict[str, Any]]:
    """Types of each kernel's arguments at its last launch; nothing runs."""
    seen: dict[str, dict[str, Any]] = {}

    def run(kernel: JITFunction[Any], *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        backend = CUDABackend(TARGET)
        bind = create_function_from_signature(kernel.signature, kernel.params, backend)
        bound, specialization, options = bind(*args, **options)
        options.setdefault("debug", False)
        _, types, constants, attributes = kernel._pack_args(backend, options, bound, specialization, options)
        kind = GluonASTSource if kernel.is_gluon() else ASTSource
        assert ALWAYS.items() <= options.items()
        launch = {name: options[name] for name in ("num_warps", "num_stages", *ALWAYS) if name in options}
        source = kind(kernel, types, constants, attributes)
        compiled = compile_kernel(source, target=TARGET, options=launch)
        meta = getattr(compiled.metadata, "tensordesc_meta", None)
        assert "PyArg_ParseTuple" in driver.make_launcher(source.constants, source.signature, meta)
        seen[f"{kernel.fn.__module__.rpartition('.')[2]}.{kernel.__name__}"] = types

    monkeypatch.setattr(JITFunction, "run", run)
    monkeypatch.setattr(hopper_backend, "_programs", lambda items, device: items)
    return seen


def scalars(types: dict[str, Any]) -> dict[str, str]:
    return {name: kind for name, kind in types.items() if isinstance(kind, str)}


def jitted() -> dict[str, JITFunction[Any]]:
    """Every function of the package that Triton compiles, by its full name."""
    found = {}
    for module in pkgutil.walk_packages(kernel_package.__path__, "mtraining.kernel."):
        for value in vars(importlib.import_module(module.name)).values():
            if isinstance(value, JITFunction) and value.fn.__module__.startswith("mtraining."):
                found[f"{value.fn.__module__}.{value.__name__}"] = value
    return found


def test_no_argument_has_a_name_that_triton_uses() -> None:
    """Triton binds ``options`` itself."""
    kernels = jitted()
    assert {
        "mtraining.kernel.hopper.forward.forward_kernel",
        "mtraining.kernel.triton.slashes.forward_kernel",
    } <= (kernels.keys())
    for kernel in kernels.values():
        create_function_from_signature(kernel.signature, kernel.params, CUDABackend(TARGET))


def test_another_row_stride_is_another_kernel() -> None:
    def key(rows: int) -> str:
        x = strided(torch.empty(1, 2, 4, rows)[..., :8])
        kernel = delta.row_delta_kernel
        bind = create_function_from_signature(kernel.signature, kernel.params, CUDABackend(TARGET))
        _, specialization, _ = bind(x, x, x.ptr, 2, 4, 8, 8, 8)
        return compute_cache_key(kept, specialization, {})

    kept: dict[Any, str] = {}
    assert key(8) == key(8) != key(16)
    assert len(kept) == 2


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_hopper(case: str, launches: dict[str, dict[str, Any]]) -> None:
    solve(HopperBackend(), build(CASES[case]))
    assert {
        "forward.forward_kernel",
        "queries.query_gradient_kernel",
        "keys.key_tiles_kernel",
    } <= launches.keys()
    assert ("keys.key_columns_kernel" in launches) == (case in ("columns", "starts"))
    reach = "*i32" if "starts" in case else "constexpr"
    assert launches["forward.forward_kernel"]["tiles"].reach == reach
    assert launches["keys.key_tiles_kernel"]["tiles"].reach == reach
    for name in ("forward.forward_kernel", "queries.query_gradient_kernel"):
        types = launches[name]
        assert types["constants"] == "constexpr" and types["out"].row == "constexpr"
        # Sizes change from step to step of a ring: none is compiled in.
        assert {types[size] for size in ("items", "n_rows", "heads", "n_cols", "diagonal")} == {"i32"}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_portable(case: str, launches: dict[str, dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    p = build(CASES[case])
    tma = triton_backend.choose_tiles("tiles_forward", p.q, 128)._replace(tma=True)
    choose: Callable[..., Any] = triton_backend.choose_tiles
    for chosen in (choose, lambda name, *rest: tma if name == "tiles_forward" else choose(name, *rest)):
        monkeypatch.setattr(triton_backend, "choose_tiles", chosen)
        solve(TritonBackend(), p)
        types = launches["slashes.forward_kernel"]
        assert types["k_descriptor"].startswith("tensordesc" if chosen is not choose else "*bf16")
        assert (
            types["q"].ptr == "*bf16" and types["q"].row == "constexpr" and types["q"].head in ("i32", "i64")
        )
        assert {types[size] for size in ("kv_heads", "n_rows", "n_cols", "diagonal")} == {"i32"}
    assert ("columns.forward_kernel" in launches) == (case in ("columns", "starts"))
    assert launches["slashes.forward_kernel"]["lists"].reach == ("*i32" if "starts" in case else "constexpr")


@pytest.mark.parametrize("backend", [HopperBackend(), TritonBackend()], ids=["hopper", "portable"])
@pytest.mark.parametrize("case", CASES)
def test_another_index_is_the_same_kernels(
    backend: TritonBackend, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of one shape: neither the tiles that are chosen, nor columns, documents or the rank's place are compiled in."""
    kept: dict[Any, dict[Any, str]] = {}
    seen: set[tuple[Any, str]] = set()

    def run(kernel: JITFunction[Any], *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        bind = create_function_from_signature(kernel.signature, kernel.params, CUDABackend(TARGET))
        _, specialization, launch = bind(*args, **options)
        seen.add((kernel.fn, compute_cache_key(kept.setdefault(kernel.fn, {}), specialization, launch)))

    monkeypatch.setattr(JITFunction, "run", run)
    monkeypatch.setattr(hopper_backend, "_programs", lambda items, device: items)
    solve(backend, build(CASES[case]))
    compiled = set(seen)
    for share, shift in ((0.0, 0), (0.9, 1), (1.0, 2)):
        torch.manual_seed(shift)
        other = replace(
            CASES[case],
            diagonal_share=share,
            block_share=None if CASES[case].block_share is None else share,
            q_blocks=[block + shift for block in CASES[case].q_blocks],
            num_blocks=CASES[case].num_blocks + 4,
        )
        solve(backend, build(other))
    assert len(compiled) >= 5
    assert seen - compiled == set()


@pytest.mark.parametrize("case", ["columns", "starts", "block lists with starts"])
def test_block_lists_for_foreign_kernels(case: str, launches: dict[str, dict[str, Any]]) -> None:
    p = build(CASES[case])
    for key_major in (False, True):
        block_lists(p.index, p.place, key_major)
        bounds = launches["partial._block_lists_kernel"]["full_from"]
        assert bounds == ("*i32" if "starts" in case else "constexpr")


@pytest.mark.parametrize("bounded", [False, True])
def test_decode(bounded: bool, launches: dict[str, dict[str, Any]]) -> None:
    q, k, v, lengths = decode_case(8, 2, 64, (90, 300), dtype=torch.bfloat16)
    decode_attention(q, k, v, lengths, 300, 0.125, lengths - 50 if bounded else None)
    assert launches["decode.decode_kernel"]["firsts_ptr"] == ("*i32" if bounded else "constexpr")


@pytest.mark.slow
def test_probe(launches: dict[str, dict[str, Any]]) -> None:
    backend, positions = TritonBackend(), torch.arange(256)
    q, k = torch.randn(1, 64, 4, 64).bfloat16(), torch.randn(1, 256, 2, 64).bfloat16()
    lse = backend.probe_lse(q, k, positions[-64:], positions, 0.125)
    backend.probe_mass(q, k, positions[-64:], positions, 0.125, lse, 256, 128)
    assert launches["probe.probe_mass_kernel"]["shape"] == "constexpr"
    assert launches["probe.probe_mass_kernel"]["probe"].ptr == "*bf16"
