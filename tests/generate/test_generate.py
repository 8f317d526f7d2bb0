"""Answers on the ring are those of transformers on one process: tokens, and every logit, whatever the lengths."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import transformers
from answers import LENGTHS, MESHES, NEW, answers, transformers_answers, world_of
from packaging.version import Version
from tiny_models import EVERY_FAMILY, EXPERTS, FAMILIES

from distributed import ProcessPool
from mtraining.generate import Generation


def check(found: Sequence[Generation], family: str) -> None:
    if family == "phi3" and Version(transformers.__version__) < Version("5.24"):
        # Where the length passes the native one it drops the cache, and then reads the newest token alone.
        pytest.skip("this transformers forgets the prompt of a Phi-3")
    expected = transformers_answers(family)
    assert len(found) == len(expected)
    # Norms and softmax of the models are in fp32 even when weights are fp64, so fp32 round-off it is.
    tolerance = 3e-5 if family in EXPERTS else 1e-5
    for answer, length, (tokens, logits) in zip(found, LENGTHS, expected, strict=True):
        assert answer.prompt_tokens == length and answer.finish_reason == "length"
        assert answer.tokens == tokens
        assert answer.logits is not None
        error = (answer.logits - logits).abs().max() / logits.abs().max()
        assert error < tolerance, f"logits are off by {error:.1e}"


@pytest.mark.parametrize("mesh", MESHES)
def test_every_ring_answers_as_transformers(pool: ProcessPool, mesh: str) -> None:
    for found in pool.run(answers, world=world_of(mesh), family="qwen2", mesh=mesh):
        check(found, "qwen2")


@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
def test_every_layout_answers_as_transformers(pool: ProcessPool, layout: str) -> None:
    for found in pool.run(answers, world=2, family="qwen3", mesh="cp2", layout=layout):
        check(found, "qwen3")


@pytest.mark.parametrize("mesh", ["cp2", "cp2x2", "dp2xcp2"])
def test_shards_of_fsdp_answer_as_transformers(pool: ProcessPool, mesh: str) -> None:
    for found in pool.run(answers, world=world_of(mesh), family="llama", mesh=mesh, fsdp=True):
        check(found, "llama")


@pytest.mark.parametrize("family", sorted(set(EVERY_FAMILY) - {"qwen2"}))
def test_every_family_answers_as_transformers(pool: ProcessPool, family: str) -> None:
    for found in pool.run(answers, world=2, family=family, mesh="cp2"):
        check(found, family)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", sorted(set(MESHES) - {"cp2"}))
@pytest.mark.parametrize("family", EVERY_FAMILY)
def test_every_family_on_every_ring(pool: ProcessPool, family: str, mesh: str) -> None:
    for found in pool.run(answers, world=world_of(mesh), family=family, mesh=mesh):
        check(found, family)


def test_the_oracle_says_something() -> None:
    """Answers that differ between prompts, of more than one token, from logits that are not flat."""
    for family in FAMILIES:
        tokens = [answer[0] for answer in transformers_answers(family)]
        assert len({tuple(one) for one in tokens}) == len(LENGTHS)
        assert all(len(one) == NEW for one in tokens) and any(len(set(one)) > 2 for one in tokens)
