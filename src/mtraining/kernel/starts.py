"""The first key that each query may attend: documents, sliding windows and chunked attention as one tensor.

``starts`` is int32 (batch, seq_len), in global order and on the tensors' device. Query q attends to the keys of
``starts[b, q] <= k <= q`` that its index selects. 0 <= starts[b, q] <= q, and starts never decrease along the
sequence. So the queries that see a key form one run, as the keys of a query do.

* Packed documents: the position of the first token of the query's document.
* A sliding window of W tokens: ``max(q - W + 1, 0)``.
* Chunked attention over C tokens: ``q // C * C``.
* Several of them together: their maximum.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mtraining.errors import UserError


def window_starts(seq_len: int, window: int, device: torch.device | str = "cpu") -> Tensor:
    """Starts of a sliding window that holds ``window`` tokens, the query among them: int32 (1, seq_len)."""
    return (torch.arange(seq_len, dtype=torch.int32, device=device) - (window - 1)).clamp_(min=0)[None]


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
    if device.type != "cpu":
        return
    position = torch.arange(seq_len)
    if (starts < 0).any() or (starts > position).any() or (starts.diff(dim=-1) < 0).any():
        raise UserError(
            "starts: a query's first key must lie between 0 and the query, and starts must not decrease; "
            "give the first position of each token's document."
        )


def query_ends(starts: Tensor, keys: Tensor) -> Tensor:
    """The end of the run of queries that may attend to each key, exclusive: int64 (batch, n).

    Args:
        starts: int32 (batch, seq_len).
        keys: int64 (n,) or (batch, n), global key positions.
    """
    keys = keys.expand(starts.shape[0], -1)
    return torch.searchsorted(starts.long(), keys.contiguous(), right=True)
