"""Tables that give each layer and head its pattern: our own YAML or JSON, and the authors' published MInference JSON.

Our own form names each choice once and then lists, for each layer, the choice of every head (or one for all):

    patterns:
      a: {name: vertical_slash, top_p: null, top_k_columns: 1000, slash_by: block, slash_density: 0.05}
      b: {name: dense}
    layers:
      - b                   # layer 0, all heads
      - [a, a, b, a]        # layer 1, head by head

MInference's form is a list with one mapping per layer, from the head's number to [pattern, verticals, slashes, score];
with `flex_vertical_and_slash`, which MTraining's own files have, verticals and slashes are [top_p, at most]:

    [{"0": ["vertical_and_slash", 1000, 6096, 0.9], "1": ["stream_llm", 100, 800, 0.9], ...},
     {"0": ["flex_vertical_and_slash", [0.95, 4096], [0.95, 4096], 0.0], ...}, ...]
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mtraining.errors import UserError
from mtraining.inputs.yaml_text import read_yaml
from mtraining.pattern.a_shape import AShape
from mtraining.pattern.base import Pattern, build_from_table, options_of
from mtraining.pattern.per_head import PerHead
from mtraining.pattern.vertical_slash import VerticalSlash


def read_table(
    path: str | Path, known: Mapping[str, type[Pattern]], name: str, options: Mapping[str, object]
) -> list[Pattern]:
    """The pattern of every layer, from a table file.

    Args:
        path: YAML or JSON, in either form.
        known: patterns by name.
        name, options: the pattern around the table: an entry of that name starts from these options, budgets left
            out (its probe, its sinks and so on), an entry of another name takes only its ``block_size``.

    Raises:
        UserError: a file that cannot be read, or an entry that names no pattern, naming layer and head.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"pattern.table: {path} cannot be read ({error}); give a table file.") from None
    # JSON is YAML.
    raw = read_yaml(text, f"pattern.table: {path}")
    table = _Table(path, known, name, options)
    layers = table.minference(raw) if isinstance(raw, list) else table.own(raw)
    if not layers:
        raise UserError(f"pattern.table: {path} has no layers; give one entry for each layer of the model.")
    return layers


# Budgets are the table's own: one left over from the section around it would clash with an entry's, or hide in it.
_BUDGET = (
    "top_p",
    "top_k_columns",
    "top_k_slashes",
    "max_columns",
    "max_slashes",
    "slash_by",
    "slash_density",
)


_MINFERENCE = ("vertical_and_slash", "flex_vertical_and_slash", "stream_llm")


class _Table:
    """One file being read."""

    def __init__(
        self, path: Path, known: Mapping[str, type[Pattern]], name: str, options: Mapping[str, object]
    ) -> None:
        self._path, self._known, self._name, self._options = path, known, name, options

    def own(self, raw: Any) -> list[Pattern]:
        if not isinstance(raw, Mapping) or not {"patterns", "layers"} <= set(raw):
            raise UserError(
                f"pattern.table: {self._path} has no 'patterns' and 'layers'; see docs/patterns/tables.md for the form."
            )
        extra = set(raw) - {"patterns", "layers", "about"}
        if extra:
            raise UserError(
                f"pattern.table: {self._path} has unknown keys {', '.join(sorted(map(str, extra)))}; it takes "
                "patterns, layers and about."
            )
        for key, kind, form in (("patterns", Mapping, "a mapping of names"), ("layers", list, "a list")):
            if not isinstance(raw[key], kind):
                raise UserError(
                    f"pattern.table: {self._path}, {key}: {raw[key]!r} is not {form}; see docs/patterns/tables.md."
                )
        choices = {}
        for key, entry in raw["patterns"].items():
            if not isinstance(entry, Mapping) or "name" not in entry:
                raise UserError(
                    f"pattern.table: {self._path}, patterns.{key}: {entry!r} is no pattern; give it a "
                    "name and its options."
                )
            given = dict(entry)
            choices[str(key)] = self._build(str(given.pop("name")), given, f"patterns.{key}")
        return [self._layer(number, entry, choices) for number, entry in enumerate(raw["layers"])]

    def _layer(self, number: int, entry: Any, choices: Mapping[str, Pattern]) -> Pattern:
        names = entry if isinstance(entry, list) else [entry]
        if not names:
            raise UserError(
                f"pattern.table: {self._path}, layer {number} has no heads; name a pattern for each."
            )
        for head, name in enumerate(names):
            if str(name) not in choices:
                raise UserError(
                    f"pattern.table: {self._path}, layer {number}, head {head}: {name!r} is not among patterns; "
                    f"choose one of {', '.join(choices)}."
                )
        if not isinstance(entry, list):
            return choices[str(entry)]
        try:
            return one_layer([choices[str(name)] for name in names])
        except UserError as error:
            raise UserError(f"pattern.table: {self._path}, layer {number}: {error}") from None

    def minference(self, raw: Sequence[Any]) -> list[Pattern]:
        layers = []
        for number, entry in enumerate(raw):
            numbers = {str(head) for head in range(len(entry))} if isinstance(entry, Mapping) else set()
            if not numbers or set(map(str, entry)) != numbers:
                raise UserError(
                    f"pattern.table: {self._path}, layer {number} is not a mapping of heads 0, 1, ... to "
                    "[pattern, verticals, slashes, score]; see docs/patterns/tables.md for the form."
                )
            by_head = {int(head): choice for head, choice in entry.items()}
            layers.append(
                one_layer(
                    [self._minference_head(number, head, by_head[head]) for head in range(len(by_head))]
                )
            )
        return layers

    def _minference_head(self, layer: int, head: int, choice: Any) -> Pattern:
        where = f"layer {layer}, head {head}"
        if not isinstance(choice, list) or len(choice) < 3:
            raise UserError(
                f"pattern.table: {self._path}, {where}: {choice!r} is not [pattern, verticals, slashes, score]."
            )
        kind, columns, slashes = choice[:3]
        if kind not in _MINFERENCE:
            raise UserError(
                f"pattern.table: {self._path}, {where}: {kind!r} is not supported; it takes {', '.join(_MINFERENCE)}: "
                "search this head again with mtraining calibrate."
            )
        shares: tuple[float | None, float | None] = (None, None)
        try:
            if kind == "flex_vertical_and_slash":
                shares, (columns, slashes) = zip(columns, slashes, strict=True)
            columns, slashes = int(columns), int(slashes)
        except (TypeError, ValueError):
            raise UserError(
                f"pattern.table: {self._path}, {where}: {choice!r} has no numbers of verticals and slashes "
                f"as {kind} has them; see docs/patterns/tables.md for the form."
            ) from None
        if shares[0] != shares[1]:
            raise UserError(
                f"pattern.table: {self._path}, {where}: a top_p of {shares[0]} for verticals and {shares[1]} for "
                "slashes; give both the same."
            )
        if kind == "stream_llm":
            return self._build(AShape.name, {"sinks": columns, "window": slashes}, where)
        base = build_from_table(self._known, VerticalSlash.name, self._shared(VerticalSlash.name))
        assert isinstance(base, VerticalSlash)
        # what is always kept counts towards a budget, and may exceed a small one
        columns, slashes = max(columns, base.sinks), max(slashes, base.window)
        if kind == "flex_vertical_and_slash":
            budget = {"top_p": shares[0], "max_columns": columns, "max_slashes": slashes}
        else:
            budget = {"top_p": None, "top_k_columns": columns, "top_k_slashes": slashes}
        return self._build(VerticalSlash.name, budget | {"slash_by": "token"}, where)

    def _shared(self, name: str) -> dict[str, object]:
        """What entries of a pattern start from."""
        if name == self._name:
            return {key: value for key, value in self._options.items() if key not in _BUDGET}
        return {key: value for key, value in self._options.items() if key == "block_size"}

    def _build(self, name: str, given: dict[str, Any], where: str) -> Pattern:
        try:
            return build_from_table(self._known, name, self._shared(name) | given)
        except UserError as error:
            raise UserError(f"pattern.table: {self._path}, {where}: {error}") from None


def one_layer(heads: Sequence[Pattern]) -> Pattern:
    """The pattern of a layer from those of its heads."""
    return PerHead(block_size=heads[0].block_size, heads=tuple(heads))


def describe(pattern: Pattern) -> dict[str, Any]:
    """A pattern as a table entry: its name and every option, so that it means the same under other defaults."""
    return {"name": pattern.name} | options_of(pattern)
