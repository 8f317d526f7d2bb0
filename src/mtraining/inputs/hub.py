"""Names that may be a path here or an id on the model hub: told apart at once, and the hub asked once, briefly.

transformers and datasets would ask an unreachable hub for file after file, each with retries and a line of log. Here
one question with a deadline comes first, so that a mistyped path costs seconds and one sentence.
"""

from __future__ import annotations

import functools
import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from mtraining.errors import UserError, first_line, nearest

TIMEOUT = 5.0
"""Seconds that the hub has for each answer; the whole question has twice that."""

_FILE_SUFFIXES = (
    ".json .jsonl .txt .md .rst .csv .parquet .arrow .bin .pt .safetensors .gguf .yaml .yml .py .gz .zst .bz2 .xz .zip"
).split()


def find(name: str, what: str, kind: Literal["model", "dataset"], remedy: str) -> dict[str, Any]:
    """Make sure that ``name`` is a path here or can be had from the hub.

    Args:
        name: a path or a hub id, as the user gave it.
        what: how messages begin, such as ``model.init='smol'``.
        kind: what the hub would hold under that name.
        remedy: how messages end: what else the user may give.

    Returns:
        Options for ``from_pretrained``: ``local_files_only`` where only the hub's cache on this machine is in reach.

    Raises:
        UserError: nothing of that name is here, and the hub has none, or cannot be reached and has left no copy.
    """
    if Path(name).exists():
        return {}
    if _is_path(name):
        raise UserError(f"{what} does not exist{_nearest(name)}; correct the path, or {remedy}.")
    from huggingface_hub import constants
    from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError

    if constants.HF_HUB_OFFLINE:
        lacking = "HF_HUB_OFFLINE keeps the model hub out of reach"
    else:
        problem = _ask(constants.ENDPOINT, name, kind)
        # Of a gated one the loader says what it lacks.
        if problem is None or isinstance(problem, GatedRepoError):
            return {}
        if isinstance(problem, (RepositoryNotFoundError, HFValidationError)):
            raise UserError(
                f"{what} is no path here{_nearest(name)}, and the model hub ({constants.ENDPOINT}) has no {kind} "
                f"of that name for you; correct it, or {remedy}."
            )
        lacking = f"the model hub ({constants.ENDPOINT}) cannot be reached ({first_line(problem)})"
    if kind == "dataset" and constants.HF_HUB_OFFLINE:
        return {}  # the datasets library keeps a cache of its own, and says so quickly where it has nothing
    if kind == "model" and _cached(name):
        return {"local_files_only": True}
    raise UserError(f"{what} is no path here{_nearest(name)}, and {lacking}; correct the path, or {remedy}.")


@contextmanager
def quiet() -> Iterator[None]:
    """Keep the hub client's reports of retries off the screen: what fails in the end is told in one sentence."""
    loggers = [logging.getLogger(name) for name in ("huggingface_hub", "huggingface_hub.utils._http")]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)


def _is_path(name: str) -> bool:
    """Whether a name can only be meant as a path: a hub id is ``name`` or ``owner/name``, of plain characters."""
    return (
        name[:1] in "./~"
        or name.endswith("/")
        or "\\" in name
        or name.count("/") > 1
        or Path(name).suffix.lower() in _FILE_SUFFIXES
    )


def _nearest(name: str) -> str:
    """The name beside the mistyped one that is most like it, as part of a sentence."""
    path = Path(name).expanduser()
    if path.exists():  # only a shell expands the tilde
        return f" (did you mean '{path}'?)"
    try:
        beside = [entry.name for entry in path.parent.iterdir()]
    except OSError:
        return ""
    near = nearest(path.name, beside, 0.75)
    return f" (did you mean '{path.with_name(near)}'?)" if near else ""


@functools.cache
def _ask(endpoint: str, name: str, kind: str) -> Exception | None:
    """What stands against having ``name`` from the hub; None where it is there. Asked once a process."""
    from huggingface_hub import HfApi

    answer: list[Exception | None] = []

    def ask() -> None:
        try:
            HfApi(endpoint=endpoint).repo_info(name, repo_type=kind, timeout=TIMEOUT)
            answer.append(None)
        except Exception as error:  # the client's, its transport's, the operating system's
            answer.append(error)

    # In a thread, since looking up a host's name heeds no timeout.
    asking = threading.Thread(target=ask, daemon=True)
    with quiet():
        asking.start()
        asking.join(2 * TIMEOUT)
    return answer[0] if answer else TimeoutError(f"no answer in {2 * TIMEOUT:.0f} s")


def _cached(name: str) -> bool:
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    folder = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=name, repo_type="model")
    return any(folder.glob("snapshots/*/*"))
