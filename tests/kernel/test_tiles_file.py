"""Measured tiles: the file, and which calls take what it says."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from mtraining.errors import UserError
from mtraining.kernel import measured_tiles as tiles_file
from mtraining.kernel.measured_tiles import TileSizes, measured_tiles, tiles_in_use, tiles_path

pytest.importorskip("triton")

from mtraining.kernel.triton.tile_sizes import choose_tiles, forced_tiles

CPU = torch.device("cpu")
TABLE, MEASURED = TileSizes(64, 64, 4, 1), TileSizes(16, 32, 2, 2)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("MTRAINING_CACHE", str(tmp_path))
    measured_tiles.cache_clear()
    yield tmp_path
    measured_tiles.cache_clear()


def entry(**changes: Any) -> dict[str, Any]:
    tiles = {**MEASURED._asdict(), **changes.pop("tiles", {})}
    return {
        "kernel": "tiles_dq", "dtype": "bf16", "head_dim": 64, "block_size": 64, "tiles": tiles, "ms": 1.0, **changes,
    }  # fmt: skip


def write(*entries: Any, **changes: Any) -> Path:
    document = {"gpu": tiles_file.device_name(CPU), "triton": tiles_file.triton_version(), "entries": entries}
    path = tiles_path(CPU)
    path.write_text(json.dumps(document | changes), encoding="utf-8")
    measured_tiles.cache_clear()
    return path


def queries(head_dim: int = 64, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(1, 1, 1, head_dim, dtype=dtype)


def test_exactly_what_was_measured_takes_the_files_tiles(caplog: pytest.LogCaptureFixture) -> None:
    assert choose_tiles("tiles_dq", queries(), 64) == TABLE
    path = write(entry())
    with caplog.at_level("INFO"):
        assert choose_tiles("tiles_dq", queries(), 64) == MEASURED
        assert choose_tiles("tiles_dq", queries(), 64) == MEASURED
    assert caplog.messages == [f"kernel: tiles from {path}"]
    assert choose_tiles("tiles_dkdv", queries(), 64) == TABLE
    assert choose_tiles("tiles_dq", queries(96), 64) == TABLE
    assert choose_tiles("tiles_dq", queries(dtype=torch.float16), 64) == TABLE
    assert choose_tiles("tiles_dq", queries(), 128) == TABLE
    assert choose_tiles("tiles_dq", queries(), 32) == TABLE._replace(block_m=32, block_n=32)


def test_the_file_is_read_once_a_process() -> None:
    path = write(entry())
    assert choose_tiles("tiles_dq", queries(), 64) == MEASURED
    path.unlink()
    assert choose_tiles("tiles_dq", queries(), 64) == MEASURED


def test_tiles_of_another_gpu_or_triton_are_not_used(caplog: pytest.LogCaptureFixture) -> None:
    for change in ({"gpu": "NVIDIA H200"}, {"triton": "3.5.0"}):
        caplog.clear()
        path = write(entry(), **change)
        assert choose_tiles("tiles_dq", queries(), 64) == TABLE
        assert f"kernel: {path} is of " in caplog.text and "so it is not used" in caplog.text
        assert tiles_in_use(CPU, torch.bfloat16, 64) == "tables"


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        ("text", "Expecting property name"),
        ("list", "gpu is None, not str"),
        ("no entries", "entries is None, not list"),
        (entry(kernel="tiles"), "kernel 'tiles' of 'bf16' is not known"),
        (entry(dtype="int8"), "kernel 'tiles_dq' of 'int8' is not known"),
        (entry(head_dim="64"), "head_dim is '64', not int"),
        (entry(tiles={"tma": 1}), "tma is 1, not bool"),
        (entry(tiles={"block_m": 48}), "block_m is 48, not one of"),
        (entry(tiles={"block_n": 128}), "block_n is 128, which does not divide blocks of 64"),
        (entry(block_size=0), "block_m is 16, which does not divide blocks of 0"),
        (entry(kernel="columns_dq", tiles={"block_n": 16}), "columns take 32 at least"),
        (entry(tiles={"warps": 3}), "3 warps and 2 stages are not in"),
        (entry(tiles={"stages": 0}), "2 warps and 0 stages are not in"),
        (entry(tiles={"tma": True}), "tma is for tiles_forward alone"),
    ],
)
def test_a_damaged_or_edited_file_is_refused_with_the_remedy(damage: Any, reason: str) -> None:
    path = write(damage)
    if damage in ("text", "list"):
        path.write_text({"text": "{'gpu'", "list": "[]"}[damage], encoding="utf-8")
    elif damage == "no entries":
        path.write_text('{"gpu": "a", "triton": "b"}', encoding="utf-8")
    with pytest.raises(UserError) as refusal:
        choose_tiles("tiles_dq", queries(), 64)
    assert str(path) in str(refusal.value) and reason in str(refusal.value)
    assert "delete it, or run `mtraining bench tiles` again" in str(refusal.value)


def test_columns_may_be_wider_than_blocks() -> None:
    write(entry(kernel="columns_dq", tiles={"block_n": 128}))
    assert choose_tiles("columns_dq", queries(), 64) == MEASURED._replace(block_n=128)


def test_the_file_lies_in_the_users_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("MTRAINING_CACHE")
    monkeypatch.setattr(tiles_file, "triton_version", lambda: "3.6.0")
    monkeypatch.setattr(tiles_file, "device_name", lambda device: "NVIDIA RTX 6000 Ada Generation")
    name = "tiles-rtx-6000-ada-generation-triton-3.6.0.json"
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert tiles_path(CPU) == tmp_path / ".cache" / "mtraining" / name
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "x"))
    assert tiles_path(CPU) == tmp_path / "x" / "mtraining" / name


def test_the_fingerprint_is_of_what_these_tensors_take() -> None:
    def fingerprint(*entries: Any) -> str:
        write(*entries)
        return tiles_in_use(CPU, torch.bfloat16, 64)

    other = entry(head_dim=128), entry(dtype="fp16")
    here, there = entry(), entry(kernel="tiles_dkdv")
    assert fingerprint() == fingerprint(*other) == "tables"
    assert fingerprint(here, there) == fingerprint(*other, there, entry(ms=2.0)) != "tables"
    assert len({fingerprint(here), fingerprint(here, there), fingerprint(entry(tiles={"stages": 3}))}) == 3


def test_forced_tiles_end_with_the_block() -> None:
    write(entry())

    def inside() -> None:
        with forced_tiles({"tiles_dq": TileSizes(128, 128, 8, 2)}):
            with forced_tiles({"tiles_dkdv": MEASURED}):
                assert choose_tiles("tiles_dq", queries(), 64) == TileSizes(64, 64, 8, 2)
                assert choose_tiles("tiles_dkdv", queries(), 64) == MEASURED
            assert choose_tiles("tiles_dkdv", queries(), 64) == TABLE
            assert choose_tiles("tiles_dq", queries(), 64) == TileSizes(64, 64, 8, 2)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        inside()
    assert choose_tiles("tiles_dq", queries(), 64) == MEASURED
