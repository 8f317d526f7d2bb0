"""Dense attention by dense kernels: the pieces of a ring step, their merge, and what a foreign kernel is told."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mtraining.errors import UserError
from mtraining.kernel import Placement, ReferenceBackend, SparseIndex, dense_index, select_backend
from mtraining.kernel.backend import KERNELS
from mtraining.kernel.external import dense as dense_module
from mtraining.kernel.external.dense import WithDense
from mtraining.kernel.external.dense_kernels import CudnnDense, DenseKernel, Flash4Dense, FlashDense, stand_in
from mtraining.kernel.placement import causal_pieces
from mtraining.kernel.starts import check_starts_kernel, document_starts
from mtraining.layout import build_layout
from triton_cases import relative_error, tiles_gradients

CPU = torch.device("cpu")
SIZE = 8
PLACES = {
    "own": ((0, 1, 2, 3), (0, 1, 2, 3)),
    "zigzag, own": ((2, 3, 8, 9), (2, 3, 8, 9)),
    "zigzag, from before": ((4, 5, 6, 7), (2, 3, 8, 9)),
    "zigzag, from after": ((2, 3, 8, 9), (4, 5, 6, 7)),
    "striped, own": ((1, 4, 7, 10), (1, 4, 7, 10)),
    "striped, other": ((1, 4, 7, 10), (0, 3, 6, 9)),
    "nothing to see": ((0, 1), (2, 3)),
    "some see nothing": ((0, 5), (2, 3)),
    "more keys than queries": ((5, 6), tuple(range(12))),
}


def area(q_blocks: Sequence[int], k_blocks: Sequence[int]) -> Tensor | None:
    """How often the pieces compute each pair of tokens, a block being two; None where there are no pieces."""
    pieces = causal_pieces(torch.tensor(q_blocks), torch.tensor(k_blocks))
    if pieces is None:
        return None
    count = torch.zeros(2 * len(q_blocks), 2 * len(k_blocks), dtype=torch.int64)
    for piece in pieces:
        rectangle = count[piece.rows(2)]
        assert rectangle.numel(), "an empty launch"
        if piece.causal:
            assert rectangle.shape[0] == rectangle.shape[1]
        rectangle += torch.ones_like(rectangle).tril() if piece.causal else 1
    return count


def causal(q_blocks: Sequence[int], k_blocks: Sequence[int]) -> Tensor:
    rows, keys = (
        (2 * torch.tensor(blocks)[:, None] + torch.arange(2)).flatten() for blocks in (q_blocks, k_blocks)
    )
    return (rows[:, None] >= keys[None, :]).long()


BLOCKS = st.lists(st.integers(0, 11), min_size=1, unique=True).map(sorted)


@given(BLOCKS, BLOCKS)
def test_pieces_are_causal_attention_each_pair_once(q_blocks: list[int], k_blocks: list[int]) -> None:
    count = area(q_blocks, k_blocks)
    if count is not None:
        assert torch.equal(count, causal(q_blocks, k_blocks))


@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
@pytest.mark.parametrize("world", [1, 2, 4, 8])
def test_runs_take_at_most_one_launch_a_step(layout: str, world: int) -> None:
    blocks = build_layout(layout).blocks(128 * 16 * world, world, 128)
    for mine in blocks:
        for theirs in blocks:
            pieces = causal_pieces(mine, theirs)
            assert pieces is not None
            assert len(pieces) <= 1
            assert area(mine.tolist(), theirs.tolist()) is not None


def test_stripes_have_pieces_for_their_own_keys_only() -> None:
    blocks = build_layout("striped").blocks(128 * 64, 4, 128)
    own = causal_pieces(blocks[1], blocks[1])
    assert own is not None
    assert [piece.causal for piece in own] == [True]
    assert causal_pieces(blocks[1], blocks[0]) is None


def problem(
    place: str, heads: tuple[int, int], batch: int = 2
) -> tuple[list[Tensor], SparseIndex, Placement]:
    """q, k, v, dout in fp64, with a dense index."""
    q_blocks, k_blocks = (torch.tensor(blocks) for blocks in PLACES[place])
    lengths = (len(q_blocks), len(k_blocks), len(k_blocks), len(q_blocks))
    tensors = [
        torch.randn(batch, n * SIZE, h, 16, dtype=torch.float64)
        for n, h in zip(lengths, (heads[0], heads[1], heads[1], heads[0]), strict=True)
    ]
    index = dense_index(batch, heads[0], 12 * SIZE, SIZE, CPU)
    return tensors, index, Placement(q_blocks, k_blocks, 12, pieces=causal_pieces(q_blocks, k_blocks))


def flash() -> WithDense:
    return WithDense("flash", ReferenceBackend(), FlashDense(), only=True)


def earlier(q: Tensor) -> tuple[Tensor, Tensor]:
    """A previous partial result; its first rows saw nothing."""
    out, lse = torch.randn_like(q), torch.randn(q.shape[0], q.shape[2], q.shape[1], dtype=q.dtype)
    lse[..., :SIZE] = -torch.inf
    return out.masked_fill_(lse.transpose(1, 2)[..., None].isneginf(), 0.0), lse


@pytest.mark.parametrize("heads", [(2, 2), (6, 2), (3, 1)], ids=str)
@pytest.mark.parametrize("merging", [False, True])
@pytest.mark.parametrize("place", PLACES)
def test_equals_the_reference(place: str, merging: bool, heads: tuple[int, int]) -> None:
    (q, k, v, dout), index, placement = problem(place, heads)
    before = earlier(q) if merging else (None, None)
    copies = [None if x is None else x.clone() for x in before]
    out, lse = flash().tiles_forward(q, k, v, index, placement, 0.3, copies[0], copies[1])
    want, want_lse = ReferenceBackend().tiles_forward(q, k, v, index, placement, 0.3, *before)
    torch.testing.assert_close(lse, want_lse, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(out, want, rtol=1e-12, atol=1e-12)

    global_lse = torch.where(want_lse.isneginf(), 0.0, want_lse) + 0.5  # other ranks' keys weigh as well
    delta = torch.randn_like(global_lse)
    grads = []
    for backend in (flash(), ReferenceBackend()):
        before = torch.ones_like(q)
        dq, dkv = tiles_gradients(backend, dout, q, k, v, global_lse, delta, index, placement, 0.3, before)
        grads.append((dq, *dkv))
    for name, ours, theirs in zip(("dq", "dk", "dv"), *grads, strict=True):
        assert relative_error(ours, theirs) < 1e-12, name
    if place != "nothing to see":
        assert not torch.equal(grads[1][0], torch.ones_like(q))


def test_columns_of_a_dense_index_are_in_its_tiles() -> None:
    """A union of dense and another pattern names columns as well."""
    (q, k, v, dout), index, placement = problem("zigzag, own", (2, 1))
    columns = torch.arange(3, dtype=torch.int32).expand(*index.columns.shape[:2], 3).contiguous()
    both = replace(index, columns=columns)
    compact = torch.randn(2, q.shape[0], 3, *q.shape[2:], dtype=q.dtype)
    pair = (compact[0], compact[1])
    for backend in (flash(), ReferenceBackend()):
        out, lse = backend.tiles_forward(q, k, v, index, placement, 0.3, None, None)
        again, lse_again = backend.tiles_forward(q, k, v, both, placement, 0.3, None, None, columns=pair)
        assert torch.equal(again, out) and torch.equal(lse_again, lse)
        delta = torch.randn_like(lse)
        dq, _ = tiles_gradients(backend, dout, q, k, v, lse, delta, index, placement, 0.3, None)
        same, _ = tiles_gradients(
            backend, dout, q, k, v, lse, delta, both, placement, 0.3, None, columns=pair
        )
        assert torch.equal(same, dq)
        assert not backend.columns_backward(dout, q, *pair, lse, delta, both, placement.q_blocks, 0.3).any()


def test_a_stand_in_has_the_delta_it_was_given() -> None:
    dout = torch.randn(2, 5, 3, 64) * torch.tensor([1.0, 1e-30, 0.0, 1e30, 1e-3])[:, None, None]
    delta = (torch.randn(2, 5, 3) * dout.double().norm(dim=-1)).float()
    out = stand_in(dout, delta.transpose(1, 2))
    assert out.isfinite().all()
    for row in (0, 1, 3, 4):  # each alone: beside the large one nobody would see the small one fail
        assert relative_error((dout.double() * out).sum(-1)[:, row], delta[:, row]) < 1e-6, row
    assert not out[:, 2].any()


class Flash4Double:
    """flash-attn-4's private functions, as its source describes them, in plain PyTorch: q, k, v rows first."""

    def __init__(self) -> None:
        self.deterministic: list[bool] = []

    def _flash_attn_fwd(
        self, q: Tensor, k: Tensor, v: Tensor, *, softmax_scale: float, causal: bool, return_lse: bool
    ):  # type: ignore[no-untyped-def]
        assert return_lse
        scores = self._scores(q, k, softmax_scale, causal)
        return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v), scores.logsumexp(-1), None, None, None

    def _flash_attn_bwd(  # type: ignore[no-untyped-def]
        self, q: Tensor, k: Tensor, v: Tensor, out: Tensor, dout: Tensor, lse: Tensor, *, softmax_scale: float,
        causal: bool, dlse: Tensor, deterministic: bool,
    ):  # fmt: skip
        self.deterministic.append(deterministic)
        prob = (self._scores(q, k, softmax_scale, causal) - lse[..., None]).exp()
        delta = (out * dout).sum(-1).transpose(1, 2) - dlse
        dscore = prob * (torch.einsum("bqhd,bkhd->bhqk", dout, v) - delta[..., None]) * softmax_scale
        dq, dk = torch.einsum("bhqk,bkhd->bqhd", dscore, k), torch.einsum("bhqk,bqhd->bkhd", dscore, q)
        return dq, dk, torch.einsum("bhqk,bqhd->bkhd", prob, dout)

    def _scores(self, q: Tensor, k: Tensor, scale: float, causal: bool) -> Tensor:
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * scale
        future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu_(1)
        return scores.masked_fill(future, -torch.inf) if causal else scores


@pytest.mark.parametrize("deterministic", [False, True])
def test_flash4_is_told_the_global_delta(monkeypatch: pytest.MonkeyPatch, deterministic: bool) -> None:
    double = Flash4Double()
    monkeypatch.setattr("mtraining.kernel.external.dense_kernels.flash4_interface", lambda: double)
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: deterministic)
    backend = WithDense("flash4", ReferenceBackend(), Flash4Dense())
    (q, k, v, dout), index, placement = problem("zigzag, own", (2, 2))
    results: list[Any] = []
    for each in (backend, ReferenceBackend()):
        out, lse = each.tiles_forward(q, k, v, index, placement, 0.3, None, None)
        delta = (out * dout).sum(-1).transpose(1, 2) + 0.7
        dq, dkv = tiles_gradients(each, dout, q, k, v, lse + 0.5, delta, index, placement, 0.3, None)
        results.append((out, dq, *dkv))
    for ours, theirs in zip(*results, strict=True):
        assert relative_error(ours, theirs) < 1e-12
    assert double.deterministic == [deterministic]


@pytest.mark.parametrize("kernel", [CudnnDense(), FlashDense()], ids=lambda kernel: kernel.name)
def test_operators_for_gpus_take_these_arguments(kernel: DenseKernel) -> None:
    """On the meta device: order, number and shapes of arguments, which no GPU is needed to get wrong."""
    q, k, v = (
        torch.empty(2, rows, heads, 64, device="meta", dtype=torch.bfloat16)
        for rows, heads in ((16, 4), (24, 2), (24, 2))
    )
    out, lse = kernel.forward(q, k, v, 0.3, causal=False)
    assert (out.shape, out.dtype) == (q.shape, q.dtype)
    assert (lse.shape, lse.dtype) == ((2, 4, 16), torch.float32)
    grads = kernel.backward(q, q, k, v, lse, lse, 0.3, causal=False)
    assert [x.shape for x in grads] == [q.shape, k.shape, v.shape]


def test_cudnn_is_refused_where_gradients_must_repeat(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    x, row = torch.zeros(1, 8, 1, 8), torch.zeros(1, 1, 8)
    with pytest.raises(UserError, match="'cudnn' adds gradients in no fixed order.*kernel=flash"):
        CudnnDense().backward(x, x, x, x, row, row, 0.3, causal=True)


def test_a_kernel_asked_for_by_name_refuses_the_rest() -> None:
    (q, k, v, _), index, placement = problem("own", (2, 2))
    sparse, scattered = replace(index, dense=False), replace(placement, pieces=None)
    backend = select_backend("flash", CPU, torch.float64, 16)
    with pytest.raises(UserError, match=r"kernel: 'flash' computes dense attention only.*kernel=auto"):
        backend.tiles_forward(q, k, v, sparse, placement, 0.3, None, None)
    with pytest.raises(UserError, match=r"this layout scatters them; use layout=zigzag"):
        backend.tiles_forward(q, k, v, index, scattered, 0.3, None, None)


def test_starts_go_to_tiles_or_are_refused() -> None:
    """Dense attention in documents is right by ``auto``, and refused where a dense kernel is asked for by name."""
    (q, k, v, _), index, placement = problem("own", (2, 2))
    starts = document_starts(torch.tensor([5, 9]), index.seq_len).expand(q.shape[0], -1).contiguous()
    bounded = replace(index, starts=starts)
    auto, truth = select_backend("auto", CPU, torch.float64, 16), ReferenceBackend()
    assert auto.name == "reference, dense flash"
    found = auto.tiles_forward(q, k, v, bounded, placement, 0.3, None, None)
    wanted = truth.tiles_forward(q, k, v, bounded, placement, 0.3, None, None)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    backend = select_backend("flash", CPU, torch.float64, 16)
    with pytest.raises(UserError, match=r"^kernel: 'flash' attends from the first token on.*use kernel=auto"):
        backend.tiles_forward(q, k, v, bounded, placement, 0.3, None, None)


@pytest.mark.parametrize("kernel", KERNELS)
def test_kernels_that_know_no_starts_are_refused_before_anything_runs(kernel: str) -> None:
    if kernel in ("auto", "reference", "triton", "flash4"):
        check_starts_kernel(kernel)
    else:
        with pytest.raises(UserError, match=f"^kernel: '{kernel}' attends from the first token on"):
            check_starts_kernel(kernel)


def test_auto_takes_tiles_where_dense_kernels_cannot_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    class NoKernel(FlashDense):
        def forward(self, *_: Any) -> tuple[Tensor, Tensor]:
            raise AssertionError("not for this index")

    dense_module._tell_scattered.cache_clear()
    (q, k, v, _), index, placement = problem("own", (2, 2))
    backend = WithDense("both", ReferenceBackend(), NoKernel())
    with pytest.raises(AssertionError, match="not for this index"):
        backend.tiles_forward(q, k, v, index, placement, 0.3, None, None)
    with caplog.at_level(logging.INFO):
        backend.tiles_forward(q, k, v, replace(index, dense=False), placement, 0.3, None, None)
        assert not caplog.text
        for _ in range(2):
            backend.tiles_forward(q, k, v, index, replace(placement, pieces=None), 0.3, None, None)
    assert caplog.text.count("tile by tile") == 1


def test_choice_by_name_and_by_auto(monkeypatch: pytest.MonkeyPatch) -> None:
    assert select_backend("auto", CPU, torch.float32, 64).name == "reference, dense flash"
    assert select_backend("flash", CPU, torch.float32, 64).name == "flash"
    with pytest.raises(UserError, match=r"kernel: 'cudnn' needs an NVIDIA GPU, not cpu; use kernel=auto"):
        select_backend("cudnn", CPU, torch.bfloat16, 64)


GPU = torch.device("cuda")


@pytest.mark.parametrize(
    ("flash4", "deterministic", "dtype", "head_dim", "chosen"),
    [
        (True, False, torch.bfloat16, 128, "flash4"),
        (True, True, torch.float16, 128, "flash4"),
        (False, False, torch.bfloat16, 128, "cudnn"),
        (False, True, torch.bfloat16, 128, "flash"),
        (True, False, torch.bfloat16, 256, "flash"),
        (True, False, torch.float32, 128, None),
    ],
)
def test_auto_on_a_gpu_takes_the_fastest_dense_kernel_that_can_serve(
    monkeypatch: pytest.MonkeyPatch, flash4: bool, deterministic: bool, dtype: torch.dtype, head_dim: int,
    chosen: str | None,
) -> None:  # fmt: skip
    choice = pytest.importorskip("mtraining.kernel.choice")
    pytest.importorskip("triton")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91000)
    monkeypatch.setattr(
        "mtraining.kernel.external.flash4._unsupported_version", lambda: None if flash4 else "is missing"
    )
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: deterministic)
    kernel, why = choice._fastest_dense(GPU, dtype, head_dim, deterministic)
    assert (kernel.name if kernel else None) == chosen
    if chosen != "flash4":
        assert "'flash4' " in why
    backend = choice._chosen.__wrapped__("auto", GPU, dtype, head_dim, deterministic)
    assert backend.name == (f"triton, dense {chosen}" if chosen else "triton")


def test_a_choice_kept_is_not_one_for_other_demands(monkeypatch: pytest.MonkeyPatch) -> None:
    choice = pytest.importorskip("mtraining.kernel.choice")
    monkeypatch.setattr(choice, "_flash4_unsupported", lambda *args: "is missing")
    monkeypatch.setattr(choice, "dense_unsupported", lambda *args: None)
    names = []
    for deterministic in (False, True, False):
        monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda asked=deterministic: asked)
        names.append(select_backend("auto", CPU, torch.bfloat16, 40).name)
    choice._chosen.cache_clear()
    assert names == ["reference, dense cudnn", "reference, dense flash", "reference, dense cudnn"]
