"""Sparse prefill equals the sparse reference: transformers given, as a mask, the index of the real tokens alone."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from answers import LENGTHS, MESHES, NEW, generator_for, lively_model, prompts, world_of
from tiny_models import BLOCK, SPARSE
from torch import Tensor

from distributed import ProcessPool, Worker
from mtraining.generate import Generation, Generator
from mtraining.generate import cache as module
from mtraining.layout import build_layout
from mtraining.pattern import Pattern, build_pattern
from mtraining.ring import sparse_ring_attention

PATTERNS: dict[str, dict[str, Any]] = {
    "vertical_slash": {**SPARSE, "top_k_columns": 4, "top_k_slashes": 2, "sinks": 1, "window": 1},
    "moba": {"name": "moba", "block_size": BLOCK, "chunk": BLOCK, "top_k": 2},
    "xattention": {"name": "xattention", "block_size": BLOCK, "stride": 4, "threshold": 0.4},
    "flexprefill": {"name": "flexprefill", "block_size": BLOCK, "gamma": 0.4, "tau": 0.3, "max_columns": 16},
    "a_shape": {"name": "a_shape", "block_size": BLOCK, "sinks": 2, "window": 9},
}


def sparse_answers(worker: Worker, mesh: str, pattern: str, layout: str) -> list[Generation]:
    """Job: greedy answers, with the density of their prefill."""
    made = generator_for(worker, "qwen2", mesh, build_pattern(**PATTERNS[pattern]), layout)
    return made.generate(prompts(), NEW, eos=(), keep_logits=True, recall_rows=16)


def reference_logits(pattern: Pattern, prompt: list[int], tokens: list[int]) -> tuple[Tensor, float]:
    """Logits of every new token by eager transformers in one forward over prompt and answer, and the index's density.

    Rows of the prompt see what the pattern selects from the prompt alone; rows of the answer see everything before.
    """
    masks, densities = [], []
    dealt = build_layout("striped", BLOCK)

    def spy(*args: Any, **options: Any) -> Tensor:
        out, index = sparse_ring_attention(*args, **options, return_index=True)
        covered = -(-len(prompt) // BLOCK) * BLOCK
        assert index.seq_len == covered  # no more padding than blocks need
        masks.append(index.to_mask()[0, :, : len(prompt), : len(prompt)])
        densities.append(index.density().mean().item())
        return out

    alone = Generator(lively_model("qwen2"), pattern=pattern, layout=dealt)
    with mock.patch.object(module, "sparse_ring_attention", spy):
        alone.prefill(prompt)
    total = len(prompt) + len(tokens) - 1
    model = lively_model("qwen2")
    model.set_attn_implementation("eager")
    for layer, mask in zip(model.model.layers, masks, strict=True):
        whole = torch.ones(total, total, dtype=torch.bool).tril().repeat(len(mask), 1, 1)
        causal = int(whole[:, : len(prompt), : len(prompt)].sum())
        assert mask.sum() < 0.95 * causal  # a mask that hides nothing would test nothing
        whole[:, : len(prompt), : len(prompt)] = mask
        bias = torch.zeros(whole.shape, dtype=model.dtype).masked_fill(~whole, -torch.inf)[None]

        def give(module: Any, args: Any, options: dict[str, Any], bias: Tensor = bias) -> Any:
            return args, {**options, "attention_mask": bias}

        layer.self_attn.register_forward_pre_hook(give, with_kwargs=True)
    with torch.no_grad():
        logits = model(torch.tensor([prompt + tokens[:-1]]), use_cache=False).logits[0]
    return logits[len(prompt) - 1 :], sum(densities) / len(densities)


def check(found: list[Generation], pattern: str) -> None:
    for prompt, length, answer in zip(prompts(), LENGTHS, found, strict=True):
        assert answer.logits is not None and answer.density is not None
        if length < 3 * BLOCK:
            continue  # a prompt of one block has nothing to leave out
        expected, density = reference_logits(build_pattern(**PATTERNS[pattern]), prompt, answer.tokens)
        assert answer.tokens == expected.argmax(-1).tolist()
        assert (answer.logits - expected).abs().max() < 1e-5 * expected.abs().max()
        assert answer.density == pytest.approx(density, rel=1e-6)
        assert answer.recall is not None and 0.1 < answer.recall < 0.9999


@pytest.mark.parametrize("mesh", MESHES)
def test_sparse_prefill_on_every_ring(pool: ProcessPool, mesh: str) -> None:
    options = {"mesh": mesh, "pattern": "vertical_slash", "layout": "striped"}
    for found in pool.run(sparse_answers, world=world_of(mesh), **options):
        check(found, "vertical_slash")


@pytest.mark.parametrize("layout", ["striped", "zigzag"])
@pytest.mark.parametrize("pattern", sorted(set(PATTERNS) - {"vertical_slash"}))
def test_every_pattern_reads_prompts(pool: ProcessPool, pattern: str, layout: str) -> None:
    for found in pool.run(sparse_answers, world=2, mesh="cp2", pattern=pattern, layout=layout):
        check(found, pattern)


def test_layers_may_differ(pool: ProcessPool) -> None:
    """A pattern for each layer; and block sizes that differ pad to what both need."""
    sparse, dense = build_pattern(**SPARSE), build_pattern("dense", block_size=2 * BLOCK)
    mixed = Generator(
        lively_model("qwen2"), pattern=[dense, sparse], layout=build_layout("striped", 2 * BLOCK)
    )
    plain = Generator(lively_model("qwen2"), pattern=dense, layout=build_layout("striped", 2 * BLOCK))
    (prompt, *_), (one,) = prompts((50,)), mixed.generate(prompts((50,)), 2, recall_rows=0)
    assert mixed.attention.deal(50).padding == 14
    assert one.density is not None and 0.5 < one.density < 1
    assert not torch.allclose(mixed.prefill(prompt), plain.prefill(prompt), rtol=1e-3)
