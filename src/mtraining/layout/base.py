"""What every layout offers; a layout itself is one small file that says which rank holds which run of tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from mtraining.errors import UserError


@dataclass(frozen=True)
class Layout:
    """Deals the tokens of a sequence to ranks in aligned runs of consecutive tokens.

    Applied once, at the data loader, to tokens, labels and position ids; never inverted inside the model.

    Attributes:
        unit: tokens in a stripe (only the striped layout reads it).

    Raises:
        UserError: a unit below one token; from the methods, a sequence that cannot be dealt evenly, or a rank that does
            not exist.
    """

    unit: int = 128
    name: ClassVar[str] = ""

    def __post_init__(self) -> None:
        if self.unit < 1:
            raise UserError(
                f"layout.unit: {self.unit} tokens is no stripe; use a positive multiple of pattern.block_size."
            )

    def run_length(self, seq_len: int, world: int) -> int:
        """Tokens in one aligned run of consecutive positions: local order is global order within it."""
        raise NotImplementedError

    def owners(self, num_runs: int, world: int) -> Tensor:
        """int64 (num_runs,): the rank that holds each run, in global order."""
        raise NotImplementedError

    def multiple(self, world: int, block_size: int) -> int:
        """The sequence length must be a multiple of this many tokens."""
        raise NotImplementedError

    def check(self, seq_len: int, world: int, block_size: int = 1) -> None:
        """Refuse lengths that this layout cannot deal evenly in whole blocks.

        Raises:
            UserError: with the nearest lengths that work.
        """
        if world < 1:
            raise UserError(f"world: {world} ranks cannot hold a sequence; use at least 1.")
        multiple = self.multiple(world, block_size)
        blocks = f" and blocks of {block_size} tokens" if block_size > 1 else ""
        cut = f" with blocks of {block_size}" if block_size > 1 else ""
        if seq_len > 0 and seq_len % multiple == 0:
            return
        if 0 < seq_len < multiple and world > 1:
            raise UserError(
                f"seq_len: {seq_len} tokens are too few for the {self.name} layout over {world} ranks{cut}; use at "
                f"least {multiple} tokens ({self._share(world, multiple)}), fewer ranks or smaller blocks."
            )
        below = seq_len // multiple * multiple
        above = below + multiple
        nearest = above if below <= 0 or above - seq_len < seq_len - below else below
        raise UserError(
            f"seq_len: {seq_len} is not a multiple of {multiple} ({self._share(world, multiple)}), which the "
            f"{self.name} layout needs for {world} rank{'s' if world > 1 else ''}{blocks}; the nearest length that "
            f"works is {nearest}."
        )

    def _share(self, world: int, multiple: int) -> str:
        return f"{multiple // world} tokens x {world} rank{'s' if world > 1 else ''}"

    def positions(self, seq_len: int, world: int) -> Tensor:
        """int64 (world, seq_len // world): the global position of each rank's tokens, in local order."""
        self.check(seq_len, world)
        run = self.run_length(seq_len, world)
        owners = self.owners(seq_len // run, world)
        runs = torch.stack([(owners == rank).nonzero().squeeze(1) for rank in range(world)])
        return (runs[..., None] * run + torch.arange(run)).flatten(1)

    def blocks(self, seq_len: int, world: int, block_size: int) -> Tensor:
        """int64 (world, blocks a rank): the global number of each rank's blocks, in local order."""
        self.check(seq_len, world, block_size)
        return self.positions(seq_len, world)[:, ::block_size] // block_size

    def shard(self, x: Tensor, rank: int, world: int, dim: int = 1) -> Tensor:
        """This rank's part of ``x`` along ``dim`` (length seq_len), in local order."""
        _check_dim(x, dim)
        if not 0 <= rank < world:
            raise UserError(f"rank: {rank} does not exist among {world}; use 0 to {world - 1}.")
        return x.index_select(dim, self.positions(x.shape[dim], world)[rank].to(x.device))

    def unshard(self, shards: Sequence[Tensor], dim: int = 1) -> Tensor:
        """The inverse of :meth:`shard` over all ranks: the whole tensor in global order."""
        if not shards:
            raise UserError("shards: there are none; give one of each rank, in their order.")
        for shard in shards:
            _check_dim(shard, dim)
        lengths = [shard.shape[dim] for shard in shards]
        if len(set(lengths)) > 1:
            raise UserError(f"shards: lengths {lengths} differ; give one of each rank, of the same sequence.")
        joined = torch.cat(list(shards), dim)
        order = self.positions(joined.shape[dim], len(shards)).flatten().argsort()
        return joined.index_select(dim, order.to(joined.device))


def _check_dim(x: Tensor, dim: int) -> None:
    if not -x.ndim <= dim < x.ndim:
        raise UserError(
            f"dim: {dim} does not exist in shape {tuple(x.shape)}; name the one that holds the tokens."
        )
