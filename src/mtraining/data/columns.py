"""Which columns of rows are read: text, conversations, or token ids that another program made.

A wrong choice names a right one.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mtraining.data.conversation import COMPLETION, PROMPT, TEMPLATE_OPTIONS, TOOLS
from mtraining.data.options import DEFAULT_TEXT_COLUMN, PrepareOptions, flag
from mtraining.errors import UserError, nearest

IDS = "input_ids"
"""The column of token ids that is read where rows have no text; what Hugging Face tokenizers write."""

MESSAGES = "messages"
"""The column of conversations that is read where rows have no text; what chat datasets call it."""

TEXT, TOKENS, UNKNOWN, SCALARS = "text", "token ids", "nulls", "numbers, dates or truth values"
CHATS, PAIRS = "conversations", "prompts and completions"


@dataclass(frozen=True)
class Columns:
    """What of a row is read.

    Attributes:
        content: the column of text, token ids, messages or prompts.
        reads: which of these it is: TEXT, TOKENS, CHATS or PAIRS.
        name: the column with the document's name, if any.
        beside: columns that belong to a conversation: its completion, tools and options of the template.
    """

    content: str
    reads: str
    name: str | None
    beside: tuple[str, ...] = ()

    @property
    def is_ids(self) -> bool:
        """Whether the content is token ids."""
        return self.reads == TOKENS

    @property
    def is_chat(self) -> bool:
        """Whether the content is rendered by a chat template: messages, or prompts and completions."""
        return self.reads in (CHATS, PAIRS)

    @property
    def all(self) -> list[str]:
        """All of these columns, each once."""
        return list(dict.fromkeys([self.content, *self.beside, *([self.name] if self.name else [])]))


def choose_columns(label: str, kinds: Mapping[str, str], options: PrepareOptions) -> Columns:
    """The columns to read of rows that have these.

    Args:
        kinds: what each column holds, from :func:`kinds_of_row` or :func:`kinds_of_schema`.

    Raises:
        UserError: a column that is missing or holds something else, with those that would do.
    """
    name = options.name_column
    if name is not None and kinds.get(name) not in (TEXT, SCALARS, UNKNOWN):
        fitting = [column for column, kind in kinds.items() if kind in (TEXT, SCALARS)]
        raise UserError(_refusal("name_column", name, label, kinds, fitting, "names"))
    if options.ids_column is not None:
        if kinds.get(options.ids_column) not in (TOKENS, UNKNOWN):
            fitting = [column for column, kind in kinds.items() if kind == TOKENS]
            raise UserError(_refusal("ids_column", options.ids_column, label, kinds, fitting, TOKENS))
        return Columns(options.ids_column, TOKENS, name)
    if options.messages_column is not None and kinds.get(options.messages_column) in (TEXT, SCALARS, None):
        fitting = [column for column, kind in kinds.items() if kind == CHATS]
        raise UserError(_refusal("messages_column", options.messages_column, label, kinds, fitting, CHATS))
    column = options.text_column
    if column == DEFAULT_TEXT_COLUMN:
        chat = _chat_columns(kinds, options, name)
        # Which tokens to train on is asked of conversations only, so asking means that they are to be read.
        if chat is not None and (column not in kinds or options.reads_chats):
            return chat
        if column not in kinds and kinds.get(IDS) == TOKENS:
            return Columns(IDS, TOKENS, name)
    if kinds.get(column) not in (TEXT, UNKNOWN):
        fitting = [column for column, kind in kinds.items() if kind == TEXT]
        refusal = _refusal("text_column", column, label, kinds, fitting, TEXT)
        ids = [column for column, kind in kinds.items() if kind == TOKENS]
        if ids:
            refusal += f"; or read token ids by {flag('ids_column')} {ids[0]}"
        raise UserError(refusal)
    return Columns(column, TEXT, name)


def _chat_columns(kinds: Mapping[str, str], options: PrepareOptions, name: str | None) -> Columns | None:
    """The columns of conversations by name alone: a bad first row must not hide what the others hold."""
    beside = tuple(column for column in (TOOLS, TEMPLATE_OPTIONS) if column in kinds)
    column = options.messages_column or MESSAGES
    if column in kinds:
        return Columns(column, CHATS, name, beside)
    if PROMPT in kinds and COMPLETION in kinds:
        return Columns(PROMPT, PAIRS, name, (COMPLETION, *beside))
    return None


def unread(columns: Columns, kinds: Mapping[str, str]) -> list[str]:
    """What to say of columns that hold documents too and are left aside."""
    others = []
    if columns.reads == TEXT and kinds.get(MESSAGES) == CHATS and columns.content != MESSAGES:
        others.append(
            f"{MESSAGES} beside text, which is read; {flag('messages_column')} {MESSAGES} reads them"
        )
    if not columns.is_ids and kinds.get(IDS) == TOKENS:
        what = "text" if columns.reads == TEXT else columns.reads
        are = "is" if columns.reads == TEXT else "are"
        others.append(f"{IDS} beside {what}, which {are} read; {flag('ids_column')} {IDS} reads them")
    return others


def _refusal(
    option: str, wanted: str, label: str, kinds: Mapping[str, str], fitting: list[str], what: str
) -> str:
    fault = f"holds {kinds[wanted]}, not {what}" if wanted in kinds else "is not there"
    if not kinds:
        remedy = "the rows have no columns"
    elif fitting:
        near = nearest(wanted, fitting, 0.0) or fitting[0]
        others = [column for column in fitting if column != near]
        remedy = f"set it to '{near}'" + (f" or another of {', '.join(others)}" if others else "")
    else:
        have = ", ".join(f"{column} ({kind})" for column, kind in kinds.items())
        remedy = f"no column holds {what}: there are {have}"
    return f"{flag(option)}: '{wanted}' {fault} in '{label}'; {remedy}"


def kinds_of_row(row: Mapping[str, Any]) -> dict[str, str]:
    """What each value of a JSON row is."""
    return {str(column): _kind_of_value(value) for column, value in row.items()}


def _kind_of_value(value: Any) -> str:
    if isinstance(value, str):
        return TEXT
    if value is None:
        return UNKNOWN
    if isinstance(value, (bool, int, float)):
        return SCALARS
    if isinstance(value, list):
        if value and all(isinstance(item, dict) and "role" in item for item in value):
            return CHATS
        return TOKENS if all(type(item) is int for item in value) else "lists"
    return "mappings"


def kinds_of_schema(schema: Any) -> dict[str, str]:
    """What each column of a pyarrow schema holds."""
    return {field.name: _kind_of_type(field.type) for field in schema}


def _kind_of_type(kind: Any) -> str:
    from pyarrow import types

    if types.is_dictionary(kind):
        kind = kind.value_type
    if types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind):
        return TEXT
    if types.is_null(kind):
        return UNKNOWN
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        item = kind.value_type
        if types.is_struct(item) and item.get_field_index("role") >= 0:
            return CHATS
        return TOKENS if types.is_integer(item) else "lists"
    if types.is_struct(kind) or types.is_map(kind):
        return "mappings"
    return "bytes" if types.is_binary(kind) or types.is_large_binary(kind) else SCALARS


def plain(value: Any, kind: Any, *, decoded: bool) -> Any:
    """A value of a typed table as it was before it came there.

    A table gives every message the keys of all others, as nulls, which are left out again. What differs too much from
    row to row is kept as JSON text (``arrow.json``), in which a null is one that was written.

    Args:
        kind: its pyarrow type.
        decoded: whether such text has been read already, as `datasets` does.
    """
    from pyarrow import types

    if value is None:
        return None
    if getattr(kind, "extension_name", None) == "arrow.json":
        return value if decoded else json.loads(value)
    if types.is_struct(kind):
        return {
            field.name: plain(value[field.name], field.type, decoded=decoded)
            for field in kind
            if value.get(field.name) is not None
        }
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        return [plain(item, kind.value_type, decoded=decoded) for item in value]
    return value
