"""Ring attention against one process that holds the whole sequence, under the index that the ring estimated."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from mtraining.kernel import SparseIndex
from mtraining.kernel.starts import document_starts
from mtraining.layout import Layout, build_layout
from mtraining.pattern import Pattern, SequenceShard, VerticalSlash
from mtraining.ring import Ring, sparse_ring_attention

RESULTS = ("out", "dq", "dk", "dv")
HEADS = ((16, 2, 128), (9, 3, 64))  # query heads, key heads, head_dim


@dataclass(frozen=True)
class Given(Pattern):
    """An index decided elsewhere."""

    index: SparseIndex | None = None
    name = "given"

    def estimate(self, q: Tensor, k: Tensor, shard: SequenceShard, scale: float) -> SparseIndex:
        assert self.index is not None
        return self.index


@dataclass(frozen=True)
class RingCase:
    """One call of attention over random tensors, forward and backward.

    Attributes:
        tokens: of the whole sequence.
        heads: query heads, key heads, head_dim.
        dtype: of all tensors.
        seed: of the random numbers.
        documents: packed into the sequence, which begin anywhere; 0 for one sequence without starts.
        window: tokens of a sliding window; None without one.
    """

    pattern: Pattern
    tokens: int
    layout: str
    heads: tuple[int, int, int]
    dtype: torch.dtype
    seed: int = 1
    kernel: str = "auto"
    documents: int = 0
    window: int | None = None

    @property
    def dealt(self) -> Layout:
        return build_layout(self.layout, self.pattern.block_size)

    def inputs(self, device: torch.device) -> list[Tensor]:
        """q, k, v, dout of the whole sequence, the same on every rank."""
        torch.manual_seed(self.seed)
        return random_inputs(self.tokens, self.heads, device, self.dtype)

    def local(self, tensors: list[Tensor], mesh: DeviceMesh) -> list[Tensor]:
        """This rank's part of each."""
        ring = Ring.over(mesh)
        return [self.dealt.shard(x, ring.rank, ring.world) for x in tensors]

    def on_ring(self, mine: list[Tensor], mesh: DeviceMesh) -> tuple[list[Tensor], SparseIndex]:
        """This rank's out, dq, dk and dv, and the whole index, of its part of the inputs. Collective."""
        starts = None
        if self.documents:
            drawn = torch.randperm(self.tokens, generator=torch.Generator().manual_seed(self.seed))
            starts = document_starts(drawn[: self.documents], self.tokens).to(mine[0].device)
        return forward_backward(
            mine, pattern=self.pattern, layout=self.dealt, mesh=mesh, kernel=self.kernel, starts=starts,
            window=self.window,
        )  # fmt: skip

    def alone(self, inputs: list[Tensor], index: SparseIndex) -> list[Tensor]:
        """The same of the whole sequence, by this process; the index has the starts."""
        given = Given(index.block_size, index)
        return forward_backward(inputs, pattern=given, layout=self.dealt, mesh=None, kernel=self.kernel)[0]

    def errors(self, found: list[Tensor], truth: list[Tensor], mesh: DeviceMesh) -> list[float]:
        """Relative errors of this rank's results against its part of what one process gave."""
        own = [x.float() for x in self.local(truth, mesh)]
        return [float((a - b).norm() / b.norm()) for a, b in zip(found, own, strict=True)]


def random_inputs(
    tokens: int, heads: tuple[int, int, int], device: torch.device, dtype: torch.dtype
) -> list[Tensor]:
    """q, k, v, dout."""
    q_heads, kv_heads, dim = heads
    return [
        torch.randn(1, tokens, count, dim, device=device).to(dtype)
        for count in (q_heads, kv_heads, kv_heads, q_heads)
    ]


def gate_pattern(tokens: int, block_size: int) -> VerticalSlash:
    """Estimated slashes and columns that leave gaps in a short sequence."""
    return VerticalSlash(
        block_size=block_size,
        top_p=0.9,
        max_columns=tokens // 16,
        sinks=8,
        slash_by="block",
        slash_density=0.3,
        window=block_size,
    )


def forward_backward(inputs: list[Tensor], **options: Any) -> tuple[list[Tensor], SparseIndex]:
    """out, dq, dk and dv of `sparse_ring_attention` under these options, and the whole index."""
    q, k, v = (x.detach().requires_grad_() for x in inputs[:3])
    out, index = sparse_ring_attention(q, k, v, return_index=True, **options)
    return [out.detach(), *torch.autograd.grad(out, (q, k, v), inputs[3])], index
