"""The benchmarks of packed sequences: padding against sequences that are counted out, and steps on a CPU."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from mtraining.data import PrepareOptions, prepare


@pytest.mark.parametrize(
    ("align", "sequences"),
    [
        (1, 3),  # the full window of 26; its tail of 10 and 6; 5, 5 and 3
        (8, 4),  # the tail takes all 16; 6 and 5 take 8 each, as do 5 and 3
        (16, 6),
    ],
)
def test_padding_counts_sequences(align: int, sequences: int, script: Callable[[str], ModuleType]) -> None:
    found, share = script("packing_padding").padding(np.array([26, 5, 5, 6, 3]), 16, align, 100)
    assert found == sequences and share == 1 - 45 / (sequences * 16)


def test_padding_of_a_prepared_folder(tmp_path: Path, script: Callable[[str], ModuleType]) -> None:
    for number, length in enumerate((10, 100, 1000)):
        (tmp_path / f"{number}.txt").write_text("x" * length)
    prepare(PrepareOptions(sources=(str(tmp_path),), out=tmp_path / "data", kind="text"), progress=False)
    options = ["--out", str(tmp_path / "out.csv"), "--seq-len", "256", "--sequences", "50"]
    script("packing_padding").main([f"some={tmp_path / 'data'}", f"more={tmp_path / 'data'}", *options])
    with open(tmp_path / "out.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 3 * 3 * 4 and {row["corpus"] for row in rows} == {"some", "more", "all"}
    exact = [row for row in rows if row["align"] == "1" and row["look_ahead"] == "1024"]
    assert all(0 <= float(row["padding"]) < 0.05 for row in exact)


@pytest.mark.slow
def test_packed_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: Callable[[str], ModuleType]
) -> None:
    bench = script("packed_steps")
    given: list[dict[str, Any]] = []
    plain = bench.packed_batches

    def kept(*args: Any) -> Any:
        batch = next(plain(*args))
        given.append(batch)
        while True:
            yield batch

    monkeypatch.setattr(bench, "packed_batches", kept)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    options = ["--shape", "tiny", "--layers", "1", "--seq-len", "512", "--density", "0.2", "--steps", "1"]
    try:
        bench.main(["--out", str(tmp_path / "out.csv"), *options])
    finally:
        dist.destroy_process_group()
    with open(tmp_path / "out.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["case"], row["equal"]) for row in rows] == [
        ("one document", "density"),
        ("packed", "density"),
        ("packed", "area"),
        ("packed, whole blocks", "density"),
        ("packed, whole blocks", "area"),
    ]
    assert "starts" not in given[0]
    for batch in given[1:]:
        first = batch["position_ids"] == 0
        assert torch.equal(batch["position_ids"], torch.arange(512) - batch["starts"])
        assert (batch["labels"][:, :-1][first[:, 1:]] == -100).all() and batch["labels"][0, -1] == -100
    assert (given[3]["starts"] % 16 == 0).all() and (given[1]["starts"] % 16 != 0).any()
