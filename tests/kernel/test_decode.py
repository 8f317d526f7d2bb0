"""The reference of decoding is the last row of plain attention; parts merge to the whole."""

from __future__ import annotations

import pytest
import torch

from decode_cases import decode_case
from mtraining.errors import UserError
from mtraining.kernel import merge, select_decode
from mtraining.kernel.reference.decode import decode_attention


def test_it_is_the_attention_of_one_query_over_the_first_keys() -> None:
    lengths = (9, 1, 14)
    q, k, v, counts = decode_case(6, 2, 16, lengths, dtype=torch.float64)
    out, lse = decode_attention(q, k, v, counts, 14, 0.3)
    for row, length in enumerate(lengths):
        for head in range(6):
            scores = 0.3 * k[row, :length, head // 3] @ q[row, head]
            torch.testing.assert_close(lse[row, head], scores.logsumexp(0))
            torch.testing.assert_close(out[row, head], scores.softmax(0) @ v[row, :length, head // 3])


def test_keys_before_the_first_are_not_read() -> None:
    """A window, a run that begins past the row's end, and one of a single key."""
    lengths, firsts = (9, 4, 14, 6), (3, 5, 13, 0)
    q, k, v, counts = decode_case(6, 2, 16, lengths, dtype=torch.float64)
    for row, first in enumerate(firsts):
        k[row, :first] = v[row, :first] = torch.nan
    out, lse = decode_attention(q, k, v, counts, 6, 0.3, torch.tensor(firsts, dtype=torch.int32))
    for row, (first, length) in enumerate(zip(firsts, lengths, strict=True)):
        if first >= length:
            assert not out[row].any() and lse[row].isneginf().all()
            continue
        for head in range(6):
            scores = 0.3 * k[row, first:length, head // 3] @ q[row, head]
            torch.testing.assert_close(lse[row, head], scores.logsumexp(0))
            torch.testing.assert_close(out[row, head], scores.softmax(0) @ v[row, first:length, head // 3])


def test_a_row_without_keys_has_nothing() -> None:
    q, k, v, counts = decode_case(4, 2, 16, (0, 3), dtype=torch.float32)
    out, lse = decode_attention(q, k, v, counts, 3, 0.3)
    assert not out[0].any() and lse[0].isneginf().all()
    assert out[1].any() and lse[1].isfinite().all()
    out, lse = decode_attention(q[:1], k[:1], v[:1], counts[:1], 0, 0.3)
    assert not out.any() and lse.isneginf().all()


def test_parts_merge_to_the_whole() -> None:
    q, k, v, counts = decode_case(4, 2, 16, (12, 7), dtype=torch.float64)
    whole, whole_lse = decode_attention(q, k, v, counts, 12, 0.3)
    first = decode_attention(q, k[:, :5], v[:, :5], counts.clamp(max=5), 5, 0.3)
    rest = decode_attention(q, k[:, 5:], v[:, 5:], (counts - 5).clamp(min=0), 7, 0.3)
    out, lse = merge(*(x[:, None] if x.ndim == 3 else x[..., None] for x in (*first, *rest)))
    torch.testing.assert_close(out[:, 0], whole)
    torch.testing.assert_close(lse[..., 0], whole_lse)


def test_the_choice_of_a_kernel() -> None:
    assert select_decode("auto", torch.device("cpu"), torch.bfloat16) is decode_attention
    assert select_decode("reference", torch.device("cuda"), torch.bfloat16) is decode_attention
    with pytest.raises(UserError, match="kernel: 'fast' is not known; choose one of auto"):
        select_decode("fast", torch.device("cpu"), torch.bfloat16)
