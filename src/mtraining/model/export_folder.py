"""The folder of an export: what was written there is on a list, and nothing else is ever touched.

    mtraining_export.json    the names of the files that an export wrote; the mark of its folder
    config.json, ...         those files
    anything else            a user's, left as it is

An earlier export is replaced file by file. Its config.json goes first and the new one comes last, so that a folder that
an interruption left between the two is found to be no model, and the same command mends it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

from mtraining.errors import UserError
from mtraining.inputs.text import replace_text

MARK = "mtraining_export.json"
CONFIG = "config.json"


def check_target(target: Path) -> None:
    """Refuse a folder that holds anything but an earlier export, and files that were put beside one.

    Raises:
        UserError: names the folder and what to do.
    """
    if not target.exists():
        return
    if not target.is_dir():
        raise UserError(f"export: {target} is a file; choose a folder.")
    if (target / MARK).exists():
        _owned(target)
    elif any(target.iterdir()):
        raise UserError(
            f"export: {target} is not empty and no export wrote it (it has no {MARK}); choose a new or empty folder."
        )


def put_in_place(temporary: Path, target: Path) -> None:
    """Move a whole export from ``temporary``, beside ``target``, to ``target``.

    Raises:
        UserError: a user's file has the name of one that would be written; nothing was touched then.
    """
    files = sorted(path.relative_to(temporary).as_posix() for path in temporary.rglob("*") if path.is_file())
    _write_mark(temporary, files)
    _same_modes(temporary)
    if not target.exists():
        temporary.rename(target)
        return
    owned = _owned(target) if (target / MARK).exists() else []
    for name in files:
        if name not in owned and (target / name).exists():
            raise UserError(
                f"export: {target / name} was not written by an export and would be replaced; move it away, or choose "
                "another folder."
            )
    _write_mark(target, {*owned, *files})
    for name in sorted(owned, key=lambda name: name != CONFIG):
        (target / name).unlink(missing_ok=True)
    for name in sorted(files, key=lambda name: name == CONFIG):
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        os.replace(temporary / name, target / name)
    os.replace(temporary / MARK, target / MARK)


def _owned(target: Path) -> list[str]:
    """The files that the mark of a folder lists. A name that leads out of the folder makes the mark a damaged one."""
    try:
        names = json.loads((target / MARK).read_text(encoding="utf-8"))["files"]
        inside = all(
            isinstance(name, str)
            and not PurePosixPath(name).is_absolute()
            and ".." not in PurePosixPath(name).parts
            for name in names
        )
    except (OSError, ValueError, KeyError, TypeError):
        inside = False
    if not inside:
        raise UserError(
            f"export: {target / MARK} is damaged, so which files are an export's is not known; choose another folder."
        )
    return list(names)


def _write_mark(folder: Path, files: Iterable[str]) -> None:
    replace_text(folder / MARK, json.dumps({"files": sorted(files)}, indent=1) + "\n")


def _same_modes(folder: Path) -> None:
    """Give every file the mode of the mark, which the umask decided: safetensors makes files that only their owner can
    read."""
    mode = (folder / MARK).stat().st_mode & 0o777
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(mode)
