"""`dense` or `sparse[:pattern...]`: what a command's --attention says about reading prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mtraining.errors import UserError
from mtraining.inputs.yaml_text import read_yaml
from mtraining.pattern import PATTERNS, Dense, Pattern, VerticalSlash, build_pattern, load_table

FORMS = "dense, sparse, sparse:PATTERN, sparse:PATTERN,option=value,... or sparse:TABLE, a file of mtraining calibrate"


@dataclass(frozen=True)
class AttentionChoice:
    """What was asked for.

    Attributes:
        text: as it was written; names the choice in tables.
        pattern: of all layers, or one for each; None is the model's own, if it was trained with one.
        layout: the one that balances it.
    """

    text: str
    pattern: Pattern | tuple[Pattern, ...] | None
    layout: str

    def by_layer(self, layers: int, own: Sequence[Pattern] | None = None) -> list[Pattern]:
        """One pattern a layer; ``own`` as :meth:`patterns` takes it."""
        found = self.patterns(own)
        return [found] * layers if isinstance(found, Pattern) else list(found)

    def patterns(self, own: Pattern | Sequence[Pattern] | None = None) -> Pattern | Sequence[Pattern]:
        """What `Generator` takes as its pattern; ``own``: what the model was trained with, None where unknown."""
        if self.pattern is not None:
            return self.pattern
        return VerticalSlash() if own is None else own


def parse_attention(text: str) -> AttentionChoice:
    """Read a choice.

    Raises:
        UserError: another form, an unknown pattern or option, or a table that cannot be read.
    """
    kind, colon, rest = text.partition(":")
    if kind == "dense" and not colon:
        return AttentionChoice(text, Dense(), "zigzag")
    if kind != "sparse" or (colon and not rest):
        raise UserError(f"--attention {text!r} is not known; use {FORMS}.")
    if not rest:
        return AttentionChoice(text, None, "striped")
    name, *pairs = rest.split(",")
    options: dict[str, Any] = dict(_option(text, pair) for pair in pairs)
    if name not in PATTERNS and Path(name).suffix in (".yaml", ".yml", ".json"):
        return AttentionChoice(text, tuple(load_table(name, **options)), "striped")
    return AttentionChoice(text, build_pattern(name, **options), "striped")


def _option(text: str, pair: str) -> tuple[str, object]:
    key, equals, value = pair.partition("=")
    if not equals or not key:
        raise UserError(
            f"--attention {text!r}: {pair!r} is no option; write option=value, such as top_p=0.9."
        )
    return key, read_yaml(value, f"--attention {text!r}: the value of {key}")
