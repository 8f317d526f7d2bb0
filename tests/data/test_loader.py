"""The order of batches: a function of seed and step only."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from mtraining.data import ReaderDied, SequenceDataset, TokenShards, build_loader, loader, read, step_plan
from mtraining.errors import UserError
from mtraining.layout import build_layout
from processes import started, wait_for


@pytest.fixture
def dataset(make_shards: Callable[..., TokenShards]) -> SequenceDataset:
    # 22 windows, each told by its first token: not a multiple of any batch below
    return SequenceDataset(make_shards({"d": "".join(chr(40 + n) * 16 for n in range(22))}), 16, seed=5)


def firsts(batches: Iterator[dict[str, torch.Tensor]]) -> list[list[int]]:
    return [batch["input_ids"][:, 0].tolist() for batch in batches]


def steps(dataset: SequenceDataset, count: int, **options: Any) -> list[list[int]]:
    return firsts(islice(iter(build_loader(dataset, global_batch=8, **options)), count))


def test_epochs_visit_every_window_once_and_differ(dataset: SequenceDataset) -> None:
    seen = [first for batch in steps(dataset, 11) for first in batch]  # 88 samples are four epochs
    epochs = [seen[start : start + 22] for start in range(0, 88, 22)]
    assert all(sorted(epoch) == list(range(40, 62)) for epoch in epochs)
    assert len(set(map(tuple, epochs))) == 4


@pytest.mark.parametrize("dp_size", [2, 4, 8])
@pytest.mark.parametrize("micro_batch", [None, 1])
def test_any_split_gives_the_same_global_batches(
    dataset: SequenceDataset, dp_size: int, micro_batch: int | None
) -> None:
    pieces = 1 if micro_batch is None else 8 // dp_size
    ranks = [
        steps(dataset, 9 * pieces, dp_rank=rank, dp_size=dp_size, micro_batch=micro_batch)
        for rank in range(dp_size)
    ]
    joined = [
        [first for rank in ranks for piece in rank[step * pieces : (step + 1) * pieces] for first in piece]
        for step in range(9)
    ]
    assert joined == steps(dataset, 9)


def test_resume_at_any_step(dataset: SequenceDataset) -> None:
    whole = steps(dataset, 10)
    for start in range(10):
        assert steps(dataset, 100, start_step=start, steps=10) == whole[start:]


def test_cp_ranks_read_the_same_windows(dataset: SequenceDataset) -> None:
    layout = build_layout("striped", unit=4)
    parts = [
        SequenceDataset(dataset.sources, 16, seed=5, layout=layout, cp_rank=rank, cp_size=2)
        for rank in (0, 1)
    ]
    for whole, *dealt in islice(
        zip(*(build_loader(ds, global_batch=4) for ds in (dataset, *parts)), strict=True), 8
    ):
        for key in whole:
            assert dealt[0][key].shape == (4, 8)
            assert torch.equal(layout.unshard([part[key] for part in dealt]), whole[key])


def test_worker_processes_change_nothing(dataset: SequenceDataset) -> None:
    """And they are in process groups of their own, out of reach of signals to the run's."""
    batches = iter(build_loader(dataset, global_batch=8, steps=5, num_workers=1, prefetch=3))
    found = firsts(islice(batches, 1))
    workers = [
        process.pid for process in multiprocessing.active_children() if os.getpgid(process.pid) == process.pid
    ]
    assert len(workers) == 1
    assert found + firsts(batches) == steps(dataset, 5)


def test_a_steps_plan_names_the_batch(dataset: SequenceDataset) -> None:
    for step in (0, 2, 7):
        windows = step_plan(dataset, step, global_batch=8, dp_size=2).windows[1]
        assert [40 + window for window in windows] == steps(dataset, 1, start_step=step)[0][4:]
    assert dataset.describe(windows[0]) == f"document 'd', tokens {16 * windows[0]}..{16 * windows[0] + 16}"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"global_batch": 6, "dp_size": 4},
            "global_batch 6 cannot be divided over 4 .* nearest that can is 8",
        ),
        ({"global_batch": 1, "dp_size": 4}, "nearest that can is 4"),
        ({"global_batch": 0}, "global_batch 0"),
        ({"global_batch": 8, "micro_batch": 3}, "micro_batch 3 does not divide the 8 sequences"),
        ({"global_batch": 8, "dp_rank": 2, "dp_size": 2}, "dp_rank is 2"),
    ],
)
def test_bad_batches_are_refused(dataset: SequenceDataset, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        build_loader(dataset, **options)


CHILDREN = """
import multiprocessing, os, sys, time
from mtraining.data.loader import _apart


def read(late):
    print("started", flush=True)
    while late and os.getppid() == int(sys.argv[1]):
        time.sleep(0.01)
    _apart(0)
    time.sleep(600)


if __name__ == "__main__":
    sys.argv.append(str(os.getpid()))
    context = multiprocessing.get_context("spawn")
    for late in (False, True):
        context.Process(target=read, args=(late,)).start()
    time.sleep(600)
"""


def test_a_reading_process_ends_with_the_one_it_reads_for(tmp_path: Path) -> None:
    """Also where that one died while the reading process was still starting."""
    script = tmp_path / "children.py"
    script.write_text(CHILDREN, encoding="utf-8")
    with started([sys.executable, script]) as parent:
        wait_for(lambda: parent.so_far().stdout.count("started") == 2, alive=[parent])
        readers = parent.descendants()
        assert len(readers) == 3  # and the helper that tracks semaphores
        parent.signal(signal.SIGKILL)
        try:
            wait_for(lambda: all(reader.gone() for reader in readers), 60)
        finally:
            for reader in readers:
                if not reader.gone():
                    os.kill(reader.pid, signal.SIGKILL)


def test_a_killed_reading_process_is_found_when_its_batch_is_waited_for(dataset: SequenceDataset) -> None:
    """Not in the midst of whatever the main thread is doing, as by PyTorch's signal handler."""
    batches = read(build_loader(dataset, global_batch=8, num_workers=1, prefetch=2))
    next(batches)
    assert signal.getsignal(signal.SIGCHLD) == signal.SIG_DFL
    worker = next(each for each in multiprocessing.active_children() if os.getpgid(each.pid) == each.pid)
    os.kill(worker.pid, signal.SIGKILL)
    worker.join()
    with pytest.raises(
        ReaderDied, match=rf"\(process {worker.pid}\) was killed by SIGKILL, as the system does"
    ):
        firsts(batches)


@pytest.mark.parametrize("error", [ConnectionResetError, EOFError, FileNotFoundError])
def test_a_process_killed_while_it_hands_a_batch_over_is_told_alike(
    dataset: SequenceDataset, error: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The connection breaks before the end of the process is known."""
    batches = read(build_loader(dataset, global_batch=8, num_workers=1, prefetch=2))
    next(batches)
    worker = next(each for each in multiprocessing.active_children() if os.getpgid(each.pid) == each.pid)

    def broken(loader: Any) -> Any:
        os.kill(worker.pid, signal.SIGKILL)
        raise error

    monkeypatch.setattr(_MultiProcessingDataLoaderIter, "_next_data", broken)
    with pytest.raises(ReaderDied, match=rf"\(process {worker.pid}\) was killed by SIGKILL"):
        next(batches)


@pytest.mark.parametrize("error", [RuntimeError, OSError])
def test_an_error_of_a_reading_process_stays_itself(
    dataset: SequenceDataset, error: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loader, "_END_SECONDS", 0.1)
    dataset.__class__ = BrokenDataset
    dataset.error = error  # type: ignore[attr-defined]
    with pytest.raises(error, match="broken on purpose"):
        next(read(build_loader(dataset, global_batch=8, num_workers=1)))


class BrokenDataset(SequenceDataset):
    error: type[Exception]

    def __getitem__(self, window: int) -> dict[str, torch.Tensor]:
        raise self.error("broken on purpose")
