"""A digest of every file of a checkpoint: taken by the rank that writes the file, on its way to the disk, and compared
before the checkpoint is used.

xxh3 (128 bits) finds any accidental change, and takes a small part of the time that writing or reading takes. It is no
signature: whoever can change a file can change the manifest as well.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.futures import Future

from mtraining.train.store import FileRecord

CHUNK = 8 << 20


@dataclass(frozen=True)
class _Written:
    """One file of one rank; it travels to the main rank among the results of the save."""

    name: str
    record: FileRecord


class DigestWriter(FileSystemWriter):
    """Writes a checkpoint as its base class does. Afterwards `files` of the main rank says what all ranks wrote."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, sync_files=True)
        self.files: dict[str, FileRecord] = {}
        self._written: dict[str, FileRecord] = {}
        self.fs = _DigestFiles(self._written)

    def write_data(self, *args: Any) -> Future[list[Any]]:
        results = super().write_data(*args).value()
        done: Future[list[Any]] = Future()
        done.set_result([*results, *(_Written(*item) for item in self._written.items())])
        return done

    def finish(self, metadata: Any, results: list[list[Any]]) -> None:
        self._written.clear()
        super().finish(
            metadata, [[item for item in rank if not isinstance(item, _Written)] for rank in results]
        )
        # The metadata file, which only this rank writes, has its final name by now.
        own = {name.removesuffix(".tmp"): record for name, record in self._written.items()}
        told = {item.name: item.record for rank in results for item in rank if isinstance(item, _Written)}
        self.files = told | own


class _DigestFiles(FileSystem):
    def __init__(self, written: dict[str, FileRecord]) -> None:
        self._written = written

    @contextmanager
    def create_stream(self, path: Any, mode: str) -> Generator[Any, None, None]:
        with super().create_stream(path, mode) as stream:
            digesting = _DigestStream(stream)
            yield digesting
        self._written[Path(path).name] = digesting.record()


class _DigestStream:
    """A file open for writing that takes the digest of what goes through it."""

    def __init__(self, stream: Any) -> None:
        self._stream, self._digest, self._bytes = stream, xxhash.xxh3_128(), 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, data: Any) -> int:
        self._digest.update(data)
        count: int = self._stream.write(data)
        self._bytes += count
        return count

    def record(self) -> FileRecord:
        return FileRecord(self._bytes, self._digest.hexdigest())


def digest_of(file: Path) -> str:
    """The digest of a file on the disk."""
    digest, buffer = xxhash.xxh3_128(), bytearray(CHUNK)
    view = memoryview(buffer)
    with open(file, "rb", buffering=0) as stream:
        while count := stream.readinto(buffer):
            digest.update(view[:count])
    return digest.hexdigest()


def share(files: Mapping[str, FileRecord], rank: int, world: int) -> list[str]:
    """The files that one of `world` ranks looks at: together all of them, each about as many bytes."""
    loads = [0] * world
    mine = []
    for name in sorted(files, key=lambda name: (-files[name].bytes, name)):
        least = loads.index(min(loads))
        loads[least] += files[name].bytes
        if least == rank:
            mine.append(name)
    return mine


def damage(checkpoint: Path, files: Mapping[str, FileRecord], names: list[str]) -> str | None:
    """What is wrong with the content of the files `names` of a checkpoint, or None. `files` says what they must be."""
    for name in names:
        expected = files[name].digest
        try:
            if expected and digest_of(checkpoint / name) != expected:
                return f"{name} is not what was written"
        except OSError as error:
            return f"{name} cannot be read: {error.strerror}"
    return None
