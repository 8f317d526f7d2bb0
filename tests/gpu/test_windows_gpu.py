"""Windows, chunks and sinks of models on a GPU: loss, every gradient and answers are those of transformers, on fp32."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoConfig, AutoModelForCausalLM

from mtraining.generate import Generator
from mtraining.model import parallelize
from mtraining.pattern import Dense

pytestmark = pytest.mark.gpu
SEQ_LEN, VOCAB, PROMPT, NEW = 1024, 500, 700, 4
SLIDING, FULL, CHUNKED = "sliding_attention", "full_attention", "chunked_attention"
# Windows that end within a tile.
MODELS: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": 301},
    "gemma3_text": {"sliding_window": 301, "layer_types": [SLIDING, FULL]},
    "gpt_oss": {"sliding_window": 301, "layer_types": [SLIDING, FULL], "num_local_experts": 4},
    "llama4_text": {"attention_chunk_size": 301, "layer_types": [CHUNKED, FULL], "num_local_experts": 2},
}


def plain_model(name: str) -> Any:
    config = AutoConfig.for_model(
        name, vocab_size=VOCAB, hidden_size=256, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=64, max_position_embeddings=2 * SEQ_LEN, pad_token_id=0, bos_token_id=1,
        eos_token_id=2, **MODELS[name],
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "q_proj.weight" in key or "k_proj.weight" in key:
                parameter.mul_(6)
            elif "sinks" in key:
                parameter.copy_(torch.linspace(-1, 2, len(parameter)))
    return model.cuda()


@pytest.mark.parametrize("name", MODELS)
def test_windows_equal_transformers(name: str) -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    tokens = torch.randint(3, VOCAB, (1, SEQ_LEN + 1), generator=torch.Generator().manual_seed(1)).cuda()
    inputs, labels, positions = tokens[:, :-1], tokens[:, 1:], torch.arange(SEQ_LEN, device="cuda")[None]
    plain = plain_model(name)
    made = parallelize(copy.deepcopy(plain), pattern=Dense(), recompute="full")
    plain.set_attn_implementation("eager")
    loss = cross_entropy(plain(inputs, use_cache=False).logits.flatten(0, 1), labels.flatten())
    loss.backward()
    ours = made(inputs, positions, labels, SEQ_LEN)
    ours.backward()
    torch.testing.assert_close(ours, loss, rtol=1e-4, atol=0)
    floor = 1e-3 * max(p.grad.abs().max() for p in plain.parameters() if p.grad is not None)
    for (key, one), other in zip(plain.named_parameters(), made.hf_model.parameters(), strict=True):
        if one.grad is not None:
            error = (other.grad - one.grad).abs().max() / torch.maximum(one.grad.abs().max(), floor)
            assert error < 2e-3, f"{key}: {error:.1e}"

    ids = inputs[:, :PROMPT]
    with torch.no_grad():
        logits = []
        for _ in range(NEW):
            logits.append(plain(ids, use_cache=False).logits[:, -1])
            ids = torch.cat([ids, logits[-1].argmax(-1, keepdim=True)], 1)
    answer = Generator(made.eval()).generate([inputs[0, :PROMPT].tolist()], NEW, eos=(), keep_logits=True)[0]
    assert answer.tokens == ids[0, PROMPT:].tolist() and answer.logits is not None
    expected = torch.cat(logits).cpu()
    assert (answer.logits - expected).abs().max() < 1e-3 * expected.abs().max()
