"""`mtraining bench tiles` from end to end on a tiny case: what it writes is what the kernels then take."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from mtraining.bench.tiles import run as module
from mtraining.bench.timing import Timing
from mtraining.cli import app
from mtraining.kernel.measured_tiles import TILED_KERNELS, TileSizes, measured_tiles, tiles_path
from mtraining.kernel.triton import tile_sizes as triton_config
from mtraining.kernel.triton.backend import TritonBackend
from mtraining.kernel.triton.tile_sizes import choose_tiles

CPU = torch.device("cpu")
SMALL = TileSizes(16, 32, 4, 1)


@pytest.fixture(autouse=True)
def timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[dict[str, TileSizes]]]:
    """What was forced at each reading; each is less than the one before, so that the last candidate wins."""
    forced: list[dict[str, TileSizes]] = []

    def measure(run: Callable[[], object], device: torch.device, seconds: float) -> Timing:
        run()
        forced.append(dict(triton_config._forced))
        return Timing(1000 * 0.9 ** len(forced), None)

    monkeypatch.setenv("MTRAINING_CACHE", str(tmp_path))
    monkeypatch.setenv("MTRAINING_COMMIT", "abc123")
    monkeypatch.setattr(module, "measure", measure)
    yield forced
    measured_tiles.cache_clear()


def test_the_command(timed: list[dict[str, TileSizes]]) -> None:
    q = torch.empty(1, 1, 1, 16)
    assert choose_tiles("tiles_dq", q, 32) == TileSizes(32, 32, 4, 1)
    result = CliRunner().invoke(app, ["bench", "tiles"])
    assert result.exit_code == 0, result.output
    assert str(tiles_path(CPU)) in result.output and tiles_path(CPU).is_file()
    assert result.output.count("tiles_dkdv") == 3  # two candidates, and a row of the table
    for kernel in TILED_KERNELS:
        assert choose_tiles(kernel, q, 32) == SMALL
    assert choose_tiles("tiles_dq", torch.empty(1, 1, 1, 32), 32) == TileSizes(32, 32, 4, 1)
    assert triton_config._forced == {}
    table = [{kernel: TileSizes(32, 64 if "columns" in kernel else 32, 4, 1)} for kernel in TILED_KERNELS]
    assert timed == [each for first in table for each in (first, dict.fromkeys(first, SMALL)) * 2]


def test_a_wrong_candidate_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    right = TritonBackend.columns_backward

    def spoiled(self: TritonBackend, dout: Tensor, q: Tensor, *rest: Any) -> Tensor:
        grads = right(self, dout, q, *rest)
        return grads * 1.001 if choose_tiles("columns_dkdv", q, 32) == SMALL else grads

    monkeypatch.setattr(TritonBackend, "columns_backward", spoiled)
    monkeypatch.setattr(module, "TILED_KERNELS", ("columns_dkdv",))
    result, path = module.bench(say=lambda text: None)
    assert path == tiles_path(CPU)
    assert len(result.failures) == 1
    assert result.failures[0].startswith(
        "columns_dkdv, head_dim 16, 16x32, 4 warps, 1 stages: dk: relative error"
    )
    assert choose_tiles("columns_dkdv", torch.empty(1, 1, 1, 16), 32) == TileSizes(32, 64, 4, 1)
