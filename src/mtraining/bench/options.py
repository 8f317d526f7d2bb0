"""The options of every benchmark, in one place: `mtraining bench` and `python -m mtraining.bench.*` are made from them.

Each benchmark's options are a dataclass. A field's name is the option's, its type says what is accepted, its default
and its help are what the command line shows. A field that is a tuple is an option that may be repeated.

This module loads nothing heavy, so that help is shown quickly.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from types import NoneType
from typing import Any, NamedTuple, TypeVar, get_args, get_origin, get_type_hints

CSV_FOLDER = Path("benchmarks/results")
T = TypeVar("T")


class Option(NamedTuple):
    """One option: ``kind`` is str, int, float, bool or Path; bool stands for a pair of switches."""

    name: str
    kind: type
    default: Any
    help: str
    repeated: bool


def _help(text: str) -> dict[str, str]:
    return {"help": text}


_DEVICE = "cuda or cpu; default: cuda where there is one."
_NPROC = "Processes; default: one a GPU, two on a CPU."
_OUT = "Folder of the CSV."


@dataclass(frozen=True)
class AttentionOptions:
    """Of `mtraining bench attention`. Empty stands for what suits the machine."""

    preset: str = field(
        default="", metadata=_help("targets, quick, growth, dense or tiny; default: targets, on a CPU tiny.")
    )
    backend: tuple[str, ...] = field(default=(), metadata=_help("Kernel to time; may be repeated."))
    device: str = field(default="", metadata=_help(_DEVICE))
    max_seq_len: int | None = field(default=None, metadata=_help("Leave longer sequences out."))
    documents: int = field(
        default=0,
        metadata=_help("Pack so many documents of random lengths into each sequence; 0 for none."),
    )
    window: int | None = field(default=None, metadata=_help("Tokens of a sliding window."))
    dense: tuple[str, ...] = field(
        default=(),
        metadata=_help(
            "Dense kernel to time (fa4, cudnn, fa2, flex, math, or none); may be repeated; default: all that can run."
        ),
    )
    out: Path = field(default=CSV_FOLDER, metadata=_help(_OUT))
    warm_up: float = field(
        default=2.0,
        metadata=_help(
            "Seconds of the same work before each timing; under 0.1 for the clocks of a GPU that comes from idling."
        ),
    )


@dataclass(frozen=True)
class DecodeOptions:
    """Of `mtraining bench decode`."""

    preset: str = field(default="", metadata=_help("targets or tiny; default: targets, on a CPU tiny."))
    dtype: str = field(default="bf16", metadata=_help("bf16, fp16 or fp32."))
    device: str = field(default="", metadata=_help(_DEVICE))
    out: Path = field(default=CSV_FOLDER, metadata=_help(_OUT))


@dataclass(frozen=True)
class RatesOptions:
    """Of `mtraining bench rates`."""

    head_dim: tuple[int, ...] = field(
        default=(), metadata=_help("Of attention; may be repeated; default: 128.")
    )
    seconds: float = field(default=0.5, metadata=_help("Of repetitions of each timing."))
    device: str = field(default="", metadata=_help(_DEVICE))
    nproc: int | None = field(default=None, metadata=_help(_NPROC))
    out: Path | None = field(
        default=None,
        metadata=_help("File to write; default: where mtraining plan and train look for this GPU's."),
    )


@dataclass(frozen=True)
class RingOptions:
    """Of `mtraining bench ring`."""

    device: str = field(default="", metadata=_help(_DEVICE))
    nproc: int | None = field(default=None, metadata=_help(_NPROC))
    out: Path = field(default=CSV_FOLDER, metadata=_help(_OUT))


@dataclass(frozen=True)
class TilesOptions:
    """Of `mtraining bench tiles`."""

    head_dim: tuple[int, ...] = field(
        default=(), metadata=_help("64, 96, 128 or 256; may be repeated; default: all.")
    )
    dtype: tuple[str, ...] = field(
        default=(), metadata=_help("bf16, fp16 or fp32; may be repeated; default: bf16.")
    )
    block_size: int | None = field(default=None, metadata=_help("Of the pattern, in tokens; default: 128."))
    seq_len: int | None = field(default=None, metadata=_help("Tokens of what is timed; default: 32768."))


@dataclass(frozen=True)
class TrainOptions:
    """Of `mtraining bench train`. None and empty stand for the preset's values.

    Every length and recompute policy is measured. Of densities, layouts and rings the first value is the base, and
    each further one varies alone.
    """

    preset: str = field(default="", metadata=_help("table or tiny; default: table, on a CPU tiny."))
    model: str = field(default="", metadata=_help("Shape of the model: qwen2.5-3b or tiny."))
    seq_len: tuple[str, ...] = field(
        default=(), metadata=_help("Tokens a sequence, such as 512K; may be repeated.")
    )
    density: tuple[float, ...] = field(
        default=(), metadata=_help("Computed share of attention, such as 0.05; may be repeated.")
    )
    layout: tuple[str, ...] = field(
        default=(), metadata=_help("striped, zigzag or contiguous; may be repeated.")
    )
    ring: tuple[str, ...] = field(
        default=(), metadata=_help("flat, or OUTERxINNER such as 2x2; may be repeated.")
    )
    recompute: tuple[str, ...] = field(
        default=(), metadata=_help("auto, full, keep_attention or none; may be repeated.")
    )
    layers: int | None = field(
        default=None, metadata=_help("Decoder layers, of both sides; default: the model's own.")
    )
    dense: bool | None = field(
        default=None, metadata=_help("Time the dense step too, which sparse ones are compared with.")
    )
    kernel: str = field(default="", metadata=_help("Attention backend of sparse steps."))
    dense_kernel: str = field(default="", metadata=_help("Attention backend of dense steps."))
    fused: str = field(default="", metadata=_help("What surrounds attention: none, compile or liger."))
    float8: str = field(
        default="", metadata=_help("Products of sparse and dense steps: off, rowwise or tensorwise.")
    )
    optimizer_state: str = field(default="", metadata=_help("AdamW's moments: full, 8bit or offload."))
    offload: bool | None = field(default=None, metadata=_help("Keep activations in host memory."))
    warmup: int = field(default=1, metadata=_help("Steps before the timed ones."))
    steps: int = field(default=5, metadata=_help("Timed steps at most; the median counts."))
    seconds: float = field(
        default=60.0, metadata=_help("Time fewer steps, at least one, where they would take longer.")
    )
    device: str = field(default="", metadata=_help(_DEVICE))
    nproc: int | None = field(default=None, metadata=_help(_NPROC))
    out: Path = field(default=CSV_FOLDER, metadata=_help(_OUT))
    chart: Path | None = field(default=None, metadata=_help("Draw the result into this SVG file."))


def options_of(kind: type) -> Iterator[Option]:
    """The options of a dataclass of this module."""
    hints = get_type_hints(kind)
    for one in fields(kind):
        assert one.default is not MISSING
        hint = hints[one.name]
        repeated = get_origin(hint) is tuple
        inner = next(part for part in get_args(hint) or (hint,) if part is not NoneType)
        yield Option(one.name, inner, one.default, one.metadata["help"], repeated)


def parse(
    kind: type[T], prog: str, description: str | None, argv: Sequence[str] | None, *internal: str
) -> tuple[T, dict[str, str]]:
    """Options from a command line, without the packages of `mtraining`'s own.

    Args:
        internal: names of further options, left out of the help: what a launcher tells the processes that it starts.

    Returns:
        the options, and the values of the internal ones ("" where not given).
    """
    parser = argparse.ArgumentParser(prog=prog, description=description)
    for option in options_of(kind):
        settings: dict[str, Any] = {"default": option.default, "help": option.help}
        if option.kind is bool:
            settings["action"] = argparse.BooleanOptionalAction
        else:
            settings["type"] = option.kind
        if option.repeated:
            settings |= {"action": "append", "default": []}
        parser.add_argument(_flag(option.name), **settings)
    for name in internal:
        parser.add_argument(_flag(name), default="", help=argparse.SUPPRESS)
    given = vars(parser.parse_args(argv))
    told = {name: given.pop(name) for name in internal}
    return kind(**{name: tuple(x) if isinstance(x, list) else x for name, x in given.items()}), told


def arguments(options: Any) -> list[str]:
    """The command line that :func:`parse` makes into these options."""
    words: list[str] = []
    for option in options_of(type(options)):
        value = getattr(options, option.name)
        if value == option.default:
            continue
        if option.kind is bool:
            words.append(_flag(option.name if value else f"no_{option.name}"))
        else:
            values = value if option.repeated else (value,)
            words += [f"{_flag(option.name)}={each}" for each in values]
    return words


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"
