"""Documents kept as rows: JSON (lines, or one array), .parquet and Hugging Face datasets.

Each row is a text, a conversation, or a list of token ids.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from mtraining.data.columns import (
    CHATS,
    Columns,
    choose_columns,
    kinds_of_row,
    kinds_of_schema,
    plain,
    unread,
)
from mtraining.data.conversation import read_messages, read_pair
from mtraining.data.files import DAMAGED, damage, open_file, suffixes
from mtraining.data.options import PrepareOptions
from mtraining.data.sources import EMPTY, UNREADABLE, Item, Note, Skipped, Source, files_signature
from mtraining.errors import UserError, first_line
from mtraining.inputs import hub

BAD_JSON = "not valid JSON"
NOT_OBJECT = "not a JSON object"
NO_COLUMN = "no text column"
NOT_TEXT = "text is not a string"
NO_IDS = "no column of token ids"
NOT_IDS = "token ids are not a list of whole numbers"


def json_source(path: Path, shown: str, options: PrepareOptions) -> Source:
    """The rows of a JSON file: one a line, named FILE:LINE (from 1), or, in a .json file, the items of one array, named
    FILE:ITEM (from 0), or one object that spans lines. The name column comes before these names.

    Lines are read one at a time; an array is read whole. Blank lines are not documents.
    """

    def items() -> Iterator[Item | Skipped]:
        columns: Columns | None = None
        try:
            for name, row in _json_rows(path, shown):
                if isinstance(row, Skipped):
                    yield row
                    continue
                if columns is None:  # the first row stands for all: a wrong option must not skip a whole file
                    kinds = kinds_of_row(row)
                    columns = choose_columns(str(path), kinds, options)
                    yield from column_notes(shown, columns, kinds)
                yield row_item(row, name, columns)
        except DAMAGED as error:
            if isinstance(error, UserError):
                raise
            yield Skipped(f"{shown}, its rest", damage(path))

    return Source(str(path), items, files_signature([path], path.parent))


def _json_rows(path: Path, shown: str) -> Iterator[tuple[str, dict[str, Any] | Skipped]]:
    """(name, row) of every row, or what is wrong in its place."""
    with open_file(path) as file:
        lines: Iterator[bytes] = iter(file)
        if suffixes(path)[0] == ".json":
            start = next((line for line in lines if line.strip()), b"")
            is_array = start.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"[")
            if is_array or not _is_row(start):
                data = start + file.read()
                whole = _parse(data)
                if is_array or isinstance(whole, dict):
                    yield from _whole_rows(whole, shown)
                    return
                # Lines after all, of which the first is bad.
                start, *rest = data.splitlines(keepends=True) or [b""]
                lines = iter(rest)
            lines = chain([start], lines)
        for number, line in enumerate(lines, start=1):
            if line.strip():
                name = f"{shown}:{number}"
                row = _parse(line)
                yield name, row if isinstance(row, dict) else Skipped(name, _no_row(row))


def _whole_rows(whole: Any, shown: str) -> Iterator[tuple[str, dict[str, Any] | Skipped]]:
    if not isinstance(whole, list):
        yield (shown, whole) if isinstance(whole, dict) else (shown, Skipped(shown, BAD_JSON))
        return
    for number, row in enumerate(whole):
        name = f"{shown}:{number}"
        yield name, row if isinstance(row, dict) else Skipped(name, NOT_OBJECT)


_BAD = object()


def _parse(data: bytes) -> Any:
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        return _BAD


def _is_row(line: bytes) -> bool:
    return isinstance(_parse(line), dict)


def _no_row(parsed: Any) -> str:
    return BAD_JSON if parsed is _BAD else NOT_OBJECT


def parquet_source(path: Path, shown: str, options: PrepareOptions) -> Source:
    """One document a row, named FILE:ROW (from 0) or by the name column; read one row group at a time."""
    import pyarrow
    import pyarrow.parquet

    def items() -> Iterator[Item | Skipped]:
        try:
            file = pyarrow.parquet.ParquetFile(path)
        except (pyarrow.ArrowException, OSError):
            yield Skipped(shown, f"{UNREADABLE} parquet")
            return
        with file:
            kinds = kinds_of_schema(file.schema_arrow)
            columns = choose_columns(str(path), kinds, options)
            yield from column_notes(shown, columns, kinds)
            start = 0
            for group in range(file.num_row_groups):
                size = file.metadata.row_group(group).num_rows
                try:
                    rows = _table_rows(file.read_row_group(group, columns=columns.all), columns)
                except (pyarrow.ArrowException, OSError, UnicodeDecodeError):
                    yield Skipped(f"{shown}:{start}-{start + size - 1}", f"{UNREADABLE} parquet row group")
                else:
                    for offset, row in enumerate(rows):
                        yield row_item(row, f"{shown}:{start + offset}", columns)
                start += size

    return Source(str(path), items, files_signature([path], path.parent))


def _table_rows(table: Any, columns: Columns) -> list[dict[str, Any]]:
    """The rows of a pyarrow table; token ids as arrays, since a list of Python's numbers takes ten times the memory."""
    if not columns.is_ids:
        rows: list[dict[str, Any]] = table.to_pylist()
        return [_plain_row(row, table.schema, decoded=False) for row in rows] if columns.is_chat else rows
    names = table.column(columns.name).to_pylist() if columns.name else [None] * table.num_rows
    return [
        {columns.content: _ids_of_scalar(scalar), **({columns.name: name} if columns.name else {})}
        for scalar, name in zip(table.column(columns.content), names, strict=True)
    ]


def _plain_row(row: dict[str, Any], schema: Any, *, decoded: bool) -> dict[str, Any]:
    return {name: plain(value, schema.field(name).type, decoded=decoded) for name, value in row.items()}


def _ids_of_scalar(scalar: Any) -> Any:
    values = scalar.values
    if values is None or values.null_count:
        return None
    return values.to_numpy(zero_copy_only=False)


def saved_dataset_source(path: Path, options: PrepareOptions) -> Source:
    """A folder written by `Dataset.save_to_disk` or `DatasetDict.save_to_disk`."""
    from datasets import DatasetDict, load_from_disk

    try:
        loaded = load_from_disk(str(path))
    except Exception as error:  # arrow, json and file errors alike
        raise UserError(
            f"source '{path}' is a damaged saved dataset ({first_line(error)}); save it again"
        ) from error
    if isinstance(loaded, DatasetDict):
        if options.split not in loaded:
            raise UserError(
                f"--split '{options.split}' is not in '{path}'; set it to one of {', '.join(loaded)}"
            )
        loaded = loaded[options.split]
    return _dataset_source(str(path), path.name, loaded, options)


def hub_dataset_source(name: str, options: PrepareOptions) -> Source:
    """A Hugging Face dataset id, or a local folder in the layout `datasets.load_dataset` reads."""
    from datasets import load_dataset

    hub.find(
        name,
        f"source '{name}'",
        "dataset",
        "give a file, a folder, a dataset's id, 'stdlib' or 'package:NAME'",
    )
    try:
        with hub.quiet():
            loaded = load_dataset(name, options.dataset_config, split=options.split)
    except Exception as error:  # the hub, the network and the dataset's own reader each raise their own kinds
        raise UserError(
            f"source '{name}' is neither an existing path nor a Hugging Face dataset that loads "
            f"({first_line(error)}); correct the path, or the id, --dataset-config and --split"
        ) from error
    return _dataset_source(name, name, loaded, options)


def _dataset_source(label: str, shown: str, dataset: Any, options: PrepareOptions) -> Source:
    schema = dataset.features.arrow_schema
    kinds = kinds_of_schema(schema)
    columns = choose_columns(label, kinds, options)
    narrow = dataset.select_columns(columns.all)

    def items() -> Iterator[Item | Skipped]:
        yield from column_notes(shown, columns, kinds)
        for number, row in enumerate(narrow):
            yield row_item(
                _plain_row(row, schema, decoded=True) if columns.is_chat else row,
                f"{shown}:{number}",
                columns,
            )

    described = f"{label}\0{options.split}\0{len(dataset)}\0{dataset.features}"
    return Source(label, items, hashlib.sha256(described.encode()).hexdigest(), len(dataset))


def column_notes(shown: str, columns: Columns, kinds: Mapping[str, str]) -> Iterator[Skipped]:
    """What is told of a whole source: columns that are left aside."""
    for note in unread(columns, kinds):
        yield Note(shown, note)


def row_item(row: dict[str, Any], place: str, columns: Columns) -> Item | Skipped:
    """The document of a row, named by its name column or by its place."""
    name = place
    if columns.name and row.get(columns.name) is not None:
        name = str(row[columns.name])
    if columns.is_chat:
        read = read_messages if columns.reads == CHATS else read_pair
        chat = read(row, columns.content)
        return Skipped(name, chat) if isinstance(chat, str) else Item(name, chat=chat)
    if columns.content not in row:
        return Skipped(name, NO_IDS if columns.is_ids else NO_COLUMN)
    content = row[columns.content]
    if not columns.is_ids:
        return Item(name, text=content) if isinstance(content, str) else Skipped(name, NOT_TEXT)
    ids = _as_ids(content)
    if ids is None:
        return Skipped(name, NOT_IDS)
    return Item(name, ids=ids) if ids.size else Skipped(name, EMPTY)


def _as_ids(content: Any) -> np.ndarray | None:
    """int64 (tokens,), or None where the content is anything but a flat list of whole numbers."""
    if isinstance(content, list):
        if not all(type(item) is int for item in content):
            return None
        try:
            return np.array(content, dtype=np.int64)
        except OverflowError:
            return None
    if isinstance(content, np.ndarray) and content.ndim == 1 and content.dtype.kind in "iu":
        return content.astype(np.int64)
    return None
