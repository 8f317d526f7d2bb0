"""Tiny prepared folders."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from prepared import write_rows

from distributed import PRELOAD
from mtraining.data import PrepareOptions, TokenShards, prepare

MakeShards = Callable[..., TokenShards]

# Reading and tokenising processes are forked from the same server as the process pool's: whoever starts it first must
# have named what it loads.
multiprocessing.get_context("forkserver").set_forkserver_preload(PRELOAD)


@pytest.fixture
def make_shards(tmp_path: Path) -> MakeShards:
    """make_shards({name: text}, **options): byte-tokenised shards of these documents."""

    def make(documents: Mapping[str, str], **options: Any) -> TokenShards:
        source = write_rows(tmp_path / "made.jsonl", documents)
        out = tmp_path / "made"
        prepare(PrepareOptions(sources=(str(source),), out=out, name_column="id", **options), progress=False)
        return TokenShards(out)

    return make


@pytest.fixture
def counting() -> Mapping[str, str]:
    """Documents of 10, 37, 3, 100 and 64 bytes in which every token is told from its neighbours."""
    return {f"d{n}": "".join(chr(33 + (n * 7 + i) % 90) for i in range(n)) for n in (10, 37, 3, 100, 64)}
