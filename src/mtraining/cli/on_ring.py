"""What commands that run a model on the ring share: options, processes, and the grid that they form."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from mtraining.errors import UserError

if TYPE_CHECKING:
    import torch

    from mtraining.train.config import DistributedSection, ParallelSection
    from mtraining.train.mesh import Process

T = TypeVar("T")
DTYPES = ("auto", "bfloat16", "float32", "float64")
DEVICES = ("auto", "cpu", "cuda")

# Options that these commands share, each with its help.
Kernel = Annotated[str, typer.Option(help="Attention backend.")]
Nproc = Annotated[int | None, typer.Option(min=1, help="Start this many local processes.")]
Outer = Annotated[int, typer.Option(min=1, help="Rings of rings: groups that processes form.")]
Dtype = Annotated[
    str, typer.Option(help="bfloat16, float32 or float64; default: bfloat16 on a GPU, else float32.")
]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda.")]
Tokenizer = Annotated[
    str | None, typer.Option(help="A tokenizer folder or hub id; default: the model's own.")
]
RopeType = Annotated[str | None, typer.Option(help="Stretch the positions: yarn, linear or dynamic.")]
RopeFactor = Annotated[
    float | None, typer.Option(help="By so much; default: what the longest prompt and its answer need.")
]
RopeTheta = Annotated[float | None, typer.Option(help="Replace the rotary base.")]


@dataclass(frozen=True)
class Processes:
    """Which processes a command runs on; can be pickled.

    Attributes:
        world: how many; ``outer``: rings of rings that they form.
        dtype, device: as the options say, ``auto`` included.
    """

    world: int
    outer: int
    dtype: str
    device: str

    @contextmanager
    def grid(self) -> Iterator[Process]:
        """The process groups and the mesh, on every process. Collective."""
        from mtraining.train.config import DistributedSection, ParallelSection
        from mtraining.train.mesh import joined_processes

        @dataclass(frozen=True)
        class Here:
            parallel: ParallelSection
            distributed: DistributedSection

        here = Here(
            ParallelSection(cp=self.world, cp_outer=self.outer),
            DistributedSection.model_validate({"device": self.device}),
        )
        with joined_processes(here) as process:
            yield process

    @property
    def ring(self) -> tuple[int, int]:
        """(outer, inner)."""
        return self.outer, self.world // self.outer

    @property
    def predicted_dtype(self) -> torch.dtype:
        """Of the parameters where there is no device yet to ask: that of a GPU, unless the CPU was asked for."""
        import torch

        found: torch.dtype = getattr(
            torch, self.dtype_on(torch.device("cpu" if self.device == "cpu" else "cuda"))
        )
        return found

    @property
    def shown(self) -> str:
        """How many there are, for a title."""
        return f"{self.world} process{'es' if self.world > 1 else ''}"

    def dtype_on(self, device: torch.device) -> str:
        """Of the model's parameters: bfloat16 on a GPU and float32 elsewhere, unless it was said."""
        if self.dtype != "auto":
            return self.dtype
        return "bfloat16" if device.type == "cuda" else "float32"


def refuse_unknown(option: str, value: str, known: Sequence[str]) -> None:
    """
    Raises:
        UserError: ``value`` is none of those that the option knows.
    """
    if value not in known:
        raise UserError(f"--{option} {value} is not known; use {', '.join(known[:-1])} or {known[-1]}.")


def processes(nproc: int | None, outer: int, dtype: str, device: str) -> Processes:
    """The processes that options ask for.

    Raises:
        UserError: an option out of range, or ``--nproc`` under a launcher.
    """
    from mtraining.train.mesh import launched_world

    refuse_unknown("dtype", dtype, DTYPES)
    refuse_unknown("device", device, DEVICES)
    if nproc is not None and "RANK" in os.environ:
        raise UserError(
            "--nproc starts processes of its own; leave it out under torchrun or another launcher."
        )
    world = nproc or launched_world()
    if world % outer:
        raise UserError(f"--outer {outer} does not divide the {world} processes; use a divisor.")
    return Processes(world, outer, dtype, device)


def on_every(function: Callable[..., T], request: Any, world: int, remedy: str) -> T:
    """Call ``function(request)`` on every process: this one, those of a launcher, or local ones started here.

    Args:
        function: of a module, by name; request and result can be pickled.
        remedy: what to do when processes ended early, for the end of a sentence.
    """
    from mtraining.train.launch import as_launched, run_processes

    if "RANK" in os.environ:
        return as_launched(lambda: function(request), lambda: remedy)
    if world > 1:
        return run_processes(function, (request,), world, lambda: remedy)
    return function(request)


def rope_options(given: dict[str, Any]) -> Any:
    """The options of rotary scaling that were given, checked; None where none was."""
    from pydantic import ValidationError

    from mtraining.model import RopeOptions

    said = {name: value for name, value in given.items() if value is not None}
    if not said:
        return None
    try:
        return RopeOptions.model_validate(said)
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        where = problem["loc"][0]
        raise UserError(
            f"--rope-{where} {said[str(where)]}: {problem['msg']}; correct or remove it."
        ) from None
