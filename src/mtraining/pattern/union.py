"""Several patterns at once: what any of them selects is computed, and computed once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from mtraining.errors import UserError
from mtraining.kernel import SparseIndex
from mtraining.pattern.base import Pattern, SequenceShard, require
from mtraining.pattern.by_document import column_filler


@dataclass(frozen=True)
class Union(Pattern):
    """The union of its members' entries; bytes and cost are the members' together.

    Attributes:
        patterns: the members: patterns, names, or mappings {name: ..., options: {...}}. Members that are not
            built yet take ``block_size`` from here.
    """

    patterns: Sequence[Pattern | str | Mapping[str, Any]] = ()

    name = "union"

    def __post_init__(self) -> None:
        super().__post_init__()
        listed = isinstance(self.patterns, Sequence) and not isinstance(self.patterns, str)
        require(self, "patterns", listed and len(self.patterns) > 0, "list at least one pattern")
        # a tuple of built patterns, so that a union is hashable as every pattern is
        object.__setattr__(self, "patterns", tuple(_member(p, self.block_size) for p in self.patterns))
        for member in self.members:
            if member.block_size != self.block_size:
                raise UserError(
                    f"pattern.patterns: {member.name} has block_size {member.block_size}, the union {self.block_size}; "
                    "give both the same."
                )

    @property
    def members(self) -> tuple[Pattern, ...]:
        return self.patterns  # type: ignore[return-value]

    @torch.no_grad()
    def estimate(self, q: Tensor, k: Tensor, shard: SequenceShard, scale: float) -> SparseIndex:
        found = (member.estimate(q, k, shard, scale) for member in self.members)
        filler = column_filler(shard.documents) if shard.documents is not None and shard.apart else None
        return reduce(lambda a, b: unite(a, b, filler), found)


def _member(given: Pattern | str | Mapping[str, Any], block_size: int) -> Pattern:
    from mtraining.pattern import build_pattern  # the table of all patterns, this one among them

    if isinstance(given, Pattern):
        return given
    if isinstance(given, str):
        given = {"name": given}
    known = isinstance(given, Mapping) and "name" in given and not set(given) - {"name", "options"}
    if not known or not isinstance(given.get("options") or {}, Mapping):
        raise UserError(
            f"pattern.patterns: {given!r} is no pattern; write {{name: a_shape, options: {{window: 1024}}}}."
        )
    return build_pattern(given["name"], **{"block_size": block_size, **(given.get("options") or {})})


def unite(a: SparseIndex, b: SparseIndex, filler: Tensor | None = None) -> SparseIndex:
    """The index of what ``a`` or ``b`` selects: diagonals and blocks by bits, columns merged and still ascending.

    Both must be of the same sequence and, where both list blocks, of the same rank.

    Args:
        filler: what stands in place of a column that both have, by its position (batch, seq_len), so that every
            document keeps its places in the list (:func:`mtraining.pattern.by_document.column_filler`). None: seq_len.
    """
    columns = torch.cat([a.columns, b.columns], -1).sort(-1).values
    again = torch.nn.functional.pad(columns[..., 1:] == columns[..., :-1], (1, 0))
    if filler is None:
        columns = columns.masked_fill(again, a.seq_len)
    else:
        at = columns.flatten(1).clamp(max=a.seq_len - 1).long()
        fills = filler.gather(1, at).view_as(columns).int()
        columns = torch.where(again & (columns < a.seq_len), fills, columns)
    columns = columns.sort(-1).values
    listed = a if a.blocks is not None else b
    blocks = listed.blocks if a.blocks is None or b.blocks is None else a.blocks | b.blocks
    return replace(
        a, diagonals=a.diagonals | b.diagonals, columns=columns, blocks=blocks, block_rows=listed.block_rows
    )
