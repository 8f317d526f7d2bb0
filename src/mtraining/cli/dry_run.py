"""What commands with --dry-run print: a table of predicted memory, and whether a GPU has that much."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from mtraining.errors import UserError

if TYPE_CHECKING:
    from mtraining.predict.memory import Prediction

DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Only predict the memory of each GPU; refuse what cannot fit.")
]
MemoryGib = Annotated[
    float | None, typer.Option(min=0.1, help="Memory of a GPU for --dry-run; default: of the GPU here.")
]


def refuse_memory(memory_gib: float | None) -> None:
    """For a command that runs in earnest.

    Raises:
        UserError: a memory was given.
    """
    if memory_gib is not None:
        raise UserError("--memory-gib says what --dry-run has to fit into; add --dry-run, or leave it out.")


def show_memory(predictions: Sequence[tuple[str, Prediction]], memory_gib: float | None) -> None:
    """Print what each title's work takes of each GPU, by component. Needs no GPU.

    Raises:
        UserError: something does not fit into what was given, or into the GPU that is here.
    """
    import torch
    from rich.console import Console
    from rich.table import Table

    from mtraining.predict.memory import GIB, RUNS_SHORT
    from mtraining.sizes import size_text

    console = Console()
    for title, prediction in predictions:
        shown = Table("on each GPU", "memory", title=title)
        shown.columns[1].justify = "right"
        for name, size in prediction.table():
            shown.add_row(name, size_text(size), style="bold" if name.startswith(("peak", "needed")) else "")
        console.print(shown)
    memory = None if memory_gib is None else memory_gib * GIB
    if memory is None and torch.cuda.is_available():
        memory = torch.cuda.get_device_properties(0).total_memory
    if memory is None:
        console.print("no GPU here to compare with; --memory-gib says how much one has", soft_wrap=True)
        return
    for _, prediction in predictions:
        prediction.check(memory)
    tight = f", with little left: {RUNS_SHORT}" if any(one.wanted > memory for _, one in predictions) else ""
    console.print(f"fits into {size_text(memory)}{tight}", soft_wrap=True)
