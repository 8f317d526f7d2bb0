"""Layer recompute changes what is kept, never what is computed; it replays the recorded attention index."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from test_gradients import TOPOLOGIES, take
from tiny_models import SPARSE, tiny_batch, tiny_model
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import _checkpoint_without_reentrant_generator, checkpoint
from transformers.models.qwen2 import modeling_qwen2

from distributed import ProcessPool, Worker
from mtraining.errors import UserError
from mtraining.layout import Layout, build_layout
from mtraining.model import LoraOptions, ParallelLM, parallel, parallelize
from mtraining.model import recompute as recompute_module
from mtraining.model.lora import add_lora
from mtraining.model.products import MLP, PRODUCTS, PROJECTIONS, ProductTape
from mtraining.model.recompute import PARTS, LayerPolicy, recompute_layers, runs
from mtraining.pattern import VerticalSlash, build_pattern
from mtraining.ring import attention as ring_attention
from mtraining.ring.tape import current_tape

LAYERS = 2
plain_rotary = modeling_qwen2.apply_rotary_pos_emb
MIXED: dict[str, list[LayerPolicy]] = {
    "products": [LayerPolicy(frozenset({PROJECTIONS, MLP}))] * LAYERS,
    "no attention, then all": [LayerPolicy(frozenset({MLP})), LayerPolicy(everything=True)],
    "nothing, then all parts": [LayerPolicy(), LayerPolicy(frozenset(PARTS))],
}


def run_step(model: ParallelLM, layout: Layout, mesh: DeviceMesh | None = None) -> dict[str, Tensor]:
    """Gradients by name, of one backward."""
    batch = tiny_batch()
    inputs = take(batch, layout, mesh) if mesh else (batch.input_ids, batch.position_ids, batch.labels)
    model(*inputs, batch.num_labels).backward()
    gradients = {}
    for name, parameter in model.hf_model.named_parameters():
        if not parameter.requires_grad:
            continue
        assert parameter.grad is not None
        gradients[name] = parameter.grad.full_tensor() if mesh else parameter.grad
    return gradients


def counted(
    worker: Worker, topology: str | None, recompute: Any, dtype: str
) -> tuple[dict[str, Tensor], int, int]:
    """Job: gradients, how often a pattern was estimated, and how often the ring ran forward, in one step."""
    mesh = worker.mesh(*TOPOLOGIES[topology]) if topology else None
    layout = build_layout("striped", SPARSE["block_size"])
    model = parallelize(
        tiny_model("qwen2", dtype), mesh, pattern=build_pattern(**SPARSE), layout=layout, recompute=recompute
    )
    with (
        mock.patch.object(
            VerticalSlash, "estimate", autospec=True, side_effect=VerticalSlash.estimate
        ) as estimate,
        mock.patch.object(ring_attention, "ring_forward", side_effect=ring_attention.ring_forward) as ring,
    ):
        gradients = run_step(model, layout, mesh)
    return gradients, estimate.call_count, ring.call_count


@pytest.mark.parametrize("topology", [None, "cp2"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_mode_gives_the_same_bits(pool: ProcessPool, topology: str | None, dtype: str) -> None:
    world = 2 if topology else 1
    runs = {
        mode: pool.run(counted, world=world, topology=topology, recompute=MIXED.get(mode, mode), dtype=dtype)[
            0
        ]
        for mode in ("none", "full", "keep_attention", *MIXED)
    }
    gradients, estimates, rings = runs["none"]
    assert (estimates, rings) == (LAYERS, LAYERS)
    repeats = {
        "full": 2,
        "keep_attention": 0,
        "products": 2,
        "no attention, then all": 1,
        "nothing, then all parts": 1,
    }
    for mode, repeated in repeats.items():
        expected_rings = LAYERS + repeated
        again, estimates, rings = runs[mode]
        assert estimates == LAYERS  # the replay estimates nothing
        assert rings == expected_rings
        for name, gradient in gradients.items():
            assert torch.equal(again[name], gradient), (mode, name)


def test_state_dict_keeps_the_names_of_the_model() -> None:
    names = list(tiny_model("llama").state_dict())
    model = parallelize(tiny_model("llama"), recompute="full")
    assert list(model.hf_model.state_dict()) == names
    assert list(model.state_dict()) == [f"hf_model.{name}" for name in names]


def test_no_recompute_without_gradient() -> None:
    model = parallelize(tiny_model("qwen2"), pattern=build_pattern(**SPARSE), recompute="full")
    batch = tiny_batch()
    with mock.patch("mtraining.model.recompute.checkpoint") as checkpoint:
        losses = model.token_losses(batch.input_ids, batch.position_ids, batch.labels)
    checkpoint.assert_not_called()
    share = model(batch.input_ids, batch.position_ids, batch.labels, batch.num_labels)
    assert losses.sum().item() / batch.num_labels == pytest.approx(share.item(), rel=1e-9)


def test_unknown_mode_is_refused() -> None:
    with pytest.raises(
        UserError, match="recompute: 'some' is not known; choose one of full, keep_attention, none"
    ):
        parallelize(tiny_model("qwen2"), recompute="some")  # type: ignore[arg-type]


class Counted(TorchDispatchMode):
    """How often each product of matrices ran."""

    def __init__(self) -> None:
        super().__init__()
        self.products = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.products += func.overloadpacket in PRODUCTS
        return func(*args, **(kwargs or {}))


def products_of(parts: frozenset[str], everything: bool = False, family: str = "qwen2") -> int:
    """Products of one step, attention's own and the loss's among them."""
    layout = build_layout("striped", SPARSE["block_size"])
    policies = [LayerPolicy(parts, everything)] * LAYERS
    model = parallelize(
        tiny_model(family), pattern=build_pattern(**SPARSE), layout=layout, recompute=policies
    )
    with Counted() as counted:
        run_step(model, layout)
    return counted.products


def test_what_is_kept_is_not_computed_again() -> None:
    """Queries, keys, values and what follows attention; gate and up. Nobody needs the last product, of down."""
    attention = frozenset({"attention"})
    kept = products_of(frozenset(), everything=True)
    assert products_of(frozenset(PARTS)) == kept
    assert products_of(frozenset({"attention", PROJECTIONS})) == kept + LAYERS * 2
    assert products_of(frozenset({"attention", MLP})) == kept + LAYERS * 4
    assert products_of(attention) == kept + LAYERS * 6
    # Where a norm follows the last product, it needs that.
    assert products_of(frozenset(PARTS), family="olmo2") == products_of(frozenset(), True, "olmo2")


class _OverwritingRotary(torch.autograd.Function):
    """Rotates queries and keys where they lie, unseen by autograd, as liger-kernel's kernel does."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(cos, sin)
        for x, rotated in zip((q, k), plain_rotary(q.detach(), k.detach(), cos, sin), strict=True):
            x.data.copy_(rotated)
        return q.view_as(q), k.view_as(k)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        return *plain_rotary(*grads, cos, -sin), None, None


def test_a_result_that_is_overwritten_is_kept_as_a_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    def gradients(policy: LayerPolicy) -> dict[str, Tensor]:
        layout = build_layout("striped", SPARSE["block_size"])
        model = parallelize(
            tiny_model("qwen2"), pattern=build_pattern(**SPARSE), layout=layout, recompute=[policy] * LAYERS
        )
        return run_step(model, layout)

    def as_liger(model: Any, policies: Any, device: torch.device, fused: str) -> None:
        recompute_layers(model, policies, device, "liger")

    monkeypatch.setattr(modeling_qwen2, "apply_rotary_pos_emb", _OverwritingRotary.apply)
    monkeypatch.setattr(parallel, "recompute_layers", as_liger)
    expected = gradients(LayerPolicy(everything=True))
    for name, gradient in gradients(LayerPolicy(frozenset(PARTS))).items():
        assert torch.equal(gradient, expected[name]), name


def test_a_result_is_given_back_once_and_never_after_it_was_overwritten() -> None:
    tape, a = ProductTape(frozenset({MLP})), torch.eye(2)
    rounds = []
    for phase in (tape.record, tape.replay, tape.replay):
        with phase(), Counted() as counted, tape.inside(MLP):
            made = [torch.mm(a, a) for _ in range(3)]
        made[1].add_(1)
        rounds.append(([one.tolist() for one in made[::2]], counted.products))
    kept = torch.eye(2).tolist()
    # The one that was overwritten, and the last one, are computed again; the second time all three.
    assert rounds == [([kept, kept], 3), ([kept, kept], 2), ([kept, kept], 3)]


@pytest.mark.parametrize("family", ["mixtral", "olmo2", "phi"])
def test_other_layers(family: str) -> None:
    """Experts; norms after the products; layers without a gate."""
    layout = build_layout("striped", SPARSE["block_size"])

    def gradients(policies: list[LayerPolicy]) -> dict[str, Tensor]:
        model = parallelize(
            tiny_model(family), pattern=build_pattern(**SPARSE), layout=layout, recompute=policies
        )
        return run_step(model, layout)

    expected = gradients([LayerPolicy(everything=True)] * LAYERS)
    for name, gradient in gradients([LayerPolicy(frozenset({MLP})), LayerPolicy(frozenset(PARTS))]).items():
        assert torch.equal(gradient, expected[name]), name


def test_adapters_and_micro_batches() -> None:
    """Two forwards, and then their backwards in the other order."""
    layout, batch = build_layout("striped", SPARSE["block_size"]), tiny_batch()

    def gradients(policy: LayerPolicy) -> dict[str, Tensor]:
        adapted = add_lora(tiny_model("qwen2"), LoraOptions(r=4), seed=0)
        model = parallelize(
            adapted, pattern=build_pattern(**SPARSE), layout=layout, recompute=[policy] * LAYERS
        )
        shares = [
            model(batch.input_ids.roll(shift), batch.position_ids, batch.labels, batch.num_labels)
            for shift in (0, 1)
        ]
        for share in reversed(shares):
            share.backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    expected = gradients(LayerPolicy(everything=True))
    assert expected
    for name, gradient in gradients(LayerPolicy(frozenset(PARTS))).items():
        assert torch.equal(gradient, expected[name]), name


def test_runs_of_layers() -> None:
    kept = LayerPolicy(everything=True)
    assert runs([LayerPolicy(), LayerPolicy(), kept]) == [(0, 1, LayerPolicy()), (2, 2, kept)]


def older_checkpoint(
    function: Callable[..., Any], *args: Any, use_reentrant: bool, context_fn: Any, **kwargs: Any
) -> Any:
    """`checkpoint` as it was before torch 2.13: its contexts stay entered when ``function`` raises."""
    assert not use_reentrant
    generator = _checkpoint_without_reentrant_generator(
        function, True, context_fn, "default", False, True, *args, **kwargs
    )
    next(generator)
    result = function(*args, **kwargs)
    assert next(generator, None) is None
    return result


@pytest.mark.parametrize("implementation", [checkpoint, older_checkpoint])
@pytest.mark.parametrize("offload", [False, True])
def test_a_layer_that_fails_leaves_nothing_behind(
    monkeypatch: pytest.MonkeyPatch, implementation: Any, offload: bool
) -> None:
    """While its error is held, with all frames of the failed layer, other models save and read what is theirs."""
    monkeypatch.setattr(recompute_module, "checkpoint", implementation)
    layout = build_layout("striped", SPARSE["block_size"])

    def made() -> ParallelLM:
        return parallelize(
            tiny_model("qwen2"), pattern=build_pattern(**SPARSE), layout=layout, recompute="keep_attention",
            offload=offload,
        )  # fmt: skip

    expected = run_step(made(), layout)
    failing = made()
    failing.hf_model.model.layers[0].mlp.forward = mock.Mock(side_effect=ValueError("no MLP"))
    with pytest.raises(ValueError, match="no MLP") as held:
        run_step(failing, layout)
    assert current_tape() is None and ProductTape.current() is None
    found = run_step(made(), layout)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert held.value.__traceback__ is not None


class Turned(frozenset[str]):
    """A set whose order is the reverse of the alphabet's. That of plain sets differs from process to process."""

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(super().__iter__(), reverse=True))


def test_the_text_of_a_policy_does_not_depend_on_the_order_of_a_set() -> None:
    """It is a part of tests' names, on which all workers of pytest-xdist must agree."""
    expected = "LayerPolicy(parts=['attention', 'projections', 'mlp'], everything=False, offload=True)"
    for parts in (frozenset(PARTS), Turned(PARTS)):
        policy = LayerPolicy(parts, offload=True)
        assert repr(policy) == str(policy) == expected
    assert LayerPolicy(Turned(PARTS)) == LayerPolicy(frozenset(PARTS)) != LayerPolicy()


def test_policies_that_cannot_be_kept_are_refused() -> None:
    with pytest.raises(UserError, match="recompute: 1 policies for 2 layers"):
        parallelize(tiny_model("qwen2"), recompute=[LayerPolicy()])
    with pytest.raises(UserError, match="compiled layers keep attention's outputs or everything"):
        parallelize(tiny_model("qwen2"), recompute=[LayerPolicy(frozenset({MLP}))] * LAYERS, fused="compile")
    with pytest.raises(UserError, match="recompute='auto' needs the step's memory"):
        parallelize(tiny_model("qwen2"), recompute="auto")  # type: ignore[arg-type]
