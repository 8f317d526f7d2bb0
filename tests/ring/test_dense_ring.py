"""Dense attention by a dense kernel in the ring equals the oracle, in every layout of runs and every topology."""

from __future__ import annotations

import pytest
from test_ring_parity import TOPOLOGIES, check_parity

from distributed import ProcessPool


@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
@pytest.mark.parametrize("topology", TOPOLOGIES, ids=str)
@pytest.mark.parametrize(("batch", "heads"), [(1, (4, 2)), (2, (3, 1)), (1, (2, 2))], ids=str)
def test_dense_kernels_in_the_ring(
    pool: ProcessPool, layout: str, topology: tuple[int, ...], batch: int, heads: tuple[int, int]
) -> None:
    """The kernel is asked for by name, so that none of it could have been computed as tiles."""
    case = {
        "seed": 5, "topology": topology, "layout": (layout, 8), "pattern": "dense", "options": {"block_size": 8},
        "shape": (batch, 256, *heads, 32), "kernel": "flash",
    }  # fmt: skip
    check_parity(pool, case)


@pytest.mark.parametrize("topology", [(4,), (2, 2)], ids=str)
def test_auto_serves_stripes_as_well(pool: ProcessPool, topology: tuple[int, ...]) -> None:
    """A rank's own keys are one triangle for the dense kernel, every other step is tiles: both meet in one result."""
    case = {
        "seed": 6, "topology": topology, "layout": ("striped", 8), "pattern": "dense", "options": {"block_size": 8},
        "shape": (1, 512, 4, 2, 32), "kernel": "auto",
    }  # fmt: skip
    check_parity(pool, case)
