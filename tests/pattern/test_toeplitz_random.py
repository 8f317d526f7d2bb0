"""The prescribed benchmark pattern: as dense as asked, another one for every head, the same one on every rank."""

from __future__ import annotations

import pytest
import torch

from distributed import ProcessPool, Worker
from mtraining import sparse_ring_attention
from mtraining.errors import UserError
from mtraining.kernel import SparseIndex
from mtraining.layout import build_layout
from mtraining.pattern import SequenceShard, ToeplitzRandom, build_pattern


def estimate(pattern: ToeplitzRandom, seq_len: int, heads: int = 4, batch: int = 1) -> SparseIndex:
    q = torch.empty(batch, seq_len, heads, 4)
    return pattern.estimate(q, q[:, :, :1], SequenceShard.whole(seq_len), 1.0)


@pytest.mark.parametrize("density", [0.05, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("blocks", [256, 1000])
def test_density_is_as_asked(density: float, blocks: int) -> None:
    index = estimate(ToeplitzRandom(density=density, window=4, columns=0, block_size=16), blocks * 16)
    assert torch.allclose(index.density(), torch.tensor(density, dtype=torch.float64), rtol=2e-3)
    with_columns = estimate(ToeplitzRandom(density=density, window=4, columns=64, block_size=16), blocks * 16)
    # Where every tile is selected, columns select nothing more; they are multiplied all the same.
    more = with_columns.density() > index.density()
    assert (more if density < 1 else with_columns.density() == 1).all()
    assert (with_columns.cost() > index.cost()).all()


def test_window_isolation_and_columns() -> None:
    index = estimate(ToeplitzRandom(density=0.05, window=8, columns=33, block_size=16), 512 * 16)
    assert index.diagonals[..., :8].all() and not index.diagonals[..., 8].any()
    far = index.diagonals[..., 8:]
    assert far.any(-1).all()
    body = far[..., :450]  # the corner, where a diagonal has few tiles, is filled up to the exact density
    assert not (body[..., 1:] & body[..., :-1]).any()
    columns = index.columns
    assert columns.dtype == torch.int32 and columns.shape == (1, 4, 33)
    assert (columns.diff() > 0).all() and columns.min() >= 0 and columns.max() < index.seq_len


def test_every_head_and_batch_row_differs_and_the_seed_decides() -> None:
    index = estimate(ToeplitzRandom(columns=16, block_size=16), 400 * 16, heads=3, batch=2)
    for table in (index.diagonals, index.columns):
        assert len({tuple(row.tolist()) for row in table.flatten(0, 1)}) == 6
    again = estimate(ToeplitzRandom(columns=16, block_size=16, seed=1), 400 * 16, heads=3, batch=2)
    assert not torch.equal(index.diagonals, again.diagonals) and not torch.equal(index.columns, again.columns)


def rank_index(worker: Worker) -> list[object]:
    torch.manual_seed(worker.rank)  # neither another state of the generator nor other inputs may matter
    q = torch.randn(1, 64, 2, 8)
    _, index = sparse_ring_attention(
        q,
        q,
        q,
        pattern=ToeplitzRandom(density=0.4, window=2, columns=5, block_size=8),
        layout=build_layout("striped", 8),
        mesh=worker.mesh(),
        return_index=True,
    )
    return [index.diagonals.tolist(), index.columns.tolist()]


def test_every_rank_makes_the_same_one(pool: ProcessPool) -> None:
    first, second = pool.run(rank_index, world=2)
    assert first == second


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"density": 0.0}, "pattern.density"),
        ({"density": 1.5}, "pattern.density"),
        ({"window": 0}, "pattern.window"),
        ({"columns": -1}, "pattern.columns"),
    ],
)
def test_options_are_checked(options: dict[str, float], words: str) -> None:
    with pytest.raises(UserError, match=words):
        build_pattern("toeplitz_random", **options)


def test_what_does_not_fit_the_sequence_is_refused() -> None:
    with pytest.raises(UserError, match=r"pattern\.density.*0\.0625"):
        estimate(ToeplitzRandom(density=0.01, window=1, columns=0, block_size=8), 31 * 8)
    with pytest.raises(UserError, match=r"pattern\.columns"):
        estimate(ToeplitzRandom(density=0.5, window=1, columns=999, block_size=8), 31 * 8)


def test_estimation_may_run_beside_it(monkeypatch: pytest.MonkeyPatch) -> None:
    from mtraining.pattern import toeplitz_random

    calls = []
    real = toeplitz_random.VerticalSlash.estimate
    monkeypatch.setattr(
        toeplitz_random.VerticalSlash, "estimate", lambda *args: calls.append(1) or real(*args)
    )
    q = torch.randn(1, 256, 2, 8)
    shard = SequenceShard.whole(256)
    plain = ToeplitzRandom(density=0.4, window=2, columns=5, block_size=8)
    timed = ToeplitzRandom(density=0.4, window=2, columns=5, block_size=8, with_estimation=True)
    one, two = (pattern.estimate(q, q, shard, 0.3) for pattern in (plain, timed))
    assert calls == [1] and torch.equal(one.diagonals, two.diagonals)
