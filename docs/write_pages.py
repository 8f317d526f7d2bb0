"""Write the pages that code makes: `python docs/write_pages.py`. `make docs` does it first.

docs/reference/configuration.md comes from the sections of `mtraining.train.config`, and the options of every pattern.
Types and defaults are those of the code; meanings are read from the docstring of the class that has the option.
"""

from __future__ import annotations

import inspect
import json
import re
import typing
from dataclasses import MISSING, fields
from pathlib import Path
from types import NoneType
from typing import Any

from pydantic import BaseModel

from mtraining.pattern import PATTERNS, Pattern
from mtraining.train.config import Config

HERE = Path(__file__).parent
PAGE = HERE / "reference" / "configuration.md"

HEAD = """\
# Configuration

*This page is written by `docs/write_pages.py` from the code.*

A run is one YAML file of sections. `mtraining train FILE` reads it, and `--set section.key=value` overrides one option.
An unknown option is refused, with the nearest name. `config.yaml` in the run's folder holds every option.

```yaml
output: runs/first
model: {init: random, config: {model_type: qwen2, vocab_size: 260}}
data: {path: data/code}
pattern: {name: vertical_slash, slash_by: block}
train: {seq_len: 2048, steps: 4}
```

`pattern: moba` is short for `pattern: {name: moba}`, and `layout: zigzag` for `layout: {name: zigzag}`.
"""
PATTERN_HEAD = """\
## Patterns

Options of each pattern; they stand beside `pattern.name`. [Patterns](../patterns/index.md) explains them.
"""


def meanings(owner: type) -> dict[str, str]:
    """What the docstrings of a class and its bases say of each option: lines `name: meaning`, or `a, b: meaning`."""
    found: dict[str, str] = {}
    for one in reversed(owner.__mro__):
        names: list[str] = []
        for line in inspect.cleandoc(one.__dict__.get("__doc__") or "").splitlines():
            start = re.match(r"\s*([a-z_]\w*(?:, [a-z_]\w*)*): (.*)$", line)
            if start:
                names = start[1].split(", ")
                found |= dict.fromkeys(names, start[2].strip())
            elif line.strip() and names:
                found |= {name: f"{found[name]} {line.strip()}" for name in names}
            else:
                names = []
    return {name: text.replace("``", "`") for name, text in found.items()}


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _value(value: Any) -> str:
    if isinstance(value, BaseModel):
        return ""
    return f"`{json.dumps(value)}`" if not isinstance(value, str) else f"`{value}`"


def _kind(schema: dict[str, Any]) -> str:
    """A JSON schema of one value, in words."""
    if "anyOf" in schema:
        return " or ".join(dict.fromkeys(_kind(one) for one in schema["anyOf"]))
    if "const" in schema:
        return f"`{schema['const']}`"
    if "enum" in schema:
        return ", ".join(f"`{choice}`" for choice in schema["enum"])
    kind = schema.get("type")
    if kind in ("integer", "number"):
        word = "whole number" if kind == "integer" else "number"
        for key, sign in (("exclusiveMinimum", ">"), ("minimum", "≥"), ("maximum", "≤")):
            word += f" {sign} {schema[key]:g}" if key in schema else ""
        return word
    if kind == "array":
        return "list"
    if kind == "string" and schema.get("format") == "path":
        return "path"
    return {"string": "word", "boolean": "true or false", "null": "null", "object": "mapping"}.get(
        str(kind), "any"
    )


def _table(lines: list[tuple[str, str, str, str]]) -> str:
    rows = ["| option | type | default | meaning |", "|---|---|---|---|"]
    return "\n".join([*rows, *(f"| `{a}` | {_cell(b)} | {_cell(c)} | {_cell(d)} |" for a, b, c, d in lines)])


def options_of(model: type[BaseModel]) -> list[tuple[str, str, str, str]]:
    """Name, type, default and meaning of each option of a section, but for those that are sections themselves."""
    schema, said, found = model.model_json_schema(by_alias=True), meanings(model), []
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            continue
        shown = field.alias or name
        if field.is_required():
            default = "required"
        else:
            value = schema["properties"][shown].get("default")
            default = _value({} if value is None and field.default_factory is not None else value)
        found.append((shown, _kind(schema["properties"][shown]), default, said.get(shown, "")))
    return found


def pattern_options(pattern: type[Pattern]) -> list[tuple[str, str, str, str]]:
    """The same of a pattern: its fields."""
    kinds, said, found = typing.get_type_hints(pattern), meanings(pattern), []
    words = {int: "whole number", float: "number", bool: "true or false", str: "word", NoneType: "null"}
    for field in fields(pattern):
        args = typing.get_args(kinds[field.name]) or (kinds[field.name],)
        kind = " or ".join(words[one] for one in args) if set(args) <= set(words) else "list"
        default = "required" if field.default is MISSING else _value(field.default)
        found.append((field.name, kind, default, said.get(field.name, "")))
    return found


def sections(model: type[BaseModel] = Config, path: str = "") -> list[tuple[str, type[BaseModel]]]:
    """Every section by its dotted name, outer ones first; entries of a list end in []."""
    found = [(path, model)]
    for name, field in model.model_fields.items():
        inner, shown = field.annotation, f"{path}.{name}".lstrip(".")
        if typing.get_origin(inner) is tuple:
            inner, shown = typing.get_args(inner)[0], f"{shown}[]"
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            found += sections(inner, shown)
    return found


def configuration_page() -> str:
    """docs/reference/configuration.md."""
    parts = [HEAD]
    for path, model in sections():
        summary = inspect.cleandoc(model.__doc__ or "").split("\n\n")[0].replace("``", "`")
        title = f"## `{path}`" if path else "## The whole run"
        parts.append(f"{title}\n\n{summary}\n\n{_table(options_of(model))}\n")
    parts.append(PATTERN_HEAD)
    for name, pattern in PATTERNS.items():
        parts.append(f"### `{name}`\n\n{_table(pattern_options(pattern))}\n")
    return "\n".join(parts)


PAGES = {PAGE: configuration_page}

if __name__ == "__main__":
    for page, make in PAGES.items():
        page.write_text(make(), encoding="utf-8")
        print(f"wrote {page}")
