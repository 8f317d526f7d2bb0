"""Dense kernels against the fp64 reference: pieces of ring steps, a whole ring turned in one process, no waiting."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec

import pytest
import torch
from torch import Tensor

from mtraining.kernel import Backend, Placement, ReferenceBackend, SparseIndex, dense_index, select_backend
from mtraining.kernel.placement import causal_pieces
from mtraining.layout import build_layout
from triton_cases import relative_error, tiles_gradients

needs_fa4 = pytest.mark.skipif(find_spec("flash_attn") is None, reason="needs flash-attn-4")
KERNELS = [pytest.param("flash4", marks=needs_fa4), "cudnn", "flash"]
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning"),
]
CUDA, SIZE = torch.device("cuda"), 128
TOLERANCE = {torch.bfloat16: 6e-3, torch.float16: 1.5e-3}
PLACES = {
    "own": (range(8), range(8)),
    "zigzag, own": ((2, 3, 8, 9), (2, 3, 8, 9)),
    "zigzag, from before": ((4, 5, 6, 7), (2, 3, 8, 9)),
    "zigzag, from after": ((2, 3, 8, 9), (4, 5, 6, 7)),
    "nothing to see": ((0, 1), (2, 3)),
    "prefix and own": ((5, 6), range(12)),
}
SHAPES = {  # batch, q heads, kv heads, head_dim
    "group of 8": (1, 16, 2, 128),
    "group of 3, batch": (2, 9, 3, 64),
    "mha": (1, 3, 3, 96),
}


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    """However a test ends."""
    yield
    torch.cuda.set_sync_debug_mode("default")
    torch.use_deterministic_algorithms(False)


def tensors(
    rows: int, keys: int, shape: tuple[int, int, int, int], dtype: torch.dtype = torch.bfloat16
) -> list[Tensor]:
    """q, k, v, dout."""
    batch, heads, kv_heads, dim = shape
    made = torch.Generator(CUDA).manual_seed(rows + keys)
    return [
        torch.randn(batch, n * SIZE, h, dim, generator=made, device=CUDA).to(dtype)
        for n, h in ((rows, heads), (keys, kv_heads), (keys, kv_heads), (rows, heads))
    ]


def backend(kernel: str, dtype: torch.dtype, dim: int) -> Backend:
    return select_backend(kernel, CUDA, dtype, dim)


def case(
    place: str, shape: tuple[int, int, int, int], dtype: torch.dtype
) -> tuple[list[Tensor], SparseIndex, Placement]:
    q_blocks, k_blocks = (torch.tensor(tuple(blocks)) for blocks in PLACES[place])
    placement = Placement(q_blocks.to(CUDA), k_blocks.to(CUDA), 12, pieces=causal_pieces(q_blocks, k_blocks))
    index = dense_index(shape[0], shape[1], 12 * SIZE, SIZE, CUDA)
    return tensors(len(q_blocks), len(k_blocks), shape, dtype), index, placement


def solve(
    served: Backend, inputs: list[Tensor], index: SparseIndex, placement: Placement, before: list[Tensor]
) -> dict[str, Tensor]:
    """Forward merged into an earlier result, and backward under a lse and a delta of more keys than these."""
    q, k, v, dout = inputs
    scale = q.shape[-1] ** -0.5
    out, lse = served.tiles_forward(q, k, v, index, placement, scale, *(x.clone() for x in before))
    wide = before[1] + 6.0
    delta = before[0].sum(-1).transpose(1, 2).to(lse.dtype).contiguous()
    dq, (dk, dv) = tiles_gradients(
        served, dout, q, k, v, wide, delta, index, placement, scale, torch.zeros_like(out)
    )
    return {"out": out, "lse": lse, "dq": dq, "dk": dk, "dv": dv}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("kernel", KERNELS)
def test_a_ring_step_equals_the_reference(kernel: str, place: str, shape: str, dtype: torch.dtype) -> None:
    inputs, index, placement = case(place, SHAPES[shape], dtype)
    q = inputs[0]
    before = [torch.randn(q.shape, device=CUDA), torch.randn(q.shape[0], q.shape[2], q.shape[1], device=CUDA)]
    ours = solve(backend(kernel, dtype, q.shape[-1]), inputs, index, placement, before)
    truth = solve(
        ReferenceBackend(), [x.double() for x in inputs], index, placement, [x.double() for x in before]
    )
    assert (ours["lse"] - truth["lse"]).abs().max() < 1e-4
    for name in ("out", "dq", "dk", "dv"):
        assert ours[name].isfinite().all(), name
        assert relative_error(ours[name], truth[name]) < TOLERANCE[dtype], name


def turn(kernel: str, layout_name: str, world: int, whole: list[Tensor]) -> list[Tensor]:
    """out, dq, dk, dv of a ring whose ranks take turns in one process."""
    layout, seq_len, scale = build_layout(layout_name), whole[0].shape[1], whole[0].shape[-1] ** -0.5
    blocks = layout.blocks(seq_len, world, SIZE)
    served = select_backend(kernel, CUDA, whole[0].dtype, whole[0].shape[-1])
    index = dense_index(whole[0].shape[0], whole[0].shape[2], seq_len, SIZE, CUDA)
    shards = [[layout.shard(x, rank, world) for x in whole] for rank in range(world)]
    outs, dqs = [], []
    sums = [[torch.zeros_like(x, dtype=torch.float32) for x in shard[1:3]] for shard in shards]
    for rank, (q, _, _, dout) in enumerate(shards):
        steps = [
            (
                source,
                Placement(
                    blocks[rank].to(CUDA),
                    blocks[source].to(CUDA),
                    seq_len // SIZE,
                    pieces=causal_pieces(blocks[rank], blocks[source]),
                ),
            )
            for source in ((rank - step) % world for step in range(world))
        ]
        out = lse = None
        for source, place in steps:
            out, lse = served.tiles_forward(q, *shards[source][1:3], index, place, scale, out, lse)
        assert out is not None and lse is not None
        outs.append(out.to(q.dtype))
        dq, delta = None, served.row_delta(outs[-1], dout)
        for source, place in steps:
            dq, share = tiles_gradients(
                served, dout, q, *shards[source][1:3], lse, delta, index, place, scale, dq
            )
            for total, part in zip(sums[source], share, strict=True):
                total += part
        assert dq is not None
        dqs.append(dq)
    return [layout.unshard(list(x)) for x in (outs, dqs, *zip(*sums, strict=True))]


@pytest.mark.parametrize(("layout", "world"), [("zigzag", 4), ("contiguous", 3), ("zigzag", 1)])
@pytest.mark.parametrize("kernel", [*KERNELS, "auto"])
def test_a_ring_equals_the_reference(kernel: str, layout: str, world: int) -> None:
    whole = tensors(24, 24, (1, 8, 2, 128))
    ours = turn(kernel, layout, world, whole)
    truth = turn("reference", "contiguous", 1, [x.double() for x in whole])
    for name, got, want in zip(("out", "dq", "dk", "dv"), ours, truth, strict=True):
        assert relative_error(got, want) < 6e-3, name


@pytest.mark.parametrize("kernel", KERNELS)
def test_launches_agree_and_nothing_waits(kernel: str) -> None:
    whole = tensors(16, 16, (1, 16, 2, 128))
    index, served = dense_index(1, 16, 16 * SIZE, SIZE, CUDA), backend(kernel, torch.bfloat16, 128)
    before = [torch.zeros(whole[0].shape, device=CUDA), torch.zeros(1, 16, 16 * SIZE, device=CUDA)]
    place = index.placement()
    first = solve(served, whole, index, place, before)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    runs = [solve(served, whole, index, place, before) for _ in range(30)]
    torch.cuda.set_sync_debug_mode("default")
    for again in runs:
        for name, x in first.items():
            assert relative_error(again[name], x) < 1e-3, name


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kernel", [KERNELS[0], "flash"])
def test_same_bits_twice_when_asked_for(kernel: str, shape: str) -> None:
    torch.use_deterministic_algorithms(True)
    inputs, index, placement = case("own", SHAPES[shape], torch.bfloat16)
    q = inputs[0]
    before = [torch.zeros(q.shape, device=CUDA), torch.zeros(q.shape[0], q.shape[2], q.shape[1], device=CUDA)]
    served = backend(kernel, torch.bfloat16, q.shape[-1])
    first = solve(served, inputs, index, placement, before)
    for _ in range(5):
        again = solve(served, inputs, index, placement, before)
        assert all(torch.equal(again[name], x) for name, x in first.items())


@needs_fa4
def test_auto_takes_flash4() -> None:
    assert backend("auto", torch.bfloat16, 128).name == "triton, dense flash4"
