"""The Hopper kernels assemble on a machine without one: within registers and shared memory, products not serialised."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")
pytest.importorskip("triton.experimental.gluon")

from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import compile as compile_kernel
from triton.experimental.gluon._runtime import GluonASTSource

from kernel_tables import OF_STARTS, TABLES, table_kinds
from mtraining.kernel.hopper import forward as hopper_forward
from mtraining.kernel.hopper import keys as hopper_keys
from mtraining.kernel.hopper import queries as hopper_queries
from mtraining.kernel.hopper.items import Constants, Target
from mtraining.kernel.hopper.keys import KeyConstants
from mtraining.kernel.triton.common import KeyGradients
from mtraining.kernel.triton.launch import ALWAYS
from processes import run_command

SHARED = 227 * 1024
SWIZZLED = "NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=4)"
PLAIN = "NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=2)"
VISITED = {"k_desc": 128, "v_desc": 128, "ck_desc": 128, "cv_desc": 128}  # rows of a tile; 64 of the others
KERNELS: dict[str, tuple[Any, dict[str, int], dict[str, object]]] = {
    "forward, tiles": (hopper_forward.forward_kernel, VISITED, {"COLUMNS": False, "FINAL": True}),
    "forward, columns too": (hopper_forward.forward_kernel, VISITED, {"FINAL": True, "HAS_PREV": False}),
    "dq, tiles": (hopper_queries.query_gradient_kernel, VISITED, {"COLUMNS": False}),
    "dq, columns too": (hopper_queries.query_gradient_kernel, VISITED, {"FINAL": True}),
    "dk and dv, tiles": (hopper_keys.key_tiles_kernel, {}, {"STAGES": 3, "COLUMNS": False}),
    "dk and dv, columns": (hopper_keys.key_columns_kernel, {}, {"STAGES": 3, "GROUP": 1}),
}


def kind_of(name: str, bundle: str, rows: dict[str, int], dim: int, starts: bool) -> Any:
    """Triton's type of an argument, a tuple of types for a bundle."""
    if name in ("lse_desc", "delta_desc"):
        return f"tensordesc<fp32[1,64],{PLAIN}>"
    if name.endswith("_desc"):
        return f"tensordesc<bf16[1,{rows.get(name, 64)},1,{dim}],{SWIZZLED}>"
    if bundle in TABLES:
        return table_kinds(bundle, starts)
    if bundle in ("Target", "KeyGradients"):
        return {"Target": Target, "KeyGradients": KeyGradients}[bundle](
            "*fp32", "*fp32", "i64", "constexpr", "i64"
        )
    return {"counter": "*i32", "lse_ptr": "*fp32", "delta_ptr": "*fp32", "scale": "fp32"}.get(name, "i32")


def compiled(name: str, dim: int, *, starts: bool = False, **more: object) -> Any:
    kernel, rows, options = KERNELS[name]
    chosen: dict[str, object] = {
        "HEAD_DIM": dim, "SIZE": 128, "BLOCK_M": 64, "TOEPLITZ": True, "GROUP": 4, "SPLITS": 1, "HAS_PREV": True,
        "FINAL": False, "COLUMNS": True, "STARTS": starts, "STAGES": 2, **options, **more,
    }  # fmt: skip
    bundles = kernel.fn.__annotations__
    kinds = {
        arg: "constexpr" if arg == "constants" else kind_of(arg, bundles.get(arg, ""), rows, dim, starts)
        for arg in kernel.arg_names
    }
    bundle: Any = KeyConstants if "dk and dv" in name else Constants
    constants: dict[tuple[int, ...], object] = {}
    aligned: list[tuple[int, ...]] = []
    for i, kind in enumerate(kinds.values()):
        if isinstance(kind, tuple):
            row = (8 if "dk and dv" in name else 32) * dim
            fixed = [None if field in OF_STARTS else row for field in kind._fields]
            constants |= {(i, j): fixed[j] for j, member in enumerate(kind) if member == "constexpr"}
            aligned += [(i, j) for j, member in enumerate(kind) if member[0] == "*"]
        elif kind == "constexpr":
            constants[(i,)] = bundle(*(chosen[field] for field in bundle._fields))
        elif kind[0] == "*":
            aligned.append((i,))
    attributes = {path: [["tt.divisibility", 16]] for path in aligned}
    source = GluonASTSource(kernel, kinds, constexprs=constants, attrs=attributes)
    return compile_kernel(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4, **ALWAYS})


def too_early(ptx: str) -> list[str]:
    """Arrivals and copies to global memory that one thread begins while others of its group may still be at work in
    shared memory: no barrier of the group between, or for copies no fence of what was written before that barrier."""
    early = []
    at_work = written = fenced = False
    for line in ptx.splitlines():
        if re.search(r"\b(ld|st)\.shared|(ld|st)matrix|wgmma\.mma_async", line):
            at_work, written = True, written or "st" in line.split(".")[0]
        elif "fence.proxy.async" in line:
            written, fenced = False, fenced or written
        elif re.search(r"\bbar(rier)?\.(warp\.)?sync", line):
            at_work = fenced = False
        elif ("mbarrier.arrive.shared" in line and at_work) or (
            "cp.async.bulk.tensor" in line and "global.shared" in line and (written or fenced)
        ):
            early.append(line.strip())
    return early


@pytest.mark.parametrize("starts", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["", "starts"])
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("name", KERNELS)
def test_assembles_well(name: str, dim: int, starts: bool, tmp_path: Path) -> None:
    result = compiled(name, dim, starts=starts)
    assert 0 < result.metadata.shared <= SHARED
    assert "mbarrier.arrive.shared" in result.asm["ptx"]
    assert not too_early(result.asm["ptx"])
    source = tmp_path / "kernel.ptx"
    source.write_text(result.asm["ptx"])
    assembler = get_ptxas(90).path
    told = run_command([assembler, "-v", "-arch=sm_90a", source, "-o", tmp_path / "kernel.cubin"]).stderr
    assert "serialized" not in told  # what the assembler says when products would wait for each other
    spilled = re.search(r"(\d+) bytes spill stores", told)
    assert spilled is not None
    assert int(spilled[1]) <= (1024 if "columns" in name else 64)
