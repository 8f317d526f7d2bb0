"""Packed documents train as if each were alone, on every topology; and no bit of one depends on another."""

from __future__ import annotations

from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from packed_cases import PackedBatch, alone, packed_batch
from test_gradients import TOLERANCE, TOPOLOGIES, take
from tiny_models import (
    BLOCK,
    DENSE,
    SEQ_LEN,
    SPARSE,
    plain_gradients,
    relative_errors,
    tiny_model,
    tiny_options,
)
from torch import Tensor

from distributed import ProcessPool, Worker
from mtraining.errors import UserError
from mtraining.layout import build_layout
from mtraining.model import ParallelLM, build_model, parallelize
from mtraining.model import loss as loss_module
from mtraining.model import positions as positions_module
from mtraining.pattern import Pattern, build_pattern
from mtraining.ring import Observer, Ring, sparse_ring_attention
from pattern_cases import SPARSE as PATTERNS
from pattern_cases import build_case


def made(
    model: Any = None, pattern: Pattern | None = None, layout: str = "striped", **options: Any
) -> ParallelLM:
    return parallelize(
        tiny_model("qwen2") if model is None else model,
        pattern=pattern or build_pattern(**DENSE),
        layout=build_layout(layout, BLOCK),
        **options,
    )


@pytest.fixture(scope="module")
def expected() -> tuple[float, dict[str, Tensor]]:
    return alone(tiny_model("qwen2"), packed_batch())


def packed_gradients(
    worker: Worker, topology: str, layout: str, recompute: str, micro: int, pattern: dict[str, Any] = DENSE,
    family: str = "qwen2",
) -> tuple[float, dict[str, Tensor]]:  # fmt: skip
    """Job: loss and gradients of the packed batch in pieces of ``micro`` rows, on this topology."""
    mesh = worker.mesh(*TOPOLOGIES[topology])
    dealt = build_layout(layout, BLOCK)
    model = parallelize(
        tiny_model(family), mesh, pattern=build_pattern(**pattern), layout=dealt, recompute=recompute,
        reduce_dtype=torch.float64, loss_chunk=40,
    )  # fmt: skip
    batch = packed_batch()
    sizes = dict(zip(mesh.mesh_dim_names, mesh.mesh.shape, strict=True))
    dp = sizes.get("dp", 1)
    rank = int((mesh.mesh.flatten() == dist.get_rank()).nonzero()) * dp // mesh.size()
    starts = batch.starts.chunk(dp)[rank]
    total = torch.zeros((), dtype=torch.float64)
    parts = [part.split(micro) for part in (*take(batch, dealt, mesh), starts)]
    for ids, at, labels, begins in zip(*parts, strict=True):
        share = model(ids, at, labels, batch.num_labels, starts=begins)
        share.backward()
        total += share.detach()
    dist.all_reduce(total)
    gradients = {name: parameter.grad.full_tensor() for name, parameter in model.hf_model.named_parameters()}
    return total.item(), gradients if worker.rank == 0 else {}


@pytest.mark.parametrize(
    ("topology", "layout", "recompute", "micro"),
    [
        ("cp1", "striped", "none", 1),
        ("cp2", "contiguous", "full", 4),
        pytest.param("cp4", "zigzag", "keep_attention", 2, marks=pytest.mark.slow),
        pytest.param("dp2", "striped", "full", 1, marks=pytest.mark.slow),
        ("dp2xcp2", "striped", "full", 1),
        pytest.param("cp2x2", "striped", "none", 4, marks=pytest.mark.slow),
    ],
)
def test_one_loss_whatever_the_packing(
    pool: ProcessPool, expected: Any, topology: str, layout: str, recompute: str, micro: int
) -> None:
    """Equal to each document trained alone and averaged over its tokens, in fp64: loss and every gradient."""
    world = int(torch.tensor(TOPOLOGIES[topology][0]).prod())
    results = pool.run(
        packed_gradients, world=world, topology=topology, layout=layout, recompute=recompute, micro=micro
    )
    loss, gradients = results[0]
    assert loss == pytest.approx(expected[0], rel=TOLERANCE)
    errors = relative_errors(gradients, expected[1])
    assert max(errors.values()) < TOLERANCE, errors


def test_sparse_attention_among_packed_documents(pool: ProcessPool) -> None:
    """Equal to plain transformers under the mask of what each document may see of what the pattern selects."""
    batch, masks = packed_batch(), []

    def spy(*args: Any, **kwargs: Any) -> Tensor:
        out, index = sparse_ring_attention(*args, **kwargs, return_index=True)
        masks.append(index.to_mask())
        return out

    with mock.patch("mtraining.ring.op.sparse_ring_attention", spy):
        made(pattern=build_pattern(**SPARSE), recompute="none").hidden_states(
            *inputs(batch)[:2], starts=batch.starts
        )
    document = torch.arange(SEQ_LEN)[:, None] >= torch.arange(SEQ_LEN)  # and from each start on
    document = document & (torch.arange(SEQ_LEN) >= batch.starts[:, :, None])
    assert len(masks) == 2
    for mask in masks:
        assert not (mask & ~document[:, None]).any()
        # A mask that hides nothing would test nothing.
        assert mask.sum() < 0.8 * document.sum() * mask.shape[1]
    expected_loss, expected = plain_gradients(tiny_model("qwen2"), batch, masks)
    options = {"topology": "dp2xcp2", "layout": "striped", "recompute": "full", "micro": 2, "pattern": SPARSE}
    loss, gradients = pool.run(packed_gradients, world=4, **options)[0]
    assert loss == pytest.approx(expected_loss, rel=TOLERANCE)
    errors = relative_errors(gradients, expected)
    assert max(errors.values()) < TOLERANCE, errors


def inputs(batch: PackedBatch) -> tuple[Tensor, Tensor, Tensor]:
    return batch.input_ids, batch.position_ids, batch.labels


def gradients_of(model: ParallelLM, batch: PackedBatch, **options: Any) -> tuple[float, dict[str, Tensor]]:
    model.zero_grad()
    loss = model(*inputs(batch), batch.num_labels, starts=batch.starts, **options)
    loss.backward()
    return loss.item(), {
        name: parameter.grad.clone()
        for name, parameter in model.hf_model.named_parameters()
        if parameter.grad is not None
    }


ROPES: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default", "rope_theta": 1e4},
    "linear": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0},
    "yarn": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32},
    # Fixed at the training length, so a document shorter than the original context is rotated like the others.
    "longrope": {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "factor": 4.0,
        "original_max_position_embeddings": 32,
        "short_factor": [1.0] * 8,
        "long_factor": [1.0 + place / 2 for place in range(8)],
    },
    "llama3": {
        "rope_type": "llama3", "rope_theta": 1e4, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
}  # fmt: skip


KINDS = (*ROPES, "dynamic")


def roped(kind: str) -> Any:
    if kind == "dynamic":  # a theta, fixed at the training length for documents of any length
        options = tiny_options("llama", type="dynamic", original_max_position_embeddings=32)
    else:
        options = tiny_options("llama")
        fields = {**options.config, "rope_parameters": ROPES[kind]}
        options = options.model_copy(update={"config": fields})
    return build_model(options, SEQ_LEN)[0]


@pytest.mark.parametrize("kind", KINDS)
def test_positions_restart_under_every_rope_type(kind: str) -> None:
    """Each document is rotated as if it were alone."""
    batch = packed_batch(2)
    loss, expected = alone(roped(kind), batch)
    got, gradients = gradients_of(made(roped(kind)), batch)
    assert got == pytest.approx(loss, rel=TOLERANCE)
    assert max(relative_errors(gradients, expected).values()) < TOLERANCE


def test_rope_types_differ() -> None:
    """Or the test above would show one of them only."""
    batch = packed_batch(2)
    losses = {kind: gradients_of(made(roped(kind)), batch)[0] for kind in KINDS}
    assert len({round(loss, 6) for loss in losses.values()}) == len(KINDS)


CHANGED = (0, slice(37, 101))  # the second document of the first row


def leaked(model: ParallelLM, starts: bool, step: int | None = None) -> list[str]:
    """What differs for the other documents, by a single bit, when the tokens of one change: losses and gradients."""
    batch = packed_batch(2)
    row, place = CHANGED
    batch.labels[row, place] = -100
    begins = batch.starts if starts else torch.zeros_like(batch.starts)
    at = batch.position_ids if starts else torch.arange(SEQ_LEN).expand_as(batch.position_ids)
    found = []
    for change in (0, 13):
        ids = batch.input_ids.clone()
        ids[row, place] = (ids[row, place] + change) % 97
        changed = replace(batch, input_ids=ids, position_ids=at, starts=begins)
        with model.training_step(1 if step is None else step):
            losses = model.token_losses(*inputs(changed), starts=begins)
            found.append({"losses": losses, **gradients_of(model, changed)[1]})
    return [name for name, value in found[0].items() if not torch.equal(value, found[1][name])]


CASES = {name: build_case(case) for name, case in PATTERNS.items()} | {
    "dense": build_pattern(**DENSE),
    "vertical_slash": build_pattern(**SPARSE),
    "toeplitz_random": build_pattern("toeplitz_random", block_size=BLOCK, density=0.3, window=1, columns=6),
}


@pytest.mark.parametrize("name", CASES)
def test_no_bit_of_a_document_depends_on_another(name: str) -> None:
    """Neither by attention nor by what is selected. Without starts the same comparison finds the leak."""
    model = made(pattern=CASES[name], recompute="full")
    assert leaked(model, starts=True) == []
    assert len(leaked(model, starts=False)) > 20


@pytest.mark.parametrize("name", ["vertical_slash", "xattention"])
def test_no_bit_leaks_under_held_indices(name: str) -> None:
    model = made(pattern=CASES[name], refresh={"frozen_at": 1}, coverage=3)
    batch = packed_batch(2)
    with model.training_step(1):
        gradients_of(model, batch)
    assert leaked(model, starts=True, step=2) == []


def leak_on_a_ring(worker: Worker, layout: str) -> dict[str, list[str]]:
    """Job: what differs on this rank for the other documents, for each pattern."""
    dealt, mesh = build_layout(layout, BLOCK), worker.mesh()
    rank, found = Ring.over(mesh).rank, {}
    batch = packed_batch(2)
    row, place = CHANGED
    batch.labels[row, place] = -100
    for name, pattern in CASES.items():
        model = parallelize(tiny_model("qwen2"), mesh, pattern=pattern, layout=dealt)
        seen = []
        for change in (0, 13):
            ids = batch.input_ids.clone()
            ids[row, place] = (ids[row, place] + change) % 97
            parts = [
                dealt.shard(part, rank, worker.world) for part in (ids, batch.position_ids, batch.labels)
            ]
            model.zero_grad()
            losses = model.token_losses(*parts, starts=batch.starts)
            model(*parts, batch.num_labels, starts=batch.starts).backward()
            gradients = {n: p.grad.to_local().clone() for n, p in model.named_parameters()}
            seen.append({"losses": losses, **gradients})
        found[name] = [n for n, value in seen[0].items() if not torch.equal(value, seen[1][n])]
    return found


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["striped", "zigzag", "contiguous"])
def test_no_bit_leaks_over_a_ring(pool: ProcessPool, layout: str) -> None:
    nothing: dict[str, list[str]] = {name: [] for name in CASES}
    assert pool.run(leak_on_a_ring, world=2, layout=layout) == [nothing, nothing]


@pytest.mark.parametrize("recompute", ["full", "keep_attention"])
def test_recompute_and_accumulation_change_no_bit(recompute: Any) -> None:
    """Backward finds the starts of its own batch, though another forward came between."""
    batch = packed_batch(2)
    loss, expected = gradients_of(made(pattern=CASES["vertical_slash"], recompute="none"), batch)
    model = made(pattern=CASES["vertical_slash"], recompute=recompute)
    share = model(*inputs(batch), batch.num_labels, starts=batch.starts)
    other = [part.flip(0)[:1] for part in (*inputs(batch), batch.starts)]
    model.token_losses(*other[:3], starts=other[3])
    share.backward()
    assert share.item() == loss
    assert all(torch.equal(p.grad, expected[name]) for name, p in model.hf_model.named_parameters())


def test_an_unpacked_forward_after_a_packed_one_sees_everything() -> None:
    batch, model = packed_batch(2), made()
    plain = torch.arange(SEQ_LEN).expand(2, -1)
    before = model.hf_model(batch.input_ids, position_ids=plain, use_cache=False).logits
    model.hidden_states(batch.input_ids, batch.position_ids, starts=batch.starts)
    assert torch.equal(before, model.hf_model(batch.input_ids, position_ids=plain, use_cache=False).logits)


def test_held_indices_know_no_documents() -> None:
    """They are given those of each batch anew."""
    model, batch = made(pattern=CASES["xattention"], refresh={"every_n": 2}), packed_batch(2)
    with model.training_step(1):
        gradients_of(model, batch)
    assert model.indices._held and all(index.starts is None for index in model.indices._held.values())
    lengths = [64, SEQ_LEN - 64]
    begins = torch.tensor([0] * 64 + [64] * lengths[1], dtype=torch.int32).expand(2, -1).contiguous()
    other = replace(batch, starts=begins, position_ids=torch.arange(SEQ_LEN) - begins.long())
    with Observer() as seen, model.training_step(2):
        gradients_of(model, other)
    assert all(not stats.index.to_mask()[..., 64:, :64].any() for stats in seen.stats)


def test_compiled_code_knows_documents() -> None:
    """One graph serves batches of other documents, and refuses positions that do not fit them."""
    batch, model, compiled = packed_batch(2), made(recompute="none"), made(recompute="none")
    compiled.hf_model.model.compile(fullgraph=True, backend="aot_eager")
    for rows in (slice(0, 2), slice(2, 4)):
        all_rows = packed_batch(4)
        ids, at, starts = (
            part[rows] for part in (all_rows.input_ids, all_rows.position_ids, all_rows.starts)
        )
        expected = model.hidden_states(ids, at, starts=starts)
        assert torch.equal(compiled.hidden_states(ids, at, starts=starts), expected)
    with pytest.raises(UserError, match="begin at 0 where starts says"):
        compiled.hidden_states(batch.input_ids, at, starts=batch.starts)


WRONG: dict[str, tuple[Any, str]] = {
    "positions of the sequence": (
        lambda batch: {"position_ids": torch.arange(SEQ_LEN).expand(2, -1)},
        r"local token 37 has 37, not 0; .* begin at 0 where starts says",
    ),
    "another row's starts": (lambda batch: {"starts": batch.starts.flip(0)}, "begin at 0 where starts says"),
    "starts of one row": (lambda batch: {"starts": batch.starts[:1]}, r"give int32 \(2, 128\)"),
    "starts that decrease": (
        # with positions that count from them all the same
        lambda batch: {
            "starts": batch.starts.clone().index_fill_(1, torch.tensor([120]), 0),
            "position_ids": batch.position_ids.clone().index_fill_(1, torch.tensor([120]), 120),
        },
        "starts must not decrease",
    ),
    "positions without starts": (lambda batch: {"starts": None}, "or pass the starts of documents"),
}


@pytest.mark.parametrize("fault", WRONG)
def test_what_does_not_fit_is_refused(fault: str) -> None:
    batch, model = packed_batch(2), made()
    change, sentence = WRONG[fault]
    with pytest.raises(UserError, match=sentence):
        gradients_of(model, replace(batch, **change(batch)))


@pytest.mark.parametrize("fault", [fault for fault in WRONG if fault != "starts of one row"])
def test_where_values_cannot_be_looked_at_all_becomes_nan(
    fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (loss_module, positions_module):
        monkeypatch.setattr(module, "on_host", lambda x: False)
    monkeypatch.setattr("mtraining.model.parallel.check_starts", lambda *_: None)
    monkeypatch.setattr("mtraining.ring.plan.check_starts", lambda *_: None)
    batch, model = packed_batch(2), made()
    loss, grads = gradients_of(model, batch)
    assert torch.tensor(loss).isfinite() and all(grad.isfinite().all() for grad in grads.values())
    change, sentence = WRONG[fault]
    wrong = replace(batch, **change(batch))
    loss, grads = gradients_of(model, wrong)
    assert torch.tensor(loss).isnan() and not any(grad.isfinite().all() for grad in grads.values())
    with pytest.raises(UserError, match=sentence):
        model.refuse_inputs(wrong.position_ids, wrong.labels, wrong.starts)
