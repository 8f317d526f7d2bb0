"""Real process groups for tests, cheap enough to use by the hundred.

`ProcessPool.run(fn, world=4, **kwargs)` calls `fn(worker, **kwargs)` in four processes joined by gloo and returns
the four results in rank order. The processes of each world size are started once (forked from a server that has
torch already imported; on GPUs, spawned) and stay for the session, so a job costs milliseconds; `worker.mesh(...)`
likewise makes each mesh once. On CPUs the processes are stopped (SIGSTOP) between jobs: each of gloo's threads, one a
process group, would wake up a hundred times a second.

`fn` must be importable by name (a module-level function), its arguments and results picklable. Between jobs a
process keeps nothing on purpose: seeds are reset, and one failed job ends the processes of its world size; the next
job starts new ones.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import multiprocessing
import os
import pickle
import random
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from typing import Any

PRELOAD = [
    "pytest",
    "torch",
    "torch.distributed.fsdp",
    "torch.distributed.checkpoint",
    "transformers.models.qwen2.modeling_qwen2",
    "transformers.models.llama.modeling_llama",
]
_DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG
GRACE_SECONDS = 2.0  # after the first failure, how long the other ranks have to tell theirs


class WorkerError(RuntimeError):
    """A job failed on some rank; the text has the rank and its traceback."""


@dataclass
class Worker:
    """A job's place: its rank in the default process group, which has exactly `world` ranks, and its device."""

    rank: int
    world: int
    device: Any
    _meshes: dict[tuple[Any, ...], Any] = field(default_factory=dict)

    def mesh(self, shape: int | Sequence[int] | None = None, names: str | Sequence[str] = "cp") -> Any:
        """A DeviceMesh over all ranks, row-major; made once, then reused. Default: 1-D over the world, named "cp".

        Collective: all ranks of the job call it alike. For a context-parallel group inside a larger world, slice:
        `worker.mesh((2, 2), ("dp", "cp"))["cp"]`.
        """
        from torch.distributed.device_mesh import init_device_mesh

        sizes = (self.world,) if shape is None else (shape,) if isinstance(shape, int) else tuple(shape)
        labels = (names,) if isinstance(names, str) else tuple(names)
        key = (sizes, labels)
        if key not in self._meshes:
            self._meshes[key] = init_device_mesh(self.device.type, sizes, mesh_dim_names=labels)
        return self._meshes[key]

    def ring_mesh(self, topology: Sequence[int]) -> Any:
        """The mesh of a ring, (ranks,), or of a ring of rings, (outer, inner). Collective."""
        return self.mesh() if len(topology) == 1 else self.mesh(topology, ("cp_outer", "cp_inner"))


def _filters() -> list[tuple[str, str, type[Warning], str, int]]:
    """The parent's warning filters, most important first, as arguments of `warnings.filterwarnings`."""

    def text(pattern: Any) -> str:
        return "" if pattern is None else pattern if isinstance(pattern, str) else pattern.pattern

    return [(action, text(msg), kind, text(mod), line) for action, msg, kind, mod, line in warnings.filters]


def _stacks(folder: str, rank: int) -> str:
    return os.path.join(folder, f"stacks.{rank}")


def _failure(rank: int, error: BaseException) -> bytes:
    trace = f"rank {rank}:\n{traceback.format_exc()}"
    try:
        payload = pickle.dumps(("error", error, trace))
        pickle.loads(payload)  # some exceptions pickle but do not come back
        return payload
    except Exception:
        return pickle.dumps(("error", None, trace))


def _end_with_the_server() -> None:
    """A stopped process does not see that the tests are gone. The fork server does, unless a process that it made still
    holds the pipe by which it sees so; and the kernel ends this process with the server."""
    os.close(forkserver._forkserver._forkserver_alive_fd)  # type: ignore[attr-defined]
    forkserver._forkserver._forkserver_alive_fd = None  # type: ignore[attr-defined]
    ctypes.CDLL(None).prctl(_DIE_WITH_PARENT, signal.SIGKILL)


def _serve(conn: Connection, rank: int, world: int, folder: str, on_gpu: bool) -> None:
    """A process's whole life: join the group, then jobs until the other end of the pipe is gone."""
    # Never closed: a signal may ask for the stacks at any time.
    faulthandler.register(signal.SIGUSR2, file=open(_stacks(folder, rank), "w"))  # noqa: SIM115
    import numpy
    import torch
    import torch.distributed as dist

    from mtraining.bench.processes import take_device
    from mtraining.train.mesh import backend_for

    torch.set_num_threads(1)
    if on_gpu:
        os.environ |= {"LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(world)}
    else:
        _end_with_the_server()
    device = take_device(on_gpu)
    dist.init_process_group(
        backend_for(device),
        init_method=f"file://{os.path.join(folder, 'store')}",
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=60),
    )
    worker = Worker(rank, world, device)
    while True:
        try:
            message = conn.recv_bytes()
        except (EOFError, OSError):
            os._exit(0)
        path, filters, job = pickle.loads(message)
        sys.path[:] = path
        random.seed(0)
        numpy.random.seed(0)
        torch.manual_seed(0)
        try:
            with warnings.catch_warnings():
                warnings.resetwarnings()
                for rule in reversed(filters):
                    warnings.filterwarnings(*rule)
                fn, kwargs = pickle.loads(job)
                reply = pickle.dumps(("ok", fn(worker, **kwargs), ""))
        except BaseException as error:
            reply = _failure(rank, error)
        try:
            conn.send_bytes(reply)
        except OSError:
            os._exit(1)


class _Crew:
    """The processes of one world size."""

    def __init__(self, world: int, on_gpu: bool) -> None:
        context: Any = multiprocessing.get_context("spawn" if on_gpu else "forkserver")
        if not on_gpu:
            context.set_forkserver_preload(PRELOAD)
        self.world = world
        self.sleeps = not on_gpu
        self.folder = tempfile.TemporaryDirectory(prefix="pool-")
        self.connections: list[Connection] = []
        self.processes: list[Any] = []
        for rank in range(world):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_serve,
                args=(theirs, rank, world, self.folder.name, on_gpu),
                daemon=True,
            )
            process.start()
            theirs.close()
            self.connections.append(ours)
            self.processes.append(process)

    def run(self, message: bytes, timeout: float) -> list[Any]:
        self._signal(signal.SIGCONT)
        results = self._results(message, timeout)
        self._signal(signal.SIGSTOP)
        return results

    def _signal(self, number: signal.Signals) -> None:
        if self.sleeps:
            for process in self.processes:
                with contextlib.suppress(ProcessLookupError):  # one that died is reported by its job
                    os.kill(process.pid, number)

    def _results(self, message: bytes, timeout: float) -> list[Any]:
        for connection in self.connections:
            with contextlib.suppress(OSError):  # a process that died at start is reported below
                connection.send_bytes(message)
        results: dict[int, Any] = {}
        failures: list[tuple[BaseException | None, str]] = []
        deadline = time.monotonic() + timeout
        pending = dict(zip(self.connections, range(self.world), strict=True))
        while pending:
            ready = wait(list(pending), max(0.0, deadline - time.monotonic()))
            if not ready:
                if not failures:
                    stuck = sorted(pending.values())
                    text = f"ranks {stuck} gave no result in {timeout:.0f} s"
                    failures.append((None, "\n".join([text, *map(self._where, stuck)])))
                break
            for connection in ready:
                rank = pending.pop(connection)  # type: ignore[index]
                try:
                    status, value, trace = pickle.loads(connection.recv_bytes())  # type: ignore[union-attr]
                except (EOFError, OSError):
                    process = self.processes[rank]
                    process.join(GRACE_SECONDS)
                    status, value, trace = "error", None, f"rank {rank} died (exit code {process.exitcode})"
                if status == "ok":
                    results[rank] = value
                else:
                    failures.append((value, trace))
                    deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
        if failures:
            error, trace = failures[0]
            told = WorkerError("\n".join(trace for _, trace in failures))
            if error is None:
                raise told
            raise error from told
        return [results[rank] for rank in range(self.world)]

    def _where(self, rank: int) -> str:
        """The stacks of a rank's threads."""
        path = _stacks(self.folder.name, rank)
        if not os.path.exists(path):
            return f"rank {rank} had not started yet"
        os.kill(self.processes[rank].pid, signal.SIGUSR2)
        deadline = time.monotonic() + GRACE_SECONDS
        while not os.path.getsize(path) and time.monotonic() < deadline:
            time.sleep(0.05)
        time.sleep(0.05)  # it is written line by line
        with open(path, encoding="utf-8") as file:
            return f"rank {rank} was in\n{file.read()}"

    def stop(self) -> None:
        for connection in self.connections:
            connection.close()
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()
        self.folder.cleanup()


class ProcessPool:
    """See the module's text. One per test session: the `pool` fixture.

    Args:
        on_gpu: the processes are joined by NCCL and share this machine's GPUs, as many as there are.
    """

    def __init__(self, on_gpu: bool = False) -> None:
        self._on_gpu = on_gpu
        self._crews: dict[int, _Crew] = {}

    def run(
        self, fn: Callable[..., Any], world: int = 2, *, timeout: float = 120.0, **kwargs: Any
    ) -> list[Any]:
        """`fn(worker, **kwargs)` on ranks 0..world-1 of a group of exactly that size; results in rank order.

        Raises the exception of the rank that failed first (its cause, a WorkerError, has every rank's traceback), or
        WorkerError when a rank died or when `timeout` seconds passed without its result.
        """
        message = pickle.dumps((sys.path, _filters(), pickle.dumps((fn, kwargs))))
        if world not in self._crews:
            self._crews[world] = _Crew(world, self._on_gpu)
        try:
            return self._crews[world].run(message, timeout)
        except BaseException:
            self._crews.pop(world).stop()
            raise

    def close(self) -> None:
        """End every process."""
        while self._crews:
            self._crews.popitem()[1].stop()
