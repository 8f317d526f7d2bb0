"""The decode kernel against the fp64 reference, small, in Triton's interpreter; tests/gpu does the same at size."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from decode_cases import decode_case
from mtraining.kernel.reference.decode import decode_attention as reference
from mtraining.kernel.triton import decode as module
from mtraining.kernel.triton.decode import decode_attention

# q_heads, kv_heads, head_dim, lengths of the rows
CASES = {
    "one key": (4, 2, 64, (1,)),
    "group of 8": (8, 1, 64, (130,)),
    "mha": (3, 3, 64, (70, 64)),
    "rows without keys": (4, 2, 64, (0, 33, 0)),
    "ragged": (4, 2, 32, (5, 64, 65, 200)),
    "head_dim 96": (6, 2, 96, (77, 12)),
    "head_dim 128": (4, 2, 128, (150,)),
    "head_dim 256": (2, 1, 256, (90,)),
    "group of 24": (24, 1, 16, (40,)),
}
pytestmark = pytest.mark.usefixtures("poisoned")


def check(case: tuple[int, int, int, tuple[int, ...]], dtype: torch.dtype, tolerance: float) -> None:
    q, k, v, lengths = decode_case(*case, dtype=dtype)
    out, lse = decode_attention(q, k, v, lengths, int(lengths.max()), 0.2)
    want, want_lse = reference(q.double(), k.double(), v.double(), lengths, int(lengths.max()), 0.2)
    assert out.dtype == lse.dtype == torch.float32
    assert torch.equal(lse.isneginf(), want_lse.isneginf())
    seen = ~want_lse.isneginf()
    torch.testing.assert_close(lse[seen].double(), want_lse[seen], rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(out.double(), want, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", CASES)
def test_fp32(name: str) -> None:
    check(CASES[name], torch.float32, 2e-6)


@pytest.mark.parametrize("name", ["ragged", "head_dim 96"])
def test_fp16(name: str) -> None:
    check(CASES[name], torch.float16, 2e-3)


@pytest.mark.parametrize("processors", [1, 64])
def test_runs_that_begin_anywhere(processors: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A window over long rows, a row whose run is empty, and one that reads all."""
    cut = module.runs
    monkeypatch.setattr(module, "runs", lambda longest, rows, tile, _: cut(longest, rows, tile, processors))
    q, k, v, lengths = decode_case(4, 2, 16, (700, 9, 130, 150), dtype=torch.float32)
    firsts = torch.tensor([501, 9, 77, 0], dtype=torch.int32)
    for row, first in enumerate(firsts.tolist()):
        k[row, :first] = v[row, :first] = torch.nan
    out, lse = decode_attention(q, k, v, lengths, 199, 0.2, firsts)
    want, want_lse = reference(q.double(), k.double(), v.double(), lengths, 199, 0.2, firsts)
    assert torch.equal(lse.isneginf(), want_lse.isneginf()) and lse[1].isneginf().all()
    seen = ~want_lse.isneginf()
    torch.testing.assert_close(lse[seen].double(), want_lse[seen], rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(out.double(), want, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("processors", [1, 4, 64])
def test_any_split_gives_the_same(processors: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """From one run a row to one tile a run, and more runs than are joined at a time."""
    q, k, v, lengths = decode_case(4, 2, 16, (1500, 3, 700), dtype=torch.float32)
    cut = module.runs

    def spread(longest: int, rows: int, tile: int, _: int) -> tuple[int, int]:
        return cut(longest, rows, tile, processors)

    monkeypatch.setattr(module, "runs", spread)
    assert spread(1500, 6, 64, 0)[1] == {1: 1, 4: 2, 64: 24}[processors]
    out, lse = decode_attention(q, k, v, lengths, 1500, 0.2)
    want, want_lse = reference(q.double(), k.double(), v.double(), lengths, 1500, 0.2)
    torch.testing.assert_close(out.double(), want, rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(lse.double(), want_lse, rtol=2e-6, atol=2e-6)


def test_strides_are_free() -> None:
    """The cache keeps a head's keys together, or a token's heads; a query may be a slice."""
    q, k, v, lengths = decode_case(4, 2, 16, (50, 20), dtype=torch.float32)
    plain = decode_attention(q, k, v, lengths, 50, 0.2)

    def turned(x: Tensor) -> Tensor:
        return x.transpose(1, 2).contiguous().transpose(1, 2)

    again = decode_attention(q.repeat(1, 2, 1)[:, :4], turned(k), turned(v), lengths, 50, 0.2)
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


def test_same_bits_twice() -> None:
    q, k, v, lengths = decode_case(4, 2, 16, (300, 20), dtype=torch.float32)
    first, second = (decode_attention(q, k, v, lengths, 300, 0.2) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
