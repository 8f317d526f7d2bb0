"""Source code as long documents: files in sorted order, joined by top-level folder, each under a header line."""

from __future__ import annotations

import importlib.util
import sysconfig
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from mtraining.data.files import walk
from mtraining.data.sources import Item, Skipped, Source, files_signature
from mtraining.errors import UserError

CODE_EXTENSIONS = tuple(
    ".py .pyi .pyx .c .h .cc .cpp .cxx .hpp .cu .cuh .rs .go .java .kt .scala .js .jsx .mjs .ts .tsx .rb .php .pl .lua "
    ".sh .sql .swift .m .cs .fs .hs .ml .jl .r .zig .vue .proto".split()
)
NOT_CODE = "not source code"


def is_code(path: Path, extensions: tuple[str, ...] | None) -> bool:
    """Whether a file has one of these suffixes (None: the usual ones), in any case."""
    return path.suffix.lower() in (extensions or CODE_EXTENSIONS)


def code_source(
    root: Path, *, group_by: str, extensions: tuple[str, ...] | None, prefix: str = "", tests: bool = True
) -> Source:
    """The code below `root`. Documents are named by top-level folder (or by file), `prefix` before every path."""
    found = walk(root, tests=tests)
    files = [path for path in found.files if is_code(path, extensions)]
    if not files:
        wanted = " ".join(extensions) if extensions else "the usual suffixes"
        raise UserError(
            f"source '{root}' holds no source code ({wanted}); set --extension or --kind to what it does hold"
        )
    others = [path.relative_to(root).as_posix() for path in found.files if not is_code(path, extensions)]
    aside = (*(Skipped(name, NOT_CODE) for name in others), *found.aside)
    groups: defaultdict[str, list[tuple[str, Path]]] = defaultdict(list)
    for path in files:
        relative = path.relative_to(root)
        shown = prefix + relative.as_posix()
        whole_folder = group_by == "folder" and len(relative.parts) > 1
        groups[prefix + relative.parts[0] if whole_folder else shown].append((shown, path))

    def items() -> Iterator[Item | Skipped]:
        for name in sorted(groups):
            yield Item(name, files=tuple(groups[name]))

    return Source(str(root), items, files_signature(files, root), len(groups), aside)


def stdlib_source(*, group_by: str, extensions: tuple[str, ...] | None) -> Source:
    """The running Python's own library without its tests: long real code that is on every machine."""
    root = Path(sysconfig.get_paths()["stdlib"])
    return code_source(root, group_by=group_by, extensions=extensions or (".py",), tests=False)


def package_source(name: str, *, group_by: str, extensions: tuple[str, ...] | None) -> Source:
    """An installed package, found without importing it."""
    try:
        spec = importlib.util.find_spec(name)
    except (ImportError, ValueError):
        spec = None
    if spec is None or not (spec.submodule_search_locations or spec.origin):
        raise UserError(f"source 'package:{name}' is not installed here; install it or name another package")
    if spec.submodule_search_locations:
        root = Path(next(iter(spec.submodule_search_locations)))
        return code_source(root, group_by=group_by, extensions=extensions, prefix=f"{name}/", tests=False)
    path = Path(str(spec.origin))
    if path.suffix != ".py":
        raise UserError(f"source 'package:{name}' has no Python source here; name another package")
    item = Item(path.name, files=((path.name, path),))
    return Source(f"package:{name}", lambda: iter([item]), files_signature([path], path.parent), 1)
