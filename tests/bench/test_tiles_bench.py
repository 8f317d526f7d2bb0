"""The search for tiles: what it tries, what it believes, what it writes. In the interpreter, with real kernels:
tests/kernel/triton_interpreter/test_tiles_command.py."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

pytest.importorskip("triton")

from triton.runtime.errors import InterpreterError, OutOfResources

from mtraining.bench.attention.gate import GateError
from mtraining.bench.tiles import run as module
from mtraining.bench.tiles.candidates import candidates
from mtraining.bench.tiles.run import Choice, TilesResult, choose, save, served_elsewhere, table
from mtraining.cli import app
from mtraining.errors import UserError
from mtraining.kernel.measured_tiles import TILED_KERNELS, KernelCase, TileSizes, measured_tiles, tiles_path
from mtraining.kernel.triton.tile_sizes import cut_tiles, default_tiles

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
TABLE, WIDE, DEEP = TileSizes(64, 64, 4, 2), TileSizes(128, 64, 8, 2), TileSizes(64, 64, 4, 3)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("MTRAINING_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("MTRAINING_COMMIT", "abc123")
    yield tmp_path / "cache"
    measured_tiles.cache_clear()


def chosen(
    readings: dict[TileSizes, list[float]], errors: dict[TileSizes, Exception] | None = None
) -> tuple[Choice | None, TilesResult, list[str]]:
    """With the given readings of each candidate, in turn; ``errors`` are what its gate raises."""
    result, told, left = TilesResult(), [], {tiles: list(ms) for tiles, ms in readings.items()}

    def passes(tiles: TileSizes) -> None:
        if errors and tiles in errors:
            raise errors[tiles]

    found = choose("dq", list(readings), passes, lambda tiles: left[tiles].pop(0), result, told.append)
    assert not any(left[tiles] for tiles in readings if not errors or tiles not in errors)
    return found, result, told


@pytest.mark.parametrize(
    ("readings", "expected"),
    [
        ({TABLE: [1.0], WIDE: [1.2], DEEP: [0.981]}, TABLE),  # 1.9 % is noise
        ({TABLE: [1.0, 1.0], WIDE: [0.97], DEEP: [0.95, 0.979]}, DEEP),
        ({TABLE: [1.0, 1.0], WIDE: [0.97], DEEP: [0.95, 0.99]}, TABLE),  # the gain does not repeat
        ({TABLE: [1.0], WIDE: [1.0]}, TABLE),
    ],
)
def test_the_tables_entry_stays_unless_another_is_faster_beyond_noise(
    readings: dict[TileSizes, list[float]], expected: TileSizes
) -> None:
    choice, result, _ = chosen(readings)
    assert choice is not None and choice.chosen == expected and choice.table == TABLE
    last = DEEP if DEEP in readings else WIDE
    assert result.failures == [] and choice.ms[last] == readings[last][-1]


def test_a_wrong_or_crashing_candidate_is_a_failure_and_never_chosen() -> None:
    errors = {WIDE: GateError("dq: relative error 1"), DEEP: InterpreterError("IndexError")}
    choice, result, told = chosen({TABLE: [1.0], WIDE: [0.1], DEEP: [0.1]}, errors)
    assert choice is not None and choice.chosen == TABLE and list(choice.ms) == [TABLE]
    assert result.failures == [
        "dq, 128x64, 8 warps, 2 stages: dq: relative error 1",
        "dq, 64x64, 4 warps, 3 stages: InterpreterError: IndexError",
    ]
    assert "WRONG" in told[1] and "WRONG" in choice.left_out[WIDE]


@pytest.mark.parametrize(
    "error", [OutOfResources(300, 200, "shared memory"), RuntimeError("PassManager::run failed")]
)
def test_what_does_not_fit_is_named_and_passed_over(error: Exception) -> None:
    choice, result, told = chosen({TABLE: [1.0, 1.0], WIDE: [0.1], DEEP: [0.9, 0.9]}, {WIDE: error})
    assert choice is not None and choice.chosen == DEEP and result.failures == []
    assert told[1].startswith("  dq 128x64, 8 warps, 2 stages: does not fit: ") and str(error) in told[1]


def test_where_the_tables_entry_does_not_fit_the_fastest_is_taken() -> None:
    none = OutOfResources(300, 200, "shared memory")
    choice, result, _ = chosen({TABLE: [1.0], WIDE: [1.3], DEEP: [1.2]}, {TABLE: none})
    assert choice is not None and choice.chosen == DEEP and result.failures == []
    result.choices[KernelCase("tiles_dq", torch.bfloat16, 64, 128)] = choice
    assert table(result)[1][0][-1] == "does not run"
    choice, result, _ = chosen({TABLE: [1.0], WIDE: [1.3]}, {TABLE: none, WIDE: none})
    assert choice is None and result.failures == ["dq: no candidate is left, so the tables' entry stays"]


@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (9, 0), (10, 0), (12, 0)])
def test_the_candidates(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    for kernel in TILED_KERNELS:
        for dtype in (torch.bfloat16, torch.float32):
            for head_dim in (64, 96, 128, 256):
                tried = candidates(kernel, GPU, dtype, head_dim, 128)
                entry = cut_tiles(kernel, default_tiles(kernel, GPU, dtype, head_dim), 128)
                assert tried[0][:4] == entry[:4] and len(set(tried)) == len(tried) and 6 <= len(tried) <= 10
                copied = kernel == "tiles_forward" and capability >= (9, 0) and head_dim != 96
                assert any(tiles.tma for tiles in tried) == (copied and dtype == torch.bfloat16)
        small = candidates(kernel, GPU, torch.bfloat16, 128, 32)
        assert max(tiles.block_m for tiles in small) == 32 and len(set(small)) == len(small)


def test_kernels_whose_tiles_are_part_of_their_design_are_not_searched(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from mtraining.kernel.hopper.backend import HopperBackend

    monkeypatch.setattr(module, "select_backend", lambda *args: HopperBackend())
    monkeypatch.setattr(module, "interpreted", lambda: True)  # for a device that is there
    assert served_elsewhere(GPU, torch.bfloat16, 128, 128)
    assert not served_elsewhere(GPU, torch.bfloat16, 128, 64)
    result, path = module.bench((128,), ("bf16",), 128, 256, say=lambda text: None)
    assert path is None and not result.choices and not result.failures
    assert (
        result.notes[0].startswith("head_dim 128, bf16: blocks of 128 run kernels") and len(result.notes) == 1
    )


def test_without_a_gpu_it_is_refused_with_the_remedy(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    refused = CliRunner().invoke(app, ["bench", "tiles"])
    assert isinstance(refused.exception, UserError) and "TRITON_INTERPRET=1" in str(refused.exception)
    assert module.main([]) == 2
    assert "error: bench tiles times kernels for NVIDIA GPUs" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"dtypes": ["int8"]}, "dtype: 'int8' is not known; choose from bf16, fp16, fp32"),
        ({"seq_len": 64, "block_size": 64}, "seq-len: 64 is not two or more blocks of 64; use 128"),
        ({"seq_len": 100}, "seq-len: 100 is not two or more blocks of 32; use 96"),
        ({"block_size": 40}, "block_size: kernel=triton needs a multiple of 16 tokens, not 40"),
    ],
)
def test_bad_options_are_refused(
    monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], reason: str
) -> None:
    monkeypatch.setattr(module, "interpreted", lambda: True)
    with pytest.raises(UserError, match=reason):
        module.bench(**options)


def test_the_file_keeps_what_was_found_for_other_calls(folder: Path) -> None:
    first, second = (KernelCase("tiles_dq", torch.bfloat16, head_dim, 128) for head_dim in (64, 96))

    def found(tiles: TileSizes) -> Choice:
        return Choice(
            tiles, TABLE, {tiles: 0.5, TABLE: 1.0}, {TileSizes(128, 128, 8, 3): "does not fit: memory"}
        )

    told: list[str] = []
    assert measured_tiles(CPU) == {}
    path = save({first: found(WIDE), second: found(WIDE)}, CPU, told.append)
    assert path == tiles_path(CPU) and list(folder.iterdir()) == [path]
    save({first: found(DEEP)}, CPU, told.append)
    assert measured_tiles(CPU) == {first: DEEP, second: WIDE} and told == []
    document = json.loads(path.read_text())
    assert document["gpu"].startswith("cpu ") and document["capability"] is None
    kept = {entry["head_dim"]: entry for entry in document["entries"]}
    assert kept[64]["ms"] == 0.5 and kept[64]["table_ms"] == 1.0 and kept[64]["commit"] == "abc123"
    assert [candidate.get("ms") for candidate in kept[64]["candidates"]] == [0.5, 1.0, None]
    path.write_text("{}")
    save({first: found(DEEP)}, CPU, told.append)
    assert "begun anew: kernel: the tiles file" in told[0] and measured_tiles(CPU) == {first: DEEP}


def test_a_folder_that_cannot_be_written_is_named(folder: Path) -> None:
    folder.write_text("in the way")
    call = KernelCase("tiles_dq", torch.bfloat16, 64, 128)
    with pytest.raises(UserError, match=r"cache/tiles-.* cannot be written: .*; set MTRAINING_CACHE"):
        save({call: Choice(TABLE, TABLE, {TABLE: 1.0}, {})}, CPU, print)
