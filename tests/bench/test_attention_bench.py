"""The attention benchmark on a CPU: what it writes, and that nothing wrong gets a number."""

from __future__ import annotations

import csv
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from mtraining.bench import record
from mtraining.bench.attention import competitors as dense
from mtraining.bench.attention import run as attention
from mtraining.bench.attention.cases import PRESETS, Case, preset
from mtraining.bench.attention.gate import poisoned_memory, rows_mask
from mtraining.bench.attention.problem import build, useful_areas
from mtraining.bench.options import AttentionOptions
from mtraining.cli import app
from mtraining.errors import UserError
from mtraining.kernel import ReferenceBackend, select_backend
from mtraining.kernel.backend import QueryGradient
from mtraining.pattern import SequenceShard
from processes import run_command

CPU = torch.device("cpu")
CASE = Case(128, 4, 2, 16, 3, 12, estimate=True, block_size=16, dtype=torch.float32)
WANTED = (
    "date commit gpu torch triton backend pattern seq_len q_heads kv_heads head_dim blocks_per_row columns phase ms "
    "tflops dense_backend dense_tflops ratio index_mib peak_mib"
).split()


@pytest.fixture(autouse=True)
def known_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MTRAINING_COMMIT", "abc123")


def run(backend: Any = None, cases: tuple[Case, ...] = (CASE,), **options: Any) -> attention.BenchResult:
    if backend is not None:
        options["backend_of"] = lambda *args: backend
    return attention.run_attention_bench(cases, ["reference"], CPU, say=lambda text: None, **options)


def test_the_command_writes_the_csv(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["bench", "attention", "--preset", "tiny", "--out", str(tmp_path)])
    assert result.exit_code == 0, result.output
    (path,) = tmp_path.iterdir()
    assert path.name.startswith("attention-cpu-") and str(path) in result.output
    with path.open() as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == [*WANTED, "tiles", "warm_up_s", "sm_mhz"]
    ours = [row for row in rows if row["backend"] == "reference"]
    assert {row["phase"] for row in ours} >= {"estimate", "forward", "backward"}
    for row in rows:
        assert float(row["ms"]) > 0 and row["commit"] == "abc123"
    assert {row["tiles"] for row in ours} == {"tables"}
    whole = next(row for row in ours if row["phase"] == "forward" and row["columns"] == "24")
    assert float(whole["ratio"]) == pytest.approx(
        float(whole["tflops"]) / float(whole["dense_tflops"]), rel=1e-3
    )
    assert whole["dense_backend"] == "math" and whole["pattern"] == "toeplitz_random"
    problem = build(preset("tiny")[1], CPU, 1)
    flops = 4 * 16 * sum(float(area.sum()) for area in useful_areas(problem.index))
    assert float(whole["tflops"]) == pytest.approx(flops / float(whole["ms"]) / 1e9, rel=1e-3)
    backward = next(row for row in ours if row["phase"] == "backward" and row["columns"] == "24")
    assert float(backward["tflops"]) == pytest.approx(2.5 * flops / float(backward["ms"]) / 1e9, rel=1e-3)


def test_a_second_run_adds_to_the_file(tmp_path: Path) -> None:
    rows = run(competitors=()).rows
    first = record.write_csv(rows, tmp_path, "attention")
    assert record.write_csv(rows, tmp_path, "attention") == first
    assert len(first.read_text().splitlines()) == 1 + 2 * len(rows)


def test_a_file_of_other_columns_is_left_alone(tmp_path: Path) -> None:
    rows = run(competitors=()).rows
    first = record.write_csv(rows, tmp_path, "attention")
    old = "date,commit\n2026-01-01,abc\n"
    first.write_text(old)
    second = record.write_csv(rows, tmp_path, "attention")
    assert second.name == f"{first.stem}-2.csv" and record.write_csv(rows, tmp_path, "attention") == second
    assert first.read_text() == old
    with pytest.raises(UserError, match="has other columns"), record.appended(first, ["date"]):
        pass
    assert first.read_text() == old


class Broken(ReferenceBackend):
    """One result off by a little: ``spoil`` says which."""

    name = "broken"

    def __init__(self, spoil: str) -> None:
        self.spoil = spoil

    def tiles_forward(self, *args: Any, **options: Any) -> tuple[Tensor, Tensor]:
        out, lse = super().tiles_forward(*args, **options)
        if self.spoil == "out":
            out[:, -1] *= 1.01
        if self.spoil == "unwritten":
            out[:, -1] = torch.empty(out.shape[2:])
        return out, lse + 1e-3 if self.spoil == "lse" else lse

    def tiles_backward(self, *args: Any) -> tuple[Tensor, QueryGradient]:
        dkv, query_gradient = super().tiles_backward(*args)
        for name, grad in (("dk", dkv[0]), ("dv", dkv[1])):
            grad *= 1.001 if self.spoil == name else 1.0

        def spoiled(*args: Any, **options: Any) -> Tensor:
            return query_gradient(*args, **options) * (1.001 if self.spoil == "dq" else 1.0)

        return dkv, spoiled

    def scatter_columns(self, *args: Any) -> None:
        if self.spoil != "columns":
            super().scatter_columns(*args)


@pytest.mark.parametrize("spoil", ["out", "lse", "dq", "dk", "dv", "columns", "unwritten"])
def test_a_wrong_kernel_gets_no_number(spoil: str) -> None:
    result = run(Broken(spoil), competitors=())
    assert (
        result.rows == []
        and len(result.failures) == 1
        and result.failures[0].startswith("broken, 128 tokens")
    )


@pytest.mark.parametrize("spoil", ["out", "dq", "dk", "dv", "columns"])
def test_a_kernel_wrong_at_full_size_only_gets_no_number(monkeypatch: pytest.MonkeyPatch, spoil: str) -> None:
    """The whole comparison sees short sequences; sampled rows and keys must catch the rest."""
    monkeypatch.setattr(attention.gate, "check_whole", lambda layer: None)
    result = run(Broken(spoil), competitors=())
    assert result.rows == [] and "sampled" in result.failures[0]


def test_a_right_kernel_passes_and_a_crash_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(Broken("nothing"), competitors=()).failures == []

    class Crashing(ReferenceBackend):
        def columns_backward(self, *args: Any) -> Tensor:
            raise RuntimeError("no such kernel image")

    kept: list[int] = []
    result = run(
        Crashing(), (CASE, replace(CASE, columns=0)), competitors=(), keep=lambda r: kept.append(len(r))
    )
    assert "no such kernel image" in result.failures[0]
    assert kept[0] == 0 and kept[1] > 0  # the case without columns was still measured


def test_a_wrong_dense_competitor_gets_no_number(monkeypatch: pytest.MonkeyPatch) -> None:
    real = dense._attention
    monkeypatch.setattr(dense, "_attention", lambda name, p: lambda *qkv: real(name, p)(*qkv) * 1.01)
    result = run(competitors=("math",))
    assert any("math" in text and "sampled" in text for text in result.failures)
    assert all(row.dense_backend is None for row in result.rows)


def test_a_refusing_backend_is_noted_not_replaced() -> None:
    result = attention.run_attention_bench(
        [CASE], ["flash4"], CPU, competitors=(), backend_of=select_backend, say=lambda text: None
    )
    assert result.rows == [] and "flash4" in result.notes[0] and "needs an NVIDIA GPU" in result.notes[0]


def test_flex_gets_the_same_blocks() -> None:
    p = build(Case(1024, 2, 1, 16, 3, block_size=128, dtype=torch.float32), CPU, 1)
    blocks = torch.arange(8)
    tiles = p.index.tile_mask(blocks, blocks)
    mask = dense.same_blocks(p)
    assert not torch.equal(tiles[0, 0], tiles[0, 1])
    assert torch.equal(mask.to_dense().bool(), tiles)
    assert mask.kv_num_blocks.tolist() == [[[1] * 8] * 2]  # only the diagonal tile needs the mask
    assert int(mask.full_kv_num_blocks.sum()) == int(tiles.sum()) - 16


def test_useful_area_counts_each_entry_once() -> None:
    p = build(CASE, CPU, 1)
    slash, columns = useful_areas(p.index)
    covered = torch.stack([rows_mask(p.index, head, torch.arange(128)) for head in range(4)]).sum((-2, -1))
    without = replace(p.index, columns=p.index.columns[..., :0])
    tiles = torch.stack([rows_mask(without, head, torch.arange(128)) for head in range(4)]).sum((-2, -1))
    assert torch.equal(columns[0].long(), covered - tiles)
    upper_halves = p.index.diagonals[0, :, 0] * 8 * (16 * 15 // 2)
    assert torch.equal(slash[0].long(), tiles + upper_halves)


BOUNDED = [
    {"documents": 5},
    {"window": 37},
    {"documents": 3, "window": 16},
    {"window": 1},
    {"documents": 128},
]


@pytest.mark.parametrize("bounds", BOUNDED, ids=str)
def test_useful_area_counts_entries_from_the_starts_on(bounds: dict[str, Any]) -> None:
    p = build(replace(CASE, **bounds), CPU, 1)
    starts, token = p.index.starts, torch.arange(128)
    assert starts is not None
    tiles = p.index.diagonals[0][:, (token[:, None] // 16 - token // 16).clamp(min=0)]
    # Tiles whole, also above the diagonal of the one on it.
    tiles = tiles & (token[:, None] // 16 >= token // 16) & (token >= starts[0, :, None])
    covered = torch.stack([rows_mask(p.index, head, token) for head in range(4)])
    assert torch.equal(covered, p.index.to_mask()[0])
    slash, columns = useful_areas(p.index)
    assert slash[0].tolist() == tiles.sum((1, 2)).tolist()
    assert columns[0].tolist() == (covered & ~tiles).sum((1, 2)).tolist()


@pytest.mark.parametrize("bounds", BOUNDED[:3], ids=str)
def test_documents_and_windows_are_gated_and_timed(bounds: dict[str, Any]) -> None:
    """The gate has the starts, so a kernel that leaves them out gets no number."""
    case = replace(CASE, estimate=False, **bounds)
    result = run(cases=(case,), competitors=("math",))
    assert result.failures == []
    assert {row.pattern for row in result.rows} == {case.name()}
    assert any("math: not run" in note for note in result.notes)

    class Forgetful(ReferenceBackend):
        name = "forgetful"

        def tiles_forward(
            self, q: Tensor, k: Tensor, v: Tensor, index: Any, *args: Any, **options: Any
        ) -> Any:
            return super().tiles_forward(q, k, v, replace(index, starts=None), *args, **options)

    wrong = run(Forgetful(), (case,), competitors=())
    assert wrong.rows == [] and "forgetful" in wrong.failures[0]


def test_growth_compares_time_a_token() -> None:
    row = run(competitors=()).rows[0]
    longer = replace(row, seq_len=row.seq_len * 4, ms=row.ms * 6)
    (line,) = attention.growth([longer, row])
    assert line.endswith("time a token relative to 128 tokens: 128: 1.00, 512: 1.50")


def test_growth_compares_cycles_where_the_clock_is_known() -> None:
    row = replace(run(competitors=()).rows[0], sm_mhz=1800.0)
    longer = replace(row, seq_len=row.seq_len * 4, ms=row.ms * 4.8, sm_mhz=1500.0)
    time, cycles = attention.growth([longer, row])
    assert time.endswith("128: 1.00, 512: 1.20")
    assert cycles.endswith("cycles a token relative to 128 tokens: 128: 1.00, 512: 1.00")
    assert len(attention.growth([longer, replace(row, sm_mhz=None)])) == 1


def test_poison_is_seen_and_ends() -> None:
    with poisoned_memory():
        assert torch.empty(3).isnan().all()
    assert not hasattr(torch.empty, "__wrapped__") and torch.empty.__name__ == "empty"


def test_bad_names_are_refused() -> None:
    with pytest.raises(
        UserError, match=r"preset: 'huge' is not known; choose one of targets, quick, growth, dense, tiny"
    ):
        preset("huge")
    with pytest.raises(
        UserError, match=r"max-seq-len: 1000 leaves nothing of preset targets; use at least 32768"
    ):
        preset("targets", 1000)
    with pytest.raises(UserError, match=r"window: 0 holds no token; use at least 1"):
        preset("tiny", window=0)
    with pytest.raises(UserError, match=r"documents: -1 cannot be packed; use 0 for none"):
        preset("tiny", documents=-1)
    with pytest.raises(UserError, match=r"dense: 'fa9' is not known"):
        run(competitors=("fa9",))
    with pytest.raises(UserError, match=r"warm-up: -1 seconds cannot be; use 0 or more"):
        attention.bench(AttentionOptions(preset="tiny", device="cpu", out=Path("unused"), warm_up=-1))


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_can_be_prescribed(name: str) -> None:
    for case in preset(name):
        for length in (case.seq_len, min(case.seq_len, attention.SMALL)):
            shape = torch.empty(1, 1, 1, 1).expand(1, 1, case.q_heads, 4)
            short = replace(case.shortened(length), q_heads=1, columns=min(case.columns, 64))
            index = short.pattern().estimate(shape[:, :, :1], shape, SequenceShard.whole(length), 1.0)
            if length == case.seq_len and case.blocks_per_row is not None:
                tiles = (
                    index.diagonals * torch.arange(index.num_blocks, 0, -1)
                ).sum().item() / index.num_blocks
                assert tiles == pytest.approx(case.blocks_per_row, rel=0.02)


def test_the_commit_is_known_without_git(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert record.code_version() == "abc123"
    monkeypatch.delenv("MTRAINING_COMMIT")

    def no_git(*args: Any, **options: Any) -> None:
        raise FileNotFoundError("git")

    monkeypatch.setattr(subprocess, "run", no_git)
    assert record.code_version().startswith("v")

    def not_installed(name: str) -> str:
        raise record.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(record.metadata, "version", not_installed)
    with pytest.raises(UserError, match="MTRAINING_COMMIT: there is no git repository here"):
        record.code_version()


def test_it_runs_without_the_packages_of_the_command_line() -> None:
    code = (
        "import sys\n"
        "for name in ('typer', 'rich', 'pydantic', 'datasets', 'transformers'): sys.modules[name] = None\n"
        "from mtraining.bench.attention.run import main\n"
        "sys.exit(main(['--preset', 'nothing']))"
    )
    assert "preset: 'nothing' is not known" in run_command([sys.executable, "-c", code], code=2).stderr
