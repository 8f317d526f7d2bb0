"""Documents kept as rows: .jsonl, .parquet and Hugging Face datasets."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from mtraining.data.options import PrepareOptions
from mtraining.data.sources import UNREADABLE, Item, Skipped, Source, files_signature
from mtraining.errors import UserError, first_line, nearest

BAD_JSON = "not valid JSON"
NOT_OBJECT = "not a JSON object"
NO_COLUMN = "no text column"
NOT_TEXT = "text is not a string"


def jsonl_source(path: Path, options: PrepareOptions) -> Source:
    """One document a line, named FILE:LINE (from 1) or by the name column. Blank lines are not documents."""

    def items() -> Iterator[Item | Skipped]:
        checked = False
        with path.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                name = f"{path.name}:{number}"
                if not line.strip():
                    continue
                try:
                    row = json.loads(line)
                except (ValueError, RecursionError):
                    yield Skipped(name, BAD_JSON)
                    continue
                if not isinstance(row, dict):
                    yield Skipped(name, NOT_OBJECT)
                    continue
                if not checked:  # the first row stands for all: a wrong option must not skip a whole file
                    _check_columns(str(path), list(row), options)
                    checked = True
                yield _row_item(row, name, options)

    return Source(str(path), items, files_signature([path], path.parent))


def parquet_source(path: Path, options: PrepareOptions) -> Source:
    """One document a row, named FILE:ROW (from 0) or by the name column; read one row group at a time."""
    import pyarrow
    import pyarrow.parquet

    def items() -> Iterator[Item | Skipped]:
        try:
            file = pyarrow.parquet.ParquetFile(path)
        except (pyarrow.ArrowException, OSError):
            yield Skipped(path.name, f"{UNREADABLE} parquet")
            return
        with file:
            _check_columns(str(path), list(file.schema_arrow.names), options)
            start = 0
            for group in range(file.num_row_groups):
                size = file.metadata.row_group(group).num_rows
                try:
                    rows = file.read_row_group(group, columns=_columns(options)).to_pylist()
                except (pyarrow.ArrowException, OSError, UnicodeDecodeError):
                    yield Skipped(
                        f"{path.name}:{start}-{start + size - 1}", f"{UNREADABLE} parquet row group"
                    )
                else:
                    for offset, row in enumerate(rows):
                        yield _row_item(row, f"{path.name}:{start + offset}", options)
                start += size

    return Source(str(path), items, files_signature([path], path.parent))


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
                f"split '{options.split}' is not in '{path}'; set split to one of {', '.join(loaded)}"
            )
        loaded = loaded[options.split]
    return _dataset_source(str(path), path.name, loaded, options)


def hub_dataset_source(name: str, options: PrepareOptions) -> Source:
    """A Hugging Face dataset id, or a local folder in the layout `datasets.load_dataset` reads."""
    from datasets import load_dataset

    try:
        loaded = load_dataset(name, options.dataset_config, split=options.split)
    except Exception as error:  # the hub, the network and the dataset's own reader each raise their own kinds
        raise UserError(
            f"source '{name}' is neither an existing path nor a Hugging Face dataset that loads "
            f"({first_line(error)}); correct the path, or the id, dataset_config and split"
        ) from error
    return _dataset_source(name, name, loaded, options)


def _dataset_source(label: str, shown: str, dataset: Any, options: PrepareOptions) -> Source:
    _check_columns(label, list(dataset.column_names), options)
    narrow = dataset.select_columns(_columns(options))

    def items() -> Iterator[Item | Skipped]:
        for number, row in enumerate(narrow):
            yield _row_item(row, f"{shown}:{number}", options)

    described = f"{label}\0{options.split}\0{len(dataset)}\0{dataset.features}"
    return Source(label, items, hashlib.sha256(described.encode()).hexdigest(), len(dataset))


def _columns(options: PrepareOptions) -> list[str]:
    return [options.text_column, *([options.name_column] if options.name_column else [])]


def _check_columns(label: str, columns: Iterable[str], options: PrepareOptions) -> None:
    known = list(columns)
    for option in ("text_column", "name_column"):
        wanted = getattr(options, option)
        if wanted is not None and wanted not in known:
            near = nearest(wanted, known, 0.0)
            hint = (
                f"set it to '{near}' or another of {', '.join(known)}" if near else "the rows have no columns"
            )
            raise UserError(f"{option} '{wanted}' is not in '{label}'; {hint}")


def _row_item(row: dict[str, Any], place: str, options: PrepareOptions) -> Item | Skipped:
    name = place
    if options.name_column and row.get(options.name_column) is not None:
        name = str(row[options.name_column])
    if options.text_column not in row:
        return Skipped(name, NO_COLUMN)
    text = row[options.text_column]
    return Item(name, text=text) if isinstance(text, str) else Skipped(name, NOT_TEXT)
