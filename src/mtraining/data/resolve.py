"""From the words of `sources` to the streams they mean."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

from mtraining.data.code import code_source, is_code, package_source, stdlib_source
from mtraining.data.files import COMPRESSIONS, ROWS, TEXT, kind_of, suffixes, walk
from mtraining.data.mds import hub_folder, mds_folders, mds_source
from mtraining.data.options import PrepareOptions
from mtraining.data.rows import hub_dataset_source, json_source, parquet_source, saved_dataset_source
from mtraining.data.sources import Item, Skipped, Source, files_signature
from mtraining.errors import UserError

NO_KIND = "no suffix that is read"
OTHER_KIND = "not of --kind"
BESIDE_MDS = "beside folders of MDS shards"
ABOUT = "about the folder, beside rows"
_SUFFIXES = {
    "text": TEXT,
    **{kind: tuple(s for s, k in ROWS.items() if k == kind) for kind in set(ROWS.values())},
}


def resolve_sources(options: PrepareOptions) -> list[Source]:
    """The streams of every source, in order. UserError names a source that does not exist or cannot be understood."""
    streams = [stream for name in options.sources for stream in _resolve(name, options)]
    return [_thinned(stream, options.every) for stream in streams] if options.every else streams


def _thinned(source: Source, every: int) -> Source:
    """A source of the first of each `every` documents; what is no document is told as before."""

    def items() -> Iterator[Item | Skipped]:
        number = 0
        for entry in source.items():
            if isinstance(entry, Item):
                number += 1
                if (number - 1) % every:
                    continue
            yield entry

    return replace(source, items=items, count=None if source.count is None else -(-source.count // every))


def _resolve(name: str, options: PrepareOptions) -> list[Source]:
    if name == "stdlib":
        return [stdlib_source(group_by=options.group_by, extensions=options.extensions)]
    if name.startswith("package:"):
        package = name.removeprefix("package:")
        return [package_source(package, group_by=options.group_by, extensions=options.extensions)]
    path = Path(name)
    if path.is_file():
        kind = options.kind if options.kind != "auto" else kind_of(path) or _code_kind(path)
        return [_file_source(path, kind, path.name, options)]
    if path.is_dir():
        return _resolve_folder(path, options)
    # "org/name" could be a mistyped path too; these shapes can only be one.
    if options.kind in ("text", "jsonl", "parquet", "code") or kind_of(path) or name[:1] in "./~":
        raise UserError(f"source '{name}' does not exist; correct the path")
    if options.kind == "mds":
        return _mds_sources(hub_folder(name), name, options)
    return [hub_dataset_source(name, options)]


def _code_kind(path: Path) -> str:
    if is_code(path, None):
        return "code"
    suffix, compression = suffixes(path)
    if ROWS.get(suffix) == "parquet" and compression:
        raise UserError(f"source '{path}' is compressed as a whole; decompress it: parquet compresses itself")
    fault = f"has suffix '{suffix}', which names no kind" if suffix else "has no suffix to name its kind"
    raise UserError(f"source '{path}' {fault}; set --kind")


def _file_source(path: Path, kind: str, shown: str, options: PrepareOptions) -> Source:
    if kind == "jsonl":
        return json_source(path, shown, options)
    if kind == "parquet":
        return parquet_source(path, shown, options)
    if kind in ("dataset", "mds"):
        raise UserError(
            f"source '{path}' is a file, but --kind is '{kind}'; set --kind to auto, or name a dataset folder"
        )
    item = Item(shown, files=((shown if kind == "code" else "", path),))
    return Source(str(path), lambda: iter([item]), files_signature([path], path.parent), 1)


def _resolve_folder(path: Path, options: PrepareOptions) -> list[Source]:
    if options.kind == "mds" or (options.kind == "auto" and mds_folders(path)):
        return _mds_sources(path, path.name, options)
    saved = (path / "dataset_dict.json").exists() or (path / "dataset_info.json").exists()
    if options.kind == "dataset" or (options.kind == "auto" and saved):
        return [(saved_dataset_source(path, options) if saved else hub_dataset_source(str(path), options))]
    if options.kind == "code":
        return [code_source(path, group_by=options.group_by, extensions=options.extensions)]
    found = walk(path)
    if options.kind == "auto" and _is_repository(path, found.files, options):
        return [code_source(path, group_by=options.group_by, extensions=options.extensions)]
    reasons = _reasons(found.files, options)
    taken = [file for file in found.files if not reasons[file]]
    aside = [Skipped(file.relative_to(path).as_posix(), reason) for file, reason in reasons.items() if reason]
    aside += found.aside
    if not taken:
        raise UserError(_nothing_to_read(path, aside, options))
    streams = []
    for file in taken:
        kind = options.kind if options.kind != "auto" else kind_of(file)
        assert kind is not None  # or it would have a reason
        streams.append(_file_source(file, kind, file.relative_to(path).as_posix(), options))
    streams[0] = replace(streams[0], left_aside=tuple(aside))
    return streams


def _mds_sources(path: Path, name: str, options: PrepareOptions) -> list[Source]:
    """One source for each domain: a folder of MDS shards."""
    folders = mds_folders(path)
    if not folders:
        raise UserError(f"source '{name}' holds no index.json of MDS shards; correct the path or --kind")
    shown = [name if folder == path else folder.relative_to(path).as_posix() for folder in folders]
    sources = [mds_source(folder, label, options) for folder, label in zip(folders, shown, strict=True)]
    others = [file for file in walk(path).files if not any(folder in file.parents for folder in folders)]
    aside = tuple(Skipped(file.relative_to(path).as_posix(), BESIDE_MDS) for file in others)
    return [replace(sources[0], left_aside=aside), *sources[1:]]


def _is_repository(path: Path, files: Iterable[Path], options: PrepareOptions) -> bool:
    """Whether a folder is one of source code: a repository holds prose and .json files too, but no data in rows."""
    code = [file for file in files if is_code(file, options.extensions)]
    rows = [file for file in files if suffixes(file)[0] != ".json" and kind_of(file) in ("jsonl", "parquet")]
    if code and rows:
        raise UserError(
            f"source '{path}' holds source code ({code[0].name}) and rows ({rows[0].name}); set --kind to the one meant"
        )
    return bool(code)


def _reasons(files: Iterable[Path], options: PrepareOptions) -> dict[Path, str]:
    """Each file of a folder and why it is left aside, empty for those that are read.

    All kinds are read together. Only beside rows is a README or a LICENSE no document, for it is about the rows.
    """
    kinds = {file: kind_of(file) for file in files}
    has_rows = any(kind in ("jsonl", "parquet") for kind in kinds.values())

    def reason(file: Path, kind: str | None) -> str:
        if options.kind != "auto":
            return "" if kind == options.kind else f"{OTHER_KIND} {options.kind}"
        if kind is None:
            return NO_KIND
        about = file.name.split(".")[0].upper() in (
            "README",
            "LICENSE",
            "LICENCE",
            "NOTICE",
            "CHANGELOG",
            "CITATION",
        )
        return ABOUT if about and kind == "text" and has_rows else ""

    return {file: reason(file, kind) for file, kind in kinds.items()}


def _nothing_to_read(path: Path, aside: list[Skipped], options: PrepareOptions) -> str:
    kinds = [options.kind] if options.kind != "auto" else list(_SUFFIXES)
    wanted = [suffix for kind in kinds for suffix in _SUFFIXES[kind]]
    there = f" among {', '.join(entry.name for entry in aside[:5])}" if aside else ", for it is empty"
    more = f" and {len(aside) - 5} more" if len(aside) > 5 else ""
    return (
        f"source '{path}' holds no {' '.join(wanted)} file (compressed or not: {' '.join(COMPRESSIONS)}){there}{more}; "
        "correct the path or --kind"
    )
