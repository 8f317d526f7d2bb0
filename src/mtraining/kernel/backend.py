"""What a backend offers: kernels for attention, and kernels for the estimation that chooses what to attend."""

from __future__ import annotations

from typing import NamedTuple, Protocol

from torch import Tensor

from mtraining.kernel.index import SparseIndex
from mtraining.kernel.placement import Placement

Columns = tuple[Tensor, Tensor]
KERNELS = ("auto", "reference", "triton", "flash4", "cudnn", "flash")


class Decode(Protocol):
    """Attention of one new token a row over this process's part of a cache of keys and values."""

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, longest: int, scale: float,
        firsts: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Partial attention, to be merged with that over the other parts.

        Args:
            q: (batch, q_heads, head_dim).
            k, v: (batch, capacity, kv_heads, head_dim), same dtype; kv_heads divides q_heads.
            lengths: int32 (batch,), on the tensors' device: the keys of each row that are attended, all from the first
                on; 0 is allowed. What lies beyond is not read, or not used.
            longest: an upper bound of the keys that any row attends to, known on the host; at most the capacity.
            scale: factor on q.k before the softmax.
            firsts: int32 (batch,), the first key of each row that is attended; those before it are not read. None: 0.
                A sliding window and a document are such runs of keys. At or past the length, the row has no keys.

        Returns:
            out (batch, q_heads, head_dim) and lse (batch, q_heads), natural log, both in the accumulation dtype;
            0 and -inf for rows without keys.
        """
        ...


class QueryGradient(Protocol):
    """The rest of a backward pass over tiles; call it once."""

    def __call__(self, dq: Tensor | None, *, columns: Columns | None = None, final: bool = False) -> Tensor:
        """Add the pass's share, and that of the columns, to ``dq``; see :class:`AttentionKernels`."""
        ...


class AttentionKernels(Protocol):
    """Attention over an index, in passes over tiles that merge into one (out, lse).

    Shapes:
        q, dout: (batch, rows, q_heads, head_dim).
        k, v: (batch, keys, kv_heads, head_dim).
        ck, cv: compact columns (batch, capacity, q_heads, head_dim), in the order of ``index.columns``.
        out, dq: like q, in the accumulation dtype (fp32, or fp64 for fp64 inputs).
        lse: (batch, q_heads, rows) in the accumulation dtype, natural log. Rows that saw no key yet have -inf, and
            out = 0.

    ``out``, ``lse`` and ``dq`` given to a pass hold the previous partial result; they are None before the first pass.
    The pass returns the merged result and may reuse their memory. With ``final`` it is the last pass and returns out or
    dq in q's dtype. Backward passes take the *global* lse and delta = rowsum(dout * out). They return fresh key
    gradients in the accumulation dtype.

    One pass, whichever it is, takes the ``columns`` (ck, cv) along and attends to them too. In backward, the
    :class:`QueryGradient` of that pass adds their share of dq; ``columns_backward`` has the gradients of ck and cv.
    """

    name: str

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

        The gradients are in the accumulation dtype, or in k's where the backend rounds them so. The caller may write to
        them. They come first so that they can travel while dq is computed.
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

        ``slots`` int64 (seq_len,) maps global positions to rows of k, -1 where another rank holds them. Such columns,
        and the padding, are zero, so that summing over ranks completes the buffer exactly.
        """
        ...

    def scatter_columns(self, grads: Tensor, columns: Tensor, slots: Tensor, dkv: Tensor) -> None:
        """Add column gradients to the rows of ``dkv`` that are held here, in place; deterministic.

        ``grads`` are compact, (2, batch, capacity, q_heads, head_dim); ``dkv`` is (2, batch, keys, kv_heads, head_dim).
        The query heads of a group are summed.
        """
        ...


class ProbeScope(NamedTuple):
    """What each probe query may see, and where the mass of its slashes is summed.

    Slashes of a document are places of their own: slash d of a query is place ``bases + d``. All are int64
    (batch, probe), ascending along the probe but for ``reach``.

    Attributes:
        first_keys: the first key that the query may attend.
        bases: place of slash 0.
        reach: slashes of the query's document; mass on those from there on is left out.
        slots: places in all.
    """

    first_keys: Tensor
    bases: Tensor
    reach: Tensor
    slots: int


class EstimationKernels(Protocol):
    """What a pattern may ask for when it chooses: scores of probe queries, and the heaviest entries."""

    def __hash__(self) -> int: ...

    def probe_lse(
        self, probe: Tensor, k: Tensor, probe_positions: Tensor, key_positions: Tensor, scale: float,
        scope: ProbeScope | None = None,
    ) -> Tensor:  # fmt: skip
        """Log-sum-exp of probe queries (batch, probe, q_heads, head_dim) over the local keys: (batch, q_heads, probe).

        Positions are global, int64; a key after the query does not count; -inf where no local key does.
        ``probe_positions`` is (probe,), or with a scope (batch, probe).
        """
        ...

    def probe_mass(
        self, probe: Tensor, k: Tensor, probe_positions: Tensor, key_positions: Tensor, scale: float, lse: Tensor,
        seq_len: int, block_size: int, scope: ProbeScope | None = None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Probability mass under the probe, exp(score - lse) with the *global* lse, summed over the probe.

        Slashes are token distances where ``block_size`` is 1, else block diagonals;
        :func:`mtraining.kernel.reference.estimate.diagonal_mass` divides the mass of distances among these.

        Args:
            seq_len: a multiple of ``block_size``.
            scope: bounds each query, and says where its slashes are summed. None: all keys, one place a slash.

        Returns:
            by key (batch * q_heads, local keys) and by slash (batch * q_heads, seq_len // block_size, or with a scope
            ``scope.slots``); deterministic.
        """
        ...

    def heaviest(self, mass: Tensor, forced: Tensor, top_p: float | None, keep: int) -> Tensor:
        """Positions of the kept entries of each row, ascending, padded with n: int64 (rows, min(keep, n)).

        Forced entries come first and count towards budget and mass. Then the heaviest ones follow, lower positions
        first among equals. With ``top_p``, these are the fewest entries whose mass reaches that share of the row's
        total, at most ``keep``; without it exactly ``keep``. No host synchronisation.

        Args:
            mass: (rows, n), non-negative.
            forced: bool (n,), always kept.
        """
        ...


class Backend(AttentionKernels, EstimationKernels, Protocol):
    """Both, as :func:`mtraining.kernel.select_backend` gives them."""
