"""Full causal attention by dense kernels, in the ring as on one device.

What a step of the ring computes is one rectangle or triangle of blocks where ranks hold runs of consecutive ones
(:attr:`mtraining.kernel.placement.Placement.pieces`): contiguous and zigzag layouts. Where blocks are dealt out singly
(striped) it is a staircase that no dense kernel knows, and stays with the kernels for tiles.
"""

from __future__ import annotations

import logging
from functools import cache

import torch
from torch import Tensor

from mtraining.errors import UserError
from mtraining.kernel.backend import Backend, Columns, QueryGradient
from mtraining.kernel.external.dense_kernels import DenseKernel
from mtraining.kernel.index import SparseIndex
from mtraining.kernel.placement import Piece, Placement
from mtraining.kernel.reference.attention import accumulation_dtype, merge
from mtraining.kernel.starts import check_starts_kernel

logger = logging.getLogger(__name__)


class WithDense:
    """Implements :class:`mtraining.kernel.backend.Backend`: dense indices go to a dense kernel, the rest to ``tiles``.

    Args:
        tiles: serves sparse indices, dense ones in scattered layouts, and everything that is not tiles.
        dense: the dense kernel.
        only: refuse what the dense kernel cannot compute, for it was asked for by name.
    """

    def __init__(self, name: str, tiles: Backend, dense: DenseKernel, only: bool = False) -> None:
        self.name, self._tiles, self._dense, self._only = name, tiles, dense, only
        self.columns_backward = tiles.columns_backward
        self.gather_columns, self.scatter_columns = tiles.gather_columns, tiles.scatter_columns
        self.row_delta, self.heaviest = tiles.row_delta, tiles.heaviest
        self.probe_lse, self.probe_mass = tiles.probe_lse, tiles.probe_mass

    def tiles_forward(
        self, q: Tensor, k: Tensor, v: Tensor, index: SparseIndex, placement: Placement, scale: float,
        out: Tensor | None, lse: Tensor | None, *, columns: Columns | None = None, final: bool = False,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        pieces = self._pieces(index, placement)
        if pieces is None:
            return self._tiles.tiles_forward(
                q, k, v, index, placement, scale, out, lse, columns=columns, final=final
            )
        for piece in pieces:  # a dense index may name columns, but its tiles hold them all
            rows, keys = piece.rows(index.block_size)
            part = self._dense.forward(q[:, rows], k[:, keys], v[:, keys], scale, piece.causal)
            if out is None or lse is None:
                if part[0].shape == q.shape:
                    out, lse = _joined(*part, None, None)
                    continue
                out, lse = _nothing(q)
            old_out, old_lse = out[:, rows], lse[..., rows]
            new_out, new_lse = _joined(*part, old_out, old_lse)
            if new_out is not old_out:
                old_out.copy_(new_out)
            old_lse.copy_(new_lse)
        if out is None or lse is None:
            out, lse = _nothing(q)
        return out.to(q.dtype) if final else out, lse

    def tiles_backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, lse: Tensor, delta: Tensor, index: SparseIndex,
        placement: Placement, scale: float,
    ) -> tuple[Tensor, QueryGradient]:  # fmt: skip
        pieces = self._pieces(index, placement)
        if pieces is None:
            return self._tiles.tiles_backward(dout, q, k, v, lse, delta, index, placement, scale)
        shares: list[tuple[slice, Tensor]] = []
        dkv = k.new_zeros(2, *k.shape, dtype=lse.dtype)
        for piece in pieces:
            rows, keys = piece.rows(index.block_size)
            share = self._dense.backward(
                dout[:, rows], q[:, rows], k[:, keys], v[:, keys], lse[..., rows].contiguous(),
                delta[..., rows].contiguous(), scale, piece.causal,
            )  # fmt: skip
            shares.append((rows, share[0]))
            for total, part in zip(dkv, share[1:], strict=True):
                total[:, keys] += part
            del share, part

        def query_gradient(
            dq: Tensor | None, *, columns: Columns | None = None, final: bool = False
        ) -> Tensor:
            if dq is None:
                dq = torch.zeros_like(q, dtype=lse.dtype)
            for rows, share in shares:
                dq[:, rows] += share
            shares.clear()
            return dq.to(q.dtype) if final else dq

        return dkv, query_gradient

    def _pieces(self, index: SparseIndex, placement: Placement) -> tuple[Piece, ...] | None:
        """What the dense kernel computes in this call; None where it computes nothing.

        Raises:
            UserError: the kernel was named, and it can only do dense attention over runs of blocks, without starts.
        """
        if index.starts is not None:
            if self._only:
                check_starts_kernel(self.name)
            return None
        if index.dense and placement.pieces is not None:
            return placement.pieces
        if self._only and not index.dense:
            raise UserError(
                f"kernel: {self.name!r} computes dense attention only, and this pattern is sparse; use kernel=auto."
            )
        if self._only:
            raise UserError(
                f"kernel: {self.name!r} computes dense attention over runs of consecutive tokens, and this layout "
                "scatters them; use layout=zigzag, or kernel=auto."
            )
        if index.dense:
            _tell_scattered(self.name)
        return None


@cache
def _tell_scattered(name: str) -> None:
    logger.info(
        "kernel: %s computes dense attention tile by tile, for the layout scatters the tokens; with layout=zigzag "
        "or contiguous it would run the dense kernel, which is faster",
        name,
    )


def _joined(part: Tensor, part_lse: Tensor, out: Tensor | None, lse: Tensor | None) -> tuple[Tensor, Tensor]:
    """Merge into a previous result, if there is one; in ``out``'s memory where that can be."""
    if part.device.type == "cuda":
        from mtraining.kernel.external.partial import merge_partial

        return merge_partial(part, part_lse, out, lse)
    return (part, part_lse) if out is None or lse is None else merge(out, lse, part, part_lse)


def _nothing(q: Tensor) -> tuple[Tensor, Tensor]:
    """The result for queries that saw no key."""
    batch, rows, heads, _ = q.shape
    dtype = accumulation_dtype(q.dtype)
    lse = torch.full((batch, heads, rows), -torch.inf, dtype=dtype, device=q.device)
    return torch.zeros(q.shape, dtype=dtype, device=q.device), lse
