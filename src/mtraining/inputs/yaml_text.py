"""YAML as every file and option here is read: a key given twice is an error, and 1e6 is a number.

YAML 1.1, which PyYAML follows, keeps the last of two equal keys without a word, and takes ``1e6`` for text.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

from mtraining.errors import UserError

_FLOAT, _MERGE = "tag:yaml.org,2002:float", "tag:yaml.org,2002:merge"
# The numbers of YAML 1.2 that have an exponent. PyYAML knows those with both a point and a sign (1.5e+6).
_EXPONENT = re.compile(r"[-+]?(\.[0-9]+|[0-9][0-9_]*(\.[0-9]*)?)[eE][-+]?[0-9]+$")


class _Loader(yaml.SafeLoader):
    """SafeLoader with numbers such as 1e6."""


class _Dumper(yaml.SafeDumper):
    """SafeDumper that puts quotes around text that `_Loader` would take for a number."""


for _kind in (_Loader, _Dumper):
    _kind.add_implicit_resolver(_FLOAT, _EXPONENT, list("-+.0123456789"))


def read_yaml(text: str, source: str) -> Any:
    """The value of a YAML (or JSON) text; None for an empty one.

    Args:
        source: names the text in messages, such as ``configuration file PATH``.

    Raises:
        UserError: malformed text, or a key that stands twice in one mapping, with both lines.
    """
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        _refuse_repeated_keys(loader, node, "", source, set())
        return loader.construct_document(node)
    except UserError:
        raise
    # A date such as 2024-13-01 is a ValueError, brackets in brackets without end a RecursionError.
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"{source} is not valid YAML: {' '.join(str(error).split())}.") from None
    finally:
        loader.dispose()


def write_yaml(value: Any, **style: Any) -> str:
    """YAML that `read_yaml` reads back to an equal value; keys keep their order. ``style`` goes to `yaml.dump`."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, **style)


def _refuse_repeated_keys(loader: _Loader, node: Any, where: str, source: str, seen: set[int]) -> None:
    """Walk the nodes below ``node``, whose own key is ``where``; ``seen`` ends the walk where aliases meet."""
    if id(node) in seen:
        return
    seen.add(id(node))
    if isinstance(node, yaml.SequenceNode):
        for number, item in enumerate(node.value):
            _refuse_repeated_keys(loader, item, f"{where}.{number}" if where else str(number), source, seen)
    if not isinstance(node, yaml.MappingNode):
        return
    lines: dict[Any, int] = {}
    for key_node, value in node.value:
        name = f"{where}.{key_node.value}" if where else str(key_node.value)
        # A merge (<<) may be repeated, and what it brings may be overridden: that is what it is for.
        if isinstance(key_node, yaml.ScalarNode) and key_node.tag != _MERGE:
            key, line = loader.construct_object(key_node), key_node.start_mark.line + 1
            if key in lines:
                at = f"in lines {lines[key]} and {line}" if lines[key] != line else f"in line {line}"
                raise UserError(f"{source}: the key {name} stands twice, {at}; keep one of them.")
            lines[key] = line
        _refuse_repeated_keys(loader, value, name, source, seen)
