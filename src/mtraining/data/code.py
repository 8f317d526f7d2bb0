"""Source code as long documents: files in sorted order, joined by top-level folder, each under a header line."""

from __future__ import annotations

import importlib.util
import os
import sysconfig
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path

from mtraining.data.sources import Item, Skipped, Source, files_signature
from mtraining.errors import UserError

CODE_EXTENSIONS = tuple(
    ".py .pyi .pyx .c .h .cc .cpp .cxx .hpp .cu .cuh .rs .go .java .kt .scala .js .jsx .mjs .ts .tsx .rb .php .pl .lua "
    ".sh .sql .swift .m .cs .fs .hs .ml .jl .r .R .zig .vue .proto".split()
)
_NEVER = {"__pycache__", "site-packages", "dist-packages", "node_modules"}
_TESTS = {"test", "tests", "idle_test"}


def walk(root: Path, extensions: tuple[str, ...], *, tests: bool = True) -> tuple[list[Path], dict[str, int]]:
    """(files to take, sorted by relative path; counts of the other files by suffix).

    Hidden folders, caches and installed third-party packages are not entered, links to folders are not followed, and
    test folders are entered only if `tests`.
    """
    closed = _NEVER if tests else _NEVER | _TESTS
    taken: list[Path] = []
    ignored: Counter[str] = Counter()
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in closed and not name.startswith(".")]
        for name in names:
            path = Path(folder, name)
            if path.suffix in extensions:
                taken.append(path)
            else:
                ignored[path.suffix] += 1
    taken.sort(key=lambda path: path.relative_to(root).as_posix())
    return taken, dict(sorted(ignored.items()))


def code_source(
    root: Path, *, group_by: str, extensions: tuple[str, ...] | None, prefix: str = "", tests: bool = True
) -> Source:
    """The code below `root`. Documents are named by top-level folder (or by file), `prefix` before every path."""
    files, ignored = walk(root, extensions or CODE_EXTENSIONS, tests=tests)
    if not files:
        wanted = " ".join(extensions) if extensions else "the usual suffixes"
        raise UserError(
            f"source '{root}' holds no source code ({wanted}); set extensions or kind to what it does hold"
        )
    groups: defaultdict[str, list[tuple[str, Path]]] = defaultdict(list)
    for path in files:
        relative = path.relative_to(root)
        shown = prefix + relative.as_posix()
        whole_folder = group_by == "folder" and len(relative.parts) > 1
        groups[prefix + relative.parts[0] if whole_folder else shown].append((shown, path))

    def items() -> Iterator[Item | Skipped]:
        for name in sorted(groups):
            yield Item(name, files=tuple(groups[name]))

    return Source(str(root), items, files_signature(files, root), len(groups), ignored)


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
