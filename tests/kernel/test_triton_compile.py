"""Every attention kernel compiles for each generation of GPUs, on a machine with none, within its shared memory."""

from __future__ import annotations

import re
from typing import Any

import pytest

pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.compiler import compile as compile_kernel

from kernel_tables import OF_STARTS, TABLES, table_kinds
from mtraining.kernel.external import partial as triton_partial
from mtraining.kernel.triton import columns as triton_columns
from mtraining.kernel.triton import decode as triton_decode
from mtraining.kernel.triton import probe as triton_probe
from mtraining.kernel.triton import slashes as triton_tiles
from mtraining.kernel.triton.common import KeyGradients, Strided
from mtraining.kernel.triton.launch import ALWAYS
from mtraining.kernel.triton.tile_sizes import TileSizes, padded, table_tiles

KERNELS = {
    "tiles_forward": triton_tiles.forward_kernel,
    "tiles_dq": triton_tiles.query_gradient_kernel,
    "tiles_dkdv": triton_tiles.key_gradient_kernel,
    "columns_forward": triton_columns.forward_kernel,
    "columns_dq": triton_columns.query_gradient_kernel,
    "columns_dkdv": triton_columns.key_gradient_kernel,
}
SHARED_KIB = {80: 163, 86: 99, 90: 227, 100: 227}  # a block may take at most, by compute capability
HALF, FULL = {"q", "k", "v", "do"}, {"out", "dq"}  # tensors of bf16 and of fp32


def kind_of(name: str, bundle: str, tiles: TileSizes, dim: int, starts: bool) -> Any:
    """Triton's type of an argument, a tuple of types for a bundle."""
    if name in HALF | FULL:
        return Strided("*bf16" if name in HALF else "*fp32", "i64", "constexpr", "i32")
    if name == "dkv":
        return KeyGradients("*fp32", "*fp32", "i64", "constexpr", "i32")
    if bundle in TABLES:
        return table_kinds(bundle, starts)
    if name.endswith("_descriptor"):
        return f"tensordesc<bf16[1,{tiles.block_n},1,{dim}]>" if tiles.tma else "*bf16"
    return {"lse_ptr": "*fp32", "delta_ptr": "*fp32", "scale": "fp32"}.get(name, "i32")


def source_of(kernel: Any, kinds: dict[str, Any], chosen: dict[str, object], row: int) -> ASTSource:
    """A kernel to compile: ``chosen`` are its constants, ``row`` the stride from row to row that the compiler knows.

    Pointers and the other strides of a bundle are multiples of 16, as they are in training.
    """
    constants: dict[tuple[int, ...], object] = {}
    aligned: list[tuple[int, ...]] = []
    for i, (name, kind) in enumerate(kinds.items()):
        if kind == "constexpr":
            constants[(i,)] = chosen[name]
        elif isinstance(kind, tuple):
            fixed = [None if field in OF_STARTS else row for field in kind._fields]
            constants |= {(i, j): fixed[j] for j, member in enumerate(kind) if member == "constexpr"}
            aligned += [(i, j) for j, member in enumerate(kind) if member != "constexpr"]
        elif kind.startswith("*"):
            aligned.append((i,))
    attributes = {path: [["tt.divisibility", 16]] for path in aligned}
    return ASTSource(kernel, kinds, constexprs=constants, attrs=attributes)


def compiled(
    name: str, capability: int, dim: int, tiles: TileSizes, *, starts: bool = False, **options: object
) -> Any:
    kernel = KERNELS[name]
    chosen: dict[str, object] = {
        "HEAD_DIM": dim, "BLOCK_D": padded(dim), "BLOCK_M": tiles.block_m, "BLOCK_N": tiles.block_n, "SIZE": 128,
        "PRECISION": "tf32", "TOEPLITZ": True, "GROUP": 4, "SPLITS": 1, "HAS_PREV": True, "EVEN": True,
        "TMA": tiles.tma, "ADD": True, **options,
    }  # fmt: skip
    bundles = kernel.fn.__annotations__
    kinds = {
        arg: "constexpr" if arg in chosen else kind_of(arg, bundles.get(arg, ""), tiles, dim, starts)
        for arg in kernel.arg_names
    }
    launch = {"num_warps": tiles.warps, "num_stages": tiles.stages}
    source = source_of(kernel, kinds, chosen, 32 * dim)
    return compile_kernel(source, target=GPUTarget("cuda", capability, 32), options=launch | ALWAYS)


@pytest.mark.parametrize("starts", [False, True], ids=["", "starts"])
@pytest.mark.parametrize("capability", SHARED_KIB)
@pytest.mark.parametrize("name", KERNELS)
def test_compiles(name: str, capability: int, starts: bool) -> None:
    tiles = table_tiles(name, 128, divmod(capability, 10))
    result = compiled(name, capability, 128, tiles, starts=starts)
    assert result.asm["cubin"]
    assert 0 < result.metadata.shared <= SHARED_KIB[capability] * 1024


def compiled_probe(
    kernel: Any, capability: int, dim: int, size: int, probes: int = 256, scoped: bool = False
) -> Any:
    """A kernel of the probe for bf16; ``size``: tokens of a block diagonal, 1 for distances."""
    tiles = triton_probe.probe_tiles(probes, dim, 2, divmod(capability, 10), size)
    constants = (size, 8, 4, dim, padded(dim), tiles.queries, tiles.keys, "tf32")
    kinds: dict[str, Any] = dict.fromkeys(("probe", "k"), Strided("*bf16", "i32", "i32", "i32"))
    kinds |= dict.fromkeys(("scale_log2", "unit"), "fp32")
    kinds |= dict.fromkeys(("probe_pos_ptr", "key_pos_ptr", "total_ptr"), "*i64")
    kinds["shape"] = "constexpr"
    kinds["scope"] = triton_probe.Scope(*("*i64" if scoped else "constexpr",) * 3)
    types = {arg: kinds.get(arg, "*fp32" if arg.endswith("_ptr") else "i32") for arg in kernel.arg_names}
    source = source_of(kernel, types, {"shape": triton_probe.Shape(*constants)}, 0)
    return compile_kernel(source, target=GPUTarget("cuda", capability, 32), options=tiles.options | ALWAYS)


@pytest.mark.parametrize(
    ("capability", "dim", "size"),
    [(80, 128, 128), (90, 128, 128), (100, 128, 128), (90, 64, 64), (90, 128, 1)],
)
@pytest.mark.parametrize("scoped", [False, True], ids=["", "scoped"])
def test_probe_compiles(capability: int, dim: int, size: int, scoped: bool) -> None:
    result = compiled_probe(triton_probe.probe_mass_kernel, capability, dim, size, scoped=scoped)
    assert result.asm["cubin"]
    assert 0 < result.metadata.shared <= 128 * 1024
    if size > 1:
        # Three programs a multiprocessor; tiles of scores never travel through shared memory.
        assert result.metadata.shared <= SHARED_KIB[capability] * 1024 // 3
        assert not re.search(r"convert_layout.*tensor<\d+x\d+xf32", result.asm["ttgir"])


@pytest.mark.parametrize("scoped", [False, True], ids=["", "scoped"])
def test_probe_lse_compiles(scoped: bool) -> None:
    result = compiled_probe(triton_probe.probe_lse_kernel, 90, 128, 1, scoped=scoped)
    assert 0 < result.metadata.shared <= 128 * 1024


@pytest.mark.parametrize(
    ("capability", "dim", "dtype"),
    [
        (80, 128, "bf16"),
        (86, 64, "bf16"),
        (90, 96, "bf16"),
        (90, 256, "bf16"),
        (100, 128, "bf16"),
        (90, 128, "fp32"),
        (90, 256, "fp32"),
    ],
)
def test_decode_compiles(capability: int, dim: int, dtype: str) -> None:
    tiles = triton_decode.decode_tiles(dim, 4 if dtype == "fp32" else 2)
    chosen: dict[str, object] = {
        "KV_HEADS": 2, "GROUP": 8, "Q_HEADS": 16, "HEAD_DIM": dim, "BLOCK_D": padded(dim), "BLOCK_G": 16,
        "BLOCK_N": tiles.keys, "BLOCK_S": 16, "firsts_ptr": None, "PRECISION": "ieee" if dtype == "fp32" else "tf32",
    }  # fmt: skip
    kinds = dict.fromkeys(("q_ptr", "k_ptr", "v_ptr"), f"*{dtype}") | {
        "lengths_ptr": "*i32",
        "scale_log2": "fp32",
    }
    for kernel, options in ((triton_decode.decode_kernel, tiles.options), (triton_decode.join_kernel, {})):
        names = list(enumerate(kernel.arg_names))
        types = {
            name: "constexpr"
            if name in chosen
            else kinds.get(name, "*fp32" if name.endswith("_ptr") else "i32")
            for _, name in names
        }
        source = ASTSource(
            kernel, types, constexprs={(i,): chosen[name] for i, name in names if name in chosen},
            attrs={
                (i,): [["tt.divisibility", 16]]
                for i, name in names if types[name].startswith("*") or re.fullmatch(r"[qkv]_[bsh]", name)
            },
        )  # fmt: skip
        result = compile_kernel(source, target=GPUTarget("cuda", capability, 32), options=options | ALWAYS)
        assert result.asm["cubin"]
        assert result.metadata.shared <= min(96, SHARED_KIB[capability]) * 1024
        if kernel is triton_decode.decode_kernel:
            assert ".local" not in result.asm["ptx"]
            # Keys and values come in pieces of 16 bytes a thread.
            assert re.search(r"cp.async.cg.shared.global \[.*\], \[.*\], 0x10", result.asm["ptx"])


@pytest.mark.parametrize("to", ["*bf16", "*fp32"], ids=["final", "going on"])
@pytest.mark.parametrize("dim", [64, 96, 128])
@pytest.mark.parametrize("capability", [80, 90])
def test_a_merge_reads_all_before_it_writes(capability: int, dim: int, to: str) -> None:
    """It writes where it reads, and not every thread what it read: the lse of a warp's rows are another's to store."""
    kernel = triton_partial._merge_kernel
    chosen: dict[str, object] = {"HEAD_DIM": dim, "BLOCK_D": padded(dim), "BLOCK_M": 32}
    pointers = {"part": "*bf16", "out": "*fp32", "to": to}
    kinds = {
        name: "constexpr" if name in chosen
        else Strided(pointers[name], "i32", "i32", "i32") if name in pointers
        else "*fp32" if name.endswith("_ptr") else "i32"
        for name in kernel.arg_names
    }  # fmt: skip
    source = source_of(kernel, kinds, chosen, 0)
    ptx = compile_kernel(source, target=GPUTarget("cuda", capability, 32), options=ALWAYS).asm["ptx"]
    last_read, first_write = ptx.rindex("ld.global"), ptx.index("st.global")
    assert last_read < first_write
    assert "bar.sync" in ptx[last_read:first_write]


def test_hopper_kernels_use_asynchronous_products_and_copies() -> None:
    ptx = compiled("tiles_forward", 90, 64, table_tiles("tiles_forward", 64, (9, 0))).asm["ptx"]
    assert "wgmma.mma_async" in ptx
    assert "cp.async" in ptx
