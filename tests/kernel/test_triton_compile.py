"""Every attention kernel compiles for each generation of GPUs, on a machine with none, within its shared memory."""

from __future__ import annotations

import re
from typing import Any

import pytest

pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.compiler import compile as compile_kernel

from mtraining.kernel.external import partial as triton_partial
from mtraining.kernel.triton import columns as triton_columns
from mtraining.kernel.triton import decode as triton_decode
from mtraining.kernel.triton import probe as triton_probe
from mtraining.kernel.triton import slashes as triton_tiles
from mtraining.kernel.triton.tile_sizes import Tiles, padded, table_tiles

KERNELS = {
    "tiles_forward": triton_tiles.forward_kernel,
    "tiles_dq": triton_tiles.query_gradient_kernel,
    "tiles_dkdv": triton_tiles.key_gradient_kernel,
    "columns_forward": triton_columns.forward_kernel,
    "columns_dq": triton_columns.query_gradient_kernel,
    "columns_dkdv": triton_columns.key_gradient_kernel,
}
SHARED_KIB = {80: 163, 86: 99, 90: 227, 100: 227}  # a block may take at most, by compute capability
HALF = {"q_ptr", "k_ptr", "v_ptr", "do_ptr"}


def signature_type(name: str, tiles: Tiles, dim: int) -> str:
    if name.endswith("_source"):
        return f"tensordesc<bf16[1,{tiles.block_n},1,{dim}]>" if tiles.tma else "*bf16"
    if name in HALF:
        return "*bf16"
    if name.endswith("_ptr") and name not in ("columns_ptr", "words_ptr", "before_ptr", "upto_ptr"):
        return "*fp32"
    if re.fullmatch(r"(do|dq|dk|q|k|v|o)_b", name):
        return "i64"
    if name == "scale":
        return "fp32"
    pointers = ("entries", "bounds", "row_blocks", "col_blocks", "q_blocks", "first_slot", "first_seen")
    return "*i32" if name.endswith("_ptr") or name in pointers else "i32"


def compiled(name: str, capability: int, dim: int, tiles: Tiles) -> Any:
    kernel = KERNELS[name]
    chosen: dict[str, object] = {
        "HEAD_DIM": dim, "BLOCK_D": dim, "BLOCK_M": tiles.block_m, "BLOCK_N": tiles.block_n, "SIZE": 128,
        "PRECISION": "tf32", "TOEPLITZ": True, "GROUP": 4, "SPLITS": 1, "HAS_PREV": True, "EVEN": True,
        "TMA": tiles.tma, "ADD": True,
    }  # fmt: skip
    chosen |= {row: 32 * dim for row in kernel.arg_names if re.fullmatch(r"\w+_r", row)}
    constants = {(i,): chosen[arg] for i, arg in enumerate(kernel.arg_names) if arg in chosen}
    types = {
        arg: "constexpr" if arg in chosen else signature_type(arg, tiles, dim) for arg in kernel.arg_names
    }
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, arg in enumerate(kernel.arg_names)
        if types[arg].startswith("*") or re.fullmatch(r"\w+_[bh]", arg)
    }
    source = ASTSource(kernel, types, constexprs=constants, attrs=aligned)
    options = {"num_warps": tiles.warps, "num_stages": tiles.stages}
    return compile_kernel(source, target=GPUTarget("cuda", capability, 32), options=options)


@pytest.mark.parametrize("capability", SHARED_KIB)
@pytest.mark.parametrize("name", KERNELS)
def test_compiles(name: str, capability: int) -> None:
    tiles = table_tiles(name, 128, divmod(capability, 10))
    result = compiled(name, capability, 128, tiles)
    assert result.asm["cubin"]
    assert 0 < result.metadata.shared <= SHARED_KIB[capability] * 1024


def compiled_probe(kernel: Any, capability: int, dim: int, size: int, probes: int = 256) -> Any:
    """A kernel of the probe for bf16; ``size``: tokens of a block diagonal, 1 for distances."""
    tiles = triton_probe.probe_tiles(probes, dim, 2, divmod(capability, 10), size)
    chosen: dict[str, object] = {
        "SIZE": size, "KV_HEADS": 8, "GROUP": 4, "HEAD_DIM": dim, "BLOCK_D": padded(dim), "BLOCK_M": tiles.queries,
        "BLOCK_N": tiles.keys, "PRECISION": "tf32",
    }  # fmt: skip
    kinds = dict.fromkeys(("probe_ptr", "k_ptr"), "*bf16") | dict.fromkeys(("scale_log2", "unit"), "fp32")
    kinds |= dict.fromkeys(("probe_pos_ptr", "key_pos_ptr", "total_ptr"), "*i64")
    names = kernel.arg_names
    types = {
        arg: "constexpr" if arg in chosen else kinds.get(arg, "*fp32" if arg.endswith("_ptr") else "i32")
        for arg in names
    }
    constants = {(i,): chosen[arg] for i, arg in enumerate(names) if arg in chosen}
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, arg in enumerate(names)
        if types[arg].startswith("*") or re.fullmatch(r"[qk]_[bpsh]", arg)
    }
    source = ASTSource(kernel, types, constexprs=constants, attrs=aligned)
    return compile_kernel(source, target=GPUTarget("cuda", capability, 32), options=tiles.options)


@pytest.mark.parametrize(
    ("capability", "dim", "size"),
    [(80, 128, 128), (90, 128, 128), (100, 128, 128), (90, 64, 64), (90, 128, 1)],
)
def test_probe_compiles(capability: int, dim: int, size: int) -> None:
    result = compiled_probe(triton_probe.probe_mass_kernel, capability, dim, size)
    assert result.asm["cubin"]
    assert 0 < result.metadata.shared <= 128 * 1024
    if size > 1:
        # Three programs a multiprocessor; tiles of scores never travel through shared memory.
        assert result.metadata.shared <= SHARED_KIB[capability] * 1024 // 3
        assert not re.search(r"convert_layout.*tensor<\d+x\d+xf32", result.asm["ttgir"])


def test_probe_lse_compiles() -> None:
    assert 0 < compiled_probe(triton_probe.probe_lse_kernel, 90, 128, 1).metadata.shared <= 128 * 1024


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
        "BLOCK_N": tiles.keys, "BLOCK_S": 16, "PRECISION": "ieee" if dtype == "fp32" else "tf32",
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
        result = compile_kernel(source, target=GPUTarget("cuda", capability, 32), options=options)
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
    kinds = {"part_ptr": "*bf16", "to_ptr": to}
    types = {
        name: "constexpr" if name in chosen else kinds.get(name, "*fp32" if name.endswith("_ptr") else "i32")
        for name in kernel.arg_names
    }
    names = list(enumerate(kernel.arg_names))
    aligned = [(i,) for i, name in names if types[name].startswith("*") or re.fullmatch(r"[pot]_[brh]", name)]
    source = ASTSource(
        kernel, types, constexprs={(i,): chosen[name] for i, name in names if name in chosen},
        attrs={place: [["tt.divisibility", 16]] for place in aligned},
    )  # fmt: skip
    ptx = compile_kernel(source, target=GPUTarget("cuda", capability, 32), options={}).asm["ptx"]
    last_read, first_write = ptx.rindex("ld.global"), ptx.index("st.global")
    assert last_read < first_write
    assert "bar.sync" in ptx[last_read:first_write]


def test_hopper_kernels_use_asynchronous_products_and_copies() -> None:
    ptx = compiled("tiles_forward", 90, 64, table_tiles("tiles_forward", 64, (9, 0))).asm["ptx"]
    assert "wgmma.mma_async" in ptx
    assert "cp.async" in ptx
