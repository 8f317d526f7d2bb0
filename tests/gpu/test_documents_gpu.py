"""No bit of one document reaches another on a GPU, in any kernel that honours starts."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mtraining.bench.ring.gate import Given
from mtraining.kernel import SparseIndex, pack_blocks
from mtraining.kernel.starts import document_starts
from mtraining.ring import sparse_ring_attention

pytestmark = pytest.mark.gpu

TOKENS, SIZE = 2048, 128
BEGINS = {"at blocks": (0, 256, 1024), "anywhere": (0, 301, 302, 1111)}


def index_of(kind: str) -> SparseIndex:
    chosen = torch.Generator().manual_seed(3)
    n = TOKENS // SIZE
    diagonals = torch.rand(1, 4, n, generator=chosen) < 0.6
    columns = torch.rand(1, 4, TOKENS, generator=chosen).topk(300, -1).indices.sort(-1).values.int()
    if kind == "dense":
        every = torch.ones(1, 4, n, dtype=torch.bool, device="cuda")
        return SparseIndex(TOKENS, SIZE, every, columns[..., :0].cuda(), dense=True)
    blocks = pack_blocks(torch.rand(1, 4, n, n, generator=chosen) < 0.5).cuda() if kind == "lists" else None
    return SparseIndex(TOKENS, SIZE, diagonals.cuda(), columns.cuda(), blocks)


def run(
    kernel: str, kind: str, begins: tuple[int, ...], changed: int | None, bounded: bool = True
) -> list[Tensor]:
    """out, dq, dk and dv; document ``changed`` holds other tokens."""
    made = torch.Generator("cuda").manual_seed(5)
    whole = [
        torch.randn(1, TOKENS, heads, 128, generator=made, device="cuda", dtype=torch.bfloat16)
        for heads in (4, 2, 2, 4)
    ]
    if changed is not None:
        for x in whole:
            x[:, begins[changed] : (*begins, TOKENS)[changed + 1]] *= -3
    q, k, v = (x.requires_grad_() for x in whole[:3])
    starts = document_starts(torch.tensor(begins).cuda(), TOKENS) if bounded else None
    out = sparse_ring_attention(
        q,
        k,
        v,
        pattern=Given(SIZE, index_of(kind)),
        layout="contiguous",
        mesh=None,
        kernel=kernel,
        starts=starts,
    )
    return [out.detach(), *torch.autograd.grad(out, (q, k, v), whole[3])]


@pytest.mark.parametrize("kind", ["diagonals and columns", "lists", "dense"])
@pytest.mark.parametrize("kernel", ["auto", "triton", "portable"])
@pytest.mark.parametrize("name", BEGINS)
def test_no_bit_leaks(name: str, kernel: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if kernel == "portable":
        from mtraining.kernel import choice
        from mtraining.kernel.triton.backend import TritonBackend

        monkeypatch.setattr(choice, "_chosen", lambda *args: TritonBackend())
    begins = BEGINS[name]
    before = run(kernel, kind, begins, None)
    for changed in range(len(begins)):
        after = run(kernel, kind, begins, changed)
        inside = torch.zeros(TOKENS, dtype=torch.bool, device="cuda")
        inside[begins[changed] : (*begins, TOKENS)[changed + 1]] = True
        for what, a, b in zip(("out", "dq", "dk", "dv"), before, after, strict=True):
            assert a.isfinite().all() and b.isfinite().all()
            assert torch.equal(a[:, ~inside], b[:, ~inside]), f"{what} of another document changed"
        assert not torch.equal(before[0][:, inside], after[0][:, inside])


def test_without_starts_documents_do_leak() -> None:
    """So the test above can fail."""
    before, after = (
        run("triton", "dense", BEGINS["anywhere"], changed, bounded=False) for changed in (None, 0)
    )
    assert not torch.equal(before[0][:, 301:], after[0][:, 301:])
