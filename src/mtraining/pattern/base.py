"""What a pattern is given and what it returns."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from types import NoneType
from typing import Any, ClassVar, Protocol, get_args, get_type_hints

import torch
from torch import Tensor

from mtraining.errors import UserError, did_you_mean
from mtraining.kernel import EstimationKernels, ReferenceBackend, SparseIndex, pack_blocks
from mtraining.pattern.documents import Documents


class Collective(Protocol):
    """What a pattern may ask of the other context-parallel ranks; every call is collective over all of them."""

    @property
    def rank(self) -> int: ...

    @property
    def world(self) -> int: ...

    def all_sum(self, x: Tensor) -> Tensor:
        """Elementwise sum over ranks."""
        ...

    def all_to_all(self, x: Tensor) -> Tensor:
        """(world, ...) by destination -> (world, ...) by source."""
        ...

    def all_gather(self, x: Tensor) -> Tensor:
        """(...) -> (world, ...) in rank order."""
        ...


class Alone:
    """The collective of a single process."""

    rank, world = 0, 1

    def all_sum(self, x: Tensor) -> Tensor:
        return x

    def all_to_all(self, x: Tensor) -> Tensor:
        return x

    def all_gather(self, x: Tensor) -> Tensor:
        return x[None]


@dataclass(frozen=True)
class SequenceShard:
    """Which part of the sequence this rank holds, and how to reach the rest.

    Attributes:
        all_positions: int64 (world, local tokens), global position of every rank's tokens, on the tensors' device.
        comm: collectives over the context-parallel ranks.
        backend: kernels for the estimation.
        padding: tokens at the end of the sequence that only fill it up to a length that the layout can deal. An
            estimate must not depend on what they hold, nor on how many blocks of them there are.
        starts: int32 (batch, seq_len), the first key that each query may attend, in global order
            (:mod:`mtraining.kernel.starts`); None for 0 everywhere. An estimate looks at these keys only. Attention
            honours ``starts`` whatever the pattern selects.
        packed: ``starts`` may tell of several documents. False: they are those of a sliding window alone.
    """

    all_positions: Tensor
    comm: Collective = field(default_factory=Alone)
    backend: EstimationKernels = field(default_factory=ReferenceBackend)
    padding: int = 0
    starts: Tensor | None = None
    packed: bool = True

    @classmethod
    def whole(cls, seq_len: int, device: torch.device | str = "cpu", padding: int = 0) -> SequenceShard:
        """One process that holds all ``seq_len`` tokens, ``padding`` of them at the end without meaning."""
        return cls(torch.arange(seq_len, device=device)[None], padding=padding)

    @property
    def seq_len(self) -> int:
        """Tokens in the sequence, padding included."""
        return self.all_positions.numel()

    @property
    def length(self) -> int:
        """Real tokens in the sequence; all of them stand before the padding."""
        return self.seq_len - self.padding

    def covered(self, block_size: int) -> int:
        """Tokens in the blocks that hold a real one: ``length`` rounded up to whole blocks."""
        return -(-self.length // block_size) * block_size

    def of_batch(self, padding: int = 0, starts: Tensor | None = None, packed: bool = True) -> SequenceShard:
        """This shard with a batch's own padding and starts; tables of the positions are shared.

        The layers of a model ask in turn for the same one, or for two where some have windows. So the last two are
        kept, with their tables of documents.
        """
        if padding == self.padding and starts is self.starts:
            return self
        version = None if starts is None else starts._version
        last: list[tuple[SequenceShard, int | None]] = vars(self).setdefault("_last", [])
        for one, its_version in last:
            same = one.starts is starts and its_version == version
            if same and (one.padding, one.packed) == (padding, packed):
                return one
        other = replace(self, padding=padding, starts=starts, packed=packed)
        vars(other).update(slots=self.slots, _host_positions=self._host_positions)
        last.append((other, version))
        del last[:-2]
        return other

    @cached_property
    def documents(self) -> Documents | None:
        """Whose token is whose; None without ``starts``."""
        return None if self.starts is None else Documents.of(self.starts, self.length)

    @property
    def apart(self) -> bool:
        """There may be several documents, each of which chooses by itself."""
        return self.starts is not None and self.packed

    def real(self, x: Tensor) -> Tensor:
        """``x`` (batch, local tokens, ...) with zeros in place of padding; ``x`` itself where there is none."""
        if not self.padding:
            return x
        there = (self.positions < self.length).view(-1, *(1,) * (x.ndim - 2))
        return torch.where(there, x, torch.zeros((), dtype=x.dtype, device=x.device))

    def lead(self, x: Tensor, block_size: int) -> Tensor:
        """``x`` (batch, local tokens, ...) with zeros but for the lead of each block.

        Only the lead has keys in earlier blocks (:mod:`mtraining.pattern.documents`). Without documents: zeros in place
        of padding.
        """
        return self.real(x) if self.documents is None else self._only(x, self.documents.in_lead(block_size))

    def tail(self, x: Tensor, block_size: int) -> Tensor:
        """The same with the tail of each block, which alone has queries in later blocks."""
        return self.real(x) if self.documents is None else self._only(x, self.documents.in_tail(block_size))

    def _only(self, x: Tensor, kept: Tensor) -> Tensor:
        there = (kept[:, self.positions] & (self.positions < self.length)).view(
            -1, x.shape[1], *(1,) * (x.ndim - 2)
        )
        return torch.where(there, x, torch.zeros((), dtype=x.dtype, device=x.device))

    def real_in_block(self, block_size: int) -> Tensor:
        """int64 (local blocks,): how many tokens of each of this rank's blocks are real."""
        start = self.all_blocks(block_size)[self.comm.rank] * block_size
        return (self.length - start).clamp(min=0, max=block_size)

    @property
    def positions(self) -> Tensor:
        return self.all_positions[self.comm.rank]

    def all_blocks(self, block_size: int) -> Tensor:
        """int64 (world, local blocks): global numbers of every rank's blocks, ascending for each rank."""
        return self.all_positions[:, ::block_size] // block_size

    def host_blocks(self, block_size: int) -> Tensor:
        """:meth:`all_blocks` on the CPU, for loops whose length depends on it. The first call copies the positions,
        which waits for the device; a ring keeps its shards, so it happens once."""
        return self._host_positions[:, ::block_size] // block_size

    @cached_property
    def _host_positions(self) -> Tensor:
        return self.all_positions.cpu()

    def block_index(
        self, block_size: int, blocks: Tensor, diagonals: Tensor | None = None, columns: Tensor | None = None
    ) -> SparseIndex:
        """The index of a pattern that lists blocks: each rank gives the rows of its own query blocks, nothing travels.

        Args:
            blocks: bool (batch, q_heads, local query blocks, blocks of the sequence), this rank's rows in local order.
            diagonals, columns: as :class:`SparseIndex` has them, the same on every rank; none by default.
        """
        if columns is None:
            columns = torch.empty(*blocks.shape[:2], 0, dtype=torch.int32, device=blocks.device)
        return self.listed_index(block_size, pack_blocks(blocks), columns, diagonals)

    def listed_index(
        self, block_size: int, lists: Tensor, columns: Tensor, diagonals: Tensor | None = None
    ) -> SparseIndex:
        """:meth:`block_index` of rows that are packed already (:func:`mtraining.kernel.pack_blocks`)."""
        if diagonals is None:
            diagonals = columns.new_zeros(*columns.shape[:2], self.seq_len // block_size, dtype=torch.bool)
        rows = None if self.comm.world == 1 else self.all_blocks(block_size)[self.comm.rank]
        return SparseIndex(self.seq_len, block_size, diagonals, columns, lists, rows)

    @cached_property
    def slots(self) -> Tensor:
        """int64 (seq_len,): local place of a global position, -1 where another rank holds it."""
        slots = torch.full((self.seq_len,), -1, dtype=torch.int64, device=self.positions.device)
        slots[self.positions] = torch.arange(self.positions.numel(), device=self.positions.device)
        return slots


@dataclass(frozen=True)
class Pattern:
    """Base of all patterns: a frozen dataclass whose fields are its options.

    Attributes:
        block_size: tokens a tile spans in either direction.
    """

    block_size: int = 128
    name: ClassVar[str] = ""

    def __post_init__(self) -> None:
        require(self, "block_size", self.block_size >= 1, "use a positive number of tokens such as 128")

    def check_heads(self, layer: int, q_heads: int) -> None:
        """Refuse a layer with a number of query heads that the pattern is not made for.

        Raises:
            UserError: naming the layer.
        """

    def estimate(self, q: Tensor, k: Tensor, shard: SequenceShard, scale: float) -> SparseIndex:
        """Choose what to attend. Collective over ``shard.comm``; the same index comes back on every rank, but for the
        rows of block lists, of which each rank has its own (:meth:`SequenceShard.block_index`).

        Args:
            q: (batch, local tokens, q_heads, head_dim), after rotary embedding.
            k: (batch, local tokens, kv_heads, head_dim).
            shard: which tokens these are.
            scale: factor on q.k before the softmax.
        """
        raise NotImplementedError


def require(pattern: Pattern, option: str, holds: bool, remedy: str) -> None:
    """Raise a UserError naming the option unless ``holds``."""
    if not holds:
        raise UserError(
            f"pattern.{option}: {getattr(pattern, option)!r} does not fit {pattern.name}; {remedy}."
        )


def build_from_table(table: Mapping[str, type[Pattern]], name: str, options: Mapping[str, object]) -> Pattern:
    """Look ``name`` up in ``table`` and fill its fields; unknown names are refused with the nearest known one."""
    if name not in table:
        raise UserError(
            f"pattern: {name!r} is not known{did_you_mean(name, table)}; choose one of {', '.join(table)}."
        )
    known = [f.name for f in fields(table[name])]
    for option in options:
        if option not in known:
            hint = did_you_mean(option, known)
            raise UserError(
                f"pattern.{option}: {name} has no such option{hint}; it takes {', '.join(known)}."
            )
    kinds = get_type_hints(table[name])
    given = {option: _typed(name, option, kinds[option], value) for option, value in options.items()}
    return table[name](**given)  # type: ignore[arg-type]


def options_of(pattern: Pattern) -> dict[str, Any]:
    """Every option of a pattern with its value, as plain values that a file can hold and `build_from_table` takes."""
    return {f.name: _plain(getattr(pattern, f.name)) for f in fields(pattern)}


def _plain(value: Any) -> Any:
    if isinstance(value, Pattern):
        return {"name": value.name, "options": options_of(value)}
    return [_plain(item) for item in value] if isinstance(value, tuple) else value


_KINDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a word", NoneType: "null"}


def _typed(name: str, option: str, kind: Any, value: object) -> object:
    """``value`` as a pattern's field wants it. Text that reads as a number is one (YAML takes 5e-2 for text); fields of
    other kinds than numbers, words and null are for the pattern itself to check."""
    kinds = get_args(kind) or (kind,)
    if not set(kinds) <= set(_KINDS):
        return value
    for one in kinds:
        with suppress(ValueError):
            return _read(one, value)
    wanted = " or ".join(_KINDS[one] for one in kinds)
    raise UserError(f"pattern.{option}: {value!r} does not fit {name}; give {wanted}.")


def _read(kind: type, value: object) -> object:
    """``value`` as one kind of :data:`_KINDS`.

    Raises:
        ValueError: it is of another kind; true and false are no numbers, though Python takes them for such.
    """
    if type(value) is kind:
        return value
    if kind in (int, float) and type(value) in (int, float, str):
        number = float(value)  # type: ignore[arg-type]
        if kind is float:
            return number
        if number.is_integer():
            return int(number)
    raise ValueError
