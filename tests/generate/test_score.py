"""Scores of a text are transformers' own losses, in order, however it is padded and dealt."""

from __future__ import annotations

import pytest
import torch
from answers import MESHES, generator_for, lively_model, prompts, world_of
from tiny_models import DENSE, tiny_batch
from torch import Tensor
from torch.nn.functional import cross_entropy

from distributed import ProcessPool, Worker
from library_warnings import COMPILE
from mtraining.errors import UserError
from mtraining.model import parallelize

TEXTS = (50, 2, 64)


def scores(worker: Worker, mesh: str, layout: str, fsdp: bool) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Job: nll, greedy and the logits after each text."""
    made = generator_for(worker, "qwen2", mesh, layout=layout, fsdp=fsdp)
    return [(*made.score(text), made.prefill(text).cpu()) for text in prompts(TEXTS)]


def check(found: list[tuple[Tensor, Tensor, Tensor]]) -> None:
    model = lively_model("qwen2")
    for text, (nll, greedy, last) in zip(prompts(TEXTS), found, strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([text]), use_cache=False).logits[0]
        expected = cross_entropy(logits[:-1], torch.tensor(text[1:]), reduction="none")
        assert nll.shape == (len(text) - 1,)
        torch.testing.assert_close(nll, expected, rtol=1e-5, atol=1e-5)
        assert torch.equal(greedy, logits[:-1].argmax(-1) == torch.tensor(text[1:]))
        torch.testing.assert_close(last, logits[-1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("mesh", MESHES)
def test_scores_on_every_ring(pool: ProcessPool, mesh: str) -> None:
    for found in pool.run(scores, world=world_of(mesh), mesh=mesh, layout="striped", fsdp=False):
        check(found)


def test_scores_of_shards_in_another_layout(pool: ProcessPool) -> None:
    for found in pool.run(scores, world=2, mesh="cp2", layout="zigzag", fsdp=True):
        check(found)


def test_greedy_marks_the_answers_own_tokens() -> None:
    made = generator_for(None, "qwen2")
    (prompt,) = prompts((20,))
    (one,) = made.generate([prompt], 6, eos=())
    assert made.score(prompt + one.tokens).greedy[-6:].all()
    other = [(token + 1) % 97 for token in one.tokens]
    assert not made.score(prompt + other).greedy[-6:].any()
    assert torch.equal(made.token_nll(prompt), made.score(prompt).nll)


def training_goes_on(worker: Worker) -> None:
    """Job: a model in training answers between two equal steps, which stay equal."""
    mesh = worker.mesh()
    made = generator_for(worker, "qwen2", "cp2", fsdp=True)
    model, batch = made.model, tiny_batch()
    model.train()
    model.hf_model.lm_head.eval()  # a module that somebody keeps out of training
    layout, random = model.layout, torch.get_rng_state()
    inputs = [layout.shard(x, worker.rank, 2) for x in (batch.input_ids, batch.position_ids, batch.labels)]

    def loss() -> float:
        share = model(*inputs, batch.num_labels)
        share.backward()
        gradient = [parameter.grad.full_tensor().norm() for parameter in model.parameters()]
        model.zero_grad()
        return float(share.detach() + sum(gradient))

    before, modes = loss(), [module.training for module in model.modules()]
    made.generate(prompts((20, 9)), 4, temperature=0.7, top_p=0.9)
    made.score(prompts((20,))[0])
    assert [module.training for module in model.modules()] == modes and sum(modes) == len(modes) - 1
    assert torch.equal(torch.get_rng_state(), random)
    assert loss() == before
    assert mesh.size() == 2


def test_training_goes_on_as_if_nothing_was_asked(pool: ProcessPool) -> None:
    pool.run(training_goes_on, world=2)


def test_a_text_of_one_token_is_refused() -> None:
    with pytest.raises(UserError, match="a single token has nothing before it"):
        generator_for(None, "qwen2").score([5])


@pytest.mark.filterwarnings(*COMPILE)
def test_compiled_layers_answer_eagerly() -> None:
    """No graph is made for any length; afterwards the layers are compiled as they were."""
    import functools
    from unittest import mock

    from torch._dynamo.testing import CompileCounterWithBackend

    from mtraining.generate import Generator
    from mtraining.layout import build_layout
    from mtraining.model import parallel
    from mtraining.model.fused import fuse
    from mtraining.pattern import build_pattern

    torch._dynamo.reset()
    compiler = CompileCounterWithBackend("eager")
    with mock.patch.object(parallel, "fuse", functools.partial(fuse, backend=compiler)):
        model = parallelize(
            lively_model("qwen2"),
            pattern=build_pattern(**DENSE),
            layout=build_layout("striped", 8),
            fused="compile",
        )
    made = Generator(model)
    found = made.generate(prompts(), 4, eos=())
    assert compiler.frame_count == 0
    plain = generator_for(None, "qwen2").generate(prompts(), 4, eos=())
    assert [one.tokens for one in found] == [one.tokens for one in plain]
    batch = tiny_batch()
    model(batch.input_ids, batch.position_ids, batch.labels, batch.num_labels).backward()
    assert compiler.frame_count > 0
