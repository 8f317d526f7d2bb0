"""Positions that the layout did not deal are refused in every batch, or make all that follows from them NaN."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_models import BLOCK, DENSE, SEQ_LEN, SPARSE, VOCAB, tiny_batch, tiny_model
from torch import Tensor

from distributed import ProcessPool, Worker
from mtraining.errors import UserError
from mtraining.layout import build_layout
from mtraining.model import ParallelLM, parallelize
from mtraining.model import loss as loss_module
from mtraining.model import positions as positions_module
from mtraining.pattern import build_pattern

RESTART = torch.arange(SEQ_LEN // 2).repeat(2).expand(2, -1)
SENTENCE = (
    r"layout 'striped' deals to context-parallel rank 0 of 1: local token 64 has 0, not 64; .* or pass the starts of "
    "documents"
)


def made(family: str = "qwen2", **options: Any) -> ParallelLM:
    return parallelize(
        tiny_model(family), pattern=build_pattern(**SPARSE), layout=build_layout("striped", BLOCK), **options
    )


@pytest.fixture
def unreadable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Values cannot be looked at, as on a GPU, where a look would wait for the device."""
    for module in (loss_module, positions_module):
        monkeypatch.setattr(module, "on_host", lambda x: False)


CALLS = {
    "forward": lambda model, ids, at, labels: model(ids, at, labels, 100),
    "token_losses": lambda model, ids, at, labels: model.token_losses(ids, at, labels),
    "hidden_states": lambda model, ids, at, labels: model.hidden_states(ids, at),
    "hf_model": lambda model, ids, at, labels: model.hf_model(ids, position_ids=at, use_cache=False).logits,
    "hf_model, embeddings": lambda model, ids, at, labels: (
        model.hf_model(
            inputs_embeds=model.hf_model.get_input_embeddings()(ids), position_ids=at, use_cache=False
        ).logits
    ),
    "decoder": lambda model, ids, at, labels: model.hf_model.model(ids, None, at, use_cache=False)[0],
}


@pytest.mark.parametrize("call", CALLS)
def test_a_restart_is_refused_in_every_batch(call: str) -> None:
    """Not in the first of a length only; one row of a batch is enough."""
    batch, model = tiny_batch(), made()
    CALLS[call](model, batch.input_ids, batch.position_ids, batch.labels)
    for wrong in (RESTART, torch.stack([batch.position_ids[0], RESTART[0]]), RESTART[:1]):
        with pytest.raises(UserError, match=SENTENCE):
            CALLS[call](model, batch.input_ids, wrong, batch.labels)
    CALLS[call](model, batch.input_ids, batch.position_ids[:1], batch.labels)


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.usefixtures("unreadable")
def test_where_positions_cannot_be_looked_at_all_becomes_nan(call: str) -> None:
    batch, model = tiny_batch(), made()
    right = CALLS[call](model, batch.input_ids, batch.position_ids, batch.labels)
    assert right.isfinite().all()
    wrong = CALLS[call](model, batch.input_ids, RESTART, batch.labels)
    assert (wrong.isnan() | (wrong == 0)).all() and wrong.isnan().any()  # token losses are 0 where ignored


def step(
    model: ParallelLM, position_ids: Tensor, labels: Tensor | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    batch = tiny_batch()
    model.zero_grad()
    loss = model(batch.input_ids, position_ids, batch.labels if labels is None else labels, batch.num_labels)
    loss.backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return loss.detach(), grads


@pytest.mark.parametrize("family", ["qwen2", "gemma", "gpt_neox", "granite", "lfm2", "nemotron", "phi3"])
def test_the_check_changes_no_bit_and_poisons_every_gradient(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the last operation of a family's decoder is."""
    right = tiny_batch().position_ids
    loss, grads = step(made(family), right)
    for module in (loss_module, positions_module):
        monkeypatch.setattr(module, "on_host", lambda x: False)
    model = made(family)
    checked_loss, checked = step(model, right)
    assert torch.equal(loss, checked_loss) and grads.keys() == checked.keys()
    assert all(torch.equal(grad, checked[name]) for name, grad in grads.items())
    loss, grads = step(model, RESTART)
    assert loss.isnan() and not any(grad.isfinite().all() for grad in grads.values())


class Guarded(torch.autograd.Function):
    """Returns a view, as liger-kernel's norm does: autograd forbids to change such a result in place."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone().view(x.shape)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0]


@pytest.mark.usefixtures("unreadable")
def test_the_last_norm_may_be_a_custom_function(monkeypatch: pytest.MonkeyPatch) -> None:
    model = made()
    norm = model.hf_model.model.norm
    plain = norm.forward
    monkeypatch.setattr(norm, "forward", lambda x: Guarded.apply(plain(x)))
    loss, grads = step(model, tiny_batch().position_ids)
    expected, wanted = step(made(), tiny_batch().position_ids)
    assert torch.equal(loss, expected)
    assert all(torch.equal(grad, wanted[name]) for name, grad in grads.items())
    assert step(model, RESTART)[0].isnan()


@pytest.mark.usefixtures("unreadable")
def test_what_made_a_loss_nan_is_told() -> None:
    batch, model = tiny_batch(), made()
    model.refuse_inputs(batch.position_ids, batch.labels)
    with pytest.raises(UserError, match=SENTENCE):
        model.refuse_inputs(RESTART, batch.labels)
    for label in (-1, -101, VOCAB):
        labels = batch.labels.clone()
        labels[1, 5] = label
        assert step(model, batch.position_ids, labels)[0].isnan()
        with pytest.raises(
            UserError, match=rf"labels: 1 of them \(such as {label}\) .* the model's 97 words"
        ):
            model.refuse_inputs(batch.position_ids, labels)


def test_a_compiled_decoder_refuses_them_too() -> None:
    batch, model = tiny_batch(), made(recompute="none")
    model.hf_model.model.compile(fullgraph=True, backend="aot_eager")
    model.hidden_states(batch.input_ids, batch.position_ids)
    with pytest.raises(UserError, match=SENTENCE):
        model.hidden_states(batch.input_ids, RESTART)


def test_a_caller_that_knows_its_positions_can_lift_the_check() -> None:
    batch, model = tiny_batch(), made()
    with model.positions.lifted():
        model.hf_model(batch.input_ids, position_ids=RESTART, use_cache=False)
    with pytest.raises(UserError, match=SENTENCE):
        model.hf_model(batch.input_ids, position_ids=RESTART, use_cache=False)


def test_one_position_a_token() -> None:
    batch, model = tiny_batch(), made()
    with pytest.raises(UserError, match=r"position_ids of shape \(2, 64\) do not fit 128 tokens"):
        model.hidden_states(batch.input_ids, batch.position_ids[:, :64])


def test_one_process_may_leave_positions_out() -> None:
    batch, model = tiny_batch(), made()
    with torch.no_grad():
        assert torch.equal(
            model.hf_model(batch.input_ids, use_cache=False).logits,
            model.hf_model(batch.input_ids, position_ids=batch.position_ids, use_cache=False).logits,
        )


def on_two_ranks(worker: Worker) -> list[str]:
    """Job: what each rank is told of positions that are missing, of the other rank, or those of its documents."""
    layout = build_layout("striped", BLOCK)
    model = parallelize(tiny_model("qwen2"), worker.mesh(), pattern=build_pattern(**DENSE), layout=layout)
    batch = tiny_batch()
    ids, at, restart, other = (
        layout.shard(x, rank, 2)
        for x, rank in (
            (batch.input_ids, worker.rank),
            (batch.position_ids, worker.rank),
            (RESTART, worker.rank),
            (batch.position_ids, 1 - worker.rank),
        )
    )
    model.hidden_states(ids, at)
    told = []
    for wrong in (None, restart, other):
        try:
            model.hf_model(ids, position_ids=wrong, use_cache=False)
        except UserError as error:
            told.append(str(error))
    return told


def test_every_rank_of_a_ring_refuses_them(pool: ProcessPool) -> None:
    for rank, (missing, restart, other) in enumerate(pool.run(on_two_ranks, world=2)):
        assert missing.startswith(
            "position_ids are missing, and without them the model takes the tokens of each of 2"
        )
        assert f"rank {rank} of 2: local token 32 has {8 * rank}, not {64 + 8 * rank}" in restart
        assert f"rank {rank} of 2: local token 0 has {8 - 8 * rank}, not {8 * rank}" in other
