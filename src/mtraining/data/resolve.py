"""From the words of `sources` to the streams they mean."""

from __future__ import annotations

from pathlib import Path

from mtraining.data.code import CODE_EXTENSIONS, code_source, package_source, stdlib_source, walk
from mtraining.data.options import PrepareOptions
from mtraining.data.rows import hub_dataset_source, jsonl_source, parquet_source, saved_dataset_source
from mtraining.data.sources import Item, Source, files_signature
from mtraining.errors import UserError

TEXT_EXTENSIONS = (".txt", ".md", ".rst")
_FILE_KIND = {".jsonl": "jsonl", ".parquet": "parquet"} | dict.fromkeys(TEXT_EXTENSIONS, "text")
_KIND_FILES = {"text": TEXT_EXTENSIONS, "jsonl": (".jsonl",), "parquet": (".parquet",)}


def resolve_sources(options: PrepareOptions) -> list[Source]:
    """The streams of every source, in order. UserError names a source that does not exist or cannot be understood."""
    return [stream for name in options.sources for stream in _resolve(name, options)]


def _resolve(name: str, options: PrepareOptions) -> list[Source]:
    if name == "stdlib":
        return [stdlib_source(group_by=options.group_by, extensions=options.extensions)]
    if name.startswith("package:"):
        package = name.removeprefix("package:")
        return [package_source(package, group_by=options.group_by, extensions=options.extensions)]
    path = Path(name)
    if path.is_file():
        kind = options.kind if options.kind != "auto" else _FILE_KIND.get(path.suffix) or _code_kind(path)
        return [_file_source(path, kind, path.name, options)]
    if path.is_dir():
        return _resolve_folder(path, options)
    # "org/name" could be a mistyped path too; these shapes can only be one.
    if options.kind in ("text", "jsonl", "parquet", "code") or path.suffix in _FILE_KIND or name[:1] in "./~":
        raise UserError(f"source '{name}' does not exist; correct the path")
    return [hub_dataset_source(name, options)]


def _code_kind(path: Path) -> str:
    if path.suffix in CODE_EXTENSIONS:
        return "code"
    raise UserError(f"source '{path}' has suffix '{path.suffix}', which names no kind; set kind")


def _file_source(path: Path, kind: str, shown: str, options: PrepareOptions) -> Source:
    if kind == "jsonl":
        return jsonl_source(path, options)
    if kind == "parquet":
        return parquet_source(path, options)
    if kind == "dataset":
        raise UserError(
            f"source '{path}' is a file, but kind is 'dataset'; set kind to auto, or name a dataset folder"
        )
    item = Item(shown, files=((shown if kind == "code" else "", path),))
    return Source(str(path), lambda: iter([item]), files_signature([path], path.parent), 1)


def _resolve_folder(path: Path, options: PrepareOptions) -> list[Source]:
    kind = options.kind if options.kind != "auto" else _folder_kind(path, options)
    if kind == "dataset":
        saved = (path / "dataset_dict.json").exists() or (path / "dataset_info.json").exists()
        return [(saved_dataset_source(path, options) if saved else hub_dataset_source(str(path), options))]
    if kind == "code":
        return [code_source(path, group_by=options.group_by, extensions=options.extensions)]
    files, _ = walk(path, _KIND_FILES[kind])
    if not files:
        raise UserError(
            f"source '{path}' holds no {' or '.join(_KIND_FILES[kind])} file; correct the path or kind"
        )
    return [_file_source(file, kind, file.relative_to(path).as_posix(), options) for file in files]


def _folder_kind(path: Path, options: PrepareOptions) -> str:
    if (path / "dataset_dict.json").exists() or (path / "dataset_info.json").exists():
        return "dataset"
    kinds = {"code": options.extensions or CODE_EXTENSIONS, **_KIND_FILES}
    found = [kind for kind, extensions in kinds.items() if walk(path, extensions)[0]]
    if "code" in found and not {"jsonl", "parquet"} & set(found):
        return "code"  # a repository holds prose too, but is a repository
    found = [kind for kind in found if kind != "text"] or found
    if not found:
        raise UserError(
            f"source '{path}' is empty, or holds no file of a known kind; correct the path or set kind"
        )
    if len(found) > 1:
        raise UserError(f"source '{path}' holds files of kinds {', '.join(found)}; set kind to the one meant")
    return found[0]
