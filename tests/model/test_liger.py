"""How liger-kernel is put into a model, with a stand-in for it; tests/gpu has its numbers."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from tiny_models import SPARSE, tiny_batch, tiny_model
from transformers.models.qwen2 import modeling_qwen2

from mtraining.errors import UserError
from mtraining.model import parallelize
from mtraining.model.fused import use_liger
from mtraining.pattern import build_pattern

plain_rotary, plain_mlp = modeling_qwen2.apply_rotary_pos_emb, modeling_qwen2.Qwen2MLP
plain_activations = dict(dict.items(modeling_qwen2.ACT2FN))
calls: list[str] = []


def rotary(*args: Any, **kwargs: Any) -> Any:
    calls.append("rotary")
    return plain_rotary(*args, **kwargs)


def apply_to_qwen2(
    rope: bool = True, fused_linear_cross_entropy: bool = True, swiglu: bool = True, model: Any = None
) -> None:
    """Patches as liger-kernel does: names of the source file, and modules that exist already."""
    assert rope and swiglu and not fused_linear_cross_entropy
    modeling_qwen2.apply_rotary_pos_emb = rotary
    modeling_qwen2.Qwen2MLP = object
    modeling_qwen2.ACT2FN["silu"] = modeling_qwen2.ACT2FN["not yet known"] = object
    for layer in model.model.layers:
        forward: Callable[..., Any] = layer.mlp.forward
        layer.mlp.forward = lambda x, forward=forward: (calls.append("mlp"), forward(x))[1]


@pytest.fixture
def liger(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    stand_in = types.ModuleType("liger_kernel.transformers.monkey_patch")
    stand_in.MODEL_TYPE_TO_APPLY_LIGER_FN = {"qwen2": apply_to_qwen2}  # type: ignore[attr-defined]
    for name in ("liger_kernel", "liger_kernel.transformers"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, stand_in.__name__, stand_in)
    calls.clear()
    yield
    assert modeling_qwen2.apply_rotary_pos_emb is plain_rotary
    assert modeling_qwen2.Qwen2MLP is plain_mlp
    assert dict(dict.items(modeling_qwen2.ACT2FN)) == plain_activations


def step(model: Any) -> float:
    batch = tiny_batch()
    made = parallelize(model, pattern=build_pattern(**SPARSE), recompute="full")
    loss = made(batch.input_ids, batch.position_ids, batch.labels, batch.num_labels)
    loss.backward()
    return loss.item()


@pytest.mark.usefixtures("liger")
def test_one_model_uses_it_and_another_does_not() -> None:
    fused, plain = tiny_model("qwen2"), tiny_model("qwen2")
    use_liger(fused)
    loss = step(plain)
    assert calls == []
    assert step(fused) == loss
    assert calls == ["rotary", "mlp"] * 4  # two layers, and each again in backward


@pytest.mark.usefixtures("liger")
def test_names_in_the_state_dict_stay() -> None:
    model = tiny_model("qwen2")
    names = list(model.state_dict())
    use_liger(model)
    assert list(model.state_dict()) == names


@pytest.mark.usefixtures("liger")
def test_a_model_it_does_not_know_is_refused() -> None:
    with pytest.raises(UserError, match="liger-kernel has nothing for llama; use train.fused=compile"):
        use_liger(tiny_model("llama"))


@pytest.mark.usefixtures("liger")
def test_attention_that_would_not_see_the_replacement_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def other(self: Any, hidden_states: torch.Tensor, **kwargs: Any) -> Any:
        return hidden_states, None

    model = tiny_model("qwen2")
    monkeypatch.setattr(modeling_qwen2.Qwen2Attention, "forward", other)
    with pytest.raises(UserError, match="attention of qwen2 does not call apply_rotary_pos_emb"):
        use_liger(model)


def test_the_package_and_a_gpu_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"fused=liger needs an NVIDIA GPU, not cpu; use train.fused=none or"):
        parallelize(tiny_model("qwen2"), fused="liger")
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers.monkey_patch", None)
    with pytest.raises(UserError, match=r"needs the package liger-kernel \(.*run: pip install"):
        use_liger(tiny_model("qwen2"))
