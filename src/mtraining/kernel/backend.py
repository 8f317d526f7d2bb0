"""The interface that every kernel backend offers."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from mtraining.kernel.index import SparseIndex
from mtraining.kernel.placement import Placement

Columns = tuple[Tensor, Tensor]
KERNELS = ("auto", "reference", "triton", "flash4", "cudnn", "flash")


class Decode(Protocol):
    """Attention of one new token a row over this process's part of a cache of keys and values."""

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, longest: int, scale: float
    ) -> tuple[Tensor, Tensor]:
        """Partial attention, to be merged with that over the other parts.

        Args:
            q: (batch, q_heads, head_dim).
            k, v: (batch, capacity, kv_heads, head_dim), same dtype; kv_heads divides q_heads.
            lengths: int32 (batch,), on the tensors' device: the keys of each row that are attended, all from the first
                on; 0 is allowed. What lies beyond is not read, or not used.
            longest: an upper bound of ``lengths``, known on the host; at most the capacity.
            scale: factor on q.k before the softmax.

        Returns:
            out (batch, q_heads, head_dim) and lse (batch, q_heads), natural log, both in the accumulation dtype;
            0 and -inf for rows without keys.
        """
        ...


class QueryGradient(Protocol):
    """The rest of a backward pass over tiles; call it once."""

    def __call__(self, dq: Tensor | None, *, columns: Columns | None = None, final: bool = False) -> Tensor:
        """Add the pass's share, and that of the columns, to ``dq``; see :class:`Backend`."""
        ...


class Backend(Protocol):
    """Attention over an index, in passes over tiles that merge into one (out, lse).

    Shapes: q, dout (batch, rows, q_heads, head_dim); k, v (batch, keys, kv_heads, head_dim); compact columns
    ck, cv (batch, capacity, q_heads, head_dim) in the order of ``index.columns``; out and dq like q in the
    accumulation dtype (fp32, or fp64 for fp64 inputs); lse (batch, q_heads, rows) in the same dtype, natural
    log, -inf (with out = 0) for rows that saw no key yet. ``out``/``lse``/``dq`` given to a pass hold the
    previous partial result, None before the first; the pass returns the merged one and may reuse their memory; the
    last pass is told so (``final``) and returns out or dq in q's dtype. Backward passes take the *global* lse and
    delta = rowsum(dout * out) and return fresh key gradients in the accumulation dtype.

    One pass, any, takes the ``columns`` (ck, cv) along: it attends them too. Backward, its :class:`QueryGradient`
    adds their share of dq; ``columns_backward`` has the gradients of ck and cv.
    """

    name: str

    def __hash__(self) -> int: ...

    def tiles_forward(
        self, q: Tensor, k: Tensor, v: Tensor, index: SparseIndex, placement: Placement, scale: float,
        out: Tensor | None, lse: Tensor | None, *, columns: Columns | None = None, final: bool = False,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """(out, lse)."""
        ...

    def tiles_backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, lse: Tensor, delta: Tensor, index: SparseIndex,
        placement: Placement, scale: float,
    ) -> tuple[Tensor, QueryGradient]:  # fmt: skip
        """The gradients of k and v, one tensor (2, batch, keys, kv_heads, head_dim), and what is left to do for dq.

        The former in the accumulation dtype, or in k's where the backend rounds them so; the caller may write to it. It
        comes first so that it can travel while dq is computed.
        """
        ...

    def columns_backward(
        self, dout: Tensor, q: Tensor, ck: Tensor, cv: Tensor, lse: Tensor, delta: Tensor, index: SparseIndex,
        q_blocks: Tensor, scale: float,
    ) -> Tensor:  # fmt: skip
        """Gradients of ck and cv, one tensor: (2, batch, capacity, q_heads, head_dim)."""
        ...

    def row_delta(self, out: Tensor, dout: Tensor) -> Tensor:
        """rowsum(dout * out): (batch, q_heads, rows), in the accumulation dtype."""
        ...

    def gather_columns(self, k: Tensor, v: Tensor, columns: Tensor, slots: Tensor) -> Tensor:
        """Rows of k and v at the index's columns, per query head: (2, batch, capacity, q_heads, head_dim), contiguous.

        ``slots`` int64 (seq_len,) maps global positions to rows of k, -1 where they are held elsewhere:
        such columns, and the padding, are zero, so that summing over ranks completes the buffer exactly.
        """
        ...

    def scatter_columns(self, grads: Tensor, columns: Tensor, slots: Tensor, dkv: Tensor) -> None:
        """Add compact column gradients (2, batch, capacity, q_heads, head_dim) to the rows held here of
        ``dkv`` (2, batch, keys, kv_heads, head_dim), in place, summing the query heads of a group; deterministic."""
        ...

    def probe_lse(
        self, probe: Tensor, k: Tensor, probe_positions: Tensor, key_positions: Tensor, scale: float
    ) -> Tensor:
        """Log-sum-exp of probe queries (batch, probe, q_heads, head_dim) over the local keys: (batch, q_heads, probe).

        Positions are global, int64; a key after the query does not count; -inf where no local key does.
        """
        ...

    def probe_mass(
        self,
        probe: Tensor,
        k: Tensor,
        probe_positions: Tensor,
        key_positions: Tensor,
        scale: float,
        lse: Tensor,
        seq_len: int,
        block_size: int,
    ) -> tuple[Tensor, Tensor]:
        """Probability mass under the probe, exp(score - lse) with the *global* lse, summed over the probe.

        Slashes are token distances where ``block_size`` is 1, else block diagonals, to which the mass of distances is
        dealt as :func:`mtraining.kernel.reference.estimate.diagonal_mass` has it.

        Args:
            seq_len: a multiple of ``block_size``.

        Returns:
            by key (batch * q_heads, local keys) and by slash (batch * q_heads, seq_len // block_size); deterministic.
        """
        ...

    def heaviest(self, mass: Tensor, forced: Tensor, top_p: float | None, keep: int) -> Tensor:
        """Positions of the kept entries of each row, ascending, padded with n: int64 (rows, min(keep, n)).

        Forced entries come first and count towards budget and mass; then the heaviest ones follow, lower
        positions first among equals. With ``top_p``: the fewest entries whose mass reaches that share of the
        row's total, at most ``keep``; without: exactly ``keep``. No host synchronisation.

        Args:
            mass: (rows, n), non-negative.
            forced: bool (n,), always kept.
        """
        ...
