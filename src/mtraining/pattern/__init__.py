"""What to attend: each pattern turns queries and keys into one sparse index. A new pattern is one file and
one entry here."""

from mtraining.pattern.base import Collective, Pattern, SequenceShard, build_from_table
from mtraining.pattern.dense import Dense
from mtraining.pattern.toeplitz_random import ToeplitzRandom
from mtraining.pattern.vertical_slash import VerticalSlash

PATTERNS: dict[str, type[Pattern]] = {
    pattern.name: pattern for pattern in (VerticalSlash, Dense, ToeplitzRandom)
}


def build_pattern(name: str, **options: object) -> Pattern:
    """The pattern called ``name`` with its fields set from ``options``.

    Raises:
        UserError: unknown name or option (with the nearest one), or a value out of range.
    """
    return build_from_table(PATTERNS, name, options)


__all__ = [
    "PATTERNS",
    "Collective",
    "Dense",
    "Pattern",
    "SequenceShard",
    "ToeplitzRandom",
    "VerticalSlash",
    "build_pattern",
]
