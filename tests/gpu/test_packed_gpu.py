"""Packed documents on a GPU: as if each were alone, not a bit of one in another, and no wait for the device."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoConfig, AutoModelForCausalLM

from library_warnings import COMPILE, SYNC_CHECKS
from mtraining.layout import build_layout
from mtraining.model import ParallelLM, parallelize
from mtraining.pattern import Pattern, VerticalSlash, build_pattern
from mtraining.train.mesh import Process

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings(*COMPILE, SYNC_CHECKS),
]
SEQ_LEN, VOCAB = 4096, 1000
# At blocks and elsewhere; one within a tile, one over many; the last is padding.
LENGTHS = (640, 1337, 5, 1, 128, 1500, 300, 185)
CHANGED = slice(640, 640 + 1337)
SPARSE = VerticalSlash(top_p=None, top_k_columns=300, slash_by="block", slash_density=0.3, probe_at="spread")
PATTERNS: dict[str, Pattern] = {
    "dense": build_pattern("dense"),
    "vertical_slash": SPARSE,
    "vertical_slash, top_p": VerticalSlash(top_p=0.7, max_columns=600, max_slashes=300),
    "a_shape": build_pattern("a_shape"),
    "toeplitz_random": build_pattern("toeplitz_random", density=0.4, window=2, columns=200),
    "moba": build_pattern("moba", chunk=256, top_k=3),
    "xattention": build_pattern("xattention", threshold=0.6),
    "flexprefill": build_pattern("flexprefill", gamma=0.6),
}


def plain_model() -> Any:
    """Two layers in fp32 on the CPU, the same weights each time; attention is far from uniform."""
    config = AutoConfig.for_model(
        "qwen2", vocab_size=VOCAB, hidden_size=512, intermediate_size=1024, num_hidden_layers=2,
        num_attention_heads=8, num_key_value_heads=2, head_dim=64, max_position_embeddings=SEQ_LEN,
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "q_proj.weight" in name or "k_proj.weight" in name:
                parameter.mul_(5)
    return model


def made(process: Process, pattern: Pattern, layout: str = "striped", **options: Any) -> ParallelLM:
    return parallelize(
        plain_model(), process.mesh, pattern=pattern, layout=build_layout(layout), param_dtype=torch.bfloat16,
        **options,
    )  # fmt: skip


def batch() -> dict[str, Tensor]:
    lengths = torch.tensor(LENGTHS)
    starts = (lengths.cumsum(0) - lengths).repeat_interleave(lengths)[None].int()
    assert starts.shape == (1, SEQ_LEN)
    ids = torch.randint(VOCAB, (1, SEQ_LEN), generator=torch.Generator().manual_seed(1))
    at = torch.arange(SEQ_LEN) - starts.long()
    labels = ids.roll(-1, 1).masked_fill(at.roll(-1, 1) == 0, -100)
    labels[:, -LENGTHS[-1] :] = -100
    whole = {"input_ids": ids, "position_ids": at, "labels": labels, "starts": starts}
    return {name: x.cuda() for name, x in whole.items()}


def step(model: ParallelLM, given: dict[str, Tensor]) -> dict[str, Tensor]:
    """Token losses and gradients."""
    model.zero_grad()
    ids, at, labels, starts = (given[name] for name in ("input_ids", "position_ids", "labels", "starts"))
    losses = model.token_losses(ids, at, labels, starts=starts)
    model(ids, at, labels, (labels != -100).sum(), starts=starts).backward()
    grads = {n: p.grad.full_tensor() for n, p in model.hf_model.named_parameters()}
    return {"losses": losses, **grads}


@pytest.mark.parametrize("layout", ["striped", "zigzag", "contiguous"])
@pytest.mark.parametrize("name", PATTERNS)
def test_no_bit_of_a_document_depends_on_another(process: Process, name: str, layout: str) -> None:
    model, given = made(process, PATTERNS[name], layout), batch()
    given["labels"][:, CHANGED] = -100
    other = {**given, "input_ids": given["input_ids"].clone()}
    other["input_ids"][:, CHANGED] = (other["input_ids"][:, CHANGED] + 7) % VOCAB
    first, again, changed = step(model, given), step(model, given), step(model, other)
    # What does not repeat (atomic adds of an embedding's gradient, say) can show nothing.
    steady = [key for key in first if torch.equal(first[key], again[key])]
    assert "losses" in steady and len(steady) >= len(first) - 1
    assert [key for key in steady if not torch.equal(first[key], changed[key])] == []


def test_without_starts_the_leak_is_seen(process: Process) -> None:
    model, given = made(process, SPARSE), batch()
    given["labels"][:, CHANGED] = -100
    given |= {"starts": torch.zeros_like(given["starts"]), "position_ids": torch.arange(SEQ_LEN).cuda()[None]}
    other = {**given, "input_ids": given["input_ids"].clone()}
    other["input_ids"][:, CHANGED] = (other["input_ids"][:, CHANGED] + 7) % VOCAB
    first, changed = step(model, given), step(model, other)
    assert sum(not torch.equal(first[key], changed[key]) for key in first) > len(first) // 2


@pytest.mark.parametrize("fused", ["none", "compile"])
def test_each_document_trains_as_if_it_were_alone(process: Process, fused: Any) -> None:
    """Against plain transformers in fp32, one document after another. bf16 rounds each token's loss by about 1e-2."""
    given, plain = batch(), plain_model().cuda()
    found = step(made(process, PATTERNS["dense"], fused=fused), given)
    labels, begin, gradients = given["labels"], 0, {}
    count = int((labels != -100).sum())
    for length in LENGTHS[:-1]:
        place = slice(begin, begin + length)
        logits = plain(given["input_ids"][:, place], use_cache=False).logits[0]
        losses = cross_entropy(logits, labels[0, place], reduction="none")
        torch.testing.assert_close(found["losses"][0, place], losses, rtol=0, atol=0.1)
        (losses.sum() / count).backward()
        begin += length
    gradients = {name: parameter.grad for name, parameter in plain.named_parameters()}
    for name, expected in gradients.items():
        cosine = torch.cosine_similarity(found[name].flatten(), expected.flatten(), dim=0)
        # A bias of keys moves all scores of a row alike but for the rotation: nearly all of its gradient cancels out.
        assert cosine > (0.99 if name.endswith("k_proj.bias") else 0.995), (name, float(cosine))


@pytest.mark.parametrize("name", PATTERNS)
def test_nothing_waits_for_the_device(process: Process, name: str) -> None:
    """Forward and backward of a batch with other documents than the one before."""
    model, given = made(process, PATTERNS[name]), batch()
    step(model, given)
    moved = given["starts"].clone()
    moved[:, 640 : 640 + 300] = 640
    moved[:, 640 + 300 : 640 + 1337] = 940
    given |= {"starts": moved, "position_ids": torch.arange(SEQ_LEN).cuda() - moved.long()}
    count = (given["labels"] != -100).sum()
    torch.cuda.synchronize()
    ids, at, labels, starts = (given[key] for key in ("input_ids", "position_ids", "labels", "starts"))
    torch.cuda.set_sync_debug_mode("error")
    try:
        model(ids, at, labels, count, starts=starts).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
