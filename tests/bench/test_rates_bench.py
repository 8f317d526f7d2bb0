"""Rates of a GPU: what is learnt from timings, and the file."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from distributed import ProcessPool, Worker
from mtraining.bench.options import AttentionOptions, RatesOptions
from mtraining.bench.rates import kernels
from mtraining.bench.rates import run as rates_run
from mtraining.bench.rates.kernels import Rater
from mtraining.bench.rates.run import ON_CPUS, bench, measure_link
from mtraining.bench.timing import Timing
from mtraining.errors import UserError
from mtraining.kernel.measured_tiles import slug
from mtraining.predict.measured import built_in, own_path, rates_of, rates_of_device, read_rates

SAYS: list[str] = []


class Told(Rater):
    """One whose kernels take what they are told to."""

    def __init__(self, tile: float, row: float, column: float, dense: float) -> None:
        super().__init__(ON_CPUS, torch.device("cpu"), "reference", 0.0, SAYS.append)
        self.costs = (tile, row, column, dense)

    def _layer(self, case: Any, head_dim: int, backend: Any) -> Any:
        tile, row, column, dense = self.costs
        self.time = lambda run: 0.0  # type: ignore[method-assign]
        counted = super()._layer(case, head_dim, backend)
        return {
            phase: (
                tiles, rows, area,
                1e-9 * (dense * tiles if case.blocks_per_row is None else tile * tiles + row * rows + column * area),
            )
            for phase, (tiles, rows, area, _) in counted.items()
        }  # fmt: skip


def test_a_tile_s_time_is_told_from_a_row_s() -> None:
    found = Told(13.0, 17.5, 15.0, 12.0).attention(16)
    assert {name: values[0] for name, values in found.items()} == pytest.approx(
        {"tile_ns": 13.0, "row_ns": 17.5, "column_ns": 15.0, "dense_ns": 12.0}
    )


@pytest.mark.parametrize("seconds", [0.1, 0.5])
def test_timings_are_of_a_warm_board(seconds: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """As warm as `mtraining bench attention` makes it, however short the timing."""
    given: list[tuple[float, float]] = []

    def measured(run: Any, device: torch.device, seconds: float, warm_up: float) -> Timing:
        given.append((seconds, warm_up))
        return Timing(7.0, None)

    monkeypatch.setattr(kernels, "measure", measured)
    rater = Rater(ON_CPUS, torch.device("cpu"), "reference", seconds, SAYS.append)
    assert rater.time(lambda: None) == 0.007
    assert given == [(seconds, AttentionOptions().warm_up)]


def test_nothing_is_learnt_from_noise() -> None:
    with pytest.raises(UserError, match="took no longer with more work"):
        Told(-1.0, 17.5, 15.0, 12.0).attention(16)


def link_of(worker: Worker) -> Any:
    return measure_link((64, 2**26), worker.device)


def test_links_between_processes(pool: ProcessPool) -> None:
    (one, two) = pool.run(link_of, world=2)
    assert [size for size, _ in one] == [64, 2**26] and all(seconds > 0 for _, seconds in one)
    assert one == two
    assert pool.run(link_of, world=1) == [None]


def test_a_link_without_a_rate_is_refused(pool: ProcessPool) -> None:
    """As where noise makes the longer message the faster one: a plan would divide by nothing."""
    assert pool.run(reversed_link, world=2) == ["64 bytes between processes took no longer than 67108864"] * 2


def reversed_link(worker: Worker) -> str:
    with pytest.raises(UserError, match="run it again") as refused:
        measure_link((2**26, 64), worker.device)
    return str(refused.value).removeprefix("bench rates: ").partition(",")[0]


@pytest.mark.parametrize("short", sorted(built_in()))
def test_own_rates_come_first(short: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the package's short name and by the GPU's own, also where the two differ, as those of the H100 do."""
    monkeypatch.setenv("MTRAINING_CACHE", str(tmp_path))
    shipped, given = rates_of(short), json.loads(built_in()[short].read_text())
    own_path(shipped.gpu).write_text(json.dumps(given | {"matmul_tflops": 600}))
    assert rates_of(short).matmul_tflops == 600 != shipped.matmul_tflops
    assert rates_of(slug(shipped.gpu)).matmul_tflops == 600
    found = rates_of_device(shipped.gpu)
    assert found is not None and found.matmul_tflops == 600


def test_options(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[Any] = []
    monkeypatch.setattr(rates_run, "start", lambda *given: started.append(given) or 0)
    assert bench(RatesOptions(device="cpu", nproc=3, head_dim=(64, 128))) == 0
    assert started == [
        ("mtraining.bench.rates", ["--head-dim=64", "--head-dim=128", "--device=cpu", "--nproc=3"], 3, False)
    ]
    assert rates_run.main(["--device=tpu"]) == 2


def command_of(worker: Worker, out: Path) -> list[str]:
    told: list[str] = []
    try:
        rates_run.run(worker.device, RatesOptions(out=out, seconds=0.01), told.append)
    except UserError as noise:  # a machine so busy that more work took less time
        dist.barrier()
        return [str(noise)]
    return told


@pytest.mark.slow
def test_the_command(pool: ProcessPool, tmp_path: Path) -> None:
    """Two processes on this CPU write a file in which every number is there and positive."""
    path = tmp_path / "new" / "rates.json"
    told, silent = pool.run(command_of, world=2, out=path)
    if "bench rates: " in told[-1]:
        pytest.skip(told[-1])
    assert told[-1] == f"wrote {path}" and silent == []
    rates = read_rates(path)
    assert rates.matmul_tflops > 0 and rates.memory_gb_per_s > 0 and rates.estimate_ns > 0
    # One whose products alone seem to take longer, on a busy machine, is left out.
    assert set(rates.logit_ps) == set(rates.around_gb_per_s) <= {"none", "compile"}
    assert rates.intra is not None and rates.inter is None and rates.host_gb_per_s is None
    assert 16 in rates.attention and "bench rates" in rates.sources["all"]
