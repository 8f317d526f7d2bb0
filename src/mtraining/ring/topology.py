"""The context-parallel ranks as one ring, or as a ring of rings (METHOD.md section 4), and their collectives."""

from __future__ import annotations

from functools import cache

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from mtraining.errors import UserError

# torch 2.13 renamed it and warns under the old name
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


class Ring:
    """``outer`` rings of ``inner`` ranks each; a flat ring has outer = 1 and a single process 1 x 1.

    The context-parallel rank is row-major: rank = outer_rank * inner + inner_rank. Collectives over both dimensions run
    first inside the node (inner), then between nodes (outer), so slow links carry each byte once.
    """

    def __init__(self, mesh: DeviceMesh | None) -> None:
        self.outer = self.inner = 1
        self.outer_rank = self.inner_rank = 0
        self.outer_group: dist.ProcessGroup | None = None
        self.inner_group: dist.ProcessGroup | None = None
        if mesh is None:
            return
        if mesh.ndim not in (1, 2):
            raise UserError(
                f"mesh: a ring needs a mesh of one dimension, or of two (outer, inner), not {mesh.ndim}; "
                "slice the context-parallel dimensions out of it, e.g. mesh['cp_outer', 'cp_inner']."
            )
        self.inner_group, self.inner, self.inner_rank = _dimension(mesh, mesh.ndim - 1)
        if mesh.ndim == 2:
            self.outer_group, self.outer, self.outer_rank = _dimension(mesh, 0)

    @staticmethod
    @cache
    def over(mesh: DeviceMesh | None) -> Ring:
        """The ring of a mesh, made once."""
        return Ring(mesh)

    @property
    def world(self) -> int:
        return self.outer * self.inner

    @property
    def rank(self) -> int:
        return self.outer_rank * self.inner + self.inner_rank

    def source(self, outer_step: int, inner_step: int, rank: int | None = None) -> int:
        """Whose keys ``rank`` (default: this one) holds at a step of the ring."""
        outer_rank, inner_rank = divmod(self.rank if rank is None else rank, self.inner)
        return (outer_rank - outer_step) % self.outer * self.inner + (inner_rank - inner_step) % self.inner

    def _stages(self) -> list[dist.ProcessGroup]:
        stages = ((self.inner_group, self.inner), (self.outer_group, self.outer))
        return [group for group, size in stages if group is not None and size > 1]

    def all_sum(self, x: Tensor) -> Tensor:
        """Elementwise sum over all ranks, the same bits on each; ``x`` is left alone."""
        return self.start_sum(x.clone()).wait()

    def start_sum(self, x: Tensor) -> PendingSum:
        """Begin summing ``x`` in place over all ranks, in the background."""
        return PendingSum(x, self._stages())

    def all_gather(self, x: Tensor) -> Tensor:
        """(...) -> (world, ...), in rank order."""
        gathered = x[None]
        for group in self._stages():
            size = dist.get_world_size(group)
            out = gathered.new_empty(size, *gathered.shape)
            _all_gather(out.flatten(0, 1), gathered.contiguous(), group=group)
            gathered = out.flatten(0, 1)
        return gathered

    def all_to_all(self, x: Tensor) -> Tensor:
        """(world, ...) by destination -> (world, ...) by source."""
        if self.world == 1:
            return x
        x = x.unflatten(0, (self.outer, self.inner))
        if self.outer > 1:
            x = _exchange(x, self.outer_group)
        if self.inner > 1:
            x = _exchange(x.transpose(0, 1), self.inner_group).transpose(0, 1)
        return x.flatten(0, 1)


class PendingSum:
    """A sum over the ring under way."""

    def __init__(self, x: Tensor, stages: list[dist.ProcessGroup]) -> None:
        self._x, self._rest = x, stages[1:]
        self._work = dist.all_reduce(x, group=stages[0], async_op=True) if stages else None

    def wait(self) -> Tensor:
        """Finish and return the summed tensor."""
        if self._work is not None:
            self._work.wait()
            for group in self._rest:
                dist.all_reduce(self._x, group=group)
        return self._x


class Hop:
    """One neighbour-to-neighbour transfer under way: sends ``payload`` to the next rank, receives from the previous."""

    def __init__(self, payload: Tensor, group: dist.ProcessGroup | None) -> None:
        rank, size = dist.get_rank(group), dist.get_world_size(group)
        self._payload = payload  # kept alive, and unwritten, until the transfer is done
        self._received = torch.empty_like(payload)
        self._works = dist.batch_isend_irecv(
            [
                dist.P2POp(dist.isend, payload, group=group, group_peer=(rank + 1) % size),
                dist.P2POp(dist.irecv, self._received, group=group, group_peer=(rank - 1) % size),
            ]
        )

    def wait(self) -> Tensor:
        """Finish and return what the previous rank sent."""
        for work in self._works:
            work.wait()
        return self._received


def _dimension(mesh: DeviceMesh, dim: int) -> tuple[dist.ProcessGroup, int, int]:
    return mesh.get_group(dim), mesh.size(dim), mesh.get_local_rank(dim)


def _exchange(x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    x = x.contiguous()
    out = torch.empty_like(x)
    dist.all_to_all_single(out, x, group=group)
    return out
