"""The process grid of a run: its devices, its process groups and the dp x cp (outer x inner) mesh."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from mtraining.errors import UserError
from mtraining.model import use_expandable_segments
from mtraining.ring import Ring, prioritise_transfers

if TYPE_CHECKING:
    from mtraining.train.config import DistributedSection, ParallelSection

T = TypeVar("T")


class Grid(Protocol):
    """The part of a configuration that says where it runs."""

    @property
    def parallel(self) -> ParallelSection: ...

    @property
    def distributed(self) -> DistributedSection: ...


@dataclass(frozen=True)
class Process:
    """Where this process stands: its device, its ranks, and the mesh over all processes (of one process too).

    Attributes:
        allocator: a sentence for the log about how the GPU's memory is taken; empty on a CPU.
        others: process groups that were there before, which are left as they are.
    """

    device: torch.device
    mesh: DeviceMesh
    rank: int
    world: int
    dp_rank: int
    cp_rank: int
    allocator: str = ""
    others: frozenset[dist.ProcessGroup] = frozenset()

    @property
    def is_main(self) -> bool:
        """True on the one rank that prints and writes the shared files."""
        return self.rank == 0

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Sum over all processes (in place; returned for convenience). Collective."""
        dist.all_reduce(values)
        return values

    def gather(self, value: float) -> list[float]:
        """One number from each process, in rank order. Collective."""
        out = torch.zeros(self.world, dtype=torch.float64, device=self.device)
        out[self.rank] = value
        everything = [torch.empty_like(out) for _ in range(self.world)]
        dist.all_gather(everything, out)
        return [float(everything[rank][rank]) for rank in range(self.world)]

    def gather_objects(self, value: T) -> list[T]:
        """Each process's value, whatever can be pickled, in rank order. Collective."""
        everything: list[Any] = [None] * self.world
        dist.all_gather_object(everything, value)
        return everything

    def from_main(self, value: T) -> T:
        """The main rank's value, on every rank. Collective."""
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]


def launched_world() -> int:
    """The number of processes the launcher (torchrun or our own) started; 1 when there is none."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def check_world(parallel: ParallelSection, world: int) -> None:
    """Refuse a grid that is not the number of processes there are."""
    if parallel.world == world:
        return
    started = "1 process was" if world == 1 else f"{world} processes were"
    raise UserError(
        f"parallel.dp={parallel.dp} x parallel.cp={parallel.cp} needs {parallel.world} processes but {started} "
        f"started; pass --nproc {parallel.world} (or torchrun --nproc-per-node {parallel.world}), or change "
        "parallel.dp and parallel.cp."
    )


def choose_device(config: Grid, local_rank: int, local_world: int) -> torch.device:
    """The device of one local rank; CUDA only when each local process can have a GPU of its own."""
    wanted = config.distributed.device
    gpus = torch.cuda.device_count()
    if wanted == "cpu" or (wanted == "auto" and gpus == 0):
        return torch.device("cpu")
    if gpus < local_world:
        raise UserError(
            f"distributed.device={wanted} gives each process its own GPU, and {local_world} local processes have "
            f"{gpus}; start at most {gpus} processes on this machine or set distributed.device=cpu."
            if gpus
            else "distributed.device=cuda but PyTorch finds no GPU here; set distributed.device=cpu or auto."
        )
    return torch.device("cuda", local_rank)


def backend_for(device: torch.device) -> str:
    """What `torch.distributed.init_process_group` takes."""
    return "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"


@contextmanager
def joined_processes(config: Grid) -> Iterator[Process]:
    """Join the process groups, build the mesh, and leave the groups at the end. Collective.

    A run of one process has a group of one, so that one path serves every size; a group that already exists is used
    and left in place. Mesh dimensions are ("dp", "cp"), or ("dp", "cp_outer", "cp_inner") when `parallel.cp_outer` > 1;
    the context-parallel rank is the ring's own numbering, and neighbouring global ranks share a sequence.
    """
    joined = dist.is_initialized()
    others = process_groups()
    world = dist.get_world_size() if joined else launched_world()
    check_world(config.parallel, world)
    local_world = int(os.environ.get("LOCAL_WORLD_SIZE", str(world)))
    device = choose_device(config, int(os.environ.get("LOCAL_RANK", "0")), local_world)
    allocator = ""
    if device.type == "cuda":
        allocator = use_expandable_segments()  # before CUDA starts in this process
        torch.cuda.set_device(device)
    elif "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // local_world))
    if not joined:
        prioritise_transfers()
        alone = "RANK" not in os.environ
        dist.init_process_group(
            backend=backend_for(device),
            timeout=timedelta(seconds=config.distributed.timeout_seconds),
            store=dist.HashStore() if alone else None,
            rank=0 if alone else -1,
            world_size=1 if alone else -1,
        )
    try:
        rank, mesh = dist.get_rank(), build_mesh(config.parallel, device.type)
        cp_dims = tuple(name for name in mesh.mesh_dim_names or () if name != "dp")
        yield Process(
            device=device,
            mesh=mesh,
            rank=rank,
            world=world,
            dp_rank=rank // config.parallel.cp,
            cp_rank=Ring.over(mesh[cp_dims]).rank,
            allocator=allocator,
            others=others,
        )
    except BaseException as error:
        # Other ranks may be amid a collective, for whose end NCCL would wait here; bad input is every rank's.
        if not joined and (world == 1 or isinstance(error, UserError)):
            dist.destroy_process_group()
        raise
    if not joined:
        dist.destroy_process_group()


@contextmanager
def repeatable(asked: bool) -> Iterator[None]:
    """With `train.deterministic`: PyTorch's operations in a fixed order, as far as they have one, until the end."""
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    if asked:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what cuBLAS wants for it
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
        torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def process_groups() -> frozenset[dist.ProcessGroup]:
    """All process groups that this process is in."""
    return frozenset(distributed_c10d._world.pg_map)


def limit_waits(seconds: float, but: Collection[dist.ProcessGroup] = ()) -> None:
    """Let a collective wait so long at most, in every process group but these.

    PyTorch gives groups that a mesh makes its own default of 10 or 30 minutes, whatever the default group was given.
    """
    for group in process_groups().difference(but):
        distributed_c10d._set_pg_timeout(timedelta(seconds=seconds), group)


def build_mesh(parallel: ParallelSection, device_type: str) -> DeviceMesh:
    """The mesh of a process grid. Collective.

    A ring over all processes uses the default group, as FSDP's gathers and the sums of losses do. A group of its own
    was measured and brought nothing (docs/experiments/rings.md).
    """
    if parallel.cp_outer == 1:
        return init_device_mesh(device_type, (parallel.dp, parallel.cp), mesh_dim_names=("dp", "cp"))
    shape = (parallel.dp, parallel.cp_outer, parallel.cp // parallel.cp_outer)
    return init_device_mesh(device_type, shape, mesh_dim_names=("dp", "cp_outer", "cp_inner"))
