"""Patterns by layer and head, and the tables that hold them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from distributed import ProcessPool, Worker
from mtraining.errors import UserError
from mtraining.kernel import SparseIndex
from mtraining.layout import build_layout
from mtraining.pattern import (
    AShape,
    Dense,
    Pattern,
    PerHead,
    SequenceShard,
    ToeplitzRandom,
    VerticalSlash,
    build_pattern,
    load_table,
)
from mtraining.pattern.table import describe
from mtraining.ring import Ring, sparse_ring_attention

SMALL: dict[str, Any] = {"block_size": 8, "probe": 20, "sinks": 2, "window": 3}
TOKEN = VerticalSlash(**SMALL, top_p=None, top_k_columns=5, top_k_slashes=6)
BLOCK = VerticalSlash(**SMALL, top_p=None, top_k_columns=9, slash_by="block", slash_density=0.4)
SPREAD = VerticalSlash(**SMALL | {"probe_at": "spread"}, top_p=0.6)
RANDOM = ToeplitzRandom(block_size=8, density=0.4, window=1, columns=12)
LISTED = build_pattern("moba", block_size=8, chunk=16, top_k=2)
MIXED = (TOKEN, Dense(block_size=8), BLOCK, LISTED, TOKEN, SPREAD)


def mask_by_head(heads: tuple[Pattern, ...], q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """Each head's mask as its own pattern alone gives it: bool (batch, q_heads, n, n)."""
    n, group = q.shape[1], q.shape[2] // k.shape[2]
    masks = []
    for head, pattern in enumerate(heads):
        one = q[:, :, head : head + 1], k[:, :, head // group : head // group + 1]
        masks.append(pattern.estimate(*one, SequenceShard.whole(n), 0.25).to_mask())
    return torch.cat(masks, 1)


def qkv(seed: int = 3) -> list[torch.Tensor]:
    torch.manual_seed(seed)
    return [torch.randn(2, 128, heads, 16, dtype=torch.float64) * 2 for heads in (6, 3, 3)]


def test_each_head_gets_its_own_pattern() -> None:
    q, k, _ = qkv()
    index = PerHead(block_size=8, heads=MIXED).estimate(q, k, SequenceShard.whole(128), 0.25)
    assert torch.equal(index.to_mask(), mask_by_head(MIXED, q, k))


def test_heads_that_share_a_probe_are_estimated_once(monkeypatch: pytest.MonkeyPatch) -> None:
    import mtraining.pattern.vertical_slash as module

    calls = []
    real = module.column_and_slash_mass
    monkeypatch.setattr(module, "column_and_slash_mass", lambda *a, **o: calls.append(1) or real(*a, **o))
    q, k, _ = qkv()
    PerHead(block_size=8, heads=(TOKEN, BLOCK, TOKEN, BLOCK, BLOCK, TOKEN)).estimate(
        q, k, SequenceShard.whole(128), 0.25
    )
    assert len(calls) == 1


def ring_job(worker: Worker, layout: str, topology: tuple[int, ...]) -> tuple[SparseIndex, torch.Tensor]:
    mesh = worker.ring_mesh(topology)
    ring, dealt = Ring.over(mesh), build_layout(layout, 8)
    q, k, v = (dealt.shard(x, ring.rank, ring.world) for x in qkv())
    pattern = PerHead(block_size=8, heads=MIXED)
    out, index = sparse_ring_attention(q, k, v, pattern=pattern, layout=dealt, mesh=mesh, return_index=True)
    return index, dealt.unshard(list(ring.all_gather(out)))


@pytest.mark.parametrize("layout", ["contiguous", "zigzag", "striped"])
@pytest.mark.parametrize("topology", [(2,), (2, 2)], ids=str)
def test_attention_on_a_ring_equals_dense_under_the_mask(
    pool: ProcessPool, layout: str, topology: tuple[int, ...]
) -> None:
    q, k, v = qkv()
    mask = mask_by_head(MIXED, q, k)
    scores = q.transpose(1, 2) @ k.repeat_interleave(2, 2).permute(0, 2, 3, 1) / 4
    prob = scores.masked_fill(~mask, -torch.inf).softmax(-1)
    expected = (prob @ v.repeat_interleave(2, 2).transpose(1, 2)).transpose(1, 2)
    for index, out in pool.run(ring_job, world=math.prod(topology), layout=layout, topology=topology):
        assert torch.equal(index.to_mask(), mask)
        torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-10)


def write(path: Path, content: Any) -> Path:
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def test_our_own_table(tmp_path: Path) -> None:
    table = write(
        tmp_path / "t.yaml",
        """
about: {tokens: 4096}
patterns:
  a: {name: vertical_slash, top_p: null, top_k_columns: 50, slash_by: block, slash_density: 0.1}
  b: {name: dense}
layers:
  - b
  - [a, a, b, a]
""",
    )
    first, second = load_table(table, probe=32, block_size=64)
    a = VerticalSlash(
        block_size=64, top_p=None, top_k_columns=50, slash_by="block", slash_density=0.1, probe=32
    )
    assert first == Dense(block_size=64)
    assert second == PerHead(block_size=64, heads=(a, a, Dense(block_size=64), a))


def test_the_published_minference_form(tmp_path: Path) -> None:
    table = write(
        tmp_path / "Qwen2.5_3B.json",
        [
            {"0": ["vertical_and_slash", 1000, 6096, 4.0], "1": ["stream_llm", 100, 800, 1.0]},
            {"1": ["vertical_and_slash", 500, 700, 2.0], "0": ["vertical_and_slash", 10, 50, 2.0]},
        ],
    )
    layers = load_table(table, slash_by="block", max_columns=2048, probe_at="spread")

    def head(columns: int, slashes: int) -> VerticalSlash:
        return VerticalSlash(
            top_p=None,
            top_k_columns=columns,
            top_k_slashes=slashes,
            slash_by="token",
            probe_at="spread",
        )

    assert layers[0] == PerHead(heads=(head(1000, 6096), AShape(sinks=100, window=800)))
    assert layers[1] == PerHead(heads=(head(30, 100), head(500, 700)))


def test_the_published_form_with_shares_of_mass(tmp_path: Path) -> None:
    """As in MTraining's own file for Qwen2.5-3B."""
    head = ["flex_vertical_and_slash", [0.95, 4096], [0.95, 2048], 0.0]
    table = write(tmp_path / "Qwen2.5_3B_flex_0.95.json", [{"0": head, "1": ["stream_llm", 4, 8, 1.0]}])
    (layer,) = load_table(table, probe=256, top_k_columns=7, top_p=None)
    flex = VerticalSlash(top_p=0.95, max_columns=4096, max_slashes=2048, slash_by="token", probe=256)
    assert layer == PerHead(heads=(flex, AShape(sinks=4, window=8)))


def test_a_stream_llm_head_is_sinks_and_window_alone(tmp_path: Path) -> None:
    table = write(tmp_path / "t.json", [{"0": ["stream_llm", 4, 8, 1.0]}])
    (layer,) = load_table(table, block_size=8)
    q, k, _ = qkv()
    index = layer.estimate(q[:, :, :1], k[:, :, :1], SequenceShard.whole(128), 0.25)
    assert index.columns[0, 0].tolist() == [0, 1, 2, 3]
    assert index.diagonals[0, 0].nonzero().flatten().tolist() == [0, 1]


@pytest.mark.parametrize("pattern", [TOKEN, BLOCK, SPREAD, RANDOM, Dense()], ids=lambda p: p.name)
def test_described_patterns_read_back(tmp_path: Path, pattern: Pattern) -> None:
    table = write(tmp_path / "t.json", {"patterns": {"x": describe(pattern)}, "layers": ["x"]})
    assert load_table(table) == [pattern]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "is not valid YAML"),
        ({"layers": []}, "has no 'patterns' and 'layers'"),
        ({"patterns": {}, "layers": []}, "has no layers"),
        ({"patterns": {}, "layers": [], "layer": []}, "unknown keys layer"),
        ({"patterns": {"a": {"name": "dens"}}, "layers": ["a"]}, "patterns.a: .*did you mean 'dense'"),
        ({"patterns": {"a": {"top_p": 1}}, "layers": ["a"]}, "patterns.a: .* is no pattern"),
        ({"patterns": {"a": {"name": "dense"}}, "layers": [["a", "b"]]}, "layer 0, head 1: 'b' is not among"),
        (
            [{"0": ["vertical_and_slash", 9, 9, 1]}, {"1": ["stream_llm", 9, 9, 1]}],
            "layer 1 is not a mapping",
        ),
        ([{"0": ["block_sparse", 100, 0, 1]}], "layer 0, head 0: 'block_sparse' is not supported"),
        ([{"0": ["stream_llm", 10, 0, 1]}], "layer 0, head 0: pattern.window: 0"),
        (
            [{"0": ["flex_vertical_and_slash", [0.95, 9], [0.9, 9], 1]}],
            "layer 0, head 0: a top_p of 0.95 .* and 0.9",
        ),
        (
            [{"0": ["flex_vertical_and_slash", 100, 100, 1]}],
            "layer 0, head 0: .* has no numbers of verticals",
        ),
        ([{"0": ["vertical_and_slash", [0.95, 9], 9, 1]}], "layer 0, head 0: .* has no numbers of verticals"),
        ([{"0": "dense"}], "layer 0, head 0: 'dense' is not"),
        ([{"first": ["stream_llm", 9, 9, 1]}], "layer 0 is not a mapping"),
        ({"patterns": ["dense"], "layers": ["dense"]}, "patterns: .* is not a mapping of names"),
        ({"patterns": {"a": {"name": "dense"}}, "layers": None}, "layers: None is not a list"),
        ({"patterns": {"a": {"name": "dense"}}, "layers": ["a", []]}, "layer 1 has no heads"),
        (
            {
                "patterns": {"a": {"name": "dense"}, "b": {"name": "dense", "block_size": 64}},
                "layers": [["a", "b"]],
            },
            "layer 0: pattern.block_size: head 1 has 64 and the layer 128",
        ),
    ],
)
def test_bad_tables_are_refused_by_place(tmp_path: Path, content: Any, words: str) -> None:
    with pytest.raises(UserError, match=words):
        load_table(write(tmp_path / "t.json", content))


def test_a_table_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read"):
        load_table(tmp_path / "none.yaml")


def test_heads_must_be_those_of_the_model() -> None:
    layer = PerHead(block_size=8, heads=(TOKEN, BLOCK))
    with pytest.raises(UserError, match="layer 3 has 2 heads there and 6 in the model"):
        layer.check_heads(3, 6)
    with pytest.raises(UserError, match="head 1 has 16 and the layer 8"):
        PerHead(block_size=8, heads=(TOKEN, Dense(block_size=16)))
