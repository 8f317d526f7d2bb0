"""The first key that each query may attend: documents, sliding windows and chunked attention as one tensor.

``starts`` is int32 (batch, seq_len), in global order and on the tensors' device. Query q attends to the keys of
``starts[b, q] <= k <= q`` that its index selects. 0 <= starts[b, q] <= q, and starts never decrease along the
sequence. So the queries that see a key form one run, as the keys of a query do.

* Packed documents: the position of the first token of the query's document.
* A sliding window of W tokens: ``max(q - W + 1, 0)``.
* Chunked attention over C tokens: ``q // C * C``.
* Documents and a window: the maximum of both. Chunks are counted from the document's first token.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from mtraining.errors import UserError
from mtraining.kernel.placement import Placement

NO_STARTS = (
    "starts: a query's first key must lie between 0 and the query, and starts must not decrease; "
    "give the first position of each token's document."
)


@dataclass(frozen=True)
class Chunks:
    """Chunked attention: a query attends to its own chunk of ``tokens`` tokens, counted from its document's first."""

    tokens: int


Window = int | Chunks
"""How a layer bounds its queries: by the tokens of a sliding window, the query among them, or by chunks."""


def reach_of(window: Window) -> int:
    """Tokens that the farthest-reaching query sees, itself among them."""
    return window.tokens if isinstance(window, Chunks) else window


def first_keys(positions: Tensor, window: Window) -> Tensor:
    """The first key that a window leaves to each query, all in tokens of one document; shape and dtype of positions."""
    if isinstance(window, Chunks):
        return positions // window.tokens * window.tokens
    return (positions - (window - 1)).clamp(min=0)


def window_starts(seq_len: int, window: Window, device: torch.device | str = "cpu") -> Tensor:
    """Starts of a window alone: int32 (1, seq_len)."""
    return first_keys(torch.arange(seq_len, dtype=torch.int32, device=device), window)[None]


def within_documents(starts: Tensor, window: Window) -> Tensor:
    """Starts of a window that begins anew in each document: int32 (batch, seq_len).

    Layers of one window are given the same tensor, since kernels keep tables with it.

    Args:
        starts: int32 (batch, seq_len), of the documents.
    """

    def make() -> Tensor:
        positions = torch.arange(starts.shape[1], dtype=torch.int32, device=starts.device)
        return starts + first_keys(positions - starts, window)

    return _kept(starts, make, ("within", window))


def document_starts(begins: Tensor, seq_len: int) -> Tensor:
    """Starts of packed documents: int32 (1, seq_len).

    Args:
        begins: int64 (n,), in any order, positions of the documents' first tokens. What stands before the first of them
            is a document too.
    """
    first = torch.zeros(seq_len, dtype=torch.int32, device=begins.device)
    first[begins] = begins.int()
    return first.cummax(0).values[None]


def check_starts(starts: Tensor, batch: int, seq_len: int, device: torch.device) -> None:
    """Refuse what are no starts of such a batch.

    Values are looked at on the CPU only: elsewhere this would wait for the device.

    Raises:
        UserError: a wrong shape, dtype or device; a start after its query; or starts that decrease.
    """
    if starts.shape != (batch, seq_len) or starts.dtype != torch.int32 or starts.device != device:
        raise UserError(
            f"starts: {starts.dtype} {tuple(starts.shape)} on {starts.device} does not fit; "
            f"give int32 ({batch}, {seq_len}) on {device}, one start for each token of the whole sequence."
        )
    if device.type == "cpu" and bool(no_starts(starts)):
        raise UserError(NO_STARTS)


def no_starts(starts: Tensor) -> Tensor:
    """Whether a start is after its query or negative, or starts decrease: bool scalar on their device."""
    position = torch.arange(starts.shape[-1], device=starts.device)
    return (starts < 0).any() | (starts > position).any() | (starts.diff(dim=-1) < 0).any()


def check_starts_kernel(kernel: str) -> None:
    """Refuse a kernel that does not honour starts; ``auto`` chooses one that does.

    Raises:
        UserError: naming the option and the remedy.
    """
    if kernel in WITHOUT_STARTS:
        raise UserError(
            f"kernel: {kernel!r} attends from the first token on, and there are packed documents or a sliding window; "
            "use kernel=auto."
        )


def query_ends(starts: Tensor, keys: Tensor) -> Tensor:
    """The end of the run of queries that may attend to each key, exclusive: int64 (batch, n).

    Args:
        starts: int32 (batch, seq_len).
        keys: int64 (n,) or (batch, n), global key positions.
    """
    keys = keys.expand(starts.shape[0], -1)
    return torch.searchsorted(starts.long(), keys.contiguous(), right=True)


# Asked for by name, they attend from the first token on, whatever document it is of.
WITHOUT_STARTS = ("cudnn", "flash")
# Of each starts, the tables made of them: a batch's layers share them, and they go when the batch does.
_tables: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def starts_of_rows(starts: Tensor, q_blocks: Tensor, block_size: int) -> Tensor:
    """The starts of the local queries: int32 (batch, local queries)."""
    return _kept(starts, lambda: starts[:, _positions(q_blocks, block_size)], "rows", q_blocks)


def first_local_keys(starts: Tensor, placement: Placement, block_size: int) -> Tensor:
    """The first local key that each local query may attend: int32 (batch, local queries).

    Local keys stand in global order, so a query's keys are those from here on, as far as causality goes. The number of
    local keys where none is late enough.
    """

    def make() -> Tensor:
        first = starts[:, _positions(placement.q_blocks, block_size)]
        return torch.searchsorted(_positions(placement.k_blocks, block_size), first.long(), out_int32=True)

    return _kept(starts, make, "first keys", placement.q_blocks, placement.k_blocks)


def last_local_keys(starts: Tensor, placement: Placement, block_size: int) -> Tensor:
    """The last local key that causality leaves to each local query: int32 (local queries,), -1 for none."""

    def make() -> Tensor:
        queries, keys = (_positions(x, block_size) for x in (placement.q_blocks, placement.k_blocks))
        return torch.searchsorted(keys, queries, right=True, out_int32=True) - 1

    return _kept(starts, make, "last keys", placement.q_blocks, placement.k_blocks)


def local_query_ends(starts: Tensor, placement: Placement, block_size: int) -> Tensor:
    """The end (exclusive) of the local queries that may attend to each local key: int32 (batch, local keys)."""

    def make() -> Tensor:
        ends = local_ends_of_keys(starts, placement.q_blocks, block_size)
        return ends[:, _positions(placement.k_blocks, block_size)].contiguous()

    return _kept(starts, make, "query ends", placement.q_blocks, placement.k_blocks)


def local_ends_of_keys(starts: Tensor, q_blocks: Tensor, block_size: int) -> Tensor:
    """The end (exclusive) of the local queries that may attend to each key of the sequence: int32 (batch, seq_len)."""

    def make() -> Tensor:
        ends = query_ends(starts, torch.arange(starts.shape[1], device=starts.device))
        return torch.searchsorted(_positions(q_blocks, block_size), ends, out_int32=True)

    return _kept(starts, make, "ends of keys", q_blocks)


def _kept(starts: Tensor, make: Callable[[], Tensor], name: Hashable, *blocks: Tensor) -> Tensor:
    """The table of this name that ``make`` makes for these blocks; from the second time on the one made first.

    Who writes new starts into the same memory gets new tables: PyTorch counts the writes.
    """
    tables = _tables.setdefault(starts, {})
    key = (name, starts._version, *map(id, blocks))
    if key not in tables:
        # With the blocks kept, no other tensor can come to have their identity.
        tables[key] = (make(), blocks)
    return tables[key][0]


def _positions(blocks: Tensor, block_size: int) -> Tensor:
    """Global positions of the tokens of some blocks: int64 (len(blocks) * block_size,)."""
    return (blocks[:, None] * block_size + torch.arange(block_size, device=blocks.device)).flatten()
