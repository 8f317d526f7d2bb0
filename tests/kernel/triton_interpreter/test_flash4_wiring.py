"""All of the flash4 backend but flash-attn-4 itself: an eager stand-in reads the block lists and mask as it would."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from mtraining.errors import UserError
from mtraining.kernel.external import flash4
from mtraining.kernel.external.partial import BlockLists, block_lists, merge_partial
from triton_cases import Case, assert_equal, assert_passes, build, reference, solve, whole

SIZE = 128
CASES = {
    "whole": whole(3, size=SIZE, dim=16),
    "mha, batch": whole(2, size=SIZE, dim=16, q_heads=2, kv_heads=2, batch=2),
    "no diagonal": whole(3, size=SIZE, dim=16, diagonal_share=0.0),
    "block mask": whole(3, size=SIZE, dim=16, block_share=0.4, diagonal_share=0.2),
    "striped, other keys": Case(range(1, 6, 2), range(0, 6, 2), 6, size=SIZE, dim=16),
    "zigzag, own keys": Case((1, 4), (1, 4), 6, size=SIZE, dim=16),
    "all masked": Case((0, 1), (2, 3), 4, size=SIZE, dim=16),
    "documents": whole(3, size=SIZE, dim=16, starts="anywhere", batch=2, diagonal_share=0.8),
    "documents at blocks": whole(4, size=SIZE, dim=16, starts="blocks", diagonal_share=1.0, columns=0),
    "a window": whole(4, size=SIZE, dim=16, starts="wide", diagonal_share=1.0),
    "striped documents": Case(range(1, 6, 2), range(0, 6, 2), 6, size=SIZE, dim=16, starts="anywhere"),
    "lists of documents": whole(3, size=SIZE, dim=16, block_share=0.6, starts="tokens"),
}


def listed_mask(lists: BlockLists, mask_mod: Any, rows: int, cols: int, aux: Any) -> Tensor:
    """bool (batch, heads, rows, cols) of tokens: full tiles whole, partial ones where mask_mod says."""
    mask = torch.zeros(*lists.full_counts.shape, cols, dtype=torch.bool)
    partial = mask.clone()
    for target, counts, entries in (
        (mask, lists.full_counts, lists.full),
        (partial, lists.masked_counts, lists.masked),
    ):
        for at in torch.cartesian_prod(*(torch.arange(n) for n in counts.shape)).tolist():
            count = int(counts[tuple(at)])
            chosen = entries[tuple(at)][:count].long()
            assert chosen.unique().numel() == count
            target[tuple(at)][chosen] = True
    assert not (mask & partial).any()
    tokens = torch.arange(max(rows, cols) * SIZE)
    keep = mask_mod(None, None, tokens[: rows * SIZE, None], tokens[None, : cols * SIZE], None, aux)
    keep = keep if keep.ndim == 2 else keep[:, None]
    spread = [m.repeat_interleave(SIZE, -2).repeat_interleave(SIZE, -1) for m in (mask, partial)]
    return spread[0] | spread[1] & keep


def scores(q: Tensor, k: Tensor, mask: Tensor, scale: float) -> Tensor:
    keys = k.repeat_interleave(q.shape[2] // k.shape[2], 2)
    return (torch.einsum("bqhd,bkhd->bhqk", q, keys) * scale).masked_fill(~mask, -torch.inf)


def fwd(q: Tensor, k: Tensor, v: Tensor, *, softmax_scale: float, mask_mod: Any, block_sparse_tensors: BlockLists,
        return_lse: bool, pack_gqa: bool, aux_tensors: Any = None) -> tuple[Tensor, ...]:  # fmt: skip
    mask = listed_mask(block_sparse_tensors, mask_mod, q.shape[1] // SIZE, k.shape[1] // SIZE, aux_tensors)
    s = scores(q, k, mask, softmax_scale)
    prob = s.softmax(-1).masked_fill(~mask.any(-1, keepdim=True), 0.0)
    values = v.repeat_interleave(q.shape[2] // v.shape[2], 2)
    lse = s.logsumexp(-1)
    lse = torch.where(lse.isnan(), -torch.inf, lse)  # as its Softmax.finalize does
    return torch.einsum("bhqk,bkhd->bqhd", prob, values), lse, None, None


def bwd(q: Tensor, k: Tensor, v: Tensor, out: Tensor, dout: Tensor, lse: Tensor, *, softmax_scale: float,
        mask_mod: Any, block_sparse_tensors: BlockLists, dlse: Tensor, dk: Tensor, dv: Tensor,
        aux_tensors: Any = None) -> tuple[Tensor, ...]:  # fmt: skip
    def transposed(batch: Any, head: Any, keys: Tensor, queries: Tensor, *rest: Any) -> Tensor:
        return mask_mod(batch, head, queries, keys, *rest)

    rows, cols = k.shape[1] // SIZE, q.shape[1] // SIZE
    mask = listed_mask(block_sparse_tensors, transposed, rows, cols, aux_tensors).transpose(-1, -2)
    s = scores(q, k, mask, softmax_scale)
    prob = (s - torch.where(lse.isneginf(), 0.0, lse)[..., None]).exp()
    group = q.shape[2] // k.shape[2]
    delta = (out * dout).sum(-1).transpose(1, 2) - dlse
    dprob = torch.einsum("bqhd,bkhd->bhqk", dout, v.repeat_interleave(group, 2))
    ds = prob * (dprob - delta[..., None]) * softmax_scale
    dq = torch.einsum("bhqk,bkhd->bqhd", ds, k.repeat_interleave(group, 2))
    for into, a, b in ((dk, ds, q), (dv, prob, dout)):
        into.copy_(torch.einsum("bhqk,bqhd->bkhd", a, b).unflatten(2, (-1, group)).sum(3))
    return dq, dk, dv


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        flash4, "flash4_interface", lambda: SimpleNamespace(_flash_attn_fwd=fwd, _flash_attn_bwd=bwd)
    )
    monkeypatch.setattr(flash4, "_as_blocks", lambda lists: lists)
    monkeypatch.setattr(
        flash4, "_diagonal_tile", lambda: lambda b, h, q, kv, info, aux: q % SIZE >= kv % SIZE
    )
    monkeypatch.setattr(
        flash4,
        "_between_bounds",
        lambda: lambda b, h, q, kv, info, aux: (kv >= aux[0][:, q]) & (kv <= aux[1][q]),
    )


@pytest.mark.usefixtures("stand_in")
@pytest.mark.parametrize("name", CASES)
def test_lists_merge_and_global_delta_give_the_reference(name: str) -> None:
    problem = build(CASES[name])
    assert_equal(solve(flash4.Flash4Backend(), problem), reference(problem), 1e-5)


@pytest.mark.usefixtures("stand_in")
@pytest.mark.parametrize("name", ["no diagonal", "zigzag, own keys"])
def test_first_and_last_passes(name: str) -> None:
    assert_passes(flash4.Flash4Backend(), build(CASES[name]), 1e-5)


@pytest.mark.usefixtures("stand_in")
@pytest.mark.parametrize("final", [False, True])
@pytest.mark.parametrize("merging", [False, True])
def test_nan_goes_through(merging: bool, final: bool) -> None:
    """Hidden, a run whose activations broke would go on with zeros."""
    p = build(whole(3, size=SIZE, diagonal_share=1.0))
    p.q[:, 5, -1] = torch.nan
    before = (
        torch.randn(p.q.shape),
        torch.randn(p.q.shape[0], p.q.shape[2], p.q.shape[1]),
    )
    out, _ = flash4.Flash4Backend().tiles_forward(
        p.q, p.k, p.v, p.index, p.place, p.scale, *(before if merging else (None, None)), final=final
    )
    assert out[:, 5, -1].isnan().all()
    assert out.isnan().sum() == out[:, 5, -1].numel()


@pytest.mark.usefixtures("stand_in")
def test_other_blocks_and_deterministic_runs_are_refused() -> None:
    problem = build(whole(2, size=32))
    with pytest.raises(
        UserError, match=r"pattern\.block_size: kernel=flash4 computes blocks of 128 tokens, not 32"
    ):
        solve(flash4.Flash4Backend(), problem)
    problem = build(whole(1, size=SIZE))
    torch.use_deterministic_algorithms(True)
    try:
        with pytest.raises(UserError, match=r"kernel: 'flash4' adds gradients in no fixed order"):
            solve(flash4.Flash4Backend(), problem)
        p = problem
        with pytest.raises(
            UserError, match=r"use kernel=triton, which repeats bit for bit"
        ):  # at once, not a pass later
            flash4.Flash4Backend().tiles_forward(p.q, p.k, p.v, p.index, p.place, p.scale, None, None)
    finally:
        torch.use_deterministic_algorithms(False)


def test_lists_do_not_repeat_and_keep_order() -> None:
    problem = build(whole(5, size=16, diagonal_share=1.0))
    lists = block_lists(problem.index, problem.place, key_major=False)
    assert lists.full_counts[0, 1].tolist() == [0, 1, 2, 3, 4] and lists.masked[0, 1, :, 0].tolist() == [
        0,
        1,
        2,
        3,
        4,
    ]
    assert lists.full[0, 1, 4, :4].tolist() == [0, 1, 2, 3]
    by_key = block_lists(problem.index, problem.place, key_major=True)
    assert (
        by_key.full[0, 1, 0, :4].tolist() == [1, 2, 3, 4] and by_key.masked_counts[0, 1].tolist() == [1] * 5
    )
    assert lists.full_counts[0, 0].sum() == 0 and lists.masked_counts[0, 0].sum() == 0


def test_merge_is_exact_for_rows_without_keys_on_either_side() -> None:
    part = torch.randn(1, 40, 2, 16)
    part_lse = torch.randn(1, 2, 40)
    part_lse[..., :10] = -torch.inf
    part[:, :10] = 0.0
    out, lse = merge_partial(part, part_lse, None, None)
    assert (
        out[:, :10].abs().sum() == 0 and torch.equal(lse, part_lse) and torch.equal(out[:, 10:], part[:, 10:])
    )
    last, last_lse = merge_partial(part.clone(), part_lse, None, None, final=True)
    assert torch.equal(last, out) and torch.equal(last_lse, lse)
    nothing = torch.full_like(part_lse, -torch.inf)
    kept, kept_lse = merge_partial(torch.zeros_like(part), nothing, out.clone(), lse.clone())
    assert torch.equal(kept, out) and torch.allclose(kept_lse, lse, atol=1e-6)
    assert torch.equal(kept_lse.isneginf(), lse.isneginf())
