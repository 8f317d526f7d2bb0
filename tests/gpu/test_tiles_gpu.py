"""The search for tiles on a real GPU: what does not fit is seen, and what is written is used and right."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from mtraining.bench.attention import gate
from mtraining.bench.attention.cases import Case
from mtraining.bench.attention.problem import Layer, build
from mtraining.bench.tiles import run as module
from mtraining.kernel.measured_tiles import TileSizes, measured_tiles
from mtraining.kernel.triton.backend import TritonBackend
from mtraining.kernel.triton.tile_sizes import choose_tiles

pytestmark = pytest.mark.gpu


def test_a_search(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MTRAINING_CACHE", str(tmp_path))
    monkeypatch.setenv("MTRAINING_COMMIT", "abc123")
    kernels = ("tiles_forward", "columns_dkdv")
    small, large = TileSizes(32, 64, 4, 2), TileSizes(128, 128, 8, 8)  # 8 stages of 64 KiB: on no GPU
    monkeypatch.setattr(module, "TILED_KERNELS", kernels)
    monkeypatch.setattr(module, "candidates", lambda *args: [small, large])
    try:
        result, path = module.bench((96,), seq_len=2048, seconds=0.02, say=lambda text: None)
        assert path is not None and result.failures == [] and len(result.choices) == 2
        for call, choice in result.choices.items():
            assert choice.chosen == small and 0 < choice.ms[small] < 100, call
        forward = next(iter(result.choices.values()))
        assert "out of resource: shared memory" in forward.left_out[large]
        device = torch.device("cuda", torch.cuda.current_device())
        p = build(Case(1024, 4, 2, 96, 2.25, 128), device, 1)
        assert all(choose_tiles(kernel, p.q, 128) == small for kernel in kernels)
        gate.check_whole(Layer(TritonBackend(), p))
    finally:
        measured_tiles.cache_clear()
