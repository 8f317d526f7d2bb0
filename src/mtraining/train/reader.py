"""Reading checkpoints without running anybody's code.

A checkpoint holds pickles: one that lists the tensors (`.metadata`), and small ones among the tensors. A pickle can
call any function of any installed package when it is read, so a checkpoint that somebody sent could do anything. Here a
pickle may name the few classes that such files are made of, and nothing else.
"""

from __future__ import annotations

import io
import pickle
import re
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import DefaultLoadPlanner, FileSystemReader
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.planner import ReadItem

from mtraining.errors import UserError, first_line

METADATA = ".metadata"
# Names as they stand in the file. Python 3.13 says where pathlib keeps its classes in other words.
ALLOWED = {
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},
    "torch": {"Size", *(str(kind)[6:] for kind in vars(torch).values() if isinstance(kind, torch.dtype))},
    "pathlib": {"Path", "PosixPath", "PurePosixPath", "WindowsPath", "PureWindowsPath"},
    "pathlib._local": {"Path", "PosixPath", "PurePosixPath", "WindowsPath", "PureWindowsPath"},
    "collections": {"OrderedDict"},
}


class _Refused(pickle.UnpicklingError):
    pass


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name not in ALLOWED.get(module, ()):
            raise _Refused(f"{module}.{name}")
        return super().find_class(module, name)


class SafeReader(FileSystemReader):
    """Reads a checkpoint folder; `read_metadata` raises `UserError` for what is no list of tensors, naming it."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        path = Path(self.path)
        try:
            with open(path / METADATA, "rb") as file:
                metadata = _Unpickler(file).load()
            if not isinstance(metadata, Metadata):
                raise pickle.UnpicklingError(f"it holds a {type(metadata).__name__}")
            files = {info.relative_path for info in metadata.storage_data.values()}
        except _Refused as refused:
            raise _foreign_code(path, METADATA, str(refused)) from None
        except Exception as error:  # whatever a damaged pickle makes of itself
            raise UserError(
                f"checkpoint {path} cannot be read: its {METADATA} is damaged ({type(error).__name__}: {error}); "
                "resume from another one."
            ) from None
        for name in files:
            if Path(name).name != name:
                raise UserError(
                    f"checkpoint {path} names a file outside its folder, {name}, so it was not read; use another one."
                )
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata

    def shapes_of(self, section: str) -> dict[str, torch.Tensor]:
        """Empty tensors like those that the checkpoint keeps under ``section``, to be loaded into."""
        stored = self.read_metadata().state_dict_metadata
        return {
            name.removeprefix(f"{section}."): torch.empty(meta.size, dtype=meta.properties.dtype)
            for name, meta in stored.items()
            if name.startswith(f"{section}.") and isinstance(meta, TensorStorageMetadata)
        }


class SafePlanner(DefaultLoadPlanner):
    """Plans loading as its base class does; what is no tensor is read as numbers and text, never as objects."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        # The base class reads with weights_only=False: it is given what has been read without, packed again.
        harmless = io.BytesIO()
        torch.save(torch.load(value, weights_only=True), harmless)
        harmless.seek(0)
        super().load_bytes(read_item, harmless)


def load(state: dict[str, Any], reader: SafeReader, group: Any = None) -> None:
    """Fill `state` from a checkpoint. Collective over `group`.

    Raises:
        UserError: naming what the checkpoint asks to run, or what cannot be read.
    """
    reader.read_metadata()  # dcp.load would hide what is wrong with it
    try:
        dcp.load(state, storage_reader=reader, planner=SafePlanner(), process_group=group)
    except CheckpointException as error:
        cause = next(iter(error.failures.values()))[0]
        # torch's own words advise to read it without protection.
        if isinstance(cause, pickle.UnpicklingError):
            named = re.search(r"GLOBAL (\S+)", str(cause))
            what = named[1] if named else "something that torch.load refuses"
            raise _foreign_code(Path(reader.path), "a tensor file", what) from None
        said = f"{type(cause).__name__}: {first_line(cause)}".rstrip(".")
        raise UserError(f"checkpoint {reader.path} cannot be read ({said}); use another one.") from None


def _foreign_code(checkpoint: Path, where: str, what: str) -> UserError:
    return UserError(
        f"checkpoint {checkpoint} asks to run {what} (in {where}), which no checkpoint needs, so it was not read; use "
        "one from a source that you trust."
    )
