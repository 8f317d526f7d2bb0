"""The kernels a user would otherwise pick, on the same tensors: dense, and FlexAttention with the same blocks."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

from mtraining.bench.attention.cases import Case
from mtraining.bench.attention.problem import Problem

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]  # (batch, seq, heads, head_dim) each, causal

_SDPA = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "fa2": SDPBackend.FLASH_ATTENTION,
    "math": SDPBackend.MATH,
}


COMPETITORS = ("fa4", "cudnn", "fa2", "flex", "math")


def honours(name: str, case: Case) -> bool:
    """Whether a competitor can compute a case's documents and window: FlexAttention does, and flash-attn-4 a window."""
    if not case.documents and case.window is None:
        return True
    return name in ("flex", "flex_blocks") or (name == "fa4" and not case.documents)


def available(device: torch.device) -> tuple[str, ...]:
    """Names of the dense competitors on this kind of device; SDPA's plain math is for the CPU."""
    if device.type != "cuda":
        return ("math",)
    return (*(("fa4",) if find_spec("flash_attn") else ()), "cudnn", "fa2", "flex")


class Competitor:
    """Forward and backward of another implementation over a problem's tensors.

    Args:
        name: one of ``COMPETITORS``, or ``flex_blocks`` for FlexAttention with the index's blocks (no columns).
    """

    def __init__(self, name: str, p: Problem) -> None:
        self.name, self.p = name, p
        self.attention = _attention(name, p)
        self.inputs = [x.detach().clone().requires_grad_() for x in (p.q, p.k, p.v)]
        self._out: Tensor | None = None

    def forward(self) -> Tensor:
        with torch.enable_grad():
            return self.attention(*self.inputs)

    def backward(self) -> tuple[Tensor, ...]:
        """Gradients of q, k, v; the graph of the first forward is kept and used again."""
        if self._out is None:
            self._out = self.forward()
        return torch.autograd.grad(self._out, self.inputs, self.p.dout, retain_graph=True)


def _attention(name: str, p: Problem) -> Attention:
    if name in _SDPA:
        return _sdpa(_SDPA[name], p.scale)
    if name == "fa4":
        return _fa4(p.scale, p.case.window)
    return _flex(p, sparse=name == "flex_blocks")


def _sdpa(backend: SDPBackend, scale: float) -> Attention:
    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            out = scaled_dot_product_attention(
                q.transpose(1, 2),
                k.transpose(1, 2),
                v.transpose(1, 2),
                is_causal=True,
                scale=scale,
                enable_gqa=q.shape[2] != k.shape[2],
            )
        return out.transpose(1, 2)

    return attention


def _fa4(scale: float, window: int | None) -> Attention:
    from flash_attn.cute import flash_attn_func

    # Its windows count the tokens beside the query.
    bounds = {} if window is None else {"window_size": (window - 1, 0)}

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        result = flash_attn_func(q, k, v, softmax_scale=scale, causal=True, **bounds)
        return result[0] if isinstance(result, tuple) else result

    return attention


def _causal(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
    return query >= key


def _mask_of(p: Problem) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """Causality and the starts, as FlexAttention asks for single entries."""
    starts = p.index.starts
    if starts is None:
        return _causal
    return lambda batch, head, query, key: (query >= key) & (key >= starts[0, query])


def same_blocks(p: Problem) -> BlockMask:
    """The index's tiles for FlexAttention; compiled only, since its eager version asks the mask and not the lists."""
    blocks = torch.arange(p.index.num_blocks, device=p.q.device)
    tiles = p.index.tile_mask(blocks, blocks)
    own = torch.eye(p.index.num_blocks, dtype=torch.bool, device=p.q.device) & tiles
    if p.index.starts is not None:
        # Tiles that hold a key before the start of their last query are masked too.
        last = p.index.starts[:, p.index.block_size - 1 :: p.index.block_size]
        own = tiles & (own | (blocks * p.index.block_size < last[..., None])[:, None])
    length = (p.index.seq_len, p.index.seq_len)
    return BlockMask.from_kv_blocks(
        *_lists(own),
        *_lists(tiles & ~own),
        BLOCK_SIZE=p.index.block_size,
        mask_mod=_mask_of(p),
        seq_lengths=length,
    )


def _flex(p: Problem, sparse: bool) -> Attention:
    seq_len, size = p.index.seq_len, p.index.block_size
    if sparse:
        mask = same_blocks(p)
    else:
        mask = create_block_mask(
            _mask_of(p), None, None, seq_len, seq_len, device=str(p.q.device), BLOCK_SIZE=size
        )
    torch.compiler.reset()  # or the compiler gives up after a few shapes and runs without compiling
    flex = torch.compile(flex_attention, dynamic=False)

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = flex(
            q.transpose(1, 2),
            k.transpose(1, 2),
            v.transpose(1, 2),
            block_mask=mask,
            scale=p.scale,
            enable_gqa=q.shape[2] != k.shape[2],
        )
        return out.transpose(1, 2)

    return attention


def _lists(tiles: Tensor) -> tuple[Tensor, Tensor]:
    """Counts and key blocks of each row, selected ones first: int32 (..., rows), (..., rows, blocks)."""
    order = tiles.to(torch.uint8).argsort(dim=-1, descending=True, stable=True)
    return tiles.sum(-1, dtype=torch.int32), order.int()
