"""The context-parallel ranks as one ring, or as a ring of rings (docs/how/rings.md), and their collectives."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from mtraining.errors import UserError
from mtraining.ring.links import begin_sum, begin_transfer
from mtraining.ring.timeline import count_sent, waiting

# torch 2.13 renamed it and warns under the old name
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


class Ring:
    """``outer`` rings of ``inner`` ranks each; a flat ring has outer = 1 and a single process 1 x 1.

    Ranks are numbered across nodes first: rank = inner_rank * outer + outer_rank. An inner hop then adds ``outer`` to
    the rank (the next GPU of the same node), and an outer hop adds one (the next node). At step (a, b) *every* rank
    holds the keys of rank - (a + b * outer). This one difference for all ranks keeps a striped layout balanced in
    each step. Were ranks numbered node by node, those before and after the wrap would meet different residues of
    block distances.

    Attributes:
        rank: this process's context-parallel rank, by which a layout says which tokens it holds.
    """

    def __init__(self, mesh: DeviceMesh | None) -> None:
        self.outer = self.inner = 1
        outer_rank = inner_rank = 0
        self._outer_group: dist.ProcessGroup | None = None
        self._inner_group: dist.ProcessGroup | None = None
        # Outer hops go between any two nodes' GPUs, by a communicator of their own: they do not queue with inner ones.
        self._whole_group: dist.ProcessGroup | None = None
        if mesh is not None:
            if mesh.ndim not in (1, 2) or (mesh.ndim == 2 and not mesh.mesh_dim_names):
                raise UserError(
                    f"mesh: a ring needs one dimension, or two named ones (outer, inner), not {mesh.ndim} named "
                    f"{mesh.mesh_dim_names}; slice the context-parallel dimensions out of it, e.g. "
                    "mesh['cp_outer', 'cp_inner']."
                )
            self._inner_group, self.inner, inner_rank = _dimension(mesh, mesh.ndim - 1)
            self._whole_group = self._inner_group
            if mesh.ndim == 2 and mesh.size(0) > 1:
                self._outer_group, self.outer, outer_rank = _dimension(mesh, 0)
                self._whole_group = mesh._flatten().get_group()
        self.rank = inner_rank * self.outer + outer_rank
        self._met = False

    @staticmethod
    def over(mesh: DeviceMesh | None) -> Ring:
        """The ring of a mesh, made once for its process groups: groups made anew make another ring, although the
        meshes compare equal."""
        groups = () if mesh is None else tuple(mesh.get_group(dim) for dim in range(mesh.ndim))
        if groups not in _rings:
            _rings[groups] = Ring(mesh)
        return _rings[groups]

    @property
    def world(self) -> int:
        return self.outer * self.inner

    def source(self, outer_step: int, inner_step: int) -> int:
        """Whose keys this rank holds at a step of the ring."""
        return (self.rank - ring_offset(outer_step, inner_step, self.outer)) % self.world

    def inner_hop(self, payload: Tensor) -> Hop:
        """Begin sending ``payload`` to the next rank of this node and receiving from the previous."""
        here = self.rank // self.outer
        return Hop(payload, self._inner_group, (here + 1) % self.inner, (here - 1) % self.inner)

    def outer_hop(self, payload: Tensor) -> Hop:
        """Begin sending ``payload`` to the next rank, on the next node, and receiving from the previous."""
        return Hop(payload, self._whole_group, self._place(self.rank + 1), self._place(self.rank - 1))

    def home_hop(self, payload: Tensor, outer_step: int) -> Hop:
        """Begin sending ``payload`` from the last step of a round to the rank whose keys were held there, and receiving
        this rank's own."""
        if outer_step == 0:
            return self.inner_hop(payload)
        away = ring_offset(outer_step, self.inner - 1, self.outer)
        return Hop(payload, self._whole_group, self._place(self.rank - away), self._place(self.rank + away))

    def exchange(
        self,
        payload: Tensor | None,
        offset: int,
        shape: torch.Size | None,
        dtype: torch.dtype,
        device: torch.device,
    ) -> Exchange:
        """Begin sending ``payload`` to the rank ``offset`` further on, and receiving a tensor of ``shape`` from the
        rank as far before; either may be None. Every rank makes these calls in one order, so none waits for ever."""
        self._meet(device)
        into = None if shape is None else torch.empty(shape, dtype=dtype, device=device)
        return Exchange(
            payload, into, self._whole_group, self._place(self.rank + offset), self._place(self.rank - offset)
        )

    def _meet(self, device: torch.device) -> None:
        """Have all ranks make the communicator: NCCL makes it with a group's first message, which not every rank of an
        exchange sends or receives."""
        if device.type == "cuda" and not self._met:
            dist.all_reduce(torch.zeros(1, device=device), group=self._whole_group)
        self._met = True

    def _place(self, rank: int) -> int:
        """Where a rank stands in the whole group, which counts node by node."""
        inner_rank, outer_rank = divmod(rank % self.world, self.outer)
        return outer_rank * self.inner + inner_rank

    def _stages(self) -> list[dist.ProcessGroup]:
        """Groups of a collective over all ranks: between nodes first, so that a byte crosses a slow link once."""
        stages = ((self._outer_group, self.outer), (self._inner_group, self.inner))
        return [group for group, size in stages if group is not None and size > 1]

    def all_sum(self, x: Tensor) -> Tensor:
        """Elementwise sum over all ranks, the same bits on each; ``x`` is left alone."""
        return self.start_sum(x.clone()).wait()

    def start_sum(self, x: Tensor) -> PendingSum:
        """Begin summing ``x`` in place over all ranks, in the background."""
        return PendingSum(x, self._whole_group if self.world > 1 else None)

    def all_gather(self, x: Tensor) -> Tensor:
        """(...) -> (world, ...), in rank order."""
        gathered = x[None]
        for group in self._stages():
            out = gathered.new_empty(dist.get_world_size(group), *gathered.shape)
            _all_gather(out.flatten(0, 1), gathered.contiguous(), group=group)
            gathered = out.flatten(0, 1)
        return gathered

    def all_to_all(self, x: Tensor) -> Tensor:
        """(world, ...) by destination -> (world, ...) by source."""
        if self.world == 1:
            return x
        x = x.unflatten(0, (self.inner, self.outer))
        if self.outer > 1:
            x = _exchange(x.transpose(0, 1), self._outer_group).transpose(0, 1)
        if self.inner > 1:
            x = _exchange(x, self._inner_group)
        return x.flatten(0, 1)


_rings: dict[tuple[dist.ProcessGroup, ...], Ring] = {}


def ring_offset(outer_step: int, inner_step: int, outer: int) -> int:
    """At this step every rank holds the keys of rank - offset."""
    return outer_step + inner_step * outer


class PendingSum:
    """A sum over the ring under way; over no group, one that is done."""

    def __init__(self, x: Tensor, group: dist.ProcessGroup | None) -> None:
        self._x = x
        self._works = [] if group is None else begin_sum(x, group)

    def wait(self) -> Tensor:
        """Finish and return the summed tensor."""
        if self._works:
            with waiting():
                for work in self._works:
                    work.wait()
        return self._x


class Exchange:
    """A transfer under way of which either end may be missing: nothing to send, or nothing to receive."""

    def __init__(
        self,
        payload: Tensor | None,
        into: Tensor | None,
        group: dist.ProcessGroup | None,
        to: int,
        sender: int,
    ) -> None:
        # Both kept alive, and the payload unwritten, until the transfer is done.
        self._payload, self._received = payload, into
        send = None if payload is None else dist.P2POp(dist.isend, payload, group=group, group_peer=to)
        receive = None if into is None else dist.P2POp(dist.irecv, into, group=group, group_peer=sender)
        if payload is not None:
            count_sent(payload.nbytes)
        self._works = begin_transfer(send, receive) if send or receive else ()

    def wait(self) -> Tensor | None:
        """Finish and return what was received, None where that is nothing."""
        with waiting():
            for work in self._works:
                work.wait()
        return self._received


class Hop(Exchange):
    """An exchange with both ends: sends ``payload`` to a rank of the group and receives the like from another."""

    def __init__(self, payload: Tensor, group: dist.ProcessGroup | None, to: int, sender: int) -> None:
        super().__init__(payload, torch.empty_like(payload), group, to, sender)

    def wait(self) -> Tensor:
        """Finish and return what was received."""
        received = super().wait()
        assert received is not None
        return received


def _dimension(mesh: DeviceMesh, dim: int) -> tuple[dist.ProcessGroup, int, int]:
    return mesh.get_group(dim), mesh.size(dim), mesh.get_local_rank(dim)


def _exchange(x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    x = x.contiguous()
    out = torch.empty_like(x)
    dist.all_to_all_single(out, x, group=group)
    return out
