"""The Triton probe kernels under a scope, packed documents and windows, against the eager reference."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from test_estimate import parts, tokens
from torch import Tensor

from mtraining.kernel import ProbeScope, ReferenceBackend
from mtraining.kernel.triton.backend import TritonBackend
from mtraining.pattern import SequenceShard
from mtraining.pattern.documents import Documents
from mtraining.pattern.probe import document_probe, probe_positions, probe_scope, sequence_scope
from starts_cases import of_documents, of_window

ours, reference = TritonBackend(), ReferenceBackend()


pytestmark = pytest.mark.usefixtures("poisoned")


SCOPES: dict[str, list[Sequence[int]]] = {
    "documents at blocks": [[64, 128], [32, 64, 96]],
    "documents anywhere": [[7, 85, 1, 3, 41, 55], [101, 91]],
    "one document": [[192], [192]],
    "many documents": [[15] * 12 + [12], [5, 5, 182]],
}


def scope_of(starts: Tensor, at: Tensor, padding: int, size: int) -> ProbeScope:
    documents = Documents.of(starts, starts.shape[1] - padding)
    return probe_scope(at, documents, size)


@pytest.mark.parametrize(
    ("kind", "layout", "unit", "world", "placement", "size"),
    [
        ("documents at blocks", "contiguous", 64, 1, "last", 1),
        ("documents at blocks", "striped", 32, 2, "spread", 64),
        ("documents anywhere", "contiguous", 64, 1, "last", 32),
        ("documents anywhere", "zigzag", 32, 2, "mixed", 1),
        ("many documents", "contiguous", 64, 1, "mixed", 16),
        ("one document", "contiguous", 64, 1, "last", 1),
        ("documents anywhere", "shuffled", 64, 2, "last", 1),
        ("a window", "striped", 32, 2, "mixed", 32),
    ],
)
def test_probe_of_documents(kind: str, layout: str, unit: int, world: int, placement: str, size: int) -> None:
    """Bounded from below, and summed by the places of each document; every batch row has its own."""
    seq_len, count = 192, 24
    if kind == "a window":
        starts = of_window(seq_len, 50, 2)
        at, scope = sequence_scope(
            probe_positions(count, "mixed", seq_len, torch.device("cpu")),
            2,
            SequenceShard.whole(seq_len).of_batch(starts=starts),
            size,
        )
        assert scope is not None
    else:
        starts = of_documents(*SCOPES[kind])
        at = document_probe(count, placement, Documents.of(starts, seq_len))
        scope = scope_of(starts, at, 0, size)
    probe, k = tokens(at.shape[1], 2, 16), tokens(seq_len, 1, 16)
    everywhere = torch.arange(seq_len)
    lse = reference.probe_lse(probe, k, at, everywhere, 0.2, scope)
    total = 0.0
    for positions in parts(layout, unit, seq_len, world):
        keys = k.movedim(2, 1)[:, :, positions].movedim(1, 2)
        torch.testing.assert_close(
            ours.probe_lse(probe, keys, at, positions, 0.2, scope),
            reference.probe_lse(probe, keys, at, positions, 0.2, scope),
            rtol=1e-5,
            atol=1e-5,
        )
        result = ours.probe_mass(probe, keys, at, positions, 0.2, lse, seq_len, size, scope)
        wanted = reference.probe_mass(probe, keys, at, positions, 0.2, lse, seq_len, size, scope)
        for ours_one, reference_one in zip(result, wanted, strict=True):
            assert ours_one.shape == reference_one.shape
            torch.testing.assert_close(ours_one, reference_one, rtol=1e-5, atol=1e-6)
        total += result[0].sum().item()
    there = (at >= 0).sum().item() * 2
    assert total == pytest.approx(there, rel=1e-4), "each query there has a mass of one"


def test_the_reference_sums_by_documents_entry_by_entry() -> None:
    """What places mean, by plain loops: two documents of 11 and 21 tokens, and blocks of 4."""
    starts = of_documents([11, 21])
    at, size = torch.tensor([[3, 9, 20, 31]]), 4
    probe, k = tokens(4, 1, 32, batch=1), tokens(32, 1, 32, batch=1)
    by_token, by_block = scope_of(starts, at, 0, 1), scope_of(starts, at, 0, size)
    lse = reference.probe_lse(probe, k, at, torch.arange(32), 0.2, by_token)
    columns, distances = reference.probe_mass(probe, k, at, torch.arange(32), 0.2, lse, 32, 1, by_token)
    diagonals = reference.probe_mass(probe, k, at, torch.arange(32), 0.2, lse, 32, size, by_block)[1]
    wanted = [torch.zeros(32), torch.zeros(32), torch.zeros(16)]
    for number, query in enumerate(at[0].tolist()):
        first, past = (0, 11) if query < 11 else (11, 32)
        scores = torch.stack([probe[0, number, 0] @ k[0, key, 0] * 0.2 for key in range(first, query + 1)])
        for key, p in enumerate(scores.softmax(0).tolist(), start=first):
            wanted[0][key] += p
            wanted[1][first + query - key] += p
            for place in range(size):
                diagonal = (place + query - key) // size
                if diagonal <= (past - 1) // size - first // size:
                    wanted[2][2 * (first // size) + diagonal] += p / size
    for got, truth in zip((columns, distances, diagonals), wanted, strict=True):
        torch.testing.assert_close(got[0], truth, rtol=1e-5, atol=1e-6)
