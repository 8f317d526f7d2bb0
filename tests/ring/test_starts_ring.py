"""Starts on the ring: documents and windows in every layout and topology equal a masked softmax in fp64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import mtraining
from distributed import ProcessPool, Worker
from mtraining.kernel import Chunks
from mtraining.layout import build_layout
from mtraining.pattern import build_pattern
from mtraining.ring import AttentionRuntime, BatchStarts, IndexTape, Ring
from starts_cases import STARTS, allowed, masked_attention, of_window

LARGE = [
    pytest.param((4,), marks=pytest.mark.slow),
    *(pytest.param(sizes, marks=[pytest.mark.slow, pytest.mark.sweep]) for sizes in ((8,), (2, 4), (4, 2))),
]
TOPOLOGIES = [(1,), (2,), (2, 2), *LARGE]
SIZE, TOKENS = 8, 128
PATTERNS: dict[str, tuple[str, dict[str, Any]]] = {
    "dense": ("dense", {}),
    "toeplitz": ("toeplitz_random", {"density": 0.5, "window": 2, "columns": 9}),
    "lists": ("moba", {"chunk": 16, "top_k": 4}),
    "columns": (
        "vertical_slash",
        {"top_p": 0.6, "max_columns": 11, "max_slashes": 9, "sinks": 3, "window": 5},
    ),
}


def tensors(heads: int = 4, kv_heads: int = 2, dim: int = 16) -> list[Tensor]:
    """q, k, v and dout of the whole sequence, the same on every rank."""
    generator = torch.Generator().manual_seed(11)
    return [
        torch.randn(2, TOKENS, count, dim, generator=generator, dtype=torch.float64)
        for count in (heads, kv_heads, kv_heads, heads)
    ]


def starts_job(worker: Worker, case: dict[str, Any]) -> tuple[list[Tensor], Any, int]:
    """This rank's [out, dq, dk, dv]; the whole index; the rank in the ring."""
    topology = case["topology"]
    mesh = None if math.prod(topology) == 1 else worker.ring_mesh(topology)
    layout, rank = build_layout(case["layout"], SIZE), Ring.over(mesh).rank
    q, k, v, dout = (layout.shard(x, rank, worker.world) for x in tensors())
    for x in (q, k, v):
        x.requires_grad_()
    name, options = PATTERNS[case["pattern"]]
    out, index = mtraining.sparse_ring_attention(
        q, k, v, pattern=build_pattern(name, block_size=SIZE, **options), layout=layout, mesh=mesh,
        return_index=True, kernel="reference", starts=case["starts"], window=case["window"],
    )  # fmt: skip
    out.backward(dout)
    return [x.detach() for x in (out, q.grad, k.grad, v.grad)], index, rank  # type: ignore[union-attr]


def bounds(starts: Tensor | None, window: int | Chunks | None) -> Tensor:
    """The first key of every query, counted one by one: int32 (2, TOKENS)."""
    rows = torch.zeros(2, TOKENS, dtype=torch.int32) if starts is None else starts.clone()
    for row in rows:
        for q, begin in enumerate(row.tolist()):
            if isinstance(window, Chunks):
                row[q] = max(key for key in range(begin, q + 1) if (key - begin) % window.tokens == 0)
            elif window is not None:
                row[q] = max(begin, q - window + 1)
    return rows


def check(pool: ProcessPool, **case: Any) -> None:
    starts, window = case["starts"], case["window"]
    results = sorted(pool.run(starts_job, world=math.prod(case["topology"]), case=case), key=lambda r: r[2])
    index = results[0][1]
    mask = index.to_mask() & allowed(bounds(starts, window))
    layout = build_layout(case["layout"], SIZE)
    got = [layout.unshard([tensors[i] for tensors, _, _ in results]) for i in range(4)]
    q, k, v, dout = tensors()
    for x in (q, k, v):
        x.requires_grad_()
    out, _ = masked_attention(q, k, v, mask)
    want = [out, *torch.autograd.grad(out, (q, k, v), dout)]
    for name, a, b in zip(("out", "dq", "dk", "dv"), got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10, msg=lambda m, name=name: f"{name}: {m}")
    if case["pattern"] == "dense":
        assert torch.equal(mask, allowed(bounds(starts, window)).expand_as(mask))


@pytest.mark.parametrize("layout", ["contiguous", "zigzag", "striped"])
@pytest.mark.parametrize("topology", TOPOLOGIES, ids=str)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_documents(pool: ProcessPool, topology: tuple[int, ...], layout: str, pattern: str) -> None:
    for name in ("documents anywhere", "a document over several ranks", "documents of one token"):
        check(pool, topology=topology, layout=layout, pattern=pattern, starts=STARTS[name], window=None)


@pytest.mark.parametrize("layout", ["contiguous", "zigzag", "striped"])
@pytest.mark.parametrize("topology", TOPOLOGIES, ids=str)
@pytest.mark.parametrize("window", [1, 9, 50])
def test_windows(pool: ProcessPool, topology: tuple[int, ...], layout: str, window: int) -> None:
    for pattern, starts in (("dense", None), ("columns", STARTS["documents anywhere"])):
        check(pool, topology=topology, layout=layout, pattern=pattern, starts=starts, window=window)


@pytest.mark.parametrize("layout", ["contiguous", "striped"])
@pytest.mark.parametrize("topology", TOPOLOGIES, ids=str)
@pytest.mark.parametrize("chunk", [1, 21, 40])
def test_chunks(pool: ProcessPool, topology: tuple[int, ...], layout: str, chunk: int) -> None:
    """As documents of as many tokens; in documents, counted from the first token of each."""
    for pattern, name in (("dense", None), ("columns", "documents anywhere")):
        check(pool, topology=topology, layout=layout, pattern=pattern, starts=None if name is None else STARTS[name],
              window=Chunks(chunk))  # fmt: skip


def test_documents_written_into_the_same_memory_are_new_ones() -> None:
    q, k, v, _ = tensors()
    starts = STARTS["documents anywhere"].clone()
    options: dict[str, Any] = {
        "pattern": build_pattern("dense", block_size=SIZE), "layout": "contiguous", "mesh": None, "window": 19,
    }  # fmt: skip
    for name in ("documents anywhere", "a document over several ranks"):
        starts.copy_(STARTS[name])
        out = mtraining.sparse_ring_attention(q, k, v, starts=starts, **options)
        expected, _ = masked_attention(q, k, v, allowed(bounds(STARTS[name], 19)))
        torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-10)


def test_a_runtime_reads_the_starts_of_each_batch() -> None:
    """Two layers share one holder; layer recompute has the starts of the first pass, whatever the holder says now."""
    q, k, v, _ = tensors()
    shared = BatchStarts()
    layers = [
        AttentionRuntime(build_pattern("dense", block_size=SIZE), build_layout("contiguous"), None, "reference",
                         window, shared)
        for window in (None, 19)
    ]  # fmt: skip
    causal = torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril().expand(2, 1, -1, -1)
    for starts in (None, STARTS["documents at blocks"], STARTS["documents anywhere"]):
        shared.value = starts
        within = causal if starts is None else allowed(starts)
        for layer, mask in zip(layers, (within, within & allowed(of_window(TOKENS, 19, 2))), strict=True):
            tape = IndexTape()
            with tape.record():
                out = layer(q, k, v)
            torch.testing.assert_close(out, masked_attention(q, k, v, mask)[0], rtol=1e-12, atol=1e-12)
            shared.value = None
            with tape.replay():
                assert torch.equal(layer(q, k, v), out)
            shared.value = starts


def test_a_compiled_layer_reads_the_starts_of_each_batch() -> None:
    q, k, v, dout = tensors()
    shared = BatchStarts()
    runtime = AttentionRuntime(
        build_pattern("dense", block_size=SIZE), build_layout("contiguous"), None, "reference", None, shared
    )
    compiled = torch.compile(lambda q, k, v: runtime(q, k, v) * 1.0, fullgraph=True, backend="aot_eager")
    for x in (q, k, v):
        x.requires_grad_()
    for name in ("documents at blocks", "documents anywhere"):
        shared.value = STARTS[name]
        out = compiled(q, k, v)
        # What the next batch brings is not this one's.
        shared.value = None
        got = [out, *torch.autograd.grad(out, (q, k, v), dout)]
        truth, _ = masked_attention(q, k, v, allowed(STARTS[name]))
        want = [truth, *torch.autograd.grad(truth, (q, k, v), dout)]
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_a_window_without_a_token_is_refused() -> None:
    q, k, v, _ = tensors()
    with pytest.raises(mtraining.UserError, match=r"^window: 0 holds no token; give at least 1"):
        mtraining.sparse_ring_attention(
            q, k, v, pattern="dense", layout="contiguous", mesh=None, kernel="reference", window=0
        )
