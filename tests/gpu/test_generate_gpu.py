"""Generation on a GPU: the decode kernel at size, no wait between layers, and the answers of a CPU."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from library_warnings import SYNC_CHECKS

pytest.importorskip("triton")
sys.path.append(str(Path(__file__).parents[1] / "generate"))
sys.path.append(str(Path(__file__).parents[1] / "model"))

from answers import prompts

from decode_cases import decode_case
from mtraining.bench.attention.gate import poisoned_memory
from mtraining.generate import Generator
from mtraining.generate.cache import Cache, attached
from mtraining.kernel.reference.decode import decode_attention as reference
from mtraining.kernel.triton.decode import decode_attention
from mtraining.layout import build_layout
from mtraining.model import ModelOptions, build_model
from mtraining.pattern import build_pattern

pytestmark = pytest.mark.gpu
TOLERANCE = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 1e-5}
SHAPES = {
    "qwen": (16, 2, 128, (70001, 1, 4096)),
    "llama": (32, 8, 128, (20000,)),
    "smollm": (9, 3, 64, (8191, 0, 333, 64)),
    "dim 96": (8, 8, 96, (5000, 4999)),
    "dim 256": (8, 1, 256, (9000, 65)),
    "group of 40": (40, 1, 64, (3000,)),
}


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_decode_kernel(shape: str, dtype: torch.dtype) -> None:
    q, k, v, lengths = decode_case(*SHAPES[shape], dtype=dtype, device="cuda")
    longest = max(SHAPES[shape][3])
    with poisoned_memory():
        out, lse = decode_attention(q, k, v, lengths, longest, 0.1)
        again = decode_attention(q, k, v, lengths, longest, 0.1)
    want, want_lse = reference(q.double(), k.double(), v.double(), lengths, longest, 0.1)
    assert (out.double() - want).norm() < TOLERANCE[dtype] * want.norm()
    assert torch.equal(lse.isneginf(), want_lse.isneginf())
    seen = ~want_lse.isneginf()
    assert (lse.double() - want_lse)[seen].abs().max() < 1e-4
    assert torch.equal(out, again[0]) and torch.equal(lse, again[1])


def model_of(dtype: str, device: str = "cuda") -> Generator:
    """A small random model, the same on every device, with heads that the kernels serve."""
    config = {
        "model_type": "qwen2", "vocab_size": 97, "hidden_size": 256, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.1,
    }  # fmt: skip
    options = ModelOptions.model_validate({"config": config, "dtype": dtype})
    model = build_model(options, 128)[0].to(device)
    return Generator(model, pattern=build_pattern("dense", block_size=16), layout=build_layout("striped", 16))


@pytest.mark.usefixtures("no_waiting")
@pytest.mark.filterwarnings(SYNC_CHECKS)
@torch.no_grad()
def test_nothing_waits_for_the_device_within_a_token() -> None:
    made = model_of("bfloat16")
    rows = [torch.tensor(prompt) for prompt in prompts()]
    cache = Cache(made.attention, [made.attention.deal(len(row)) for row in rows], 8, torch.device("cuda"))
    with attached(made.model, cache):
        for row, tokens in enumerate(rows):
            made._prefill(cache, row, tokens, None)
    tokens = torch.tensor([[5], [6], [7]], device="cuda")
    positions = torch.tensor([[len(row)] for row in rows], device="cuda")

    def token() -> torch.Tensor:
        cache.next_token()
        return made.model.read_out(tokens, positions, lambda hidden, head: head.logits(hidden[:, -1]))

    with attached(made.model, cache):
        token()  # compiles
        torch.cuda.set_sync_debug_mode("error")
        found = token()
    torch.cuda.set_sync_debug_mode("default")
    assert found.isfinite().all()


def test_a_gpu_answers_as_a_cpu() -> None:
    made, alone = model_of("float32"), model_of("float32", "cpu")
    found = made.generate(prompts(), 8, eos=(), keep_logits=True)
    for one, expected in zip(found, alone.generate(prompts(), 8, eos=(), keep_logits=True), strict=True):
        assert one.tokens == expected.tokens
        assert one.logits is not None and expected.logits is not None
        assert (one.logits - expected.logits).abs().max() < 1e-4 * expected.logits.abs().max()


def test_an_answer_that_ends_early_on_a_gpu() -> None:
    """The host reads tokens one forward late; what comes too much is dropped."""
    made = model_of("float32")
    (free,) = made.generate(prompts()[:1], 8, eos=())
    end = free.tokens[3]
    (found,) = made.generate(prompts()[:1], 8, eos=[end], keep_logits=True)
    kept = free.tokens.index(end) + 1
    assert found.tokens == free.tokens[:kept] and found.finish_reason == "eos"
    assert found.logits is not None and len(found.logits) == kept
