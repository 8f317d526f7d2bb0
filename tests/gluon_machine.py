"""Hopper kernels run as Python, program by program: their own source, with PyTorch tensors for registers and memory.

Every warp group and every fetching warp is a thread, and one at a time runs, chosen by chance whenever one waits,
arrives or starts a copy. Whatever is asynchronous is as unkind as the hardware may be: a copy's room holds NaN until
the copy lands, at a moment chosen by chance; the operands of a product that is under way, and the source of a copy to
global memory, must stand as they were until it has been waited for. So a wait too few, a phase off by one or a
room used again too early is an error in some interleaving, and a wait too many ends with nobody left to run.

What this cannot see: what the compiler makes of it (registers used again, barriers within a group of warps).
"""

from __future__ import annotations

import math
import random
import threading
from collections.abc import Callable
from functools import partial
from types import FunctionType, ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from triton.language import constexpr

from mtraining.kernel.hopper import common as hopper_common
from mtraining.kernel.hopper import items as hopper_items
from mtraining.kernel.triton import common as triton_common


class Stopped(BaseException):
    """Ends the threads of a machine that failed."""


class Task:
    """A thread that runs only while the machine waits for it."""

    def __init__(
        self, machine: Machine, work: Callable[..., None], args: tuple[Any, ...], weight: float
    ) -> None:
        self.machine, self.weight, self.ready = machine, weight, lambda: True
        self.products: list[Product] = []
        self.stores: list[Callable[[], None]] = []
        self.unfenced: set[int] = set()  # what this thread wrote and the copy engine may not see yet
        self.error: BaseException | None = None
        self.go, self.paused, self.done = threading.Semaphore(0), threading.Semaphore(0), False
        self.thread = threading.Thread(target=self._run, args=(work, args), daemon=True)
        self.thread.start()

    def _run(self, work: Callable[..., None], args: tuple[Any, ...]) -> None:
        try:
            self.pause()
            work(*args)
            assert not self.products and not self.stores, "a product or a copy that nobody waited for"
        except BaseException as error:
            self.error = error
        self.done = True
        self.paused.release()

    def pause(self, ready: Callable[[], bool] = lambda: True) -> None:
        self.ready = ready
        self.paused.release()
        self.go.acquire()
        if self.machine.stopped:
            raise Stopped

    def step(self) -> None:
        self.machine.current = self
        self.go.release()
        self.paused.acquire()


class Machine:
    """Programs of one launch, side by side."""

    def __init__(self, seed: int) -> None:
        self.chance, self.stopped = random.Random(seed), False
        self.tasks: list[Task] = []
        self.copies: list[Callable[[], None]] = []
        self.current: Task

    def spawn(self, work: Callable[..., None], args: tuple[Any, ...]) -> None:
        task = Task(
            self, work, args, self.chance.choice([0.02, 0.3, 1.0])
        )  # some are much slower than others
        task.paused.acquire()
        self.tasks.append(task)

    def run(self) -> None:
        try:
            while live := [task for task in self.tasks if not task.done]:
                able = [task for task in live if task.ready()]
                assert able or self.copies, "deadlock: all wait"
                if self.copies and (not able or self.chance.random() < 0.2):
                    self.copies.pop(self.chance.randrange(len(self.copies)))()
                    continue
                task = self.chance.choices(able, [task.weight for task in able])[0]
                task.step()
                if task.error is not None:
                    raise task.error
            assert not self.copies, "a program ended before its copies"
        finally:
            self.stopped = True
            for task in self.tasks:
                if not task.done:
                    task.step()
                task.thread.join()


class Barrier:
    def __init__(self, count: int) -> None:
        self.count = self.left = count
        self.bytes = self.phase = 0

    def settle(self) -> None:
        assert self.left >= 0, "more arrivals than the barrier counts"
        if self.left == 0 and self.bytes == 0:
            self.phase, self.left = self.phase ^ 1, self.count


class Barriers:
    def __init__(self, count: int, arrivals: int) -> None:
        self.all = [Barrier(arrivals) for _ in range(count)]

    def index(self, i: Any) -> Barrier:
        return self.all[int(i)]


class Room:
    """Shared memory of a program, or a part of it."""

    def __init__(self, machine: Machine, data: Tensor) -> None:
        self.machine, self.data, self.dtype = machine, data, data.dtype

    def index(self, i: Any) -> Room:
        return Room(self.machine, self.data[int(i)])

    def reshape(self, shape: list[int]) -> Room:
        return Room(self.machine, self.data.view(shape))

    def permute(self, order: tuple[int, ...]) -> Room:
        return Room(self.machine, self.data.permute(order))

    def load(self, layout: object = None) -> Tensor:
        return self.data.clone()

    def store(self, value: Tensor) -> None:
        self.data.copy_(value)
        self.machine.current.unfenced.add(self.data.data_ptr())


class Product:
    """A product under way: its operands in shared memory must not change."""

    def __init__(self, a: Tensor | Room, b: Room, acc: Tensor, use_acc: bool) -> None:
        self.rooms = [(x.data, x.data.clone()) for x in (a, b) if isinstance(x, Room)]
        left = a.data if isinstance(a, Room) else a
        self.result = left.float() @ b.data.float() + (acc if use_acc else 0)

    def finish(self) -> Tensor:
        for now, then in self.rooms:
            assert torch.equal(now, then), "a product's operand was written, or had not arrived"
        assert not self.result.isnan().any(), "a product read what had not arrived"
        return self.result


class Pointer:
    def __init__(self, memory: Tensor, offset: Any = 0) -> None:
        self.memory, self.offset = memory, offset

    def __add__(self, step: Any) -> Pointer:
        return Pointer(self.memory, self.offset + step)

    def __sub__(self, step: Any) -> Pointer:
        return Pointer(self.memory, self.offset - step)

    def places(self, mask: Any) -> tuple[Tensor, Tensor]:
        at = torch.as_tensor(self.offset).long()
        there = (
            torch.ones_like(at, dtype=torch.bool) if mask is None else torch.as_tensor(mask).expand(at.shape)
        )
        inside = (at >= 0) & (at < self.memory.numel())
        assert bool((inside | ~there).all()), "an address outside of its tensor"
        return at.clamp(0, max(self.memory.numel() - 1, 0)), there


def _load(at: Pointer, mask: Any = None, other: Any = 0) -> Tensor:
    places, there = at.places(mask)
    return torch.where(there, at.memory[places], torch.as_tensor(other, dtype=at.memory.dtype))


def _store(at: Pointer, value: Tensor, mask: Any = None) -> None:
    places, there = at.places(mask)
    at.memory[places[there]] = value.expand(places.shape)[there].to(at.memory.dtype)


class Simulated:
    """Stands in for a kernel of ``module``: ``kernel[grid](...)`` runs it on the CPU.

    Args:
        seed: of the interleaving; another one each launch.
    """

    def __init__(self, module: ModuleType, kernel: str, seed: int) -> None:
        self.module, self.source, self.seed = module, getattr(module, kernel).fn, seed

    def __getitem__(self, grid: tuple[int]) -> Callable[..., None]:
        def launch(*args: Any, num_warps: int, enable_fp_fusion: bool, **options: Any) -> None:
            machine, self.seed = Machine(self.seed), self.seed + 1
            given = [_argument(x) for x in args]
            for number in range(grid[0]):
                scope = _scope(self.module, machine, number, grid[0])
                machine.spawn(partial(_bound(self.source, scope), **options), tuple(given))
            machine.run()

        return launch


def _argument(x: Any) -> Any:
    if isinstance(x, tuple):
        return type(x)(*map(_argument, x))  # every bundle is a named tuple
    if isinstance(x, constexpr):
        return x.value
    if isinstance(x, Tensor):
        return Pointer(
            x.as_strided((x.untyped_storage().nbytes() // x.element_size() - x.storage_offset(),), (1,))
        )
    if hasattr(x, "block_shape"):
        shape, base = tuple(x.block_shape), x.base.as_strided(x.shape, x.strides)
        block = SimpleNamespace(nbytes=torch.Size(shape).numel() * base.element_size())
        return SimpleNamespace(base=base, box=shape, block_type=block, dtype=base.dtype, layout=None)
    return x


def _scope(module: ModuleType, machine: Machine, program: int, programs: int) -> dict[str, Any]:
    """Names that a kernel's source sees: the language, played by PyTorch, and the project's own device functions."""
    language = _language(machine, program, programs)
    names: dict[str, Any] = {}
    for source in (triton_common, hopper_common, hopper_items, module):
        for name, value in vars(source).items():
            if isinstance(getattr(value, "fn", None), FunctionType):
                names[name] = _bound(value.fn, names)
            elif hasattr(value, "_fields"):  # a bundle of arguments
                names[name] = value
    engine = _copy_engine(machine)
    names |= {
        "gl": language, "tl": language, "mbarrier": _mbarrier(machine), "tma": engine, "fetch_tile": engine.fetch_tile,
        "send_tile": engine.send_tile,
        "LOG2E": math.log2(math.e), "LN2": math.log(2), "product_layout": lambda columns: None, "barriers": Barriers,
        "fence_async_shared": lambda: machine.current.unfenced.clear(),
        "warpgroup_mma": partial(_product, machine), "warpgroup_mma_wait": partial(_wait, machine),
    }  # fmt: skip
    return names


def _bound(source: FunctionType, names: dict[str, Any]) -> FunctionType:
    return FunctionType(source.__code__, names, source.__name__, source.__defaults__)


def _product(
    machine: Machine, a: Any, b: Room, acc: Tensor, use_acc: bool = True, is_async: bool = False
) -> Any:
    product = Product(a, b, acc, use_acc)
    if not is_async:
        return product.finish()
    machine.current.products.append(product)
    machine.current.pause()
    return product


def _wait(machine: Machine, pending: int, deps: list[Any]) -> Any:
    machine.current.pause()
    queue, done = machine.current.products, {}
    while len(queue) > pending:
        product = queue.pop(0)
        done[id(product)] = product.finish()
    values = [done[id(x)] if isinstance(x, Product) else x for x in deps]
    return values[0] if len(values) == 1 else values


def _mbarrier(machine: Machine) -> SimpleNamespace:
    def arrive(barrier: Barrier, count: int = 1) -> None:
        barrier.left -= count
        barrier.settle()
        machine.current.pause()

    def expect(barrier: Barrier, size: int) -> None:
        barrier.bytes += size
        arrive(barrier)

    def wait(barrier: Barrier, parity: Any) -> None:
        machine.current.pause(lambda: barrier.phase != int(parity))

    return SimpleNamespace(arrive=arrive, expect=expect, wait=wait)


def _copy_engine(machine: Machine) -> SimpleNamespace:
    def fetch(desc: SimpleNamespace, at: list[Any], barrier: Barrier, room: Room) -> None:
        room.data.fill_(torch.nan)
        found = torch.zeros(desc.box, dtype=room.dtype)  # beyond the tensor there are zeros
        part = desc.base[tuple(slice(int(x), int(x) + n) for x, n in zip(at, desc.box, strict=True))]
        found[tuple(slice(0, n) for n in part.shape)] = part

        def land() -> None:
            room.data.copy_(found)
            barrier.bytes -= desc.block_type.nbytes
            barrier.settle()

        machine.copies.append(land)
        machine.current.pause()

    def send(desc: SimpleNamespace, at: list[Any], room: Room) -> None:
        assert room.data.data_ptr() not in machine.current.unfenced, "the copy engine does not see it yet"
        sent = room.data.clone()

        def land() -> None:
            assert torch.equal(sent, room.data), "written while being copied"
            desc.base[tuple(slice(int(x), int(x) + n) for x, n in zip(at, desc.box, strict=True))] = sent

        machine.current.stores.append(land)
        machine.current.pause()

    def store_wait(pending: int) -> None:
        machine.current.pause()
        while len(machine.current.stores) > pending:
            machine.current.stores.pop(0)()

    return SimpleNamespace(fetch_tile=fetch, send_tile=send, store_wait=store_wait)


def _language(machine: Machine, program: int, programs: int) -> SimpleNamespace:
    def allocate(dtype: torch.dtype, shape: list[int], layout: object) -> Room:
        return Room(machine, torch.full(shape, torch.nan if dtype.is_floating_point else -1, dtype=dtype))

    def atomic_add(at: Pointer, value: int, sem: str) -> Tensor:
        old = _load(at)
        _store(at, old + value)
        return old

    def where(condition: Any, a: Any, b: Any) -> Tensor:
        return torch.where(torch.as_tensor(condition), a, b)

    def warp_specialize(parts: list[Any], warps: list[int], registers: list[int]) -> None:
        for work, args in parts:
            machine.spawn(work, args)

    layout = lambda *_, **__: None  # noqa: E731
    return SimpleNamespace(
        int32=torch.int32, int64=torch.int64, float32=torch.float32, BlockedLayout=layout, SliceLayout=layout,
        DotOperandLayout=layout, SwizzledSharedLayout=layout, constexpr=None, static_range=range,
        program_id=lambda axis: torch.tensor(program), num_programs=lambda axis: programs,
        warp_specialize=warp_specialize,
        allocate_shared_memory=allocate, atomic_add=atomic_add, load=_load, store=_store, where=where,
        cdiv=lambda a, b: -(-a // b), convert_layout=lambda x, layout: x,
        minimum=lambda a, b: torch.minimum(torch.as_tensor(a), torch.as_tensor(b)),
        maximum=lambda a, b: torch.maximum(torch.as_tensor(a), torch.as_tensor(b)),
        arange=lambda a, b, layout=None: torch.arange(a, b, dtype=torch.int32),
        zeros=lambda shape, dtype, layout=None: torch.zeros(shape, dtype=dtype),
        full=lambda shape, value, dtype, layout=None: torch.full(shape, value, dtype=dtype),
        exp2=torch.exp2, log2=torch.log2, max=lambda x, axis: x.amax(axis), sum=lambda x, axis: x.sum(axis),
    )  # fmt: skip
