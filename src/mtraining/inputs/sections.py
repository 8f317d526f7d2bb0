"""Groups of options that a user writes, checked as they are read; every mistake in them is one sentence."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeVar, get_args, get_origin

from pydantic import BaseModel, ConfigDict, ValidationError

from mtraining.errors import UserError, nearest

if TYPE_CHECKING:
    from pydantic._internal._model_construction import ModelMetaclass as _ModelMetaclass
else:
    _ModelMetaclass = type(BaseModel)  # pydantic does not export it

Read = TypeVar("Read", bound=BaseModel)


class _Told(_ModelMetaclass):
    """A call of the class raises our sentence where pydantic would raise a report of several lines."""

    def __call__(cls, *args: Any, **values: Any) -> Any:
        try:
            return super().__call__(*args, **values)
        except ValidationError as error:
            raise UserError(sentence(error, cls, cls.__name__)) from None


class Section(BaseModel, metaclass=_Told):
    """A group of options: unknown keys are errors, values cannot change after reading.

    Raises:
        UserError: from a call with a value that does not fit, in one sentence.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, populate_by_name=True)


def read_section(kind: type[Read], raw: Mapping[str, Any], source: str) -> Read:
    """``raw`` as a section of this kind; `UserError` with one sentence that names the key and ``source``."""
    try:
        return kind.model_validate(raw)
    except ValidationError as error:
        raise UserError(sentence(error, kind, source)) from None


def sentence(error: ValidationError, kind: Any, source: str) -> str:
    """The first problem as one sentence; unknown keys come first, since they often cause the others."""
    problems = error.errors(include_url=False)
    problem = next((p for p in problems if p["type"] == "extra_forbidden"), problems[0])
    where = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        known = _known_keys(kind, problem["loc"][:-1])
        near = nearest(str(problem["loc"][-1]), known, 0.5)
        prefix = "".join(f"{part}." for part in problem["loc"][:-1])
        remedy = f"did you mean {prefix}{near}?" if near else f"known keys are {', '.join(known)}."
        return f"unknown key {where} in {source}; {remedy}"
    if problem["type"] == "missing":
        return f"{source} lacks the required key {where}."
    message = " ".join(problem["msg"].removeprefix("Value error, ").rstrip(".").split())
    if problem["type"] == "value_error":
        # Our own sentences name their option already.
        named = message.startswith(str(problem["loc"][0])) if len(problem["loc"]) == 1 else False
        return f"{message}." if named or not where else f"{where}: {message}."
    return f"{where}={problem['input']!r} in {source} is not valid: {message[0].lower()}{message[1:]}."


def _known_keys(kind: Any, location: tuple[int | str, ...]) -> list[str]:
    for part in location:
        if isinstance(part, int):  # of a list, whose entries are all of one kind
            continue
        field = kind.model_fields.get(part)
        kind = None if field is None else field.annotation
        if get_origin(kind) is tuple:
            kind = get_args(kind)[0]
        if not hasattr(kind, "model_fields"):
            return []
    return [field.alias or name for name, field in kind.model_fields.items()]
