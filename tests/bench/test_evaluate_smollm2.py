"""The benchmark of a real model: what it plans, what it prints, and that it ends in time and goes on."""

from __future__ import annotations

import csv
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

from mtraining.data.tokenizer import save_byte_tokenizer


@pytest.fixture
def bench(script: Callable[[str], ModuleType]) -> ModuleType:
    return script("evaluate_smollm2")


def row(bench: ModuleType, task: str, length: int, attention: str, value: float) -> Any:
    about = {"date": "", "commit": "", "gpu": "", "torch": "", "triton": "", "model": "m"}
    return bench.Row(**about, attention=attention, suite="ruler", task=task, length=length, samples=1,
                     measure="score", value=value, density=None, recall=None)  # fmt: skip


def test_dense_stands_beside_sparse(bench: ModuleType) -> None:
    rows = [
        row(bench, "vt", 1024, "dense", 50.0),
        row(bench, "vt", 1024, "s", 25.0),
        row(bench, "vt", 2048, "s", 5.0),
    ]
    assert bench.side_by_side(rows, ["dense", "s"]) == (
        "| | 1K | 2K |\n|---|---|---|\n| ruler vt | 50.0 / 25.0 | - / 5.0 |"
    )


@pytest.mark.slow
def test_a_run_ends_in_time_and_goes_on(
    bench: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=260, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=3072,
    )  # fmt: skip
    Qwen2ForCausalLM(config).save_pretrained(tmp_path / "model")
    save_byte_tokenizer(tmp_path / "model")
    assert AutoTokenizer.from_pretrained(tmp_path / "model").eos_token_id is not None
    (tmp_path / "book.txt").write_text("The rain went on and on. " * 400)
    book, folder = str(tmp_path / "book.txt"), tmp_path / "results"
    monkeypatch.setattr(bench, "MODEL", str(tmp_path / "model"))
    asked = ["evaluate_smollm2.py", "--text", book, "--essays", book, "--lengths", "3000", "--beyond", "4000"]
    asked += ["--samples", "1", "--beyond-samples", "1", "--attention", "dense", "--folder", str(folder)]
    asked += ["--out", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", [*asked, "--plan"])
    assert bench.main() == 0
    told = capsys.readouterr().out
    # Three of needle, eleven of RULER and five of InfiniteBench; the longest answers have 128 tokens.
    assert "within its positions, for each attention: 19 prompts of 57000 tokens, 127 forwards" in told
    assert "math_calc, for each attention: 1 prompts of 3000 tokens" in told
    monkeypatch.setattr(sys, "argv", [*asked, "--minutes", "0", "--batch", "16"])
    assert bench.main() == 75
    assert "0 minutes are over" in capsys.readouterr().out and not (tmp_path / "out").exists()
    assert len((folder / "results.jsonl").read_text().splitlines()) == 16
    monkeypatch.setattr(sys, "argv", asked)
    assert bench.main() == 0
    lines = (folder / "results.jsonl").read_text().splitlines()
    assert len(lines) == 19 + 19 + 4 + 1
    (needles,) = (tmp_path / "out").glob("needle-smollm2-*.csv")
    (scores,) = (tmp_path / "out").glob("evaluate-smollm2-*.csv")
    with open(scores, newline="", encoding="utf-8") as file:
        found = {(one["task"], one["length"]): one for one in csv.DictReader(file)}
    assert (
        ("vt", "4000") in found and ("math_calc", "3000") in found and found["recall", "3000"]["value"] == "1"
    )
    assert "needle_words,3000" in needles.read_text()
