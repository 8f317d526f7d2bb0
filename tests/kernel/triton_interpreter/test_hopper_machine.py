"""The Hopper kernels in many interleavings of their warp groups (``gluon_machine``), against the fp64 reference."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton.experimental.gluon")

from gluon_machine import Simulated
from mtraining.kernel.hopper import backend as hopper_backend
from mtraining.kernel.hopper import forward as hopper_forward
from mtraining.kernel.hopper import keys as hopper_keys
from mtraining.kernel.hopper import queries as hopper_queries
from mtraining.kernel.hopper.backend import HopperBackend
from triton_cases import Case, assert_equal, assert_passes, build, reference, solve, whole

SMALL = {"size": 128, "dim": 64, "dtype": torch.float16}
CASES = {
    "whole": whole(3, columns=150, **SMALL),
    "no columns": whole(3, columns=0, q_heads=2, **SMALL),
    "columns only": whole(3, columns=300, diagonal_share=0.0, q_heads=2, **SMALL),
    "every tile": whole(4, columns=40, diagonal_share=1.0, q_heads=1, **SMALL),
    "two rows of a batch": whole(2, columns=130, batch=2, q_heads=4, kv_heads=2, **SMALL),
    "striped": Case(range(1, 6, 2), range(0, 6, 2), 6, columns=140, **SMALL),
    "zigzag": Case((1, 4), (0, 5), 6, columns=140, **SMALL),
    "block lists": whole(3, columns=140, block_share=0.4, diagonal_share=0.2, **SMALL),
    "nothing before": Case(range(2), range(2, 4), 4, columns=0, q_heads=2, **SMALL),
    "documents at blocks": whole(4, columns=150, starts="blocks", diagonal_share=0.8, **SMALL),
    "documents anywhere": whole(3, columns=150, starts="anywhere", batch=2, q_heads=2, **SMALL),
    "documents of one token": whole(3, columns=0, starts="tokens", diagonal_share=1.0, q_heads=2, **SMALL),
    "a narrow window": whole(3, columns=40, starts="narrow", diagonal_share=1.0, **SMALL),
    "a wide window": whole(5, columns=0, starts="wide", diagonal_share=1.0, q_heads=1, **SMALL),
    "columns in a window": whole(5, columns=640, starts="wide", diagonal_share=0.0, **SMALL),
    "striped documents": Case(range(1, 6, 2), range(0, 6, 2), 6, columns=140, starts="anywhere", **SMALL),
    "zigzag window": Case((1, 4), (0, 5), 6, columns=140, starts="wide", diagonal_share=1.0, **SMALL),
    "lists of documents": whole(
        4, columns=140, block_share=0.4, diagonal_share=0.2, starts="anywhere", batch=2, q_heads=2, **SMALL
    ),
    "mostly out of reach": Case(
        range(2, 4), range(2), 4, columns=0, diagonal_share=1.0, starts="narrow", q_heads=2, **SMALL
    ),
}


def simulate(monkeypatch: pytest.MonkeyPatch, programs: int) -> None:
    """The backend launches simulated kernels, the query-major ones as so many programs."""
    for module, name in (
        (hopper_forward, "forward_kernel"), (hopper_queries, "query_gradient_kernel"),
        (hopper_keys, "key_tiles_kernel"), (hopper_keys, "key_columns_kernel"),
    ):  # fmt: skip
        monkeypatch.setattr(module, name, Simulated(module, name, seed=programs))
    monkeypatch.setattr(hopper_backend, "_programs", lambda items, device: min(items, programs))


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("programs", [1, 4])
@pytest.mark.parametrize("name", CASES)
def test_against_reference(name: str, programs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    simulate(monkeypatch, programs)
    problem = build(CASES[name])
    assert_equal(solve(HopperBackend(), problem), reference(problem), 2e-3, 1e-4)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("programs", [1, 4])
def test_every_kind_of_pass(programs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    simulate(monkeypatch, programs)
    for starts in (None, "anywhere"):
        assert_passes(HopperBackend(), build(whole(3, q_heads=2, columns=140, starts=starts, **SMALL)), 2e-3)


def test_same_bits_whoever_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = build(CASES["whole"])
    results = []
    for programs in (2, 5):
        with monkeypatch.context() as patch:
            simulate(patch, programs)
            results.append(solve(HopperBackend(), problem))
    (lse, first), (lse_again, second) = results
    assert torch.equal(lse, lse_again)
    assert all(torch.equal(first[name], second[name]) for name in first)
