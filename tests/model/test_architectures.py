"""Every causal architecture of transformers: the accepted ones equal plain transformers, on two processes.

A fast subset has one architecture of each kind. The whole sweep takes minutes: make sweep.
"""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import transformers
from packaging.version import Version
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

from architectures import NAMES, SEQ_LEN, VOCAB, Verdict, quiet, small_config, small_model, verdict
from distributed import ProcessPool, Worker
from docs_pages import ROOT
from mtraining.generate import Generator
from mtraining.layout import build_layout
from mtraining.model import export_model, fix_rope, parallelize
from mtraining.pattern import Dense

BLOCK, PROMPT, NEW = 8, 43, 3
# One of each kind: what their attention, positions, logits or blocks have of their own.
KINDS = (
    "cohere gpt2 gpt_oss gptj granite llama llama4_text mistral nanochat olmo3 opt phi phi3 qwen3_moe".split()
)


def batch() -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, positions and shifted labels of one sequence."""
    generator = torch.Generator().manual_seed(11)
    tokens = torch.randint(3, VOCAB, (1, SEQ_LEN + 1), generator=generator)
    labels = tokens[:, 1:].clone()
    labels[torch.rand(labels.shape, generator=generator) < 0.2] = -100
    return tokens[:, :-1], torch.arange(SEQ_LEN)[None], labels


def exact_dtype(name: str, settings: dict[str, Any]) -> torch.dtype:
    """fp64 but for experts, which are multiplied in fp32 at most."""
    with torch.device("meta"), quiet():
        model = AutoModelForCausalLM.from_config(small_config(name, **settings))
    experts = any("experts" in key for key, _ in model.named_parameters())
    return torch.float32 if experts else torch.float64


def plain(
    name: str, settings: dict[str, Any], dtype: torch.dtype
) -> tuple[float, dict[str, Tensor], list[int], Tensor]:
    """Loss, gradients, greedy answer and its logits, by transformers alone."""
    model = small_model(name, dtype, **settings)
    model.set_attn_implementation("eager")
    tokens, positions, labels = batch()
    logits = model(tokens, position_ids=positions, use_cache=False).logits
    loss = cross_entropy(logits.flatten(0, 1), labels.flatten())
    loss.backward()
    gradients = {key: parameter.grad for key, parameter in model.named_parameters()}
    ids = tokens[:, :PROMPT]
    answers = []
    with torch.no_grad(), warnings.catch_warnings():
        for _ in range(NEW):
            answers.append(model(ids, use_cache=False).logits[:, -1])
            ids = torch.cat([ids, answers[-1].argmax(-1, keepdim=True)], 1)
    return loss.item(), gradients, ids[0, PROMPT:].tolist(), torch.cat(answers)


def on_ring(
    worker: Worker, name: str, settings: dict[str, Any], dtype: torch.dtype
) -> tuple[float, dict[str, Any], list[int], Tensor]:
    """Job: the same of our model, on a ring."""
    mesh, layout = worker.mesh(), build_layout("striped", BLOCK)
    model = small_model(name, dtype, **settings)
    made = parallelize(
        model,
        mesh,
        pattern=Dense(block_size=BLOCK),
        layout=layout,
        recompute="full",
        reduce_dtype=torch.float64,
        loss_chunk=20,
    ).eval()
    tokens, positions, labels = batch()
    inputs = (layout.shard(part, worker.rank, worker.world) for part in (tokens, positions, labels))
    share = made(*inputs, int((labels != -100).sum()))
    share.backward()
    loss = share.detach().clone()
    dist.all_reduce(loss)
    gradients = {
        key: None if parameter.grad is None else parameter.grad.full_tensor()
        for key, parameter in made.hf_model.named_parameters()
    }
    answer = Generator(made).generate([tokens[0, :PROMPT].tolist()], NEW, eos=(), keep_logits=True)[0]
    assert answer.logits is not None
    return loss.item(), gradients if worker.rank == 0 else {}, answer.tokens, answer.logits


def check(pool: ProcessPool, name: str, found: Verdict, folder: Path) -> None:
    settings = dict(found.settings)
    dtype = exact_dtype(name, settings)
    expected_loss, expected, tokens, logits = plain(name, settings, dtype)
    (loss, gradients, answer, answer_logits), *_ = pool.run(
        on_ring, world=2, name=name, settings=settings, dtype=dtype
    )
    # Norms and softmax of the models are in fp32 even when weights are fp64.
    tolerance = 1e-5 if dtype == torch.float64 else 3e-5
    assert loss == pytest.approx(expected_loss, rel=tolerance)
    assert gradients.keys() == expected.keys()
    # Some gradients are zero but for rounding, such as that of a bias on all keys alike.
    floor = 1e-3 * max(gradient.abs().max() for gradient in expected.values() if gradient is not None)
    for key, gradient in expected.items():
        if gradient is None:
            assert gradients[key] is None or not gradients[key].any(), key
            continue
        assert gradients[key] is not None, key
        error = (gradients[key] - gradient).abs().max() / max(gradient.abs().max(), floor)
        assert error < tolerance, f"{key}: {error:.1e}"
    assert answer == tokens
    assert (answer_logits - logits).abs().max() / logits.abs().max() < 3 * tolerance

    model = small_model(name, **settings)
    with quiet():
        export_model(parallelize(small_model(name, **settings), pattern=Dense(block_size=BLOCK)), folder)
        back, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    fix_rope(back, SEQ_LEN)
    for one in (model, back):
        one.eval().set_attn_implementation("eager")
    tokens_in = batch()[0]
    assert torch.equal(back(tokens_in).logits, model(tokens_in).logits)


@pytest.mark.parametrize("name", KINDS)
def test_one_of_each_kind_equals_transformers(pool: ProcessPool, name: str, tmp_path: Path) -> None:
    found = verdict(name)
    if name == "gptj" and Version(transformers.__version__) < Version("5.24"):
        pytest.skip("its attention is not behind transformers' interface yet")
    assert found.kind != "no", found.reason
    check(pool, name, found, tmp_path / "model")


def page_rows() -> dict[str, str]:
    """The rows of the page by architecture, where it is of the transformers installed here."""
    text = (ROOT / "docs" / "reference" / "architectures.md").read_text(encoding="utf-8")
    if f"transformers {transformers.__version__} knows" not in text:
        return {}
    return {found[1]: found[0] for found in re.finditer(r"^\| `([^`]+)` \|.*$", text, re.MULTILINE)}


@pytest.mark.sweep
@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(set(NAMES) - set(KINDS)))
def test_every_architecture_equals_transformers_or_is_refused(
    pool: ProcessPool, name: str, tmp_path: Path
) -> None:
    found = verdict(name)
    page = page_rows()
    if page:
        accepted = "| accepted |" if found.kind != "no" else "| refused |"
        assert accepted in page[name], f"{name}: run docs/write_architectures.py"
    if found.kind == "no":
        assert found.reason.startswith(("model: ", "transformers cannot build a small one: "))
    else:
        check(pool, name, found, tmp_path / "model")


@pytest.mark.parametrize("name", ["gpt2", "opt"])
def test_padding_may_stand_beyond_learned_positions(name: str) -> None:
    """Of 45 positions, 43 are the prompt's; blocks of 8 make it 48."""
    settings = {**verdict(name).settings, "max_position_embeddings": PROMPT + 2}
    model, tokens = small_model(name, **settings), batch()[0][0, :PROMPT]
    expected = model(tokens[None], use_cache=False).logits[0, -1]
    made = Generator(parallelize(small_model(name, **settings), pattern=Dense(block_size=BLOCK)).eval())
    torch.testing.assert_close(made.prefill(tokens.tolist()), expected, rtol=1e-4, atol=1e-4)
