"""What to attend: each pattern turns queries and keys into one sparse index. A new pattern is one file and
one entry here."""

from pathlib import Path

from mtraining.pattern.a_shape import AShape
from mtraining.pattern.base import Collective, Pattern, SequenceShard, build_from_table, options_of
from mtraining.pattern.dense import Dense
from mtraining.pattern.flexprefill import FlexPrefill
from mtraining.pattern.moba import MoBA
from mtraining.pattern.per_head import PerHead
from mtraining.pattern.table import read_table
from mtraining.pattern.toeplitz_random import ToeplitzRandom
from mtraining.pattern.union import Union
from mtraining.pattern.vertical_slash import VerticalSlash
from mtraining.pattern.xattention import XAttention

PATTERNS: dict[str, type[Pattern]] = {
    pattern.name: pattern
    for pattern in (
        VerticalSlash,
        Dense,
        ToeplitzRandom,
        AShape,
        MoBA,
        XAttention,
        FlexPrefill,
        Union,
    )
}


def build_pattern(name: str, **options: object) -> Pattern:
    """The pattern called ``name`` with its fields set from ``options``.

    Raises:
        UserError: unknown name or option (with the nearest one), or a value out of range.
    """
    return build_from_table(PATTERNS, name, options)


def load_table(path: str | Path, name: str = "vertical_slash", **options: object) -> list[Pattern]:
    """The pattern of every layer from a table of budgets by layer and head (see :mod:`mtraining.pattern.table`).

    Args:
        path: our own YAML or JSON, or the authors' MInference JSON.
        name, options: what the table's entries of this name start from; entries of others take its block size.

    Raises:
        UserError: a table that cannot be read, naming the layer and head at fault.
    """
    return read_table(path, PATTERNS, name, options)


__all__ = [
    "PATTERNS",
    "Collective",
    "Dense",
    "Pattern",
    "PerHead",
    "SequenceShard",
    "ToeplitzRandom",
    "VerticalSlash",
    "build_pattern",
    "load_table",
    "options_of",
]
