"""MDS folders, as ProLong is published: shards of rows beside an index.json, read through mosaicml-streaming.

That library declares versions of transformers and numpy that exclude those this package needs, and at its import it
loads torchvision for data sets of images. Neither concerns its reader of shards, which is all that is imported here.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from mtraining.data.columns import SCALARS, TEXT, TOKENS, UNKNOWN, choose_columns
from mtraining.data.options import PrepareOptions
from mtraining.data.rows import column_notes, row_item
from mtraining.data.sources import UNREADABLE, Item, Note, Skipped, Source, files_signature
from mtraining.errors import UserError, first_line
from mtraining.inputs import hub

INDEX = "index.json"
DOCUMENTS = "indices"
"""The column with where each document of a row of token ids begins and ends, int (documents, 2)."""

MASK = "mask"
BAD_BOUNDS = f"{DOCUMENTS} are not beginnings and ends within the row"
MASK_UNREAD = f"{MASK} beside token ids, which is not read: all tokens are trained"
_HOW = "run: pip install 'mtraining[mds]' and then pip install --no-deps mosaicml-streaming"


def mds_folders(path: Path) -> list[Path]:
    """The folders at or below a path that hold MDS shards, in the order of their names. Each is one domain."""
    if _is_mds(path):
        return [path]
    found = [Path(folder) for folder, _, names in os.walk(path) if INDEX in names]
    return sorted(folder for folder in found if _is_mds(folder))


def _is_mds(folder: Path) -> bool:
    shards = _index(folder)
    return bool(shards) and all(shard.get("format") == "mds" for shard in shards)


def _index(folder: Path) -> list[dict[str, Any]]:
    """What index.json says of each shard; nothing if it is not such a file."""
    try:
        shards = json.loads((folder / INDEX).read_text())["shards"]
    except (OSError, ValueError, KeyError, TypeError):
        return []
    return shards if isinstance(shards, list) and all(isinstance(shard, dict) for shard in shards) else []


def hub_folder(name: str) -> Path:
    """An MDS dataset of the hub, OWNER/NAME or OWNER/NAME/DOMAIN, downloaded into the hub's cache.

    Raises:
        UserError: the hub has none of that name, or cannot be reached.
    """
    from huggingface_hub import snapshot_download

    owner, _, rest = name.partition("/")
    repository, _, domain = rest.partition("/")
    repository = f"{owner}/{repository}" if repository else owner
    what, remedy = f"source '{name}'", "give a folder with MDS shards or a dataset's id"
    hub.find(repository, what, "dataset", remedy)
    try:
        with hub.quiet():
            local = snapshot_download(
                repository, repo_type="dataset", allow_patterns=[f"{domain}/*"] if domain else None
            )
    except Exception as error:  # the hub's, the network's and the disk's own kinds
        raise UserError(
            f"{what} cannot be had from the hub ({first_line(error)}); correct it, or {remedy}"
        ) from error
    return Path(local, domain)


def mds_source(folder: Path, shown: str, options: PrepareOptions) -> Source:
    """The rows of an MDS folder, named FOLDER:ROW (from 0), or FOLDER:ROW.DOCUMENT where rows hold several.

    Raises:
        UserError: mosaicml-streaming is not installed, the index is damaged, a column is a pickle, or none can be read.
    """
    readers = [_reader(folder, shard) for shard in _index(folder)]
    kinds = {
        name: _kind(encoding)
        for name, encoding in zip(readers[0].column_names, readers[0].column_encodings, strict=True)
    }
    columns = choose_columns(str(folder), kinds, options)

    def items() -> Iterator[Item | Skipped]:
        yield from column_notes(shown, columns, kinds)
        if columns.is_ids and MASK in kinds:
            yield Note(shown, MASK_UNREAD)
        row = 0
        for reader in readers:
            try:
                for sample in _samples(folder, reader):
                    place = f"{shown}:{row}"
                    if columns.is_ids and DOCUMENTS in sample:
                        yield from _documents(sample, columns.content, place, columns.name)
                    else:
                        yield row_item(sample, place, columns)
                    row += 1
            except UserError:
                raise
            except Exception:  # each compression and each encoding of a column raises its own kinds
                left = readers[: readers.index(reader) + 1]
                row, first = sum(r.samples for r in left), row
                yield Skipped(f"{shown}:{first}-{row - 1}", f"{UNREADABLE} MDS shard")

    def signature() -> str:
        files = [folder / INDEX, *(_stored(folder, reader) for reader in readers)]
        return files_signature([file for file in files if file.exists()], folder)

    has_documents = columns.is_ids and DOCUMENTS in kinds
    count = None if has_documents else sum(reader.samples for reader in readers)
    return Source(str(folder), items, signature(), count)


def _documents(
    sample: dict[str, Any], content: str, place: str, name_column: str | None
) -> Iterator[Item | Skipped]:
    """The documents of one row of token ids, which ProLong packs to a length."""
    ids, bounds = np.asarray(sample[content]), np.asarray(sample[DOCUMENTS]).astype(np.int64)
    name = str(sample[name_column]) if name_column else place
    inside = bounds.size == 0 or (bounds.min() >= 0 and bounds.max() <= ids.size)
    if bounds.ndim != 2 or bounds.shape[1] != 2 or not inside or (bounds[:, 0] >= bounds[:, 1]).any():
        yield Skipped(name, BAD_BOUNDS)
        return
    for number, (start, end) in enumerate(bounds.tolist()):
        whole = f"{name}.{number}" if len(bounds) > 1 else name
        yield Item(whole, ids=ids[start:end].astype(np.int64))


def _kind(encoding: str) -> str:
    """What a column of an MDS encoding holds."""
    if encoding == "str":
        return TEXT
    kind, _, dtype = encoding.partition(":")
    if kind == "ndarray":
        return "arrays" if dtype.startswith("float") else TOKENS
    if encoding == "json":
        return UNKNOWN
    return SCALARS if encoding.startswith(("int", "uint", "float", "str_")) else "bytes"


def _library(module: str) -> Any:
    """A module of mosaicml-streaming that needs nothing of torchvision."""
    if "streaming" not in sys.modules:
        spec = importlib.util.find_spec("streaming")
        if spec is None:
            raise UserError(f"MDS shards are read through mosaicml-streaming, which is not installed; {_HOW}")
        # The package itself is entered without running it: it would import its data sets of images.
        sys.modules["streaming"] = importlib.util.module_from_spec(spec)
    try:
        return importlib.import_module(f"streaming.base.{module}")
    except ImportError as error:
        raise UserError(f"mosaicml-streaming, which reads MDS shards, lacks {error.name}; {_HOW}") from error


def _reader(folder: Path, shard: dict[str, Any]) -> Any:
    """The library's reader of one shard."""
    library = _library("format")
    try:
        reader = library.reader_from_json(str(folder), None, shard)
        reader.validate(allow_unsafe_types=False)
    except (ValueError, KeyError, TypeError, AssertionError) as error:
        if "unsafe type" in str(error):
            raise UserError(
                f"source '{folder}' has a column of pickles, which can run code when they are read; write it again "
                "without"
            ) from None
        raise UserError(
            f"source '{folder}' has a damaged {INDEX} ({first_line(error)}); copy it again"
        ) from None
    return reader


def _stored(folder: Path, reader: Any) -> Path:
    return folder / (reader.zip_data or reader.raw_data).basename


def _samples(folder: Path, reader: Any) -> Iterator[dict[str, Any]]:
    """The rows of a shard. A compressed one is unpacked beside the system's temporary files, never into its folder."""
    if not reader.compression or (folder / reader.raw_data.basename).exists():
        yield from reader
        return
    data = _library("compression").decompress(reader.compression, _stored(folder, reader).read_bytes())
    if len(data) != reader.raw_data.bytes:
        raise ValueError(f"{len(data)} bytes")
    with tempfile.TemporaryDirectory(prefix="mtraining-mds-") as unpacked:
        file = Path(unpacked, reader.raw_data.basename)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data)
        reader.dirname = unpacked
        try:
            yield from reader
        finally:
            reader.dirname = str(folder)
